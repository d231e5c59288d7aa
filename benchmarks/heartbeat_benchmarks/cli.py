"""heartbeat-bench: what a bundle costs here, how good it is, and pictures of it."""

import argparse
import sys
from pathlib import Path
from typing import Any

from heartbeat_benchmarks import results
from heartbeat_fast.errors import HeartBeatError


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit code 1 when a quality target is missed, 2 for errors the user can mend."""
    arguments = _parser().parse_args(argv)
    command = {"latency": _latency, "quality": _quality, "pictures": _pictures}
    command |= {"tables": _tables, "real": _real, "kernels": _kernels}
    try:
        return command[arguments.command](arguments)
    except (HeartBeatError, OSError) as error:
        print(f"heartbeat-bench: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="heartbeat-bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    latency = commands.add_parser(
        "latency",
        help="time every condition set, stage by stage",
        description="Times a bundle, warm and cold. p90 needs 44 runs, p50 7: fewer print a dash.",
    )
    quality = commands.add_parser(
        "quality",
        help="figures on held-out phantoms, per condition set, against the targets",
        description="SSIM, Dice, EF, spectrum, speckle, flicker, flow. Exit code 1: target missed.",
    )
    pictures = commands.add_parser(
        "pictures",
        help="GIF, M-mode strips and condition sheets for the documents",
        description="Draws a held-out phantom beside what the bundle makes of its conditions.",
    )
    for one in (latency, quality, pictures):
        one.add_argument("--bundle", type=Path, metavar="DIR", help="default: the embedded one")
        one.add_argument("--engine", default="auto")
        one.add_argument("--steps", type=int, default=10)
        one.add_argument("--guidance", type=float, default=1.0)
    for one in (latency, quality):
        one.add_argument("--sets", metavar="A,B", help='condition sets, e.g. "text,+mask,all"')
        one.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    latency.add_argument("--runs", type=int, help="clips per set (default: enough for p90)")
    latency.add_argument("--cold-starts", type=int, default=5)
    quality.add_argument("--clips", type=int, default=32, help="held-out phantoms (default: 32)")
    quality.add_argument("--first-seed", type=int, default=900_000, help="of the phantoms")
    quality.add_argument("--segmenter", type=Path, default=Path("runs/segmenter"), metavar="RUN")
    pictures.add_argument("--out", type=Path, default=Path("docs/media"), metavar="DIR")
    pictures.add_argument("--seed", type=int, default=900_016, help="of the phantom")
    pictures.add_argument(
        "--real", type=Path, metavar="FILE", help="a real clip; it goes to out/, never to docs/"
    )
    _more(commands)
    return parser


def _more(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Commands with options of their own."""
    real = commands.add_parser(
        "real",
        help="LV Dice and EF of clips made from real patients' conditions",
        description="Reads half sequences with labels in CAMUS' layout; stores figures, no pixels.",
    )
    real.add_argument("folder", type=Path, metavar="DATABASE_NIFTI")
    real.add_argument("--patients", type=int, default=100)
    real.add_argument("--steps", type=int, default=10)
    real.add_argument("--bundle", type=Path, metavar="DIR", help="default: the embedded one")
    real.add_argument("--segmenter", type=Path, default=Path("runs/segmenter"), metavar="RUN")
    real.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    kernels = commands.add_parser(
        "kernels",
        help="Triton kernels against torch, xformers and the memory roof, on a GPU",
        description="Without a GPU: bytes and predicted times. --compile: for GPUs not here.",
    )
    kernels.add_argument("--only", default="", metavar="OP", help="operations named so")
    kernels.add_argument("--compile", action="store_true", help="registers and spills, no runs")
    kernels.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")
    tables = commands.add_parser(
        "tables",
        help="put the newest results into documents",
        description="Fills <!-- bench:NAME --> … <!-- /bench -->: ladder, targets, latency, real.",
    )
    tables.add_argument("documents", type=Path, nargs="+", metavar="FILE.md")
    tables.add_argument("--results", type=Path, default=results.FOLDER, metavar="DIR")


def _sets(arguments: argparse.Namespace) -> dict[str, Any]:
    """{"sets": …} as asked for, or {} for the default ones."""
    from heartbeat_training.evaluate import SETS

    if not arguments.sets:
        return {}
    asked = tuple(name.strip() for name in arguments.sets.split(","))
    if unknown := [name for name in asked if name not in SETS]:
        raise HeartBeatError(f"--sets: {', '.join(unknown)} came; wanted any of {', '.join(SETS)}")
    return {"sets": asked}


def _latency(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from heartbeat_benchmarks import latency

    given: dict[str, Any] = {"runs": arguments.runs} if arguments.runs else {}
    work = latency.Workload(
        engine=arguments.engine,
        steps=arguments.steps,
        guidance=arguments.guidance,
        cold_starts=arguments.cold_starts,
        **given,
        **_sets(arguments),
    )
    result = latency.run(arguments.bundle, work)
    path = results.save("latency", result, arguments.results)
    console = Console()
    console.print(latency.table(result))
    for line in latency.notes(result):
        console.print(line, highlight=False)
    console.print(f"raw samples: {path}", highlight=False, soft_wrap=True)
    return 0


def _quality(arguments: argparse.Namespace) -> int:
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


def _real(arguments: argparse.Namespace) -> int:
    from heartbeat_benchmarks import quality, real

    judge = quality.judge_of(arguments.segmenter)
    result = real.run(
        arguments.bundle, judge, arguments.folder, arguments.patients, arguments.steps
    )
    path = results.save("real", result, arguments.results)
    for name, value in result["summary"].items():
        print(f"{name}: {value:.3f}")
    print(f"raw rows: {path}")
    return 0


def _pictures(arguments: argparse.Namespace) -> int:
    from heartbeat_benchmarks.pictures import draw

    for path in draw(
        arguments.bundle,
        arguments.out,
        engine=arguments.engine,
        seed=arguments.seed,
        steps=arguments.steps,
        guidance=arguments.guidance,
        real=arguments.real,
    ):
        print(path)
    return 0


def _kernels(arguments: argparse.Namespace) -> int:
    from heartbeat_benchmarks import kernels, kernels_compiled
    from heartbeat_benchmarks.fingerprint import fingerprint

    run = kernels_compiled.run if arguments.compile else kernels.run
    result = run(only=arguments.only)
    kind = "compiled" if arguments.compile else "kernels"
    path = results.save(kind, {"fingerprint": fingerprint(), **result}, arguments.results)
    print(f"gpu: {result['gpu']}\nraw rows: {path}")
    return 0


def _tables(arguments: argparse.Namespace) -> int:
    from heartbeat_benchmarks import latency, patients, quality, real

    makers = {
        "ladder": ("quality", quality.ladder_markdown),
        "targets": ("quality", quality.targets_markdown),
        "latency": ("latency", latency.markdown),
        "real": ("real", real.markdown),
        "table": ("table", patients.table),
        "steps": ("steps", patients.steps),
    }
    for name, (kind, maker) in makers.items():
        path = results.newest(kind, arguments.results)
        if path is None:
            print(f"{name}: no {kind} result in {arguments.results}", file=sys.stderr)
            continue
        table = maker(results.load(path))
        for document in arguments.documents:
            if results.insert(document, name, f"{table} [Raw]({path.as_posix()})."):
                print(f"{document}: {name} from {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
