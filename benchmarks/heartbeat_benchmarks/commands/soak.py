"""heartbeat-bench soak."""

import argparse
from pathlib import Path

from heartbeat_benchmarks import results

HELP = "minutes of OpenIGTLink with changing conditions and misbehaving clients"


def configure(parser: argparse.ArgumentParser) -> None:
    """Missed deadlines, age of frames, change to first frame, slope of memory."""
    parser.add_argument("--bundle", metavar="DIR|NAME", help="default: the embedded one")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--steps", type=int, help="default: what suits the bundle")
    parser.add_argument("--carry", type=float, default=0.5, help="share of steps carried over")
    parser.add_argument("--minutes", type=float, default=10.0, help="default: %(default)g")
    parser.add_argument("--rate", type=float, default=25.0, help="frames/s, default: %(default)g")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between changes")
    parser.add_argument("--clients", type=int, default=1, help="blocking readers, default: 1")
    parser.add_argument("--pyigtl", type=int, default=1, help="of that library, default: 1")
    parser.add_argument("--bad", type=int, default=3, help="killed, stalled, noisy; default: 3")
    parser.add_argument("--flicker", type=int, default=0, metavar="N", help="on N anatomies first")
    parser.add_argument("--store", action="store_true", help="keep the result with its raw rows")
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")


def run(arguments: argparse.Namespace) -> int:
    """Soaks, says what was seen, stores it where asked."""
    from heartbeat_benchmarks import soak

    names = [*("minutes", "rate", "every", "clients", "pyigtl", "bad", "flicker")]
    names += ["engine", "steps", "carry"]
    plan = soak.Plan(**{name: getattr(arguments, name) for name in names})
    result = soak.run(arguments.bundle, plan)
    for line in soak.lines(result):
        print(line)
    if arguments.store:
        print(f"raw rows: {results.save('soak', result, arguments.results)}")
    return 0
