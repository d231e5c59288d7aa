"""The C++ host's clip beside Python's: same bundle, conditions and seed.

    python examples/cpp/compare.py build/heartbeat_host --bundle tiny --preview beside.png

Writes each condition as .npy, runs both, prints the PSNR, and exits with 1 below 40 dB.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from heartbeat_fast import Conditions, Generator
from heartbeat_fast.inputs import gather, open_source

LEAST = 40.0  # dB; rounding of the texture noise leaves 55 and more


def library() -> Path:
    """The libonnxruntime that came with the Python package."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    return next(path for path in folder.glob("libonnxruntime.*") if "providers" not in path.name)


def options_of(conditions: Conditions, folder: Path) -> list[str]:
    """The host's options for these conditions; arrays become files in `folder`."""
    out: list[str] = []
    for name in conditions.present:
        value = getattr(conditions, name)
        if isinstance(value, np.ndarray):
            np.save(folder / f"{name}.npy", value)
            value = folder / f"{name}.npy"
        out += [f"--{name}", str(value)]
    return out


def run_host(
    host: Path, bundle: Path, conditions: Conditions, folder: Path, **options: Any
) -> NDArray[np.uint8]:
    """Frames (F,H,W) from the host; options: seed, steps, sampler, threads, noise_out, …"""
    out = folder / "clip.npy"
    command = [str(host), "--bundle", str(bundle), "--runtime", str(library()), "--out", str(out)]
    for key, value in options.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    subprocess.run([*command, *options_of(conditions, folder)], check=True)
    frames: NDArray[np.uint8] = np.load(out)
    return frames


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Decibels between two clips; infinite where they are equal."""
    error = float(((a.astype(np.float64) - b) ** 2).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", type=Path)
    parser.add_argument("--bundle", help="folder or name (default: the embedded one)")
    parser.add_argument("--from", dest="source", default="phantom:7", help="as heartbeat sample's")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--preview", type=Path, help="a PNG: first, middle, last frame of both")
    options = parser.parse_args()
    generator = Generator.open(options.bundle, engine="onnxruntime")
    manifest = generator.bundle.manifest
    record = open_source(options.source, None, manifest.frames, manifest.size)
    conditions = gather({}, record, None, manifest.frames, manifest.size)
    with tempfile.TemporaryDirectory() as folder:
        came = run_host(
            options.host,
            generator.bundle.path,
            conditions,
            Path(folder),
            steps=options.steps,
            seed=options.seed,
        )
    wanted = generator(conditions, steps=options.steps, seed=options.seed).frames
    decibels = psnr(came, wanted)
    print(f"{decibels:.1f} dB; {(came == wanted).mean():.4%} of pixels equal")
    if options.preview:
        shown = [0, manifest.frames // 2, manifest.frames - 1]
        rows = [np.concatenate(list(clip[shown]), 1) for clip in (wanted, came)]
        Image.fromarray(np.concatenate(rows)).save(options.preview)
    return 0 if decibels >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
