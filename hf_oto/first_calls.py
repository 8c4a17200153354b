"""What training does with a model: the calls of its forward that the loss of a few first examples makes.

`FirstCalls` is a part of `OTOMixin`. The examples come from the loader that training reads, and training sees them
again (examples.py).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.nn import ParameterList
from transformers import TrainingArguments

from .by_layers import taken_apart
from .calls import Forward, device_of, own_copy, raise_if_out_of_memory, recorded
from .evaluating import WeightsKept, evaluating, random_states_kept
from .examples import Beginning
from .modeling_oto import OTOError
from .restore import contents, restored

logger = logging.getLogger(__name__)


class FirstCalls:
    """The part of `OTOMixin` that looks at the first examples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._loader: Any = None  # the loader that training will read, until its first examples have been read
        self._taken: list[Any] = []  # batches that were read of an iterator, and that training has to begin with
        self._taken_of: Any = None  # that iterator
        super().__init__(*args, **kwargs)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """`Trainer`'s; the training loop asks with the data loader that it goes on to read."""
        if dataloader is not self._taken_of:
            self._taken = []
        self._loader = dataloader
        return super().set_initial_training_values(args, dataloader)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s, beginning with the batches that were read of an iterator before."""
        taken = (self._taken.pop(0) for _ in range(len(self._taken)))
        # A chain does not close the epoch's iterator at its own end, as a generator around it would.
        batches = itertools.chain(taken, epoch_iterator)
        return super().get_batch_samples(batches, *args, **kwargs)

    def trace_calls(self) -> Sequence[Mapping[str, Any] | Forward]:
        """The calls of the model's forward that training makes: those of one `compute_loss` on a few examples.

        Override it where that is not how your trainer uses its model: a list of keyword arguments of forward.

        Raises:
            OTOError: no batch could be computed; the error that the trainer's own first batch gives is its cause.
        """
        loader = self._loader
        self._loader = None
        if loader is None or getattr(loader, "num_workers", 0) > 0:  # workers would go on from where they were left
            loader = self.get_train_dataloader()
        forwards: list[Forward] = []
        problem: Exception | None = None
        with Beginning(loader, self._train_batch_size) as beginning:
            for make_batch in beginning.batches():
                try:
                    new_forwards, is_finite = self._calls_where_it_trains(make_batch, beginning.owners)
                except Exception as error:
                    raise_if_out_of_memory(error)
                    logger.info("compute_loss on a few examples failed: %s: %s", type(error).__name__, error)
                    problem = error
                    continue
                # Examples without labels, whose loss is no number, show the calls too, if there are no better ones.
                if is_finite or not forwards:
                    forwards = new_forwards
                if is_finite:
                    break
        if beginning.taken:
            self._taken += beginning.taken
            self._taken_of = loader
        if forwards:
            return forwards
        raise OTOError(
            f"compute_loss of {type(self).__name__} fails on its first batch: {type(problem).__name__}: {problem} (if "
            "it needs what only training has, an optimizer, say: override trace_calls)"
        ) from problem

    def _calls_where_it_trains(
        self, make_batch: Callable[[], Any], owners: Sequence[Any]
    ) -> tuple[list[Forward], bool]:
        """`_calls_of_a_loss` on the device of the training, one layer after the other, or where the model lies."""
        here = device_of(self.model)  # FSDP2 takes the model to its card only when training begins
        there = self.args.device
        if here is None or here.type == there.type:
            return self._calls_of_a_loss(make_batch, owners)
        try:
            # A layer has its weights while it runs forward, and not when a gradient is asked for.
            with random_states_kept(self.model), taken_apart(self.model, there) as by_layers, by_layers.running():
                forwards, is_finite = self._calls_of_a_loss(make_batch, owners)
        except Exception as error:
            logger.info("compute_loss on a few examples failed on %s: %s: %s", there, type(error).__name__, error)
            return self._calls_of_a_loss(make_batch, owners)
        return [forward._replace(home=there).copy_on(here) for forward in forwards], is_finite

    def _calls_of_a_loss(self, make_batch: Callable[[], Any], owners: Sequence[Any]) -> tuple[list[Forward], bool]:
        """The calls that one `compute_loss` makes, and whether the loss is finite.

        Args:
            make_batch: makes the batch.
            owners: objects of the data that stay as they were, as do the trainer and the model.
        """
        owners = [self, self.args, self.state, self.control, *owners]
        if hasattr(self.data_collator, "__dict__"):
            owners.append(self.data_collator)  # the loader's own collator may be another one around it
        with random_states_kept(self.model), restored(self.model, *owners):
            # Tensors that the trainer keeps may be changed in place (sums that grow, say): the loss gets copies.
            watched = list(self.model.parameters())  # copies of these would take as much memory as the model
            for container, _ in contents(torch.nn.Module(), self).containers:
                if isinstance(container, dict):
                    for name, value in list(container.items()):
                        if isinstance(value, torch.nn.Parameter):
                            watched.append(value)
                        elif isinstance(value, torch.Tensor):
                            container[name] = value.clone()
            self._taken = []
            self.log = lambda *_, **__: None  # what the loss reports is no part of the training yet
            self._teacher = None  # it would be asked for nothing
            # DeepSpeed's inputs are in 16 bits; the model, which DeepSpeed hasn't got yet, may still be in 32
            if self.is_deepspeed_enabled:
                dtype = self.accelerator.state.deepspeed_plugin.hf_ds_config.dtype()
                self.is_deepspeed_enabled = any(p.dtype == dtype for p in self.model.parameters())
            self.args.average_tokens_across_devices = False  # ranks that fail one by one must not wait for each other
            batch = own_copy(make_batch())
            # FSDP2 takes the model to its card only when training begins, until then it lies on the CPU
            device = device_of(self.model) or self.args.device
            samples, num_items = self.get_batch_samples(iter([batch]), 1, device)
            self.current_gradient_accumulation_steps = 1  # the training loop has not set it yet
            with evaluating(self.model, training=True), WeightsKept(ParameterList(watched)), torch.enable_grad():
                # Outside of `recorded`: preparing may generate with the model, which is no part of the loss.
                inputs = self._prepare_inputs(samples[0])
                if device.type != self.args.device.type:
                    inputs = send_to_device(inputs, device)
                with recorded(self.model) as forwards, self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model, inputs, num_items_in_batch=num_items)
        if not forwards:
            raise OTOError(f"compute_loss of {type(self).__name__} does not call its model: override trace_calls")
        is_finite = bool(torch.isfinite(torch.as_tensor(loss)).all())
        return forwards, is_finite
