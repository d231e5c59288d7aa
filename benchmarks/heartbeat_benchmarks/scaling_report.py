"""`heartbeat-bench scaling` as a table and as a plot."""

from pathlib import Path
from typing import Any

import numpy as np

from heartbeat_benchmarks import results
from heartbeat_benchmarks.latency_report import peaks, verdict
from heartbeat_benchmarks.scaling import STRAIGHT
from heartbeat_fast.errors import optional
from heartbeat_fast.files import atomic

NAMES = {
    "steps": "steps",
    "batches": "clips at once",
    "frames": "frames a clip",
    "sizes": "pixels a side",
}


def markdown(result: dict[str, Any]) -> str:
    """A row per axis: medians, measured and expected growth; steps with r² of their line."""
    rows = []
    for axis, found in result["axes"].items():
        grown = found["growth"]
        medians = ", ".join(f"{row['value']}: {row['median_ms']:.0f}" for row in found["rows"])
        rows.append(
            [
                NAMES[axis],
                medians,
                results.number(grown.get("exponent"), 2),
                results.number(grown.get("flop_exponent"), 2),
                results.number(grown.get("r2"), 4),
            ]
        )
    head = ["axis", "ms a clip (median)", "grows with power", "operations with", "r² of a line"]
    engine = result["engine"]
    about = f"{engine['name']} {engine['precision']}, all conditions; matrix products: "
    about += f"{peaks(result)}; {verdict(result)}"
    return f"{results.markdown(head, rows)}\n\n{'; '.join([about, *notes(result)])}."


def notes(result: dict[str, Any]) -> list[str]:
    """Whether cost is a straight line in steps, and where time outgrows operations."""
    lines = []
    if grown := result["axes"].get("steps", {}).get("growth"):
        state = "kept" if grown["r2"] >= STRAIGHT else "MISSED"
        lines.append(
            f"{state}: r² of cost against steps {grown['r2']:.4f} (≥ {STRAIGHT}), "
            f"{grown['slope_ms']:.1f} ms a step and {grown['intercept_ms']:.1f} ms once"
        )
    for axis, found in result["axes"].items():
        excess = found["growth"].get("excess", 0.0)
        if excess > 1.25:
            lines.append(f"time outgrows operations by {excess:.2f} × along {NAMES[axis]}")
    return lines


def plot(result: dict[str, Any], path: Path) -> Path:
    """An axis a panel: samples and medians, and what operations alone would make of the first."""
    optional("matplotlib", "bench")
    from matplotlib.figure import Figure

    axes = result["axes"]
    figure = Figure(figsize=(3.6 * len(axes), 3.4), dpi=140, layout="constrained")
    for panel, (axis, found) in zip(
        np.atleast_1d(figure.subplots(1, len(axes))), axes.items(), strict=True
    ):
        rows = found["rows"]
        x, medians = ([row[key] for row in rows] for key in ("value", "median_ms"))
        for row in rows:
            n = len(row["samples"])
            panel.scatter([row["value"]] * n, row["samples"], color="#1b6ca8", s=6, alpha=0.35)
        panel.plot(x, medians, "o-", color="#1b6ca8", label="measured (median)")
        if all(row["flop"] for row in rows):
            first = rows[0]
            expected = [first["median_ms"] * row["flop"] / first["flop"] for row in rows]
            panel.plot(x, expected, "--", color="#d1495b", label="as its operations grow")
        panel.set_xlabel(NAMES[axis])
        panel.set_ylim(0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7)
    figure.supylabel("ms a clip", fontsize=9)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
