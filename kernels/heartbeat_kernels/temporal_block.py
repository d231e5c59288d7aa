"""A whole temporal attention layer in one kernel, for narrow widths; and when that is right.

    y = x + W_out · attention over frames(W_qkv · (LayerNorm(x) + position)) + bias

x is read once from memory (again from the first-level cache) and y written once: 4 bytes an element
at half precision, where a layer of separate kernels moves some forty. But every program streams all
8·C² bytes of weights through its multiprocessor for its R = P·F rows, 2·C/R times the bytes of its
rows: past some width (fused_channels in the tuning table) the library's matrix products around the
bare attention are faster, and past 512 the (R,C) sum no longer fits the registers.

Legend: B clips, F frames, N positions, C = H·D channels, P positions of a program, R = P·FP rows;
strides are of (clip, frame, position), channels contiguous.
"""

# Triton's kernels are typed by their arguments at compile time, not by annotations.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from heartbeat_kernels.reference import TemporalLayer
from heartbeat_kernels.tiles import LOG2E, power, product, softmax, split, turn
from heartbeat_kernels.tuning import Launch


@triton.jit
def normalised(
    x_ptr, weight_ptr, bias_ptr, position_ptr, at, f, inside, c, mean, rate,
    C: tl.constexpr, F: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
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
def project(z, w_ptr, row, d, c, sum, C: tl.constexpr, D: tl.constexpr):
    """Adds z (R,BC) times the transposed rows row + d of W, columns c, to sum (R,BD)."""
    w = tl.load(w_ptr + (row + d)[None, :] * C + c[:, None], (d < D)[None, :], other=0.0)
    return product(z, w, sum)


@triton.jit
def back(o, w_ptr, e, d, c, sum, C: tl.constexpr, D: tl.constexpr):
    """Adds o (R,BD), channels e + d of the attention, times columns e + d of W_out to sum."""
    mask = (d < D)[:, None] & (c < C)[None, :]
    w = tl.load(w_ptr + c[None, :] * C + (e + d)[:, None], mask, other=0.0)
    return product(o, w, sum)


@triton.jit
def kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, position_ptr, w_qkv_ptr, w_out_ptr, b_out_ptr, y_ptr,
    X: tl.constexpr, Y: tl.constexpr,
    F: tl.constexpr, N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, FP: tl.constexpr, BC: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, EPS: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """Grid: B · ⌈N/P⌉. BC: channels of a step of the first product; C0, C1 cover C, D0, D1 D."""
    R: tl.constexpr = P * FP
    blocks: tl.constexpr = (N + P - 1) // P
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.arange(0, R)
    f = row % FP
    n = tl.program_id(0) % blocks * P + row // FP
    inside = (n < N) & (f < F)
    x_ptr += b * X[0]
    at = n * X[2] + f * X[1]
    channel = tl.arange(0, BC)

    # LayerNorm's statistics, the variance around the mean: x is in the cache by the second pass
    mean = tl.zeros((R,), tl.float32)
    for c in range(0, C, BC):
        x = tl.load(x_ptr + at[:, None] + c + channel[None, :], inside[:, None], other=0.0)
        mean += tl.sum(x.to(tl.float32), 1) / C
    variance = tl.zeros((R,), tl.float32)
    for c in range(0, C, BC):
        x = tl.load(x_ptr + at[:, None] + c + channel[None, :], inside[:, None], other=0.0)
        away = x.to(tl.float32) - mean[:, None]
        variance += tl.sum(away * away, 1) / C
    rate = tl.rsqrt(variance + EPS)

    c0 = tl.arange(0, C0)
    c1 = C0 + tl.arange(0, C1 if C1 > 0 else 1)
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, D1 if D1 > 0 else 1)
    y0 = tl.zeros((R, C0), tl.float32)
    y1 = tl.zeros((R, C1 if C1 > 0 else 1), tl.float32)
    frame = tl.arange(0, FP)
    for h in range(H):
        # Q, K, V of this head
        q0 = tl.zeros((R, D0), tl.float32)
        k0 = tl.zeros((R, D0), tl.float32)
        v0 = tl.zeros((R, D0), tl.float32)
        if D1 > 0:
            q1 = tl.zeros((R, D1), tl.float32)
            k1 = tl.zeros((R, D1), tl.float32)
            v1 = tl.zeros((R, D1), tl.float32)
        for first in range(0, C, BC):
            c = first + channel
            z = normalised(
                x_ptr, norm_weight_ptr, norm_bias_ptr, position_ptr, at, f, inside, c,
                mean, rate, C, F, POSITION,
            )  # fmt: skip
            q0 = project(z, w_qkv_ptr, h * D, d0, c, q0, C, D)
            k0 = project(z, w_qkv_ptr, C + h * D, d0, c, k0, C, D)
            v0 = project(z, w_qkv_ptr, 2 * C + h * D, d0, c, v0, C, D)
            if D1 > 0:
                q1 = project(z, w_qkv_ptr, h * D, d1, c, q1, C, D)
                k1 = project(z, w_qkv_ptr, C + h * D, d1, c, k1, C, D)
                v1 = project(z, w_qkv_ptr, 2 * C + h * D, d1, c, v1, C, D)

        # Attention over frames, position by position
        kind = y_ptr.dtype.element_ty
        scores = product(
            tl.reshape(q0.to(kind), (P, FP, D0)), turn(tl.reshape(k0.to(kind), (P, FP, D0)))
        )
        if D1 > 0:
            scores = product(
                tl.reshape(q1.to(kind), (P, FP, D1)),
                turn(tl.reshape(k1.to(kind), (P, FP, D1))),
                scores,
            )
        weights = softmax(scores * (LOG2E * D**-0.5), frame, F).to(kind)

        # Its share of the output projection
        o = product(weights, tl.reshape(v0.to(kind), (P, FP, D0)))
        o = tl.reshape(o.to(kind), (R, D0))
        y0 = back(o, w_out_ptr, h * D, d0, c0, y0, C, D)
        if C1 > 0:
            y1 = back(o, w_out_ptr, h * D, d0, c1, y1, C, D)
        if D1 > 0:
            o = product(weights, tl.reshape(v1.to(kind), (P, FP, D1)))
            o = tl.reshape(o.to(kind), (R, D1))
            y0 = back(o, w_out_ptr, h * D, d1, c0, y0, C, D)
            if C1 > 0:
                y1 = back(o, w_out_ptr, h * D, d1, c1, y1, C, D)

    y_ptr += b * Y[0]
    to = n * Y[2] + f * Y[1]
    finish(x_ptr, b_out_ptr, y_ptr, y0, at, to, inside, c0, C)
    if C1 > 0:
        finish(x_ptr, b_out_ptr, y_ptr, y1, at, to, inside, c1, C)


