"""heartbeat-bench pictures."""

import argparse
from pathlib import Path

from heartbeat_benchmarks.commands import options

HELP = "GIF, M-mode strips and condition sheets for the documents"


def configure(parser: argparse.ArgumentParser) -> None:
    """Draws a held-out phantom beside what the bundle makes of its conditions."""
    options.generation(parser)
    parser.add_argument("--out", type=Path, default=Path("docs/media"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=900_016, help="of the phantom")
    parser.add_argument(
        "--real", type=Path, metavar="FILE", help="a real clip; it goes to out/, never to docs/"
    )
    parser.add_argument("--fast", metavar="DIR|NAME", help="a bundle distilled from this one")


def run(arguments: argparse.Namespace) -> int:
    """Draws and names what was written."""
    from heartbeat_benchmarks.pictures import draw

    for path in draw(
        arguments.bundle,
        arguments.out,
        engine=arguments.engine,
        seed=arguments.seed,
        steps=arguments.steps,
        guidance=arguments.guidance,
        real=arguments.real,
        fast=arguments.fast,
    ):
        print(path)
    return 0
