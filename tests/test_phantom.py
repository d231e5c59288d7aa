"""The phantom keeps its promises: physics of speckle, one motion for everything, exact labels."""

import time

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from heartbeat_fast.anatomy import sample_anatomy
from heartbeat_fast.record import Record
from heartbeat_fast.speckle import texture
from heartbeat_training import metrics
from heartbeat_training.acoustics import Probe, complex_image
from heartbeat_training.geometry import Geometry
from heartbeat_training.phantom import Scatterers, record, render_pair

SEEDS = range(700_000, 700_006)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [record(seed) for seed in SEEDS]


def labels_of(item: Record) -> NDArray[np.uint8]:
    assert item.labels is not None
    return item.labels


def flow_of(item: Record) -> NDArray[np.float32]:
    assert item.flow is not None
    return item.flow


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_uniform_tissue_is_rayleigh(seed: int) -> None:
    """mean/std of the envelope is sqrt(π/(4 − π)) = 1.91, its mean power 1 at every depth."""
    heart = sample_anatomy(seed)
    probe = Probe.of(256, Geometry(heart, 256).origin, heart)
    grains = Scatterers.draw(np.random.Generator(np.random.PCG64(seed)), probe)
    echo = complex_image(probe, grains.x, grains.y, grains.re, grains.im)
    # the sector's inside: neither the few scatterers near the probe nor the rims
    cut = slice(40, int(256 * heart.reach) - 12), slice(8, probe.beams - 8)
    envelope = np.hypot(*echo)[cut]
    assert envelope.mean() / envelope.std() == pytest.approx(metrics.RAYLEIGH, abs=0.1)
    power = (envelope**2).mean(1)
    for rows in np.array_split(power, 4):
        assert rows.mean() == pytest.approx(1.0, rel=0.15)


def test_same_seed_same_bytes() -> None:
    one, two = record(5, frames=3, size=64), record(5, frames=3, size=64)
    for name in ("frames", "labels", "flow", "skeleton"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes()


def test_other_speckle_same_anatomy() -> None:
    one, two = record(5, speckle=1, frames=4), record(5, speckle=2, frames=4)
    assert np.array_equal(labels_of(one), labels_of(two))
    assert np.array_equal(flow_of(one), flow_of(two))
    assert (one.frames != two.frames).mean() > 0.2
    # only the grain differs: where it is averaged the clips are alike
    smooth = [cv2.GaussianBlur(r.frames[0].astype(np.float32), (0, 0), 8) for r in (one, two)]
    assert np.abs(smooth[0] - smooth[1]).mean() < 4


def test_labels_tile_the_image(records: list[Record]) -> None:
    """One label a pixel; all four present; the LV in one piece, walled in by myocardium and LA."""
    for item in records:
        for frame in labels_of(item):
            assert set(np.unique(frame)) == {0, 1, 2, 3}
            cavity = (frame == 1).astype(np.uint8)
            count, _, stats, _ = cv2.connectedComponentsWithStats(cavity)
            assert stats[1:, cv2.CC_STAT_AREA].max() > 0.995 * cavity.sum(), f"{count - 1} pieces"
            rim = (cv2.dilate(cavity, np.ones((3, 3), np.uint8)) > 0) & (cavity == 0)
            assert (frame[rim] == 0).mean() < 0.02, item.patient


@pytest.mark.parametrize("view", ["A2C", "A4C"])
@pytest.mark.parametrize("ef", [0.25, 0.5, 0.7])
def test_masks_give_the_ef_asked_for(view: str, ef: float) -> None:
    for seed in SEEDS[:3]:
        item = record(seed, view=view, ef=ef)
        assert item.ef == pytest.approx(100 * ef)
        assert metrics.ef_area_length(labels_of(item)) == pytest.approx(100 * ef, abs=3), seed


def test_flow_explains_the_next_frame(records: list[Record]) -> None:
    """Where tissue moves a pixel or more, the warped frame differs far less than the unwarped."""
    for item in records:
        flow, still, warped = flow_of(item), [], []
        inside = metrics.tissue(item.frames, labels_of(item))
        for t in range(len(item.frames) - 1):
            moving = inside[t] & (np.hypot(*flow[t]) >= 1)
            now, then = item.frames[t].astype(np.float32), item.frames[t + 1].astype(np.float32)
            still.append((then - now)[moving] ** 2)
            warped.append((metrics.warp(then, flow[t]) - now)[moving] ** 2)
        assert np.concatenate(warped).mean() < 0.5 * np.concatenate(still).mean(), item.patient


def test_flow_is_the_masks_motion(records: list[Record]) -> None:
    """Labels fetched back along the flow are the labels."""
    for item in records:
        labels, flow = labels_of(item), flow_of(item)
        assert not flow[-1].any()
        for t in range(len(labels) - 1):
            lv = (labels[t + 1] == 1).astype(np.float32)
            fetched = (metrics.warp(lv, flow[t]) > 0.5).astype(np.uint8)
            assert metrics.dice(fetched[None], labels[t : t + 1]) > 0.97


def test_a_clip_a_second_on_one_core() -> None:
    seconds = []
    for _ in range(2):
        start = time.process_time()
        record(700_000)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.0


def test_field_makes_the_speckle() -> None:
    """The whitened field has unit variance, and another one for another speckle."""
    a, b, field = render_pair(700_001, 2, 256)
    inside = b[0] > 0
    assert field[0][:, inside].var() == pytest.approx(1.0, rel=0.2)
    assert (a != b).any()


def test_texture_is_unit_noise_that_travels() -> None:
    size, frames = 96, 6
    flow = np.zeros((frames, 2, size, size), np.float32)
    flow[:, 0], flow[:, 1] = 1.0, -0.5
    noise = texture(flow, frames, size, seed=3)
    middle = slice(16, -16)
    assert noise.shape == (frames, 2, size, size)
    assert noise.dtype == np.float32
    assert noise[..., middle, middle].var() == pytest.approx(1.0, rel=0.1)
    assert abs(noise.mean()) < 0.05
    # whole pixels after two frames: no interpolation between t and t + 2
    moved = np.roll(noise[2, 0], (1, -2), (0, 1))
    ridden = np.corrcoef(moved[middle, middle].ravel(), noise[0, 0, middle, middle].ravel())[0, 1]
    stayed = np.corrcoef(noise[2, 0].ravel(), noise[0, 0].ravel())[0, 1]
    assert ridden > 0.95
    assert abs(stayed) < 0.2


def test_texture_without_flow_stands_still() -> None:
    noise = texture(None, 4, 64, seed=1)
    assert (noise == noise[0]).all()
    assert noise.var() == pytest.approx(1.0, rel=0.1)
    assert not np.array_equal(noise, texture(None, 4, 64, seed=2))
    assert np.array_equal(noise, texture(None, 4, 64, seed=1))
