"""What training does with a model: the calls of its forward that the loss of a few first examples makes.

A part of `OTOMixin`. The examples come from the loader that training reads, which sees them again.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    TrainingArguments,
)

from .calls import Forward, own_copy, raise_if_out_of_memory, recorded
from .evaluating import WeightsKept, evaluating, random_states_kept
from .examples import Beginning
from .modeling_oto import OTOError
from .restore import contents, restored

logger = logging.getLogger(__name__)


class FirstCalls:
    """The part of `OTOMixin` that looks at the first examples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._loader: Any = None  # what training will read, until its first examples are looked at
        self._taken: list[Any] = []  # batches looked at that only we can give to training
        self._taken_of: Any = None  # the iterator that they are of
        super().__init__(*args, **kwargs)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """`Trainer`'s; the training loop asks with the data loader that it goes on to read."""
        if dataloader is not self._taken_of:
            self._taken = []
        self._loader = dataloader
        return super().set_initial_training_values(args, dataloader)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s, beginning with what was taken of an iterator before."""
        taken = (self._taken.pop(0) for _ in range(len(self._taken)))
        # a chain, which doesn't close the epoch's iterator at its own end
        return super().get_batch_samples(itertools.chain(taken, epoch_iterator), *args, **kwargs)

    def trace_calls(self) -> Sequence[Mapping[str, Any] | Forward]:
        """The calls of the model's forward that training makes: those of one `compute_loss` on a few examples.

        Override it where that is not how your trainer uses its model: a list of keyword arguments of forward.

        Raises:
            OTOError: no batch could be computed; the error that the trainer's own first batch gives is its cause.
        """
        loader, self._loader = self._loader, None
        if loader is None or getattr(loader, "num_workers", 0) > 0:  # workers go on from where they were left
            loader = self.get_train_dataloader()
        without_loss: list[Forward] = []
        problem: Exception | None = None
        with Beginning(loader, self._train_batch_size) as beginning:
            for make_batch in beginning.batches():
                try:
                    forwards, finite = self._calls_of_a_loss(make_batch, beginning.owners)
                except Exception as error:
                    raise_if_out_of_memory(error)
                    logger.info("compute_loss on a few examples failed: %s: %s", type(error).__name__, error)
                    problem = error
                    continue
                without_loss = without_loss or forwards  # examples without labels show the calls too
                if finite:
                    without_loss = forwards
                    break
        if beginning.taken:
            self._taken += beginning.taken
            self._taken_of = loader
        if without_loss:
            return without_loss
        raise OTOError(
            f"compute_loss of {type(self).__name__} fails on its first batch: {type(problem).__name__}: {problem} (if "
            "it needs what only training has, an optimizer, say: override trace_calls)"
        ) from problem

    def _calls_of_a_loss(self, make_batch: Callable[[], Any], owners: Sequence[Any]) -> tuple[list[Forward], bool]:
        """The calls that one `compute_loss` makes, and whether the loss is finite; trainer, model and the data's
        `owners` stay as they were."""
        owners = [self, self.args, self.state, self.control, *owners]
        if hasattr(self.data_collator, "__dict__"):
            owners.append(self.data_collator)  # the loader's own may be around it
        with random_states_kept(self.model), restored(self.model, *owners):
            for held, _ in contents(torch.nn.Module(), self).containers:
                if isinstance(held, dict):  # sums, say, that grow in place
                    held |= {name: t.clone() for name, t in held.items() if isinstance(t, torch.Tensor)}
            self._taken = []
            self.log = lambda *_, **__: None  # what the loss reports is no part of the training yet
            self.args.average_tokens_across_devices = False  # ranks may fail one by one
            samples, num_items = self.get_batch_samples(iter([own_copy(make_batch())]), 1, self.args.device)
            self.current_gradient_accumulation_steps = 1  # the training loop has not set it yet
            with evaluating(self.model, training=True), WeightsKept(self.model), torch.enable_grad():
                inputs = self._prepare_inputs(samples[0])  # may generate, which is no part of the loss
                with recorded(self.model) as forwards, self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model, inputs, num_items_in_batch=num_items)
        if not forwards:
            raise OTOError(f"compute_loss of {type(self).__name__} does not call its model: override trace_calls")
        return forwards, bool(torch.isfinite(torch.as_tensor(loss)).all())
