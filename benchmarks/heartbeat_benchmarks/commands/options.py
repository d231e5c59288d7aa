"""Options that several commands share."""

import argparse
from pathlib import Path

from heartbeat_benchmarks import results


def generation(parser: argparse.ArgumentParser, engine: str = "auto") -> None:
    """--bundle, --engine, --steps, --guidance: what makes the clips."""
    parser.add_argument("--bundle", metavar="DIR", help="folder or name; default: the embedded one")
    parser.add_argument("--engine", default=engine, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=1.0, help="default: %(default)s")


def judge(parser: argparse.ArgumentParser) -> None:
    """--segmenter: who measures LV Dice."""
    parser.add_argument("--segmenter", type=Path, default=Path("runs/segmenter"), metavar="RUN")


def folder(parser: argparse.ArgumentParser) -> None:
    """--results: where result files lie."""
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")


def words(text: str) -> tuple[str, ...]:
    """ "a, b" to ("a", "b")."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str) -> tuple[int, ...]:
    """ "1,2,4" to (1, 2, 4)."""
    try:
        return tuple(int(word) for word in words(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} came; wanted whole numbers: 1,2,4") from error
