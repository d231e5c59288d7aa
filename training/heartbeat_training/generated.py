"""Latents that a trained denoiser makes of its own training clips' conditions: what the decoder
will really get. They are smoother than encoded ones, and a decoder that learned on these alone
draws too little grain on them.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heartbeat_fast.conditions import NAMES
from heartbeat_fast.generator import TEMPERATURE
from heartbeat_fast.models.embeddings import fingerprint
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_training.stage_diffusion import DiffusionStage, alphas_cumprod, mixed_noise

STEPS = 10  # DDIM: for smoothness' sake any solver at the default number of steps will do
FEWER = 0.25  # share of clips made from a random subset of their conditions


def generated_latents(stage: DiffusionStage, folder: Path) -> NDArray[Any]:
    """Latents (M, F, C, h, w) float16 of every clip of a stage's cache, written once per model.

    A quarter of the clips is made from some conditions only, the rest from all they have.
    """
    file = folder / f"generated-{fingerprint(stage.model)[:16]}.npy"
    if not file.exists():
        stage.model.eval()
        part = file.with_suffix(".part")
        out = np.lib.format.open_memmap(part, "w+", np.float16, stage.latents.shape)
        for clip in range(len(out)):
            rng = np.random.Generator(np.random.PCG64([0x6E4, clip]))
            keep = 0.5 if rng.random() < FEWER else 1.0
            present = (rng.random((1, len(NAMES))) < keep).astype(np.float32)
            conditions = stage.conditions(np.array([clip]), None, present)
            noise = torch.Generator().manual_seed(clip)
            out[clip] = sample(stage.model, conditions, out.shape[1:], noise)[0].numpy()
        part.rename(file)
    return np.load(file, mmap_mode="r")


@torch.no_grad()
def sample(
    model: HeartBeat,
    conditions: dict[str, Tensor],
    shape: tuple[int, ...],
    noise: torch.Generator,
    steps: int = STEPS,
) -> Tensor:
    """DDIM as the runtime starts it: one tempered noise for all frames. (1, F, C, h, w)."""
    c, config = conditions, model.config
    with torch.autocast("cpu", torch.bfloat16):
        text = model.text_context(c["tokens"], c["ef"], c["present"])
        image = model.image_context(c["image"], c["present"])
        local = model.local_features(c["sketch"], c["mask"], c["skeleton"], c["flow"], c["present"])
        alphas = alphas_cumprod(model)
        z = TEMPERATURE * mixed_noise((1, *shape), config.shared_start, noise)
        times = torch.linspace(config.steps - 1, 0, steps + 1).round().long()
        for now, then in pairwise(times):
            out = model.denoiser(z, now.expand(1), local, text, image, True).float()
            a, b = alphas[now], alphas[then]
            if config.prediction == "v_prediction":
                z0, e = a.sqrt() * z - (1 - a).sqrt() * out, a.sqrt() * out + (1 - a).sqrt() * z
            else:
                z0, e = (z - (1 - a).sqrt() * out) / a.sqrt(), out
            z = b.sqrt() * z0 + (1 - b).sqrt() * e
    return z
