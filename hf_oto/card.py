"""The part of a model card that hf_oto writes: what was pruned, the proof, how to load it, how to do it again."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from .modeling_oto import FILE_NAME
from .report import Report

FIGURES = ("oto_widths.png", "oto_training.png")

IN_PROGRESS = """\
> **Training is not over.** This is a checkpoint from the middle of it: the dense model, with every width that training
> started with. At the end the compact model takes its place.
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
