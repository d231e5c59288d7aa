"""What each operation computes, in plain torch. Every faster path is tested against this file.

Legend: B clips, F frames, N positions of a frame, L queries of a clip (F·N where frames are folded
in), T tokens of a condition, H heads, E channels (H heads of E/H). Queries, keys and values arrive
as linear layers leave them, heads beside each other in the last axis.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Self-attention over the frames of a clip, at each position by itself (HeartBeat, fig. 2).

    Args:
        q, k, v: (B,F,N,E).
        heads: H, a divisor of E.

    Returns:
        (B,F,N,E).
    """
    b, f, n, e = q.shape

    def by_position(x: Tensor) -> Tensor:
        """(B,F,N,E) to (B·N,H,F,E/H)."""
        return x.reshape(b, f, n, heads, e // heads).permute(0, 2, 3, 1, 4).flatten(0, 1)

    out = scaled_dot_product_attention(by_position(q), by_position(k), by_position(v))
    return out.reshape(b, n, heads, f, e // heads).permute(0, 3, 1, 2, 4).reshape(b, f, n, e)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √(E/H)) v, per head: q (B,L,E), k and v (B,T,E) to (B,L,E)."""
    b, _, e = q.shape

    def by_head(x: Tensor) -> Tensor:
        return x.reshape(b, -1, heads, e // heads).transpose(1, 2)

    out = scaled_dot_product_attention(by_head(q), by_head(k), by_head(v))
    return out.transpose(1, 2).reshape(b, -1, e)


def dual_cross_attention(
    text: tuple[Tensor, Tensor, Tensor],
    image: tuple[Tensor, Tensor, Tensor] | None,
    heads: int,
    image_scale: float = 1.0,
) -> Tensor:
    """CA(Qᵀ,Kᵀ,Vᵀ) + s·CA(Qᴵ,Kᴵ,Vᴵ): two sets of query, key and value, two softmaxes, one sum.

    Keys and values belong to the clip: its frames are folded into the queries' axis, so nothing is
    repeated. An image branch of None adds nothing, and so does one whose values are all zero.

    Args:
        text: queries (B,L,E), keys and values (B,T,E).
        image: the same with its own T, or None.
        heads: H, a divisor of E.
        image_scale: s, how much the image branch counts; HeartBeat's is 1.

    Returns:
        (B,L,E), before the output projection.
    """
    out = attention(*text, heads)
    if image is None:
        return out
    more = attention(*image, heads)
    return out + (more if image_scale == 1.0 else image_scale * more)


class TemporalLayer(NamedTuple):
    """Parameters of a temporal attention layer. w_qkv: the three projections below each other."""

    norm_weight: Tensor  # (C,)
    norm_bias: Tensor  # (C,)
    position: Tensor | None  # (F,C), learned, added behind the norm
    w_qkv: Tensor  # (3C,C)
    w_out: Tensor  # (C,C)
    b_out: Tensor  # (C,)
    eps: float = 1e-5


def temporal_block(x: Tensor, layer: TemporalLayer, heads: int) -> Tensor:
    """x + W_out · attention over frames(W_qkv · (LayerNorm(x) + position)) + bias: (B,F,N,C) to
    (B,F,N,C)."""
    out = temporal_attention(*projected(x, layer), heads)
    return x + functional.linear(out, layer.w_out, layer.b_out)


def projected(x: Tensor, layer: TemporalLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a layer's input, each like x (B,F,N,C)."""
    z = functional.layer_norm(x, x.shape[-1:], layer.norm_weight, layer.norm_bias, layer.eps)
    if layer.position is not None:
        z = z + layer.position[: x.shape[1], None]
    # Slices, not chunk(): that leaves sequence operators in an ONNX graph.
    qkv, c = functional.linear(z, layer.w_qkv), x.shape[-1]
    return qkv[..., :c], qkv[..., c : 2 * c], qkv[..., 2 * c :]


def groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    affine: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """silu(GroupNorm(x)·(1 + scale) + shift): x (M,C,h,w); affine: scale and shift, each (M,C)."""
    x = functional.group_norm(x, groups, weight, bias, eps)
    if affine is not None:
        x = x * (1 + affine[0][:, :, None, None]) + affine[1][:, :, None, None]
    return functional.silu(x)


def geglu(x: Tensor) -> Tensor:
    """value · GELU(gate): (…,2E), the values before the gates, to (…,E) (Shazeer 2020)."""
    value, gate = x.chunk(2, dim=-1)
    return value * functional.gelu(gate)


# Gradients


def attention_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention`, its weights computed anew: P = softmax(s·QKᵀ), dV = Pᵀ dO,
    dS = P ∘ (dO Vᵀ - rows' sums of P ∘ dO Vᵀ), dQ = s dS K, dK = s dSᵀ Q."""
    b, _, e = q.shape
    scale = (e // heads) ** -0.5

    def by_head(x: Tensor) -> Tensor:
        return x.reshape(b, -1, heads, e // heads).transpose(1, 2)

    def together(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(b, -1, e)

    q, k, v, grad = by_head(q), by_head(k), by_head(v), by_head(grad)
    kind = torch.promote_types(q.dtype, torch.float32)  # softmax at least in float32
    p = torch.softmax((q @ k.transpose(2, 3)).to(kind) * scale, dim=-1)
    dp = (grad @ v.transpose(2, 3)).to(kind)
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(q.dtype)
    dv = p.to(q.dtype).transpose(2, 3) @ grad
    return together(ds @ k), together(ds.transpose(2, 3) @ q), together(dv)


def temporal_attention_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `temporal_attention`, each (B,F,N,E)."""
    b, f, n, e = q.shape
    q, k, v, grad = (x.transpose(1, 2).reshape(b * n, f, e) for x in (q, k, v, grad))
    found = attention_gradients(q, k, v, grad, heads)
    dq, dk, dv = (x.reshape(b, n, f, e).transpose(1, 2).contiguous() for x in found)
    return dq, dk, dv
