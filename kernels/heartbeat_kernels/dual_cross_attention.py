"""Text and image cross-attention of a clip in one pass over its queries (HeartBeat, section 2.2).

O = softmax(Qᵀ Kᵀᵀ / √D) Vᵀ + s · softmax(Qᴵ Kᴵᵀ / √D) Vᴵ, each branch with a Q, K, V of its own (or
both with one Q: then it is read once). Two library calls write and read both halves of the sum;
this kernel writes the sum once. Frames are folded into the queries' axis, so that keys and values
exist once per clip. A branch that is absent is absent from the compiled kernel.

Legend: B clips, L = F·N queries, T tokens, E = H·D channels; strides are of (clip, row), channels
contiguous. Tokens are taken in whole blocks without a mask, then one tail tile: 77 = 64 + 16 (of
which 13 are used), not 128.
"""

# Triton's kernels are typed by their arguments at compile time, not by annotations.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# Nor does its compiler take tuples with a star in them, and `if` must choose a branch, not a value.
# ruff: noqa: RUF005, SIM108

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from heartbeat_kernels.tiles import LOG2E, columns, head_tiles, no_sums, power, product, similarity
from heartbeat_kernels.tuning import Launch


def tokens_at_a_time(d: int, itemsize: int) -> int:
    """Tokens of a whole block: what leaves registers for a head's queries and sums."""
    return 64 if d <= 128 and itemsize == 2 else 16


