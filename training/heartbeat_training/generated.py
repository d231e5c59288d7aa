"""Latents that a trained denoiser makes of its own training clips' conditions: what a decoder will
really get, and what a few-step student is to reach in fewer steps.

They are smoother than encoded ones, and a decoder that learned on these alone draws too little
grain on them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heartbeat_export.sampler_tables import probe, scheduler
from heartbeat_fast import sampler
from heartbeat_fast.conditions import NAMES
from heartbeat_fast.generator import TEMPERATURE
from heartbeat_fast.models.embeddings import fingerprint
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_training.ddim import encoded, mixed_noise
from heartbeat_training.stage_diffusion import IS_LOCAL, DiffusionStage

FEWER = 0.25  # share of clips made from a random subset of their conditions
# From this clip on every one is, every other without local ones: one step from text alone was a
# smear without.
FEWER_FROM = 600
STEPS = 10  # of DPM-Solver++ 2M


def generated_latents(stage: DiffusionStage, folder: Path, most: int = 0) -> NDArray[Any]:
    """Latents (M, F, C, h, w) float16 of a cache's clips, written once per model.

    Some clips are made from a part of their conditions (`given`), the rest from all they have. A
    killed run goes on where it was.

    Args:
        most: of the first so many clips only; 0: of all.
    """
    file = folder / f"generated-{fingerprint(stage.model)[:16]}{f'-{most}' if most else ''}.npy"
    if not file.exists():
        stage.model.eval()
        part, shape = file.with_suffix(".part"), stage.latents.shape
        shape = (min(most or shape[0], shape[0]), *shape[1:])
        out = np.lib.format.open_memmap(part, "r+" if part.exists() else "w+", np.float16, shape)
        for clip in range(len(out)):
            if not out[clip].any():
                out[clip] = _generate(stage, clip)
        part.rename(file)
    return np.load(file, mmap_mode="r")


def given(clip: int) -> NDArray[np.float32]:
    """Which conditions (1, 7) a clip's latents are made from."""
    rng = np.random.Generator(np.random.PCG64([0x6E4, clip]))
    keep = 0.5 if clip >= FEWER_FROM or rng.random() < FEWER else 1.0
    kept = rng.random((1, len(NAMES))) < keep
    if clip >= FEWER_FROM and clip % 2:
        kept[:, IS_LOCAL] = False
    return kept.astype(np.float32)


def start(model: HeartBeat, clip: int, shape: tuple[int, ...]) -> Tensor:
    """The noise (1, F, C, h, w) they start from: tempered, common to all frames, as at run time."""
    noise = torch.Generator().manual_seed(clip)
    return TEMPERATURE * mixed_noise((1, *shape), model.config.shared_start, noise)


@torch.no_grad()
def _generate(stage: DiffusionStage, clip: int) -> NDArray[np.float32]:
    model, config = stage.model, stage.model.config
    solver = scheduler(
        "dpmpp_2m",
        config.prediction,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.schedule,
        num_train_timesteps=config.steps,
    )
    table = probe("dpmpp_2m", solver, STEPS)
    place = next(model.parameters()).device
    conditions = stage.conditions(np.array([clip]), None, given(clip))
    with torch.autocast(place.type, torch.bfloat16):
        local, text, image = encoded(model, {k: v.to(place) for k, v in conditions.items()})

        def denoise(z: NDArray[np.float32], i: int) -> NDArray[np.float32]:
            t = torch.tensor([int(table.timesteps[i])], device=place)
            out = model.denoiser(torch.from_numpy(z).to(place), t, local, text, image, True)
            return np.asarray(out.float().cpu().numpy())

        noise = start(model, clip, stage.latents.shape[1:]).numpy()
        return sampler.sample(table, denoise, noise)[0]
