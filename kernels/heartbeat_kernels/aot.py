"""Kernels compiled ahead of time, on a machine without a GPU, as TensorRT's plugins take them.

TensorRT's ahead-of-time plugin interface wants a kernel's name, its PTX, a grid, a block and shared
memory, and passes inputs, integer scalars, then outputs. What that asks of a Triton kernel, and
where it is kept: every stride, size and float (image scale, epsilon) is a constant of the compiled
kernel, so that no scalar is left to pass; pointers are declared divisible by 16, without which
every access is two bytes wide; and the two pointers that Triton appends for scratch memory are
taken out again, which is sound because these kernels use none. PTX of sm_90 is for sm_90a and runs
on no later architecture: compile one per architecture.
"""

import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from heartbeat_kernels import (
    dual_cross_attention as cross,
)
from heartbeat_kernels import (
    geglu as gate,
)
from heartbeat_kernels import (
    groupnorm_silu as norm,
)
from heartbeat_kernels import (
    temporal_attention as temporal,
)
from heartbeat_kernels import (
    temporal_block as block,
)
from heartbeat_kernels.checks import KernelError
from heartbeat_kernels.tuning import Launch, launch_for

TRITON = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Compiled:
    """A kernel for one shape, dtype and architecture.

    arguments: its pointers in order, inputs before outputs; there are no other arguments. block:
    threads of a program; shared: its bytes of shared memory. registers of a thread and bytes of
    spills are what ptxas reports.
    """

    name: str
    arguments: tuple[str, ...]
    grid: Grid
    block: int
    shared: int
    architecture: str
    registers: int
    spills: int
    ptx: str

    def count(self, access: str) -> tuple[int, int]:
        """How many of the PTX's accesses ("ld.global", "st.global") there are, and how many are 16
        bytes wide: four 32-bit words, two of 64, eight of 16."""
        found = re.findall(rf"{re.escape(access)}(?:\.\w+)*", self.ptx)
        wide = [a for a in found if re.search(r"\.v4\.[buf]32|\.v2\.[buf]64|\.v8\.[buf]16", a)]
        return len(found), len(wide)

    def save(self, folder: Path, stem: str) -> tuple[Path, Path]:
        """Writes folder/STEM.ptx and folder/STEM.json, all but the PTX; returns both paths."""
        folder.mkdir(parents=True, exist_ok=True)
        parameters = {key: value for key, value in asdict(self).items() if key != "ptx"}
        paths = folder / f"{stem}.ptx", folder / f"{stem}.json"
        for path, text in zip(paths, (self.ptx, json.dumps(parameters, indent=1)), strict=True):
            path.write_text(text + "\n")
        return paths


