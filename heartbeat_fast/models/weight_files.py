"""Tensors from files of others: safetensors, or torch's own format as long as no code is run.

A torch file is a pickle, and a pickle can be a program. What is published in that form only (the
`.pth` of MedSAM) is read by torch's restricted reader, which knows tensors and plain containers;
everything else is refused with the way out.
"""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heartbeat_fast.errors import HeartBeatError

TORCH_FILES = (".pth", ".pt", ".bin")
WRAPPERS = ("model", "state_dict")  # under which training scripts put the weights
CONVERT = (
    "convert it where you trust it, with safetensors.torch.save_file(state, 'x.safetensors') "
    "(docs/weights.md)"
)


class CheckpointError(HeartBeatError):
    """A weight file is missing, unreadable, or does not fit; lists every tensor at fault."""


class Unfilled(TorchFunctionMode):
    """Leaves the parameters of modules that are made under it as memory comes: for those that a
    file's take the place of. Drawing `base`'s and touching their memory took 10 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {**(kwargs or {})}
        tensor = args[0] if args else given.get("tensor")
        fills = func in _FILLS or getattr(func, "__module__", "") == nn.init.__name__
        if fills and isinstance(tensor, nn.Parameter):
            return tensor
        return func(*args, **given)


_FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: missing, truncated, or another format.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: wanted a .safetensors file; other formats can hold code: {CONVERT}"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def read_any(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, by its suffix.

    Raises:
        CheckpointError: missing, damaged, another format, or a pickle that would run code.
    """
    return read_torch(path) if path.suffix in TORCH_FILES else read(path)


def read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file (a zip archive, torch ≥ 1.6), read without running code.

    The weights may lie under "model" or "state_dict", as training scripts leave them.

    Raises:
        CheckpointError: missing, damaged, of the old format, holding anything but tensors, or not
            readable by torch's restricted reader.
    """
    stored = _stored_bytes(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        why = str(error).split("\n", 1)[0]
        raise CheckpointError(
            f"{path}: cannot be read without running code from it ({why}); {CONVERT}"
        ) from error
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not _is_state(content):
        raise CheckpointError(f"{path}: wanted a mapping from names to tensors; {CONVERT}")
    # A storage takes its size from the pickle: larger than its bytes, it would read foreign memory.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in content.values()}
    if sum(s.nbytes() for s in storages.values()) > stored:
        raise CheckpointError(f"{path}: announces more numbers than it holds; fetch it again")
    return dict(content)


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _stored_bytes(path: Path) -> int:
    """Size of what a torch archive holds, checked before any of it is allocated."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            f"{path}: no whole torch archive ({error}), a file of torch < 1.6 or cut short; "
            f"{CONVERT}"
        ) from error
    # torch stores without compression; what unpacks to more than the file is not torch's.
    size = sum(entry.file_size for entry in entries)
    if size > path.stat().st_size:
        raise CheckpointError(
            f"{path}: unpacks to {size} bytes, more than the file; fetch it again"
        )
    return size


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of sane size.

    Raises:
        CheckpointError: missing, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > 2**20:
            raise CheckpointError(f"{path}: larger than a configuration can be")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: missing or not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: wanted a JSON object")
    return content
