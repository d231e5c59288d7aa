"""The codec on real frames, whose scatterers nobody knows: blurred L1 for what latents can say,
band power and a patch discriminator for the grain they cannot.

The decoder makes grain from texture noise as after the phantom stages; only what holds it to the
truth differs. Discriminator and codec learn in one step: each sees the other as a constant. Legend:
N frames, H W pixels.
"""

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from heartbeat_fast.models.codec import EchoCodec
from heartbeat_fast.speckle import texture
from heartbeat_training.stage_codec import LATENT_NOISE, PATCH, TEXTURES, amplitudes, normalise

BLUR = 2.5  # pixels: the critic sees what is finer than this magnified
# What is smoother than this is anatomy and asked for pixel by pixel. With 2.5 pixels grain of 0.08
# to 0.13 cycles/pixel, which real tissue is full of, was punished too and missed 2 dB.
SMOOTH = 6.0
WIDTHS = (32, 64, 96)
# Weights of the losses. Plain L1 punishes every grain that is not the real one: with weight 1 the
# decoder drew smears and a regular dot pattern that only had the right power (docs/decisions.md).
LOW, PLAIN, OUTSIDE, ADVERSARIAL, BAND, HOLD = 4.0, 0.1, 2.0, 0.05, 0.3, 0.01
WARM = 150  # steps before the discriminator is believed
# Groups of frequencies whose power is compared: rings (cycles/pixel), each in four orientations,
# since grain lies across the beam.
# Up to the spectrum's corner: left out, the finest ones filled with a checkerboard of period 2.
BANDS, LOWEST, HIGHEST, WAYS = 15, 0.02, 0.7325, 4
GRAIN = 0.07  # cycles/pixel from which power has to come from the noise
FLOOR = 0.01  # of a patch's band power, (grey/255)²: a Hann window of 32² times deviation 0.008
TISSUE = (0.25, 0.8)  # mean grey over SPECKLED pixels where mean power is asked for
SPECKLED, RIM = 4.0, 3  # pixels
GAIN = 8.0  # grain is a twentieth of the grey range; the critic is to see it first
SLOW = 4.0  # a critic's weights start this large: normalised, they turn this much slower than ours


class PatchCritic(nn.Module):
    """Frames (N, 1, H, W) → one score per 22×22 patch; real high, made low.

    Every weight is divided by its largest singular value (Miyato et al., 1802.05957), computed
    exactly: the matrices are small, and power iteration would carry state from step to step.
    """

    def __init__(self) -> None:
        super().__init__()
        sides = (2, *WIDTHS)
        self.weights = nn.ParameterList(
            nn.Parameter(SLOW * torch.randn(b, a, 4, 4) / (16 * a) ** 0.5)
            for a, b in pairwise(sides)
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(b)) for b in WIDTHS)
        self.out = nn.Parameter(torch.randn(1, WIDTHS[-1], 1, 1) / WIDTHS[-1] ** 0.5)

    def forward(self, frames: Tensor, frozen: bool = False) -> Tensor:
        low = blur(frames, BLUR)
        x = torch.cat([low, GAIN * (frames - low)], 1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            w, b = (weight.detach(), bias.detach()) if frozen else (weight, bias)
            w = w / torch.linalg.matrix_norm(w.flatten(1).float(), ord=2)
            x = F.leaky_relu(F.conv2d(x, w.to(x.dtype), b.to(x.dtype), stride=2), 0.2)
        out = self.out.detach() if frozen else self.out
        return F.conv2d(x, out / torch.linalg.vector_norm(out))


def blur(frames: Tensor, sigma: float) -> Tensor:
    """Gaussian of σ pixels, (N, 1, H, W), edges repeated."""
    reach = int(2.5 * sigma)
    taps = torch.arange(-reach, reach + 1, device=frames.device, dtype=frames.dtype)
    taps = torch.exp(-((taps / sigma) ** 2) / 2)
    taps = (taps / taps.sum()).reshape(1, 1, 1, -1)
    padded = F.pad(frames, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, taps), taps.transpose(2, 3))


