"""What each operation computes, in plain torch. Every faster path is tested against this file.

Legend: B clips, F frames, N positions of a frame, L queries of a clip (F·N where frames are folded
in), T tokens of a condition, H heads, E channels (H heads of E/H). Queries, keys and values arrive
as linear layers leave them, heads beside each other in the last axis.
"""

from torch import Tensor
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
    text: tuple[Tensor, Tensor, Tensor], image: tuple[Tensor, Tensor, Tensor] | None, heads: int
) -> Tensor:
    """CA(Qᵀ,Kᵀ,Vᵀ) + CA(Qᴵ,Kᴵ,Vᴵ): two sets of query, key and value, two softmaxes, one sum.

    Keys and values belong to the clip: its frames are folded into the queries' axis, so nothing is
    repeated. An image branch of None adds nothing, and so does one whose values are all zero.

    Args:
        text: queries (B,L,E), keys and values (B,T,E).
        image: the same with its own T, or None.
        heads: H, a divisor of E.

    Returns:
        (B,L,E), before the output projection.
    """
    out = attention(*text, heads)
    return out if image is None else out + attention(*image, heads)
