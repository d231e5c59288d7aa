"""Checkpoints that survive a kill: written whole, hashed, then named; the newest good one is used.

A checkpoint is a folder `step-00001200/` with tensors.safetensors (parameters, EMA, optimizer
moments) and manifest.json (step, recipe, hash). No random state is stored: every step's randomness
is derived from (seed, step), so a resumed run repeats the run that was not interrupted.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from heartbeat_fast.errors import HeartBeatError

KEEP = 2  # newest checkpoints kept: one may be found broken


class CheckpointError(HeartBeatError):
    """A run folder holds no readable checkpoint, or one of another recipe."""


def save(run: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Write a checkpoint atomically: temporary folder, fsync, rename, then drop the oldest.

    Raises: OSError when the disk is full; older checkpoints are then untouched.
    """
    run.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".writing-", dir=run))
    try:
        file = work / "tensors.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)
        manifest = {"step": step, "sha256": _digest(file), **meta}
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for written in (file, work / "manifest.json"):
            with written.open("rb") as handle:
                os.fsync(handle.fileno())
        target = run / f"step-{step:08d}"
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for old in _folders(run)[KEEP:]:
        shutil.rmtree(old)
    return target


def load_latest(run: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """Newest checkpoint whose hash holds: (step, tensors, manifest); None when there is none."""
    for folder in _folders(run):
        file = folder / "tensors.safetensors"
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            if manifest["sha256"] != _digest(file):
                continue
        except (OSError, ValueError, KeyError):
            continue
        return int(manifest["step"]), load_file(file), manifest
    return None


def _folders(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(run.glob("step-*"), reverse=True)


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
