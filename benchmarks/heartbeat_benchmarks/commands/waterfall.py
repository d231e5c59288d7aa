"""heartbeat-bench waterfall."""

import argparse
from pathlib import Path

from heartbeat_benchmarks import results
from heartbeat_benchmarks.commands import options

HELP = "from eager torch to the fastest clip, one change at a time, quality beside each"


def configure(parser: argparse.ArgumentParser) -> None:
    """Rungs in one run: reference, hoisting, engines, precisions, few steps, small decoder,
    decoding beside the next clip. Exit code 1: a target against the reference was missed."""
    parser.add_argument("--bundle", metavar="DIR", help="default: the embedded one")
    parser.add_argument("--model", type=Path, metavar="DIR", help="torch folder of its weights")
    parser.add_argument("--fast", metavar="DIR", help="bundle of the few-step student")
    parser.add_argument("--steps", type=int, default=20, help="of the reference (default: 20)")
    parser.add_argument("--few", type=int, default=4, help="steps of the student (default: 4)")
    parser.add_argument("--clips", type=int, default=7, help="phantoms a rung; 7 carry a median")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options.judge(parser)
    options.folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """Times, judges, stores, prints, draws."""
    from rich.console import Console

    from heartbeat_benchmarks import waterfall, waterfall_report
    from heartbeat_benchmarks.quality import judge_of

    given = {"model": arguments.model} if arguments.model else {}
    plan = waterfall.Plan(
        bundle=arguments.bundle,
        fast=arguments.fast,
        steps=arguments.steps,
        few=arguments.few,
        clips=arguments.clips,
        **given,
    )
    result = waterfall.run(plan, judge_of(arguments.segmenter))
    path = results.save("waterfall", result, arguments.results)
    console = Console()
    console.print(waterfall_report.table(result))
    for line in waterfall_report.notes(result):
        console.print(line, highlight=False)
    if arguments.plot:
        print(waterfall_report.plot(results.load(path), arguments.plot))
    console.print(f"raw samples: {path}", highlight=False, soft_wrap=True)
    return 0 if all(target["kept"] for target in result["targets"]) else 1
