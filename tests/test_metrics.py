"""Each figure against a library or a case whose answer is known."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from heartbeat_training import metrics
from heartbeat_training.phantom import record

Frames = NDArray[np.uint8]


def speckle(seed: int, frames: int = 1, size: int = 256, decibels: float = 60) -> Frames:
    """Fully developed speckle under log compression, the same grain in every frame."""
    rng = np.random.default_rng(seed)
    wave = [cv2.GaussianBlur(rng.standard_normal((size, size)), (0, 0), 1.2) for _ in range(2)]
    level = 20 * np.log10(np.hypot(*wave) / np.hypot(*wave).mean())
    grey = np.clip((level + 36) / decibels, 0, 1)
    return np.repeat(np.rint(grey * 255).astype(np.uint8)[None], frames, 0)


def everywhere(frames: Frames) -> NDArray[np.bool_]:
    return np.ones(frames.shape, bool)


def test_ssim_is_scikit_images() -> None:
    structural = pytest.importorskip("skimage.metrics", reason="scikit-image is an extra (dev)")
    a, b = speckle(1), speckle(2)
    blurred = cv2.GaussianBlur(a[0], (0, 0), 1.0)[None]
    for other in (b, blurred):
        wanted = structural.structural_similarity(
            a[0],
            other[0],
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert metrics.ssim(a, other) == pytest.approx(wanted, abs=1e-4)
    assert metrics.ssim(a, a) == pytest.approx(1.0)


def test_dice_of_known_overlaps() -> None:
    a, b = np.zeros((2, 2, 8, 8), np.uint8)
    a[:, :4], b[:, 2:6] = 1, 1
    assert metrics.dice(a, a) == 1.0
    assert metrics.dice(a, b) == pytest.approx(0.5)
    assert metrics.dice(a, b, label=3) == 1.0  # both empty
    b[0] = 0
    assert metrics.dice(a, b) == pytest.approx(0.25)  # mean over frames


@pytest.mark.parametrize("angle", [0.0, 30.0, 75.0])
def test_ef_of_ellipses(angle: float) -> None:
    """An ellipse turned about its axis has the volume 4/3 π a b²: area–length is exact."""
    labels = np.zeros((3, 256, 256), np.uint8)
    for frame, (a, b) in zip(labels, [(90, 40), (80, 28), (85, 34)], strict=True):
        cv2.ellipse(frame, (128, 128), (a, b), angle, 0, 360, 1, -1)
    wanted = 100 * (1 - 80 * 28**2 / (90 * 40**2))
    assert metrics.ef_area_length(labels) == pytest.approx(wanted, abs=1.5)
    labels[0, :4, :4] = 1  # a stray speck is not the ventricle
    assert metrics.ef_area_length(labels) == pytest.approx(wanted, abs=1.5)
    assert np.isnan(metrics.ef_area_length(labels * 0))


def test_spectrum_sees_blur_and_not_another_speckle() -> None:
    a, b = speckle(1, size=256), speckle(2, size=256)
    mask = everywhere(a)
    source = metrics.power_spectrum(a, mask)
    assert np.abs(metrics.power_spectrum(b, mask) - source).max() < 1.0
    blurred = cv2.GaussianBlur(a[0], (0, 0), 1.0)[None]
    assert (source - metrics.power_spectrum(blurred, mask)).max() > 5
    assert np.isnan(metrics.power_spectrum(a, ~mask)).all()


def test_spectrum_of_white_noise_is_its_variance() -> None:
    noise = np.random.default_rng(0).normal(128, 10, (4, 128, 128)).clip(0, 255).astype(np.uint8)
    spectrum = metrics.power_spectrum(noise, everywhere(noise))
    assert spectrum[1:] == pytest.approx(20 * np.ones(len(spectrum) - 1), abs=0.5)


@pytest.mark.parametrize("decibels", [50.0, 60.0, 66.0])
def test_speckle_ratio_is_rayleighs(decibels: float) -> None:
    frames = speckle(3, decibels=decibels)
    found = metrics.speckle_ratio(frames, everywhere(frames), decibels)
    assert found == pytest.approx(metrics.RAYLEIGH, rel=0.08)
    blurred = cv2.GaussianBlur(frames[0], (0, 0), 2.0)[None]
    assert metrics.speckle_ratio(blurred, everywhere(frames), decibels) > 1.3 * found


def test_speckle_that_rides_and_speckle_that_boils() -> None:
    still = speckle(4)[0]
    riding = np.stack([np.roll(still, (t, -2 * t), (0, 1)) for t in range(4)])
    boiling = np.concatenate([speckle(k) for k in range(4)])
    flow = np.zeros((4, 2, 256, 256), np.float32)
    flow[:-1, 0], flow[:-1, 1] = -2, 1
    mask = everywhere(riding)
    mask[:, :8] = mask[:, -8:] = mask[:, :, :8] = mask[:, :, -8:] = False
    assert metrics.speckle_correlation(riding, flow, mask) > 0.98
    assert metrics.speckle_correlation(riding, 0 * flow, mask) < 0.5
    assert abs(metrics.speckle_correlation(boiling, flow, mask)) < 0.1
    assert np.isnan(metrics.speckle_correlation(riding, flow, ~everywhere(riding)))


def test_flicker_measures_brightness_steps() -> None:
    frames = speckle(5, frames=5)
    flow = np.zeros((5, 2, 256, 256), np.float32)
    assert metrics.flicker(frames, flow, everywhere(frames)) == 0
    frames = np.stack([f // 2 + 6 * (t % 2) for t, f in enumerate(frames)]).astype(np.uint8)
    assert metrics.flicker(frames, flow, everywhere(frames)) == pytest.approx(6, rel=0.05)


def test_flow_error_of_a_known_shift() -> None:
    still = speckle(6)[0]
    frames = np.stack([np.roll(still, t, 1) for t in range(4)])
    flow = np.zeros((4, 2, 256, 256), np.float32)
    flow[:-1, 0] = 1
    mask = np.zeros(frames.shape, bool)
    mask[:, 32:-32, 32:-32] = True
    assert metrics.flow_error(frames, flow, mask) < 0.2
    assert metrics.flow_error(frames, 0 * flow, mask) == pytest.approx(1, abs=0.2)


def test_tissue_holds_no_chamber() -> None:
    item = record(900_000, frames=2)
    assert item.labels is not None
    mask = metrics.tissue(item.frames, item.labels)
    assert 0.03 < mask.mean() < 0.5
    assert not mask[(item.labels == 1) | (item.labels == 3)].any()
    assert item.frames[mask].min() < item.frames[mask].mean()


def test_pearson_leaves_out_what_is_missing() -> None:
    assert metrics.pearson([1, 2, 3, np.nan], [2, 4, 6, 0]) == pytest.approx(1.0)
    assert np.isnan(metrics.pearson([1, 2], [1, 2]))
