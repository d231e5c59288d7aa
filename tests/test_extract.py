import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from heartbeat_fast import extract
from heartbeat_fast.formats import open_record

SHARED = Path(__file__).parents[2] / "shared"
CAMUS = SHARED / "data/camus_a4c/database_nifti"
LEAFLETS = SHARED / "data/mitral_valve_masks"
needs_camus = pytest.mark.skipif(not CAMUS.is_dir(), reason="no ../shared CAMUS")
Array = NDArray[Any]
ROWS, COLUMNS = np.mgrid[:256, :256]
RADIUS = np.hypot(ROWS - 128, COLUMNS - 128)


def chambers(gap: int = 0, angle: float = 0.0, size: int = 256) -> tuple[Array, Array]:
    """LV above LA, meeting on a line, turned about the image centre; and the line's two ends."""
    labels = np.zeros((256, 256), np.uint8)
    labels[50:128, 88:168] = 2
    labels[60:128, 98:158] = 1
    labels[128 + gap : 190, 105:150] = 3
    ends = np.array([[105, 127.5 + gap / 2, 1], [149, 127.5 + gap / 2, 1]])
    turn = cv2.getRotationMatrix2D((127.5, 127.5), angle, size / 256)
    turn[:, 2] += (size - 256) / 2
    labels = cv2.warpAffine(labels, turn, (size, size), flags=cv2.INTER_NEAREST)
    return labels[None], ends @ turn.T


def speckled(seed: int, shift: tuple[float, float] = (0, 0)) -> Array:
    """A disc in tissue under log-compressed Rayleigh speckle, moved by (columns, rows)."""
    noise = np.random.default_rng(seed).normal(size=(2, 256, 256)).astype(np.float32)
    envelope = np.hypot(*(cv2.GaussianBlur(part, (0, 0), 1.5) for part in noise))
    tissue = np.where(RADIUS < 60, 0.05, 0.5) * envelope / envelope.mean()
    grey = np.clip(1 + np.log10(tissue + 1e-4) / 2.5, 0, 1).astype(np.float32)
    move = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32)
    return cv2.warpAffine(grey, move, (256, 256))


def test_sketch_finds_the_outline_and_not_the_speckle() -> None:
    first, second = extract.sketch(speckled(0)), extract.sketch(speckled(1))
    assert (first.shape, first.dtype) == ((256, 256), np.float32)
    assert first.min() == 0
    assert first.max() == 1
    on, off = np.abs(RADIUS - 60) < 3, np.abs(RADIUS - 60) > 15
    assert first[on].mean() > 10 * first[off].mean()
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.85


def test_sketch_of_bytes_is_that_of_floats_and_black_stays_black() -> None:
    image = (speckled(0) * 255).astype(np.uint8)
    assert np.allclose(extract.sketch(image), extract.sketch(image / 255), atol=1e-4)
    assert not extract.sketch(np.zeros((64, 64))).any()
    assert np.isfinite(extract.sketch(np.ones((64, 64)))).all()


@needs_camus
def test_sketch_shows_the_heart_and_not_only_the_sector() -> None:
    for patient in ("patient0001", "patient0007"):
        record = open_record(CAMUS / f"{patient}/{patient}_4CH_ED.nii.gz").standardised(1)
        heart = cv2.erode((record.labels[0] > 0).astype(np.uint8), np.ones((3, 3)))  # type: ignore[index]
        share = (extract.sketch(record.frames[0])[heart > 0] > 0.5).mean()
        assert 0.01 < share < 0.3


def test_one_hot_is_the_labels() -> None:
    labels = np.random.default_rng(0).integers(0, 4, (3, 8, 8))
    one_hot = extract.one_hot(labels)
    assert (one_hot.shape, one_hot.dtype) == ((3, 4, 8, 8), np.float32)
    assert np.array_equal(one_hot.argmax(1), labels)
    assert (one_hot.sum(1) == 1).all()


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("angle", [0, 25, 90, -140])
@pytest.mark.parametrize("gap", [0, 3, 6])
def test_skeleton_runs_from_hinge_to_hinge(gap: int, angle: float, size: int) -> None:
    labels, ends = chambers(gap, angle, size)
    skeleton = extract.skeleton_from_labels(labels)
    assert (skeleton.shape, skeleton.dtype) == (labels.shape, np.float32)
    points = np.argwhere(skeleton[0] > 0.5)[:, ::-1]
    away = np.linalg.norm(points[:, None] - ends[None], axis=2).min(0)
    assert away.max() < 3  # a line pixel at each hinge
    chord = ends[1] - ends[0]
    offset = (points - ends[0]) @ np.array([-chord[1], chord[0]]) / np.linalg.norm(chord)
    along = (points - ends[0]) @ chord / (chord @ chord)
    assert np.abs(offset).max() < 3
    assert along.min() > -0.15  # and no further than the hinges
    assert along.max() < 1.15
    width = skeleton[0].sum() / np.linalg.norm(chord)
    assert 0.8 < width < 5


