"""A whole temporal attention layer in one kernel, for narrow widths; and when that is right.

    y = x + W_out · attention over frames(W_qkv · (LayerNorm(x) + position)) + bias

x is read once from memory (again from the first-level cache) and y written once: 4 bytes an element
at half precision, where a layer of separate kernels moves some fifty. But every program streams all
8·C² bytes of weights through its multiprocessor for its R = P·F rows, 2·C/R times the bytes of its
rows: past some width (fused_channels in the tuning table) the library's matrix products around the
bare attention are faster, and at 320 channels the (R,C) sum no longer fits the registers.

Legend: B clips, F frames, N positions, C = H·D channels, P positions of a program, R = P·FP rows;
strides are of (clip, frame, position), channels contiguous.
"""

# Triton's kernels are typed by their arguments at compile time, not by annotations.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# Nor does its compiler take tuples with a star in them, and `if` must choose a branch, not a value.
# ruff: noqa: RUF005

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from heartbeat_kernels.reference import TemporalLayer
from heartbeat_kernels.tiles import (
    LOG2E,
    columns,
    head_tiles,
    no_sums,
    power,
    product,
    similarity,
    softmax,
    split,
)
from heartbeat_kernels.tuning import Launch


@triton.jit
def normalised(
    x_ptr, weight_ptr, bias_ptr, position_ptr, at, f, inside, c, mean, rate,
    C: tl.constexpr, F: tl.constexpr, POSITION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """LayerNorm(x) + position of the rows `at` and channels c: (R,BC), in the type of x."""
    x = tl.load(x_ptr + at[:, None] + c[None, :], inside[:, None], other=0.0)
    z = (x.to(tl.float32) - mean[:, None]) * rate[:, None]
    z = z * tl.load(weight_ptr + c).to(tl.float32)[None, :]
    z += tl.load(bias_ptr + c).to(tl.float32)[None, :]
    if POSITION:
        learned = position_ptr + f[:, None] * C + c[None, :]
        z = z.to(x.dtype).to(tl.float32)  # as a LayerNorm of its own would leave it
        z += tl.load(learned, f[:, None] < F, other=0.0).to(tl.float32)
    return z.to(x.dtype)


@triton.jit
def statistics(
    x_ptr, at, inside, C: tl.constexpr, BC: tl.constexpr, EPS: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """LayerNorm's mean and 1/√(variance + ε) of the rows `at`. The variance is taken around the
    mean: x is in the cache by then."""
    mean = tl.zeros(at.shape, tl.float32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        x = tl.load(x_ptr + at[:, None] + c[None, :], inside[:, None], other=0.0)
        mean += tl.sum(x.to(tl.float32), 1) / C
    variance = tl.zeros(at.shape, tl.float32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        x = tl.load(x_ptr + at[:, None] + c[None, :], inside[:, None], other=0.0)
        away = x.to(tl.float32) - mean[:, None]
        variance += tl.sum(away * away, 1) / C
    return mean, tl.rsqrt(variance + EPS)


@triton.jit
def project(
    z, w_ptr, row, c, sums, C: tl.constexpr, D: tl.constexpr, W: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Adds z (R,BC) times the transposed rows row + [0,D) of the weights, columns c, to the sums,
    tiles (R,W[i])."""
    more = ()
    for i in tl.static_range(len(W)):
        d = columns(W, i)
        w = tl.load(w_ptr + (row + d)[None, :] * C + c[:, None], (d < D)[None, :], other=0.0)
        more = more + (product(z, w, sums[i]),)
    return more


@triton.jit
def over_frames(
    q, k, v, f, kind: tl.constexpr, P: tl.constexpr, FP: tl.constexpr, F: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Attention of the rows' heads, tiles (P·FP,W[i]), position by position."""
    q_, k_, out = (), (), ()
    for i in tl.static_range(len(W)):
        q_ = q_ + (tl.reshape(q[i].to(kind), (P, FP, W[i])),)
        k_ = k_ + (tl.reshape(k[i].to(kind), (P, FP, W[i])),)
    weights = softmax(similarity(q_, k_) * (LOG2E * D**-0.5), f, F).to(kind)
    for i in tl.static_range(len(W)):
        o = product(weights, tl.reshape(v[i].to(kind), (P, FP, W[i])))
        out = out + (tl.reshape(o.to(kind), (P * FP, W[i])),)
    return out


@triton.jit
def back(
    o, w_ptr, first, y,
    C: tl.constexpr, D: tl.constexpr, W: tl.constexpr, WC: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Adds the attention's channels first + [0,D), times those columns of W_out, to y, tiles
    (R,WC[j])."""
    more = ()
    for j in tl.static_range(len(WC)):
        c, sum = columns(WC, j), y[j]
        for i in tl.static_range(len(W)):
            e = columns(W, i)
            mask = (e < D)[:, None] & (c < C)[None, :]
            w = tl.load(w_ptr + c[None, :] * C + (first + e)[:, None], mask, other=0.0)
            sum = product(o[i], w, sum)
        more = more + (sum,)
    return more


@triton.jit
def kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, position_ptr, w_qkv_ptr, w_out_ptr, b_out_ptr, y_ptr,
    X: tl.constexpr, Y: tl.constexpr,
    F: tl.constexpr, N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, FP: tl.constexpr, BC: tl.constexpr, WC: tl.constexpr, W: tl.constexpr,
    EPS: tl.constexpr, POSITION: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: B · ⌈N/P⌉. BC: channels of a step of the first product. WC, W: tile sides for C, D."""
    R: tl.constexpr = P * FP
    blocks: tl.constexpr = (N + P - 1) // P
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.arange(0, R)
    f = row % FP
    n = tl.program_id(0) % blocks * P + row // FP
    inside = (n < N) & (f < F)
    x_ptr += b * X[0]
    at = n * X[2] + f * X[1]
    mean, rate = statistics(x_ptr, at, inside, C, BC, EPS)

    y = no_sums(R, WC)
    for h in range(H):
        q, k, v = no_sums(R, W), no_sums(R, W), no_sums(R, W)
        for first in range(0, C, BC):
            c = first + tl.arange(0, BC)
            z = normalised(
                x_ptr, norm_weight_ptr, norm_bias_ptr, position_ptr, at, f, inside, c,
                mean, rate, C, F, POSITION,
            )  # fmt: skip
            q = project(z, w_qkv_ptr, h * D, c, q, C, D, W)
            k = project(z, w_qkv_ptr, C + h * D, c, k, C, D, W)
            v = project(z, w_qkv_ptr, 2 * C + h * D, c, v, C, D, W)
        o = over_frames(q, k, v, tl.arange(0, FP), y_ptr.dtype.element_ty, P, FP, F, D, W)
        y = back(o, w_out_ptr, h * D, y, C, D, W, WC)

    to = b * Y[0] + n * Y[2] + f * Y[1]
    for j in tl.static_range(len(WC)):
        c = columns(WC, j)
        mask = inside[:, None] & (c < C)[None, :]
        sum = y[j] + tl.load(b_out_ptr + c, c < C, other=0.0).to(tl.float32)[None, :]
        sum += tl.load(x_ptr + at[:, None] + c[None, :], mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + to[:, None] + c[None, :], sum.to(y_ptr.dtype.element_ty), mask)


def step(c: int) -> int:
    """Channels taken at a time by the first product: the largest power of two up to 64 in C."""
    return min(c & -c, 64)


def constants(
    x: tuple[int, ...],
    y: tuple[int, ...],
    sizes: tuple[int, int, int],
    heads: int,
    eps: float,
    position: bool,
    itemsize: int,
    launch: Launch,
) -> dict[str, Any]:
    """The kernel's compile-time arguments. x, y: strides; sizes (F,N,C). Without a position its
    pointer is None and no argument at all."""
    f, n, c = sizes
    d = c // heads
    tiles = {"P": launch.tile, "FP": power(f), "BC": step(c), "WC": split(c, 256)}
    values = {"F": f, "N": n, "C": c, "H": heads, "D": d, "W": head_tiles(d, itemsize)}
    absent = {} if position else {"position_ptr": None}
    return {"X": x, "Y": y, **values, **tiles, "EPS": eps, "POSITION": position, **absent}


def programs(b: int, n: int, launch: Launch) -> tuple[int, int, int]:
    """The grid."""
    return b * -(-n // launch.tile), 1, 1


def forward(x: Tensor, layer: TemporalLayer, y: Tensor, heads: int, launch: Launch) -> None:
    """Writes the layer's result for checked x (B,F,N,C) into y; parameters contiguous."""
    b, f, n, c = x.shape
    strides, learned = (x.stride()[:3], y.stride()[:3]), layer.position is not None
    arguments = constants(*strides, (f, n, c), heads, layer.eps, learned, x.itemsize, launch)
    arguments |= {f"{name}_ptr": t for name, t in layer._asdict().items() if name != "eps"}
    kernel[programs(b, n, launch)](x_ptr=x, y_ptr=y, **arguments, **launch.options)
