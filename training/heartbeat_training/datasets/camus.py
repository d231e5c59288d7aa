"""CAMUS (Leclerc et al., IEEE TMI 38(9), 2019): 500 patients, apical two and four chambers.

`database_nifti/patient0001/patient0001_4CH_{ED,ES,half_sequence}[_gt].nii.gz`, `Info_4CH.cfg`, and
`database_split/subgroup_{training,validation,testing}.txt`. The older release of MetaImage files
(`training/`, `testing/`) is read too. Clips run from end-diastole to end-systole.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from heartbeat_fast.errors import FileError
from heartbeat_fast.files import readable
from heartbeat_fast.formats import nifti, open_record
from heartbeat_fast.record import Record, view_in
from heartbeat_training.datasets import metaimage
from heartbeat_training.datasets.base import DatasetError, Entry, ListedDataset

VIEWS = ("2CH", "4CH")
KINDS = ("sequences", "stills")
PARTS = {"train": "training", "validation": "validation", "test": "testing"}
USUAL_FOLD = 5  # its 400/50/50 patients are those of the official lists


@dataclass(frozen=True)
class CamusInfo:
    """What Info_{view}.cfg tells of one clip; None where a line is missing or malformed.

    ed, es: frame numbers, **1-based** as in the file. ef: biplane ejection fraction, percent,
    rounded in the release. quality: Good, Medium or Poor.
    """

    ed: int | None = None
    es: int | None = None
    frames: int | None = None
    sex: str | None = None
    age: int | None = None
    quality: str | None = None
    ef: float | None = None
    fps: float | None = None


class CamusDataset(ListedDataset):
    """CAMUS, one record per patient and view.

    Args:
        folder: of the release, or its `database_nifti`.
        view: "2CH", "4CH", or None for both.
        kind: "sequences" (half a beat, labels on each frame) or "stills" (two frames, ED and ES).
        splits: patient ids by "train", "validation", "test", in place of the release's lists.
        fold: of the ten `subGroup{fold}_*.txt`, where these are beside the release. Without it the
            official lists are used, else fold 5.

    Raises:
        DatasetError: not this layout, or an option is none of the above.
    """

    def __init__(
        self,
        folder: str | Path,
        view: str | None = None,
        kind: str = "sequences",
        splits: Mapping[str, Iterable[str]] | None = None,
        fold: int | None = None,
    ) -> None:
        root = Path(folder)
        if view not in (*VIEWS, None):
            raise DatasetError(f"view: {view!r} came; wanted 2CH, 4CH or None for both")
        if kind not in KINDS:
            raise DatasetError(f"kind: {kind!r} came; wanted {' or '.join(KINDS)}")
        views = VIEWS if view is None else (view,)
        self.folders, old = _patients(root)
        lists: Mapping[str, Iterable[str]] = old
        source = "official folders"
        if splits:
            lists, source = splits, "own lists"
        elif not old or fold is not None:
            lists, source = _lists(root, fold)
        entries = [
            Entry(f"{path.name} {view}", patient, partial(_READERS[kind], path, view))
            for patient, path in self.folders.items()
            for view in views
            if _complete(path, view, kind)
        ]
        here = {entry.patient for entry in entries}
        listed = {patient for patients in lists.values() for patient in patients}
        notes = {
            "listed patients without such clips here": len(listed - here),
            "patients here in no list": len(here - listed),
        }
        super().__init__(f"camus {kind}", entries, lists, source, notes)

    def info(self, patient: str, view: str) -> CamusInfo:
        """The cfg of a patient's view.

        Raises:
            DatasetError: no such patient.
        """
        if patient not in self.folders:
            raise DatasetError(f"{self.name}: no folder of patient {patient!r}")
        return read_info(self.folders[patient] / f"Info_{view}.cfg")


def recognises(folder: Path) -> bool:
    """True for a folder of this layout."""
    bases = [folder / name for name in ("database_nifti", "training", "testing")]
    return any(map(_folders, (folder, *bases)))


def read_info(path: Path) -> CamusInfo:
    """`Key: value` lines; what cannot be read is None, as is all of a missing file."""
    pairs = nifti.cfg(path)

    def number(key: str) -> float | None:
        value = pairs.get(key, "")
        return float(value) if re.fullmatch(r"\d+(\.\d*)?", value) else None

    def integer(key: str) -> int | None:
        value = number(key)
        return None if value is None else int(value)

    return CamusInfo(
        ed=integer("ED"),
        es=integer("ES"),
        frames=integer("NbFrame"),
        sex=pairs.get("Sex") or None,
        age=integer("Age"),
        quality=pairs.get("ImageQuality") or None,
        ef=number("EF"),
        fps=number("FrameRate"),
    )


def _sequence(folder: Path, view: str) -> Record:
    return _open(folder, view, "half_sequence")


def _stills(folder: Path, view: str) -> Record:
    """[ED, ES]; the frame rate is that of the pair, so that the time between them is kept."""
    ed, es = (_open(folder, view, phase) for phase in ("ED", "ES"))
    if ed.frames.shape != es.frames.shape:
        raise FileError(
            f"{folder.name} {view}: ED {ed.frames.shape[1:]} and ES {es.frames.shape[1:]} came; "
            "wanted one size"
        )
    info = read_info(folder / f"Info_{view}.cfg")
    between = abs((info.es or 0) - (info.ed or 0)) or 1
    labels = [still.labels for still in (ed, es) if still.labels is not None]
    return Record(
        frames=np.concatenate([ed.frames, es.frames]),
        labels=np.concatenate(labels) if len(labels) == 2 else None,
        spacing_mm=ed.spacing_mm,
        fps=(info.fps or 30.0) / between,
        view=ed.view,
        ef=info.ef,
        patient=ed.patient,
        source=f"{folder.name}_{view}_ED, {folder.name}_{view}_ES",
    )


_READERS = {"sequences": _sequence, "stills": _stills}


def _image(folder: Path, view: str, part: str) -> Path | None:
    """The file of one part: NIfTI as released now, or MetaImage as released first."""
    stem = f"{folder.name}_{view}_{part}"
    names = (f"{stem}.nii.gz", f"{stem}.nii", f"{stem.replace('half_', '')}.mhd")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _open(folder: Path, view: str, part: str) -> Record:
    path = _image(folder, view, part)
    if path is None:
        raise FileError(f"{folder}: no {view} {part} in it any more")
    if path.suffix != ".mhd":
        # labels, spacing, cfg and the turn of backward clips come with the reader of NIfTI
        return open_record(path)
    clip, info = metaimage.read(path), read_info(folder / f"Info_{view}.cfg")
    order = -1 if (info.ed or 0) > (info.es or np.inf) else 1
    return replace(
        clip,
        frames=np.ascontiguousarray(clip.frames[::order]),
        labels=None if clip.labels is None else np.ascontiguousarray(clip.labels[::order]),
        fps=info.fps or clip.fps,
        ef=info.ef,
        view=view_in(view),
        patient=_old_name(folder),
    )


def _complete(folder: Path, view: str, kind: str) -> bool:
    parts = ("half_sequence",) if kind == "sequences" else ("ED", "ES")
    return all(_image(folder, view, part) for part in parts)


def _folders(base: Path) -> list[Path]:
    return [path for path in sorted(base.glob("patient[0-9]*")) if path.is_dir()]


def _patients(root: Path) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """Folders by patient; and of the old release, its two parts as splits."""
    for base in (root / "database_nifti", root):
        if found := _folders(base):
            return {path.name: path for path in found}, {}
    old = {"train": _folders(root / "training"), "test": _folders(root / "testing")}
    if not any(old.values()):
        raise DatasetError(f"{root}: no database_nifti/patient0001 in it; wanted a CAMUS release")
    folders = {_old_name(path): path for paths in old.values() for path in paths}
    return folders, {split: [_old_name(path) for path in paths] for split, paths in old.items()}


def _old_name(folder: Path) -> str:
    """The old release counts its 50 test patients from 1 again."""
    return f"testing/{folder.name}" if folder.parent.name == "testing" else folder.name


def _lists(root: Path, fold: int | None) -> tuple[dict[str, list[str]], str]:
    """The official lists, or those of a fold, with their name; {} where there are none."""
    folders = [root / "database_split", root, root.parent / "database_split"]
    files = {path.name.lower(): path for f in reversed(folders) for path in f.glob("sub*roup*.txt")}
    choices = [("official", "subgroup")] if fold is None else []
    number = USUAL_FOLD if fold is None else fold
    for source, stem in [*choices, (f"fold {number}", f"subgroup{number}")]:
        paths = {split: files.get(f"{stem}_{part}.txt") for split, part in PARTS.items()}
        if all(paths.values()):
            return {s: readable(p).read_text().split() for s, p in paths.items() if p}, source
    if fold is not None:
        raise DatasetError(f"{root}: no subGroup{fold}_training.txt in {folders[0].name}")
    return {}, "none"