def temporal_attention(
    shape: tuple[int, int, int, int],
    heads: int,
    dtype: torch.dtype,
    sm: int,
    *,
    backward: bool = False,
    launch: Launch | None = None,
) -> Compiled:
    """Attention over frames of contiguous q, k, v (B,F,N,E), or its gradient.

    Args:
        sm: compute capability as two digits: 80, 86, 89, 90.
        launch: in place of the default tuning table's.
    """
    b, f, n, e = shape
    op = "temporal_attention_backward" if backward else "temporal_attention"
    launch = launch or launch_for(op, e // heads, dtype)
    strides = dict.fromkeys("QKVGY" if backward else "QKVY", (f * n * e, n * e, e))
    values = temporal.constants(f, n, heads, e // heads, dtype.itemsize, launch, **strides)
    kernel = temporal.backward_kernel if backward else temporal.forward_kernel
    return build(kernel, values, dtype, sm, temporal.programs(b, n, heads, launch), launch)


def temporal_block(
    shape: tuple[int, int, int, int],
    heads: int,
    dtype: torch.dtype,
    sm: int,
    *,
    position: bool = True,
    eps: float = 1e-5,
    launch: Launch | None = None,
) -> Compiled:
    """A whole temporal layer for contiguous x (B,F,N,C)."""
    b, f, n, c = shape
    launch = launch or launch_for("temporal_block", c, dtype)
    strides = (f * n * c, n * c, c)
    values = block.constants(
        strides, strides, (f, n, c), heads, eps, position, dtype.itemsize, launch
    )
    return build(block.kernel, values, dtype, sm, block.programs(b, n, launch), launch)


def dual_cross_attention(
    shape: tuple[int, int, int],
    tokens: tuple[int, int],
    heads: int,
    dtype: torch.dtype,
    sm: int,
    *,
    shared: bool = False,
    image_scale: float = 1.0,
    launch: Launch | None = None,
) -> Compiled:
    """Cross-attention of contiguous queries (B,L,E).

    Args:
        tokens: text's, image's; no image branch: 0. shared: both branches with one set of queries.
    """
    b, length, e = shape
    t, ti = tokens
    launch = launch or launch_for("dual_cross_attention", e // heads, dtype)
    strides: dict[str, tuple[int, ...]] = dict.fromkeys(("Q", "QI", "Y"), (length * e, e))
    strides |= {"K": (t * e, e), "V": (t * e, e), "KI": (ti * e, e), "VI": (ti * e, e)}
    values = cross.constants(strides, (length, e, t, ti), heads, shared, dtype.itemsize, launch)
    values["scale"] = float(image_scale)
    grid = cross.programs(b, length, heads, launch)
    return build(cross.kernel, values, dtype, sm, grid, launch)


def groupnorm_silu(
    shape: tuple[int, int, int, int],
    groups: int,
    dtype: torch.dtype,
    sm: int,
    *,
    channels_last: bool = True,
    affine: bool = False,
    eps: float = 1e-5,
    launch: Launch | None = None,
) -> Compiled:
    """GroupNorm and SiLU of x (M,C,h,w) in either memory format."""
    m, c, h, w = shape
    launch = launch or launch_for("groupnorm_silu", c, dtype)
    strides = (c * h * w, 1, c) if channels_last else (c * h * w, h * w, 1)
    values = norm.constants(strides, strides, (h * w, c, groups), eps, affine, launch)
    return build(norm.kernel, values, dtype, sm, (m * groups, 1, 1), launch)


def geglu(
    rows: int, e: int, dtype: torch.dtype, sm: int, *, launch: Launch | None = None
) -> Compiled:
    """GEGLU of contiguous (rows,2E)."""
    launch = launch or launch_for("geglu", e, dtype)
    grid = (rows * -(-e // launch.tile), 1, 1)
    return build(gate.kernel, {"E": e, "BE": launch.tile}, dtype, sm, grid, launch)


def build(
    kernel: Any, values: dict[str, Any], dtype: torch.dtype, sm: int, grid: Grid, launch: Launch
) -> Compiled:
    """Compiles a kernel whose every argument but the pointers is among `values`.

    Raises:
        KernelError: an argument is left that is no pointer, Triton interprets, or the kernel wants
            scratch memory.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise KernelError("TRITON_INTERPRET=1: kernels are interpreted, nothing can be compiled")
    pointers = tuple(name for name in kernel.arg_names if name not in values)
    if scalars := [name for name in pointers if not name.endswith("_ptr")]:
        raise KernelError(f"{kernel.__name__}: {', '.join(scalars)} must be constants")
    signature = {n: "constexpr" if n in values else f"*{TRITON[dtype]}" for n in kernel.arg_names}
    places = [(i,) for i, name in enumerate(kernel.arg_names) if name in pointers]
    source = ASTSource(
        kernel, signature, values, {place: [["tt.divisibility", 16]] for place in places}
    )
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch.options)
    scratch = made.metadata.global_scratch_size + made.metadata.profile_scratch_size
    if scratch:
        raise KernelError(f"{kernel.__name__}: wants {scratch} bytes of scratch memory")
    ptx = without_scratch(made.asm["ptx"], len(pointers))
    architecture = f"sm_{sm}a" if sm >= 90 else f"sm_{sm}"
    registers, spills = assemble(ptx, architecture)
    return Compiled(
        made.metadata.name,
        pointers,
        grid,
        32 * launch.warps,
        made.metadata.shared,
        architecture,
        registers,
        spills,
        ptx,
    )


def without_scratch(ptx: str, arguments: int) -> str:
    """PTX whose entry has exactly this many parameters: the appended, unused ones are dropped.

    Raises:
        KernelError: one of them is used.
    """
    head, opened, rest = ptx.partition(".entry ")
    signature, closed, body = rest.partition(")")
    name, _, parameters = signature.partition("(")
    kept, dropped = (found := parameters.split(","))[:arguments], found[arguments:]
    for parameter in dropped:
        if parameter.split()[-1] in body:
            raise KernelError(f"{name}: its parameter {parameter.split()[-1]} is used")
    return f"{head}{opened}{name}({','.join(kept)}\n{closed}{body}"


def assemble(ptx: str, architecture: str) -> tuple[int, int]:
    """Registers of a thread and bytes spilt, as the assembler that comes with Triton reports.

    Raises:
        KernelError: the assembler refused, with its words.
    """
    newest = architecture.startswith("sm_1")
    ptxas = (triton.knobs.nvidia.ptxas_blackwell if newest else triton.knobs.nvidia.ptxas).path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={architecture}", str(path)]
        command += ["-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KernelError(f"ptxas refuses the kernel for {architecture}: {done.stderr.strip()}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilt = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    if registers is None or spilt is None:
        raise KernelError(f"ptxas reports no registers: {done.stderr.strip()}")
    return int(registers[1]), int(spilt[1]) + int(spilt[2])
