"""The scanned sector: read off phantoms whose geometry is known, and off real images."""

from pathlib import Path

import numpy as np
import pytest

from heartbeat_fast.anatomy import sample_anatomy
from heartbeat_fast.clip import Clip
from heartbeat_fast.formats import open_record
from heartbeat_fast.sector import Sector, estimate
from heartbeat_training.phantom import record

CAMUS = Path(__file__).parents[2] / "shared/data/camus_a4c/database_nifti"


@pytest.mark.parametrize("seed", range(4))
def test_sector_of_a_phantom(seed: int) -> None:
    heart = sample_anatomy(seed)
    found = estimate(record(seed, frames=2).frames)
    assert found is not None
    assert found.apex == pytest.approx((127.5, 256 * heart.top), abs=1.5)
    half = np.degrees(heart.sector) / 2
    assert (found.left, found.right) == pytest.approx((-half, half), abs=0.7)
    assert found.far == pytest.approx(256 * heart.reach, abs=2)
    true = Sector((127.5, 256 * heart.top), -half, half, 3.1, 256 * heart.reach).mask(256, 256)
    mine = found.mask(256, 256)
    assert (true & mine).sum() / (true | mine).sum() > 0.98
    assert found.facts((0.6, 0.6))["depth_mm"] == pytest.approx(0.6 * found.far, abs=1e-3)


def test_sector_of_real_images() -> None:
    path = CAMUS / "patient0001" / "patient0001_4CH_half_sequence.nii.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent: real images are not part of the repository")
    clip = open_record(path).standardised()
    found = estimate(clip.frames)
    assert found is not None
    assert found.fit > 0.98
    assert found.left == pytest.approx(-found.right, abs=1)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 64, 64), np.uint8),
        np.full((2, 64, 64), 90, np.uint8),
        np.random.default_rng(0).integers(0, 255, (3, 64, 64), np.uint8),
        np.full((1, 1, 1), 200, np.uint8),
        np.eye(64, dtype=np.uint8)[None] * 200,
    ],
    ids=["blank", "full", "noise", "one pixel", "a line"],
)
def test_what_is_no_sector(frames: np.ndarray) -> None:
    assert estimate(frames) is None


def test_known_sector_goes_before_an_estimate(tmp_path: Path) -> None:
    known = Sector((32.0, 0.0), -30.0, 30.0, 2.0, 60.0)
    clip = Clip(np.full((2, 64, 64), 90, np.uint8), sector=known)
    assert clip.geometry is known
    with np.load(clip.save(tmp_path / "clip.npz")) as arrays:
        assert np.array_equal(arrays["sector_mask"], known.mask(64, 64))
        assert '"far": 60.0' in str(arrays["provenance"])
