"""The embedded bundles: whole, small, and they follow their conditions on hearts never seen; the
distilled one draws what its teacher draws."""

from pathlib import Path

import numpy as np
import pytest

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.clip import Clip
from heartbeat_fast.formats import open_record
from heartbeat_fast.generator import Generator
from heartbeat_fast.record import Record
from heartbeat_training import metrics
from heartbeat_training.phantom import record

SHARED = Path(__file__).parents[2] / "shared"
PATIENT = SHARED / "data/camus_a4c/database_nifti/patient0001/patient0001_4CH_half_sequence.nii.gz"


@pytest.fixture(scope="module", params=["tiny", "tiny-fast"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def generator(name: str) -> Generator:
    return Generator.open(name)


@pytest.fixture(scope="module")
def source() -> Record:
    return record(900_100, view="A4C", ef=0.6, coverage=1.0)


@pytest.fixture(scope="module")
def clip(generator: Generator, source: Record) -> Clip:
    return generator(source.conditions(), seed=1)


def levels(frames: np.ndarray, record: Record, frame: int) -> tuple[float, float]:
    """Mean grey of LV cavity and of myocardium under a frame's own labels."""
    assert record.labels is not None
    picture, labels = frames[frame].astype(float), record.labels[frame]
    return float(picture[labels == 1].mean()), float(picture[labels == 2].mean())


def test_the_bundle_is_whole_and_small(name: str) -> None:
    bundle = Bundle.open(name)
    bundle.verify()
    assert sum(f.stat().st_size for f in bundle.path.iterdir()) < 40e6
    assert bundle.manifest.licence == "Apache-2.0"
    assert max(bundle.manifest.parity["relative_l2"].values()) <= 1e-3
    assert bundle.manifest.parity["clip_psnr_db"] >= 40


def test_the_torch_folder_is_the_same_model(
    source: Record, generator: Generator, name: str
) -> None:
    from heartbeat_export.build import weights_of
    from heartbeat_fast.models.graphs import round_to_half
    from heartbeat_fast.models.heartbeat import HeartBeat

    folder = generator.bundle.path.parent / f"{name}-torch"
    model = round_to_half(HeartBeat.from_pretrained(folder))
    assert weights_of(model) == generator.bundle.manifest.fingerprints["weights"]
    ours = generator(source.conditions(), seed=1, steps=2).frames.astype(float)
    torch = Generator.open(name, f"torch:{folder}")
    theirs = torch(source.conditions(), seed=1, steps=2).frames
    assert 10 * np.log10(255**2 / max(((ours - theirs) ** 2).mean(), 1e-9)) >= 40


def test_walls_stand_where_the_masks_ask(clip: Clip, source: Record) -> None:
    for frame in range(16):
        cavity, wall = levels(clip.frames, source, frame)
        assert wall > cavity + 20


def test_it_is_as_like_the_source_as_another_speckle(clip: Clip, source: Record) -> None:
    twin = record(900_100, view="A4C", ef=0.6, coverage=1.0, speckle=2)
    ceiling = metrics.ssim(twin.frames, source.frames)
    assert metrics.ssim(clip.frames, source.frames) > 0.9 * ceiling


def test_it_has_speckle_that_travels_and_does_not_flicker(clip: Clip, source: Record) -> None:
    assert source.labels is not None
    assert source.flow is not None
    tissue = metrics.tissue(source.frames, source.labels)
    gap = metrics.power_spectrum(clip.frames, tissue)
    gap = gap - metrics.power_spectrum(source.frames, tissue)
    assert np.abs(gap).max() < 4  # of one clip; 1.5 dB holds for the mean over 32
    theirs = metrics.speckle_correlation(source.frames, source.flow, tissue)
    assert metrics.speckle_correlation(clip.frames, source.flow, tissue) > 0.8 * theirs
    still = metrics.flicker(source.frames, source.flow, tissue)
    assert metrics.flicker(clip.frames, source.flow, tissue) < 2.5 * still  # 1.5 for the mean


def test_same_seed_same_clip_other_seed_other_clip(
    generator: Generator, source: Record, clip: Clip
) -> None:
    again = generator(source.conditions(), seed=1)
    assert (again.frames == clip.frames).all()
    assert (generator(source.conditions(), seed=2, steps=4).frames != clip.frames).any()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_students_clip_is_its_teachers(source: Record, steps: int) -> None:
    """Same seed, same start, same texture noise: the grain itself is the teacher's."""
    teacher = Generator.open("tiny")(source.conditions(), seed=1).frames
    student = Generator.open("tiny-fast")(source.conditions(), seed=1, steps=steps).frames
    other = Generator.open("tiny")(source.conditions(), seed=2).frames
    assert metrics.ssim(student, teacher) > 0.85 > metrics.ssim(other, teacher) + 0.1


def test_the_student_says_who_taught_it() -> None:
    told = Bundle.open("tiny-fast").manifest.provenance["distilled"]
    assert told["teacher"] == Bundle.open("tiny").manifest.fingerprints["weights"]


@pytest.mark.skipif(not PATIENT.exists(), reason="no ../shared CAMUS")
def test_a_patients_ventricle_contracts(generator: Generator) -> None:
    patient = open_record(PATIENT).standardised()
    assert patient.labels is not None
    names = ("mask", "sketch", "skeleton", "flow", "image", "text")
    frames = generator(patient.conditions(names), seed=1).frames.astype(float)
    for frame in (0, 15):
        cavity, wall = levels(frames, patient, frame)
        assert wall > cavity + 10
    # what was cavity at ED and is wall at ES has become brighter, beyond what cavity did
    swept = (patient.labels[0] == 1) & (patient.labels[-1] == 2)
    stays = (patient.labels[0] == 1) & (patient.labels[-1] == 1)
    assert swept.sum() > 200
    rise = frames[-1][swept].mean() - frames[0][swept].mean()
    assert rise > frames[-1][stays].mean() - frames[0][stays].mean() + 5
