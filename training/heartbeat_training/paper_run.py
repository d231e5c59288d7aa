"""One of the paper's stages as a run: data read and encoded once, then trained, then a model
folder; and after them our two that make it fast.

runs/NAME/{clips, embeddings}/ made once; runs/NAME/{stage1, stage2, cmr, student, decoder}/
checkpoints; runs/NAME/model-{stage1, …}/ what `heartbeat-export` and `heartbeat-train evaluate`
take. With several processes the first one prepares while the others wait.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.models.embeddings import EmbeddingCache
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.record import Record
from heartbeat_fast.text import Tokenizer
from heartbeat_training import few_steps
from heartbeat_training.clips import ClipCache, phantoms
from heartbeat_training.few_steps import Fewer
from heartbeat_training.hardware import Hardware
from heartbeat_training.loop import train
from heartbeat_training.paper import PaperStage, embeddings_of
from heartbeat_training.processes import join, main_first, pick_device
from heartbeat_training.real_data import RealData
from heartbeat_training.recipes import Published, paper_recipe
from heartbeat_training.stage_diffusion import encode_cache

SEED = 10_000  # of the first phantom, as in recipes.PLANS
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
    model, words = _open(run / "model-stage1") if stage == "stage2" else start()
    folder = run / ("clips" if stage != "cmr" else "volumes")
    with main_first():
        cache, embeddings = _prepare(model, data, folder, hardware, console)
        encode_cache(model, cache, folder, pick_device(hardware.device))
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
        _save(model, words, run / f"model-{stage}", _story(data) | {"recipe": asdict(recipe)})
    return model


def run_fast_stage(
    stage: str,
    run: Path,
    data: RealData | None,
    recipes: Fewer = few_steps.BASE,
    *,
    teacher: Path | None = None,
    start: Path | None = None,
    hardware: Hardware | None = None,
) -> HeartBeat:
    """Distil a trained model of the paper's and save `run/model-STAGE`.

    Args:
        stage: "student" (1, 2 and 4 steps), then "decoder" (goes on from this run's student).
        data: what the teacher learned on, or None for phantoms.
        teacher: the many-step model's folder; None for this run's stage 2.
        start: TAESD's decoder, which the small decoder begins as; None for random weights.

    Raises: HeartBeatError when the stage before it has not been run.
    """
    hardware = hardware or Hardware()
    console = Console(stderr=True, quiet=join()[0] > 0)
    teacher = teacher or run / "model-stage2"
    torch.manual_seed(getattr(recipes, stage).seed)
    model, words = _open(teacher if stage == "student" else run / "model-student")
    folder = run / ("phantoms" if data is None else "clips")
    with main_first():
        cache, embeddings = _prepare(model, data, folder, hardware, console, recipes.phantoms)
    console.print(f"{stage}: {len(cache)} clips")
    clips = cache, folder
    model = few_steps.distil(
        stage,
        model,
        teacher,
        clips,
        recipes,
        run,
        words,
        console,
        hardware,
        embeddings=embeddings,
        start=start,
    )
    if join()[0] == 0:
        story = _story(data) | few_steps.provenance(teacher, recipes)
        _save(model, words, run / f"model-{stage}", story)
    return model


def _open(folder: Path) -> tuple[HeartBeat, Tokenizer]:
    """A model folder of a stage before."""
    if not folder.exists():
        stage = folder.name.removeprefix("model-")
        raise HeartBeatError(f"{folder}: missing; run `heartbeat-train {stage}` first")
    return HeartBeat.from_pretrained(folder), Tokenizer.open(folder / "tokenizer.json")


def _story(data: RealData | None) -> dict[str, Any]:
    """What provenance.json says of the data."""
    if data is None:
        return {"data": "phantom (heartbeat_training.phantom)"}
    return {
        "data": f"{data.counts()[0]} clips of {data.folder.resolve().name}; weights inherit "
        "its licence",
        "split": data.split_source,
        "held_out": data.held_out(),
    }


def _save(model: HeartBeat, words: Tokenizer, target: Path, story: dict[str, Any]) -> None:
    model.save_pretrained(target)
    words.save(target / "tokenizer.json")
    (target / "provenance.json").write_text(json.dumps(story, indent=1))


def _prepare(
    model: HeartBeat,
    data: RealData | None,
    folder: Path,
    hardware: Hardware,
    console: Console,
    count: int = 0,
) -> tuple[ClipCache, EmbeddingCache]:
    """Clips with conditions, and the image prior's embeddings: each made once.

    count: of phantoms, where there are no data.
    """
    config, device = model.config, pick_device(hardware.device)
    records: Iterable[Record]
    if data is None:
        records, kept = phantoms(range(SEED, SEED + count), config.frames, config.size), None
    else:
        records = (r.standardised(config.frames, config.size) for r in data.sequences())
        count, kept = data.counts()[0], folder.parent / "conditions"
    ClipCache.build(folder, records, count, kept)
    cache = ClipCache(folder)
    embeddings = embeddings_of(model, folder.parent / "embeddings")
    console.print(f"image prior: embeddings of {len(cache)} first frames")
    model.image_encoder.to(device)
    embeddings.fill(cache.frames[clip, 0] for clip in range(len(cache)))
    model.image_encoder.to(torch.device("cpu"))
    return cache, embeddings
