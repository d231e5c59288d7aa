"""heartbeat-bench rebuild."""

import argparse
from pathlib import Path

from heartbeat_benchmarks import results
from heartbeat_benchmarks.commands import options

HELP = "new weights into a bundle against a full export, in one run"


def configure(parser: argparse.ArgumentParser) -> None:
    """Exports a model, then rebuilds its bundle to moved weights and back; nothing of yours is
    touched."""
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: the embedded one's")
    parser.add_argument("--preset", default="", help="random weights of a preset, e.g. base")
    parser.add_argument("--runs", type=int, default=7, help="rebuilds (default: 7, for a median)")
    parser.add_argument(
        "--stage", type=int, choices=(0, 1, 2), default=2, help="whose weights move; 0: all of them"
    )
    options.folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs, stores, prints."""
    from heartbeat_benchmarks import rebuild

    model = arguments.model or rebuild.MODEL
    result = rebuild.run(model, arguments.runs, arguments.preset, arguments.stage)
    path = results.save("rebuild", result, arguments.results)
    print(f"{rebuild.table(result)}\nraw rows: {path}")
    return 0
