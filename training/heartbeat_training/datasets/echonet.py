"""EchoNet-Dynamic (Ouyang et al., Nature 580, 2020) and its pediatric sister: folders of AVI.

`FileList.csv`, `VolumeTracings.csv`, `Videos/*.avi`, 112×112 pixels. Two frames of a beat carry a
traced left ventricle, no others do. The research agreement forbids passing any part on.
"""

import csv
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.errors import FileError, optional
from heartbeat_fast.files import readable
from heartbeat_fast.formats import open_record
from heartbeat_fast.record import Record
from heartbeat_training.datasets.base import SPLITS, DatasetError, Entry, ListedDataset

KINDS = ("windows", "traced", "videos")
OFFICIAL = {"TRAIN": "train", "VAL": "validation", "TEST": "test"}
PEDIATRIC = {str(fold): "train" for fold in range(8)} | {"8": "validation", "9": "test"}
VIEWS = {"A4C": "A4C", "PSAX": "unknown"}
TRACING_HEADER = ["FileName", "X1", "Y1", "X2", "Y2", "Frame"]
LV = 1

Tracing = NDArray[np.float64]  # (rows, 4): X1, Y1, X2, Y2 in pixels; row 0 is the long axis


@dataclass
class _Listing:
    """The two tables: rows of FileList by video, tracings by video and frame, and what is odd."""

    rows: dict[str, dict[str, str]]
    tracings: dict[str, dict[int, Tracing]]
    odd: dict[str, int] = field(default_factory=dict)


