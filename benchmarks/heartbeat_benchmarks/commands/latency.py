"""heartbeat-bench latency."""

import argparse
from typing import Any

from heartbeat_benchmarks import results
from heartbeat_benchmarks.commands import options

HELP = "time every condition set, stage by stage"


def configure(parser: argparse.ArgumentParser) -> None:
    """Times engines, step counts and condition sets in turns, warm; then cold starts. p90 needs 44
    runs, p50 7: fewer print a dash. Beside each row: share of the matrix peak, PSNR against fp32.
    """
    parser.add_argument("--bundle", metavar="DIR", help="folder or name; default: the embedded one")
    parser.add_argument(
        "--engine", type=options.words, default=("auto",), metavar="A,B", help="default: auto"
    )
    parser.add_argument(
        "--steps", type=options.numbers, default=(10,), metavar="N,M", help="default: 10"
    )
    parser.add_argument("--sampler", help="default: the one that suits the bundle")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument(
        "--sets",
        type=options.words,
        metavar="A,B",
        help="condition sets: text, +mask, all, none, mask+ef, all-flow; ladder, singles, without",
    )
    parser.add_argument(
        "--batch", type=options.numbers, default=(1, 2, 4, 8), metavar="N,M", help="clips at once"
    )
    parser.add_argument("--runs", type=int, help="clips per row (default: enough for p90)")
    parser.add_argument("--cold-starts", type=int, default=5)
    parser.add_argument("--stages", action="store_true", help="print every stage of every row")
    options.folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """Times, stores, prints."""
    from rich.console import Console

    from heartbeat_benchmarks import latency, latency_report, sets

    given: dict[str, Any] = {"runs": arguments.runs} if arguments.runs else {}
    if arguments.sets:
        given["sets"] = sets.expand(arguments.sets)
    work = latency.Workload(
        engines=arguments.engine,
        steps=arguments.steps,
        sampler=arguments.sampler,
        guidance=arguments.guidance,
        batches=arguments.batch,
        cold_starts=arguments.cold_starts,
        **given,
    )
    result = latency.run(arguments.bundle, work)
    path = results.save("latency", result, arguments.results)
    console = Console()
    console.print(latency_report.table(result))
    if arguments.stages:
        console.print(latency_report.stages(result))
    for line in latency_report.notes(result):
        console.print(line, highlight=False)
    console.print(f"raw samples: {path}", highlight=False, soft_wrap=True)
    return 0
