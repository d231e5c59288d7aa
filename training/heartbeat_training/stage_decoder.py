"""A smaller decoder, distilled: it is to draw what the codec's own decoder draws of the same
latents and the same texture noise.

Both get the same noise, or none where the latents themselves hold the speckle, so even the grain
has one right answer and L1 can ask for it: no critic is needed. What L1 shrinks all the same, band
power puts back, as in the texture stages. Legend: N frames, C channels, h w latents, H W pixels.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from heartbeat_fast.models.codec import Codec, EchoCodec, SmallKLCodec, build_codec
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.speckle import texture
from heartbeat_training.stage_codec import LATENT_NOISE, PATCH, TEXTURES, amplitudes

# Finest first. Half of `tiny` at the finest level, where four fifths of the work is.
WIDTHS = (16, 32, 48)
# Of `base`, TAESD's own: a seventeenth of the work of Stable Diffusion's decoder.
WIDTHS_KL = (64, 64, 64, 64)
BAND = 0.1


def smaller(model: HeartBeat, widths: tuple[int, ...] = ()) -> HeartBeat:
    """The model with a new, narrower decoder, which knows nothing yet.

    widths: of the decoder; () for WIDTHS or WIDTHS_KL. An "echo" model is copied; one with Stable
    Diffusion's autoencoder, of 5 GB, lends all its other parts to the new one.
    """
    echo = isinstance(model.codec, EchoCodec)
    codec = replace(model.config.codec, decoder_widths=widths or (WIDTHS if echo else WIDTHS_KL))
    config = replace(model.config, codec=codec)
    if isinstance(model.codec, EchoCodec):
        student = HeartBeat(config)
        kept = {k: v for k, v in model.state_dict().items() if not k.startswith("codec.decoder.")}
        student.load_state_dict(kept, strict=False)
        new = student.codec
        assert isinstance(new, EchoCodec)
        # The steered filters do not depend on the widths: point spreads that were hard to find.
        new.decoder.filters.load_state_dict(model.codec.decoder.filters.state_dict())
        return student
    made = build_codec(codec)
    assert isinstance(made, SmallKLCodec)
    vae: Any = model.codec.get_submodule("vae")
    made.encoder, made.quant_conv = vae.encoder, vae.quant_conv
    with torch.device("meta"):
        student = HeartBeat(config)
    for name, part in model.named_children():
        setattr(student, name, made if name == "codec" else part)
    return student


class DecoderStage:
    """A decoder learns from latents (M, C, h, w) in unit deviation.

    teacher: draws the targets. student: a codec of the same latents; its `decoder` learns.
    """

    name = "decoder"

    def __init__(self, teacher: Codec, student: Codec, latents: NDArray[Any], batch: int) -> None:
        self.teacher, self.student = deepcopy(teacher).requires_grad_(False), student
        self.decoder = student.get_submodule("decoder")
        self.latents, self.batch = latents, batch
        if not teacher.noisy:
            self.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        side = 8 * latents.shape[-1]
        bank = [texture(None, 1, side, seed)[0] for seed in range(TEXTURES if teacher.noisy else 0)]
        self.bank = torch.from_numpy(np.stack(bank)) if bank else torch.zeros(TEXTURES, 0)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The new decoder's."""
        return {f"decoder.{name}": p for name, p in self.decoder.named_parameters()}

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        """Latents, what disturbs them a little, texture noise, where patches begin."""
        few = len(self.latents) < self.batch
        picked = np.sort(rng.choice(len(self.latents), self.batch, replace=few))[rows]
        jitter = LATENT_NOISE * torch.randn(self.batch, *self.latents.shape[1:])[rows]
        z = torch.from_numpy(self.latents[picked].astype(np.float32))
        shift = torch.from_numpy(rng.integers(PATCH, size=2)).expand(len(picked), 2)
        noise = self.bank[rng.choice(TEXTURES, self.batch)[rows]]
        return {"z": z, "jitter": jitter, "noise": noise, "shift": shift}

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """L1 + L1 of 8×8 means + difference of the mean power per frequency, in logarithms.

        Where the latents hold the speckle, of 8×8 deviations too: a spectrum is a mean over places,
        and a student that cannot yet draw every grain keeps it with a few bright ones.
        """
        raw, noise = self.teacher.raw(batch["z"]) + batch["jitter"], batch["noise"]
        with torch.no_grad():
            wanted = self.teacher.paint(raw, noise).float().clamp(0, 1)
        made = self.student.paint(raw, noise).float()
        l1 = (made - wanted).abs().mean()
        low = (F.avg_pool2d(made, 8) - F.avg_pool2d(wanted, 8)).abs().mean()
        shift = tuple(int(v) for v in batch["shift"][0])
        power = [(amplitudes(x, shift) ** 2).mean(1) + 1e-3 for x in (made, wanted)]
        band = (power[0].log() - power[1].log()).abs().mean()
        terms = {"l1": l1, "low": low, "band": band}
        total = l1 + low + BAND * band
        if not self.teacher.noisy:
            terms["deviation"] = (_deviation(made) - _deviation(wanted)).abs().mean()
            total = total + terms["deviation"]
        return {"loss": total, **terms}

    @torch.no_grad()
    def picture(self, step: int) -> NDArray[np.uint8]:
        """Rows: the teacher's frames, the student's of the same latents and noise."""
        place = next(iter(self.decoder.parameters())).device
        rows = np.linspace(0, len(self.latents) - 1, 4).astype(int)
        z = torch.from_numpy(self.latents[rows].astype(np.float32)).to(place)
        noise = self.bank[:4].to(place)
        made = [codec.decode(z, noise) for codec in (self.teacher, self.student)]
        wide = [torch.cat(list(x[:, 0]), 1) for x in made]
        return (torch.cat(wide) * 255).round().byte().cpu().numpy()


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of every 8×8 window of (N, 1, H, W), windows every 4 pixels."""
    mean = F.avg_pool2d(x, 8, 4)
    variance = F.avg_pool2d(x * x, 8, 4) - mean * mean
    return (variance.clamp_min(0) + 1e-5).sqrt()
