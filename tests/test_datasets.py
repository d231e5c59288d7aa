"""Data sets beside CAMUS: the released layouts, rebuilt small, and what must not slip through."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.data import get_testdata_file

from heartbeat_fast.clip import Clip
from heartbeat_fast.errors import FileError
from heartbeat_fast.record import Record
from heartbeat_training import clips
from heartbeat_training.cli import main
from heartbeat_training.datasets import (
    ClipFolder,
    DatasetError,
    EchoNetDataset,
    LeakError,
    MnmsDataset,
    layout_of,
    open_dataset,
)
from heartbeat_training.datasets.cache import cached_conditions
from heartbeat_training.datasets.clips import split_of
from heartbeat_training.datasets.echonet import lv_mask
from heartbeat_training.phantom import record
from tests.fixtures_data import SIZE, chords, echonet, heart, mnms, moving, save_4d, write_avi


def numbers(clip: Record) -> list[int]:
    """The frame number each frame of `moving` carries in its brightness."""
    return [round(float(frame.mean()) / 10) for frame in clip.frames]


def test_echonet_windows_are_the_traced_beat_without_labels(tmp_path: Path) -> None:
    data = EchoNetDataset(echonet(tmp_path))
    assert data.splits() == {"train": ["0XA"], "validation": ["0XC"], "test": ["0XB"]}
    assert data.split_source == "official"
    assert data.notes["videos with fewer than 2 traced frames"] == 1
    (clip,) = data.records("train")
    assert numbers(clip) == list(range(4, 15))
    assert clip.labels is None
    assert (clip.fps, clip.ef, clip.view, clip.patient) == (50.0, 50.0, "A4C", "0XA")


def test_echonet_traced_frames_are_ed_then_es(tmp_path: Path) -> None:
    data = EchoNetDataset(echonet(tmp_path), kind="traced")
    for split, ed, es, fps in (
        ("train", 4, 14, 5),
        ("test", 2, 9, 40 / 7),
        ("validation", 12, 3, 50 / 9),
    ):
        (pair,) = data.records(split)
        assert numbers(pair) == [ed, es]
        assert pair.fps == pytest.approx(fps)
        assert pair.labels is not None
        areas = (pair.labels == 1).sum((1, 2))
        assert areas[0] == 41 * 41  # the fixture's box, corners included
        assert areas[1] == 21 * 21
    whole = EchoNetDataset(tmp_path, kind="videos")
    assert len(whole.splits()["train"]) == 2  # the half-traced video is a video all the same
    assert numbers(next(whole.records(["0XD"]))) == list(range(18))


def test_an_lv_polygon_ignores_the_long_axis() -> None:
    rows = np.array(chords(40, 60, 10))
    mask = lv_mask(rows, SIZE, SIZE)
    assert mask[40:61, 46:67].all()
    assert mask.sum() == 21 * 21
    rows[0] = 0, 0, 111, 111
    assert np.array_equal(lv_mask(rows, SIZE, SIZE), mask)


def test_echonet_pediatric_folds(tmp_path: Path) -> None:
    root = echonet(tmp_path / "A4C")
    text = (root / "FileList.csv").read_text()
    for old, new in (("TRAIN", "0"), ("TEST", "9"), ("VAL", "8"), ("FPS", "NoFPS")):
        text = text.replace(old, new)
    (root / "FileList.csv").write_text(text)
    data = open_dataset(tmp_path, kind="echonet", view="A4C")
    assert data.splits() == {"train": ["0XA"], "validation": ["0XC"], "test": ["0XB"]}
    assert data.split_source == "folds 0-7, 8, 9"
    assert next(data.records("test")).fps == 50.0  # from the file, where the table has none
    with pytest.raises(DatasetError, match=r"no FileList\.csv"):
        EchoNetDataset(tmp_path, view="PSAX")


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        (
            "VolumeTracings.csv",
            "0XA.avi,1,2,x,4,5",
            r"VolumeTracings.csv: line \d+ is .*wanted finite",
        ),
        ("VolumeTracings.csv", "0XA.avi,1,2,inf,4,5", "wanted finite numbers"),
        ("FileList.csv", "0XE,50,50,HOLDOUT", "Split 'HOLDOUT' of 0XE; wanted TRAIN"),
        ("FileList.csv", "0XE,50", "Split '' of 0XE"),
    ],
)
def test_odd_echonet_rows_are_named(tmp_path: Path, table: str, line: str, message: str) -> None:
    root = echonet(tmp_path)
    with (root / table).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises((FileError, DatasetError), match=message):
        EchoNetDataset(root)


def test_echonet_skips_empty_rows_and_names_bad_numbers(tmp_path: Path) -> None:
    root = echonet(tmp_path)
    with (root / "FileList.csv").open("a") as file:
        file.write("\n,,,\n0XA,50,50,TEST\n")
    with (root / "VolumeTracings.csv").open("a") as file:
        file.write("\n,,,,,\n")
    data = EchoNetDataset(root)
    assert (data.notes["rows without a file name"], data.notes["repeated rows"]) == (1, 1)
    text = (root / "FileList.csv").read_text()
    (root / "FileList.csv").write_text(text.replace("0XA,50,50,TRAIN", "0XA,half,50,TRAIN"))
    with pytest.raises(FileError, match=r"0XA.avi: EF is 'half' in FileList.csv"):
        next(EchoNetDataset(root).records("train"))
    write_avi(root / "Videos/0XB.avi", moving(5))
    with pytest.raises(FileError, match=r"0XB.avi: traced frames \[9, 2\] of 5"):
        next(EchoNetDataset(root).records("test"))
    (root / "FileList.csv").write_text("Name,EF\n")
    with pytest.raises(FileError, match="no column FileName, Split"):
        EchoNetDataset(root)


def test_mnms_volumes_become_sixteen_slices(tmp_path: Path) -> None:
    data = open_dataset(mnms(tmp_path))
    assert isinstance(data, MnmsDataset)
    assert data.splits() == {"train": ["A0S9V9", "B1T0W0"], "validation": [], "test": ["J9L6N9"]}
    assert {note: count for note, count in data.notes.items() if count} == {
        "unlabelled cases": 1,
        "labelled cases without image": 1,
        "label files in another split's folder": 1,
    }
    ed, es = data.records("test")
    assert ed.frames.shape == (16, 20, 24)
    assert ed.spacing_mm == pytest.approx((1.5, 1.25))
    means = ed.frames.mean((1, 2))
    assert (np.diff(means) > 0).all()  # five slices, sixteen steps between them
    _, truth = heart()
    assert ed.labels is not None
    assert np.array_equal(ed.labels[0], truth[:, :, 0, 0].T)
    assert (ed.source, es.source) == ("J9L6N9_sa.nii.gz volume 0", "J9L6N9_sa.nii.gz volume 3")
    square = ed.standardised()
    assert square.frames.shape == (16, 256, 256)
    assert square.labels is not None
    assert set(np.unique(square.labels)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, t: (v[..., :3], t), r"_sa.nii.gz: \(24, 20, 5, 3\) came; wanted .* volume 3"),
        (lambda v, t: (v, t[:, :9]), r"_sa_gt.nii.gz: \(5, 9, 24\) came; wanted \(5, 20, 24\)"),
        (lambda v, t: (v, t + 1), "labels 1 to 4; wanted 0 to 3"),
        (lambda v, t: (v, t * 0), "volume 0 holds no label"),
        (lambda v, t: (v * np.float32(np.nan), t), "NaN or infinite pixels came"),
    ],
    ids=["phase", "grid", "labels", "empty", "nan"],
)
def test_odd_mnms_cases_are_named(tmp_path: Path, change: Any, message: str) -> None:
    base = mnms(tmp_path) / "OpenDataset"
    values, truth = change(*heart())
    save_4d(base / "Testing/J9L6N9/J9L6N9_sa.nii.gz", values)
    save_4d(base / "Validation/J9L6N9/J9L6N9_sa_gt.nii.gz", truth)
    with pytest.raises(FileError, match=message):
        list(MnmsDataset(tmp_path).records("test"))


def test_an_image_in_two_splits_is_a_leak(tmp_path: Path) -> None:
    base = mnms(tmp_path) / "OpenDataset"
    save_4d(base / "Testing/A0S9V9/A0S9V9_sa.nii.gz", heart()[0])
    with pytest.raises(LeakError, match="A0S9V9 is in train and test"):
        MnmsDataset(tmp_path).splits()


def test_any_folder_of_clips_by_patient(tmp_path: Path) -> None:
    for place in ("p1/a.gif", "p1/deep/b.gif", "p2/c.gif", "p3_1.gif", "p3_2.gif"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Clip(moving(4) + np.uint8(len(place)), fps=25).save(path, mark=False)
    loop = Path(str(get_testdata_file("examples_ybr_color.dcm")))
    (tmp_path / "p1/1.2.840").write_bytes(loop.read_bytes())  # no suffix, its own PatientID
    (tmp_path / "notes.txt").write_text("not a clip")
    data = ClipFolder(tmp_path)
    patients = {entry.name: entry.patient for entry in data.entries}
    hashed = patients.pop("p1/1.2.840")
    assert hashed not in ("p1", "")
    assert patients == {
        "p1/a.gif": "p1",
        "p1/deep/b.gif": "p1",
        "p2/c.gif": "p2",
        "p3_1.gif": "p3",
        "p3_2.gif": "p3",
    }
    assert [clip.patient for clip in data.records(["p3"])] == ["p3", "p3"]
    found = [split_of(f"patient{i}") for i in range(1000)]
    assert 750 < found.count("train") < 850
    assert 70 < found.count("test") < 130
    assert split_of("patient1") == "train"  # fixed for ever: retraining must not move patients
    with pytest.raises(DatasetError, match="no clip in it"):
        ClipFolder(tmp_path / "p1/none")


def test_layouts_are_recognised_and_options_checked(tmp_path: Path) -> None:
    assert layout_of(echonet(tmp_path / "e")) == "echonet"
    assert layout_of(mnms(tmp_path / "m")) == "mnms"
    assert layout_of(tmp_path / "m/OpenDataset") == "mnms"
    assert layout_of(tmp_path) == "folder"
    assert open_dataset(tmp_path / "e", kind="traced").name == "echonet traced"
    with pytest.raises(DatasetError, match="mnms: no option 'view'; wanted splits"):
        open_dataset(tmp_path / "m", view="4CH")
    with pytest.raises(DatasetError, match="no such folder"):
        open_dataset(tmp_path / "nowhere")


def test_check_names_all_that_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = mnms(tmp_path)
    assert main(["data", "check", str(root), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["clips"] == {"test": {"unknown": 2}, "train": {"unknown": 4}}
    assert (report["ok"], report["labels"], report["frames"]) == (True, [0, 1, 2, 3], [16, 16])
    base = root / "OpenDataset"
    whole = (base / "Training/Labeled/A0S9V9/A0S9V9_sa.nii.gz").read_bytes()
    (base / "Training/Labeled/B1T0W0/B1T0W0_sa.nii.gz").write_bytes(whole[:300])
    leak = base / "Testing/A0S9V9/A0S9V9_sa.nii.gz"
    leak.parent.mkdir()
    leak.write_bytes(whole)
    (base / "Testing/J9L6N9/J9L6N9_sa.nii.gz").write_bytes(whole)
    assert main(["data", "check", str(root), "--json"]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert set(report["odd"]) == {"B1T0W0 ED", "B1T0W0 ES"}
    assert report["leaks"] == {"A0S9V9": ["train", "test"]}
    assert report["duplicates"] == [["A0S9V9 ED", "J9L6N9 ED"], ["A0S9V9 ES", "J9L6N9 ES"]]
    assert main(["data", "check", str(root)]) == 1
    shown = capsys.readouterr().out
    assert "A0S9V9 is in train and test" in shown
    assert "2 odd, 2 doubled, 1 leaks" in shown


def test_check_reads_both_kinds_of_echonet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(echonet(tmp_path)), "--json"]) == 0
    windows, traced = json.loads(capsys.readouterr().out)
    assert (windows["unlabelled"], traced["labels"]) == (3, [0, 1])
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 2


def test_conditions_are_extracted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = record(3, frames=4, size=64)
    calls = []
    make = clips.arrays_of
    monkeypatch.setattr(clips, "arrays_of", lambda item: calls.append(item) or make(item))
    first = cached_conditions(clip, tmp_path)
    again = cached_conditions(record(3, frames=4, size=64), tmp_path)
    assert len(calls) == 1
    expected = make(clip)
    assert set(again) == set(expected)
    for name, array in expected.items():
        assert np.array_equal(first[name], array)
        assert np.array_equal(again[name], array)
        assert again[name].dtype == array.dtype
    other = Record(clip.frames, labels=clip.labels, spacing_mm=(2.0, 2.0))
    cached_conditions(other, tmp_path)
    assert len(calls) == 2  # no exact flow, another spacing: another entry
    for entry in tmp_path.rglob("*.npz"):
        entry.write_bytes(entry.read_bytes()[:1000])  # as a full disk or a lost mount leaves it
    assert np.array_equal(cached_conditions(clip, tmp_path)["flow"], expected["flow"])
    assert len(calls) == 3
    assert not list(tmp_path.rglob("*.tmp"))
