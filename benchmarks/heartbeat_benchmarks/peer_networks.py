"""Published networks of other systems, built from diffusers with random weights: speed and
operations do not depend on them. Nothing is fetched.

Each says where its sizes were read and what had to be assumed. A clip is `evaluations` passes of
the network (guidance counts twice, as does each corrector of a second-order solver) and a decode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heartbeat_fast.errors import optional

SPATIAL, CROSS = "BlockSpatioTemporal", "CrossAttn"
KL = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
Call = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Peer:
    """A system: its network, its decoder if it has one, and what a clip asks of them.

    Args:
        network, decoder: build the module; its device is the caller's `torch.device` context.
        call, decode: one pass of each, inputs made on the module's own device.
        decodes: passes of the decoder a clip (frame by frame).
        source: where the sizes stand.  assumed: what the source does not say, or what differs.
        heavy: too large for a small machine: timed only where asked for.
    """

    name: str
    frames: int
    size: int
    conditions: str
    evaluations: int
    network: Callable[[], nn.Module]
    call: Call
    source: str
    assumed: str
    decoder: Callable[[], nn.Module] | None = None
    decode: Call | None = None
    decodes: int = 0
    heavy: bool = False


def zeros(module: nn.Module, *shape: int) -> Tensor:
    """Zeros where the module is."""
    return torch.zeros(shape, device=next(module.parameters()).device)


def autoencoder(widths: tuple[int, ...]) -> nn.Module:
    """Stable Diffusion's autoencoder at other widths, two residual blocks a level."""
    return optional("diffusers", "models").AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=4, **KL
    )


def decode_at(side: int) -> Call:
    """One frame of side × side latents with four channels."""

    def decode(vae: Any) -> Tensor:
        frames: Tensor = vae.decode(zeros(vae, 1, 4, side, side)).sample
        return frames

    return decode


def spatio_temporal(cross: int, heads: tuple[int, ...], layers: Any, **sizes: Any) -> nn.Module:
    """diffusers' UNetSpatioTemporalConditionModel over two 4-channel latents and one token; `cross`
    counts the levels with attention: down from the finest, up to it."""
    down = [CROSS * (i < cross) + f"Down{SPATIAL}" for i in range(4)]
    up_cross = sizes.pop("up_cross", cross)
    up = [CROSS * (i >= 4 - up_cross) + f"Up{SPATIAL}" for i in range(4)]
    return optional("diffusers", "models").UNetSpatioTemporalConditionModel(
        in_channels=8,
        out_channels=4,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        num_attention_heads=heads,
        transformer_layers_per_block=layers,
        layers_per_block=2,
        cross_attention_dim=1,
        addition_time_embed_dim=1,
        projection_class_embeddings_input_dim=1,
        **sizes,
    )


def spatio_temporal_call(frames: int, side: int) -> Call:
    """One pass over a clip of latents, an EF as the only token."""

    def call(unet: Any) -> Tensor:
        z, t = zeros(unet, 1, frames, 8, side, side), zeros(unet, 1)
        out: Tensor = unet(z, t, zeros(unet, 1, 1, 1), zeros(unet, 1, 1)).sample
        return out

    return call


def echodiffusion() -> nn.Module:
    """EchoDiffusion's base UNet, as near as diffusers comes to imagen-pytorch's Unet3D."""
    return optional("diffusers", "models").UNet3DConditionModel(
        sample_size=112,
        in_channels=6,
        out_channels=3,
        down_block_types=("DownBlock3D", "DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D", "UpBlock3D"),
        block_out_channels=(64, 128, 256),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=64,
    )


def echodiffusion_call(unet: Any) -> Tensor:
    """Sixteen frames of pixels with the conditioning frame beside them."""
    z, t = zeros(unet, 1, 6, 16, 112, 112), zeros(unet, 1)
    out: Tensor = unet(z, t, zeros(unet, 1, 1, 64)).sample
    return out


def animatediff() -> nn.Module:
    """Stable Diffusion 1.5 with AnimateDiff's motion modules: diffusers' defaults."""
    return optional("diffusers", "models").UNetMotionModel(sample_size=32, cross_attention_dim=768)


def animatediff_call(unet: Any) -> Tensor:
    """Sixteen frames of 32 × 32 latents, CLIP's 77 tokens for each."""
    z, t = zeros(unet, 1, 4, 16, 32, 32), zeros(unet, 1)
    out: Tensor = unet(z, t, zeros(unet, 16, 77, 768)).sample
    return out


PEERS = (
    Peer(
        "EchoNet-Synthetic (LVDM)",
        frames=64,
        size=112,
        conditions="frame, EF",
        evaluations=64,
        network=lambda: spatio_temporal(
            3, (8, 16, 16, 32), 1, block_out_channels=(128, 256, 256, 512), num_frames=64
        ),
        call=spatio_temporal_call(64, 16),
        decoder=lambda: autoencoder((128, 256, 256, 512)),
        decode=decode_at(14),
        decodes=64,
        source="HReynaud/EchoNet-Synthetic @005751e: lvdm/configs/default.yaml, vae/*.yaml",
        assumed="64 DDPM steps without guidance, latents padded from 14 to 16",
    ),
    Peer(
        "EchoLVFM",
        frames=32,
        size=112,
        conditions="frames, EF",
        evaluations=1,
        network=lambda: spatio_temporal(
            4,
            (4, 4, 8, 8),
            (1, 1, 2, 2),
            up_cross=1,
            block_out_channels=(128, 128, 256, 256),
            num_frames=32,
        ),
        call=spatio_temporal_call(32, 32),
        source="EngEmmanuel/EchoLVFM @36317e5: ckpts/echolvfm_h=1/.hydra/config.yaml, src/model.py",
        assumed="latents 4×28×28 padded to 32, as many channels of observed frames; its decoder is "
        "not published with it and not counted, as in its own figure",
    ),
    Peer(
        "EchoDiffusion (1SCM)",
        frames=16,
        size=112,
        conditions="frame, EF",
        evaluations=2 * 127,
        network=echodiffusion,
        call=echodiffusion_call,
        source="HReynaud/EchoDiffusion @477a896: diffusion/configs/1SCM.yaml",
        assumed="imagen-pytorch's Unet3D stood in for by diffusers' UNet3DConditionModel of the "
        "same widths and depths; EDM's 64 Heun steps are 127 evaluations, guidance 5 doubles them",
    ),
    Peer(
        "AnimateDiff (SD 1.5)",
        frames=16,
        size=256,
        conditions="text",
        evaluations=2 * 25,
        network=animatediff,
        call=animatediff_call,
        decoder=lambda: autoencoder((128, 256, 512, 512)),
        decode=decode_at(32),
        decodes=16,
        source="diffusers' UNetMotionModel and AutoencoderKL at their defaults",
        assumed="25 steps with guidance, text encoder not counted",
        heavy=True,
    ),
)
