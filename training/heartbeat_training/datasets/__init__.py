"""Readers of the data sets of the field, all as `Record`s: docs/data.md."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from heartbeat_training.datasets import camus, echonet, mnms
from heartbeat_training.datasets.base import (
    Dataset,
    DatasetError,
    LeakError,
    ListedDataset,
)
from heartbeat_training.datasets.camus import CamusDataset
from heartbeat_training.datasets.clips import ClipFolder
from heartbeat_training.datasets.echonet import EchoNetDataset
from heartbeat_training.datasets.mnms import MnmsDataset

__all__ = [
    "LAYOUTS",
    "CamusDataset",
    "ClipFolder",
    "Dataset",
    "DatasetError",
    "EchoNetDataset",
    "LeakError",
    "MnmsDataset",
    "layout_of",
    "open_dataset",
]

LAYOUTS: dict[str, Callable[..., ListedDataset]] = {
    "camus": CamusDataset,
    "echonet": EchoNetDataset,
    "mnms": MnmsDataset,
    "folder": ClipFolder,
}


def open_dataset(folder: str | Path, kind: str | None = None, **options: Any) -> ListedDataset:
    """Opens a release by its layout; reads lists and file names only.

    Args:
        folder: of the release.
        kind: a layout, "camus", "echonet", "mnms" or "folder" (any clips); None to recognise it.
            Any other value is the layout's own `kind`: `open_dataset(folder, kind="stills")`.
        options: of the layout's class: view, splits, fold.

    Raises:
        DatasetError: the folder does not have this layout, or the layout not this option.
    """
    layout = kind if kind in LAYOUTS else layout_of(folder)
    if kind is not None and kind not in LAYOUTS:
        options["kind"] = kind
    known = list(signature(LAYOUTS[layout]).parameters)[1:]
    if unknown := sorted(options.keys() - set(known)):
        raise DatasetError(f"{layout}: no option {unknown[0]!r}; wanted {', '.join(known)}")
    return LAYOUTS[layout](folder, **options)


def layout_of(folder: str | Path) -> str:
    """The layout a folder has: "folder" where it is none of the releases.

    Raises:
        DatasetError: no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; wanted a data set")
    modules = {"camus": camus, "echonet": echonet, "mnms": mnms}
    return next((name for name, m in modules.items() if m.recognises(root)), "folder")
