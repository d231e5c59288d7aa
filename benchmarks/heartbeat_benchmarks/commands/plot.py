"""heartbeat-bench plot."""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heartbeat_benchmarks import results
from heartbeat_fast.errors import FileError

HELP = "pictures of a result file: distributions, stages, waterfall, scaling, quality and speed"


def configure(parser: argparse.ArgumentParser) -> None:
    """latency: ECDF, stage bars, PSNR against seconds. waterfall: its bars, SSIM against seconds.
    scaling: measured and expected growth."""
    parser.add_argument("file", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR")


def run(arguments: argparse.Namespace) -> int:
    """Draws what the kind of result has, and names the files."""
    for path in _draw(results.load(arguments.file), arguments.out):
        print(path)
    return 0


def _draw(result: dict[str, Any], out: Path) -> Iterator[Path]:
    from heartbeat_benchmarks import figures, scaling_report, waterfall_report

    kind = result["kind"]
    out.mkdir(parents=True, exist_ok=True)
    if kind == "latency":
        yield figures.ecdf(result, out / "latency-ecdf.png")
        yield figures.stages(result, out / "latency-stages.png")
        gate = "clip PSNR against fp32 (dB)"
        yield figures.pareto(_latency_points(result), gate, out / "latency-pareto.png")
    elif kind == "waterfall":
        yield waterfall_report.plot(result, out / "waterfall.png")
        points = [
            {
                "name": row["name"],
                "seconds": row["median_ms"] / 1e3,
                "quality": row["quality"]["ssim"],
            }
            for row in result["rows"]
        ]
        yield figures.pareto(points, "SSIM with the source", out / "waterfall-pareto.png")
    elif kind == "scaling":
        yield scaling_report.plot(result, out / "scaling.png")
    else:
        raise FileError(f"a {kind} result came; wanted latency, waterfall or scaling")


def _latency_points(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One point per engine and step count, of the last set."""
    last = result["workload"]["sets"][-1]
    return [
        {
            "name": f"{row['engine']} {row['precision']}, {row['steps']} steps",
            "seconds": statistics.median(row["stages"]["total"]["samples"]) / 1e3,
            "quality": row["gate"]["psnr_db"],
        }
        for row in result["rows"]
        if row["set"] == last
    ]
