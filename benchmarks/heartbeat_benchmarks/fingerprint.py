"""What a figure was measured on: machine, software, source, bundle. No figure goes without it."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from heartbeat_fast.bundle import Bundle

PACKAGES = (
    "heartbeat_fast",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "opencv-python-headless",
)
# The instruction sets that decide how fast matrices multiply.
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
FLAGS_ARM = ("asimd", "asimddp", "bf16", "i8mm", "sve")


def fingerprint(bundle: Bundle | None = None) -> dict[str, Any]:
    """Machine, software, source revision and, where one is used, the bundle. JSON values only."""
    found = {
        "machine": machine(),
        "software": {"python": platform.python_version(), **_versions()},
        "source": source(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    return found | ({"bundle": bundle.manifest.identity()} if bundle else {})


def machine() -> dict[str, Any]:
    """Processor, its matrix instructions, cores this process may use, memory, load, GPU."""
    info = _cpuinfo()
    known = info.get("flags", info.get("Features", "")).split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in (*FLAGS, *FLAGS_ARM) if flag in known],
        "cores": cores,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
        "memory_gb": _memory_gb(),
        "os": platform.platform(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": _run("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"),
    }


def source() -> dict[str, Any]:
    """Git commit of this source and whether files were changed since; empty outside git."""
    here = str(Path(__file__).parent)
    commit = _run("git", "-C", here, "rev-parse", "HEAD")
    dirty = _run("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(dirty)}


def _versions() -> dict[str, str]:
    """Versions of what is installed, without importing any of it."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _memory_gb() -> float | None:
    if not hasattr(os, "sysconf"):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _run(*command: str) -> str:
    """A command's output, or "" where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
