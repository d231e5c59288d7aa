"""Attention over the F frames of a clip, at each position by itself; forward and backward.

Y[b,:,n,h] = softmax(Q Kᵀ / √D) V with Q, K, V of F rows. An attention of 16 rows fills a quarter of
a flash kernel's 64-row tile and needs a (B·N,H,F,D) layout that costs a copy each way. Here a
program takes P positions of one head; a batched product of (F,D) by (D,F) per position is one
16×16 tensor-core tile exactly, and frames are reached by their stride. Head is the fastest grid
axis, so that the heads sharing a 32-byte sector of a row run together.

Legend: B clips, F frames, N positions, E = H·D channels, P positions of a program; strides are of
(clip, frame, position), channels contiguous. Everything but B is known at compile time: shapes are
static here, and known strides are what makes every access 16 bytes.
"""

# Triton's kernels are typed by their arguments at compile time, not by annotations.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from heartbeat_kernels.tiles import LOG2E, load, power, product, softmax, split, store, turn
from heartbeat_kernels.tuning import Launch


@triton.jit
def place(N: tl.constexpr, H: tl.constexpr, P: tl.constexpr, FP: tl.constexpr):
    """A program's clip, head, positions and frames."""
    program = tl.program_id(0)
    blocks: tl.constexpr = (N + P - 1) // P
    block = program // H
    n = (block % blocks) * P + tl.arange(0, P)
    return (block // blocks).to(tl.int64), program % H, n, tl.arange(0, FP)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, Y: tl.constexpr,
    F: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, FP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Grid: B · ⌈N/P⌉ · H. Q, K, V, Y: strides. FP, D0, D1: tile sides for F and D."""
    b, h, n, f = place(N, H, P, FP)
    q_ptr += b * Q[0] + h * D
    k_ptr += b * K[0] + h * D
    v_ptr += b * V[0] + h * D
    out_ptr += b * Y[0] + h * D
    d0 = tl.arange(0, D0)

    # Every load is issued before the first use: the operation waits for memory, nothing else.
    q0 = load(q_ptr, n, f, d0, Q, N, F, D)
    k0 = load(k_ptr, n, f, d0, K, N, F, D)
    v0 = load(v_ptr, n, f, d0, V, N, F, D)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = load(q_ptr, n, f, d1, Q, N, F, D)
        k1 = load(k_ptr, n, f, d1, K, N, F, D)
        v1 = load(v_ptr, n, f, d1, V, N, F, D)

    scores = product(q0, turn(k0))
    if D1 > 0:
        scores = product(q1, turn(k1), scores)
    weights = softmax(scores * (LOG2E * D**-0.5), f, F).to(v0.dtype)

    store(out_ptr, product(weights, v0), n, f, d0, Y, N, F, D)
    if D1 > 0:
        store(out_ptr, product(weights, v1), n, f, d1, Y, N, F, D)


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr, Y: tl.constexpr,
    F: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, FP: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Grid as forward. A position's weights fit one tile, so they are computed anew, nothing is
    saved for the way back, and no two programs add to one gradient. Y: strides of dq, dk, dv."""
    b, h, n, f = place(N, H, P, FP)
    q_ptr += b * Q[0] + h * D
    k_ptr += b * K[0] + h * D
    v_ptr += b * V[0] + h * D
    grad_ptr += b * G[0] + h * D
    dq_ptr += b * Y[0] + h * D
    dk_ptr += b * Y[0] + h * D
    dv_ptr += b * Y[0] + h * D
    d0 = tl.arange(0, D0)

    q0 = load(q_ptr, n, f, d0, Q, N, F, D)
    k0 = load(k_ptr, n, f, d0, K, N, F, D)
    v0 = load(v_ptr, n, f, d0, V, N, F, D)
    g0 = load(grad_ptr, n, f, d0, G, N, F, D)
    scores = product(q0, turn(k0))
    dp = product(g0, turn(v0))
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = load(q_ptr, n, f, d1, Q, N, F, D)
        k1 = load(k_ptr, n, f, d1, K, N, F, D)
        v1 = load(v_ptr, n, f, d1, V, N, F, D)
        g1 = load(grad_ptr, n, f, d1, G, N, F, D)
        scores = product(q1, turn(k1), scores)
        dp = product(g1, turn(v1), dp)

    p = softmax(scores * (LOG2E * D**-0.5), f, F)
    ds = (p * (dp - tl.sum(p * dp, 2)[:, :, None]) * D**-0.5).to(q0.dtype)
    p_t, ds_t = turn(p.to(q0.dtype)), turn(ds)

    store(dv_ptr, product(p_t, g0), n, f, d0, Y, N, F, D)
    store(dq_ptr, product(ds, k0), n, f, d0, Y, N, F, D)
    store(dk_ptr, product(ds_t, q0), n, f, d0, Y, N, F, D)
    if D1 > 0:
        store(dv_ptr, product(p_t, g1), n, f, d1, Y, N, F, D)
        store(dq_ptr, product(ds, k1), n, f, d1, Y, N, F, D)
        store(dk_ptr, product(ds_t, q1), n, f, d1, Y, N, F, D)


def constants(
    f: int, n: int, heads: int, d: int, launch: Launch, **strides: tuple[int, ...]
) -> dict[str, int | tuple[int, ...]]:
    """The compile-time arguments of either kernel; strides by the kernel's names for them."""
    d0, d1 = split(d)
    tiles = {"P": launch.tile, "FP": power(f), "D0": d0, "D1": d1}
    return {**strides, "F": f, "N": n, "H": heads, "D": d, **tiles}


def grid(b: int, n: int, heads: int, launch: Launch) -> tuple[int, int, int]:
    """Programs: one axis, since CUDA's others end at 65,535."""
    return b * -(-n // launch.tile) * heads, 1, 1


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, heads: int, launch: Launch) -> None:
    """Writes the attention of checked (B,F,N,E) tensors into `out`, each by its own strides."""
    b, f, n, e = q.shape
    strides = {name: x.stride()[:3] for name, x in zip("QKVY", (q, k, v, out), strict=True)}
    values = constants(f, n, heads, e // heads, launch, **strides)
    forward_kernel[grid(b, n, heads, launch)](q, k, v, out, **values, **launch.options)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
    heads: int,
    launch: Launch,
) -> None:
    """Writes the gradients of q, k, v into `out`, three tensors of one set of strides."""
    b, f, n, e = q.shape
    named = zip("QKVGY", (q, k, v, grad, out[0]), strict=True)
    strides = {name: x.stride()[:3] for name, x in named}
    values = constants(f, n, heads, e // heads, launch, **strides)
    backward_kernel[grid(b, n, heads, launch)](q, k, v, grad, *out, **values, **launch.options)
