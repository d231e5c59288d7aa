"""The layers of the denoiser, named as diffusers names Stable Diffusion's.

Legend: B clips, F frames, M = B·F images, C channels, h w latents, N = h·w positions, T tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from heartbeat_kernels import ops
from heartbeat_kernels.reference import attention, dual_cross_attention, temporal_attention

Kernels = Literal["reference", "triton"]


@dataclass(frozen=True)
class Step:
    """What one pass shares between its layers.

    frames: F, by which a layer tells clips apart. temb: (M or 1,·), every residual block's time
    embedding side by side. kv: per transformer block its cross-attention keys and values, each
    (B,T,C): text k, text v, and with an image also image k, image v. temporal: attend over frames.
    """

    frames: int
    temb: Tensor
    kv: list[tuple[Tensor, ...]]
    temporal: bool


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, with the time embedding between; a shortcut if it widens."""

    def __init__(self, c_in: int, c: int, time_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, c)
        self.norm2 = nn.GroupNorm(groups, c, eps=1e-5)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c, 1) if c_in != c else None
        self.first = 0  # where its share of Step.temb starts; the denoiser sets it

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(M,C_in,h,w) to (M,C,h,w)."""
        temb = step.temb[:, self.first : self.first + self.time_emb_proj.out_features]
        y = self.conv1(functional.silu(self.norm1(x))) + temb[:, :, None, None]
        y = self.conv2(functional.silu(self.norm2(y)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + y


class Attention(nn.Module):
    """Projections around an attention: self-attention as it stands, over whatever axis 1 holds."""

    def __init__(self, c: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.kernels: Kernels = "reference"  # use_kernels sets it
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(context_dim or c, c, bias=False)
        self.to_v = nn.Linear(context_dim or c, c, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor) -> Tensor:
        """(M,N,C) to (M,N,C)."""
        return self.to_out[0](attention(self.to_q(x), self.to_k(x), self.to_v(x), self.heads))


class DualCrossAttention(Attention):
    """Text and image branch with a query, key and value set each (HeartBeat, section 2.2).

    Both sums go through one output projection: the text branch alone is then Stable Diffusion's
    layer. No value has a bias, so tokens of zero add exactly nothing.
    """

    def __init__(self, c: int, heads: int, context_dim: int, image_branch: bool) -> None:
        super().__init__(c, heads, context_dim)
        self.image_branch = image_branch
        if image_branch:
            self.to_q_ip = nn.Linear(c, c, bias=False)
            self.to_k_ip = nn.Linear(context_dim, c, bias=False)
            self.to_v_ip = nn.Linear(context_dim, c, bias=False)

    def context(self, text: Tensor, image: Tensor | None) -> tuple[Tensor, ...]:
        """Keys and values, each (B,T,C), of text (B,T,D) and, if given, image tokens."""
        kv = (self.to_k(text), self.to_v(text))
        return kv if image is None else (*kv, self.to_k_ip(image), self.to_v_ip(image))

    def attend(self, x: Tensor, kv: tuple[Tensor, ...]) -> Tensor:
        """(B,F·N,C) to (B,F·N,C): frames are queries of their clip, K and V stay (B,T,C)."""
        text = (self.to_q(x), kv[0], kv[1])
        image = (self.to_q_ip(x), kv[2], kv[3]) if len(kv) == 4 else None
        fast = self.kernels == "triton"
        attend = ops.dual_cross_attention if fast else dual_cross_attention
        return self.to_out[0](attend(text, image, self.heads))


class TemporalAttention(Attention):
    """Self-attention over the frames at each position; its output starts at zero, so a freshly
    inflated model is the image model. Frame positions are learned, from sinusoids."""

    def __init__(self, c: int, heads: int, frames: int) -> None:
        super().__init__(c, heads)
        for parameter in self.to_out.parameters():
            nn.init.zeros_(parameter)
        self.position = nn.Parameter(sinusoid(torch.arange(frames, dtype=torch.float32), c))

    def over_frames(self, x: Tensor, frames: int) -> Tensor:
        """(M,N,C) to (M,N,C)."""
        x = x.unflatten(0, (-1, frames)) + self.position[:frames, None]
        attend = ops.temporal_attention if self.kernels == "triton" else temporal_attention
        x = attend(self.to_q(x), self.to_k(x), self.to_v(x), self.heads)
        return self.to_out[0](x).flatten(0, 1)


class GEGLU(nn.Module):
    """value · GELU(gate), both from one projection (Shazeer 2020)."""

    def __init__(self, c: int, inner: int) -> None:
        super().__init__()
        self.inner = inner
        self.proj = nn.Linear(c, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(M,N,C) to (M,N,inner)."""
        x = self.proj(x)
        # Slices: chunk() leaves sequence operators in the ONNX graph.
        return x[..., : self.inner] * functional.gelu(x[..., self.inner :])


