"""CAMUS: the official layout, real patients where they are at hand, and every odd folder named."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from heartbeat_fast.errors import FileError
from heartbeat_training.datasets import CamusDataset, DatasetError, LeakError

REAL = Path(__file__).parents[2] / "shared/data/camus_a4c"
needs_camus = pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared CAMUS")
F, H, W = 6, 30, 40
CHANCE = np.random.default_rng(0)
CFG = "ED: 1\nES: 6\nNbFrame: 6\nSex: F\nAge: 56\nbroken line\nImageQuality: Good\nEF: 54\n"


def save(path: Path, upright: NDArray[Any], spacing: float = 0.308) -> None:
    """(F,H,W) or (H,W) as the release stores it: column, row, time."""
    image = nibabel.Nifti1Image(upright.T, np.diag([-spacing, -spacing, 1, 1]))
    image.header.set_zooms((spacing, spacing, 1)[: upright.ndim])
    nibabel.save(image, path)


def patient(root: Path, name: str, view: str = "4CH", cfg: str = CFG) -> NDArray[np.uint8]:
    """Writes a patient whose LV shrinks along the clip; returns its frames."""
    folder = root / "database_nifti" / name
    folder.mkdir(parents=True, exist_ok=True)
    frames = CHANCE.integers(0, 256, (F, H, W), np.uint8)
    labels = np.zeros((F, H, W), np.float32)
    for t in range(F):
        labels[t, 8 : 22 - t, 10:30] = 1
        labels[t, 24:28, 10:30] = 3
    for part, image, gt in (
        ("half_sequence", frames.astype(np.float32), labels + np.float32(1e-3)),
        ("ED", frames[0], labels[0].astype(np.uint8)),
        ("ES", frames[-1], labels[-1].astype(np.uint8)),
    ):
        save(folder / f"{name}_{view}_{part}.nii.gz", image)
        save(folder / f"{name}_{view}_{part}_gt.nii.gz", gt)
    (folder / f"Info_{view}.cfg").write_text(cfg + "FrameRate: 50\n")
    return frames


def lists(root: Path, stem: str = "subgroup", **parts: list[str]) -> None:
    folder = root / "database_split"
    folder.mkdir(exist_ok=True)
    for part in ("training", "validation", "testing"):
        (folder / f"{stem}_{part}.txt").write_text("\n".join(parts.get(part, [])) + "\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(1, 4):
        patient(tmp_path, f"patient000{number}")
    lists(tmp_path, training=["patient0001", "patient0009"], validation=["patient0002"])
    return tmp_path


def test_splits_are_the_releases_and_hold_who_is_here(root: Path) -> None:
    data = CamusDataset(root, view="4CH")
    assert data.splits() == {"train": ["patient0001"], "validation": ["patient0002"], "test": []}
    assert data.split_source == "official"
    assert data.notes == {
        "listed patients without such clips here": 1,
        "patients here in no list": 1,
    }
    assert [r.patient for r in data.records("validation")] == ["patient0002"]
    assert [r.patient for r in data.records(["patient0003"])] == ["patient0003"]
    with pytest.raises(DatasetError, match="no clip of patient 'patient0009'"):
        data.records(["patient0001", "patient0009"])
    with pytest.raises(DatasetError, match="'training' came; wanted one of train, validation"):
        data.records("training")


def test_a_sequence_with_all_it_says(tmp_path: Path) -> None:
    frames = patient(tmp_path, "patient0001", "2CH")
    record = next(CamusDataset(tmp_path).records(["patient0001"]))
    assert np.array_equal(record.frames, frames)
    assert record.labels is not None
    assert set(np.unique(record.labels)) == {0, 1, 3}  # 1.001 in the file
    assert (record.ef, record.fps, record.view) == (54.0, 50.0, "A2C")
    assert record.spacing_mm == pytest.approx((0.308, 0.308))
    info = CamusDataset(tmp_path).info("patient0001", "2CH")
    assert (info.sex, info.age, info.quality, info.ed, info.es) == ("F", 56, "Good", 1, 6)
    assert CamusDataset(tmp_path).info("patient0001", "4CH").ef is None


def test_a_backward_clip_is_turned_with_its_labels(tmp_path: Path) -> None:
    frames = patient(tmp_path, "patient0185", cfg=CFG.replace("ED: 1\nES: 6", "ED: 6\nES: 1"))
    record = next(CamusDataset(tmp_path, "4CH").records(["patient0185"]))
    assert np.array_equal(record.frames, frames[::-1])
    assert record.labels is not None
    areas = (record.labels == 1).sum((1, 2))
    assert (np.diff(areas) > 0).all()  # the fixture's area falls in the file's order


def test_stills_keep_the_time_between_them(root: Path) -> None:
    record = next(CamusDataset(root, "4CH", kind="stills").records("train"))
    assert record.frames.shape == (2, H, W)
    assert record.labels is not None
    assert (record.labels[0] == 1).sum() > (record.labels[1] == 1).sum()
    assert record.fps == 10.0  # five frames apart at 50 per second


def test_an_empty_cfg_costs_only_what_it_would_say(root: Path) -> None:
    (root / "database_nifti/patient0001/Info_4CH.cfg").write_text("")
    for kind in ("sequences", "stills"):
        record = next(CamusDataset(root, "4CH", kind=kind).records("train"))
        assert (record.ef, record.fps) == (None, 30.0)


def test_folds_and_own_lists(root: Path) -> None:
    lists(root, "subGroup3", training=["patient0003"], testing=["patient0001"])
    fold = CamusDataset(root, "4CH", fold=3)
    assert fold.splits()["train"] == ["patient0003"]
    assert fold.split_source == "fold 3"
    own = CamusDataset(root, "4CH", splits={"test": ["patient0002"]})
    assert own.splits() == {"train": [], "validation": [], "test": ["patient0002"]}
    assert own.split_source == "own lists"
    with pytest.raises(DatasetError, match=r"no subGroup7_training\.txt"):
        CamusDataset(root, fold=7)
    with pytest.raises(DatasetError, match=r"\['training'\] came; wanted train"):
        CamusDataset(root, splits={"training": ["patient0002"]})


def test_the_fifth_fold_stands_in_for_missing_official_lists(tmp_path: Path) -> None:
    patient(tmp_path, "patient0001")
    with pytest.raises(DatasetError, match="no list of splits"):
        CamusDataset(tmp_path).splits()
    for number in (4, 5):
        lists(tmp_path, f"subGroup{number}", testing=["patient0001"] if number == 5 else [])
    data = CamusDataset(tmp_path)
    assert (data.split_source, data.splits()["test"]) == ("fold 5", ["patient0001"])


def test_a_patient_in_two_splits_stops_everything(root: Path) -> None:
    lists(root, training=["patient0001", "patient0002"], testing=["patient0002"])
    data = CamusDataset(root)
    for use in (data.splits, lambda: data.records("train"), lambda: data.records(["patient0001"])):
        with pytest.raises(LeakError, match="patient0002 is in train and test"):
            use()


def test_odd_patients_are_named(root: Path) -> None:
    folder = root / "database_nifti/patient0001"
    bad = np.full((F, H, W), 4, np.float32)
    save(folder / "patient0001_4CH_half_sequence_gt.nii.gz", bad)
    with pytest.raises(FileError, match=r"patient0001_4CH_half_sequence_gt.*labels 4 to 4"):
        next(CamusDataset(root, "4CH").records("train"))
    save(folder / "patient0001_4CH_ES.nii.gz", np.zeros((H, W + 2), np.uint8))
    (folder / "patient0001_4CH_ES_gt.nii.gz").unlink()
    with pytest.raises(FileError, match=r"patient0001 4CH: ED \(30, 40\) and ES \(30, 42\) came"):
        next(CamusDataset(root, "4CH", kind="stills").records("train"))
    with pytest.raises(DatasetError, match="wanted a CAMUS release"):
        CamusDataset(root / "database_split")
    for option in ({"view": "A4C"}, {"kind": "images"}):
        with pytest.raises(DatasetError, match="came; wanted"):
            CamusDataset(root, **option)


def metaimage(folder: Path, stem: str, values: NDArray[np.uint8]) -> Path:
    """As the first release stored it: 0.308 mm along a row, 0.154 mm down a column."""
    folder.mkdir(parents=True, exist_ok=True)
    itk = pytest.importorskip("SimpleITK", reason="SimpleITK reads the old release")
    image = itk.GetImageFromArray(values)
    image.SetSpacing((0.308, 0.154, 1.0)[: values.ndim])
    itk.WriteImage(image, str(folder / f"{stem}.mhd"))
    return folder / f"{stem}.mhd"


def test_the_old_release_gets_square_pixels(tmp_path: Path) -> None:
    rows = np.repeat(np.arange(20, dtype=np.uint8) * 10, 2)  # pairs of equal rows: averaged exactly
    image = np.tile(rows[:, None], (1, W))
    labels = np.tile(np.repeat(np.arange(20, dtype=np.uint8) % 4, 2)[:, None], (1, W))
    for part, name in (("training", "patient0001"), ("testing", "patient0001")):
        folder = tmp_path / part / name
        metaimage(folder, f"{name}_2CH_sequence", np.stack([image + i for i in range(F)]))
        for phase in ("ED", "ES"):
            metaimage(folder, f"{name}_2CH_{phase}", image[None])
            if part == "training":
                metaimage(folder, f"{name}_2CH_{phase}_gt", labels[None])
        (folder / "Info_2CH.cfg").write_text("ED: 6\nES: 1\nEF: 40\n")
    data = CamusDataset(tmp_path, kind="stills")
    assert data.split_source == "official folders"
    assert data.splits()["test"] == ["testing/patient0001"]  # another patient of the same number
    pair = next(data.records("train"))
    assert pair.frames.shape == (2, 20, W)
    assert pair.spacing_mm == pytest.approx((0.308, 0.308))
    assert np.array_equal(pair.frames[0, :, 0], np.arange(20) * 10)
    assert pair.labels is not None
    assert np.array_equal(pair.labels[0, :, 0], np.arange(20) % 4)
    assert next(data.records("test")).labels is None
    clip = next(CamusDataset(tmp_path).records("test"))
    assert (clip.patient, clip.view, clip.ef, clip.labels) == (
        "testing/patient0001",
        "A2C",
        40.0,
        None,
    )
    assert clip.frames[0, 0, 0] == F - 1  # ED is frame 6: turned


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("patient0001_4CH_ED.raw", "../../../secret.raw", "wanted a .raw file beside it"),
        ("DimSize = 40 30", "DimSize = 40000 20000", "announces .* has 1200 bytes"),
        ("DimSize = 40 30", "DimSize = 400000 200000", "announces 400000 x 200000 values"),
        ("DimSize = 40 30", "DimSize = many", "DimSize is missing"),
        ("MET_UCHAR", "MET_OTHER", "wanted plain"),
    ],
    ids=["path", "short", "huge", "words", "type"],
)
def test_lying_metaimage_headers(tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = tmp_path / "training/patient0001"
    for phase in ("ED", "ES"):
        path = metaimage(folder, f"patient0001_4CH_{phase}", np.zeros((H, W), np.uint8))
        text = path.read_text()
        assert phase == "ES" or old in text
        path.write_text(text.replace(old, new))
    with pytest.raises(FileError, match=message):
        next(CamusDataset(tmp_path, "4CH", kind="stills").records("train"))


@needs_camus
def test_real_patients() -> None:
    data = CamusDataset(REAL, view="4CH")
    splits = data.splits()
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [100, 0, 0]
    for record in data.records(splits["train"][:3]):
        assert record.labels is not None
        assert set(np.unique(record.labels)) == {0, 1, 2, 3}
        areas = (record.labels == 1).sum((1, 2))
        assert areas[0] > areas[-1]
    stills = CamusDataset(REAL, view="4CH", kind="stills")
    assert len(stills.splits()["train"]) == 200
    record = next(stills.records("train"))
    assert record.frames.shape == (2, 389, 549)  # native size, upright
    assert record.spacing_mm == pytest.approx((0.308, 0.308))
