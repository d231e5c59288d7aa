"""heartbeat-train: codec → texture → stage1 → stage2 on phantoms, each step resumable; `all` runs
them in turn.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from heartbeat_fast.errors import HeartBeatError

STAGES = ("codec", "texture", "stage1", "stage2")


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit code 2 and one line for an error that the user can mend."""
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except (HeartBeatError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {error}", highlight=False)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heartbeat-train",
        description="Train HeartBeat on phantoms: codec, texture, images (1), clips (2).",
    )
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--preset", choices=["nano", "tiny"], default="tiny")
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="folder of this run")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument(
        "--train-cross-attention",
        action="store_true",
        help="stage 2 also trains cross-attention (the paper's figure; its text freezes it)",
    )
    return parser


def _run(arguments: argparse.Namespace) -> None:
    import torch

    from heartbeat_training.pipeline import run_stage

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    stages = STAGES if arguments.stage == "all" else (arguments.stage,)
    for stage in stages:
        run_stage(
            stage,
            arguments.preset,
            arguments.run,
            train_cross_attention=arguments.train_cross_attention,
        )


if __name__ == "__main__":
    sys.exit(main())
