"""Plots of result files: distributions, stages, quality against speed. Drawn without a display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heartbeat_benchmarks.latency_report import ENCODE, TOTAL, engine
from heartbeat_fast.errors import FileError, optional
from heartbeat_fast.files import atomic

COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#b07d2b", "#6d597a", "#4c4c4c", "#2a9d8f", "#8a5a44")


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches and its axes.

    Raises:
        MissingDependency: no matplotlib.
    """
    optional("matplotlib", "bench")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def ecdf(result: dict[str, Any], path: Path) -> Path:
    """Every row's clip times as an empirical distribution: what share of clips is done by when."""
    figure, axes = canvas(9.5, 4.5)
    for i, row in enumerate(_rows(result)):
        times = np.sort(row["stages"][TOTAL]["samples"])
        share = np.arange(1, len(times) + 1) / len(times)
        axes.step(times, share, where="post", label=_name(row), color=COLOURS[i % len(COLOURS)])
    axes.set_xlabel("ms a clip")
    axes.set_ylabel("share of clips done")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path)


def stages(result: dict[str, Any], path: Path) -> Path:
    """Median milliseconds by stage, a bar per row."""
    rows = _rows(result)
    figure, axes = canvas(8, 0.45 * len(rows) + 1.3)
    groups = {"encode": ENCODE, "denoise": ("time", "denoise"), "decode": ("texture", "decode")}
    groups["other"] = ("other",)
    left = np.zeros(len(rows))
    for colour, (name, members) in zip(COLOURS, groups.items(), strict=False):
        widths = [
            sum(float(np.median(row["stages"][stage]["samples"])) for stage in members)
            for row in rows
        ]
        axes.barh(range(len(rows)), widths, left=left, label=name, color=colour, height=0.65)
        left += widths
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms a clip (medians of the stages)")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _save(figure, path)


def pareto(points: Sequence[dict[str, Any]], figure_of: str, path: Path) -> Path:
    """Quality (up is better) against seconds a clip; what nothing else beats is joined.

    points: {"name", "seconds", "quality"}; figure_of names the quality.
    """
    figure, axes = canvas(7.5, 4.8)
    best = front([(point["seconds"], point["quality"]) for point in points])
    for i, point in enumerate(points):
        x, y = point["seconds"], point["quality"]
        axes.scatter(x, y, color=COLOURS[i % len(COLOURS)], zorder=3)
        axes.annotate(point["name"], (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    line = [(points[i]["seconds"], points[i]["quality"]) for i in best]
    axes.plot(*zip(*line, strict=True), color="#999999", linewidth=1, zorder=1)
    axes.set_xscale("log")
    axes.margins(x=0.3, y=0.2)
    axes.set_xlabel("seconds a clip (logarithmic)")
    axes.set_ylabel(figure_of)
    return _save(figure, path)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, by rising cost, of the (cost, quality) pairs that no other pair beats in both."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] > points[kept[-1]][1]:
            kept.append(i)
    return kept


def _rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    if not (rows := result.get("rows")) or "stages" not in rows[0]:
        raise FileError(f"a {result['kind']} result has no timed rows: give one of latency")
    return list(rows)


def _name(row: dict[str, Any]) -> str:
    return f"{engine(row)}, {row['steps']} steps, {row.get('set', row.get('name', ''))}"


def _save(figure: Any, path: Path) -> Path:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
