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
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"
# Nor does its compiler take tuples with a star in them.
# ruff: noqa: RUF005

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from heartbeat_kernels.tiles import (
    LOG2E,
    head_tiles,
    load,
    power,
    product,
    similarity,
    softmax,
    split,
    store,
    turn,
)
from heartbeat_kernels.tuning import Launch


@triton.jit
def place(
    N: tl.constexpr, H: tl.constexpr, P: tl.constexpr, FP: tl.constexpr
) -> tuple[tl.tensor, ...]:
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
    P: tl.constexpr, FP: tl.constexpr, W: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: B · ⌈N/P⌉ · H. Q, K, V, Y: strides. FP, W: tile sides for F and D."""
    b, h, n, f = place(N, H, P, FP)
    q_ptr += b * Q[0] + h * D
    k_ptr += b * K[0] + h * D
    v_ptr += b * V[0] + h * D
    out_ptr += b * Y[0] + h * D
    # Every load is issued before the first use: the operation waits for memory, nothing else.
    q, k, v = (), (), ()
    for i in tl.static_range(len(W)):
        q = q + (load(q_ptr, n, f, i, Q, N, F, D, W),)
        k = k + (load(k_ptr, n, f, i, K, N, F, D, W),)
        v = v + (load(v_ptr, n, f, i, V, N, F, D, W),)
    weights = softmax(similarity(q, k) * (LOG2E * D**-0.5), f, F).to(v[0].dtype)
    for i in tl.static_range(len(W)):
        store(out_ptr, product(weights, v[i]), n, f, i, Y, N, F, D, W)


@triton.jit
def similar(
    a_ptr, b_ptr, n, f, A: tl.constexpr, B: tl.constexpr,
    N: tl.constexpr, F: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """a bᵀ at each position, one tile of channels after the other, none kept."""
    a = load(a_ptr, n, f, 0, A, N, F, D, W)
    sum = product(a, turn(load(b_ptr, n, f, 0, B, N, F, D, W)))
    for i in tl.static_range(1, len(W)):
        a = load(a_ptr, n, f, i, A, N, F, D, W)
        sum = product(a, turn(load(b_ptr, n, f, i, B, N, F, D, W)), sum)
    return sum


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr, Y: tl.constexpr,
    F: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, FP: tl.constexpr, W: tl.constexpr,
) -> None:  # fmt: skip
    """Grid as forward. A position's weights fit one tile, so they are computed anew, nothing is
    saved for the way back, and no two programs add to one gradient. Four inputs do not fit the
    registers: they are read tile by tile, the second time from the cache. Y: strides of dq, dk, dv.
    """
    b, h, n, f = place(N, H, P, FP)
    q_ptr += b * Q[0] + h * D
    k_ptr += b * K[0] + h * D
    v_ptr += b * V[0] + h * D
    grad_ptr += b * G[0] + h * D
    to = b * Y[0] + h * D

    p = softmax(similar(q_ptr, k_ptr, n, f, Q, K, N, F, D, W) * (LOG2E * D**-0.5), f, F)
    dp = similar(grad_ptr, v_ptr, n, f, G, V, N, F, D, W)
    ds = p * (dp - tl.sum(p * dp, 2)[:, :, None]) * D**-0.5
    kind = q_ptr.dtype.element_ty
    p, ds = p.to(kind), ds.to(kind)
    for i in tl.static_range(len(W)):
        grad = load(grad_ptr, n, f, i, G, N, F, D, W)
        store(dv_ptr + to, product(turn(p), grad), n, f, i, Y, N, F, D, W)
        k = load(k_ptr, n, f, i, K, N, F, D, W)
        store(dq_ptr + to, product(ds, k), n, f, i, Y, N, F, D, W)
        q = load(q_ptr, n, f, i, Q, N, F, D, W)
        store(dk_ptr + to, product(turn(ds), q), n, f, i, Y, N, F, D, W)


def constants(
    f: int, n: int, heads: int, d: int, itemsize: int, launch: Launch, **strides: tuple[int, ...]
) -> dict[str, Any]:
    """The compile-time arguments of either kernel; strides by the kernel's names for them."""
    backward = "G" in strides
    widths = split(d, 32) if backward and itemsize == 4 else head_tiles(d, itemsize)
    tiles = {"P": launch.tile, "FP": power(f), "W": widths}
    return {**strides, "F": f, "N": n, "H": heads, "D": d, **tiles}


def programs(b: int, n: int, heads: int, launch: Launch) -> tuple[int, int, int]:
    """The grid: one axis, since CUDA's others end at 65,535."""
    return b * -(-n // launch.tile) * heads, 1, 1


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, heads: int, launch: Launch) -> None:
    """Writes the attention of checked (B,F,N,E) tensors into `out`, each by its own strides."""
    b, f, n, e = q.shape
    strides = {name: x.stride()[:3] for name, x in zip("QKVY", (q, k, v, out), strict=True)}
    values = constants(f, n, heads, e // heads, q.itemsize, launch, **strides)
    forward_kernel[programs(b, n, heads, launch)](q, k, v, out, **values, **launch.options)


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
    values = constants(f, n, heads, e // heads, q.itemsize, launch, **strides)
    backward_kernel[programs(b, n, heads, launch)](q, k, v, grad, *out, **values, **launch.options)
