"""The judge of real-looking frames: the phantoms' segmenter network, trained on training patients.

It must not know the held-out patients, nor the generator. Its own Dice on held-out real frames is
the ceiling of what generated frames can score, and stands beside them in every table.
Legend: N frames, S = 128 pixels.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from heartbeat_fast.files import atomic
from heartbeat_fast.record import Record
from heartbeat_training.evaluate import Judge
from heartbeat_training.evaluation.distances import EvaluationError
from heartbeat_training.loop import Recipe, train
from heartbeat_training.segmenter import (
    SIDE,
    WEIGHTS,
    Segmenter,
    SegmenterStage,
    open_segmenter,
    segment,
    shrink,
)

JUDGES = Path("runs/evaluation/judges")
STEPS, FRAMES = 300, 6  # steps of batch 16; frames kept of a sequence


def train_judge(records: Iterable[Record], steps: int = STEPS, folder: Path = JUDGES) -> Segmenter:
    """Train on labelled records, or open what was trained on exactly these before.

    A few CPU minutes; kept under `folder` by the content of frames and labels.

    Raises: EvaluationError when no record has labels.
    """
    frames, labels = [], []
    for record in records:
        if record.labels is None:
            continue
        count = min(FRAMES, len(record.frames))
        keep = np.linspace(0, len(record.frames) - 1, count).round().astype(int)
        for i in keep:  # one by one: stills and clips of any length come to one square
            still = record.window(int(i), int(i) + 1).standardised(1, 2 * SIDE)
            assert still.labels is not None
            frames.append(shrink(still.frames))
            labels.append(still.labels)
    if not frames:
        raise EvaluationError("judge: no training clip has labels; wanted masks to learn from")
    return _trained(np.concatenate(frames), np.concatenate(labels), steps, folder)


def _trained(
    frames: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    labels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    steps: int,
    folder: Path,
) -> Segmenter:
    """frames (N, S, S), labels (N, 2S, 2S)."""
    key = hashlib.sha256(frames.tobytes() + labels.tobytes() + str(steps).encode()).hexdigest()
    run = folder / key[:12]
    if (run / WEIGHTS).exists():
        return open_segmenter(run)
    torch.manual_seed(0)
    model = Segmenter().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = Recipe(
        steps, batch=16, lr=3e-3, warmup=min(50, steps // 4), ema=0.98, checkpoint_minutes=1.0
    )
    train(SegmenterStage(model, frames, labels, recipe.batch), recipe, run)
    with atomic(run / WEIGHTS) as temporary:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary)
    return model


def judge_with(model: Segmenter) -> Judge:
    """A segmenter as a judge of frames (F, H, W)."""
    return lambda frames: segment(model, frames)
