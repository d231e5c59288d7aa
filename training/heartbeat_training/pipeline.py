"""A training run as a folder: data, checkpoints and the model after each stage.

runs/NAME/{pairs, clips}/ rendered once; runs/NAME/{codec, texture, stage1, stage2}/ checkpoints and
TensorBoard; runs/NAME/model-{codec, …}/ what `heartbeat-export onnx` takes.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.models.codec import EchoCodec
from heartbeat_fast.models.config import PRESETS
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer, train_tiny_tokenizer
from heartbeat_training.clips import ClipCache, phantoms
from heartbeat_training.loop import train
from heartbeat_training.recipes import PLANS, Plan
from heartbeat_training.stage_codec import CodecStage, PairCache, TextureStage
from heartbeat_training.stage_diffusion import DiffusionStage, encode_cache

PROMPTS = ("An ECHO with 2-chamber view.", "An ECHO with 4-chamber view.", "An ECHO.", "")
STAGES = ("codec", "texture", "stage1", "stage2")
BEFORE = {"texture": "codec", "stage1": "texture", "stage2": "stage1"}


def run_stage(
    stage: str, preset: str, run: Path, *, train_cross_attention: bool = False
) -> HeartBeat:
    """Run one stage of a preset to its end and save the model folder `run/model-STAGE`.

    Raises: HeartBeatError when the stage before it has not been run.
    """
    console = Console(stderr=True)
    plan, config = PLANS[preset], PRESETS[preset]
    torch.manual_seed(plan.codec.seed)
    before = run / f"model-{BEFORE.get(stage, '')}"
    if stage in BEFORE and not before.exists():
        raise HeartBeatError(f"{before}: missing; run `heartbeat-train {BEFORE[stage]}` first")
    model = HeartBeat.from_pretrained(before) if stage in BEFORE else HeartBeat(config)
    if stage in ("codec", "texture"):
        PairCache.build(run / "pairs", _seeds(plan, plan.pairs, offset=1_000_000), 4, config.size)
        kind, recipe = (
            (CodecStage, plan.codec) if stage == "codec" else (TextureStage, plan.texture)
        )
        assert isinstance(model.codec, EchoCodec)
        codec = kind(model.codec, PairCache(run / "pairs"), recipe.batch)
        train(codec, recipe, run / stage, console)
        if stage == "codec":
            codec.finish()
    else:
        folder = run / "clips"
        records = phantoms(_seeds(plan, plan.clips), config.frames, config.size)
        ClipCache.build(folder, records, plan.clips)
        cache = ClipCache(folder)
        recipe = plan.stage1 if stage == "stage1" else plan.stage2
        diffusion = DiffusionStage(
            model,
            cache,
            encode_cache(model, cache, folder),
            tokenizer(run),
            stage=int(stage[-1]),
            batch=recipe.batch,
            train_cross_attention=train_cross_attention,
        )
        train(diffusion, recipe, run / stage, console)
    model.save_pretrained(run / f"model-{stage}")
    tokenizer(run).save(run / f"model-{stage}" / "tokenizer.json")
    provenance: dict[str, Any] = {"data": "phantom (heartbeat_training.phantom)"}
    provenance |= {"last_stage": stage, "train_cross_attention": train_cross_attention}
    provenance["plan"] = asdict(plan)
    if preset == "tiny":
        card = (Path(__file__).parent / "card.md").read_text("utf-8")
        (run / f"model-{stage}" / "README.md").write_text(card, "utf-8")
    (run / f"model-{stage}" / "provenance.json").write_text(json.dumps(provenance, indent=1))
    return model


def tokenizer(run: Path) -> Tokenizer:
    """The run's tokenizer, trained on the prompts when first asked for."""
    file = run / "tokenizer.json"
    if not file.exists():
        run.mkdir(parents=True, exist_ok=True)
        train_tiny_tokenizer(PROMPTS).save(file)
    return Tokenizer.open(file)


def _seeds(plan: Plan, count: int, offset: int = 0) -> range:
    return range(plan.first_seed + offset, plan.first_seed + offset + count)
