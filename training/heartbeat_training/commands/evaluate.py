"""`heartbeat-train evaluate`: every figure the field measures, for one set of conditions."""

import argparse
from pathlib import Path

from heartbeat_training.evaluation import options

HELP = "figures of a bundle or model on held-out patients or phantoms"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    options.add_model(parser)
    options.add_data(parser)
    parser.add_argument(
        "--conditions",
        metavar="A,B",
        help="a subset of text,ef,image,sketch,mask,skeleton,flow (default: the paper's six)",
    )
    options.add_measures(parser)
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="FILE.gif",
        help="also clips to look at: real ones on top, generated ones below (.gif, .mp4, .webp)",
    )
    options.add_out(parser)


def run(arguments: argparse.Namespace) -> None:
    """Generate, measure, print, write the result file."""
    from rich.console import Console

    from heartbeat_fast.clip import PICTURES, writable
    from heartbeat_fast.conditions import check_names
    from heartbeat_training.evaluation import paper, pictures, report

    if arguments.pictures:
        writable(arguments.pictures, PICTURES)

    asked = arguments.conditions
    names = check_names(n.strip() for n in asked.split(",")) if asked else paper.SIX
    console = Console()
    opened = options.open_all(arguments)
    sets = options.scored(opened, {"+".join(names): (names, opened.sampling)}, console)
    content = options.content_of(opened, arguments, sets)
    path = options.save("evaluate", content, arguments.out)
    for one in sets.values():
        console.print(report.figures_table(one, content["ceiling"], content["workload"]))
    for line in report.notes(content["workload"], sets):
        console.print(line, highlight=False)
    if arguments.pictures:
        pictures.beside(arguments.pictures, opened.scorer.cases, opened.scorer.made)
        console.print(f"real above generated: {arguments.pictures}", highlight=False)
    console.print(f"raw rows: {path}", highlight=False, soft_wrap=True)
