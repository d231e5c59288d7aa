"""Training the codec: encode one speckle, decode another, told which scatterers made it.

The encoder sees a frame A, the decoder gets A's latents and the scatterer field of a frame B: the
same anatomy, other scatterers; the target is B. So the latents cannot carry grain, and the decoder
learns to make grain from noise: plain regression, no discriminator (docs/decisions.md, 2026-11-21).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from heartbeat_fast.models.codec import EchoCodec
from heartbeat_fast.speckle import texture
from heartbeat_training.phantom import render_pair

LATENT_NOISE = (
    0.08  # of the latents' deviation: the denoiser's error, which the decoder must forgive
)


class PairCache:
    """Frames with two independent speckles and the second one's field, in memory-mapped files.

    a, b: (M, H, W) uint8; noise: (M, 2, H, W) float16.
    """

    def __init__(self, folder: Path) -> None:
        self.a, self.b, self.noise = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("a", "b", "noise")
        )

    def __len__(self) -> int:
        return len(self.a)

    @staticmethod
    def build(folder: Path, seeds: range, frames: int, size: int) -> None:
        """Render phantoms of the given seeds into `folder`; done before → nothing to do."""
        if (folder / "done").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        count = len(seeds) * frames
        open_map = np.lib.format.open_memmap
        a = open_map(folder / "a.npy", "w+", np.uint8, (count, size, size))
        b = open_map(folder / "b.npy", "w+", np.uint8, (count, size, size))
        noise = open_map(folder / "noise.npy", "w+", np.float16, (count, 2, size, size))
        for i, seed in enumerate(seeds):
            rows = slice(i * frames, (i + 1) * frames)
            a[rows], b[rows], noise[rows] = render_pair(seed, frames, size)
        (folder / "done").touch()


class CodecStage:
    """L1 on speckle B from latents of speckle A, with a hold on the latents' scale."""

    name = "codec"

    def __init__(self, codec: EchoCodec, cache: PairCache, batch: int) -> None:
        self.codec = codec.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.cache, self.batch = cache, batch

    def parameters(self) -> dict[str, nn.Parameter]:
        """Encoder and decoder."""
        return dict(self.codec.named_parameters())

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        """Frames a and b, b's noise field, and what disturbs the latents."""
        picked = np.sort(rng.choice(len(self.cache), self.batch, replace=False))
        a, b, noise = self._batch(picked)
        channels = self.codec.mean.shape[1]
        jitter = LATENT_NOISE * torch.randn(self.batch, channels, a.shape[2] // 8, a.shape[3] // 8)
        batch = {"a": a, "b": b, "noise": noise, "jitter": jitter}
        return {name: tensor[rows] for name, tensor in batch.items()}

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """L1 + a weak pull of each latent channel to zero mean and unit deviation."""
        b = batch["b"]
        z = self.codec.encoder(batch["a"])
        mean, var = z.float().mean((0, 2, 3)), z.float().var((0, 2, 3))
        hold = (mean**2).mean() + ((var - 1) ** 2).mean()
        pred = self.codec.decoder(z + batch["jitter"], batch["noise"]).float()
        l1 = (pred - b).abs().mean()
        # low-pass agreement: brightness and borders, which half the pixels' grain would outvote
        low = (F.avg_pool2d(pred, 8) - F.avg_pool2d(b, 8)).abs().mean()
        return {"loss": l1 + low + 0.01 * hold, "l1": l1, "low": low, "hold": hold}

    def _batch(self, rows: NDArray[Any]) -> tuple[Tensor, Tensor, Tensor]:
        def grey(images: NDArray[np.uint8]) -> Tensor:
            return torch.from_numpy(images[rows].astype(np.float32) / 255)[:, None]

        noise = torch.from_numpy(self.cache.noise[rows].astype(np.float32))
        # The field ends with the sector, the texture noise of a generated clip does not: the
        # decoder has to learn that nothing echoes outside.
        noise = torch.where(noise == 0, torch.randn_like(noise), noise)
        return grey(self.cache.a), grey(self.cache.b), noise

    @torch.no_grad()
    def picture(self, step: int) -> NDArray[np.uint8]:
        """Rows: source A, target B, decoded with B's field, decoded with fresh noise."""
        a, b, noise = self._batch(np.arange(0, len(self.cache), max(len(self.cache) // 4, 1))[:4])
        z = self.codec.encoder(a)
        same = self.codec.decoder(z, noise).clamp(0, 1)
        drawn = texture(None, 1, b.shape[-1], step).repeat(len(b), 0)
        fresh = self.codec.decoder(z, torch.from_numpy(drawn)).clamp(0, 1)
        rows = [torch.cat(list(x[:, 0]), 1) for x in (a, b, same, fresh)]
        return (torch.cat(rows) * 255).round().byte().numpy()

    @torch.no_grad()
    def finish(self, samples: int = 256) -> None:
        """Set the latents' mean and deviation from the first `samples` frames."""
        frames = torch.from_numpy(self.cache.a[:samples].astype(np.float32) / 255)[:, None]
        normalise(self.codec, frames)


def normalise(codec: EchoCodec, frames: Tensor) -> None:
    """Set the latents' mean and deviation from frames (N, 1, H, W)."""
    z = torch.cat([codec.encoder(part) for part in frames.split(16)])
    codec.mean.copy_(z.mean((0, 2, 3), keepdim=True))
    codec.deviation.copy_(z.std((0, 2, 3), keepdim=True))


class TextureStage(CodecStage):
    """The decoder alone, held to the spectrum of speckle.

    L1 shrinks whatever the decoder cannot foresee: after the codec stage tissue lacked 2–5 dB
    between 0.05 and 0.2 cycles/pixel. Amplitudes of 32×32 patches, whose phase does not matter, put
    it back.
    """

    name = "texture"

    def __init__(self, codec: EchoCodec, cache: PairCache, batch: int) -> None:
        super().__init__(codec, cache, batch)
        side = cache.a.shape[-1]
        bank = [texture(None, 1, side, seed)[0] for seed in range(TEXTURES)]
        self.bank = torch.from_numpy(np.stack(bank))

    def parameters(self) -> dict[str, nn.Parameter]:
        """The decoder; latents stay as they are."""
        return {k: p for k, p in self.codec.named_parameters() if k.startswith("decoder.")}

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        """As in the codec stage, with noise as drawn at inference and where patches begin."""
        batch = super().draw(step, rng, rows)
        shift = torch.from_numpy(rng.integers(PATCH, size=2))
        drawn = self.bank[rng.choice(TEXTURES, self.batch)][rows]
        return batch | {"shift": shift.expand(len(drawn), 2), "drawn": drawn}

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """L1 + low-pass L1 + amplitude and mean-power differences of patches."""
        b = batch["b"]
        with torch.no_grad():
            z = self.codec.encoder(batch["a"])
        pred = self.codec.decoder(z + batch["jitter"], batch["noise"]).float()
        l1 = (pred - b).abs().mean()
        low = (F.avg_pool2d(pred, 8) - F.avg_pool2d(b, 8)).abs().mean()
        shift = tuple(int(v) for v in batch["shift"][0])
        made, real = amplitudes(pred, shift), amplitudes(b, shift)
        scale = real.mean((0, 1), keepdim=True) + 1e-6
        bins = ((made - real).abs() / scale).mean()
        # Per image, the mean power under noise as it is drawn at inference: no pairing to lean on,
        # and no median to seek, which undershoots a mean by 1–2 dB.
        drawn = self.codec.decoder(z, batch["drawn"]).float()
        power = [(x**2).mean(1) + 1e-6 for x in (amplitudes(drawn, shift), real)]
        band = (power[0].log() - power[1].log()).abs().mean()
        loss = l1 + low + 0.03 * bins + 0.1 * band
        return {"loss": loss, "l1": l1, "low": low, "bins": bins, "band": band}


PATCH = 32
TEXTURES = 64  # noise fields drawn as at inference


def amplitudes(images: Tensor, shift: tuple[int, ...]) -> Tensor:
    """Fourier amplitudes of Hann-windowed patches: (N, 1, H, W) → (N, patches, 32, 17)."""
    side = min(PATCH, images.shape[-1] // 2)
    images = images[:, 0, shift[0] % side :, shift[1] % side :]
    patches = images.unfold(1, side, side).unfold(2, side, side).flatten(1, 2)
    window = torch.hann_window(side, device=images.device)
    window = window[:, None] * window
    patches = patches - patches.mean((-2, -1), keepdim=True)
    return torch.fft.rfft2(patches * window).abs()
