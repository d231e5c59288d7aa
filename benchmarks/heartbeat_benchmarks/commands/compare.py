"""heartbeat-bench compare."""

import argparse
from pathlib import Path

from heartbeat_benchmarks import results

HELP = "two result files of one machine: the ratio of their times, with its interval"


def configure(parser: argparse.ArgumentParser) -> None:
    """Ratios B / A of medians and p90, 95 % bootstrap intervals. Different machines are refused.
    Exit code 1: a row is slower than --fail-above allows, its whole interval above it."""
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument("--force", action="store_true", help="compare different machines")
    parser.add_argument("--fail-above", type=float, metavar="RATIO", help="e.g. 1.05")


def run(arguments: argparse.Namespace) -> int:
    """Loads, compares, prints."""
    from heartbeat_benchmarks import compare

    a, b = (results.load(path) for path in (arguments.a, arguments.b))
    rows = compare.compare(a, b, arguments.force)
    print(compare.markdown(rows))
    for name, result in (("A", a), ("B", b)):
        found = result.get("verdict", {"valid": True})
        if not found["valid"]:
            print(f"{name} is INVALID: {'; '.join(found['reasons'])}")
    worst = max(row["median"]["low"] for row in rows)
    return int(arguments.fail_above is not None and worst > arguments.fail_above)
