"""heartbeat-bench: what a bundle costs here, how good it is, and pictures of it.

A command is a module of heartbeat_benchmarks.commands with HELP, configure(parser) and
run(arguments); to add one, copy a neighbour and name it in COMMANDS.
"""

import argparse
import importlib
import sys
from importlib.util import find_spec

from heartbeat_fast.errors import HeartBeatError

COMMANDS = (
    "latency",
    "waterfall",
    "scaling",
    "peers",
    "compare",
    "plot",
    "github",
    "quality",
    "pictures",
    "real",
    "kernels",
    "rebuild",
    "soak",
    "tables",
)


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit code 1 when a quality target is missed, 2 for errors the user can mend."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except (HeartBeatError, OSError) as error:
        print(f"heartbeat-bench: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="heartbeat-bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        path = f"heartbeat_benchmarks.commands.{name}"
        if find_spec(path) is None:
            continue
        command = importlib.import_module(path)
        text = command.configure.__doc__
        sub = commands.add_parser(name, help=command.HELP, description=text)
        command.configure(sub)
        sub.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
