"""`base` made fast: a student of 1, 2 and 4 steps and a small decoder, at reduced width."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from heartbeat_export.build import build_bundle
from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.autoencoders import (
    TinyCodec,
    load_small_decoder,
    save_small_decoder,
)
from heartbeat_fast.models.codec import SmallDecoder
from heartbeat_fast.models.config import BASE, NANO
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer
from heartbeat_training import few_steps, generated, phantom, small_decoder
from heartbeat_training.cli import main
from heartbeat_training.clips import ClipCache, phantoms
from heartbeat_training.evaluation.cases import case_of
from heartbeat_training.loop import Recipe, train
from heartbeat_training.memory import Request, plan
from heartbeat_training.paper import embeddings_of
from heartbeat_training.paper_run import run_fast_stage
from heartbeat_training.real_data import RealData
from heartbeat_training.stage_decoder import DecoderStage, smaller
from heartbeat_training.stage_student import StudentStage
from tests.test_base import NARROW, UNET, narrow
from tests.test_real_data import camus  # noqa: F401  (a fixture)

SHORT = few_steps.Fewer(
    student=Recipe(steps=1, batch=2, lr=1e-3, warmup=0, ema=0.0),
    decoder=Recipe(steps=1, batch=2, lr=1e-3, warmup=0, ema=0.0),
    ends=2,
    phantoms=2,
)
WIDTHS = (8, 8, 8, 8)
# Two levels of one layer each, small encoders: an export of half the nodes.
SLIM = replace(
    NARROW,
    text=NANO.text,
    image=NANO.image,
    denoiser=replace(
        NARROW.denoiser, channels=(32, 64), heads=(4, 4), attention=(True, False), layers=1
    ),
)


def moved(before: dict[str, Tensor], model: HeartBeat) -> set[str]:
    """Tensors of the model that differ, or that it had not before."""
    now = model.state_dict()
    return {k for k, t in now.items() if k not in before or not torch.equal(t, before[k])}


def student_stage(
    model: HeartBeat, folder: Path, words: Tokenizer, stored: bool = False
) -> StudentStage:
    """Two phantoms, with ends that are far from where the model ends."""
    ClipCache.build(folder / "clips", phantoms(range(2), 4, 64), 2)
    cache = ClipCache(folder / "clips")
    ends = np.random.default_rng(0).standard_normal((2, 4, 4, 8, 8)).astype(np.float16)
    embeddings = embeddings_of(model, folder / "embeddings") if stored else None
    return StudentStage(model, cache, ends, words, ends, batch=2, embeddings=embeddings)


@pytest.mark.parametrize("patients", [False, True])
def test_base_becomes_a_fast_bundle(
    camus: RealData,  # noqa: F811
    nano_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    patients: bool,
) -> None:
    """One real step of each stage, as far as a clip of one step out of the exported bundle; the
    student from phantoms too."""
    monkeypatch.setattr(generated, "STEPS", 1)
    torch.manual_seed(0)
    run, teacher = tmp_path / "run", HeartBeat(SLIM)
    with torch.no_grad():  # what starts at zero would have no gradient
        for parameter in teacher.denoiser.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    teacher.save_pretrained(run / "model-stage2")
    nano_tokenizer.save(run / "model-stage2" / "tokenizer.json")
    (run / "model-stage2" / "provenance.json").write_text("{}")
    data = camus if patients else None
    student = run_fast_stage("student", run, data, SHORT)
    assert student.config.few_steps == (1, 2, 4)
    assert (teacher.config.prediction, student.config.prediction) == ("epsilon", "v_prediction")
    changed = moved(teacher.state_dict(), student)
    assert changed
    assert {k.split(".")[0] for k in changed} == {"denoiser"}
    story = json.loads((run / "model-student/provenance.json").read_text())
    assert story["distilled"]["student"]["steps"] == 1
    assert ("held_out" in story) == patients
    if not patients:
        return
    save_small_decoder(SmallDecoder(4, WIDTHS).decoder, tmp_path / "taesd", {})
    fast = run_fast_stage("decoder", run, data, SHORT, start=tmp_path / "taesd")
    assert fast.config.codec.decoder_widths == WIDTHS
    changed = moved(student.state_dict(), fast)
    assert any(k.startswith("codec.decoder.") for k in changed)
    assert all(k.startswith("codec.") for k in changed)
    again = HeartBeat.from_pretrained(run / "model-decoder")
    words = Tokenizer.open(run / "model-decoder" / "tokenizer.json")
    build_bundle(again, words, tmp_path / "bundle")
    generator = Generator.open(tmp_path / "bundle", engine="onnxruntime")
    from heartbeat_export.parity import beating_ring

    clip = generator(beating_ring(4, 64), steps=1)
    assert clip.frames.shape == (4, 64, 64)
    assert clip.provenance["sampler"] == "few_step"
    assert generator.bundle.manifest.prediction == "v_prediction"


def test_the_student_comes_closer_to_the_ends(nano_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = narrow()
    stage = student_stage(model, tmp_path, nano_tokenizer)
    torch.manual_seed(1)
    batch = stage.draw(0, np.random.default_rng(0), slice(0, 2))
    batch["place"] = torch.tensor([[4, 3]]).expand(2, 2)
    first = stage.loss(batch)["loss"].item()
    train(stage, Recipe(steps=12, batch=2, lr=2e-3, warmup=0, ema=0.0), tmp_path / "run")
    assert stage.loss(batch)["loss"].item() < 0.9 * first


def test_a_later_step_has_gradients_under_autocast(
    nano_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The passes before it run without: their casts must not stand in for its own."""
    stage = student_stage(narrow(), tmp_path, nano_tokenizer)
    batch = stage.draw(0, np.random.default_rng(0), slice(0, 2))
    batch["place"] = torch.tensor([[2, 1]]).expand(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = stage.loss(batch)["loss"]
    loss.backward()
    assert all(p.grad is not None for p in stage.parameters().values())
    others = (p for k, p in stage.model.named_parameters() if k not in stage.parameters())
    assert all(p.grad is None for p in others)


def test_the_image_prior_is_read_from_disk(nano_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = narrow().eval()
    losses = []
    for stored in (False, True):
        stage = student_stage(model, tmp_path, nano_tokenizer, stored)
        torch.manual_seed(0)
        batch = stage.draw(0, np.random.default_rng(0), slice(0, 2))
        model.eval()
        losses.append(stage.loss(batch)["loss"].item())
    assert batch["image"].shape == (2, 16, 8, 8)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_the_small_decoder_of_base_learns_from_its_own(tmp_path: Path) -> None:
    """Only the decoder; a fixed batch is drawn better after a few steps."""
    large = narrow()
    student = smaller(large, WIDTHS)
    latents = np.random.default_rng(0).standard_normal((6, 4, 8, 8)).astype(np.float16)
    stage = DecoderStage(large.codec, student.codec, latents, batch=4)
    assert {k.split(".")[0] for k in stage.parameters()} == {"decoder"}
    before = {k: t.clone() for k, t in student.state_dict().items()}
    torch.manual_seed(0)
    batch = stage.draw(0, np.random.default_rng(0), slice(0, 4))
    first = stage.loss(batch)["loss"].item()
    train(stage, Recipe(steps=15, batch=4, lr=3e-3, warmup=0, ema=0.0), tmp_path)
    assert stage.loss(batch)["loss"].item() < 0.7 * first
    assert all(k.startswith("codec.decoder.") for k in moved(before, student))
    z, noise = torch.randn(1, 4, 8, 8), torch.zeros(1, 0)
    assert torch.equal(student.codec.decode(z, noise), student.codec.decode(z, noise))


def test_a_student_of_base_is_planned() -> None:
    """The whole UNet learns, which takes 14 GiB of float32 with its moments; all else is frozen."""
    found = plan(BASE, Request(stage="student", checkpointing=True, gpu_memory=80.0))
    temporal = 49_798_720
    assert found.trainable == {"denoiser": sum(UNET.values()) + temporal}
    assert found.fits
    assert found.memory.moments == 8 * found.trainable["denoiser"]
    assert main(["plan", "--stage", "student", "--gpu-memory", "80", "--checkpointing"]) == 0


def test_a_published_decoder_is_made_small_and_judged(tmp_path: Path) -> None:
    """The command's parts on a random autoencoder: half the width learns, and every figure is
    there; a decoder is beside itself without a gap."""
    torch.manual_seed(0)
    teacher = TinyCodec(4, 16).eval().requires_grad_(False)
    item = phantom.record(0, frames=4, size=128)
    task = small_decoder.Task(width=8, crop=64, crops=1)
    recipe = Recipe(steps=3, batch=2, lr=1e-3, warmup=0, ema=0.0)
    console = Console(quiet=True)
    student = small_decoder.distil_decoder(
        teacher, item.frames, task, recipe, tmp_path, console
    ).eval()
    cases = [case_of(item, "somebody")]
    found = small_decoder.summary(small_decoder.judge(teacher, student, cases))
    assert {"psnr_teacher", "ssim_frames", "spectrum_worst_frames", "flicker_share_teacher"} <= set(
        found
    )
    same = small_decoder.summary(small_decoder.judge(teacher, teacher, cases))
    assert same["ssim_teacher"]["mean"] == pytest.approx(1)
    assert same["spectrum_gap_teacher"]["mean"] == 0
    assert same["psnr_teacher"]["mean"] > 100
    costs = [small_decoder.cost(codec, 4, 64)["multiply_adds"] for codec in (teacher, student)]
    assert costs[1] < 0.4 * costs[0]
    small_decoder.picture(teacher, student, cases, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_crops_do_not_fill_with_black() -> None:
    frame = np.zeros((64, 64), np.uint8)
    frame[:, 32:] = 200
    task = small_decoder.Task(crop=16, crops=40)
    found = next(small_decoder.crops(frame[None], task))
    assert found.shape == (40, 16, 16)
    assert (found.mean((1, 2)) > 0).mean() > 0.9


def test_a_crop_that_cannot_be_is_refused(tmp_path: Path) -> None:
    task = replace(small_decoder.Task(), crop=60)
    frames = np.zeros((1, 64, 64), np.uint8)
    console = Console(quiet=True)
    with pytest.raises(HeartBeatError, match="multiple of 8 up to 64"):
        small_decoder.distil_decoder(TinyCodec(4, 8), frames, task, Recipe(1, 1), tmp_path, console)


def test_the_command_takes_a_published_folder(
    camus: RealData,  # noqa: F811
    tmp_path: Path,
) -> None:
    """From a diffusers folder and patients to a decoder that `decoder --taesd` can begin as."""
    from diffusers import AutoencoderTiny

    whole: Any = AutoencoderTiny(
        encoder_block_out_channels=WIDTHS, decoder_block_out_channels=WIDTHS
    )
    whole.save_pretrained(tmp_path / "vae")
    words = f"--vae {tmp_path / 'vae'} --data {camus.folder} --hold-out 1 --run {tmp_path / 'run'}"
    small = "--size 64 --crop 32 --frames 4 --width 8 --steps 2 --batch 2"
    assert main(["small-decoder", *words.split(), *small.split()]) == 0
    found = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert [row["patient"] for row in found["rows"]] == ["patient0004"]
    assert found["figures"]["psnr_teacher"]["mean"] > 0
    load_small_decoder(SmallDecoder(4, WIDTHS).decoder, tmp_path / "run" / "small-decoder")
