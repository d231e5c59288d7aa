"""A smaller decoder, distilled: it is to draw what the codec's own decoder draws of the same
latents and the same texture noise.

Both get the same noise, so even the grain has one right answer and L1 can ask for it: no critic is
needed. What L1 shrinks all the same, band power puts back, as in the texture stages. Legend: N
frames, C channels, h w latents, H W pixels.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from heartbeat_fast.models.codec import EchoCodec
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.speckle import texture
from heartbeat_training.stage_codec import LATENT_NOISE, PATCH, TEXTURES, amplitudes

# Finest first. Half of `tiny` at the finest level, where four fifths of the work is.
WIDTHS = (16, 32, 48)
BAND = 0.1


class DecoderStage:
    """The new decoder learns from latents (M, C, h, w) in unit deviation."""

    name = "decoder"

    def __init__(
        self, model: HeartBeat, latents: NDArray[Any], batch: int, widths: tuple[int, ...] = WIDTHS
    ) -> None:
        """model: its decoder teaches; `student` is a copy of the model with the new one."""
        assert isinstance(model.codec, EchoCodec)
        codec = replace(model.config.codec, decoder_widths=widths)
        self.student = HeartBeat(replace(model.config, codec=codec))
        kept = {k: v for k, v in model.state_dict().items() if not k.startswith("codec.decoder.")}
        self.student.load_state_dict(kept, strict=False)
        teacher, new = deepcopy(model.codec), self.student.codec
        assert isinstance(new, EchoCodec)
        # The steered filters do not depend on the widths: point spreads that were hard to find.
        new.decoder.filters.load_state_dict(teacher.decoder.filters.state_dict())
        self.teacher, self.decoder = teacher.requires_grad_(False), new.decoder
        self.latents, self.batch = latents, batch
        side = 8 * latents.shape[-1]
        bank = [texture(None, 1, side, seed)[0] for seed in range(TEXTURES)]
        self.bank = torch.from_numpy(np.stack(bank))

    def parameters(self) -> dict[str, nn.Parameter]:
        """The new decoder's."""
        return {f"decoder.{name}": p for name, p in self.decoder.named_parameters()}

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        """Raw latents, a little disturbed; texture noise; where patches begin."""
        few = len(self.latents) < self.batch
        picked = np.sort(rng.choice(len(self.latents), self.batch, replace=few))[rows]
        jitter = LATENT_NOISE * torch.randn(self.batch, *self.latents.shape[1:])[rows]
        z = torch.from_numpy(self.latents[picked].astype(np.float32))
        shift = torch.from_numpy(rng.integers(PATCH, size=2)).expand(len(picked), 2)
        z = z * self.teacher.deviation.cpu() + self.teacher.mean.cpu() + jitter
        noise = self.bank[rng.choice(TEXTURES, self.batch)[rows]]
        return {"z": z, "noise": noise, "shift": shift}

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """L1 + L1 of 8×8 means + difference of the mean power per frequency, in logarithms."""
        with torch.no_grad():
            wanted = self.teacher.decoder(batch["z"], batch["noise"]).float().clamp(0, 1)
        made = self.decoder(batch["z"], batch["noise"]).float()
        l1 = (made - wanted).abs().mean()
        low = (F.avg_pool2d(made, 8) - F.avg_pool2d(wanted, 8)).abs().mean()
        shift = tuple(int(v) for v in batch["shift"][0])
        power = [(amplitudes(x, shift) ** 2).mean(1) + 1e-3 for x in (made, wanted)]
        band = (power[0].log() - power[1].log()).abs().mean()
        return {"loss": l1 + low + BAND * band, "l1": l1, "low": low, "band": band}

    @torch.no_grad()
    def picture(self, step: int) -> NDArray[np.uint8]:
        """Rows: the teacher's frames, the student's of the same latents and noise."""
        place = self.teacher.mean.device
        rows = np.linspace(0, len(self.latents) - 1, 4).astype(int)
        z = torch.from_numpy(self.latents[rows].astype(np.float32)).to(place)
        z, noise = z * self.teacher.deviation + self.teacher.mean, self.bank[:4].to(place)
        made = [decoder(z, noise).clamp(0, 1) for decoder in (self.teacher.decoder, self.decoder)]
        wide = [torch.cat(list(x[:, 0]), 1) for x in made]
        return (torch.cat(wide) * 255).round().byte().cpu().numpy()
