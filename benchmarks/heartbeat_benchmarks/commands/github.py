"""heartbeat-bench github."""

import argparse
import json
from pathlib import Path
from typing import Any

from heartbeat_benchmarks import results
from heartbeat_fast.errors import FileError
from heartbeat_fast.files import atomic

HELP = "a result file as github-action-benchmark reads it"


def configure(parser: argparse.ArgumentParser) -> None:
    """Writes the action's customSmallerIsBetter list: medians in ms, with their spread."""
    parser.add_argument("file", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")


def run(arguments: argparse.Namespace) -> int:
    """Converts and writes."""
    entries = convert(results.load(arguments.file))
    with atomic(arguments.out) as temporary:
        temporary.write_text(json.dumps(entries, indent=1) + "\n")
    print(f"{arguments.out}: {len(entries)} entries")
    return 0


def convert(result: dict[str, Any]) -> list[dict[str, Any]]:
    """[{"name", "unit", "value", "range", "extra"}], one per timed row.

    Raises:
        FileError: the result has no timed rows.
    """
    import numpy as np

    entries = []
    for row in result.get("rows", []):
        if "total" not in row.get("stages", {}):
            raise FileError(f"a {result['kind']} result has no timed rows: give one of latency")
        samples = row["stages"]["total"]["samples"]
        low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
        name = row.get("name") or f"{row['engine']} {row['precision']} {row['set']}"
        found = result.get("verdict", {"valid": True})
        entries.append(
            {
                "name": f"{result['kind']}: {name}, {row['steps']} steps",
                "unit": "ms",
                "value": round(float(middle), 3),
                "range": f"± {(high - low) / 2:.3f}",
                "extra": f"n {len(samples)}, {'valid' if found['valid'] else 'INVALID'}",
            }
        )
    return entries
