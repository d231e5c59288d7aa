"""Published weights of other people's networks: state dicts, read without running their pickles."""

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from heartbeat_fast.errors import FileError
from heartbeat_fast.files import readable


def load(file: Path) -> dict[str, Tensor]:
    """A published .pth state dict by names, tensors on the CPU.

    Raises: FileError when the file is missing, too large, or holds more than tensors.
    """
    try:
        state = torch.load(readable(file), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        reason = str(error).splitlines()[0]
        raise FileError(f"{file}: not a plain state dict ({reason}); fetch it anew") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise FileError(f"{file}: holds more than named tensors; wanted a state dict")
    return state


def read_state(
    network: nn.Module,
    file: Path,
    drop: tuple[str, ...] = (),
    rename: Callable[[str], str] = lambda name: name,
) -> None:
    """Fill a network from a published file; names that start with one of `drop` are not wanted.

    Raises: FileError when tensors are missing, left over or of another shape.
    """
    state = {rename(k): v for k, v in load(file).items() if not k.startswith(drop or ("\0",))}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        reason = (lines[1] if len(lines) > 1 else lines[0]).strip()[:200]
        kind = type(network).__name__
        raise FileError(f"{file}: not the weights of {kind} ({reason})") from error
