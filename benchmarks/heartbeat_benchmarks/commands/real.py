"""heartbeat-bench real."""

import argparse
from pathlib import Path

from heartbeat_benchmarks import results
from heartbeat_benchmarks.commands import options

HELP = "LV Dice and EF of clips made from real patients' conditions"


def configure(parser: argparse.ArgumentParser) -> None:
    """Reads half sequences with labels in CAMUS' layout; stores figures, no pixels."""
    parser.add_argument("folder", type=Path, metavar="DATABASE_NIFTI")
    parser.add_argument("--patients", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--bundle", metavar="DIR", help="default: the embedded one")
    options.judge(parser)
    options.folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """Generates, judges, stores."""
    from heartbeat_benchmarks import quality, real

    judge = quality.judge_of(arguments.segmenter)
    result = real.run(
        arguments.bundle, judge, arguments.folder, arguments.patients, arguments.steps
    )
    path = results.save("real", result, arguments.results)
    for name, value in result["summary"].items():
        print(f"{name}: {value:.3f}")
    print(f"raw rows: {path}")
    return 0
