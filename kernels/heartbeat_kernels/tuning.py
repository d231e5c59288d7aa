"""Launch parameters from reviewable tables: tuning/MODEL.json of a GPU model, else default.json.

A table names its GPU, says how it came about ("untuned, predicted", or measured where and when) and
lists per operation and "WIDTHxBYTES" (head dimension, or channels where an operation has no heads;
bytes of the dtype) the tile, warps and pipeline stages. An unlisted width takes the next wider
entry's.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from heartbeat_kernels.checks import KernelError

FOLDER = Path(__file__).with_name("tuning")
OPERATIONS = (
    "temporal_attention",
    "temporal_attention_backward",
    "temporal_block",
    "dual_cross_attention",
    "groupnorm_silu",
    "geglu",
)


@dataclass(frozen=True)
class Launch:
    """tile: positions, queries or rows of a program; warps and stages as Triton means them."""

    tile: int
    warps: int
    stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """Triton's names for what is no argument of the kernel."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def slug(gpu: str) -> str:
    """A table's file name for a GPU: "NVIDIA H100 80GB HBM3" to nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


@cache
def table(gpu: str) -> dict[str, Any]:
    """The table of a GPU model, or the default one.

    Raises:
        KernelError: the file is no tuning table.
    """
    path = FOLDER / f"{slug(gpu)}.json"
    return read(path if gpu and path.is_file() else FOLDER / "default.json")


def read(path: Path) -> dict[str, Any]:
    """A table, checked. Raises: KernelError naming the file and the entry that is wrong."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise KernelError(f"{path}: not JSON ({error})") from error
    for op in OPERATIONS:
        entries = found.get("operations", {}).get(op)
        if not isinstance(entries, dict) or not entries:
            raise KernelError(f"{path}: no entries for {op}")
        for key, entry in entries.items():
            powers = [entry.get(name) for name in ("tile", "warps")]
            sane = all(isinstance(p, int) and 0 < p <= 1024 and p & (p - 1) == 0 for p in powers)
            if not re.fullmatch(r"\d+x[24]", key) or not sane or not 0 < entry["stages"] < 9:
                raise KernelError(f"{path}: {op} {key}: {entry}; wanted powers of two")
    if not isinstance(found.get("fused_channels"), int) or not isinstance(found.get("gpu"), str):
        raise KernelError(f"{path}: wanted gpu and fused_channels")
    return found


def launch_for(op: str, width: int, dtype: torch.dtype, gpu: str = "") -> Launch:
    """Launch parameters of an operation at a width. Raises: KernelError, no entry for the dtype."""
    entries = table(gpu)["operations"][op]
    listed = sorted(int(k.split("x")[0]) for k in entries if k.endswith(f"x{dtype.itemsize}"))
    if not listed:
        raise KernelError(f"{op}: no launch parameters for {dtype} in the table of {gpu or 'any'}")
    nearest = next((w for w in listed if w >= width), listed[-1])
    entry = entries[f"{nearest}x{dtype.itemsize}"]
    return Launch(entry["tile"], entry["warps"], entry["stages"])


def gpu_of(device: torch.device) -> str:
    """The GPU model behind a device, or "" for a CPU, where kernels are interpreted."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