@triton.jit
def rows(
    ptr, r, S: tl.constexpr, R: tl.constexpr, D: tl.constexpr, W: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Tiles (r,W[i]) of one clip's head; zero outside of R rows and D channels."""
    tiles = ()
    for i in tl.static_range(len(W)):
        d = columns(W, i)
        mask = (r[:, None] < R) & (d[None, :] < D)
        tiles = tiles + (tl.load(ptr + r[:, None] * S[1] + d[None, :], mask, other=0.0),)
    return tiles


@triton.jit
def attend(
    q, k_ptr, v_ptr, t, best, total, sums,
    K: tl.constexpr, V: tl.constexpr, T: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Takes the tokens t into a running softmax (Milakov & Gimelshein, 1805.02867)."""
    scores = similarity(q, rows(k_ptr, t, K, T, D, W)) * (LOG2E * D**-0.5)
    scores = tl.where(t[None, :] < T, scores, float("-inf"))
    better = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - better[:, None])
    old = tl.exp2(best - better)
    total = total * old + tl.sum(weights, 1)
    v = rows(v_ptr, t, V, T, D, W)
    weights = weights.to(v[0].dtype)
    more = ()
    for i in tl.static_range(len(W)):
        more = more + (product(weights, v[i], sums[i] * old[:, None]),)
    return better, total, more


@triton.jit
def branch(
    q, k_ptr, v_ptr, K: tl.constexpr, V: tl.constexpr, T: tl.constexpr, TAIL: tl.constexpr,
    BT: tl.constexpr, BL: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """One branch's attention, tiles (BL,W[i]) in float32."""
    best = tl.full((BL,), float("-inf"), tl.float32)
    total = tl.zeros((BL,), tl.float32)
    sums = no_sums(BL, W)
    WHOLE: tl.constexpr = T // BT * BT
    for first in range(0, WHOLE, BT):
        t = first + tl.arange(0, BT)
        best, total, sums = attend(q, k_ptr, v_ptr, t, best, total, sums, K, V, WHOLE, D, W)
    if TAIL > 0:
        t = WHOLE + tl.arange(0, TAIL)
        best, total, sums = attend(q, k_ptr, v_ptr, t, best, total, sums, K, V, T, D, W)
    share, out = 1.0 / total[:, None], ()
    for i in tl.static_range(len(W)):
        out = out + (sums[i] * share,)
    return out


@triton.jit
def kernel(
    q_ptr, k_ptr, v_ptr, qi_ptr, ki_ptr, vi_ptr, out_ptr, scale,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    QI: tl.constexpr, KI: tl.constexpr, VI: tl.constexpr, Y: tl.constexpr,
    L: tl.constexpr, H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, TAIL: tl.constexpr,
    TI: tl.constexpr, TAILI: tl.constexpr, BT: tl.constexpr, BL: tl.constexpr,
    W: tl.constexpr, SHARED: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: B · ⌈L/BL⌉ · H, head fastest. TI 0: no image branch; SHARED: the image branch's queries
    are the text branch's. scale: s, a number at run time or a constant. W: tile sides for D."""
    program = tl.program_id(0)
    h = program % H
    blocks: tl.constexpr = (L + BL - 1) // BL
    b = (program // H // blocks).to(tl.int64)
    r = (program // H) % blocks * BL + tl.arange(0, BL)

    q = rows(q_ptr + b * Q[0] + h * D, r, Q, L, D, W)
    k_ptr += b * K[0] + h * D
    v_ptr += b * V[0] + h * D
    out = branch(q, k_ptr, v_ptr, K, V, T, TAIL, BT, BL, D, W)
    if TI > 0:
        if not SHARED:
            q = rows(qi_ptr + b * QI[0] + h * D, r, QI, L, D, W)
        ki_ptr += b * KI[0] + h * D
        vi_ptr += b * VI[0] + h * D
        more = branch(q, ki_ptr, vi_ptr, KI, VI, TI, TAILI, BT, BL, D, W)

    out_ptr += b * Y[0] + h * D
    for i in tl.static_range(len(W)):
        d = columns(W, i)
        if TI > 0:
            sum = out[i] + scale * more[i]
        else:
            sum = out[i]
        mask = (r[:, None] < L) & (d[None, :] < D)
        tl.store(out_ptr + r[:, None] * Y[1] + d[None, :], sum.to(out_ptr.dtype.element_ty), mask)


def tail(t: int, block: int) -> int:
    """Tile side of what is left of t tokens behind the whole blocks; 0 for nothing."""
    return power(t % block) if t % block else 0


def constants(
    strides: dict[str, tuple[int, ...]],
    sizes: tuple[int, int, int, int],
    heads: int,
    shared: bool,
    itemsize: int,
    launch: Launch,
) -> dict[str, Any]:
    """The kernel's compile-time arguments. strides by its names; sizes (L,E,T,TI), TI 0 without an
    image branch. Pointers that the kernel then never reads are None and no arguments at all."""
    length, e, t, ti = sizes
    d, block = e // heads, tokens_at_a_time(e // heads, itemsize)
    tiles = {"BT": block, "TAIL": tail(t, block), "TAILI": tail(ti, block), "BL": launch.tile}
    values = {"L": length, "H": heads, "D": d, "T": t, "TI": ti, "SHARED": shared}
    absent = ["qi_ptr"] if shared or not ti else []
    absent += [] if ti else ["ki_ptr", "vi_ptr"]
    places = {**dict.fromkeys(("QI", "KI", "VI"), (0, 0)), **strides, **dict.fromkeys(absent)}
    return {**places, **values, **tiles, "W": head_tiles(d, itemsize)}


def programs(b: int, length: int, heads: int, launch: Launch) -> tuple[int, int, int]:
    """The grid: one axis, since CUDA's others end at 65,535."""
    return b * -(-length // launch.tile) * heads, 1, 1


def forward(
    text: tuple[Tensor, Tensor, Tensor],
    image: tuple[Tensor | None, Tensor, Tensor] | None,
    out: Tensor,
    heads: int,
    scale: float,
    launch: Launch,
) -> None:
    """Writes the sum of both branches of checked (B,L,E) queries into `out`; an image branch
    without queries has the text branch's."""
    q, k, v = text
    qi, ki, vi = image or (None, None, None)
    b, length, e = q.shape
    named = {"Q": q, "K": k, "V": v, "QI": qi, "KI": ki, "VI": vi, "Y": out}
    strides = {name: x.stride()[:2] for name, x in named.items() if x is not None}
    sizes = (length, e, k.shape[1], 0 if ki is None else ki.shape[1])
    values = constants(strides, sizes, heads, qi is None, q.itemsize, launch)
    tensors = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "qi_ptr": qi, "ki_ptr": ki, "vi_ptr": vi}
    arguments = {**values, **tensors, "out_ptr": out, "scale": float(scale)}
    kernel[programs(b, length, heads, launch)](**arguments, **launch.options)
