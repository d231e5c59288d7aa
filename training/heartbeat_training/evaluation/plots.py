"""Pictures of results: colours that the colour-blind tell apart, units on every axis."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.errors import optional
from heartbeat_fast.files import atomic

# Okabe & Ito, 2008
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#777777"
SAMPLERS = {"dpmpp_2m": (BLUE, "o"), "unipc": (ORANGE, "s"), "ddim": (GREEN, "^")}
MORE = (("#CC79A7", "v"), ("#56B4E9", "D"))  # samplers beyond these three


def steps(curves: dict[str, dict[int, dict[str, Any]]], titles: dict[str, str], out: Path) -> Path:
    """One panel a figure, one line a sampler, against the number of steps.

    curves: {sampler: {steps: {figure: {"mean" or "value", "low", "high"}}}}; titles: {figure:
    axis label with unit}.
    """
    figure, axes = _panels(len(titles), 3)
    more = iter(MORE)
    styles = {name: SAMPLERS.get(name) or next(more) for name in curves}
    for axis, (key, title) in zip(axes, titles.items(), strict=False):
        for name, points in curves.items():
            colour, marker = styles[name]
            counts = sorted(points)
            found = [points[count][key] for count in counts]
            values = np.array([_value(f) for f in found])
            low, high = (np.array([f.get(k, np.nan) for f in found]) for k in ("low", "high"))
            axis.plot(counts, values, color=colour, marker=marker, label=name)
            axis.fill_between(counts, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xscale("log")
        every = sorted({count for points in curves.values() for count in points})
        axis.set_xticks(every, [str(count) for count in every], minor=False)
        axis.minorticks_off()
        axis.set(xlabel="sampler steps", ylabel=title)
    axes[0].legend(frameon=False)
    return _save(figure, out)


def table(
    rows: dict[str, dict[str, dict[str, float]]],
    paper: dict[str, dict[str, float]],
    titles: dict[str, str],
    floors: dict[str, float],
    out: Path,
) -> Path:
    """Ours above, the paper's below, one column a figure, one bar a row of the table.

    rows: {row: {figure: {"value", "low", "high"}}}; paper: {row: {figure: value}}; floors: dashed.
    """
    figure, axes = _panels(2 * len(titles), len(titles))
    names = list(rows)
    for column, (key, title) in enumerate(titles.items()):
        ours, theirs = axes[column], axes[len(titles) + column]
        found = [rows[name][key] for name in names]
        values = np.array([f["value"] for f in found])
        doubt = [[f["value"] - f["low"] for f in found], [f["high"] - f["value"] for f in found]]
        ours.bar(names, values, yerr=np.nan_to_num(doubt), color=BLUE, ecolor="black", capsize=3)
        if key in floors:
            ours.axhline(floors[key], color="black", linestyle="--", label="floor: real halves")
            ours.legend(frameon=False)
        ours.set(ylabel=f"{title}, ours", xlabel="conditions")
        theirs.bar(names, [paper[name][key] for name in names], color=ORANGE)
        name = title.split(" (")[0].split("/")[0]  # its FVD may be FVD/16: it does not say
        theirs.set(ylabel=f"{name}, the paper's", xlabel="conditions")
        for axis in (ours, theirs):
            axis.tick_params(axis="x", rotation=40)
    return _save(figure, out)


def pairs(
    shown: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8], str]],
    tau: tuple[float, float],
    out: Path,
) -> Path:
    """Generated frames above the training frames they are most like, with both r; for the eye."""
    figure, axes = _panels(2 * len(shown), len(shown), side=2.4)
    for i, (made, known, title) in enumerate(shown):
        for row, (frame, name) in enumerate(((made, "generated"), (known, "training"))):
            axis = axes[row * len(shown) + i]
            axis.imshow(frame, cmap="gray", vmin=0, vmax=255)
            axis.set_axis_off()
            axis.set_title(f"{name}\n{title}" if row == 0 else name, fontsize=7)
    figure.suptitle(f"most alike first; flagged above r {tau[0]:.2f} and {tau[1]:.2f}", fontsize=9)
    return _save(figure, out)


def _value(found: dict[str, float]) -> float:
    return found["value"] if "value" in found else found["mean"]


def _panels(count: int, columns: int, side: float = 3.6) -> tuple[Any, list[Any]]:
    """A figure of `count` panels, without any global state of pyplot's."""
    figures = optional("matplotlib.figure", "bench")
    rows = -(-count // columns)
    figure = figures.Figure(figsize=(columns * side * 1.2, rows * side), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _save(figure: Any, out: Path) -> Path:
    with atomic(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return out
