"""The end of a run, tried before its first step: the cut model is saved and built again from what was saved.

Stands beside the trainer. What can't be done in the end (a config that isn't JSON, weights that share memory, a class
whose constructor wants more than its config) is found out while nothing is lost yet.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .calls import outermost_pretrained
from .cut import Cut, trial_compact
from .modeling_oto import OTOError


def rehearse_saving(model: nn.Module, cut: Cut, save: Callable[[], None], folder: str) -> None:
    """Makes the model compact for a moment, saves it, and loads every Transformers model in it again, without weights.

    Args:
        save: saves the model in `folder`, as it will be in the end.
        folder: an empty one.

    Raises:
        OTOError: what is loaded is another model than what was saved.
        Exception: whatever saving or loading raises.
    """
    with trial_compact(model, cut), no_progress_bars():
        save()
        refuse_adapter(model, folder)
        for number, (path, part) in enumerate(outermost_pretrained(model).items()):
            where = folder
            if path:  # what is around it saves it in a way of its own
                where = os.path.join(folder, f"part-{number}")
                part.save_pretrained(where)
            _load_again(part, where)


def refuse_adapter(model: nn.Module, folder: str) -> None:
    """Raises OTOError where what the model has saved in `folder` is a part of its weights only.

    Such a checkpoint can't say what was cut of the other weights, and the widths of its own part (the rank of an
    adapter) stand in a config that knows of no cut.
    """
    if isinstance(model, PreTrainedModel) and not model._hf_peft_config_loaded:
        return  # it is loaded again as a whole, which says more
    files = sorted(Path(folder).rglob("*.safetensors"))
    saved = sum(math.prod(shape) for file in files for shape in _shapes(file))
    held = sum(p.numel() for p in model.parameters())
    if files and saved < held:
        raise OTOError(
            f"{type(model).__name__} saves {saved:,} of its {held:,} weights, as adapters on a frozen base do: such a "
            "checkpoint can't say what was pruned. Ways out: merge the adapter and let the base train (with peft: "
            "model = model.merge_and_unload(), model.requires_grad_(True)); or prune the base first, save it, and "
            "train the adapter on the compact model"
        )


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Bars would look as if something were saved for good."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _shapes(file: Path) -> Iterator[list[int]]:
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():
            yield weights.get_slice(name).get_shape()


def _load_again(part: PreTrainedModel, folder: str) -> None:
    stock = getattr(type(part), "_oto_stock", type(part))
    try:
        loaded, info = stock.from_pretrained(folder, device_map="meta", output_loading_info=True)
    except Exception:  # some read values while they load, and meta tensors have none
        loaded, info = stock.from_pretrained(folder, output_loading_info=True)
    lost = sorted(info["missing_keys"])
    if lost:
        raise OTOError(f"{len(lost)} weights are not in what {stock.__name__} saved, {lost[0]} for one")
    saved = {name: tuple(t.shape) for name, t in part.state_dict().items()}
    now = {name: tuple(t.shape) for name, t in loaded.state_dict().items()}
    for name in saved.keys() | now.keys():
        if saved.get(name) != now.get(name):
            raise OTOError(f"{name} has shape {saved.get(name)}, and {now.get(name)} once it is loaded again")
