"""Codecs: frames ↔ latents at an eighth of the size.

`EchoCodec` is ours and small. Its latents hold anatomy and brightness only; speckle is made by the
decoder from texture noise that travels with the tissue (heartbeat_fast/speckle.py). L1 alone would
blur speckle away, because the latents cannot say which grain is where; a decoder that is told the
scatterers can. `KLCodec` is Stable Diffusion's; `SmallKLCodec` has its encoder and a decoder of a
twentieth of its work. Both keep speckle in the latents and draw without noise. Legend: N frames, C
channels, H W pixels, h w latents.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heartbeat_fast.models.config import CodecConfig

FILTERS, SPREAD = 8, 5  # steered filters, their width in blocks of 2 pixels


class Codec(nn.Module):
    """Frames (N, 1, H, W) in [0, 1] to latents (N, C, h, w) of unit deviation, and back.

    noisy: whether `paint` makes its grain from the noise. Where it does not, equal latents give
    equal frames, and nothing flickers that does not move in the latents.
    """

    noisy = False

    def encode(self, frames: Tensor) -> Tensor:
        """Frames → latents."""
        raise NotImplementedError

    def decode(self, z: Tensor, noise: Tensor) -> Tensor:
        """Latents and texture noise (N, 2, H, W) → frames."""
        return self.paint(self.raw(z), noise).clamp(0, 1)

    def raw(self, z: Tensor) -> Tensor:
        """Latents of unit deviation as the decoder takes them."""
        return z

    def paint(self, raw: Tensor, noise: Tensor) -> Tensor:
        """What the decoder makes of raw latents: frames not yet held to [0, 1]."""
        raise NotImplementedError


def build_codec(config: CodecConfig) -> Codec:
    """The codec that a config names."""
    if config.kind == "echo":
        return EchoCodec(config)
    return SmallKLCodec(config) if config.decoder_widths else KLCodec(config)


class Residual(nn.Module):
    """x + conv(relu(conv(x))): 3×3, no norm, so that brightness passes through unchanged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class EchoEncoder(nn.Module):
    """(N, 1, H, W) → raw latents (N, C, H/8, W/8)."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        fine, mid, coarse = config.widths
        self.inside = nn.Conv2d(
            4, fine, 3, padding=1
        )  # on 2×2 blocks: half the size, no pixel lost
        self.down1 = nn.Conv2d(fine, mid, 4, stride=2, padding=1)
        self.mid = Residual(mid)
        self.down2 = nn.Conv2d(mid, coarse, 4, stride=2, padding=1)
        self.coarse = nn.Sequential(Residual(coarse), Residual(coarse))
        self.out = nn.Conv2d(coarse, config.latent_channels, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        x = F.relu(self.inside(F.pixel_unshuffle(frames, 2)))
        x = self.mid(F.relu(self.down1(x)))
        return self.out(F.relu(self.coarse(self.down2(x))))


class EchoDecoder(nn.Module):
    """Raw latents (N, C, h, w) and noise (N, 2, 8h, 8w) → grey frames (N, 1, 8h, 8w).

    Speckle is the modulus of scatterers blurred by a point spread that turns with the beam and
    widens with depth. So the decoder steers: Σ_k w_k(x)·(f_k ∗ noise), the same real filters f_k
    for real and imaginary part, weights w_k from the latents; then the logarithm of the modulus,
    since grey is logarithmic; then two convolutions blend it with the anatomy.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        fine, mid, coarse = config.decoder_widths or config.widths
        self.inside = nn.Conv2d(config.latent_channels + 2, coarse, 3, padding=1)
        self.coarse = Residual(coarse)
        self.up1 = nn.Conv2d(coarse, mid * 4, 1)
        self.mid = Residual(mid)
        self.up2 = nn.Conv2d(mid, fine * 4, 1)
        self.filters = nn.Conv2d(4, 4 * FILTERS, SPREAD, padding=SPREAD // 2, bias=False)
        self.steer = nn.Conv2d(fine, FILTERS, 1)
        self.fine1 = nn.Conv2d(fine + 4, fine, 3, padding=1)
        self.fine2 = nn.Conv2d(fine, fine, 3, padding=1)
        self.out = nn.Conv2d(fine, 4, 3, padding=1)

    def forward(self, z: Tensor, noise: Tensor) -> Tensor:
        x = self.anatomy(z)
        # fine1 of both side by side, without the copy that would put them there.
        weight, width = self.fine1.weight, x.shape[1]
        grain = F.conv2d(self.log_envelope(x, noise), weight[:, width:], padding=1)
        x = F.relu(F.conv2d(x, weight[:, :width], self.fine1.bias, padding=1) + grain)
        return F.pixel_shuffle(self.out(F.relu(self.fine2(x))), 2)

    def anatomy(self, z: Tensor) -> Tensor:
        """Features (N, C, 4h, 4w) of everything but grain."""
        x = self.coarse(self.inside(torch.cat([z, _position(z)], 1)))
        x = self.mid(F.pixel_shuffle(self.up1(F.relu(x)), 2))
        return F.pixel_shuffle(self.up2(F.relu(x)), 2)

    def log_envelope(self, x: Tensor, noise: Tensor) -> Tensor:
        """ln of the steered, blurred noise's power for the four pixels of each 2×2 block.

        Σ_k w_k·field_k as a product of equal shapes and a convolution with ones: channels stay the
        innermost axis, where a sum over an axis of its own had them moved there and back (a third
        of the decoder's time in OpenVINO).
        """
        channel = torch.arange(4 * FILTERS, device=x.device)
        of_filter, of_pixel = channel // 4, channel % 4
        bias: Any = self.steer.bias
        weights = F.conv2d(x, self.steer.weight[of_filter], bias[of_filter])
        total = (of_pixel == torch.arange(4, device=x.device)[:, None]).to(x.dtype)[..., None, None]
        blocks = F.pixel_unshuffle(noise, 2)
        real, imaginary = (
            F.conv2d(self.filters(part) * weights, total) for part in (blocks[:, :4], blocks[:, 4:])
        )
        return torch.log(real.square() + imaginary.square() + 1e-3)


def _position(z: Tensor) -> Tensor:
    """Row and column of each latent in [−1, 1], (N, 2, h, w): the point spread depends on them."""
    rows = torch.linspace(-1, 1, z.shape[2], device=z.device, dtype=z.dtype)
    cols = torch.linspace(-1, 1, z.shape[3], device=z.device, dtype=z.dtype)
    grid = torch.stack(torch.meshgrid(rows, cols, indexing="ij"))
    return grid[None].expand(z.shape[0], -1, -1, -1)


class EchoCodec(Codec):
    """Encoder, decoder and the latents' mean and deviation (set once, after training)."""

    noisy = True
    mean: Tensor
    deviation: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = EchoEncoder(config), EchoDecoder(config)
        shape = (1, config.latent_channels, 1, 1)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(shape))

    def encode(self, frames: Tensor) -> Tensor:
        """Grey frames (N, 1, H, W) in [0, 1] → latents (N, C, H/8, W/8) of unit deviation."""
        return (self.encoder(frames) - self.mean) / self.deviation

    def raw(self, z: Tensor) -> Tensor:
        """With the deviation and mean they were divided by and lost."""
        return z * self.deviation + self.mean

    def paint(self, raw: Tensor, noise: Tensor) -> Tensor:
        """Raw latents (N, C, h, w), texture noise (N, 2, 8h, 8w) → frames (N, 1, 8h, 8w)."""
        return self.decoder(raw, noise)


