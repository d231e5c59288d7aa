"""silu(GroupNorm(x) · (1 + scale) + shift) in one kernel, over either memory format.

Scale and shift are per image and channel (a time embedding's), and optional. One program normalises
one group of one image: its values are read for the mean, again for the variance and again for the
result, the second and third time from the cache (a group of Stable Diffusion's at 32×32 is 20 KB).
So memory sees one read and one write, where eager torch makes three reads and two writes and a
compiled graph two reads and one write.

Legend: M images, C channels, S = h·w positions, G groups, CG = C/G.
"""

# Triton's kernels are typed by their arguments at compile time, not by annotations.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from heartbeat_kernels.tuning import Launch


@triton.jit
def kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr,
    X: tl.constexpr, Y: tl.constexpr, S: tl.constexpr, C: tl.constexpr, CG: tl.constexpr,
    BS: tl.constexpr, BG: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: M · G. X, Y: strides of (image, channel, position). BS, BG: tile of positions and
    channels. AFFINE: scale and shift (M,C) are there."""
    G: tl.constexpr = C // CG
    m = (tl.program_id(0) // G).to(tl.int64)
    channel = tl.arange(0, BG)
    c = tl.program_id(0) % G * CG + channel
    x_ptr += m * X[0]
    y_ptr += m * Y[0]
    count: tl.constexpr = S * CG

    mean = 0.0
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        mask = (s < S)[:, None] & (channel < CG)[None, :]
        x = tl.load(x_ptr + s[:, None] * X[2] + c[None, :] * X[1], mask, other=0.0)
        mean += tl.sum(x.to(tl.float32)) / count
    variance = 0.0
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        mask = (s < S)[:, None] & (channel < CG)[None, :]
        x = tl.load(x_ptr + s[:, None] * X[2] + c[None, :] * X[1], mask, other=0.0)
        away = tl.where(mask, x.to(tl.float32) - mean, 0.0)
        variance += tl.sum(away * away) / count

    rate = tl.rsqrt(variance + EPS)
    gain = tl.load(weight_ptr + c, channel < CG, other=0.0).to(tl.float32) * rate
    offset = tl.load(bias_ptr + c, channel < CG, other=0.0).to(tl.float32) - mean * gain
    if AFFINE:
        scale = 1.0 + tl.load(scale_ptr + m * C + c, channel < CG, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + m * C + c, channel < CG, other=0.0).to(tl.float32)
        gain, offset = gain * scale, offset * scale + shift
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        mask = (s < S)[:, None] & (channel < CG)[None, :]
        x = tl.load(x_ptr + s[:, None] * X[2] + c[None, :] * X[1], mask, other=0.0)
        z = x.to(tl.float32) * gain[None, :] + offset[None, :]
        y = (z * tl.sigmoid(z)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + s[:, None] * Y[2] + c[None, :] * Y[1], y, mask)


def constants(
    x: tuple[int, ...],
    y: tuple[int, ...],
    sizes: tuple[int, int, int],
    eps: float,
    affine: bool,
    launch: Launch,
) -> dict[str, Any]:
    """The kernel's compile-time arguments. x, y: strides; sizes (S,C,G). Without scale and shift
    their pointers are None and no arguments at all."""
    s, c, groups = sizes
    cg = c // groups
    values = {"X": x, "Y": y, "S": s, "C": c, "CG": cg, "EPS": eps, "AFFINE": affine}
    absent = {} if affine else {"scale_ptr": None, "shift_ptr": None}
    return {**values, "BS": launch.tile, "BG": 1 << (cg - 1).bit_length(), **absent}


def forward(
    x: Tensor,
    groups: int,
    norm: tuple[Tensor, Tensor, float],
    affine: tuple[Tensor, Tensor] | None,
    y: Tensor,
    launch: Launch,
) -> None:
    """Writes the result for checked x (M,C,h,w), of either memory format, into y of the same.

    Args:
        norm: weight (C,), bias (C,), epsilon. affine: scale and shift (M,C), contiguous, or None.
    """
    m, c, h, w = x.shape
    weight, bias, eps = norm
    scale, shift = affine or (None, None)
    in_, out = ((t.stride(0), t.stride(1), t.stride(3)) for t in (x, y))
    arguments = constants(in_, out, (h * w, c, groups), eps, affine is not None, launch)
    arguments |= {"x_ptr": x, "weight_ptr": weight, "bias_ptr": bias}
    arguments |= {"scale_ptr": scale, "shift_ptr": shift, "y_ptr": y}
    kernel[m * groups, 1, 1](**arguments, **launch.options)
