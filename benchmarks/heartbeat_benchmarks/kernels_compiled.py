"""Every kernel compiled ahead of time, for GPUs that are not here: registers, spills, wide loads.

A spill or a two-byte load would cost more than any tuning gains, and both show without a GPU.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from heartbeat_kernels import aot

ARCHITECTURES = (80, 90)
HEAD_DIMS = (32, 40, 64, 80, 160)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = ((64, 4), (128, 4), (192, 6), (256, 8))  # channels and heads of a whole layer


def cases() -> Iterator[tuple[str, Callable[[torch.dtype, int], aot.Compiled]]]:
    """Name and compilation of each kernel and form, at Stable Diffusion's 32×32 latents."""
    for d in HEAD_DIMS:
        clip, queries = (1, 16, 1024, 8 * d), (1, 16 * 1024, 8 * d)
        yield f"temporal_attention/{d}", partial(aot.temporal_attention, clip, 8)
        yield (
            f"temporal_attention_backward/{d}",
            partial(aot.temporal_attention, clip, 8, backward=True),
        )
        cross = partial(aot.dual_cross_attention, queries)
        yield f"dual_cross_attention/{d}", partial(cross, (77, 64), 8)
        yield f"dual_cross_attention-shared/{d}", partial(cross, (77, 256), 8, shared=True)
        yield f"dual_cross_attention-text/{d}", partial(cross, (77, 0), 8)
    for c, heads in WIDTHS:
        yield f"temporal_block/{c}", partial(aot.temporal_block, (1, 16, 256, c), heads)
    images = (16, 320, 32, 32)
    for name, last in (("nhwc", True), ("nchw", False)):
        yield (
            f"groupnorm_silu-{name}/320",
            partial(aot.groupnorm_silu, images, 32, channels_last=last, affine=True),
        )
    yield "geglu/1280", partial(aot.geglu, 16 * 1024, 1280)


def compile_case(
    name: str, make: Callable[[torch.dtype, int], aot.Compiled], dtype: torch.dtype, sm: int
) -> dict[str, Any]:
    """One row: what the compiler and the assembler say of a kernel."""
    start = time.perf_counter()
    made = make(dtype, sm)
    loads, wide_loads = made.count("ld.global")
    stores, wide_stores = made.count("st.global")
    return {
        "case": name,
        "dtype": str(dtype).removeprefix("torch."),
        "architecture": made.architecture,
        "registers": made.registers,
        "spilt_bytes": made.spills,
        "shared_bytes": made.shared,
        "threads": made.block,
        "loads": loads,
        "loads_16_bytes": wide_loads,
        "stores": stores,
        "stores_16_bytes": wide_stores,
        "seconds": round(time.perf_counter() - start, 2),
    }


def run(
    say: Callable[[str], None] = print, only: str = "", workers: int | None = None
) -> dict[str, Any]:
    """Compiles every case (whose name holds `only`) × dtype × architecture; one result.

    workers: processes, None for one per core; the whole matrix takes seven minutes of one core.
    """
    names = [name for name, _ in cases() if only in name]
    jobs = [(name, dtype, sm) for name in names for dtype in DTYPES for sm in ARCHITECTURES]
    rows = []
    with ProcessPoolExecutor(workers or os.cpu_count(), get_context("spawn")) as pool:
        for row in pool.map(_job, *zip(*jobs, strict=True)):
            rows.append(row)
            say(
                f"{row['case']:34} {row['dtype']:9} {row['architecture']:6}"
                f" {row['registers']:4} registers {row['spilt_bytes']:5} B spilt"
                f" {row['loads_16_bytes']:3}/{row['loads']} wide loads"
            )
    return {"gpu": "none: compiled, not run", "rows": rows}


def _job(name: str, dtype: torch.dtype, sm: int) -> dict[str, Any]:
    """One row, in a process of its own: cases are found by name."""
    return compile_case(name, dict(cases())[name], dtype, sm)
