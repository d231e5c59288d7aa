"""Text and image cross-attention of a clip in one pass over its queries (HeartBeat, section 2.2).

O = softmax(Qᵀ Kᵀᵀ / √D) Vᵀ + s · softmax(Qᴵ Kᴵᵀ / √D) Vᴵ, each branch with a Q, K, V of its own (or
both with one Q: then it is read once). Two library calls write and read both halves of the sum;
this kernel writes the sum once. Frames are folded into the queries' axis, so that keys and values
exist once per clip. A branch that is absent is absent from the compiled kernel.

Legend: B clips, L = F·N queries, T tokens, E = H·D channels; strides are of (clip, row), channels
contiguous. Tokens are taken in whole blocks of BT without a mask, then one tail tile: 77 = 64 + 16
(13 used) instead of 128.
"""

# Triton's kernels are typed by their arguments at compile time, not by annotations.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from heartbeat_kernels.tiles import LOG2E, power, product, split
from heartbeat_kernels.tuning import Launch

BT = 64  # tokens of a whole block


@triton.jit
def rows(ptr, r, d, S: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """The tile (r,d) of one clip and head; zero outside of R rows and D channels."""
    mask = (r[:, None] < R) & (d[None, :] < D)
    return tl.load(ptr + r[:, None] * S[1] + d[None, :], mask, other=0.0)


@triton.jit
def attend(
    q0, q1, k_ptr, v_ptr, t, best, total, out0, out1,
    K: tl.constexpr, V: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Takes the tokens t into a running softmax (Milakov & Gimelshein, 1805.02867)."""
    d0 = tl.arange(0, D0)
    k = rows(k_ptr, t, d0, K, T, D)
    scores = product(q0, tl.trans(k))
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        k = rows(k_ptr, t, d1, K, T, D)
        scores = product(q1, tl.trans(k), scores)
    scores = tl.where(t[None, :] < T, scores * (LOG2E * D**-0.5), float("-inf"))
    better = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - better[:, None])
    old = tl.exp2(best - better)
    total = total * old + tl.sum(weights, 1)
    v = rows(v_ptr, t, d0, V, T, D)
    out0 = product(weights.to(v.dtype), v, out0 * old[:, None])
    if D1 > 0:
        v = rows(v_ptr, t, d1, V, T, D)
        out1 = product(weights.to(v.dtype), v, out1 * old[:, None])
    return better, total, out0, out1


@triton.jit
def branch(
    q0, q1, k_ptr, v_ptr,
    K: tl.constexpr, V: tl.constexpr, T: tl.constexpr, TAIL: tl.constexpr, BT: tl.constexpr,
    BL: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """One branch's attention, (BL,D0) and (BL,D1) in float32."""
    best = tl.full((BL,), float("-inf"), tl.float32)
    total = tl.zeros((BL,), tl.float32)
    out0 = tl.zeros((BL, D0), tl.float32)
    out1 = tl.zeros((BL, D1 if D1 > 0 else 1), tl.float32)
    WHOLE: tl.constexpr = T // BT * BT
    for first in range(0, WHOLE, BT):
        t = first + tl.arange(0, BT)
        best, total, out0, out1 = attend(
            q0, q1, k_ptr, v_ptr, t, best, total, out0, out1, K, V, WHOLE, D, D0, D1
        )
    if TAIL > 0:
        t = WHOLE + tl.arange(0, TAIL)
        best, total, out0, out1 = attend(
            q0, q1, k_ptr, v_ptr, t, best, total, out0, out1, K, V, T, D, D0, D1
        )
    share = 1.0 / total[:, None]
    return out0 * share, out1 * share


@triton.jit
def kernel(
    q_ptr, k_ptr, v_ptr, qi_ptr, ki_ptr, vi_ptr, out_ptr, scale,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    QI: tl.constexpr, KI: tl.constexpr, VI: tl.constexpr, Y: tl.constexpr,
    L: tl.constexpr, H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, TAIL: tl.constexpr,
    TI: tl.constexpr, TAILI: tl.constexpr, BT: tl.constexpr, BL: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Grid: B · ⌈L/BL⌉ · H, head fastest. TI 0: no image branch; SHARED: the image branch's queries
    are the text branch's. scale: s, a number at run time or a constant."""
    program = tl.program_id(0)
    h = program % H
    blocks: tl.constexpr = (L + BL - 1) // BL
    b = (program // H // blocks).to(tl.int64)
    r = (program // H) % blocks * BL + tl.arange(0, BL)
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, D1 if D1 > 0 else 1)

    q0 = rows(q_ptr + b * Q[0] + h * D, r, d0, Q, L, D)
    q1 = q0
    if D1 > 0:
        q1 = rows(q_ptr + b * Q[0] + h * D, r, d1, Q, L, D)
    k_ptr += b * K[0] + h * D
    v_ptr += b * V[0] + h * D
    out0, out1 = branch(q0, q1, k_ptr, v_ptr, K, V, T, TAIL, BT, BL, D, D0, D1)

    if TI > 0:
        if not SHARED:
            q0 = rows(qi_ptr + b * QI[0] + h * D, r, d0, QI, L, D)
            q1 = q0
            if D1 > 0:
                q1 = rows(qi_ptr + b * QI[0] + h * D, r, d1, QI, L, D)
        ki_ptr += b * KI[0] + h * D
        vi_ptr += b * VI[0] + h * D
        more0, more1 = branch(q0, q1, ki_ptr, vi_ptr, KI, VI, TI, TAILI, BT, BL, D, D0, D1)
        out0 += scale * more0
        out1 += scale * more1

    out_ptr += b * Y[0] + h * D + r[:, None] * Y[1]
    kind = out_ptr.dtype.element_ty
    inside = r[:, None] < L
    tl.store(out_ptr + d0[None, :], out0.to(kind), inside & (d0[None, :] < D))
    if D1 > 0:
        tl.store(out_ptr + d1[None, :], out1.to(kind), inside & (d1[None, :] < D))


def tail(t: int) -> int:
    """Tile side of what is left of T tokens behind the whole blocks; 0 for nothing."""
    return power(t % BT) if t % BT else 0


def constants(
    strides: dict[str, tuple[int, ...]],
    sizes: tuple[int, int, int, int],
    heads: int,
    shared: bool,
    launch: Launch,
) -> dict[str, int | bool | tuple[int, ...]]:
    """The kernel's compile-time arguments; strides by its names, sizes (L,E,T,TI)."""
    length, e, t, ti = sizes
    d0, d1 = split(e // heads)
    tiles = {"BT": BT, "BL": launch.tile, "D0": d0, "D1": d1, "TAIL": tail(t), "TAILI": tail(ti)}
    values = {"L": length, "H": heads, "D": e // heads, "T": t, "TI": ti, "SHARED": shared}
    return {**strides, **values, **tiles}


def forward(
    text: tuple[Tensor, Tensor, Tensor],
    image: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor,
    heads: int,
    scale: float,
    launch: Launch,
) -> None:
    """Writes the sum of both branches of checked (B,L,E) queries into `out`."""
    q, k, v = text
    qi, ki, vi = image or text  # absent: never read, the compiled kernel has no such branch
    b, length, e = q.shape
    named = {"Q": q, "K": k, "V": v, "QI": qi, "KI": ki, "VI": vi, "Y": out}
    strides = {name: x.stride()[:2] for name, x in named.items()}
    shared = q.data_ptr() == qi.data_ptr() and q.stride() == qi.stride()
    sizes = (length, e, k.shape[1], ki.shape[1] if image else 0)
    values = constants(strides, sizes, heads, shared, launch)
    programs = b * -(-length // launch.tile) * heads
    kernel[programs, 1, 1](q, k, v, qi, ki, vi, out, float(scale), **values, **launch.options)
