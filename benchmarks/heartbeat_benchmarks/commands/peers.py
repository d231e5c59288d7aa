"""heartbeat-bench peers."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heartbeat_benchmarks import results
from heartbeat_benchmarks.commands import options
from heartbeat_fast.errors import HeartBeatError

if TYPE_CHECKING:
    from heartbeat_benchmarks.peers import Way

HELP = "other systems beside ours: operations, seconds, frames, resolution, conditions"


def configure(parser: argparse.ArgumentParser) -> None:
    """Published networks built from diffusers with random weights, and our own model through eager
    torch and through engines, in one run. Needs the training extra."""
    parser.add_argument("--bundle", metavar="DIR", help="default: the embedded one")
    parser.add_argument("--model", type=Path, metavar="DIR", help="torch folder of its weights")
    parser.add_argument(
        "--ours",
        type=options.words,
        default="auto:20,auto:4@tiny-fast",
        metavar="ENGINE:STEPS,…",
        help="our rows; ENGINE:SAMPLER:STEPS for another sampler, @BUNDLE behind it for another "
        "bundle (default: %(default)s)",
    )
    parser.add_argument("--only", default="", metavar="NAME", help="peers named so")
    parser.add_argument("--heavy", action="store_true", help="time AnimateDiff and base too")
    parser.add_argument("--runs", type=int, default=7, help="clips of each of ours (default: 7)")
    parser.add_argument("--passes", type=int, default=3, help="of each peer (default: 3)")
    options.folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measures, stores, prints."""
    from heartbeat_benchmarks import peers, peers_report

    given: dict[str, Any] = {"model": arguments.model} if arguments.model else {}
    plan = peers.Plan(
        bundle=arguments.bundle,
        engines=tuple(way(text) for text in arguments.ours),
        runs=arguments.runs,
        passes=arguments.passes,
        heavy=arguments.heavy,
        only=arguments.only,
        **given,
    )
    result = peers.run(plan)
    path = results.save("peers", result, arguments.results)
    print(peers_report.markdown(results.load(path)))
    print(f"raw samples: {path}")
    return 0


def way(text: str) -> "Way":
    """ "openvino:bf16:few_step:4@tiny-fast" to a row; sampler and bundle may be left out.

    Raises: HeartBeatError: it has no engine, or no number of steps.
    """
    from heartbeat_benchmarks.peers import Way

    asked, _, bundle = text.partition("@")
    *engine, steps = asked.split(":")
    if not engine or not steps.isdecimal():
        raise HeartBeatError(f"--ours {text!r} came; wanted ENGINE:STEPS, as auto:4@tiny-fast")
    sampler = engine.pop() if len(engine) > 1 and engine[-1] in SAMPLERS else None
    return Way(":".join(engine), int(steps), sampler, bundle or None)


SAMPLERS = ("dpmpp_2m", "unipc", "ddim", "euler", "few_step")