class AdversarialCodecStage:
    """Codec and critic on frames (M, H, W) uint8; the encoder learns only in a codec from scratch.

    A trained encoder stays as it is: its latents hold no grain, and a denoiser may already know
    them. With `generated`, latents (M, C, h, w) that a denoiser made of the frames' conditions, the
    decoder learns to draw real grain on those: they are smoother than encoded ones.
    """

    def __init__(
        self,
        codec: EchoCodec,
        frames: NDArray[np.uint8],
        batch: int,
        *,
        encoder: bool,
        generated: NDArray[np.float16] | None = None,
    ) -> None:
        self.name = "codec" if generated is None else "texture"
        self.generated = generated
        self.codec = codec.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.frames, self.batch, self.encoder = frames, batch, encoder
        self.critic = PatchCritic()
        bank = [texture(None, 1, frames.shape[-1], seed)[0] for seed in range(TEXTURES)]
        self.bank = torch.from_numpy(np.stack(bank))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Decoder and critic, and a new codec's encoder."""
        kept = "" if self.encoder else "decoder."
        found = {k: p for k, p in self.codec.named_parameters() if k.startswith(kept)}
        return found | {f"critic.{k}": p for k, p in self.critic.named_parameters()}

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        """Frames, texture noise, what disturbs the latents, where patches begin, the step."""
        few = len(self.frames) < self.batch
        picked = np.sort(rng.choice(len(self.frames), self.batch, replace=few))[rows]
        side = self.frames.shape[-1] // 8
        jitter = torch.randn(self.batch, self.codec.mean.shape[1], side, side)
        shift = torch.from_numpy(rng.integers(PATCH, size=2)).expand(len(picked), 2)
        made = {}
        if self.generated is not None:
            made["latents"] = torch.from_numpy(self.generated[picked].astype(np.float32))
        return made | {
            "frames": self._grey(picked),
            "noise": self.bank[rng.choice(TEXTURES, self.batch)[rows]],
            "other": self.bank[rng.choice(TEXTURES, self.batch)[rows]],
            "jitter": LATENT_NOISE * jitter[rows],
            "shift": shift,
            "step": torch.full((len(picked),), step),
        }

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """L1 of blurred frames + L1 + band power + hinge losses of both players.

        Fine bands are asked of the difference of two decodings too: (y₁ − y₂)/√2 has the power of
        what noise makes, and no pattern drawn from the latents can stand in for it.
        """
        real = batch["frames"]
        with torch.set_grad_enabled(self.encoder):
            z = self._latents(batch)
        made = self.codec.decoder(z + batch["jitter"], batch["noise"]).float()
        twin = self.codec.decoder(z + batch["jitter"], batch["other"]).float()
        outside = (made.abs() * (F.max_pool2d(real, 3, 1, 1) == 0)).mean()
        l1, low = (made - real).abs().mean(), (blur(made, SMOOTH) - blur(real, SMOOTH)).abs().mean()
        shift = tuple(int(v) for v in batch["shift"][0])
        powers = [_power(x, shift) for x in (made, (made - twin) / 2**0.5, real)]
        drawn, noise, wanted = ((p + FLOOR).log() for p in powers)
        band = (drawn - wanted).abs().mean()
        grain = (noise - wanted)[..., FINE:].abs().mean()
        # |x| seeks the median over patches, 1–2 dB under their mean: so the mean is asked for too,
        # over tissue alone: echoes of valves and edges of chambers hid that walls lacked 1–2 dB.
        tissue = _tissue(real)
        means = [(_mean_power(x, tissue, shift) + FLOOR).log() for x in (made, real)]
        whole = (means[0] - means[1]).abs().mean()
        fool = -self.critic(made, frozen=True).float().mean()
        judge = (
            F.relu(1 - self.critic(real).float()).mean()
            + F.relu(1 + self.critic(made.detach()).float()).mean()
        )
        believed = ADVERSARIAL if int(batch["step"][0]) >= WARM else 0.0
        loss = (
            LOW * low
            + PLAIN * l1
            + OUTSIDE * outside
            + BAND * (band / 2 + 4 * whole + grain)
            + believed * fool
            + judge
        )
        scalars = {
            "l1": l1,
            "low": low,
            "outside": outside,
            "band": band,
            "whole": whole,
            "grain": grain,
            "fool": fool,
            "judge": judge,
        }
        if self.encoder:
            mean, var = z.float().mean((0, 2, 3)), z.float().var((0, 2, 3))
            scalars["hold"] = (mean**2).mean() + ((var - 1) ** 2).mean()
            loss = loss + HOLD * scalars["hold"]
        return {"loss": loss} | scalars

    def _latents(self, batch: dict[str, Tensor]) -> Tensor:
        """Raw latents that the decoder gets: generated ones where there are any."""
        if "latents" in batch:
            return batch["latents"] * self.codec.deviation + self.codec.mean
        return self.codec.encoder(batch["frames"])

    def _grey(self, rows: NDArray[Any]) -> Tensor:
        return torch.from_numpy(self.frames[rows].astype(np.float32) / 255)[:, None]

    @torch.no_grad()
    def picture(self, step: int) -> NDArray[np.uint8]:
        """Rows: real, decoded with noise, decoded without."""
        place = self.codec.mean.device
        rows = np.linspace(0, len(self.frames) - 1, 4).astype(int)
        batch = {"frames": self._grey(rows).to(place)}
        if self.generated is not None:
            batch["latents"] = torch.from_numpy(self.generated[rows].astype(np.float32)).to(place)
        z, noise = self._latents(batch), self.bank[:4].to(place)
        strips = [batch["frames"], self.codec.decoder(z, noise), self.codec.decoder(z, 0 * noise)]
        wide = [torch.cat(list(x.clamp(0, 1)[:, 0]), 1) for x in strips]
        return (torch.cat(wide) * 255).round().byte().cpu().numpy()

    @torch.no_grad()
    def finish(self, samples: int = 256) -> None:
        """A new encoder's latents get their mean and deviation from `samples` frames."""
        if not self.encoder:
            return
        rows = np.linspace(0, len(self.frames) - 1, min(samples, len(self.frames))).astype(int)
        normalise(self.codec, self._grey(rows))


