"""The Hub: pushes that end with the compact weights alone, and the part of the card that hf_oto writes.

That part of the card says what was pruned, how this was proved, how to load the model and how to train it again. `Hub`
is a part of `OTOMixin`.
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

# the texts of a card, for readers who may not have hf_oto
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

The difference is the certificate. It compares the outputs of the full model with its zeros and of this model on a
real batch, relative to the spread of the outputs. It is computed in double, where nothing but a wrong cut shows, and
in the model's own dtype.
{figures}
{load}
### Train it again

```python
{arguments}
```

Optimizer: {optimizer}.
{teacher}"""

TEACHER = """
Teacher: {teacher}. Its logits are a part of the loss, with the weight and the temperature above (distillation,
[arXiv 1503.02531](https://arxiv.org/abs/1503.02531)).
"""

LOAD = """\
### Load it

```python
import hf_oto  # makes from_pretrained read the width of every layer
from transformers import {cls}

model = {cls}.from_pretrained("{name}")
```
{remote}
For any other library fill the zeros in again, once. The result is a stock checkpoint with the same outputs.

```python
hf_oto.to_dense(model).save_pretrained("dense")
```

**Never load it with `ignore_mismatched_sizes=True` and without hf_oto**: the cut layers would silently be initialised
anew.
"""

STOCK = """\
### Load it

This is a stock checkpoint, whose config has the widths. Nothing else is needed.

```python
from transformers import {cls}

model = {cls}.from_pretrained("{name}")
```
"""

REMOTE = """
Without hf_oto installed, the file `modeling_oto.py` beside the weights is enough:

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
    teacher: str = "",
) -> str:
    """What a reader of the repository must know of a compact model, as Markdown.

    Args:
        name: the repository.
        model: the model in the repository. It has been saved before, so that its config names the Auto class that
            `trust_remote_code` needs.
        report: `OTOMixin.report`.
        arguments: the training arguments with which another run is the same, as code.
        optimizer: the optimizer that trained the model, in words.
        folder: the folder of the card, which shows the figures in this folder.
        teacher: the teacher, in words, if there was one.
    """
    cls = type(model).__name__
    values = vars(model.config)
    code = f"{Path(FILE_NAME).stem}.{cls}"
    auto_map = values.get("auto_map") or {}
    # those that load this class by the file beside the weights
    autos = [auto for auto, reference in auto_map.items() if reference == code]
    remote = REMOTE.format(auto=autos[-1], name=name) if autos else ""
    # a model whose config has all its widths needs no record of ours
    load = LOAD if "oto" in values else STOCK
    figures = [f"\n![{figure}]({figure})\n" for figure in FIGURES if Path(folder, figure).exists()]
    return COMPACT.format(
        # `STOCK` has no place for `remote`, and `format` ignores it
        load=load.format(name=name, cls=cls, remote=remote),
        sparsity=report["group_sparsity"],
        report=report,
        arguments=arguments,
        optimizer=optimizer,
        figures="".join(figures),
        teacher=TEACHER.format(teacher=teacher) if teacher else "",
    )


def add_to_card(path: str, text: str, optimizer: str) -> None:
    """Puts the text before the first section of a card that `Trainer` wrote, adds tags, corrects the optimizer."""
    card = ModelCard.load(path)
    tags = card.data.tags or []
    tags = dict.fromkeys([*tags, "hf_oto", "pruned"])  # each once, in this order: a card is written several times
    card.data.tags = list(tags)
    # the entry may run over several lines; it ends before the next entry or an empty line
    entry = re.compile(r"^- optimizer: (.|\n)*?(?=\n- |\n\n)", re.MULTILINE)
    # a function, because backslashes in a plain replacement would be read as escapes
    corrected = entry.sub(lambda _: f"- optimizer: {optimizer}", card.text, count=1)
    head, heading, rest = corrected.partition("\n## ")
    card.text = f"{head}\n{text}{heading}{rest}"
    card.save(path)


class Hub:
    """The part of `OTOMixin` that pushes to the Hub and writes cards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer_text = ""  # the optimizer that DHSPG is around, with its settings
        self._early_card: tuple[Any, Any] | None = None  # the arguments of a card that was written while training
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
        """`Trainer.push_to_hub`; after a compact model, dense weights that earlier pushes have left are deleted."""
        folder = self.args.output_dir
        deletes = self.report is not None and self.is_world_process_zero()
        if deletes:
            # saving replaces shards, but leaves the index of the dense model's shards
            Path(folder, SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
        pushed = super().push_to_hub(commit_message, blocking, token, revision, *args, **kwargs)
        if not deletes:
            return pushed
        kept = os.listdir(folder)
        token = token or self.args.hub_token
        revision = revision or self.args.hub_revision

        def delete_others(push: Any = None) -> None:
            if push is None or push.exception() is None:
                _delete_others(self.hub_model_id, kept, token, revision)

        if blocking:
            delete_others()
        else:
            pushed.add_done_callback(delete_others)
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """`Trainer`'s, with a card that says what is pushed, and the code of a model that was compact before."""
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            idle = self.push_in_progress is None or self.push_in_progress.is_done()
            # `Trainer` skips this push while another one runs
            if idle and "config" in vars(self.model):  # without one there is no stock card either
                self.create_model_card(model_name=self.hub_model_id.split("/")[-1])
            code = os.path.join(checkpoint_folder, FILE_NAME)
            if os.path.exists(code):
                shutil.copy(code, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer`'s card with the optimizer that really trained, two more tags, and the text of `model_card`."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and self.state.global_step > 0:
            self._early_card = (args, kwargs) if self.report is None else None
            try:
                self._add_to_card()
            except Exception as error:  # a card is not worth a run that fails
                logger.warning("the card says nothing of the pruning: %s: %s", type(error).__name__, error)

    def _write_early_card_anew(self) -> None:
        """Replaces a card from before the end, which says that training is not over."""
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
            teacher = self._described_teacher()
            also = ("distillation_weight", "distillation_temperature") if teacher else ()
            arguments = as_code(self.args, self.state.max_steps, also)
            text = model_card(name, self.model, self.report, arguments, optimizer, folder, teacher)
        add_to_card(os.path.join(folder, "README.md"), text, optimizer)


def described_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """An optimizer's class and settings in one line. A setting that differs between groups has all its values."""
    shown = {}
    for name in optimizer.defaults:
        values = [group.get(name) for group in optimizer.param_groups]
        if len(set(map(str, values))) > 1:
            shown[name] = values
        elif values[0]:  # a setting that is off, such as amsgrad=False, is left out
            shown[name] = values[0]
    cls = type(optimizer)
    return f"{cls.__module__}.{cls.__qualname__} with {shown}"


def _delete_others(repo: str, kept: Sequence[str], token: str | None, revision: str | None) -> None:
    """Deletes weights at the top of a repository.

    Args:
        kept: the names of the files that have been uploaded, and stay.
    """
    api = HfApi(token=token)
    weights = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    all_files = api.list_repo_files(repo, revision=revision)
    found = {name for name in all_files if weights.fullmatch(name)}
    others = sorted(found.difference(kept))
    # without the compact weights in the repository nothing is deleted: it would be left with none
    has_compact_weights = not found.isdisjoint(kept)
    if others and has_compact_weights:
        api.delete_files(repo, others, revision=revision, commit_message="Delete the dense weights")
