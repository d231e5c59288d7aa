"""Conditions extracted once per clip, found again by what they were made of.

The key hashes all that extraction reads: the clip, its labels, spacing, exact skeleton and flow,
and the code itself, so that a changed extractor never serves yesterday's arrays.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast import extract
from heartbeat_fast import record as record_module
from heartbeat_fast.errors import FileError
from heartbeat_fast.files import atomic, readable
from heartbeat_fast.formats.limits import reading
from heartbeat_fast.record import Record
from heartbeat_training import clips

Arrays = dict[str, NDArray[Any]]


def cached_conditions(record: Record, folder: str | Path) -> Arrays:
    """A square record's arrays as `heartbeat_training.clips` stores them, extracted at most once.

    Args:
        record: standardised, (F,H,H).
        folder: of the cache; entries are `ab/abcd….npz`, whole or absent. Delete it at will.

    Returns:
        frames, labels, skeleton (F,H,W) uint8; flow (F,2,H/4,W/4) float16; sketch (H,W) uint8.

    Raises:
        RecordError: the frames are not square.
        FileError: the folder cannot be written.
    """
    key = condition_key(record)
    path = Path(folder) / key[:2] / f"{key}.npz"
    if path.is_file():
        try:
            return _load(path)
        except FileError:
            path.unlink(missing_ok=True)  # a damaged entry is only a lost saving
    arrays = clips.arrays_of(record)
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
    return arrays


def condition_key(record: Record) -> str:
    """Hex digest of everything the arrays depend on."""
    digest = hashlib.sha256(_code().encode())
    digest.update(repr((record.spacing_mm, clips.FLOW_STRIDE)).encode())
    for array in (record.frames, record.labels, record.skeleton, record.flow):
        if array is None:
            digest.update(b"none")
            continue
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@cache
def _code() -> str:
    """Digest of the modules that make conditions: the extraction's version."""
    digest = hashlib.sha256()
    for module in (extract, record_module, clips):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def _load(path: Path) -> Arrays:
    with reading(readable(path), "conditions"), np.load(path, allow_pickle=False) as entry:
        arrays = dict(entry)
    if set(arrays) != {"frames", "labels", "skeleton", "flow", "sketch"}:
        raise FileError(f"{path}: holds {', '.join(arrays) or 'nothing'}; delete it")
    return arrays
