"""`heartbeat-train audit`: does the model show patients of its training set?"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heartbeat_training.evaluation import options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from heartbeat_fast.record import Record
    from heartbeat_training.evaluation.privacy import Audit

HELP = "privacy: generated clips against their nearest training patients"
SETS = (("text",), ("text", "image", "sketch", "mask", "skeleton", "flow"))
WORST = 6


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    options.add_model(parser)
    options.add_data(parser, split=False)
    parser.add_argument(
        "--train",
        metavar="DIR",
        help="what the model was trained on, as --data (default: the train split of --data)",
    )
    parser.add_argument("--encoder-steps", type=int, default=None, metavar="N")
    parser.add_argument(
        "--pictures",
        type=Path,
        default=Path("out/audit.png"),
        metavar="FILE.png",
        help="the most alike pairs; shows training patients, so it belongs where their data do",
    )
    options.add_out(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train the encoder, generate, compare, print, draw, write the result file."""
    from rich.console import Console

    from heartbeat_training.evaluation import privacy
    from heartbeat_training.evaluation.cases import open_cases, phantom_seeds, training_records
    from heartbeat_training.evaluation.distances import EvaluationError
    from heartbeat_training.evaluation.generate import open_generator

    source = arguments.train or arguments.data
    if phantom_seeds(arguments.data) and not arguments.train:
        raise EvaluationError(f"{arguments.data}: phantoms have no splits; say --train phantom:A-B")
    console = Console()
    generator = open_generator(arguments.model, arguments.engine)
    manifest = generator.bundle.manifest
    cases, refused = open_cases(
        arguments.data,
        frames=manifest.frames,
        size=manifest.size,
        hold_out=arguments.hold_out,
        limit=arguments.cases,
    )
    names, training = _one_a_patient(training_records(source, arguments.hold_out))
    steps = arguments.encoder_steps or privacy.STEPS
    encoder = privacy.train_encoder(training, steps)
    held_out = [privacy.shrink(case.frames) for case in cases]
    sampling = options.sampling_of(arguments)
    found: dict[str, Any] = {}
    worst: list[tuple[float, Any, Any, str]] = []
    for conditions in SETS:
        clips, owners = _generated(generator, cases, conditions, sampling)
        result = privacy.audit(encoder, training, held_out, clips)
        label = "+".join(conditions)
        rows = [
            {"patient": owner, "r": list(map(float, r)), "nearest": names[n], "flagged": bool(over)}
            for owner, r, n, over in zip(owners, result.r, result.nearest, result.over, strict=True)
        ]
        found[label] = {
            "tau": result.tau,
            "shares": result.shares,
            "shares_embedding_alone": result.shares_alone,
            "n": len(clips),
            "rows": rows,
        }
        worst += [
            (float((r - result.tau).min()), clip, training[n], _title(label, r))
            for clip, r, n in zip(clips, result.r, result.nearest, strict=True)
        ]
        console.print(_said(label, result, len(clips)), highlight=False)
    _draw(worst, result.tau, arguments.pictures)
    path = options.save(
        "audit", _content(generator, arguments, found, names, refused), arguments.out
    )
    console.print(f"most alike pairs: {arguments.pictures}\nraw rows: {path}", highlight=False)


def _title(label: str, r: "NDArray[np.float64]") -> str:
    return f"{label[:24]}\nr {r[0]:.2f}, {r[1]:.2f}"


def _said(label: str, result: "Audit", count: int) -> str:
    """One line: shares by both looks, then by the embedding alone."""
    both, alone = result.shares, result.shares_alone
    return (
        f"{label}: {both['generated']:.1%} of {count} clips flagged (held-out patients "
        f"{both['held_out']:.1%}, altered training clips {both['copies']:.1%}); by the embedding "
        f"alone {alone['generated']:.1%} ({alone['held_out']:.1%}, {alone['copies']:.1%})"
    )


def _one_a_patient(records: "Iterable[Record]") -> "tuple[list[str], list[NDArray[np.uint8]]]":
    """Training patients and a small clip of each: the longest of what there is."""
    import numpy as np

    from heartbeat_training.evaluation import privacy

    longest: dict[str, NDArray[np.uint8]] = {}
    for record in records:
        keep = np.linspace(0, len(record.frames) - 1, min(16, len(record.frames)))
        frames = [
            record.window(int(i), int(i) + 1).standardised(1, 4 * privacy.SIDE).frames
            for i in keep.round()
        ]
        clip = privacy.shrink(np.concatenate(frames))
        if len(clip) > len(longest.get(record.patient, ())):
            longest[record.patient] = clip
    return list(longest), list(longest.values())


def _generated(
    generator: Any, cases: list[Any], conditions: tuple[str, ...], sampling: Any
) -> "tuple[list[NDArray[np.uint8]], list[str]]":
    """Small clips for every case and seed, and whose conditions they had."""
    from rich.progress import track

    from heartbeat_training.evaluation.cases import given
    from heartbeat_training.evaluation.generate import make
    from heartbeat_training.evaluation.privacy import shrink

    clips, owners = [], []
    for i, case in enumerate(track(cases, description="clips", transient=True)):
        for seed in sampling.seeds_of(i):
            frames, _ = make(generator, given(case, conditions), sampling, seed)
            clips.append(shrink(frames))
            owners.append(case.patient)
    return clips, owners


def _draw(worst: list[tuple[float, Any, Any, str]], tau: tuple[float, float], out: Path) -> None:
    from heartbeat_training.evaluation import plots

    worst.sort(key=lambda item: -item[0])
    plots.pairs([(made[0], known[0], title) for _, made, known, title in worst[:WORST]], tau, out)


def _content(
    generator: Any,
    arguments: argparse.Namespace,
    found: dict[str, Any],
    names: list[str],
    refused: list[str],
) -> dict[str, Any]:
    from dataclasses import asdict

    from heartbeat_benchmarks.fingerprint import fingerprint

    return {
        "fingerprint": fingerprint(generator.bundle),
        "workload": {
            "data": Path(arguments.data).name,
            "train": Path(arguments.train).name if arguments.train else "its train split",
            "hold_out": arguments.hold_out,
            "training_patients": len(names),
            "sampling": asdict(options.sampling_of(arguments)),
            "refused": refused,
        },
        "sets": found,
    }
