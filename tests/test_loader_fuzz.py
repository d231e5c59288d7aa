"""Hostile files under every loader: a typed error that names the file or a clip, never a crash,
and never memory for what a header only announces."""

import gzip
import resource
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

from heartbeat_fast.clip import Clip
from heartbeat_fast.errors import FileError, HeartBeatError
from heartbeat_fast.formats import open_record
from heartbeat_training.datasets import open_dataset
from tests.fixtures_data import echonet, mnms, moving, write_avi

MOST = 256 * 2**20  # bytes a lying header may make us allocate
MUTATIONS = 30  # per loader and file; ten of these are 300


@pytest.fixture
def bounded() -> Iterator[None]:
    """Fails when Python and NumPy ever asked for more than MOST, or libraries below touched it.

    The process's own high-water mark shows only what exceeds all earlier ones.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < MOST


def camus(root: Path) -> Path:
    """One patient in CAMUS' layout, from scratch."""
    folder = root / "database_nifti/patient0001"
    folder.mkdir(parents=True)
    frames = moving(5)[:, :30, :40]
    for part, values in (
        ("half_sequence", frames),
        ("half_sequence_gt", (frames > 20).astype(np.float32)),
    ):
        image = nibabel.Nifti1Image(values.T, np.diag([-0.3, -0.3, 1, 1]))
        nibabel.save(image, folder / f"patient0001_4CH_{part}.nii.gz")
    (folder / "Info_4CH.cfg").write_text("ED: 1\nES: 5\nEF: 54\nFrameRate: 48.4\n")
    return root


def clip(suffix: str) -> Callable[[Path], Path]:
    """A folder with one clip of this kind."""

    def make(root: Path) -> Path:
        Clip(moving(5)[:, :48, :64], fps=25).save(root / f"clip{suffix}", mark=False)
        return root

    return make


def dicom(root: Path) -> Path:
    root.mkdir()
    shutil.copy(str(get_testdata_file("examples_ybr_color.dcm")), root / "loop.dcm")
    return root


TARGETS: list[tuple[Callable[[Path], Path], str]] = [
    (camus, "*_half_sequence.nii.gz"),
    (camus, "*_gt.nii.gz"),
    (camus, "Info_4CH.cfg"),
    (mnms, "Testing/*/*_sa.nii.gz"),
    (mnms, "*opendataset.csv"),
    (echonet, "FileList.csv"),
    (echonet, "VolumeTracings.csv"),
    (echonet, "0XA.avi"),
    (clip(".gif"), "clip.gif"),
    (clip(".mp4"), "clip.mp4"),
    (clip(".npz"), "clip.npz"),
    (dicom, "loop.dcm"),
]


def mutated(whole: bytes, chance: np.random.Generator, trial: int) -> bytes:
    """Cut short, bytes changed (mostly early, where headers are), or a piece doubled."""
    data = bytearray(whole)
    if trial % 3 == 0:
        return bytes(data[: int(chance.integers(1, len(data)))])
    reach = min(len(data), 400) if trial % 3 == 1 else len(data)
    for position in chance.integers(0, reach, 8):
        data[position] = int(chance.integers(256))
    if trial % 6 == 5:
        start, stop = sorted(chance.integers(0, len(data), 2))
        data[start:start] = data[start:stop]
    return bytes(data)


@pytest.mark.parametrize(("make", "pattern"), TARGETS, ids=[pattern for _, pattern in TARGETS])
@pytest.mark.usefixtures("bounded")
def test_mutated_files_give_a_clip_or_one_line(
    tmp_path: Path, make: Callable[[Path], Path], pattern: str
) -> None:
    root = make(tmp_path / "release")
    path = next(iter(root.rglob(pattern)))
    whole = path.read_bytes()
    chance = np.random.default_rng(sum(pattern.encode()))
    inside = pattern.endswith(".nii.gz")  # also under gzip, which would hide all but truncation
    for trial in range(MUTATIONS):
        if inside and trial % 2:
            path.write_bytes(gzip.compress(mutated(gzip.decompress(whole), chance, trial)))
        else:
            path.write_bytes(mutated(whole, chance, trial))
        messages: list[str] = []
        try:
            messages += open_dataset(root).check().odd.values()
        except HeartBeatError as error:
            messages.append(str(error))
        assert not any("\n" in message for message in messages)
    path.write_bytes(whole)
    assert open_dataset(root).check().ok


