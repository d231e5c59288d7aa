"""How widths that are no powers of two are tiled, and tiles of (positions, frames, channels).

Triton's tiles have power-of-two sides, its matrix products at least 16. A head of 160 channels
padded to 256 would idle 38 % of loads and products; two tiles, 128 + 32, idle nothing.
"""

# Triton's kernels are typed by their arguments at compile time, not by annotations.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is two


def power(size: int) -> int:
    """The smallest tile side that holds `size`: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def split(width: int) -> tuple[int, int]:
    """Two tile sides that cover a width, the second 0 where one is exact: 160 → 128 + 32."""
    first = max(16, 1 << (width.bit_length() - 1))
    return first, power(width - first) if width > first else 0


@triton.jit
def product(a, b, sum=None):
    """a b + sum on the tensor cores, accumulated in float32; float32 is not rounded to TF32."""
    if INTERPRETED:  # numpy has no bfloat16: the interpreter would multiply its bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def spot(n, f, d, S: tl.constexpr, N: tl.constexpr, F: tl.constexpr, D: tl.constexpr):
    """Offsets and mask of the tile (n,f,d) of one clip; S: strides of clip, frame, position."""
    offsets = n[:, None, None] * S[2] + f[None, :, None] * S[1] + d[None, None, :]
    mask = (n[:, None, None] < N) & (f[None, :, None] < F) & (d[None, None, :] < D)
    return offsets, mask


@triton.jit
def load(ptr, n, f, d, S: tl.constexpr, N: tl.constexpr, F: tl.constexpr, D: tl.constexpr):
    """The tile (n,f,d) of one clip; zero outside of N positions, F frames, D channels."""
    offsets, mask = spot(n, f, d, S, N, F, D)
    return tl.load(ptr + offsets, mask, other=0.0)


@triton.jit
def store(ptr, x, n, f, d, S: tl.constexpr, N: tl.constexpr, F: tl.constexpr, D: tl.constexpr):
    """Writes what of the tile (n,f,d) lies inside, in the type of the memory."""
    offsets, mask = spot(n, f, d, S, N, F, D)
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask)


@triton.jit
def turn(x):
    """(P,F,D) to (P,D,F)."""
    return tl.permute(x, (0, 2, 1))


@triton.jit
def softmax(scores, f, F: tl.constexpr):
    """Over the last axis, whose columns from F on do not exist; scores in units of log₂."""
    scores = tl.where(f[None, None, :] < F, scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
    return weights / tl.sum(weights, 2)[:, :, None]
