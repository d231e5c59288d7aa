"""Few-step students and smaller decoders: the table they are sampled with, and what they learn."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from heartbeat_export.build import build_bundle
from heartbeat_export.sampler_tables import build_tables, few_step_table, few_step_times
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.config import NANO, PRESETS
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.sampler import SamplerError, choose, sample
from heartbeat_fast.text import Tokenizer
from heartbeat_training import generated
from heartbeat_training.clips import ClipCache, phantoms
from heartbeat_training.ddim import alphas_cumprod
from heartbeat_training.pipeline import run_stage, tokenizer
from heartbeat_training.stage_student import StudentStage

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def test_times_fall_evenly_from_the_last() -> None:
    assert few_step_times(1, 1000) == (999,)
    assert few_step_times(4, 1000) == (999, 749, 499, 249)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_table_is_estimate_then_noise_again(prediction: str, steps: int) -> None:
    """A table's run against the two lines it stands for, with a model that is not linear."""
    alphas = alphas_cumprod(HeartBeat(NANO)).double().numpy()
    noise = np.random.default_rng(0).standard_normal((1, 4, 4, 8, 8))
    table = few_step_table(steps, prediction, **SCHEDULE)

    def model(z: np.ndarray, i: int) -> np.ndarray:
        return np.tanh(z) * np.float64(1 + i)

    times = few_step_times(steps, 1000)
    z = noise
    for i, t in enumerate(times):
        a, out = alphas[t], model(z, i)
        clean = np.sqrt(a) * z - np.sqrt(1 - a) * out
        if prediction == "epsilon":
            clean = (z - np.sqrt(1 - a) * out) / np.sqrt(a)
        last = i + 1 == steps
        b = 1.0 if last else alphas[times[i + 1]]
        z = np.sqrt(b) * clean + np.sqrt(1 - b) * noise
    np.testing.assert_allclose(sample(table, model, noise), z, rtol=1e-5, atol=1e-6)
    assert table.multistep is not None
    np.testing.assert_allclose(
        sample(replace(table, multistep=None), model, noise), z, rtol=1e-5, atol=1e-6
    )


def test_a_distilled_bundle_offers_nothing_else() -> None:
    tables = {(t.name, t.steps): t for t in build_tables("v_prediction", (1, 2, 4), **SCHEDULE)}
    assert choose(tables, None, None).steps == 4
    assert choose(tables, None, 2).name == "few_step"
    with pytest.raises(SamplerError, match="few_step"):
        choose(tables, "dpmpp_2m", None)
    usual = {(t.name, t.steps): t for t in build_tables("v_prediction", **SCHEDULE)}
    assert (choose(usual, None, None).name, choose(usual, None, None).steps) == ("dpmpp_2m", 10)


def test_the_loss_is_of_the_step_that_is_sampled(tmp_path: Path) -> None:
    """The stage's estimates, run as the runtime runs the table: the same numbers."""
    torch.manual_seed(0)
    model = HeartBeat(NANO)
    for p in model.parameters():  # zero-initialised outputs would make every estimate alike
        torch.nn.init.normal_(p, std=0.05)
    ClipCache.build(tmp_path, phantoms(range(10_000, 10_002), 4, 64), 2)
    cache, words = ClipCache(tmp_path), tokenizer(tmp_path)
    shape = (2, 4, 4, 8, 8)
    latents = np.broadcast_to(np.float16(0), shape)
    ends = np.zeros(shape, np.float16)
    stage = StudentStage(model, cache, latents, words, ends, batch=1)
    batch = stage.draw(0, np.random.default_rng(0), slice(0, 1))
    batch["place"] = torch.tensor([[2, 1]])
    model.eval()
    table = few_step_table(2, "v_prediction", **SCHEDULE)

    def denoise(z: np.ndarray, i: int) -> np.ndarray:
        t = torch.tensor([int(table.timesteps[i])])
        with torch.no_grad():
            return model.predict(torch.from_numpy(z), t, batch).numpy()

    end = sample(table, denoise, batch["start"].numpy())
    loss = stage.loss(batch)["loss"]
    assert loss.item() == pytest.approx((end**2).mean(), rel=1e-3)
    loss.backward()
    assert all(p.grad is None for k, p in model.named_parameters() if not k.startswith("denoiser."))


def test_student_and_decoder_become_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two stages on a random nano model, exported: smaller, and sampled in 1, 2, 4 steps."""
    from heartbeat_training import pipeline

    plan = replace(pipeline.PLANS["nano"], clips=3, ends=2)
    monkeypatch.setitem(pipeline.PLANS, "nano", plan)
    monkeypatch.setattr(generated, "STEPS", 2)
    run = tmp_path / "run"
    teacher = HeartBeat(PRESETS["nano"])
    teacher.save_pretrained(run / "model-stage2")
    (run / "model-stage2" / "provenance.json").write_text("{}")
    tokenizer(run)
    student = run_stage("student", "nano", run)
    assert student.config.few_steps == (1, 2, 4)
    changed = {
        name.split(".")[0]
        for name, tensor in student.state_dict().items()
        if not torch.equal(tensor, teacher.state_dict()[name])
    }
    assert changed == {"denoiser"}
    fast = run_stage("decoder", "nano", run)
    count = [sum(p.numel() for p in m.codec.decoder.parameters()) for m in (teacher, fast)]
    assert count[1] != count[0]
    again = HeartBeat.from_pretrained(run / "model-decoder")
    assert again.config.few_steps == (1, 2, 4)
    assert again.config.codec.decoder_widths
    words = Tokenizer.open(run / "model-decoder" / "tokenizer.json")
    build_bundle(again, words, tmp_path / "bundle")
    generator = Generator.open(tmp_path / "bundle")
    from heartbeat_export.parity import beating_ring

    for steps in (1, 2, 4):
        clip = generator(beating_ring(4, 64), steps=steps)
        assert clip.frames.shape == (4, 64, 64)
        assert clip.provenance["sampler"] == "few_step"