def lying_nifti(path: Path, shape: tuple[int, ...], code: int = 2, bits: int = 8) -> Path:
    """A header that announces `shape`, with a hundred bytes behind it."""
    header = bytearray(nibabel.Nifti1Header().binaryblock)
    dims = (len(shape), *shape, *[1] * (7 - len(shape)))
    header[40:56] = struct.pack("<8h", *dims)
    header[70:74] = struct.pack("<2h", code, bits)
    header[108:112] = struct.pack("<f", 352)
    header[344:348] = b"n+1\0"
    data = bytes(header) + bytes(104)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("shape", "code", "bits", "message"),
    [
        ((288, 204, 10_000), 2, 8, "ends after 100 of 587520000 bytes"),
        ((32767, 32767), 2, 8, "ends after 100 of 1073676289 bytes"),
        ((32767, 32767, 30000), 2, 8, "announces 32767 x 32767 x 30000 values"),
        ((1000, 1000, 1000), 64, 64, "ends after 100 of 8000000000 bytes"),
        ((-5, 20, 20), 2, 8, "announces|not readable|shape"),
        ((0, 20, 20), 2, 8, "announces"),
        ((20, 20, 2), 128, 24, "numbers of type"),
        ((20, 20, 2), 1792, 128, "numbers of type"),
        ((20, 20, 2), 999, 8, "not readable as nifti"),
    ],
    ids=["frames", "pixels", "all", "float64", "negative", "zero", "rgb", "complex", "type"],
)
@pytest.mark.usefixtures("bounded")
def test_lying_nifti_headers(
    tmp_path: Path, suffix: str, shape: tuple[int, ...], code: int, bits: int, message: str
) -> None:
    path = lying_nifti(tmp_path / f"patient0001_4CH_half_sequence{suffix}", shape, code, bits)
    with pytest.raises(FileError, match=message):
        open_record(path)


@pytest.mark.usefixtures("bounded")
def test_lying_cardiac_volumes(tmp_path: Path) -> None:
    root = mnms(tmp_path)
    path = root / "OpenDataset/Testing/J9L6N9/J9L6N9_sa.nii.gz"
    for shape in ((1000, 1000, 200, 5), (32767, 32767, 2, 30), (20, 20, 2, 30000)):
        lying_nifti(path, shape)
        with pytest.raises(FileError, match=r"J9L6N9_sa.*(ends after|announces)"):
            next(open_dataset(root).records("test"))


@pytest.mark.usefixtures("bounded")
def test_lying_dicom(tmp_path: Path) -> None:
    data = pydicom.dcmread(str(get_testdata_file("examples_ybr_color.dcm")))
    for tags in (
        {"NumberOfFrames": 100_000},
        {"Rows": 60_000, "Columns": 60_000, "NumberOfFrames": 1},
        {"Rows": 8000, "Columns": 8000, "NumberOfFrames": 5},
        {"NumberOfFrames": 3000},
    ):
        for name, value in tags.items():
            setattr(data, name, value)
        data.save_as(tmp_path / "loop.dcm")
        with pytest.raises(FileError, match=r"loop\.dcm: .*(announces|not readable)"):
            open_record(tmp_path / "loop.dcm")


@pytest.mark.usefixtures("bounded")
def test_lying_archives(tmp_path: Path) -> None:
    path = tmp_path / "clip.npz"
    np.savez(path, frames=np.zeros((100, 10, 10), np.uint8))
    whole = path.read_bytes()
    assert b"(100, 10, 10)" in whole
    path.write_bytes(whole.replace(b"(100, 10, 10), }   ", b"(100, 1000, 10000)}"))
    with pytest.raises(FileError, match=r"clip\.npz"):
        open_record(path)
    np.savez_compressed(path, frames=np.zeros((10, 1000, 1000), np.uint8))
    assert open_record(path).frames.shape == (10, 1000, 1000)  # dense, but true


@pytest.mark.parametrize("size", [60_000, 30_000, 10_000])
@pytest.mark.usefixtures("bounded")
def test_lying_pictures(tmp_path: Path, size: int) -> None:
    path = clip(".gif")(tmp_path) / "clip.gif"
    whole = bytearray(path.read_bytes())
    whole[6:10] = struct.pack("<2H", size, size)  # logical screen
    path.write_bytes(whole)
    with pytest.raises(FileError, match=r"clip\.gif: .*(announces|decompression bomb)"):
        open_record(path)
    path = tmp_path / "clip.avi"
    write_avi(path, moving(3), "rawvideo", "yuv420p")  # has no size but the container's
    whole = bytearray(path.read_bytes())
    start = whole.index(b"strf") + 12  # BITMAPINFOHEADER: width, height
    assert struct.unpack_from("<2i", whole, start) == (112, 112)
    struct.pack_into("<2i", whole, start, size, size)
    path.write_bytes(whole)
    with pytest.raises(FileError, match=r"clip\.avi: announces"):
        open_record(path)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32, np.float64])
def test_any_number_type_of_nifti_is_read(tmp_path: Path, dtype: type) -> None:
    frames = moving(5)[:, :30, :40]
    path = tmp_path / "patient0001_4CH_ED.nii.gz"
    nibabel.save(nibabel.Nifti1Image(frames.T.astype(dtype), np.eye(4)), path)
    assert np.array_equal(open_record(path).frames, frames)
    image = nibabel.Nifti1Image(
        frames.T.astype(">i2"), np.eye(4), nibabel.Nifti1Header(endianness=">")
    )
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, path)
    scaled = nibabel.load(path).get_fdata()
    assert scaled.max() == 23.0
    assert np.array_equal(open_record(path).frames, np.rint(scaled).T)


def test_damage_inside_gzip_is_found(tmp_path: Path) -> None:
    root = camus(tmp_path / "release")
    path = next(root.rglob("*_half_sequence.nii.gz"))
    whole = bytearray(path.read_bytes())
    whole[-8] ^= 1  # the checksum of what was packed
    path.write_bytes(whole)
    report = open_dataset(root).check()
    assert list(report.odd) == ["patient0001 4CH"]
    assert not report.ok
