"""The machine that engines run on: processor, threads, graphics card."""

import math
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

# What an engine can gain from: half precision and integer dot products.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
ARM_FLAGS = ("asimddp", "bf16", "i8mm", "sve")


def threads() -> int:
    """OMP_NUM_THREADS where set, else the processors this process may use."""
    if (wanted := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(wanted) > 0:
        return int(wanted)
    return min(_processors(), _quota())


def is_whole() -> bool:
    """Whether this process may use every processor there is, and nobody set a number."""
    return not os.environ.get("OMP_NUM_THREADS") and threads() == os.cpu_count()


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota() -> int:
    """Processors' worth of time a Linux container is allowed, which affinity does not show."""
    try:
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, math.ceil(int(allowed) / int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return _processors()


def processor() -> dict[str, Any]:
    """Name and the flags above; Linux tells both, elsewhere the name alone."""
    facts: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    name = facts.get("model name") or platform.processor() or platform.machine()
    arm = ARM_FLAGS if platform.machine() in ("aarch64", "arm64") else ()
    return {
        "name": name,
        "machine": platform.machine(),
        "flags": [flag for flag in (*FLAGS, *arm) if flag in flags],
        "bits": 64 if sys.maxsize > 2**32 else 32,
    }


def has_nvidia() -> bool:
    """Whether an NVIDIA driver is installed; needs none of its libraries."""
    return Path("/proc/driver/nvidia/version").is_file() or bool(shutil.which("nvidia-smi"))
