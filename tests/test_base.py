"""The paper's stages: what `base` trains and freezes, its recipes, and one real step of each."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from heartbeat_fast.conditions import NAMES
from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.models.config import (
    BASE,
    ImageConfig,
)
from heartbeat_fast.models.heartbeat import HeartBeat, train_only
from heartbeat_fast.text import Tokenizer
from heartbeat_training.clips import ClipCache, phantoms
from heartbeat_training.loop import train
from heartbeat_training.paper import (
    PaperStage,
    embeddings_of,
    learned,
    open_base,
)
from heartbeat_training.recipes import PAPER, PaperRecipe, Published, paper_recipe
from heartbeat_training.stage_diffusion import encode_cache
from tests.test_sd15 import SMALL

SHARED = Path(__file__).parents[2] / "shared"

# base with its widths cut: the same layers, SAM with windows that must be padded and one global.
NARROW = replace(
    SMALL,
    name="base-narrow",
    frames=4,
    denoiser=replace(SMALL.denoiser, frames=4),
    image=ImageConfig(
        size=128,
        hidden=32,
        layers=2,
        heads=2,
        window=3,
        global_layers=(1,),
        channels=16,
        adapter=16,
        grid=4,
    ),
    local_hidden=16,
)

TEMPORAL = 49_798_720
CROSS = 75_522_240
UNET = {"unet": 859_520_964, "local channels of conv_in": 64 * 320 * 9, "image branch": 31_559_680}


@pytest.mark.parametrize(
    ("stage", "cross", "counts"),
    [
        (
            "stage1",
            False,
            {
                "denoiser": sum(UNET.values()),
                "adapter": 4_393_984,
                "sketch": 73_856,
                "mask": 184_448,
                "skeleton": 73_856,
                "ef_token": 603_648,
            },
        ),
        ("stage2", False, {"denoiser": TEMPORAL, "flow": 110_720}),
        ("stage2", True, {"denoiser": TEMPORAL + CROSS, "flow": 110_720}),
        ("cmr", False, {"denoiser": sum(UNET.values()) + TEMPORAL, "mask": 184_448}),
    ],
)
def test_base_trains_what_the_paper_trains(stage: str, cross: bool, counts: dict[str, int]) -> None:
    """Without memory: parameters per module, layer names, and everything else frozen."""
    with torch.device("meta"):
        model = HeartBeat(BASE)
    trained = learned(model, stage, cross)
    train_only(model, trained)
    model.train()
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        found[name.split(".")[0]] += parameter.numel() * parameter.requires_grad
    assert {k: n for k, n in found.items() if n} == counts
    assert {k for k, p in model.named_parameters() if p.requires_grad} == set(trained)
    # What learns nothing gathers no statistics either.
    still = {name for name, part in model.named_children() if not part.training}
    assert still == {name for name, _ in model.named_children()} - set(counts)
    assert {"codec", "text_encoder", "image_encoder"} <= still
    if stage == "stage2":
        kinds = {k.split("transformer_blocks.0.")[-1].split(".")[0] for k in trained if "den" in k}
        assert kinds == {"norm_temporal", "attn_temporal"} | ({"attn2"} if cross else set())
    elif stage == "stage1":
        assert not any("_temporal" in name for name in trained)


def test_recipes_are_the_published_ones() -> None:
    """Batch 64 and 16, 200 epochs over the paper's 793 training clips of 16 frames, last epoch."""
    images = paper_recipe(PAPER["stage1"], 793 * 16)
    clips = paper_recipe(PAPER["stage2"], 793)
    volumes = paper_recipe(PAPER["cmr"], 150)
    assert (images.batch, clips.batch) == (64, 16)
    assert (images.steps, clips.steps, volumes.steps) == (199 * 200, 50 * 200, 4 * 200)
    for recipe in (images, clips, volumes):
        assert (recipe.lr, recipe.warmup, recipe.published.epochs) == (1e-4, 500, 200)
        assert recipe.ema == 0.0
        assert asdict(recipe)["published"]["batch"] == recipe.batch
    assert volumes.examples == 50
    assert volumes.published.conditions == "mask"
    assert "flow" not in images.published.conditions.split()
    assert clips.published.conditions.split() == list(NAMES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[ClipCache, Path]:
    """Four phantom clips of four frames."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    ClipCache.build(folder, phantoms(range(4), 4, 64), 4)
    return ClipCache(folder), folder


def narrow() -> HeartBeat:
    """The narrow base; what starts at zero is moved, so that every layer has a gradient."""
    torch.manual_seed(0)
    model = HeartBeat(NARROW)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def small_recipe(stage: str, steps: int, cross: bool = False) -> PaperRecipe:
    """The published recipe with a batch of two and no warm-up."""
    published = replace(
        PAPER[stage],
        batch=2,
        warmup=0,
        drop=0.0,
        drop_all=0.0,
        drop_local=0.0,
        train_cross_attention=cross,
    )
    recipe = paper_recipe(published, 16 if stage == "stage1" else 4)
    return replace(recipe, steps=steps, bf16=False)


@pytest.mark.parametrize(
    ("stage", "cross"), [("stage1", False), ("stage2", False), ("stage2", True), ("cmr", False)]
)
def test_one_step_moves_exactly_what_is_trained(
    data: tuple[ClipCache, Path], nano_tokenizer: Tokenizer, tmp_path: Path, stage: str, cross: bool
) -> None:
    """A real optimisation step; frozen parameters and buffers keep their bits."""
    cache, folder = data
    model = narrow()
    latents = encode_cache(model, cache, folder)
    embeddings = embeddings_of(model, folder / "embeddings")
    recipe = small_recipe(stage, 1, cross)
    chosen = PaperStage(
        model, cache, latents, nano_tokenizer, stage=stage, recipe=recipe, embeddings=embeddings
    )
    before = {k: t.clone() for k, t in model.state_dict().items()}
    train(chosen, recipe, tmp_path)
    moved = {k for k, t in model.state_dict().items() if not torch.equal(t, before[k])}
    expected = set(learned(model, stage, cross))
    if stage == "stage1":
        # The adapter's BatchNorm counts; EF is dropped by nobody, so nobody learns its absence.
        expected -= {"ef_token.absent"}
        norm = "adapter.batch_norm."
        expected |= {norm + k for k in ("running_mean", "running_var", "num_batches_tracked")}
    if stage == "cmr":
        # Image tokens are worth nothing here, so the image branch has no gradient.
        expected = {k for k in expected if "_ip." not in k}
    assert moved == expected


def test_embeddings_take_the_images_place(
    data: tuple[ClipCache, Path], nano_tokenizer: Tokenizer
) -> None:
    """Loss with embeddings from disk equals the loss with the encoder in the step, to half
    precision; CMR reads none."""
    cache, folder = data
    model = narrow()
    recipe = small_recipe("stage2", 1)
    losses = []
    for embeddings in (None, embeddings_of(model, folder / "embeddings-2")):
        stage = PaperStage(
            model,
            cache,
            encode_cache(model, cache, folder),
            nano_tokenizer,
            stage="stage2",
            recipe=recipe,
            embeddings=embeddings,
        )
        torch.manual_seed(5)
        batch = stage.draw(0, np.random.default_rng(0), slice(0, 2))
        losses.append(stage.loss(batch)["loss"].item())
    assert batch["image"].shape == (2, 16, 8, 8)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != losses[1]


def draws(stage: PaperStage, steps: range) -> list[tuple[int, int]]:
    """Clip and frame of every row of these steps."""
    rows = []
    for step in steps:
        clips, frames = stage.picks(step)
        rows += [(int(c), -1 if frames is None else int(frames[i, 0])) for i, c in enumerate(clips)]
    return rows


def test_an_epoch_shows_every_example_once(
    data: tuple[ClipCache, Path], nano_tokenizer: Tokenizer
) -> None:
    """16 images in batches of 3 make 6 steps: all once, two of them twice; then another order."""
    cache, folder = data
    model = narrow()
    latents = encode_cache(model, cache, folder)
    recipe = paper_recipe(replace(PAPER["stage1"], batch=3, epochs=2), 16)
    stage = PaperStage(model, cache, latents, nano_tokenizer, stage="stage1", recipe=recipe)
    first, second = draws(stage, range(6)), draws(stage, range(6, 12))
    assert recipe.steps == 12
    assert Counter(Counter(first).values()) == {1: 14, 2: 2}
    assert set(first) == set(second) == {(c, f) for c in range(4) for f in range(4)}
    assert first != second
    too_many = paper_recipe(PAPER["stage1"], 17)
    with pytest.raises(HeartBeatError, match="17 examples; the data hold 16"):
        PaperStage(model, cache, latents, nano_tokenizer, stage="stage1", recipe=too_many)


def test_dropping_is_a_switch(data: tuple[ClipCache, Path], nano_tokenizer: Tokenizer) -> None:
    """drop=0 is the paper's: every condition that the stage knows, always. CMR: the mask alone."""
    cache, folder = data
    model = narrow()
    latents = encode_cache(model, cache, folder)

    def present(stage: str, published: Published) -> Tensor:
        recipe = paper_recipe(published, 4)
        chosen = PaperStage(model, cache, latents, nano_tokenizer, stage=stage, recipe=recipe)
        rows = [chosen.draw(i, np.random.default_rng(i), slice(0, 2))["present"] for i in range(40)]
        return torch.cat(rows)

    paper = replace(PAPER["stage2"], batch=2, drop=0.0, drop_all=0.0, drop_local=0.0)
    assert present("stage2", paper).min() == 1
    ours = present("stage2", replace(PAPER["stage2"], batch=2)).mean(0)
    assert ((ours[:3] > 0.65) & (ours[:3] < 0.95)).all()
    assert ((ours[3:] > 0.4) & (ours[3:] < 0.75)).all()  # text, EF and image learn to do without
    mask = present("cmr", replace(PAPER["cmr"], batch=2)).mean(0)
    assert 0.7 < mask[NAMES.index("mask")] < 1
    assert mask.sum() == mask[NAMES.index("mask")]


def test_open_base_reads_the_published_files(tmp_path: Path) -> None:
    """A diffusers folder and MedSAM's folder of a narrow model; SD1.5's own tokenizer."""
    published = SHARED / "data" / "sd15" / "runwayml-stable-diffusion-v1-5" / "tokenizer"
    if not published.is_dir():
        pytest.skip("Stable Diffusion's tokenizer is not at hand")
    plain = replace(NARROW, denoiser=replace(NARROW.denoiser, image_branch=False, temporal=False))
    plain = replace(plain, denoiser=replace(plain.denoiser, local_channels=0))
    theirs = HeartBeat(plain)
    for part in ("unet", "vae", "text_encoder"):
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        (tmp_path / part).mkdir()
        save_file(theirs.components()[part].state_dict(), tmp_path / part / f"{name}.safetensors")
    (tmp_path / "tokenizer").symlink_to(published)
    torch.save(theirs.image_encoder.state_dict(), tmp_path / "pytorch_model.bin")
    model, tokenizer = open_base(tmp_path, tmp_path / "pytorch_model.bin", NARROW)
    assert tokenizer.encode("An ECHO.")[0, :2].tolist() == [49406, 550]
    for name, part in (
        ("image_encoder", model.image_encoder),
        ("text_encoder", model.text_encoder),
    ):
        wanted = theirs.components()[name].state_dict()
        assert all(torch.equal(t, wanted[k]) for k, t in part.state_dict().items())
    ours, wanted = model.denoiser.state_dict(), theirs.denoiser.state_dict()
    assert all(torch.equal(ours[k], t) for k, t in wanted.items() if k != "conv_in.weight")


def test_a_folder_opens_whatever_the_order_of_diffusers_notes(tmp_path: Path) -> None:
    """Its list of defaults is made of a set: in another order in every process."""
    folder = tmp_path / "model"
    HeartBeat(NARROW).save_pretrained(folder)
    file = folder / "vae" / "config.json"
    stored = json.loads(file.read_text())
    assert [key for key in stored if key[0] == "_"] == ["_class_name"]
    file.write_text(json.dumps(stored | {"_use_default_values": ["mid_block_add_attention"]}))
    assert HeartBeat.from_pretrained(folder).config == NARROW
    file.write_text(json.dumps(stored | {"layers_per_block": 7}))
    with pytest.raises(HeartBeatError, match=r"config.json differs"):
        HeartBeat.from_pretrained(folder)
