"""One of the paper's stages as a run: data read and encoded once, then trained, then a model
folder.

runs/NAME/{clips, embeddings}/ made once; runs/NAME/{stage1, stage2, cmr}/ checkpoints;
runs/NAME/model-{stage1, …}/ what `heartbeat-export` and `heartbeat-train evaluate` take. With
several processes the first one prepares while the others wait.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.models.embeddings import EmbeddingCache
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer
from heartbeat_training.clips import ClipCache
from heartbeat_training.hardware import Hardware
from heartbeat_training.loop import train
from heartbeat_training.paper import PaperStage, embeddings_of
from heartbeat_training.processes import join, main_first, pick_device
from heartbeat_training.real_data import RealData
from heartbeat_training.recipes import Published, paper_recipe
from heartbeat_training.stage_diffusion import encode_cache

Start = Callable[[], tuple[HeartBeat, Tokenizer]]


def run_paper_stage(
    stage: str,
    run: Path,
    data: RealData,
    published: Published,
    start: Start,
    hardware: Hardware | None = None,
) -> HeartBeat:
    """Run a stage to its last epoch and save `run/model-STAGE`.

    Args:
        stage: "stage1", "stage2" (goes on from this run's stage 1) or "cmr".
        published: batch, epochs and what is dropped: recipes.PAPER, or with epochs changed.
        start: opens the model and tokenizer that stage 1 or cmr begins with.

    Raises: HeartBeatError when stage 1 has not been run or the data hold nothing to learn from.
    """
    hardware = hardware or Hardware()
    console = Console(stderr=True, quiet=join()[0] > 0)
    if stage == "stage2":
        before = run / "model-stage1"
        if not before.exists():
            raise HeartBeatError(f"{before}: missing; run `heartbeat-train stage1` first")
        model = HeartBeat.from_pretrained(before)
        words = Tokenizer.open(before / "tokenizer.json")
    else:
        model, words = start()
    folder = run / ("clips" if stage != "cmr" else "volumes")
    with main_first():
        cache, embeddings = _prepare(model, data, folder, hardware, console)
    per_clip = cache.frames.shape[1] if stage == "stage1" else 1
    recipe = paper_recipe(published, len(cache) * per_clip)
    chosen = PaperStage(
        model,
        cache,
        encode_cache(model, cache, folder, pick_device(hardware.device)),
        words,
        stage=stage,
        recipe=recipe,
        embeddings=embeddings,
    )
    console.print(f"{stage}: {recipe.examples} examples, {recipe.steps} steps of {recipe.batch}")
    train(chosen, recipe, run / stage, console, hardware)
    if join()[0] == 0:
        target = run / f"model-{stage}"
        model.save_pretrained(target)
        words.save(target / "tokenizer.json")
        story = {
            "data": f"{data.counts()[0]} clips of {data.folder.resolve().name}; weights inherit "
            "its licence",
            "split": data.split_source,
            "held_out": data.held_out(),
            "recipe": asdict(recipe),
        }
        (target / "provenance.json").write_text(json.dumps(story, indent=1))
    return model


def _prepare(
    model: HeartBeat, data: RealData, folder: Path, hardware: Hardware, console: Console
) -> tuple[ClipCache, EmbeddingCache]:
    """Clips with conditions, their latents, the image priors' embeddings: each made once."""
    config, device = model.config, pick_device(hardware.device)
    records = (r.standardised(config.frames, config.size) for r in data.sequences())
    ClipCache.build(folder, records, data.counts()[0], folder.parent / "conditions")
    cache = ClipCache(folder)
    encode_cache(model, cache, folder, device)
    embeddings = embeddings_of(model, folder.parent / "embeddings")
    console.print(f"image prior: embeddings of {len(cache)} first frames")
    model.image_encoder.to(device)
    embeddings.fill(cache.frames[clip, 0] for clip in range(len(cache)))
    model.image_encoder.to(torch.device("cpu"))
    return cache, embeddings
