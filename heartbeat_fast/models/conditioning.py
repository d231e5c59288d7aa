"""The conditions' way into the denoiser: local encoders, text and EF tokens, image tokens.

Legend: B clips, F frames, H W pixels, h w latents (H/8), D context width, P present flags in the
order of `heartbeat_fast.conditions.NAMES`. An absent condition is worth exactly nothing: features
and image tokens times zero, the empty prompt's tokens, a learned EF token that says "unknown".
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, SamVisionConfig, SamVisionModel

from heartbeat_fast.conditions import NAMES, NUM_LABELS
from heartbeat_fast.models.config import HeartBeatConfig, ImageConfig, TextConfig

LOCAL_INPUTS = {"sketch": 1, "mask": NUM_LABELS, "skeleton": 1, "flow": 2}  # channels
SCALE = 8  # pixels per latent


def flag(present: Tensor, name: str, axes: int) -> Tensor:
    """One condition's flags (B,1,…) with so many axes, from present (B,7)."""
    i = NAMES.index(name)
    return present[:, i : i + 1].reshape(-1, *[1] * (axes - 1))


class LocalEncoder(nn.Module):
    """One local condition from pixels to latent resolution: nothing is lost on the way down, as
    8×8 pixels become channels; two convolutions then read the neighbourhood."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels * SCALE**2, hidden, 3, padding=1)
        self.conv_out = nn.Conv2d(hidden, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B,F,K,H,W) to (B,F,Cl,h,w)."""
        y = functional.pixel_unshuffle(x.flatten(0, 1), SCALE)
        y = self.conv_out(functional.silu(self.conv_in(y)))
        return y.unflatten(0, x.shape[:2])


class EFToken(nn.Module):
    """Ejection fraction as one context token: Fourier features, two layers; learned when absent."""

    OCTAVES = 6  # from one period over 0–100 % to one over 3 points

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(2 * self.OCTAVES + 1, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.absent = nn.Parameter(torch.zeros(dim))

    def forward(self, ef: Tensor, present: Tensor) -> Tensor:
        """Fraction 0–1 (B,1) and its flag (B,1) to (B,1,D)."""
        angles = [ef * (2 * math.pi * 2**k) for k in range(self.OCTAVES)]
        x = torch.cat([ef, *[a.sin() for a in angles], *[a.cos() for a in angles]], dim=1)
        x = self.norm(self.linear_2(functional.silu(self.linear_1(x))))
        return (present * x + (1 - present) * self.absent)[:, None]


class Adapter(nn.Module):
    """Image embedding to context tokens: BatchNorm, Conv3d, Linear, LayerNorm (HeartBeat, 2.2).

    The paper names the layers, not their sizes: here the convolution has depth 1 (one image) and a
    kernel equal to its stride, which makes grid × grid tokens.
    """

    def __init__(self, config: ImageConfig, dim: int) -> None:
        super().__init__()
        stride = config.size // config.patch // config.grid
        kernel = (1, stride, stride)
        self.batch_norm = nn.BatchNorm3d(config.channels)
        self.conv = nn.Conv3d(config.channels, config.adapter, kernel, stride=kernel)
        self.linear = nn.Linear(config.adapter, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) to (B,grid²,D)."""
        x = self.conv(self.batch_norm(x[:, :, None])).flatten(2).transpose(1, 2)
        return self.norm(self.linear(x))


def build_text_encoder(config: TextConfig) -> CLIPTextModel:
    """CLIP's text transformer with random weights: tokens (B,77) to hidden states (B,77,D)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab,
            hidden_size=config.hidden,
            intermediate_size=4 * config.hidden,
            projection_dim=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.tokens,
            bos_token_id=config.start,
            eos_token_id=config.end,
            pad_token_id=config.end,
        )
    )


def build_image_encoder(config: ImageConfig) -> SamVisionModel:
    """SAM's vision transformer with random weights: (B,3,S,S) to (B,C,S/patch,S/patch)."""
    return SamVisionModel(
        SamVisionConfig(
            image_size=config.size,
            patch_size=config.patch,
            hidden_size=config.hidden,
            mlp_dim=4 * config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            window_size=config.window,
            global_attn_indexes=list(config.global_layers),
            use_rel_pos=config.relative_positions,
            output_channels=config.channels,
            # transformers' default of 1e-10 is meant for weights about to be loaded.
            initializer_range=0.02,
        )
    )


class Conditioning(nn.Module):
    """The parts and passes that turn conditions into context tokens and local features."""

    text_encoder: Any
    image_encoder: Any

    def __init__(self, config: HeartBeatConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.denoiser.context_dim
        self.text_encoder = build_text_encoder(config.text)
        self.image_encoder = build_image_encoder(config.image)
        self.adapter = Adapter(config.image, dim)
        self.ef_token = EFToken(dim)
        for name, channels in LOCAL_INPUTS.items():
            encoder = LocalEncoder(channels, config.local_hidden, config.denoiser.local_channels)
            self.add_module(name, encoder)

    def text_context(self, tokens: Tensor, ef: Tensor, present: Tensor) -> Tensor:
        """Text tokens with the EF token behind them.

        Args:
            tokens: int64 (B,77); where text is absent, the empty prompt's are taken instead.
            ef: fraction 0–1 (B,1).
            present: (B,7).

        Returns:
            (B,78,D).
        """
        text = self.config.text
        start = torch.arange(text.tokens, device=tokens.device) == 0
        empty = torch.where(start, text.start, text.end)
        tokens = torch.where(flag(present, "text", 2) > 0.5, tokens, empty)
        x = self.text_encoder(input_ids=tokens).last_hidden_state
        return torch.cat([x, self.ef_token(ef, flag(present, "ef", 2)).to(x.dtype)], dim=1)

    def image_embedding(self, image: Tensor) -> Tensor:
        """What the image encoder makes of images (B,3,H,W) in [0,1], as MedSAM takes them: no mean
        or deviation is removed. (B,C,S/patch,S/patch)."""
        size = self.config.image.size
        if image.shape[-1] != size:
            image = functional.interpolate(image, size=(size, size), mode="bilinear")
        return self.image_encoder(pixel_values=image).last_hidden_state

    def image_context(self, image: Tensor, present: Tensor) -> Tensor:
        """Image tokens.

        Args:
            image: (B,3,H,W) in [0,1], or its `image_embedding` (B,C,S/patch,S/patch), which a
                frozen encoder need compute only once.
            present: (B,7).

        Returns:
            (B,grid²,D), zero where the image is absent.
        """
        embedded = image.shape[1] == self.config.image.channels
        x = self.adapter(image if embedded else self.image_embedding(image))
        return x * flag(present, "image", 3)

    def local_features(
        self, sketch: Tensor, mask: Tensor, skeleton: Tensor, flow: Tensor, present: Tensor
    ) -> Tensor:
        """The sum of the local conditions' features.

        Args:
            sketch: one for the clip (B,1,H,W).
            mask, skeleton, flow: (B,F,4,H,W), (B,F,1,H,W), (B,F,2,H,W).
            present: (B,7).

        Returns:
            (B,F,Cl,h,w), zero if all are absent.
        """
        inputs = {"sketch": sketch[:, None], "mask": mask, "skeleton": skeleton, "flow": flow}
        parts = [self.get_submodule(k)(x) * flag(present, k, 5) for k, x in inputs.items()]
        return parts[1] + parts[2] + parts[3] + parts[0]
