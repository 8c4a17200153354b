"""The Hub: pushes that end with the compact weights alone, and the part of the card that hf_oto writes.

It says what was pruned, the proof, how to load the model, and how to do it again. `Hub` is a part of `OTOMixin`.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard
from transformers import (
    PreTrainedModel,
)
from transformers.trainer_utils import HubStrategy
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .arguments import as_code
from .modeling_oto import FILE_NAME
from .report import Report

logger = logging.getLogger(__name__)


FIGURES = ("oto_widths.png", "oto_training.png")

IN_PROGRESS = """\
> **Training is not over.** This is a checkpoint from the middle of it: {model}. At the end the compact model takes its
> place.
"""

COMPACT = """\
## A compact model

Trained and pruned in one run by hf_oto (OTOv2, [arXiv 2303.06862](https://arxiv.org/abs/2303.06862)): {sparsity:.1%}
of the zero-invariant groups (attention heads, units, channels) ended at exactly zero, and the zeros were cut out.

```
{report}
```

The difference is the certificate: on a real batch, of the outputs of the full model with its zeros and of this one,
relative to how far they spread; computed in double, where nothing but a wrong cut shows, and in the model's own dtype.
{figures}
{load}
### Train it again

```python
{arguments}
```

Optimizer: {optimizer}.
"""

LOAD = """\
### Load it

```python
import hf_oto  # makes from_pretrained read the width of every layer
from transformers import {cls}

model = {cls}.from_pretrained("{name}")
```
{remote}
Anywhere else: fill the zeros in again, once. That is a stock checkpoint with the same outputs, for any stack.

```python
hf_oto.to_dense(model).save_pretrained("dense")
```

**Never load it with `ignore_mismatched_sizes=True` and without hf_oto**: the cut layers would silently be initialised
anew.
"""

STOCK = """\
### Load it

It is a stock checkpoint, its config says the widths: nothing else is needed.

```python
from transformers import {cls}

model = {cls}.from_pretrained("{name}")
```
"""

REMOTE = """
Without hf_oto installed, by the one file beside the weights, `modeling_oto.py`:

```python
from transformers import {auto}

model = {auto}.from_pretrained("{name}", trust_remote_code=True)
```
"""


def model_card(
    name: str,
    model: PreTrainedModel,
    report: Report,
    arguments: str,
    optimizer: str,
    folder: str = "",
) -> str:
    """What a reader of the repository must know of a compact model, as Markdown.

    Args:
        name: the repository.
        model: the model in it, saved before: its config names the Auto class that `trust_remote_code` needs.
        report: `OTOMixin.report`.
        arguments: the training arguments that make another run the same, as code.
        optimizer: what trained it, in words.
        folder: where the card will be; shows the figures that lie there.
    """
    cls = type(model).__name__
    code = f"{Path(FILE_NAME).stem}.{cls}"
    autos = [auto for auto, reference in (vars(model.config).get("auto_map") or {}).items() if reference == code]
    load = LOAD if "oto" in vars(model.config) else STOCK
    return COMPACT.format(
        load=load.format(name=name, cls=cls, remote=REMOTE.format(auto=autos[-1], name=name) if autos else ""),
        sparsity=report["group_sparsity"],
        report=report,
        arguments=arguments,
        optimizer=optimizer,
        figures="".join(f"\n![{f}]({f})\n" for f in FIGURES if Path(folder, f).exists()),
    )


def add_to_card(path: str, text: str, optimizer: str) -> None:
    """Puts the text before the first section of a card that `Trainer` wrote, adds tags, corrects the optimizer."""
    card = ModelCard.load(path)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), "hf_oto", "pruned"]))
    line = re.compile(r"^- optimizer: (.|\n)*?(?=\n- |\n\n)", re.MULTILINE)
    head, heading, rest = line.sub(lambda _: f"- optimizer: {optimizer}", card.text, count=1).partition("\n## ")
    card.text = f"{head}\n{text}{heading}{rest}"
    card.save(path)


class Hub:
    """The part of `OTOMixin` that pushes, and writes cards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer_text = ""  # the one that DHSPG is around, with its settings
        self._early_card: tuple[Any, Any] | None = None  # what a card was asked for with, while training
        super().__init__(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`Trainer.push_to_hub`; a compact model then deletes the dense weights that pushes during training left."""
        folder, compacted = self.args.output_dir, self.report is not None and self.is_world_process_zero()
        if compacted:  # saving replaces shards, but not what says where they are
            Path(folder, SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
        pushed = super().push_to_hub(commit_message, blocking, token, revision, *args, **kwargs)
        if compacted:
            kept, at = os.listdir(folder), (token or self.args.hub_token, revision or self.args.hub_revision)
            if blocking:
                _delete_others(self.hub_model_id, kept, *at)
            else:
                pushed.add_done_callback(lambda p: p.exception() or _delete_others(self.hub_model_id, kept, *at))
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """`Trainer`'s, with a card that says what is pushed, and the code of a model that was compact before."""
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            idle = self.push_in_progress is None or self.push_in_progress.is_done()
            if idle and "config" in vars(self.model):  # without one there is no stock card either
                self.create_model_card(model_name=self.hub_model_id.split("/")[-1])
            code = os.path.join(checkpoint_folder, FILE_NAME)
            if os.path.exists(code):
                shutil.copy(code, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer`'s card with the optimizer that really trained, two more tags, and what `model_card` says."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and self.state.global_step > 0:
            self._early_card = (args, kwargs) if self.report is None else None
            try:
                self._add_to_card()
            except Exception as error:
                logger.warning("the card says nothing of the pruning: %s: %s", type(error).__name__, error)

    def _write_early_card_anew(self) -> None:
        """A card from before the end says that training is not over."""
        if self._early_card is not None:
            given, named = self._early_card
            try:
                self.create_model_card(*given, **named)
            except Exception as error:
                logger.warning("the card still says that training goes on: %s: %s", type(error).__name__, error)

    def _add_to_card(self) -> None:
        optimizer = f"DHSPG of hf_oto around {self._optimizer_text}"
        folder = self.args.output_dir
        kind = "a model that is partly cut" if self._has_shrunk else "the dense model, with all its widths"
        text = IN_PROGRESS.format(model=kind)
        if self.report is not None:
            name = self.hub_model_id or Path(folder).name
            arguments = as_code(self.args, self.state.max_steps)
            text = model_card(name, self.model, self.report, arguments, optimizer, folder)
        add_to_card(os.path.join(folder, "README.md"), text, optimizer)


def described_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """An optimizer's class and settings, as one line; where parameter groups differ in one, all its values."""
    shown = {}
    for name in optimizer.defaults:
        values = [group.get(name) for group in optimizer.param_groups]
        if len(set(map(str, values))) > 1:
            shown[name] = values
        elif values[0]:  # not what is off
            shown[name] = values[0]
    cls = type(optimizer)
    return f"{cls.__module__}.{cls.__qualname__} with {shown}"


def _delete_others(repo: str, kept: Sequence[str], token: str | None, revision: str | None) -> None:
    """Deletes the weights at the top of the repository that are not among those in `kept`, which is uploaded."""
    api, weights = HfApi(token=token), re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    found = {name for name in api.list_repo_files(repo, revision=revision) if weights.fullmatch(name)}
    if found - set(kept) and found & set(kept):
        names = sorted(found - set(kept))
        api.delete_files(repo, names, revision=revision, commit_message="Delete the dense weights")
