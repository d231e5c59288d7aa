import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import nibabel
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage

from heartbeat_fast import files
from heartbeat_fast.clip import Clip
from heartbeat_fast.errors import FileError, HeartBeatError, MissingDependency
from heartbeat_fast.formats import SUFFIXES, open_record

SHARED = Path(__file__).parents[2] / "shared"
CAMUS = SHARED / "data/camus_a4c/database_nifti/patient0001"
F, H, W = 5, 40, 56
FRAMES = np.random.default_rng(0).integers(0, 256, (F, H, W), np.uint8)
LABELS = (np.arange(F * H * W).reshape(F, H, W) % 4).astype(np.uint8)


def nifti(folder: Path, frames: NDArray[Any] = FRAMES, stem: str = "patient0009_4CH_half") -> Path:
    """As CAMUS stores it: axes column, row, time."""
    path = folder / f"{stem}.nii.gz"
    image = nibabel.Nifti1Image(frames.T, np.diag([-0.3, -0.2, 1, 1]))
    image.header.set_zooms((0.3, 0.2, 1, 1)[: frames.ndim])
    nibabel.save(image, path)
    return path


def dicom(folder: Path, **tags: Any) -> Path:
    """A colour loop with a marker, and a tissue region inside a wider screen."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path = folder / "loop.dcm"
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    pixels = np.repeat(FRAMES[..., None], 3, -1)
    pixels[:, 12:15, 12:15] = (0, 200, 0)
    data.update(pydicom.Dataset())
    region = pydicom.Dataset()
    region.RegionSpatialFormat = region.RegionDataType = 1
    region.RegionLocationMinX0, region.RegionLocationMaxX1 = 8, 47
    region.RegionLocationMinY0, region.RegionLocationMaxY1 = 10, 33
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3
    region.PhysicalDeltaX, region.PhysicalDeltaY = 0.05, 0.04
    values = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "PatientID": "Jane-1970",
        "SeriesDescription": "Apical 4-chamber",
        "NumberOfFrames": F,
        "Rows": H,
        "Columns": W,
        "SamplesPerPixel": 3,
        "PlanarConfiguration": 0,
        "PhotometricInterpretation": "RGB",
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "FrameTime": "20",
        "SequenceOfUltrasoundRegions": [region],
        "PixelData": pixels.tobytes(),
        **tags,
    }
    for name, value in values.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def clip(suffix: str) -> Callable[[Path], Path]:
    return lambda folder: Clip(FRAMES, fps=25).save(folder / f"clip{suffix}", mark=False)


def test_nifti_is_turned_upright(tmp_path: Path) -> None:
    record = open_record(nifti(tmp_path))
    assert np.array_equal(record.frames, FRAMES)
    assert record.spacing_mm == pytest.approx((0.2, 0.3))  # (rows, columns)
    assert (record.view, record.patient, record.ef, record.labels) == (
        "A4C",
        "patient0009",
        None,
        None,
    )


def test_nifti_takes_labels_and_numbers_from_beside_it(tmp_path: Path) -> None:
    path = nifti(tmp_path)
    nifti(tmp_path, LABELS + np.float32(0.2), "patient0009_4CH_half_gt")
    cfg = tmp_path / "Info_4CH.cfg"
    cfg.write_text("ED: 1\nES: 5\nSex: F\nbroken\nEF: 54\nFrameRate: 48.4\n")
    record = open_record(path)
    assert np.array_equal(record.labels, LABELS)  # type: ignore[arg-type]
    assert (record.ef, record.fps) == (54.0, 48.4)
    cfg.write_text("ED: 5\nES: 1\n")  # runs backwards
    record = open_record(path)
    assert np.array_equal(record.frames, FRAMES[::-1])
    assert np.array_equal(record.labels, LABELS[::-1])  # type: ignore[arg-type]
    with pytest.raises(FileError, match=r"holds labels; wanted .* patient0009_4CH_half\.nii\.gz"):
        open_record(tmp_path / "patient0009_4CH_half_gt.nii.gz")


@pytest.mark.parametrize("scale", [1 / 255, 16, -1], ids=["unit", "12bit", "signed"])
def test_nifti_of_any_range_becomes_grey(tmp_path: Path, scale: float) -> None:
    frames = np.full((2, 8, 8), 128.0, np.float32)
    frames[:, 0, :4], frames[:, 0, 4:] = 0, 255
    record = open_record(nifti(tmp_path, frames * np.float32(scale)))
    expected = frames if scale > 0 else 255 - frames
    assert np.abs(record.frames - expected).max() <= 1


@pytest.mark.parametrize(
    ("frames", "labels", "message"),
    [
        (np.full((2, 8, 8), np.nan, np.float32), None, "NaN or infinite pixels came"),
        (np.zeros((2, 3, 8, 8), np.uint8), None, r"\(8, 8, 3, 2\) came; wanted"),
        (FRAMES, LABELS[:, :9], r"_gt.nii.gz: \(5, 9, 56\) came; wanted \(5, 40, 56\)"),
        (FRAMES, LABELS + 1, "labels 1 to 4; wanted 0 to 3"),
        (FRAMES, np.full((F, H, W), np.nan, np.float32), "labels nan to nan; wanted 0 to 3"),
    ],
    ids=["nan", "4d", "size", "labels", "nan-labels"],
)
def test_odd_nifti_is_named(tmp_path: Path, frames: Any, labels: Any, message: str) -> None:
    path = nifti(tmp_path, frames)
    if labels is not None:
        nifti(tmp_path, labels, "patient0009_4CH_half_gt")
    with pytest.raises(FileError, match=message):
        open_record(path)


@pytest.mark.skipif(not CAMUS.is_dir(), reason="no ../shared CAMUS")
def test_a_camus_patient() -> None:
    record = open_record(CAMUS / "patient0001_4CH_half_sequence.nii.gz")
    assert record.frames.shape == (22, 204, 288)
    assert (record.view, record.ef, record.fps) == ("A4C", 54.0, 48.4)
    assert record.spacing_mm == pytest.approx((0.587125, 0.587125))
    assert record.labels is not None
    area = (record.labels == 1).sum((1, 2))
    assert area[-1] < 0.8 * area[0]  # end-diastole first
    rows = [np.argwhere(record.labels == label)[:, 1].mean() for label in (1, 3)]
    assert rows[0] < rows[1]  # apex up, atrium below
    assert len(record.standardised().conditions().present) == 7


def test_dicom_gives_the_tissue_in_grey(tmp_path: Path) -> None:
    record = open_record(dicom(tmp_path))
    expected = FRAMES[:, 10:34, 8:48].copy()
    expected[:, 2:5, 4:7] = 0  # the coloured marker
    assert np.array_equal(record.frames, expected)
    assert record.spacing_mm == pytest.approx((0.4, 0.5))
    assert (record.fps, record.view) == (50.0, "A4C")
    assert "Jane" not in record.patient
    assert len(record.patient) == 12


def test_dicom_without_region_or_suffix(tmp_path: Path) -> None:
    tags = {"SequenceOfUltrasoundRegions": [], "FrameTime": None, "CineRate": "40"}
    path = dicom(tmp_path, **tags).rename(tmp_path / "IM0001")
    record = open_record(path)
    assert record.frames.shape == (F, H, W)
    assert record.fps == 40.0


def test_dicom_without_pixels(tmp_path: Path) -> None:
    path = dicom(tmp_path)
    data = pydicom.dcmread(path)
    del data.PixelData
    data.save_as(path)
    with pytest.raises(FileError, match="no pixels in this DICOM object"):
        open_record(path)


def test_pydicoms_own_apical_loop() -> None:
    record = open_record(str(get_testdata_file("examples_ybr_color.dcm")))
    assert record.frames.shape == (30, 192, 256)  # its region is given at twice its size
    assert record.spacing_mm == pytest.approx((1.021, 1.021), rel=1e-3)
    assert record.fps == pytest.approx(30, rel=1e-3)
    given = record.standardised().conditions(["text", "image", "sketch", "flow"])
    assert given.flow is not None
    assert np.abs(given.flow).max() > 1  # the valve moves


def test_pictures(tmp_path: Path) -> None:
    Image.fromarray(FRAMES[0]).save(tmp_path / "a4c.png")
    record = open_record(tmp_path / "a4c.png")
    assert np.array_equal(record.frames, FRAMES[:1])
    assert record.view == "A4C"
    Image.fromarray(FRAMES[0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(open_record(tmp_path / "deep.png").frames, FRAMES[:1])
    clear = Image.new("RGBA", (W, H), (255, 255, 255, 0))
    clear.save(tmp_path / "clear.png")
    assert not open_record(tmp_path / "clear.png").frames.any()


def test_video_of_an_odd_rate(tmp_path: Path) -> None:
    path = Clip(np.full((7, 32, 32), 90, np.uint8), fps=48.4).save(
        tmp_path / "clip.mp4", mark=False
    )
    record = open_record(path)
    assert record.fps == pytest.approx(48.4, rel=1e-3)
    assert record.frames.shape == (7, 32, 32)
    assert np.abs(record.frames.astype(int) - 90).max() <= 2


def test_sound_without_pictures(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(FileError, match="no video stream"):
        open_record(path)


def test_archives(tmp_path: Path) -> None:
    path = tmp_path / "clip.npz"
    np.savez(path, frames=FRAMES, mask=np.moveaxis(np.eye(4)[LABELS], -1, 1))
    assert np.array_equal(open_record(path).labels, LABELS)  # type: ignore[arg-type]
    np.savez(path, pictures=FRAMES)
    with pytest.raises(FileError, match="holds pictures; wanted `frames`"):
        open_record(path)
    np.savez(path, frames=np.array([print]))
    with pytest.raises(FileError, match=r"not readable as arrays .*allow_pickle"):
        open_record(path)
    np.savez(path, frames=FRAMES, mask=LABELS.astype(int) - 3)
    with pytest.raises(FileError, match="mask -3 to 0; wanted labels 0 to 3"):
        open_record(path)
    np.savez(path, frames=FRAMES, skeleton=FRAMES[0])
    with pytest.raises(FileError, match=r"clip.npz: .*skeleton: shape"):
        open_record(path)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".txt"])
def test_missing_empty_and_false_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    with pytest.raises(FileError, match="no such file; wanted a file"):
        open_record(path)
    path.write_bytes(b"")
    with pytest.raises(FileError, match="0 bytes"):
        open_record(path)
    path.write_bytes(b"This is not an image. " * 40)
    with pytest.raises(FileError, match=r"not readable as|unknown kind of file") as caught:
        open_record(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileError, match="a folder; wanted a file"):
        open_record(tmp_path)


MAKERS = {"nifti": nifti, "dicom": dicom} | {s: clip(s) for s in (".gif", ".mp4", ".webp", ".npz")}


@pytest.mark.parametrize("kind", MAKERS)
def test_damaged_files_never_raise_anything_else(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind](tmp_path)
    whole = path.read_bytes()
    chance = np.random.default_rng(1)
    messages = []
    for trial in range(30):
        damaged = bytearray(whole[: int(chance.integers(1, len(whole)))] if trial % 2 else whole)
        for position in chance.integers(0, min(len(damaged), 600), 6):
            damaged[position] = int(chance.integers(256))
        path.write_bytes(damaged)
        try:
            open_record(path)
        except HeartBeatError as error:
            messages.append(str(error))
    assert len(messages) > 5
    assert all(path.name in message and "\n" not in message for message in messages)


@pytest.mark.parametrize("kind", MAKERS)
def test_size_is_checked_before_reading(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = MAKERS[kind](tmp_path)
    monkeypatch.setattr(files, "LARGEST", 1000)
    with pytest.raises(FileError, match=r"wanted 1 to 1000"):
        open_record(path)
    monkeypatch.setattr(files, "readable", Path)
    with pytest.raises(FileError, match=r"wanted 1 to 1000"):
        open_record(path)


@pytest.mark.parametrize(
    ("module", "suffix"), [("nibabel", ".nii"), ("pydicom", ".dcm"), ("av", ".mp4")]
)
def test_a_missing_library_names_its_extra(
    tmp_path: Path, module: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingDependency, match=rf"{module} .*pip install 'heartbeat_fast\[formats"
    ):
        open_record(path)