def _power(frames: Tensor, shift: tuple[int, ...]) -> Tensor:
    """Power in each group of frequencies of each patch: (N, 1, H, W) → (N, patches, groups)."""
    power = amplitudes(frames, shift) ** 2
    return power.flatten(-2) @ torch.from_numpy(_groups(power.shape[-2])).to(power)


def _tissue(frames: Tensor) -> Tensor:
    """Where there is speckle to judge, soft-edged (N, 1, H, W): as metrics.tissue has it, neither
    blood nor clipped and off the rim, but without labels.
    """
    mean = blur(frames, SPECKLED)
    odd = ((mean <= TISSUE[0]) | (mean >= TISSUE[1])).to(frames)
    return blur(1 - F.max_pool2d(odd, 2 * RIM + 1, 1, RIM), 1.5)


def _mean_power(frames: Tensor, tissue: Tensor, shift: tuple[int, ...]) -> Tensor:
    """Power in each group of frequencies (N, groups), averaged over patches that are half tissue,
    windowed to their tissue; 0 where there are none.
    """
    side = min(PATCH, frames.shape[-1] // 2)
    cut = [
        x[:, 0, shift[0] % side :, shift[1] % side :]
        .unfold(1, side, side)
        .unfold(2, side, side)
        .flatten(1, 2)
        for x in (frames, tissue)
    ]
    hann = torch.hann_window(side, device=frames.device)
    window = cut[1] * hann[:, None] * hann
    norm = window.sum((-2, -1), keepdim=True).clamp(min=1e-3)
    patches = (cut[0] - (cut[0] * window).sum((-2, -1), keepdim=True) / norm) * window
    power = torch.fft.rfft2(patches).abs() ** 2
    power = power * (hann**2).sum() ** 2 / (window**2).sum((-2, -1), keepdim=True).clamp(min=1e-3)
    groups = power.flatten(-2) @ torch.from_numpy(_groups(side)).to(power)
    good = (cut[1].mean((-2, -1)) >= 0.5).to(power)[..., None]
    return (groups * good).sum(1) / good.sum(1).clamp(min=1)


@cache
def _groups(side: int) -> NDArray[np.float32]:
    """Which bins of a half spectrum (side × side/2+1) a group averages: (bins, groups), column sums
    1; rings first to last, each in WAYS orientations. An empty group compares equal.
    """
    row, col = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    ring = np.floor((np.hypot(row, col) - LOWEST) / (HIGHEST - LOWEST) * BANDS)
    way = np.round(np.arctan2(row, col) / np.pi * WAYS) % WAYS
    group = np.where((ring >= 0) & (ring < BANDS), ring * WAYS + way, -1).ravel()
    member = group[:, None] == np.arange(BANDS * WAYS)
    return np.asarray(member / np.maximum(member.sum(0), 1), np.float32)


FINE = WAYS * round((GRAIN - LOWEST) / (HIGHEST - LOWEST) * BANDS)  # first group of grain
