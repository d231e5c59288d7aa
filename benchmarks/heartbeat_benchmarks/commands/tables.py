"""heartbeat-bench tables."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heartbeat_benchmarks import results, soak_report
from heartbeat_benchmarks.commands import options

HELP = "put the newest results into documents"

Maker = Callable[[dict[str, Any]], str]

# A check of one condition set must not take the place of the whole ladder, nor a minute of readers
# that of an endurance run, nor a disturbed run that of a quiet one.
FITS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "ladder": lambda result: "+flow" in result["summary"],
    "latency": lambda result: (
        result["verdict"]["valid"] and {"text", "all"} <= {row["set"] for row in result["rows"]}
    ),
    "waterfall": lambda result: result["verdict"]["valid"],
    "peers": lambda result: result["verdict"]["valid"],
    "targets": lambda result: "mask swapped" in result["summary"],
    "soak": soak_report.is_endurance,
    "readers": lambda result: not soak_report.is_endurance(result) and len(result["blocking"]) > 1,
    "swap": lambda result: result["workload"]["model"] == "tiny-torch",
    "swap-base": lambda result: result["workload"]["model"] == "base",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Fills what stands between <!-- bench:NAME --> or <!-- bench:NAME of BUNDLE --> and
    <!-- /bench --> in each document."""
    parser.add_argument("documents", type=Path, nargs="+", metavar="FILE.md")
    options.folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """Every table whose result is there, into every document that has a place for it."""
    for name, (kind, maker) in makers().items():
        for document in arguments.documents:
            for of in results.places(document, name):
                _fill(document, name, of, kind, maker, arguments.results)
    return 0


def _fill(document: Path, name: str, of: str, kind: str, maker: Maker, folder: Path) -> None:
    """One place of one document."""
    path = results.newest(kind, folder, fits=FITS.get(name, bool), of=of)
    if path is None:
        print(f"{name}: no {kind} result of {of or 'any'} in {folder}", file=sys.stderr)
        return
    try:
        table = maker(results.load(path))
    except KeyError as error:
        print(f"{path}: has no {error}: run heartbeat-bench {kind} again", file=sys.stderr)
        return
    place = f"{name} of {of}" if of else name
    raw = os.path.relpath(path, document.parent)
    results.insert(document, place, f"{table} [Raw]({Path(raw).as_posix()}).")
    print(f"{document}: {place} from {path.name}")


def makers() -> dict[str, tuple[str, Maker]]:
    """Table → the kind of result it shows, and what writes it as Markdown."""
    from heartbeat_benchmarks import (
        latency_report,
        patients,
        peers_report,
        quality,
        real,
        rebuild,
        scaling_report,
        waterfall_report,
    )

    return {
        "ladder": ("quality", quality.ladder_markdown),
        "targets": ("quality", quality.targets_markdown),
        "latency": ("latency", latency_report.markdown),
        "waterfall": ("waterfall", waterfall_report.markdown),
        "scaling": ("scaling", scaling_report.markdown),
        "peers": ("peers", peers_report.markdown),
        "real": ("real", real.markdown),
        "soak": ("soak", soak_report.markdown),
        "readers": ("soak", soak_report.readers),
        "swap": ("rebuild", rebuild.markdown),
        "swap-base": ("rebuild", rebuild.markdown),
        "table": ("table", patients.table),
        "steps": ("steps", patients.steps),
    }
