"""heartbeat-bench scaling."""

import argparse
from pathlib import Path

from heartbeat_benchmarks import results
from heartbeat_benchmarks.commands import options

HELP = "how cost grows with steps, clips, frames and resolution, against the operations"


def configure(parser: argparse.ArgumentParser) -> None:
    """Frames and resolution are exported anew at each size (random weights, needs the exporter);
    "--frames 0 --sizes 0" leaves them out."""
    parser.add_argument("--bundle", metavar="DIR", help="default: the embedded one")
    parser.add_argument("--engine", default="auto")
    for name, default in (
        ("steps", "1,2,4,6,8,10,15,20"),
        ("batches", "1,2,4,8"),
        ("frames", "8,16,24,32"),
        ("sizes", "128,192,256,320"),
    ):
        parser.add_argument(f"--{name}", type=options.numbers, default=default, metavar="N,M")
    parser.add_argument("--at", type=int, default=4, metavar="STEPS", help="of the other axes")
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--runs", type=int, default=7, help="clips a point; 7 carry a median")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options.folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measures, stores, prints."""
    from heartbeat_benchmarks import scaling, scaling_report

    axes = {
        name: tuple(value for value in getattr(arguments, name) if value)
        for name in ("steps", "batches", "frames", "sizes")
    }
    plan = scaling.Plan(
        engine=arguments.engine,
        at=arguments.at,
        sampler=arguments.sampler,
        runs=arguments.runs,
        **axes,
    )
    result = scaling.run(arguments.bundle, plan)
    path = results.save("scaling", result, arguments.results)
    print(scaling_report.markdown(results.load(path)))
    if arguments.plot:
        print(scaling_report.plot(results.load(path), arguments.plot))
    print(f"raw samples: {path}")
    return 0
