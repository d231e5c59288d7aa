"""Tiles of widths that are no powers of two, and what the kernels share.

Triton's tiles have power-of-two sides, its matrix products at least 16. A head of 160 channels
padded to 256 would idle 38 % of loads and products; two tiles, 128 + 32, idle nothing. So a matrix
(rows, D) is a tuple of tiles here, of widths W.
"""

# Triton's kernels are typed by their arguments at compile time, not by annotations.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# Nor does its compiler take tuples with a star in them, and `if` must choose a branch, not a value.
# ruff: noqa: RUF005

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is two


def power(size: int) -> int:
    """The smallest tile side that holds `size`: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def split(width: int, widest: int) -> tuple[int, ...]:
    """Tile sides that cover a width, none above `widest`: 160 → 128, 32 or 64, 64, 32."""
    widths = [max(16, min(widest, 1 << (width.bit_length() - 1)))]
    while (rest := width - sum(widths)) > 0:
        widths.append(min(widest, power(rest)))
    return tuple(widths)


def head_tiles(d: int, itemsize: int) -> tuple[int, ...]:
    """Tile sides of a head: four-byte tiles above 64 wide do not fit the registers."""
    return split(d, 128 if itemsize == 2 else 64)


@triton.constexpr_function
def before(W, i) -> int:
    """Where the i-th tile starts."""
    return sum(W[:i])


@triton.jit
def columns(W: tl.constexpr, i: tl.constexpr) -> tl.tensor:
    """The channels of the i-th tile."""
    return before(W, i) + tl.arange(0, W[i])


@triton.jit
def zeros(R: tl.constexpr, W: tl.constexpr) -> tl.tensor:
    """(R,W) in float32."""
    return tl.zeros((R, W), tl.float32)


@triton.jit
def no_sums(R: tl.constexpr, W: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Tiles (R,W[i]) of zeros."""
    sums = ()
    for i in tl.static_range(len(W)):
        sums = sums + (zeros(R, W[i]),)
    return sums


@triton.jit
def product(a, b, sum=None) -> tl.tensor:
    """a b + sum, accumulated in float32: halves on the tensor cores, float32 unrounded beside them
    (it is the precision of checks)."""
    if INTERPRETED:  # numpy has no bfloat16: the interpreter would multiply its bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def turn(x) -> tl.tensor:
    """The last two axes exchanged."""
    if len(x.shape) == 3:
        return tl.permute(x, (0, 2, 1))
    else:
        return tl.trans(x)


@triton.jit
def similarity(a, b) -> tl.tensor:
    """a bᵀ of two tuples of tiles that cover the same channels."""
    sum = product(a[0], turn(b[0]))
    for i in tl.static_range(1, len(a)):
        sum = product(a[i], turn(b[i]), sum)
    return sum


@triton.jit
def spot(
    n, f, d, S: tl.constexpr, N: tl.constexpr, F: tl.constexpr, D: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Offsets and mask of the tile (n,f,d) of one clip; S: strides of clip, frame, position."""
    offsets = n[:, None, None] * S[2] + f[None, :, None] * S[1] + d[None, None, :]
    mask = (n[:, None, None] < N) & (f[None, :, None] < F) & (d[None, None, :] < D)
    return offsets, mask


@triton.jit
def load(
    ptr, n, f, i: tl.constexpr,
    S: tl.constexpr, N: tl.constexpr, F: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Tile (n,f,W[i]) of one clip's head; zero outside of N positions, F frames, D channels."""
    offsets, mask = spot(n, f, columns(W, i), S, N, F, D)
    return tl.load(ptr + offsets, mask, other=0.0)


@triton.jit
def store(
    ptr, x, n, f, i: tl.constexpr,
    S: tl.constexpr, N: tl.constexpr, F: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
) -> None:  # fmt: skip
    """Writes what of a tile (n,f,W[i]) lies inside, in the type of the memory."""
    offsets, mask = spot(n, f, columns(W, i), S, N, F, D)
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask)


@triton.jit
def softmax(scores, f, F: tl.constexpr) -> tl.tensor:
    """Over the last axis, whose columns from F on do not exist; scores in units of log₂."""
    scores = tl.where(f[None, None, :] < F, scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
    return weights / tl.sum(weights, 2)[:, :, None]