def test_skeleton_ignores_stray_labels() -> None:
    labels, _ = chambers()
    stray = labels.copy()
    stray[0, 100:103, 10:13], stray[0, 104:106, 10:13] = 1, 3
    expected = extract.skeleton_from_labels(labels)
    assert np.array_equal(extract.skeleton_from_labels(stray), expected)


@pytest.mark.parametrize("missing", ["LA", "LV", "both", "contact"])
def test_no_border_no_skeleton(missing: str) -> None:
    labels, _ = chambers(gap=30 if missing == "contact" else 0)
    if missing in ("LA", "both"):
        labels[labels == 3] = 0
    if missing in ("LV", "both"):
        labels[labels == 1] = 0
    assert not extract.skeleton_from_labels(labels).any()


@needs_camus
def test_every_camus_frame_has_its_valve() -> None:
    files = sorted(CAMUS.glob("patient*/*_half_sequence.nii.gz"))[::10]
    for file in files:
        record = open_record(file).standardised()
        assert record.labels is not None
        skeleton = extract.skeleton_from_labels(record.labels)
        assert skeleton.any((1, 2)).all(), file.name
        chamber = np.isin(record.labels, (1, 3)).astype(np.uint8)
        near = np.stack([cv2.dilate(frame, np.ones((7, 7))) for frame in chamber])
        assert not skeleton[near == 0].any(), file.name


@pytest.mark.skipif(not LEAFLETS.is_dir(), reason="no ../shared leaflet masks")
def test_hand_drawn_leaflets_thin_to_lines() -> None:
    masks = [np.asarray(Image.open(file)) for file in sorted(LEAFLETS.glob("*.png"))]
    assert len(masks) == 138
    lines = extract.skeleton_from_leaflets(np.stack(masks))
    assert (lines.shape, lines.dtype) == ((138, 112, 112), np.float32)
    for mask, line in zip(masks, lines, strict=True):
        inside, thin = (mask == 255).astype(np.uint8), line.astype(np.uint8)
        assert not (thin & ~inside).any()
        pieces = cv2.connectedComponents(inside, connectivity=8)[0]
        assert cv2.connectedComponents(thin, connectivity=8)[0] == pieces  # none lost or broken
        assert thin.sum() < inside.sum() / 2
        blocks = thin[:-1, :-1] & thin[1:, :-1] & thin[:-1, 1:] & thin[1:, 1:]
        assert blocks.sum() <= 1  # one pixel wide but for a rare crossing


def test_flow_follows_the_grains() -> None:
    frames = np.stack([speckled(0, (1.5 * t, -0.8 * t)) for t in range(3)])
    flow = extract.flow(frames)
    assert (flow.shape, flow.dtype) == ((3, 2, 256, 256), np.float32)
    middle = flow[:2, :, 40:216, 40:216]
    error = np.hypot(middle[:, 0] - 1.5, middle[:, 1] + 0.8)
    assert error.mean() < 0.15
    assert not flow[2].any()


def test_flow_is_zero_without_signal_or_motion() -> None:
    frames = np.stack([speckled(0, (2.0 * t, 0)) for t in range(2)])
    frames[:, :, 128:] = 0
    assert not extract.flow(frames)[:, :, :, 150:].any()
    still = np.repeat(frames[:1], 3, 0)
    assert np.abs(extract.flow(still)).max() < 0.05
    assert not extract.flow(frames[:1]).any()


@needs_camus
def test_flow_explains_camus_motion() -> None:
    file = CAMUS / "patient0001/patient0001_4CH_half_sequence.nii.gz"
    record = open_record(file).standardised()
    flow = extract.flow(record.frames)
    rows, columns = np.mgrid[:256, :256].astype(np.float32)
    moved, still = 0.0, 0.0
    for t in range(15):
        now, then = record.frames[t].astype(np.float32), record.frames[t + 1].astype(np.float32)
        where = columns + flow[t, 0], rows + flow[t, 1]
        moved += float(((cv2.remap(then, *where, cv2.INTER_LINEAR) - now) ** 2).mean())
        still += float(((then - now) ** 2).mean())
    assert moved < 0.4 * still
    bend = np.abs(np.diff(flow[:, :, 60:180, 80:180], 2, axis=-1)).mean()
    assert bend < 0.02  # pixels a frame over pixels squared: smooth, as tissue is


def test_all_but_flow_takes_half_a_second_at_most() -> None:
    labels = np.repeat(chambers()[0], 16, 0)
    image = np.random.default_rng(0).random((256, 256)).astype(np.float32)
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        extract.sketch(image), extract.one_hot(labels), extract.skeleton_from_labels(labels)
        best = min(best, time.process_time() - start)
    assert best < 0.5