class KLCodec(Codec):
    """diffusers' AutoencoderKL for grey frames; it keeps its own speckle and ignores the noise."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.vae = _autoencoder_kl(config)

    def encode(self, frames: Tensor) -> Tensor:
        """Grey frames (N, 1, H, W) in [0, 1] → latents (N, C, H/8, W/8): the posterior's mode."""
        rgb = frames.expand(-1, 3, -1, -1) * 2 - 1
        return self.vae.encode(rgb).latent_dist.mode() * self.scale

    def paint(self, raw: Tensor, noise: Tensor) -> Tensor:
        """Latents (N, C, h, w) → grey frames (N, 1, 8h, 8w); `noise` is not used."""
        rgb = self.vae.decode(raw / self.scale).sample
        return rgb.mean(1, keepdim=True) / 2 + 0.5


class SmallDecoder(Codec):
    """TAESD's decoder for grey frames; it only decodes.

    It takes latents of unit deviation, as TAESD does. Convolutions are all it has, without norms or
    attention: a pixel cannot change with what lies outside their reach.
    """

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.decoder = small_decoder(channels, widths)

    def paint(self, raw: Tensor, noise: Tensor) -> Tensor:
        """Latents (N, C, h, w) → grey frames (N, 1, 8h, 8w); `noise` is not used."""
        return self.decoder(raw) / 2 + 0.5


class SmallKLCodec(SmallDecoder):
    """AutoencoderKL's encoder, and a small decoder distilled from its own."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__(config.latent_channels, config.decoder_widths)
        self.scale = config.scale
        vae = _autoencoder_kl(config)
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def encode(self, frames: Tensor) -> Tensor:
        """As KLCodec's."""
        rgb = frames.expand(-1, 3, -1, -1) * 2 - 1
        return self.quant_conv(self.encoder(rgb)).chunk(2, dim=1)[0] * self.scale


def small_decoder(channels: int, widths: tuple[int, ...], colours: int = 1) -> Any:
    """diffusers' DecoderTiny, TAESD's network: latents (N, C, h, w) → (N, colours, 8h, 8w) in
    [−1, 1]. widths: four equal ones, one for each size of the picture."""
    from diffusers import AutoencoderTiny

    whole: Any = AutoencoderTiny(
        latent_channels=channels,
        out_channels=colours,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
    )
    return whole.decoder


def _autoencoder_kl(config: CodecConfig) -> Any:
    from diffusers import AutoencoderKL

    levels = len(config.widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.widths,
        layers_per_block=2,
        latent_channels=config.latent_channels,
        sample_size=512,
        scaling_factor=config.scale,
    )
