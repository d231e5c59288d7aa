"""Checkpoints that survive a kill: written whole, synced, hashed, renamed, and only then named.

    step-00001200/tensors.safetensors   parameters, their averages, optimizer moments, statistics
    step-00001200/manifest.json         step, stage, recipe, bytes and SHA-256 of every other file
    LATEST                              the name of the newest folder, replaced last

No random state is stored: every step's randomness is derived from (seed, step), so a resumed run
repeats the run that was not interrupted.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from heartbeat_fast.errors import FileError, HeartBeatError
from heartbeat_fast.files import atomic

KEEP = 2  # newest checkpoints kept: one may be found broken
TENSORS, MANIFEST, LATEST = "tensors.safetensors", "manifest.json", "LATEST"
LARGEST_MANIFEST = 2**20  # bytes


class CheckpointError(HeartBeatError):
    """A checkpoint cannot be written or read, or belongs to another stage or recipe."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose hashes held when it was found."""

    folder: Path
    step: int
    manifest: dict[str, Any]

    @property
    def tensors(self) -> Path:
        """Its safetensors file."""
        return self.folder / TENSORS


def save(run: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Write a checkpoint and point LATEST at it; then drop all but the newest KEEP.

    Raises: CheckpointError when it cannot be written (a full disk); older ones are then untouched.
    """
    target = run / f"step-{step:08d}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".writing-", dir=run))
        try:
            _write(work, step, tensors, meta)
            if target.exists():  # found broken, or saved just before a stop: out of the way first
                target.rename(work.with_name(f"{work.name}-replaced"))
            work.rename(target)
            _sync(run)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(work.with_name(f"{work.name}-replaced"), ignore_errors=True)
        with atomic(run / LATEST) as temporary:
            temporary.write_text(target.name + "\n")
        _sync(run)
    except (OSError, SafetensorError, FileError) as error:
        raise CheckpointError(f"{target}: cannot be saved ({error}); free some space") from error
    # A folder of a later step is one that resuming found broken, or left for LATEST.
    kept = [f for f in _folders(run) if f.name <= target.name][:KEEP]
    for old in set(_folders(run)) - set(kept):
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest(run: Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The checkpoint that LATEST names, else the newest whose hashes hold; None: there is none.

    Every one passed over is said aloud.

    Raises: CheckpointError when there are checkpoints and none of them can be read.
    """
    folders = _folders(run)
    try:
        with (run / LATEST).open() as file:
            named = run / file.read(64).strip()
    except (OSError, ValueError):
        named = None
    if named in folders:
        folders.remove(named)
        folders.insert(0, named)
    for folder in folders:
        try:
            return _checked(folder)
        except CheckpointError as error:
            say(f"{error}; trying the one before")
    if folders:
        raise CheckpointError(
            f"{run}: none of {len(folders)} checkpoints is whole; move it away to start anew"
        )
    return None


def sweep(run: Path) -> None:
    """Remove what a killed save left behind; only while no other process writes to `run`."""
    for left in run.glob(".writing-*"):
        shutil.rmtree(left, ignore_errors=True)


def _write(work: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """The files of a checkpoint, and the folder that lists them, down to the disk."""
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, work / TENSORS)
    _sync(work / TENSORS)
    files = {TENSORS: {"bytes": (work / TENSORS).stat().st_size, "sha256": _digest(work / TENSORS)}}
    manifest = json.dumps({"step": step, "files": files, **meta}, indent=1)
    (work / MANIFEST).write_text(manifest, "utf-8")
    _sync(work / MANIFEST)
    _sync(work)


def _checked(folder: Path) -> Checkpoint:
    """A folder, read and hashed.

    Raises: CheckpointError naming what is wrong with it.
    """
    try:
        with (folder / MANIFEST).open("rb") as file:
            manifest = json.loads(file.read(LARGEST_MANIFEST))
        # The first format hashed its one file without naming it.
        files = manifest.get("files") or {TENSORS: {"sha256": manifest["sha256"]}}
        if TENSORS not in files:
            raise CheckpointError(f"{folder}: {MANIFEST} lists no {TENSORS}")
        for name, wanted in files.items():
            if Path(name).name != name:
                raise CheckpointError(f"{folder}: {MANIFEST} names {name!r}, outside the folder")
            if _digest(folder / name) != wanted["sha256"]:
                raise CheckpointError(f"{folder}: {name} is damaged (its SHA-256 differs)")
        return Checkpoint(folder, int(manifest["step"]), manifest)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error


def _folders(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = (path for path in run.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return sorted(found, reverse=True)


def _sync(path: Path) -> None:
    """fsync of a file, or of a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