@triton.jit
def finish(x_ptr, b_out_ptr, y_ptr, y, at, to, inside, c, C: tl.constexpr):
    """Adds bias and x to the projected attention and writes it."""
    mask = inside[:, None] & (c < C)[None, :]
    y += tl.load(b_out_ptr + c, c < C, other=0.0).to(tl.float32)[None, :]
    y += tl.load(x_ptr + at[:, None] + c[None, :], mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + to[:, None] + c[None, :], y.to(y_ptr.dtype.element_ty), mask)


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
    launch: Launch,
) -> dict[str, int | float | bool | tuple[int, ...]]:
    """The kernel's compile-time arguments. x, y: strides; sizes (F,N,C)."""
    f, n, c = sizes
    (c0, c1), (d0, d1) = split(c), split(c // heads)
    tiles = {"P": launch.tile, "FP": power(f), "BC": step(c), "C0": c0, "C1": c1}
    values = {"F": f, "N": n, "C": c, "H": heads, "D": c // heads, "EPS": eps}
    return {"X": x, "Y": y, **values, **tiles, "D0": d0, "D1": d1, "POSITION": position}


def forward(x: Tensor, layer: TemporalLayer, y: Tensor, heads: int, launch: Launch) -> None:
    """Writes the layer's result for checked x (B,F,N,C) into y; parameters contiguous."""
    b, f, n, c = x.shape
    strides, position = (x.stride()[:3], y.stride()[:3]), layer.position is not None
    values = constants(*strides, (f, n, c), heads, layer.eps, position, launch)
    learned = layer.norm_bias if layer.position is None else layer.position  # absent: never read
    norm, out = (layer.norm_weight, layer.norm_bias), (layer.w_out, layer.b_out)
    tensors = (x, *norm, learned, layer.w_qkv, *out, y)
    kernel[b * -(-n // launch.tile), 1, 1](*tensors, **values, **launch.options)