class FeedForward(nn.Module):
    """GEGLU and back."""

    def __init__(self, c: int, mult: int) -> None:
        super().__init__()
        # The middle entry is diffusers' dropout; it keeps the indices of the names.
        self.net = nn.Sequential(GEGLU(c, mult * c), nn.Identity(), nn.Linear(mult * c, c))

    def forward(self, x: Tensor) -> Tensor:
        """(M,N,C) to (M,N,C)."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention in each frame, dual cross-attention, feed-forward, attention over frames."""

    def __init__(
        self, c: int, heads: int, context_dim: int, ff_mult: int, image_branch: bool, frames: int
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c)
        self.attn1 = Attention(c, heads)
        self.norm2 = nn.LayerNorm(c)
        self.attn2 = DualCrossAttention(c, heads, context_dim, image_branch)
        self.norm3 = nn.LayerNorm(c)
        self.ff = FeedForward(c, ff_mult)
        self.norm_temporal = nn.LayerNorm(c) if frames else None
        self.attn_temporal = TemporalAttention(c, heads, frames) if frames else None

    def forward(self, x: Tensor, step: Step, kv: tuple[Tensor, ...]) -> Tensor:
        """(M,N,C) to (M,N,C)."""
        m, n, c = x.shape
        x = x + self.attn1(self.norm1(x))
        # Folding frames into queries is a view, and keeps K and V one per clip.
        queries = self.norm2(x).reshape(m // step.frames, step.frames * n, c)
        x = x + self.attn2.attend(queries, kv).reshape(m, n, c)
        x = x + self.ff(self.norm3(x))
        if self.attn_temporal is not None and self.norm_temporal is not None and step.temporal:
            x = x + self.attn_temporal.over_frames(self.norm_temporal(x), step.frames)
        return x


class Transformer(nn.Module):
    """One transformer block between 1×1 convolutions, around which the input is carried."""

    def __init__(
        self,
        c: int,
        heads: int,
        groups: int,
        context_dim: int,
        ff_mult: int,
        image_branch: bool,
        frames: int,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Conv2d(c, c, 1)
        block = TransformerBlock(c, heads, context_dim, ff_mult, image_branch, frames)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(c, c, 1)
        self.index = 0  # which entry of Step.kv is its own; the denoiser sets it

    @property
    def cross_attention(self) -> DualCrossAttention:
        """The layer that makes this block's keys and values."""
        return self.transformer_blocks[0].attn2  # type: ignore[return-value]

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(M,C,h,w) to (M,C,h,w)."""
        size = x.shape[-2:]
        # Channels last, then flat: convolutions have them last in memory, so nothing moves.
        y = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)
        y = self.transformer_blocks[0](y, step, step.kv[self.index])
        return x + self.proj_out(y.unflatten(1, size).permute(0, 3, 1, 2))


class Downsample(nn.Module):
    """Halves h and w by a strided convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(M,C,h,w) to (M,C,h/2,w/2)."""
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles h and w by repetition, then a convolution."""

    def __init__(self, c: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(M,C,h,w) to (M,C_out,2h,2w)."""
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """How every attention over frames and every dual cross-attention in a model is computed: by the
    plain reference, or by the hb operations, which are Triton kernels on a GPU. Weights stay."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernels = kernels


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Cosines then sines of t at dim/2 frequencies from 1 down to 1/10000 (Ho et al. 2020):
    (S,) to (S,dim)."""
    half = dim // 2
    rate = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / half))
    angle = t[:, None].float() * rate
    return torch.cat([angle.cos(), angle.sin()], dim=1)
