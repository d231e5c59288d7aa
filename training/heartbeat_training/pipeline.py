"""A training run as a folder: data, checkpoints and the model after each stage.

runs/NAME/{pairs, clips, …}/ rendered or read once; runs/NAME/{codec, texture, stage1, stage2}/
checkpoints and TensorBoard; runs/NAME/model-{codec, …}/ what `heartbeat-export onnx` takes. Data
are phantoms, or real patients (RealData): these have no known scatterers, so their codec learns
against a critic, and their texture stage comes last: it needs the denoiser's latents.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.models.codec import EchoCodec
from heartbeat_fast.models.config import PRESETS
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer, train_tiny_tokenizer
from heartbeat_training import few_steps, real_data
from heartbeat_training.calibration import calibrate
from heartbeat_training.clips import ClipCache, phantoms
from heartbeat_training.generated import generated_latents
from heartbeat_training.hardware import Hardware
from heartbeat_training.loop import train
from heartbeat_training.processes import join, main_first
from heartbeat_training.real_data import RealData
from heartbeat_training.recipes import PLANS, Plan
from heartbeat_training.stage_adversarial import AdversarialCodecStage
from heartbeat_training.stage_codec import CodecStage, PairCache, TextureStage
from heartbeat_training.stage_diffusion import DiffusionStage, encode_cache

PROMPTS = ("An ECHO with 2-chamber view.", "An ECHO with 4-chamber view.", "An ECHO.", "")
STAGES = ("codec", "texture", "stage1", "stage2")
BEFORE = {"texture": "codec", "stage1": "texture", "stage2": "stage1", "student": "stage2"}
STAGES_REAL = ("codec", "stage1", "stage2", "texture")
BEFORE_REAL = {"stage1": "codec", "stage2": "stage1", "texture": "stage2", "student": "texture"}


def run_stage(
    stage: str,
    preset: str,
    run: Path,
    *,
    train_cross_attention: bool = False,
    data: RealData | None = None,
    init: Path | None = None,
    hardware: Hardware | None = None,
    share: float = 1.0,
) -> HeartBeat:
    """Run one stage of a preset to its end and save the model folder `run/model-STAGE`.

    Args:
        data: real patients; None for phantoms.
        init: model folder that the first stage starts from; None for random weights.
        share: of the plan's steps.

    Raises: HeartBeatError when the stage before it has not been run, or does not exist.
    """
    console = Console(stderr=True)
    plan = PLANS[preset if data is None else f"{preset}-real"].scaled(share)
    before = (BEFORE if data is None else BEFORE_REAL) | {"decoder": "student"}
    model, start = _model(stage, preset, run, before, init)
    tokenizer(run, init)
    if stage in ("codec", "texture"):
        if data is None:
            _train_codec(stage, model, plan, run, console, hardware)
        else:
            _train_real_codec(stage, model, plan, run, data, start is None, console, hardware)
    elif stage in few_steps.STAGES:
        with main_first():
            clips = _clips("stage2", model, plan, run, data)
        teacher, words = run / f"model-{before['student']}", tokenizer(run)
        model = few_steps.distil(stage, model, teacher, clips, plan, run, words, console, hardware)
    else:
        with main_first():
            cache, folder = _clips(stage, model, plan, run, data)
            latents = encode_cache(model, cache, folder)
        recipe = plan.stage1 if stage == "stage1" else plan.stage2
        diffusion = DiffusionStage(
            model,
            cache,
            latents,
            tokenizer(run),
            stage=int(stage[-1]),
            batch=recipe.batch,
            train_cross_attention=train_cross_attention,
            thaw=plan.thaw,
        )
        train(diffusion, recipe, run / stage, console, hardware)
    if join()[0] == 0:
        _save(model, stage, preset, run, plan, data, start, train_cross_attention)
    return model


def _model(
    stage: str, preset: str, run: Path, before: dict[str, str], init: Path | None
) -> tuple[HeartBeat, str | None]:
    """The model a stage starts with, and what it goes back to (None: random weights)."""
    torch.manual_seed(PLANS[preset].codec.seed)
    if stage in before:
        folder = run / f"model-{before[stage]}"
        if not folder.exists():
            raise HeartBeatError(f"{folder}: missing; run `heartbeat-train {before[stage]}` first")
        kept = json.loads((folder / "provenance.json").read_text()).get("init")
        return HeartBeat.from_pretrained(folder), kept
    if init is None:
        return HeartBeat(PRESETS[preset]), None
    return HeartBeat.from_pretrained(init), init.name


def _train_codec(
    stage: str,
    model: HeartBeat,
    plan: Plan,
    run: Path,
    console: Console,
    hardware: Hardware | None,
) -> None:
    """The codec stages on phantoms: pairs of speckles of one anatomy."""
    assert isinstance(model.codec, EchoCodec)
    with main_first():
        seeds = _seeds(plan, plan.pairs, offset=1_000_000)
        PairCache.build(run / "pairs", seeds, 4, model.config.size)
    recipe = plan.codec if stage == "codec" else plan.texture
    kind = CodecStage if stage == "codec" else TextureStage
    codec = kind(model.codec, PairCache(run / "pairs"), recipe.batch)
    train(codec, recipe, run / stage, console, hardware)
    if stage == "codec":
        codec.finish()


def _train_real_codec(
    stage: str,
    model: HeartBeat,
    plan: Plan,
    run: Path,
    data: RealData,
    scratch: bool,
    console: Console,
    hardware: Hardware | None,
) -> None:
    """The codec stages on real frames: encoded ones, or as the denoiser would have them."""
    assert isinstance(model.codec, EchoCodec)
    recipe, generated = plan.codec if stage == "codec" else plan.texture, None
    labels = None
    with main_first():
        if stage == "codec":
            frames = _frames(model, run, data)
        else:
            folder = run / "clips-plain"
            records = real_data.clips(data, model.config.frames, model.config.size, 0)
            ClipCache.build(folder, records, data.counts()[0], run.parent / "conditions")
            cache = ClipCache(folder)
            latents = encode_cache(model, cache, folder)
            words = tokenizer(run)
            denoiser = DiffusionStage(model, cache, latents, words, stage=2, batch=1)
            generated = generated_latents(denoiser, folder).reshape(-1, *latents.shape[2:])
            frames = cache.frames.reshape(-1, *cache.frames.shape[2:])
            labels = cache.labels.reshape(frames.shape)
    real = AdversarialCodecStage(
        model.codec,
        frames,
        recipe.batch,
        encoder=scratch and stage == "codec",
        generated=generated,
    )
    train(real, recipe, run / stage, console, hardware)
    real.finish()
    if generated is not None and labels is not None:
        gain = calibrate(model.codec, generated, frames, labels, model.config.frames)
        console.print(f"texture: grain × {gain:.2f}", highlight=False)


def _frames(model: HeartBeat, run: Path, data: RealData) -> NDArray[np.uint8]:
    """Unchanged frames (M, H, W), read once."""
    file = run / "frames.npy"
    if not file.exists():
        run.mkdir(parents=True, exist_ok=True)
        np.save(run / ".frames.npy", real_data.plain_frames(data, model.config.size))
        (run / ".frames.npy").rename(file)
    return np.load(file, mmap_mode="r")


def _clips(
    stage: str, model: HeartBeat, plan: Plan, run: Path, data: RealData | None
) -> tuple[ClipCache, Path]:
    """What the denoiser learns from, built once, and where it lies."""
    config = model.config
    if data is None:
        folder = run / "clips"
        records = phantoms(_seeds(plan, plan.clips), config.frames, config.size)
        ClipCache.build(folder, records, plan.clips)
    elif stage == "stage1":
        folder = run / "clips-stage1"
        count = plan.clips * sum(data.counts())
        records = real_data.pairs(data, config.frames, config.size, plan.clips)
        ClipCache.build(folder, records, count, run.parent / "conditions")
    else:
        folder = run / "clips-stage2"
        count = plan.clips * data.counts()[0]
        records = real_data.clips(data, config.frames, config.size, plan.clips)
        ClipCache.build(folder, records, count, run.parent / "conditions")
    return ClipCache(folder), folder


def _save(
    model: HeartBeat,
    stage: str,
    preset: str,
    run: Path,
    plan: Plan,
    data: RealData | None,
    start: str | None,
    train_cross_attention: bool,
) -> None:
    """Model, tokenizer, card and where all of it comes from."""
    folder = run / f"model-{stage}"
    model.save_pretrained(folder)
    tokenizer(run).save(folder / "tokenizer.json")
    provenance: dict[str, Any] = {"data": "phantom (heartbeat_training.phantom)"}
    if data is not None:
        provenance = {
            "data": "{} clips, {} pairs of stills of {}; weights inherit its licence".format(
                *data.counts(), data.folder.resolve().name
            ),
            "split": data.split_source,
            "held_out": data.held_out(),
        }
    provenance |= {"last_stage": stage, "train_cross_attention": train_cross_attention}
    provenance |= {"plan": asdict(plan), "init": start}
    distilled = stage in few_steps.STAGES
    if distilled:
        provenance |= few_steps.provenance(run / f"model-{'texture' if data else 'stage2'}", plan)
    if preset == "tiny" and data is None:
        card = Path(__file__).parent / ("card_fast.md" if distilled else "card.md")
        (folder / "README.md").write_text(card.read_text("utf-8"), "utf-8")
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1))


def tokenizer(run: Path, init: Path | None = None) -> Tokenizer:
    """The run's tokenizer: when first asked for, that of `init`, else trained on the prompts."""
    file = run / "tokenizer.json"
    if not file.exists():
        run.mkdir(parents=True, exist_ok=True)
        given = init / "tokenizer.json" if init else None
        (Tokenizer.open(given) if given else train_tiny_tokenizer(PROMPTS)).save(file)
    return Tokenizer.open(file)


def _seeds(plan: Plan, count: int, offset: int = 0) -> range:
    return range(plan.first_seed + offset, plan.first_seed + offset + count)
