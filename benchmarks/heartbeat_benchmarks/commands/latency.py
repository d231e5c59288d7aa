"""heartbeat-bench latency."""

import argparse
from typing import Any

from heartbeat_benchmarks import results
from heartbeat_benchmarks.commands import options
from heartbeat_fast.errors import HeartBeatError

HELP = "time every condition set, stage by stage"


def configure(parser: argparse.ArgumentParser) -> None:
    """Times a bundle, warm and cold. p90 needs 44 runs, p50 7: fewer print a dash."""
    options.generation(parser)
    options.folder(parser)
    parser.add_argument("--sets", metavar="A,B", help='condition sets, e.g. "text,+mask,all"')
    parser.add_argument("--runs", type=int, help="clips per set (default: enough for p90)")
    parser.add_argument("--cold-starts", type=int, default=5)


def run(arguments: argparse.Namespace) -> int:
    """Times, stores, prints."""
    from rich.console import Console

    from heartbeat_benchmarks import latency
    from heartbeat_training.evaluate import SETS

    given: dict[str, Any] = {"runs": arguments.runs} if arguments.runs else {}
    if arguments.sets:
        given["sets"] = options.words(arguments.sets)
        if unknown := [name for name in given["sets"] if name not in SETS]:
            raise HeartBeatError(f"--sets: {', '.join(unknown)} came; wanted {', '.join(SETS)}")
    work = latency.Workload(
        engine=arguments.engine,
        steps=arguments.steps,
        guidance=arguments.guidance,
        cold_starts=arguments.cold_starts,
        **given,
    )
    result = latency.run(arguments.bundle, work)
    path = results.save("latency", result, arguments.results)
    console = Console()
    console.print(latency.table(result))
    for line in latency.notes(result):
        console.print(line, highlight=False)
    console.print(f"raw samples: {path}", highlight=False, soft_wrap=True)
    return 0
