"""Latents that a trained denoiser makes of its own training clips' conditions: what the decoder
will really get. They are smoother than encoded ones, and a decoder that learned on these alone
draws too little grain on them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from heartbeat_fast.conditions import NAMES
from heartbeat_fast.generator import TEMPERATURE
from heartbeat_fast.models.embeddings import fingerprint
from heartbeat_training.ddim import mixed_noise, sample
from heartbeat_training.stage_diffusion import DiffusionStage

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
            # As the runtime starts: one tempered noise for all frames.
            noise = torch.Generator().manual_seed(clip)
            shape, shared = (1, *out.shape[1:]), stage.model.config.shared_start
            start = TEMPERATURE * mixed_noise(shape, shared, noise)
            with torch.autocast("cpu", torch.bfloat16):
                out[clip] = sample(stage.model, conditions, start)[0].numpy()
        part.rename(file)
    return np.load(file, mmap_mode="r")
