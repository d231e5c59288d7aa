"""`heartbeat-bench waterfall` as tables and as a plot."""

from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from heartbeat_benchmarks import results
from heartbeat_benchmarks.latency_report import peaks, verdict
from heartbeat_fast.files import atomic

HEAD = ["change", "s/clip", "faster than above", "than the reference"]
QUALITY = ["SSIM", "LV Dice", "texture (dB)"]
STAGES = {
    "encode": ("text", "image", "local", "context", "time"),
    "denoise": ("denoise",),
    "decode": ("texture", "decode"),
}
COLOURS = {"encode": "#8da0cb", "denoise": "#fc8d62", "decode": "#66c2a5", "other": "#b3b3b3"}


def cells(result: dict[str, Any]) -> list[list[str]]:
    """A row per rung: change, seconds, gains, quality against source and reference."""
    rows = []
    for row in result["rows"]:
        quality = row["quality"]
        rows.append(
            [
                row["name"],
                f"{row['median_ms'] / 1e3:.3f}",
                f"{row['step_gain']:.2f} ×",
                f"{row['speedup']:.1f} ×",
                results.number(quality["ssim"]),
                results.number(quality["dice"]),
                results.number(row["spectrum_db"], 2),
            ]
        )
    return rows


def table(result: dict[str, Any]) -> Table:
    """The rungs for a terminal."""
    shown = Table(title=f"{result['fingerprint']['bundle']['name']}: one change at a time")
    for i, name in enumerate((*HEAD, *QUALITY)):
        shown.add_column(name, justify="right" if i else "left")
    for row in cells(result):
        shown.add_row(*row)
    return shown


def notes(result: dict[str, Any]) -> list[str]:
    """What belongs beside the table."""
    work = result["workload"]
    lines = [
        f"medians of {work['clips']} held-out phantoms, 16 frames, all conditions, rungs in turns",
        f"matrix products: {peaks(result)}",
    ]
    lines += [f"not run: {name} ({why})" for name, why in result["absent"].items()]
    for target in result["targets"]:
        sign = "≥" if target["at_least"] else "≤"
        state = "kept" if target["kept"] else "MISSED"
        value = results.number(target["value"])
        lines.append(f"{state}: {target['what']} {value} ({sign} {target['bound']})")
    return [*lines, verdict(result)]


def markdown(result: dict[str, Any]) -> str:
    """The table for documents."""
    text = results.markdown([*HEAD, *QUALITY], cells(result))
    return f"{text}\n\n{'; '.join(notes(result))}."


def plot(result: dict[str, Any], path: Path) -> Path:
    """Bars of seconds a clip, stage by stage, top to bottom; quality written beside each."""
    from heartbeat_benchmarks.figures import canvas

    rows = result["rows"]
    figure, axes = canvas(9.5, 0.55 * len(rows) + 1.4)
    longest = max(row["median_ms"] for row in rows) / 1e3
    for y, row in enumerate(rows):
        left = 0.0
        whole = row["median_ms"] / 1e3
        for stage, width in parts(row).items():
            label = stage if y == 0 else None
            axes.barh(y, width, left=left, color=COLOURS[stage], label=label, height=0.62)
            left += width
        quality = row["quality"]
        said = (
            f" {whole:.2f} s, {row['speedup']:.1f} ×   SSIM {quality['ssim']:.3f}  "
            f"Dice {quality['dice']:.3f}  {results.number(row['spectrum_db'], 1)} dB"
        )
        inside = whole > 0.55 * longest
        x, side = (whole - 0.01 * longest, "right") if inside else (whole, "left")
        axes.text(x, y, said, va="center", ha=side, fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05 * longest)
    axes.set_xlabel("seconds a clip (median)")
    axes.legend(loc="lower right", frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def parts(row: dict[str, Any]) -> dict[str, float]:
    """Seconds by stage that add up to the row's median; a pipelined row shows what it waits for."""
    whole = row["median_ms"] / 1e3
    found = {
        stage: sum(
            median(row["stages"][name]["samples"]) for name in names if name in row["stages"]
        )
        / 1e3
        for stage, names in STAGES.items()
    }
    found["other"] = max(0.0, whole - sum(found.values()))
    scale = whole / sum(found.values())
    return {stage: seconds * scale for stage, seconds in found.items()}
