"""heartbeat-bench quality."""

import argparse
from typing import Any

from heartbeat_benchmarks import results
from heartbeat_benchmarks.commands import options
from heartbeat_fast.errors import HeartBeatError

HELP = "figures on held-out phantoms, per condition set, against the targets"


def configure(parser: argparse.ArgumentParser) -> None:
    """SSIM, Dice, EF, spectrum, speckle, flicker, flow. Exit code 1: a target was missed."""
    options.generation(parser)
    options.judge(parser)
    options.folder(parser)
    parser.add_argument("--sets", metavar="A,B", help='condition sets, e.g. "text,+mask,all"')
    parser.add_argument("--clips", type=int, default=32, help="held-out phantoms (default: 32)")
    parser.add_argument("--first-seed", type=int, default=900_000, help="of the phantoms")


def run(arguments: argparse.Namespace) -> int:
    """Evaluates, stores, prints."""
    from rich.console import Console

    from heartbeat_benchmarks import quality

    plan = quality.Plan(
        engine=arguments.engine,
        clips=arguments.clips,
        first_seed=arguments.first_seed,
        steps=arguments.steps,
        guidance=arguments.guidance,
        **_sets(arguments),
    )
    result = quality.run(arguments.bundle, quality.judge_of(arguments.segmenter), plan)
    path = results.save("quality", result, arguments.results)
    console = Console()
    console.print(quality.table(result))
    for line in quality.verdicts(result):
        console.print(line, highlight=False)
    console.print(f"raw rows: {path}", highlight=False, soft_wrap=True)
    return 0 if all(target["kept"] for target in result["targets"]) else 1


def _sets(arguments: argparse.Namespace) -> dict[str, Any]:
    """{"sets": …} as asked for, or {} for the default ones."""
    from heartbeat_training.evaluate import SETS

    if not arguments.sets:
        return {}
    asked = options.words(arguments.sets)
    if unknown := [name for name in asked if name not in SETS]:
        raise HeartBeatError(f"--sets: {', '.join(unknown)} came; wanted any of {', '.join(SETS)}")
    return {"sets": asked}
