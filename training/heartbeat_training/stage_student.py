"""A student that makes a clip in 1, 2 or 4 steps, without guidance.

It learns where the teacher's whole trajectory ends: from z at a step's time t to the teacher's
latents z_T of the same noise and conditions. Before the next step the estimate is noised again with
the noise the clip started from,

    z_{i+1} = √ᾱ_{i+1} ẑ(z_i, t_i) + √(1−ᾱ_{i+1}) h_0,

which keeps the sampler a table (few_step_table in heartbeat_export/sampler_tables.py) and a clip a
function of its seed. In training too ẑ is the student's own: it meets the errors it will make. A
regression to the end point blurs what the noise decides, but these latents hold anatomy and
brightness only, and the decoder makes the grain. Legend: B clips, F frames, C channels, h w
latents.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heartbeat_export.sampler_tables import few_step_times
from heartbeat_fast.models.embeddings import EmbeddingCache
from heartbeat_fast.models.heartbeat import HeartBeat, train_only
from heartbeat_fast.text import Tokenizer
from heartbeat_training.clips import ClipCache
from heartbeat_training.ddim import encoded
from heartbeat_training.generated import given, start
from heartbeat_training.stage_diffusion import DiffusionStage

COUNTS = (1, 2, 4)
CHANCE = (0.3, 0.4, 0.3)  # how often each count is practised
# Passes without gradients that go before the one that learns, on average: (count − 1) / 2.
BEFORE = sum(chance * (count - 1) / 2 for chance, count in zip(CHANCE, COUNTS, strict=True))


class StudentStage(DiffusionStage):
    """The whole denoiser learns; condition encoders and codec stay the teacher's."""

    def __init__(
        self,
        model: HeartBeat,
        cache: ClipCache,
        latents: NDArray[Any],
        tokenizer: Tokenizer,
        ends: NDArray[Any],
        *,
        batch: int,
        embeddings: EmbeddingCache | None = None,
    ) -> None:
        """ends: z_T (M, F, C, h, w) of the first M clips (generated.generated_latents)."""
        super().__init__(
            model, cache, latents, tokenizer, stage=2, batch=batch, embeddings=embeddings
        )
        self.name, self.ends = "student", ends
        self._learned = {
            name: p for name, p in model.named_parameters() if name.startswith("denoiser.")
        }
        train_only(model, self._learned)
        model.train()

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        """Conditions, the start h_0 and end z_T (B, F, C, h, w), and how many steps, of which which
        is learned (B, 2)."""
        count = int(rng.choice(COUNTS, p=CHANCE))
        which = int(rng.integers(count))
        few = len(self.ends) < self.batch
        clips = np.sort(rng.choice(len(self.ends), self.batch, replace=few))[rows]
        shape = self.ends.shape[1:]
        return self.conditions(clips, None, np.concatenate([given(c) for c in clips])) | {
            "start": torch.cat([start(self.model, int(c), shape) for c in clips]),
            "end": torch.from_numpy(self.ends[clips].astype(np.float32)),
            "place": torch.tensor([[count, which]]).expand(len(clips), 2),
        }

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean squared distance of one step's estimate from the teacher's end."""
        count, which = (int(v) for v in batch["place"][0])
        times = few_step_times(count, self.model.config.steps)
        alphas = self._alphas.to(batch["start"].device)
        local, text, image = encoded(self.model, batch)
        z, estimate = batch["start"], batch["start"]
        for i, t in enumerate(times[: which + 1]):
            a = alphas[t]
            if i:
                z = a.sqrt() * estimate + (1 - a).sqrt() * batch["start"]
            with torch.set_grad_enabled(i == which):
                out = self.model.denoiser(z, _all(t, z), local, text, image, True).float()
            estimate = _clean(z, out, a, self.model.config.prediction)
        loss = ((estimate - batch["end"]) ** 2).mean()
        return {"loss": loss, f"step_{which + 1}_of_{count}": loss.detach()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The denoiser's."""
        return self._learned

    def picture(self, step: int) -> None:
        """None: clips are looked at in full (heartbeat-bench pictures)."""


def _all(t: int, z: Tensor) -> Tensor:
    return torch.full((len(z),), t, device=z.device)


def _clean(z: Tensor, out: Tensor, a: Tensor, prediction: str) -> Tensor:
    """The estimate of clean latents in a model output at ᾱ = a."""
    if prediction == "v_prediction":
        return a.sqrt() * z - (1 - a).sqrt() * out
    return (z - (1 - a).sqrt() * out) / a.sqrt()
