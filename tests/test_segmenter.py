"""The judge of generated frames: it learns, it resumes, it refuses foreign weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from heartbeat_fast.errors import FileError
from heartbeat_training import metrics
from heartbeat_training.phantom import record
from heartbeat_training.segmenter import (
    WEIGHTS,
    Segmenter,
    augment,
    open_segmenter,
    segment,
    shrink,
    train_segmenter,
)

TRAINED = Path(__file__).parents[1] / "runs" / "segmenter"


def test_augment_keeps_labels_on_their_pixels() -> None:
    """A frame that shows its own labels still does so afterwards."""
    rng = np.random.default_rng(0)
    labels = np.zeros((256, 256), np.uint8)
    labels[60:180, 90:170] = 1
    frame = shrink((labels * 220)[None])[0]
    for _ in range(10):
        image, moved = augment(frame, labels, rng)
        assert image.shape == moved.shape == (128, 128)
        assert 0 <= image.min() <= image.max() <= 1
        shown = (image > image.max() / 2).astype(np.uint8)
        assert metrics.dice(shown[None], moved[None]) > 0.93


def test_trains_and_opens(tmp_path: Path) -> None:
    """What was saved segments as what was trained, and is opened the next time."""
    trained = train_segmenter(tmp_path, steps=4, hearts=2)
    item = record(900_000, frames=2)
    opened = open_segmenter(tmp_path)
    seen = segment(opened, item.frames)
    assert seen.shape == item.frames.shape
    assert seen.dtype == np.uint8
    assert seen.max() < 4
    assert np.array_equal(seen, segment(trained, item.frames))
    assert train_segmenter(tmp_path, steps=4, hearts=2) is not trained  # opened, not trained


def test_size_is_what_was_promised() -> None:
    assert 0.3e6 < sum(p.numel() for p in Segmenter().parameters()) < 0.6e6


def test_foreign_and_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        open_segmenter(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"not tensors")
    with pytest.raises(FileError, match="train it anew"):
        open_segmenter(tmp_path)


def test_trained_one_finds_held_out_ventricles() -> None:
    if not (TRAINED / WEIGHTS).exists():
        pytest.skip("no trained segmenter here: `heartbeat-bench quality` trains one in minutes")
    torch.set_num_threads(1)
    model = open_segmenter(TRAINED)
    scores = []
    for seed in range(900_000, 900_004):
        item = record(seed, frames=4)
        assert item.labels is not None
        scores.append(metrics.dice(segment(model, item.frames), item.labels))
    assert np.mean(scores) >= 0.93
