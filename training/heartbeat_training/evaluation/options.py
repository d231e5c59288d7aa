"""What the commands of evaluation share: their options, and what these open."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from heartbeat_training.evaluation.generate import Sampling
from heartbeat_training.evaluation.scoring import Scorer

PHANTOMS = Path("runs/segmenter")
NONE = "none"


def add_model(parser: argparse.ArgumentParser, lists: bool = False) -> None:
    """BUNDLE_OR_MODEL and how it draws; `lists`: the command has its own samplers and steps."""
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="BUNDLE_OR_MODEL",
        help="a bundle's or a model's folder (default: the embedded bundle)",
    )
    parser.add_argument("--engine", default="auto")
    if lists:
        parser.set_defaults(sampler="", steps=0)
    else:
        parser.add_argument("--sampler", default="dpmpp_2m")
        parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="clips for each patient")
    parser.add_argument("--first-seed", type=int, default=1)


def add_data(parser: argparse.ArgumentParser, split: bool = True) -> None:
    """The held-out clips."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="a data set's folder, or phantom:FIRST-LAST (seeds, both included)",
    )
    if split:
        parser.add_argument("--split", default="test", choices=["train", "test"])
    parser.add_argument(
        "--hold-out",
        type=int,
        default=0,
        metavar="N",
        help="as in training: the last N patients are the test split (default: the data set's)",
    )
    parser.add_argument("--cases", type=int, metavar="N", help="only the first N clips")


def add_measures(parser: argparse.ArgumentParser) -> None:
    """Judge and features."""
    parser.add_argument(
        "--judge",
        metavar="RUN",
        help='a segmenter\'s run folder, or "none" (default: trained in minutes and kept)',
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("weights"),
        metavar="DIR",
        help="where the field's networks lie: docs/evaluate.md names the files (weights)",
    )
    parser.add_argument(
        "--trust-torchscript",
        action="store_true",
        help="run the code in a TorchScript file of --weights (FVD's I3D)",
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    """The result file."""
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="default: a new one in benchmarks/results"
    )


@dataclass(frozen=True)
class Opened:
    """What the options ask for."""

    scorer: Scorer
    sampling: Sampling
    refused: list[str]
    lpips_reason: str
    judge: str


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """The options of `add_model`."""
    return Sampling(
        arguments.sampler,
        arguments.steps,
        arguments.guidance,
        seeds=arguments.seeds,
        first_seed=arguments.first_seed,
    )


def open_all(arguments: argparse.Namespace) -> Opened:
    """Everything the options name. Raises: as what it opens does."""
    from heartbeat_training.evaluation.cases import open_cases
    from heartbeat_training.evaluation.features import open_image_features, open_video_features
    from heartbeat_training.evaluation.generate import open_generator
    from heartbeat_training.evaluation.lpips import open_lpips

    images = open_image_features(arguments.weights)
    video = open_video_features(images, arguments.weights, arguments.trust_torchscript)
    lpips, reason = open_lpips(arguments.weights)
    generator = open_generator(arguments.model, arguments.engine)
    manifest = generator.bundle.manifest
    cases, refused = open_cases(
        arguments.data,
        getattr(arguments, "split", "test"),
        frames=manifest.frames,
        size=manifest.size,
        hold_out=arguments.hold_out,
        limit=arguments.cases,
    )
    judge, about = open_judge(arguments)
    scorer = Scorer(generator, cases, images=images, video=video, judge=judge, lpips=lpips)
    return Opened(scorer, sampling_of(arguments), refused, reason, about)


def open_judge(arguments: argparse.Namespace) -> tuple[Any, str]:
    """The judge and one line about it."""
    from heartbeat_training.evaluation.cases import phantom_seeds, training_records
    from heartbeat_training.evaluation.judge import judge_with, train_judge
    from heartbeat_training.segmenter import open_segmenter, train_segmenter

    if arguments.judge == NONE:
        return None, "none"
    if arguments.judge:
        return judge_with(open_segmenter(Path(arguments.judge))), f"of {Path(arguments.judge).name}"
    if phantom_seeds(arguments.data):
        return judge_with(train_segmenter(PHANTOMS)), "trained on phantoms of its own"
    records = training_records(arguments.data, arguments.hold_out)
    return judge_with(train_judge(records)), "trained on the training patients alone"


def scored(
    opened: Opened, sets: dict[str, tuple[tuple[str, ...], Sampling]], console: Console
) -> dict[str, dict[str, Any]]:
    """Scores of named (conditions, sampling), with a bar; an unmeasured clip warms up first."""
    from heartbeat_training.evaluation.cases import given
    from heartbeat_training.evaluation.generate import make

    scorer, total = opened.scorer, 0
    conditions, sampling = next(iter(sets.values()))
    make(scorer.generator, given(scorer.cases[0], conditions), sampling, sampling.first_seed)
    for _, sampling in sets.values():
        total += len(scorer.cases) * sampling.seeds
    found = {}
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("clips", total=total)
        for name, (conditions, sampling) in sets.items():
            progress.update(bar, description=name)
            found[name] = scorer.score(
                name, conditions, sampling, tick=lambda: progress.advance(bar)
            )
    return found


def content_of(
    opened: Opened, arguments: argparse.Namespace, sets: dict[str, Any]
) -> dict[str, Any]:
    """A result as `heartbeat_benchmarks.results` keeps it: fingerprint, workload, figures, rows."""
    from dataclasses import asdict

    from heartbeat_benchmarks.fingerprint import fingerprint

    scorer = opened.scorer
    is_phantom = arguments.data.startswith("phantom:")
    return {
        "fingerprint": fingerprint(scorer.generator.bundle),
        "workload": {
            "data": arguments.data if is_phantom else Path(arguments.data).name,
            "split": getattr(arguments, "split", "test"),
            "hold_out": None if is_phantom else arguments.hold_out,
            "sampling": asdict(opened.sampling),
            "engine": [scorer.generator.engine.name, scorer.generator.engine.precision],
            "judge": opened.judge,
            "lpips_reason": opened.lpips_reason,
            "refused": opened.refused,
            **scorer.about(),
        },
        "ceiling": scorer.ceiling,
        "sets": sets,
    }


def save(kind: str, content: dict[str, Any], out: Path | None) -> Path:
    """Write a result where asked, or as a new file among the others; returns its path."""
    from heartbeat_benchmarks import results

    if out is None:
        return results.save(kind, content)
    return results.save(kind, content, out.parent).replace(out)
