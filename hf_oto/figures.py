"""What pruning left of every layer, and what it did to the loss on the way: two quiet matplotlib figures.

Stands at the end of training, beside the report; needs matplotlib (`pip install "hf_oto[plots]"`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers.utils import is_matplotlib_available

from .cut import Cut

COLOURS = {
    "heads": "#4c72b0", "kv_groups": "#64a5b8", "units": "#dd8452", "channels": "#55a868", "groups": "#8172b3",
}  # fmt: skip
LINES = ("#444444", "#c44e52", "#4c72b0", "#55a868", "#8172b3")


def save_figures(folder: str, cut: Cut, history: Sequence[Mapping[str, Any]], pruning: Any) -> None:
    """Writes `oto_widths.png` and, if more than the end was logged, `oto_training.png`; none without matplotlib."""
    if not is_matplotlib_available():
        return
    if cut.partition.axes:
        widths(cut).savefig(os.path.join(folder, "oto_widths.png"), dpi=130)
    if len({logs["step"] for logs in history}) > 1:
        progress(history, pruning).savefig(os.path.join(folder, "oto_training.png"), dpi=130)


def widths(cut: Cut) -> Any:
    """A matplotlib figure of how much of every axis is left: a row per axis, a panel per kind."""
    from matplotlib.figure import Figure

    kinds: dict[str, list[tuple[str, int, int]]] = {}
    for axis, gone in cut.partition.split(cut.removed):
        kinds.setdefault(axis.kind, []).append((axis.name, axis.size, int((~gone).sum())))
    named = {kind: _short([name for name, _, _ in rows]) for kind, rows in kinds.items()}
    inches = sum(0.06 * (max(map(len, labels)) + max(52, len(frame))) for frame, labels in named.values())
    most = max(map(len, kinds.values()))
    figure = Figure((0.3 + inches, 1.3 + 0.16 * most), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    figure.suptitle("Kept width of every layer, % of the dense one", fontsize=10)
    for i, (kind, rows) in enumerate(kinds.items()):
        panel, label = figure.add_subplot(1, len(kinds), i + 1), kind.replace("_", " ")
        panel.barh(range(len(rows)), 100, 0.7, color="#ececec", label=None if i else "dense")
        panel.barh(range(len(rows)), [100 * kept / n for _, n, kept in rows], 0.7, color=COLOURS[kind], label=label)
        for y, (_, n, kept) in enumerate(rows):
            panel.text(102, y, f"{kept:,} / {n:,}", fontsize=7, va="center", color="#444444")
        panel.set(xlim=(0, 100), ylim=(most - 0.4, -0.6))
        panel.set_yticks(range(len(rows)), named[kind][1])
        panel.set_title(named[kind][0], fontsize=7, loc="left", color="#444444")
        panel.xaxis.tick_top()
        _quiet(panel, "top")
    figure.legend(loc="outside lower center", ncols=len(kinds) + 1, fontsize=8, frameon=False)
    return figure


def _short(names: Sequence[str]) -> tuple[str, list[str]]:
    """The frame that names share, and what tells them apart.

    Example:
        >>> _short(["layer.0.query.weight[0]", "layer.11.query.weight[0]"])
        ('layer.*.query', ['0', '11'])
    """
    parts = [name.removesuffix(".weight[0]").split(".") for name in names]
    least = min(map(len, parts)) - 1
    start = min(least, _shared(parts))
    end = min(least - start, _shared([p[::-1] for p in parts]))
    frame = ".".join([*parts[0][:start], "*", *parts[0][len(parts[0]) - end :]])
    return frame, [".".join(p[start : len(p) - end]) for p in parts]


def _shared(lists: Sequence[Sequence[str]]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda entries: len({*entries}) == 1, zip(*lists, strict=False)))


def progress(history: Iterable[Mapping[str, Any]], pruning: Sequence[int]) -> Any:
    """A matplotlib figure of the losses and of how much was pruned, by step; `pruning` is its first and last step."""
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = {}
    for logs in history:
        for key in logs:
            lines.setdefault(key, []).append((logs["step"], logs[key]))
    losses = {"loss": "training loss"}
    losses |= {key: key.replace("_", " ") for key in lines if key.startswith("eval_") and key.endswith("_loss")}
    shares = {
        "oto/group_sparsity": "group sparsity", "oto/params_left": "parameters left", "oto/macs_left": "MACs left",
    }  # fmt: skip
    figure = Figure((7.5, 4.6), layout="constrained")
    figure.suptitle("Loss and group sparsity over training", fontsize=10)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for panel, names, unit in ((top, losses, 1), (bottom, shares, 100)):
        if pruning:
            panel.axvspan(*pruning, color="#f5f1e6", label="pruning" if panel is top else None)
        for (key, name), colour in zip(names.items(), itertools.cycle(LINES), strict=False):
            if key in lines:
                steps, values = zip(*lines[key], strict=True)
                panel.plot(steps, [unit * v for v in values], color=colour, label=name, lw=1.3, marker="o", ms=2.5)
        panel.grid(axis="y", color="#ececec", lw=0.8)
        panel.set_axisbelow(True)
        _quiet(panel, "bottom")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    top.set_ylabel("loss", fontsize=8)
    bottom.set_ylabel("% of the dense model", fontsize=8)
    bottom.set_xlabel("optimizer step", fontsize=8)
    bottom.set_ylim(-4, 104)
    return figure


def _quiet(panel: Any, line: str) -> None:
    panel.tick_params(labelsize=7, length=0)
    panel.spines[:].set_visible(False)
    panel.spines[line].set(visible=True, color="#bbbbbb")
