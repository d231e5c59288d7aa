"""heartbeat-export: from a trained model folder to the bundle and the engines that are used.

A command is a module of heartbeat_export.commands with HELP, configure(parser) and run(options);
to add one, copy a neighbour and name it in COMMANDS.
"""

import argparse
import importlib
import sys
from importlib.util import find_spec

from heartbeat_fast.errors import HeartBeatError

COMMANDS = {  # command → module; none is called onnx, the library's name
    "onnx": "write_onnx",
    "rebuild": "rebuild",
    "rollback": "rollback",
    "engines": "engines",
    "quantise": "quantise",
    "triton-repository": "triton_repository",
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `heartbeat-export`; returns the exit code, 2 for errors the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except HeartBeatError as error:
        print(f"heartbeat-export: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="heartbeat-export", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        path = f"heartbeat_export.commands.{module}"
        if find_spec(path) is None:
            continue
        command = importlib.import_module(path)
        sub = commands.add_parser(name, help=command.HELP, description=command.run.__doc__)
        command.configure(sub)
        sub.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
