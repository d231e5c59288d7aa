"""`heartbeat-train steps`: quality and time against the number of sampler steps."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from heartbeat_training.evaluation import options

HELP = "quality and seconds against steps, for DPM-Solver++, UniPC and DDIM"
COUNTS = "4,6,8,10,15,20,50"
SAMPLERS = "dpmpp_2m,unipc,ddim"
# figure: axis label
SHOWN = {
    "ssim": "SSIM with the source",
    "dice_lv": "Dice of the left ventricle",
    "spectrum_gap": "spectrum gap in tissue (dB)",
    "fid": "",
    "flicker_share": "flicker over the source's",
    "seconds": "seconds a clip, decoding included",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Options; --counts and --samplers take the place of --steps and --sampler."""
    options.add_model(parser, lists=True)
    options.add_data(parser)
    parser.add_argument("--counts", default=COUNTS, metavar="A,B", help="steps (%(default)s)")
    parser.add_argument("--samplers", default=SAMPLERS, metavar="A,B", help="(%(default)s)")
    options.add_measures(parser)
    parser.add_argument(
        "--plot", type=Path, default=Path("out/steps.png"), metavar="FILE.png", help="(%(default)s)"
    )
    options.add_out(parser)


def run(arguments: argparse.Namespace) -> None:
    """Generate with every sampler at every count, print, draw, write the result file."""
    from rich.console import Console

    from heartbeat_fast.sampler import SamplerError
    from heartbeat_training.evaluation import paper, plots, report

    try:
        counts = sorted({int(count) for count in arguments.counts.split(",")})
    except ValueError as error:
        raise SamplerError(f"--counts: {arguments.counts!r} came; wanted e.g. {COUNTS}") from error
    samplers = [name.strip() for name in arguments.samplers.split(",")]
    console = Console()
    opened = options.open_all(arguments)
    sets = {
        f"{sampler} {count}": (paper.SIX, replace(opened.sampling, sampler=sampler, steps=count))
        for sampler in samplers
        for count in counts
    }
    found = options.scored(opened, sets, console)
    content = options.content_of(opened, arguments, found)
    content["workload"] |= {"samplers": samplers, "counts": counts}
    content["workload"]["sampling"] |= {
        "sampler": " / ".join(samplers),
        "steps": ", ".join(map(str, counts)),
    }
    path = options.save("steps", content, arguments.out)
    console.print(report.steps_table(content))
    for line in report.notes(content["workload"], found):
        console.print(line, highlight=False)
    titles = SHOWN | {"fid": f"{report.distance_title('fid', content['workload'])}"}
    plots.steps(_curves(content), titles, arguments.plot)
    console.print(f"plot: {arguments.plot}\nraw rows: {path}", highlight=False)


def _curves(content: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """{sampler: {steps: {figure: value with interval}}}."""
    work = content["workload"]
    return {
        sampler: {
            count: content["sets"][f"{sampler} {count}"]["summary"]
            | content["sets"][f"{sampler} {count}"]["distances"]
            for count in work["counts"]
        }
        for sampler in work["samplers"]
    }