class EchoNetDataset(ListedDataset):
    """EchoNet-Dynamic, or one view of EchoNet-Pediatric.

    Args:
        folder: holds FileList.csv; of the pediatric release, the folder above its views will do.
        view: "A4C" or "PSAX" of the pediatric release.
        kind: "windows": the frames between the two traced ones, both included, in time's order,
            without labels (masks of two frames are no masks of a clip). "traced": two frames
            [ED, ES] with their LV masks. "videos": whole clips, without labels.
        splits: video names by "train", "validation", "test" in place of the Split column, which
            holds TRAIN/VAL/TEST, or folds 0 to 9: 0–7 train, 8 validation, 9 test.

    Raises:
        DatasetError: not this layout, or an option is none of the above.
        FileError: a table is unreadable, by file and line.
    """

    def __init__(
        self,
        folder: str | Path,
        view: str = "A4C",
        kind: str = "windows",
        splits: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        if kind not in KINDS or view not in VIEWS:
            raise DatasetError(
                f"kind {kind!r}, view {view!r} came; wanted {', '.join(KINDS)}; A4C or PSAX"
            )
        root = _root(Path(folder), view)
        listing = _listing(root)
        videos = {path.stem: path for path in sorted((root / "Videos").glob("*.avi"))}
        traced = {name for name, frames in listing.tracings.items() if len(frames) > 1}
        entries = [
            Entry(name, name, partial(_READERS[kind], videos[name], row, tracings, VIEWS[view]))
            for name, row in listing.rows.items()
            if name in videos and (kind == "videos" or name in traced)
            for tracings in [listing.tracings.get(name, {})]
        ]
        notes = {
            "listed videos without a file": len(listing.rows.keys() - videos),
            "files in no list": len(videos.keys() - listing.rows),
            "videos with fewer than 2 traced frames": len(listing.rows.keys() - traced),
            **listing.odd,
        }
        lists, source = (splits, "own lists") if splits else _lists(listing.rows)
        super().__init__(f"echonet {kind}", entries, lists, source, notes)


def recognises(folder: Path) -> bool:
    """True for a folder of this layout."""
    return any((base / "FileList.csv").is_file() for base in (folder, *map(folder.joinpath, VIEWS)))


def lv_mask(tracing: Tracing, height: int, width: int) -> NDArray[np.uint8]:
    """(height, width), 1 inside the traced left ventricle.

    The contour runs down the first ends of the chords and up the second ones; row 0, the long
    axis, is no chord (echonet/dynamic, `echonet/datasets/echo.py`).
    """
    x = np.concatenate([tracing[1:, 0], tracing[:0:-1, 2]])
    y = np.concatenate([tracing[1:, 1], tracing[:0:-1, 3]])
    mask = np.zeros((height, width), np.uint8)
    rows, columns = optional("skimage.draw", "train").polygon(
        np.rint(y), np.rint(x), (height, width)
    )
    mask[rows, columns] = LV
    return mask


def _video(path: Path, row: dict[str, str], tracings: dict[int, Tracing], view: str) -> Record:
    fps, ef = row.get("FPS"), row.get("EF")
    clip = open_record(path)
    return replace(
        clip,
        fps=_number(path, "FPS", fps) if fps else clip.fps,
        ef=_number(path, "EF", ef) if ef else None,
        view=view,
        patient=path.stem,
    )


def _ends(path: Path, clip: Record, tracings: dict[int, Tracing]) -> list[int]:
    """First and last traced frame in the file's order: ES and ED, by the release's custom."""
    frames = list(tracings)
    ends = [frames[0], frames[-1]]
    if not 0 <= min(ends) < max(ends) < len(clip.frames):
        raise FileError(f"{path}: traced frames {ends} of {len(clip.frames)}; wanted two inside")
    return ends


def _window(path: Path, row: dict[str, str], tracings: dict[int, Tracing], view: str) -> Record:
    clip = _video(path, row, tracings, view)
    ends = _ends(path, clip, tracings)
    return clip.window(min(ends), max(ends) + 1)


def _traced(path: Path, row: dict[str, str], tracings: dict[int, Tracing], view: str) -> Record:
    """[ED, ES]: the larger cavity first, whatever the order of rows and of time."""
    clip = _video(path, row, tracings, view)
    ends = _ends(path, clip, tracings)
    masks = {t: lv_mask(tracings[t], *clip.frames.shape[1:]) for t in ends}
    ed, es = sorted(ends, key=lambda t: -int(masks[t].sum()))
    if not masks[es].any():
        raise FileError(f"{path}: the tracing of frame {es} encloses nothing; wanted a ventricle")
    return replace(
        clip,
        frames=clip.frames[[ed, es]],
        labels=np.stack([masks[ed], masks[es]]),
        fps=clip.fps / abs(ed - es),
        source=f"{path.name} frames {ed}, {es}",
    )


_READERS = {"windows": _window, "traced": _traced, "videos": _video}


def _root(folder: Path, view: str) -> Path:
    for base in (folder / view, folder):
        if (base / "FileList.csv").is_file():
            return base
    raise DatasetError(f"{folder}: no FileList.csv in it or in {view}; wanted an EchoNet release")


def _listing(root: Path) -> _Listing:
    path = readable(root / "FileList.csv")
    listing, odd = _Listing({}, {}), {"rows without a file name": 0, "repeated rows": 0}
    for _, row in _rows(path, ["FileName", "EF", "Split"]):
        name = (row["FileName"] or "").strip().removesuffix(".avi")  # occurs with and without
        if not name:
            odd["rows without a file name"] += 1
        elif name in listing.rows:
            odd["repeated rows"] += 1
        else:
            listing.rows[name] = {key: (value or "").strip() for key, value in row.items() if key}
    path = root / "VolumeTracings.csv"
    points: dict[str, dict[int, list[list[float]]]] = {}
    for line, row in _rows(readable(path), TRACING_HEADER) if path.is_file() else ():
        if not any(row.values()):
            continue
        try:
            numbers = [float(row[key] or "") for key in TRACING_HEADER[1:]]
            frame = int(numbers.pop())
            if not np.isfinite(numbers).all():
                raise ValueError
        except (ValueError, OverflowError) as error:
            raise FileError(f"{path}: line {line} is {row}; wanted finite numbers") from error
        name = (row["FileName"] or "").strip().removesuffix(".avi")
        points.setdefault(name, {}).setdefault(frame, []).append(numbers)
    # fewer than 3 chords enclose nothing
    listing.tracings = {
        name: {frame: np.array(rows) for frame, rows in frames.items() if len(rows) > 3}
        for name, frames in points.items()
    }
    listing.odd = odd
    return listing


def _rows(path: Path, wanted: list[str]) -> Iterable[tuple[int, dict[str, str | None]]]:
    """Line number and fields of a table, after a look at its header."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in wanted if name not in (reader.fieldnames or ())]
            if missing:
                raise FileError(f"{path}: no column {', '.join(missing)}; wanted the release's CSV")
            for row in reader:
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise FileError(f"{path}: not readable as CSV ({error})") from error


def _lists(rows: dict[str, dict[str, str]]) -> tuple[dict[str, list[str]], str]:
    lists: dict[str, list[str]] = {split: [] for split in SPLITS}
    folds = bool(rows) and all(row["Split"] in PEDIATRIC for row in rows.values())
    names = PEDIATRIC if folds else OFFICIAL
    for name, row in rows.items():
        split = names.get(row["Split"].upper())
        if split is None:
            raise DatasetError(
                f"FileList.csv: Split {row['Split']!r} of {name}; wanted TRAIN, VAL, TEST or 0 to 9"
            )
        lists[split].append(name)
    return lists, "folds 0-7, 8, 9" if folds else "official"


def _number(path: Path, column: str, text: str) -> float:
    with suppress(ValueError):
        if isfinite(number := float(text)):
            return number
    raise FileError(f"{path}: {column} is {text!r} in FileList.csv; wanted a number")
