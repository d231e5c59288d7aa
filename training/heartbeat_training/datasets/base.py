"""What all data sets share: clips listed at opening, read lazily, split by patient, no leaks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from heartbeat_fast.errors import FileError, HeartBeatError, MissingDependency
from heartbeat_fast.record import Record

if TYPE_CHECKING:
    from heartbeat_training.datasets.check import Report

SPLITS = ("train", "validation", "test")


class DatasetError(HeartBeatError):
    """A data set's folder, lists or options do not fit its layout."""


class LeakError(DatasetError):
    """A patient stands in two splits."""


class Dataset(Protocol):
    """Clips of one release on disk. Nothing is read at opening but lists and file names."""

    @property
    def name(self) -> str:
        """Layout and kind of clip, for tables."""

    @property
    def split_source(self) -> str:
        """Who made the split: part of every result that rests on it."""

    def splits(self) -> dict[str, list[str]]:
        """Patient ids by "train", "validation", "test"; only those with clips here."""

    def records(self, split: str | Iterable[str]) -> Iterator[Record]:
        """Clips of a split, or of the patients given, one at a time, at native size."""

    def check(self) -> "Report":
        """Reads everything and says what is there and what is odd."""


@dataclass(frozen=True)
class Entry:
    """One clip of a data set: `name` is what messages call it, `read` opens it."""

    name: str
    patient: str
    read: Callable[[], Record]

    def open(self) -> Record:
        """The clip.

        Raises:
            FileError: its files are unreadable or contradict each other.
        """
        try:
            return self.read()
        except (FileError, MissingDependency):
            raise
        except HeartBeatError as error:
            raise FileError(f"{self.name}: {error}") from error


class ListedDataset:
    """A `Dataset` from its clips and its lists of patients.

    Args:
        name: as in `Dataset`.
        entries: all clips, in a stable order.
        lists: patient ids by split, as the release or the user gives them; {} for none.
        split_source: as in `Dataset`.
        notes: what was counted but is not wrong, for `check`: {"unlabelled cases": 25}.
    """

    def __init__(
        self,
        name: str,
        entries: list[Entry],
        lists: Mapping[str, Iterable[str]],
        split_source: str,
        notes: Mapping[str, int] | None = None,
    ) -> None:
        self.name = name
        self.split_source = split_source
        self.entries = entries
        self.lists = {split: list(patients) for split, patients in lists.items()}
        self.notes = dict(notes or {})
        unknown = set(self.lists) - set(SPLITS)
        if unknown:
            raise DatasetError(f"splits: {sorted(unknown)} came; wanted {', '.join(SPLITS)}")

    def splits(self) -> dict[str, list[str]]:
        """Patient ids by split; listed patients without clips here are left out.

        Raises:
            LeakError: a patient stands in two splits.
            DatasetError: there are no lists.
        """
        self._refuse_leaks()
        if not self.lists:
            raise DatasetError(f"{self.name}: no list of splits; give splits={{'train': [...]}}")
        here = {entry.patient for entry in self.entries}
        return {
            split: [
                patient for patient in dict.fromkeys(self.lists.get(split, ())) if patient in here
            ]
            for split in SPLITS
        }

    def records(self, split: str | Iterable[str]) -> Iterator[Record]:
        """Clips of a split, or of the patients given, at native size, read one at a time.

        Raises:
            LeakError: as `splits`, whatever is asked for.
            DatasetError: the split or a patient is unknown.
            FileError: a clip is unreadable, by name.
        """
        self._refuse_leaks()
        if isinstance(split, str):
            if split not in SPLITS:
                raise DatasetError(f"split: {split!r} came; wanted one of {', '.join(SPLITS)}")
            patients = self.splits()[split]
        else:
            patients = list(split)
        clips: dict[str, list[Entry]] = {}
        for entry in self.entries:
            clips.setdefault(entry.patient, []).append(entry)
        unknown = [patient for patient in patients if patient not in clips]
        if unknown:
            raise DatasetError(
                f"{self.name}: no clip of patient {unknown[0]!r} (of {len(unknown)})"
            )
        return (entry.open() for patient in patients for entry in clips[patient])

    def check(self) -> "Report":
        """Reads every clip; see `heartbeat_training.datasets.check`."""
        from heartbeat_training.datasets.check import check

        return check(self)

    def _refuse_leaks(self) -> None:
        found = leaks(self.lists)
        if found:
            patient, splits = next(iter(found.items()))
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise LeakError(f"{self.name}: patient {patient} is in {' and '.join(splits)}{more}")


def leaks(lists: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Patients that stand in more than one split, with those splits."""
    places: dict[str, list[str]] = {}
    for split, patients in lists.items():
        for patient in set(patients):
            places.setdefault(patient, []).append(split)
    return {patient: splits for patient, splits in sorted(places.items()) if len(splits) > 1}
