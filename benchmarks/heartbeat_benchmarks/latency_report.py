"""`heartbeat-bench latency` as tables and notes; every line is made from the result file."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from heartbeat_benchmarks import results
from heartbeat_fast.generator import STAGES

ENCODE = ("text", "image", "local", "context")  # stages before the loop
TOTAL = "total"


def table(result: dict[str, Any]) -> Table:
    """A row per condition set, engine and step count: ms, p50 / p90, share of peak, gate."""
    machine, work = result["fingerprint"]["machine"], result["workload"]
    shown = Table(
        title=f"{result['fingerprint']['bundle']['name']} on {machine['cores']} cores of "
        f"{machine['cpu']}: ms, p50 / p90 of {work['runs']} clips"
    )
    for column in ("engine", "steps", "conditions"):
        shown.add_column(column)
    for column in ("encode", "denoise", "decode", "clip", "peak", "gate"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in result["rows"]:
        cells = [pair(row["stages"][stage]) for stage in ("denoise", "decode", TOTAL)]
        shown.add_row(
            engine(row),
            str(row["steps"]),
            row["set"],
            results.number(_encode(row), 1),
            *cells,
            percent(row.get("share_of_peak")),
            gate(row["gate"]),
        )
    return shown


def stages(result: dict[str, Any]) -> Table:
    """All stages of every row as p50 in milliseconds."""
    names = (*STAGES, "other", TOTAL)
    shown = Table(title="stages, ms, p50")
    for column in ("engine", "steps", "conditions"):
        shown.add_column(column)
    for name in names:
        shown.add_column(name, justify="right")
    for row in result["rows"]:
        cells = [results.number(row["stages"][name].get("p50"), 1) for name in names]
        shown.add_row(engine(row), str(row["steps"]), row["set"], *cells)
    return shown


def notes(result: dict[str, Any]) -> list[str]:
    """What belongs beside the table: machine speed, cold start, batches, quality, verdict."""
    lines = [f"matrix products: {peaks(result)}"]
    for cold in result["cold"]:
        times = ", ".join(
            f"{stage} {np.median(s['samples']):.0f}" for stage, s in cold["stages"].items()
        )
        count = next(iter(cold["stages"].values()))["n"]
        lines.append(
            f"cold start of {cold['asked']}, median ms of {count}: {times}; "
            f"peak memory {cold['peak_memory_mb']:.0f} MB"
        )
    for asked in dict.fromkeys(row["asked"] for row in result["batches"]):
        mine = [row for row in result["batches"] if row["asked"] == asked]
        rates = ", ".join(f"{row['batch']}: {results.number(_rate(row), 2)}" for row in mine)
        lines.append(f"clips/s of {asked} by clips asked for at once ({mine[0]['how']}): {rates}")
    for asked in dict.fromkeys(row["asked"] for row in result["first_frame"]):
        mine = [row for row in result["first_frame"] if row["asked"] == asked]
        waits = ", ".join(
            f"{row['changed']} {results.number(row['ms'].get('p50'), 0)}" for row in mine
        )
        lines.append(f"first frame after a change in a warm session of {asked}, median ms: {waits}")
    quality = result["quality"]
    lines.append(
        f"quality of these weights: {quality['file']}"
        if quality
        else "quality of these weights: not measured; run `heartbeat-bench quality`"
    )
    return [*lines, verdict(result)]


def markdown(result: dict[str, Any]) -> str:
    """The table for documents, and what it ran on."""
    work = result["workload"]
    head = ["engine", "steps", "conditions", "encode", "denoise", "decode", "clip", "frames/s"]
    head += ["share of peak", "clip against fp32"]
    rows = []
    for row in result["rows"]:
        cells = [pair(row["stages"][stage]) for stage in ("denoise", "decode", TOTAL)]
        rate = 1e3 * work["frames"] / row["stages"][TOTAL].get("p50", np.nan)
        rows.append(
            [
                engine(row),
                str(row["steps"]),
                row["set"],
                results.number(_encode(row), 1),
                *cells,
                results.number(rate, 1),
                percent(row.get("share_of_peak")),
                gate(row["gate"]),
            ]
        )
    machine = result["fingerprint"]["machine"]
    about = (
        f"ms, p50 / p90 over {work['runs']} clips of {work['frames']} frames {work['size']}×"
        f"{work['size']}, {machine['cores']} cores of {machine['cpu']}"
    )
    return results.markdown(head, rows) + "\n\n" + "; ".join([about, *notes(result)]) + "."


def engine(row: dict[str, Any]) -> str:
    """An engine as a table names it."""
    return f"{row['engine']} {row['precision']}"


def peaks(result: dict[str, Any]) -> str:
    """The probed peaks, before and after."""
    before, after = result["peaks"]["before"], result["peaks"]["after"]
    return ", ".join(
        f"{dtype} {before[dtype]['gflops']:.0f} GFLOP/s before, {after[dtype]['gflops']:.0f} after"
        for dtype in before
        if dtype in after
    )


def verdict(result: dict[str, Any]) -> str:
    """Valid, or why not."""
    found = result["verdict"]
    return "valid run" if found["valid"] else f"INVALID: {'; '.join(found['reasons'])}"


def gate(found: dict[str, Any]) -> str:
    """PSNR against the reference, marked where it fails."""
    return f"{found['psnr_db']:.1f} dB{'' if found['passed'] else ' **FAILED**'}"


def percent(share: float | None) -> str:
    """A share in percent; a dash for None."""
    return "–" if share is None else f"{100 * share:.0f} %"


def pair(described: dict[str, Any], keys: Sequence[str] = ("p50", "p90")) -> str:
    """Percentiles as "a / b"; a dash for one that the sample does not support."""
    return " / ".join(results.number(described.get(key), 1) for key in keys)


def _encode(row: dict[str, Any]) -> float:
    return sum(row["stages"][s].get("p50", np.nan) for s in ENCODE)


def _rate(row: dict[str, Any]) -> float | None:
    p50 = row[TOTAL].get("p50")
    return None if p50 is None else 1e3 * row["batch"] / p50
