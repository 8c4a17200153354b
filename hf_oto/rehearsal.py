"""The end of a run, tried before its first step: the cut model is saved and built again from what was saved.

So what can't be done in the end is found out while nothing is lost yet: a config that isn't JSON, say, weights that
share memory, or a class whose constructor wants more than its config. `Rehearsing` is a part of `OTOMixin`.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .calls import outermost_pretrained, raise_if_out_of_memory
from .compaction import trial_compact
from .cut import Cut, resolve
from .modeling_oto import OTOError
from .report import size
from .zigs import random_eighth


class Rehearsing:
    """The part of `OTOMixin` that tries the end of a run before its first step."""

    def _rehearse_the_end(self, model: nn.Module) -> None:
        """Cuts the untrained model for a moment, saves it beside where the trained one will be, and builds it again:
        what can't be done in the end is an error before the first step. The less is kept, the less memory it takes."""
        cut = resolve(self.partition, random_eighth(self.partition), warn=False)
        with self._room_for_rehearsal(model) as folder:
            try:
                rehearse_saving(model, cut, lambda: self._save(folder), folder)
            except Exception as error:
                raise_if_out_of_memory(error)
                raise OTOError(
                    f"a compact {type(model).__name__} can't be saved and loaded again, which was tried before the "
                    f"first step: {type(error).__name__}: {error}"
                ) from error

    def _refuse_adapters(self, model: nn.Module) -> None:
        """Saves a model with frozen parameters once: what saves a part of its weights only is an error, even before
        anything is analysed."""
        if not all(p.requires_grad for p in model.parameters()):
            with self._room_for_rehearsal(model) as folder, no_progress_bars():
                try:
                    self._save(folder)
                except Exception:  # the rehearsal will say why
                    return
                refuse_adapter(model, folder)

    @contextlib.contextmanager
    def _room_for_rehearsal(self, model: nn.Module) -> Iterator[str]:
        """An empty folder, for a moment, beside where the trained model will be."""
        place = self.args.output_dir
        os.makedirs(place, exist_ok=True)
        disk, needed = shutil.disk_usage(place), size(model)["bytes"]
        if disk.total and disk.free < needed:  # some network disks say they have none at all
            raise OTOError(f"the trained model takes {needed:,} bytes, and {disk.free:,} bytes are free in {place}")
        with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=place, ignore_cleanup_errors=True) as folder:
            yield folder


def rehearse_saving(model: nn.Module, cut: Cut, save: Callable[[], None], folder: str) -> None:
    """Makes the model compact for a moment, saves it, and loads every Transformers model in it again, without weights.

    Args:
        save: saves the model in `folder`, as will be done in the end.
        folder: an empty folder.

    Raises:
        OTOError: the loaded model differs from the saved one.
        Exception: whatever saving or loading raises.
    """
    with trial_compact(model, cut), no_progress_bars():
        save()
        refuse_adapter(model, folder)
        for number, (path, part) in enumerate(outermost_pretrained(model).items()):
            part_folder = folder
            if path:  # the module around the part saves it in a way of its own
                part_folder = os.path.join(folder, f"part-{number}")
                part.save_pretrained(part_folder)
            _load_again(part, part_folder)


def refuse_adapter(model: nn.Module, folder: str) -> None:
    """Raises OTOError where the model has saved only a part of its weights in a folder.

    Such a checkpoint can't say what was cut of the other weights, and the widths of its own part (the rank of an
    adapter) stand in a config that knows of no cut.
    """
    if isinstance(model, PreTrainedModel) and not model._hf_peft_config_loaded:
        return  # it will be loaded again as a whole, which shows more
    files = sorted(Path(folder).rglob("*.safetensors"))
    num_saved = sum(math.prod(shape) for file in files for shape in _shapes(file))
    num_weights = sum(p.numel() for p in model.parameters())
    if files and num_saved < num_weights:
        raise OTOError(
            f"{type(model).__name__} saves {num_saved:,} of its {num_weights:,} weights, as adapters on a frozen base "
            "do: such a checkpoint can't say what was pruned. Ways out: merge the adapter and let the base train "
            "(with peft: model = model.merge_and_unload(), model.requires_grad_(True)); or prune the base first, "
            "save it, and train the adapter on the compact model"
        )


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """While open, no bars are shown: they would look as if something were saved for good."""
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


def _shapes(file: Path) -> Iterator[list[int]]:
    """The shapes of the tensors in a file."""
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():
            yield weights.get_slice(name).get_shape()


def _load_again(part: PreTrainedModel, folder: str) -> None:
    """Loads a model that was just saved, and compares names and shapes."""
    stock = getattr(type(part), "_oto_stock", type(part))
    try:
        loaded, info = stock.from_pretrained(folder, device_map="meta", output_loading_info=True)
    except Exception:  # some models read values while they are loaded, and meta tensors have none
        loaded, info = stock.from_pretrained(folder, output_loading_info=True)
    lost = sorted(info["missing_keys"])
    if lost:
        raise OTOError(f"{len(lost)} weights are not in what {stock.__name__} saved, {lost[0]} for one")
    shapes = {name: tuple(t.shape) for name, t in part.state_dict().items()}
    loaded_shapes = {name: tuple(t.shape) for name, t in loaded.state_dict().items()}
    for name in shapes.keys() | loaded_shapes.keys():
        before = shapes.get(name)
        after = loaded_shapes.get(name)
        if before != after:
            raise OTOError(f"{name} has shape {before}, and {after} once it is loaded again")
