"""What pruning left of every layer, and what it did to the loss on the way: two quiet matplotlib figures.

They are drawn at the end of training, together with the report; that needs matplotlib (`pip install "hf_oto[plots]"`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers.utils import is_matplotlib_available

from .cut import Cut

COLOURS = {
    "heads": "#4c72b0",
    "kv_groups": "#64a5b8",
    "units": "#dd8452",
    "channels": "#55a868",
    "groups": "#8172b3",
}
LINES = ("#444444", "#c44e52", "#4c72b0", "#55a868", "#8172b3")
BACKGROUND = "#ececec"
SMALL_TEXT = {"fontsize": 7, "color": "#444444"}
LEGEND = {"fontsize": 8, "frameon": False}
POINTS = {"marker": "o", "markersize": 2.5, "linewidth": 1.3}
Logs = Mapping[str, Any]  # of one step, as the Trainer keeps them

# What is drawn as a share of the dense model: the key of the log -> the label of the line.
SHARES = {
    "oto/group_sparsity": "group sparsity",
    "oto/params_left": "parameters left",
    "oto/macs_left": "MACs left",
}


class Row(NamedTuple):
    """One axis in the figure of widths: how many of its ZIGs are kept, of how many."""

    name: str
    size: int
    kept: int

    @property
    def percentage(self) -> float:
        return 100 * self.kept / self.size


class Line(NamedTuple):
    """All that was logged under one key: value i at step i."""

    steps: list[int]
    values: list[float]


class Names(NamedTuple):
    """The frame that the names of a panel share, "layer.*.query", and for every row what stands for its `*`."""

    frame: str
    labels: list[str]

    @property
    def inches(self) -> float:
        """The width of a panel that has room for them; the bars, and the numbers beside them, are 52 letters wide."""
        longest = max(map(len, self.labels))
        letters = longest + max(52, len(self.frame))
        return 0.06 * letters


def save_figures(folder: str, cut: Cut, history: Sequence[Logs], pruning: Any) -> None:
    """Writes `oto_widths.png` and, if more than the end was logged, `oto_training.png`; none without matplotlib."""
    if not is_matplotlib_available():
        return
    if cut.partition.axes:
        figure = widths(cut)
        path = os.path.join(folder, "oto_widths.png")
        figure.savefig(path, dpi=130)
    logged_steps = {logs["step"] for logs in history}
    if len(logged_steps) > 1:
        figure = progress(history, pruning)
        path = os.path.join(folder, "oto_training.png")
        figure.savefig(path, dpi=130)


def widths(cut: Cut) -> Any:
    """A matplotlib figure of how much of every axis is left: a row per axis, a panel per kind."""
    # matplotlib is optional, and slow to import.
    from matplotlib.figure import Figure

    rows_by_kind: dict[str, list[Row]] = {}
    for axis, gone in cut.partition.split(cut.removed):
        kept = int((~gone).sum())
        row = Row(axis.name, axis.size, kept)
        rows_by_kind.setdefault(axis.kind, []).append(row)
    names_by_kind: dict[str, Names] = {}
    for kind, rows in rows_by_kind.items():
        axis_names = [row.name for row in rows]
        names_by_kind[kind] = _names(axis_names)
    inches = sum(names.inches for names in names_by_kind.values())
    num_rows = max(map(len, rows_by_kind.values()))
    width = 0.3 + inches
    height = 1.3 + 0.16 * num_rows
    figure = Figure((width, height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    figure.suptitle("Kept width of every layer, % of the dense one", fontsize=10)
    num_kinds = len(rows_by_kind)
    for number, kind in enumerate(rows_by_kind, 1):
        rows = rows_by_kind[kind]
        panel = figure.add_subplot(1, num_kinds, number)
        # The legend is that of the whole figure: it names the dense bars once.
        dense_label = "dense" if number == 1 else None
        _draw_rows(panel, rows, kind, dense_label)
        panel.set_xlim(0, 100)
        # A row has the same height in all panels, and the first row is on top.
        panel.set_ylim(num_rows - 0.4, -0.6)
        _name_rows(panel, names_by_kind[kind])
        _quiet(panel, "top")
    figure.legend(loc="outside lower center", ncols=num_kinds + 1, **LEGEND)
    return figure


def _draw_rows(panel: Any, rows: Sequence[Row], kind: str, dense_label: str | None) -> None:
    """Draws the bars, dense ones behind those that are kept, and the numbers beside them."""
    places = range(len(rows))
    percentages = [row.percentage for row in rows]
    label = kind.replace("_", " ")
    panel.barh(places, 100, 0.7, color=BACKGROUND, label=dense_label)
    panel.barh(places, percentages, 0.7, color=COLOURS[kind], label=label)
    for place, row in enumerate(rows):
        numbers = f"{row.kept:,} / {row.size:,}"
        # Beyond the longest bar, which ends at 100.
        panel.text(102, place, numbers, va="center", **SMALL_TEXT)


def _name_rows(panel: Any, names: Names) -> None:
    places = range(len(names.labels))
    panel.set_yticks(places, names.labels)
    panel.set_title(names.frame, loc="left", **SMALL_TEXT)
    panel.xaxis.tick_top()


def _names(names: Sequence[str]) -> Names:
    """The frame that names share, and what tells them apart.

    Example:
        >>> _names(["layer.0.query.weight[0]", "layer.11.query.weight[0]"])
        Names(frame='layer.*.query', labels=['0', '11'])
    """
    paths: list[list[str]] = []
    for name in names:
        layer = name.removesuffix(".weight[0]")
        paths.append(layer.split("."))
    # Of every name at least one part is left for its label.
    most_shared = min(map(len, paths)) - 1
    num_first = min(most_shared, _num_shared(paths))
    reversed_paths = [path[::-1] for path in paths]
    still_shared = most_shared - num_first
    num_last = min(still_shared, _num_shared(reversed_paths))
    labels = []
    for path in paths:
        own_parts = path[num_first : len(path) - num_last]
        labels.append(".".join(own_parts))
    # What is shared is the same in all of them.
    path = paths[0]
    first_parts = path[:num_first]
    last_parts = path[len(path) - num_last :]
    parts_of_frame = [*first_parts, "*", *last_parts]
    frame = ".".join(parts_of_frame)
    return Names(frame, labels)


def _num_shared(paths: Sequence[Sequence[str]]) -> int:
    """How many parts all paths have in common, from the first on."""
    count = 0
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        count += 1
    return count


def progress(history: Iterable[Logs], pruning: Sequence[int]) -> Any:
    """A matplotlib figure of the losses and of how much was pruned, by step; `pruning` is its first and last step."""
    from matplotlib.figure import Figure

    lines: dict[str, Line] = {}
    for logs in history:
        for key, value in logs.items():
            line = lines.setdefault(key, Line([], []))
            line.steps.append(logs["step"])
            line.values.append(value)
    figure = Figure((7.5, 4.6), layout="constrained")
    figure.suptitle("Loss and group sparsity over training", fontsize=10)
    top, bottom = figure.subplots(2, 1, sharex=True)
    if pruning:
        top.axvspan(*pruning, color="#f5f1e6", label="pruning")
        bottom.axvspan(*pruning, color="#f5f1e6")
    _draw_lines(top, lines, _losses(lines), unit=1)
    _draw_lines(bottom, lines, SHARES, unit=100)
    for panel in (top, bottom):
        panel.grid(axis="y", color=BACKGROUND, lw=0.8)
        panel.set_axisbelow(True)
        _quiet(panel, "bottom")
        labelled, _ = panel.get_legend_handles_labels()
        # matplotlib warns of an empty legend.
        if labelled:
            # Beside the panel: inside it would cover lines.
            panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), **LEGEND)
    top.set_ylabel("loss", fontsize=8)
    bottom.set_ylabel("% of the dense model", fontsize=8)
    bottom.set_xlabel("optimizer step", fontsize=8)
    # A line at 0 or 100 % does not touch the edge.
    bottom.set_ylim(-4, 104)
    return figure


def _losses(keys: Iterable[str]) -> dict[str, str]:
    """The losses among what was logged: key -> label."""
    losses = {"loss": "training loss"}
    for key in keys:
        # Other metrics of an evaluation have other units.
        is_loss = key.startswith("eval_") and key.endswith("_loss")
        if is_loss:
            losses[key] = key.replace("_", " ")
    return losses


def _draw_lines(panel: Any, lines: Mapping[str, Line], labels: Mapping[str, str], unit: float) -> None:
    """Draws the lines whose keys have a label, their values times `unit`."""
    colours = itertools.cycle(LINES)
    for key, label in labels.items():
        # Before a look at the lines, so that a label has the same colour in every figure.
        colour = next(colours)
        if key in lines:
            steps, values = lines[key]
            in_unit = [unit * value for value in values]
            panel.plot(steps, in_unit, label=label, color=colour, **POINTS)


def _quiet(panel: Any, line: str) -> None:
    """Leaves of the frame of a panel only one line."""
    panel.tick_params(labelsize=7, length=0)
    panel.spines[:].set_visible(False)
    panel.spines[line].set(visible=True, color="#bbbbbb")
