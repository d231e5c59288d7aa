"""value · GELU(gate) of a projection that holds both (Shazeer 2020), in one pass.

Two reads and one write an output element, and exactly what a compiled graph does too; this kernel
is for where no compiler runs over the graph (eager torch moves five, TensorRT fuses its own).
"""

# Triton's kernels are typed by their arguments at compile time, not by annotations.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from heartbeat_kernels.tuning import Launch


@triton.jit
def kernel(x_ptr, y_ptr, E: tl.constexpr, BE: tl.constexpr) -> None:
    """Grid: R · ⌈E/BE⌉, one tile of a row each; x (R,2E) and y (R,E) contiguous."""
    blocks: tl.constexpr = (E + BE - 1) // BE
    row = (tl.program_id(0) // blocks).to(tl.int64)
    e = tl.program_id(0) % blocks * BE + tl.arange(0, BE)
    value = tl.load(x_ptr + row * 2 * E + e, e < E, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * 2 * E + E + e, e < E, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y_ptr + row * E + e, (value * gelu).to(y_ptr.dtype.element_ty), e < E)


def forward(x: Tensor, y: Tensor, launch: Launch) -> None:
    """Writes the result for contiguous x (…,2E) into contiguous y (…,E)."""
    e = y.shape[-1]
    programs = y.numel() // e * -(-e // launch.tile)
    kernel[programs, 1, 1](x, y, E=e, BE=launch.tile, **launch.options)
