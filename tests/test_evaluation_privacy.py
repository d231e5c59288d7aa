"""The audit: copies of training patients are seen, strangers pass, too little data is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from heartbeat_training.evaluation import privacy
from heartbeat_training.evaluation.distances import EvaluationError
from heartbeat_training.phantom import record


def clip(seed: int, speckle: int = 1) -> privacy.Frames:
    return privacy.shrink(record(seed, speckle=speckle, frames=3, size=128).frames)


@pytest.fixture(scope="module")
def training() -> list[privacy.Frames]:
    return [clip(seed) for seed in range(100, 130)]


@pytest.fixture(scope="module")
def encoder(
    training: list[privacy.Frames], tmp_path_factory: pytest.TempPathFactory
) -> privacy.Encoder:
    torch.manual_seed(0)
    return privacy.train_encoder(training, 120, tmp_path_factory.mktemp("encoders"))


def test_copies_are_flagged_and_strangers_pass(
    encoder: privacy.Encoder, training: list[privacy.Frames]
) -> None:
    """A copy here has other speckle in every pixel, as a generator's would."""
    held_out = [clip(seed) for seed in range(200, 230)]
    copies = [clip(seed, speckle=5) for seed in range(100, 110)]
    strangers = [clip(seed) for seed in range(300, 320)]
    found = privacy.audit(encoder, training, held_out, copies + strangers)
    assert found.over[:10].mean() >= 0.9
    assert found.over[10:].mean() <= 0.2
    assert (found.nearest[:10] == np.arange(10)).all()
    assert found.shares["generated"] == pytest.approx(found.over.mean())
    assert found.shares["copies"] >= 0.7
    assert found.shares["held_out"] <= 0.2
    # the second look takes away, it never adds
    assert all(share <= found.shares_alone[name] for name, share in found.shares.items())
    assert ((found.r > found.tau).all(1) == found.over).all()


def test_what_is_no_patient_is_no_copy(
    encoder: privacy.Encoder, training: list[privacy.Frames]
) -> None:
    """The encoder has never seen noise or stripes and puts them anywhere; coarse looks do not."""
    held_out = [clip(seed) for seed in range(200, 215)]
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (3, 64, 64), dtype=np.uint8) for _ in range(10)]
    stripes = [np.tile(np.uint8([0, 200]), (3, 64, 32)) for _ in range(2)]
    assert not privacy.audit(encoder, training, held_out, noise + stripes).over.any()


def test_encoder_is_kept(training: list[privacy.Frames], tmp_path: Path) -> None:
    first = privacy.train_encoder(training[:8], 2, tmp_path)
    again = privacy.train_encoder(training[:8], 2, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert np.allclose(privacy.embed(first, training), privacy.embed(again, training))
    with pytest.raises(EvaluationError, match="8 or more"):
        privacy.train_encoder(training[:7], 2, tmp_path)


def test_likeness_is_pearsons_r() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 9)), rng.standard_normal((4, 9))
    wanted = [[np.corrcoef(x, y)[0, 1] for y in b] for x in a]
    assert np.allclose(privacy.likeness(a, b), wanted)


def test_changed_frames_stay_frames(training: list[privacy.Frames]) -> None:
    rng = np.random.default_rng(0)
    frame = training[0][0]
    found = np.stack([privacy.changed(frame, rng) for _ in range(5)])
    assert found.shape == (5, privacy.SIDE, privacy.SIDE)
    assert 0 <= found.min() <= found.max() <= 1
    assert np.abs(np.diff(found, axis=0)).max(axis=(1, 2)).min() > 0.1
