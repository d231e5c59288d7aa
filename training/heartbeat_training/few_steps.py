"""From a trained model to a fast one: a denoiser of 1, 2 and 4 steps, then a smaller decoder.

One recipe for all presets. What differs follows from the codec: an "echo" decoder draws grain from
noise and learns on generated latents alone; Stable Diffusion's latents hold the grain, so its small
decoder learns on encoded frames too, which hold more of it than generated ones.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from heartbeat_export.build import weights_of
from heartbeat_fast.models.autoencoders import load_small_decoder, width_of
from heartbeat_fast.models.codec import SmallKLCodec
from heartbeat_fast.models.embeddings import EmbeddingCache
from heartbeat_fast.models.graphs import round_to_half
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer
from heartbeat_training.clips import ClipCache
from heartbeat_training.generated import generated_latents
from heartbeat_training.hardware import Hardware
from heartbeat_training.loop import Recipe, train
from heartbeat_training.processes import main_first, pick_device
from heartbeat_training.recipes import Plan
from heartbeat_training.stage_decoder import DecoderStage, smaller
from heartbeat_training.stage_diffusion import DiffusionStage, encode_cache
from heartbeat_training.stage_student import COUNTS, StudentStage

STAGES = ("student", "decoder")


@dataclass(frozen=True)
class Fewer:
    """The recipes of both stages; `Plan` has them too.

    ends: clips whose latents the many-step model makes for both; 0: all. phantoms: how many clips
    there are where no data are given.
    """

    student: Recipe
    decoder: Recipe
    ends: int = 0
    phantoms: int = 1000


# Of `base`. Never run at that size: lengths are taken over from `tiny` and made cautious; the rate
# is 0.6 of the teacher's as there, for the student has v to learn first.
BASE = Fewer(
    student=Recipe(steps=8000, batch=16, lr=6e-5, warmup=500),
    decoder=Recipe(steps=20_000, batch=16, lr=5e-4, warmup=500),
)


def provenance(teacher: Path, plan: Plan | Fewer) -> dict[str, Any]:
    """What a distilled model's provenance says: its teacher's story, and its own recipe."""
    told = json.loads((teacher / "provenance.json").read_text("utf-8"))
    recipe = {"student": asdict(plan.student), "decoder": asdict(plan.decoder), "clips": plan.ends}
    weights = weights_of(round_to_half(HeartBeat.from_pretrained(teacher)))
    return {k: told[k] for k in ("plan", "as_run", "init") if k in told} | {
        "distilled": {"teacher": weights, **recipe}
    }


def distil(
    stage: str,
    model: HeartBeat,
    teacher: Path,
    clips: tuple[ClipCache, Path],
    plan: Plan | Fewer,
    run: Path,
    words: Tokenizer,
    console: Console,
    hardware: Hardware | None = None,
    *,
    embeddings: EmbeddingCache | None = None,
    start: Path | None = None,
) -> HeartBeat:
    """Run a stage of STAGES to its end.

    Args:
        model: what the stage starts from. teacher: folder of the many-step model, which made the
            latents that both stages learn on.
        clips: cache and where it lies.
        embeddings: of the image prior, where its encoder takes seconds an image.
        start: TAESD's decoder, which the small decoder of `base` begins as.

    Returns: the faster model, whose config says how.

    Raises: CheckpointError: `start` does not fit.
    """
    cache, folder = clips
    hardware = hardware or Hardware()
    with main_first():
        ends = _ends(teacher, clips, plan, words, hardware, embeddings)
    if stage == "student":
        # Whatever its teacher predicts: an error of predicted noise reaches the estimate of clean
        # latents √((1 − ᾱ)/ᾱ) times as large, 14.6 in the first step; one of v, not enlarged.
        model.config = replace(model.config, few_steps=COUNTS, prediction="v_prediction")
        latents = np.broadcast_to(np.float16(0), (len(cache), *ends.shape[1:]))
        batch = plan.student.batch
        learner = StudentStage(
            model, cache, latents, words, ends, batch=batch, embeddings=embeddings
        )
        train(learner, plan.student, run / stage, console, hardware)
        return model
    student = smaller(model, (width_of(start),) * 4 if start else ())
    latents = ends.reshape(-1, *ends.shape[2:])
    if isinstance(student.codec, SmallKLCodec):
        encoded = encode_cache(model, cache, folder, pick_device(hardware.device))
        latents = np.concatenate([latents, encoded.reshape(-1, *encoded.shape[2:])])
        if start:
            load_small_decoder(student.codec.decoder, start)
    small = DecoderStage(model.codec, student.codec, latents, plan.decoder.batch)
    train(small, plan.decoder, run / stage, console, hardware)
    return student


def _ends(
    teacher: Path,
    clips: tuple[ClipCache, Path],
    plan: Plan | Fewer,
    words: Tokenizer,
    hardware: Hardware,
    embeddings: EmbeddingCache | None,
) -> NDArray[Any]:
    """Latents (M, F, C, h, w) that the many-step model makes of the clips' conditions."""
    cache, folder = clips
    source = HeartBeat.from_pretrained(teacher)
    side, channels = source.config.latent, source.config.codec.latent_channels
    shape = (*cache.frames.shape[:2], channels, side, side)
    latents = np.broadcast_to(np.float16(0), shape)  # of encoded ones only the shape matters here
    made = DiffusionStage(source, cache, latents, words, stage=2, batch=1, embeddings=embeddings)
    source.to(pick_device(hardware.device))
    return generated_latents(made, folder, plan.ends)
