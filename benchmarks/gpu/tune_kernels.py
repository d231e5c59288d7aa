"""Untuned figures, a search over launch parameters, the table it finds, and the figures with it.

Every candidate must first be right: one whose result is off by more than bfloat16 rounds is no
candidate. The table keeps the default's float32 entries, which nobody runs for speed.
"""

import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from heartbeat_benchmarks import kernels
from heartbeat_kernels import dual_cross_attention as cross
from heartbeat_kernels import reference, tuning
from heartbeat_kernels import temporal_attention as temporal
from heartbeat_kernels import temporal_block as block
from heartbeat_kernels.reference import TemporalLayer
from heartbeat_kernels.tuning import Launch

OUT = Path(os.environ.get("OUT", "out/gpu"))
SECONDS = 300  # of search; what is not reached keeps the default
Launcher = Callable[[Launch], None]


def searches() -> Iterator[tuple[str, str, list[Launch], torch.Tensor, Launcher, torch.Tensor]]:
    """Operation, table key, candidates, output, how to launch into it, and what should come."""

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def launches(tiles: tuple[int, ...]) -> list[Launch]:
        return [Launch(t, w, s) for t in tiles for w in (2, 4, 8) for s in (1, 2, 3)]

    for c, heads, n in kernels.LEVELS[:3]:
        q, k, v = half(1, 16, n, 3 * c).split(c, dim=-1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        wanted = reference.temporal_attention(q, k, v, heads)
        launch = partial(temporal.forward, q, k, v, out, heads)
        key = f"{c // heads}x2"
        yield "temporal_attention", key, launches((1, 2, 4, 8, 16)), out, launch, wanted
        text, image = ((half(1, 16 * n, c), half(1, t, c), half(1, t, c)) for t in (77, 64))
        out = torch.empty_like(text[0])
        wanted = reference.dual_cross_attention(text, image, heads)
        launch = partial(cross.forward, text, image, out, heads, 1.0)
        yield "dual_cross_attention", key, launches((32, 64, 128)), out, launch, wanted
    for c, heads, n in ((64, 4, 256), *kernels.NARROW, (256, 8, 1024)):
        shapes = ((c,), (c,), (16, c), (3 * c, c), (c, c), (c,))
        layer = TemporalLayer(*(half(*s) * c**-0.5 for s in shapes))
        x = half(1, 16, n, c)
        out = torch.empty_like(x)
        wanted = reference.temporal_block(x, layer, heads)
        launch = partial(block.forward, x, layer, out, heads)
        yield "temporal_block", f"{c}x2", launches((1, 2, 4, 8)), out, launch, wanted


def search(
    candidates: list[Launch], out: torch.Tensor, launch: Launcher, wanted: torch.Tensor, end: float
) -> tuple[Launch | None, float]:
    """The fastest candidate that is right, and its microseconds."""
    best: tuple[Launch | None, float] = (None, float("inf"))
    for candidate in candidates:
        if time.monotonic() > end:
            break
        out.fill_(float("nan"))
        try:
            launch(candidate)
        except Exception as error:  # too much shared memory or too many registers: no candidate
            print(f"  {candidate}: {type(error).__name__}")
            continue
        if not (out.float() - wanted).abs().max() <= 0.03 * wanted.abs().max():
            print(f"  {candidate}: wrong")
            continue
        us = kernels.median_us(partial(launch, candidate))
        if us < best[1]:
            best = candidate, us
    return best


def tuned(end: float) -> dict[str, Any]:
    """The default table with what this GPU does best."""
    found = copy.deepcopy(tuning.table(""))
    gpu = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    found |= {"gpu": gpu, "status": f"measured {time.strftime('%Y-%m-%d')}, {versions}"}
    found["why"] = "fastest of a search at base's and tiny's shapes; float32 entries are defaults"
    for op, key, candidates, out, launch, wanted in searches():
        best, us = search(candidates, out, launch, wanted, end)
        print(f"{op:22} {key:7} {best} {us:.1f} µs", flush=True)
        if best is not None:
            entry = {"tile": best.tile, "warps": best.warps, "stages": best.stages}
            found["operations"][op][key] = entry
    return found


def main() -> None:
    """Untuned run, search, tuned run; the last lines are the table to read."""
    OUT.mkdir(parents=True, exist_ok=True)
    before = kernels.run()
    (OUT / "kernels-untuned.json").write_text(json.dumps(before, indent=1))
    table = tuned(time.monotonic() + SECONDS)
    path = OUT / f"{tuning.slug(table['gpu'])}.json"
    path.write_text(json.dumps(table, indent=1) + "\n")
    tuning.FOLDER, default = OUT, tuning.FOLDER
    (OUT / "default.json").write_text((default / "default.json").read_text())
    tuning.table.cache_clear()
    torch.compiler.reset()
    after = kernels.run(say=lambda line: None)
    (OUT / "kernels-tuned.json").write_text(json.dumps(after, indent=1))
    print(f"\n{after['gpu']}: copies at {after['copy_bytes_per_s'] / 1e12:.2f} TB/s; tuned:")
    for row in after["rows"]:
        print(kernels.line(row))
    print(f"tuning table: {path}")


if __name__ == "__main__":
    main()
