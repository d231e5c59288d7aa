"""From a trained model to a fast one: a denoiser of 1, 2 and 4 steps, then a smaller decoder."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from heartbeat_export.build import weights_of
from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.models.codec import EchoCodec
from heartbeat_fast.models.graphs import round_to_half
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer
from heartbeat_training.clips import ClipCache
from heartbeat_training.generated import generated_latents
from heartbeat_training.hardware import Hardware
from heartbeat_training.loop import train
from heartbeat_training.recipes import Plan
from heartbeat_training.stage_decoder import DecoderStage
from heartbeat_training.stage_diffusion import DiffusionStage
from heartbeat_training.stage_student import COUNTS, StudentStage

STAGES = ("student", "decoder")


def provenance(teacher: Path, plan: Plan) -> dict[str, Any]:
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
    plan: Plan,
    run: Path,
    words: Tokenizer,
    console: Console,
    hardware: Hardware | None = None,
) -> HeartBeat:
    """Run a stage of STAGES to its end.

    Args:
        model: what the stage starts from. teacher: folder of the many-step model, which made the
            latents that both stages learn on.
        clips: cache and where it lies.

    Returns: the faster model, whose config says how.

    Raises: HeartBeatError: another codec than ours has no smaller decoder.
    """
    if not isinstance(model.codec, EchoCodec):
        raise HeartBeatError("student and decoder: presets nano and tiny only; base keeps its VAE")
    cache, folder = clips
    source = HeartBeat.from_pretrained(teacher)
    side, channels = source.config.latent, source.config.codec.latent_channels
    shape = (*cache.frames.shape[:2], channels, side, side)
    latents = np.broadcast_to(np.float16(0), shape)  # of encoded ones only the shape matters here
    made = DiffusionStage(source, cache, latents, words, stage=2, batch=1)
    ends = generated_latents(made, folder, plan.ends)
    if stage == "student":
        model.config = replace(model.config, few_steps=COUNTS)
        learner = StudentStage(model, cache, latents, words, ends, batch=plan.student.batch)
        train(learner, plan.student, run / stage, console, hardware)
        return model
    small = DecoderStage(model, ends.reshape(-1, *ends.shape[2:]), plan.decoder.batch)
    train(small, plan.decoder, run / stage, console, hardware)
    return small.student
