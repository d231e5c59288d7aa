import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from heartbeat_fast.clip import SUFFIXES, Clip, writable
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.errors import FileError, RecordError
from heartbeat_fast.files import atomic
from heartbeat_fast.formats import open_record
from heartbeat_fast.preview import conditions_sheet, save_preview

ROWS, COLUMNS = np.mgrid[:64, :64]
FRAMES = np.stack([(ROWS * 2 + COLUMNS + 5 * t) % 256 for t in range(4)]).astype(np.uint8)


def made(**fields: Any) -> Clip:
    return Clip(FRAMES, (0.5, 0.4), 25.0, {"seed": 7, "engine": "onnxruntime"}, **fields)


def metadata(path: Path) -> dict[str, Any]:
    """The note as someone else's program would find it."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            assert container.metadata["title"] == "SYNTHETIC"
            return dict(json.loads(container.metadata["comment"]))
    if path.suffix == ".npz":
        return dict(json.loads(str(np.load(path)["provenance"])))
    if path.suffix == ".dcm":
        return dict(json.loads(pydicom.dcmread(path).ImageComments.partition("\n")[2]))
    if path.name.endswith((".nii", ".nii.gz")):
        return dict(json.loads(nibabel.load(path).header.extensions[0].get_content()))
    with Image.open(path) as image:
        note = {
            ".gif": lambda: image.info["comment"].decode(),
            ".png": lambda: image.info["Comment"],
            ".webp": lambda: image.getexif()[0x010E],
        }[path.suffix]()
    return dict(json.loads(note))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_file_says_it_is_synthetic(tmp_path: Path, suffix: str) -> None:
    path = made().save(tmp_path / "deep" / f"clip{suffix}", mark=False)
    note = metadata(path)
    assert note["synthetic"] is True
    assert note["not_for_diagnosis"] is True
    assert (note["seed"], note["engine"], note["fps"]) == (7, "onnxruntime", 25.0)
    assert note["spacing_mm"] == [0.5, 0.4]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("suffix", "most"), [(".gif", 0), (".npz", 0), (".webp", 0), (".mp4", 16)])
def test_frames_come_back(tmp_path: Path, suffix: str, most: int) -> None:
    smooth = Clip(np.repeat(np.repeat(FRAMES[:, 16:48, 16:48], 2, 1), 2, 2) // 2 + 60, fps=25)
    record = open_record(smooth.save(tmp_path / f"clip{suffix}", mark=False))
    assert record.frames.shape == smooth.frames.shape
    assert np.abs(record.frames.astype(int) - smooth.frames).max() <= most
    assert record.fps == pytest.approx(25, rel=0.01)


def test_png_is_a_strip(tmp_path: Path) -> None:
    strip = np.asarray(Image.open(made().save(tmp_path / "clip.png", mark=False)))
    assert np.array_equal(strip, np.concatenate(list(FRAMES), 1))


@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_the_mark_is_small_and_can_be_left_out(tmp_path: Path, suffix: str) -> None:
    dark = Clip(FRAMES // 2)
    for frames in zip(
        open_record(dark.save(tmp_path / f"a{suffix}")).frames,
        open_record(dark.save(tmp_path / f"b{suffix}", mark=False)).frames,
        strict=True,
    ):
        changed = frames[0] != frames[1]
        assert 50 < changed.sum() / (changed.shape[1] // 64) < 64 * 64 / 5
        assert not changed[:40].any()  # in the lower corner
        assert frames[0].max() > 150


def test_npz_holds_the_conditions(tmp_path: Path) -> None:
    mask = np.full((4, 64, 64), 2, np.uint8)
    flow = np.full((2, 64, 64), 0.5)
    conditions = Conditions(text="An ECHO.", ef=40, mask=mask, flow=flow, frames=4, size=64)
    path = made(conditions=conditions).save(tmp_path / "clip.npz")
    arrays = np.load(path, allow_pickle=False)
    assert set(arrays) == {
        "frames", "spacing_mm", "fps", "provenance", "text", "ef", "mask", "flow",
    }  # fmt: skip
    assert np.array_equal(arrays["mask"], mask)
    record = open_record(path)
    assert (record.spacing_mm, record.fps, record.ef) == ((0.5, 0.4), 25.0, 40.0)
    again = record.conditions(["ef", "mask", "flow"])
    assert np.array_equal(again.flow, conditions.flow)  # type: ignore[arg-type]


def test_mmode_is_a_line_over_time() -> None:
    clip = made()
    assert np.array_equal(clip.mmode(10), FRAMES[:, :, 10].T)
    slanted = clip.mmode(((0, 0), (63, 63)))
    assert slanted.shape == (round(63 * 2**0.5) + 1, 4)
    assert np.array_equal(slanted[[0, -1]], np.stack([FRAMES[:, 0, 0], FRAMES[:, 63, 63]]))
    with pytest.raises(RecordError, match="line: 64 came; wanted inside 64 rows x 64 columns"):
        clip.mmode(64)


def test_unknown_suffix_is_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"clip\.jpeg: unknown suffix; wanted one of \.gif, \.mp4"):
        writable(tmp_path / "clip.jpeg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frames", [FRAMES / 255, FRAMES[0], FRAMES[:0]], ids=str)
def test_frames_that_are_no_clip_are_refused(frames: Any) -> None:
    with pytest.raises(RecordError, match="frames: "):
        Clip(frames)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, suffix: str) -> None:
    """A process that may write 2000 bytes a file at most: the write fails midway, as on a disk."""
    pytest.importorskip("resource", reason="no file size limit on this system")
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(b"the old one")
    code = (
        "import resource, sys, numpy as np\n"
        "from heartbeat_fast.clip import Clip\n"
        "from heartbeat_fast.errors import FileError\n"
        "frames = np.random.default_rng(0).integers(0, 256, (4, 128, 128), np.uint8)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try:\n    Clip(frames).save(sys.argv[1])\n"
        "except FileError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    assert path.name in done.stdout
    assert path.read_bytes() == b"the old one"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FileError, match=r"clip\.gif: cannot be written"):
        made().save(tmp_path / "file" / "clip.gif")


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic(tmp_path / "clip.gif") as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_preview_shows_each_condition_and_each_absence(tmp_path: Path) -> None:
    line = np.zeros((4, 64, 64))
    line[:, 30, 20:40] = 1
    full = Conditions(
        text="An ECHO with 4-chamber view.",
        ef=55,
        image=FRAMES[0],
        sketch=FRAMES[0] / 255,
        mask=FRAMES % 3 + 1,
        skeleton=line,
        flow=np.ones((4, 2, 64, 64)),
        frames=4,
        size=64,
    )
    sheets = [conditions_sheet(given, made()) for given in (full, full.only(["mask"]))]
    for sheet in sheets:
        assert len(sheet) == 4
        assert {(page.mode, page.size) for page in sheet} == {("RGB", sheets[0][0].size)}
        assert all(side % 2 == 0 for side in sheet[0].size)  # H.264 wants even sides
        assert sheet[0].tobytes() != sheet[1].tobytes()
    assert sheets[0][0].tobytes() != sheets[1][0].tobytes()
    for suffix in (".gif", ".webp"):
        path = save_preview(tmp_path / f"sheet{suffix}", full, made())
        assert metadata(path)["synthetic"] is True
        assert open_record(path).frames.shape == (4, *sheets[0][0].size[::-1])
