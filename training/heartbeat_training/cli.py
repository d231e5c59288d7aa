"""heartbeat-train: one subcommand per thing a retrainer does.

A command is a module of heartbeat_training.commands with HELP, configure(parser) and
run(arguments); to add one, copy a neighbour and name it in COMMANDS.
"""

import argparse
import importlib
import os
import sys
from importlib.util import find_spec

from rich.console import Console

from heartbeat_fast.errors import HeartBeatError

# numpy's BLAS waits for its threads by spinning: beside a training on the same cores a singular
# value decomposition of 320×320 took 1.7 s on two threads and 0.05 s on one. Set before numpy is
# imported; torch has threads of its own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# command → module; several stages share one
COMMANDS = {
    "codec": "stages",
    "texture": "stages",
    "stage1": "stages",
    "stage2": "stages",
    "student": "stages",
    "decoder": "stages",
    "small-decoder": "small_decoder",
    "cmr": "stages",
    "all": "stages",
    "data": "data",
    "plan": "plan",
    "evaluate": "evaluate",
    "audit": "audit",
    "table": "table",
    "steps": "steps",
}


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit code 2 and one line for an error that the user can mend."""
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
    except (HeartBeatError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {error}", highlight=False)
        return 2
    return int(code or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heartbeat-train",
        description="Train HeartBeat: codec, texture, images (stage1), clips (stage2); judge it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        path = f"heartbeat_training.commands.{module}"
        if find_spec(path) is None:
            continue
        command = importlib.import_module(path)
        text = command.HELP if module == name else command.HELPS[name]
        sub = commands.add_parser(name, help=text, description=text)
        command.configure(sub)
        sub.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
