"""The assembled model: absent conditions, clips apart, stages, folders, sizes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, SamVisionModel

from heartbeat_fast.conditions import NAMES, TOKENS, Conditions
from heartbeat_fast.errors import FileError
from heartbeat_fast.models.checkpoints import CheckpointError
from heartbeat_fast.models.config import NANO, TINY, ConfigError, to_dict
from heartbeat_fast.models.denoiser import Denoiser
from heartbeat_fast.models.heartbeat import HeartBeat, stage_parameters, train_only

B, F, S, L = 2, NANO.frames, NANO.size, NANO.latent


@pytest.fixture(scope="module")
def model() -> HeartBeat:
    """Nano, every parameter off its special start so that everything has an effect."""
    torch.manual_seed(0)
    model = HeartBeat(NANO).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("absent") or "_temporal." in name or "pos_embed" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def full(seed: int = 1, clips: int = B, frames: int = F) -> dict[str, Tensor]:
    """Random conditions, all present."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g)

    return {
        "tokens": torch.randint(2, 500, (clips, TOKENS), generator=g),
        "ef": rand(clips, 1),
        "image": rand(clips, 3, S, S),
        "sketch": rand(clips, 1, S, S),
        "mask": rand(clips, frames, 4, S, S),
        "skeleton": rand(clips, frames, 1, S, S),
        "flow": rand(clips, frames, 2, S, S) * 4 - 2,
        "present": torch.ones(clips, len(NAMES)),
    }


def latents(clips: int = B, frames: int = F) -> tuple[Tensor, Tensor]:
    """z and t."""
    torch.manual_seed(5)
    return torch.randn(clips, frames, 4, L, L), torch.tensor([20, 800])[:clips]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def without(conditions: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The same inputs with flags of these names down."""
    present = conditions["present"].clone()
    present[:, [NAMES.index(name) for name in names]] = 0
    return {**conditions, "present": present}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_dropping_a_condition_equals_passing_its_null(model: HeartBeat, name: str) -> None:
    """With its flag down a condition's content is without effect; with its flag up it has one."""
    z, t = latents()
    given, other = full(), full(seed=2)
    key = "tokens" if name == "text" else name
    changed = {**given, key: other[key]}
    zero = {**given, key: torch.zeros_like(given[key])}
    absent = model.predict(z, t, without(given, name))
    assert torch.equal(absent, model.predict(z, t, without(changed, name)))
    assert torch.equal(absent, model.predict(z, t, without(zero, name)))
    assert relative(model.predict(z, t, changed), model.predict(z, t, given)) > 1e-5
    assert relative(absent, model.predict(z, t, given)) > 1e-5


@torch.no_grad()
def test_nulls_are_what_they_are_said_to_be(model: HeartBeat) -> None:
    """Text: the empty prompt. Image: no image branch at all. Local: zero features."""
    z, t = latents()
    given = full()
    empty = torch.tensor([[NANO.text.start] + [NANO.text.end] * (TOKENS - 1)] * B)
    expected = model.predict(z, t, {**given, "tokens": empty})
    assert torch.equal(model.predict(z, t, without(given, "text")), expected)

    text = model.text_context(given["tokens"], given["ef"], given["present"])
    assert text.shape == (B, TOKENS + 1, 32)
    nothing = without(given, "sketch", "mask", "skeleton", "flow", "image")
    local = torch.zeros(B, F, NANO.denoiser.local_channels, L, L)
    expected = model.denoiser(z, t, local, text, image=None)
    assert relative(model.predict(z, t, nothing), expected) <= 1e-5

    none = without(given, *NAMES)
    ef_token = model.text_context(given["tokens"], given["ef"], none["present"])[:, -1]
    assert torch.equal(ef_token, model.ef_token.absent.expand(B, -1))


@torch.no_grad()
def test_clips_of_a_batch_never_see_each_other(model: HeartBeat) -> None:
    """Every condition, flag and latent of clip 0 changed, clip 1's output stays."""
    z, t = latents()
    given, other = full(), without(full(seed=3), "mask", "text")
    mixed = {k: torch.cat([other[k][:1], given[k][1:]]) for k in given}
    before = model.predict(z, t, given)
    after = model.predict(torch.cat([z[:1] + 1, z[1:]]), t, mixed)
    assert relative(after[1], before[1]) <= 1e-5
    alone = model.predict(z[1:], t[1:], {k: v[1:] for k, v in given.items()})
    assert relative(before[1:], alone) <= 1e-5


@torch.no_grad()
def test_one_frame_is_the_image_model(model: HeartBeat) -> None:
    """Frame f of a pass without temporal layers is the pass of that frame alone."""
    z, t = latents()
    given = full()
    out = model.predict(z, t, given, temporal=False)
    one = {k: v[:, 2:3] if k in ("mask", "skeleton", "flow") else v for k, v in given.items()}
    assert relative(model.predict(z[:, 2:3], t, one), out[:, 2:3]) <= 1e-5


@torch.no_grad()
def test_takes_what_conditions_make(model: HeartBeat) -> None:
    """Conditions.arrays fits predict; its zeros and flags say absent."""
    labels = np.zeros((F, S, S), np.uint8)
    labels[:, 16:32, 16:32] = 1
    conditions = Conditions(mask=labels, ef=55.0, frames=F, size=S)
    inputs = {k: torch.from_numpy(v) for k, v in conditions.arrays().items()}
    inputs["tokens"] = torch.full((1, TOKENS), NANO.text.end)
    z, t = latents(clips=1)
    assert model.predict(z, t, inputs).shape == (1, F, 4, L, L)


@pytest.mark.parametrize("pretrained", [False, True])
def test_stages_train_what_the_paper_trains(pretrained: bool) -> None:
    """Stage 1 and 2 by component; frozen parts get no gradient, and keep their statistics."""
    model = HeartBeat(replace(NANO, pretrained=pretrained))
    one, two = stage_parameters(model, 1), stage_parameters(model, 2)
    two_frozen = stage_parameters(model, 2, train_cross_attention=False)
    encoders = {"text_encoder", "image_encoder"}
    trained = {"adapter", "ef_token", "sketch", "mask", "skeleton", "denoiser"}
    assert {n.split(".")[0] for n in one} == trained | (set() if pretrained else encoders)
    assert not any("_temporal." in n for n in one)
    assert all("_temporal." in n or n.startswith("flow.") for n in two_frozen)
    assert {n for n in two if n not in two_frozen} == {n for n in one if ".attn2." in n}
    assert not set(one) & set(two_frozen)
    assert set(stage_parameters(model, 2, thaw=True)) == set(one) | set(two_frozen)

    train_only(model, two_frozen)
    model.train()
    assert not model.adapter.training
    assert model.flow.training
    assert model.denoiser.training
    statistics = model.adapter.batch_norm.running_mean.clone()
    z, t = latents()
    model.predict(z, t, full()).square().mean().backward()
    assert torch.equal(model.adapter.batch_norm.running_mean, statistics)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(two_frozen)


def test_every_trained_parameter_gets_a_gradient(model: HeartBeat) -> None:
    """With all conditions given, nothing but the codec is left out."""
    model.zero_grad()
    z, t = latents()
    given = full()
    given["present"][0] = 0
    model.predict(z, t, given).square().mean().backward()
    left_out = {n for n, p in model.named_parameters() if p.grad is None}
    assert {n.split(".")[0] for n in left_out} == {"codec"}


@torch.no_grad()
def test_runs_in_bfloat16(model: HeartBeat) -> None:
    """Autocast on the CPU gives the same picture, to bfloat16's precision."""
    z, t = latents()
    expected = model.predict(z, t, full())
    with torch.autocast("cpu", torch.bfloat16):
        out = model.predict(z, t, full())
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), expected) < 0.05


@torch.no_grad()
def test_folder_round_trip(model: HeartBeat, tmp_path: Path) -> None:
    """Saved, read back, saved over: the same model; transformers reads its parts alone."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    model.save_pretrained(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    parts = {"unet", "vae", "text_encoder", "image_encoder", "adapter", "conditions"}
    assert {p.name for p in folder.iterdir()} == parts | {"model_index.json"}
    again = HeartBeat.from_pretrained(folder).eval()
    state = model.state_dict()
    assert again.config == model.config
    assert all(torch.equal(t, state[k]) for k, t in again.state_dict().items())
    z, t = latents()
    assert torch.equal(again.predict(z, t, full()), model.predict(z, t, full()))

    tokens, image = full()["tokens"], full()["image"]
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    sam = SamVisionModel.from_pretrained(folder / "image_encoder").eval()
    assert torch.equal(text(tokens)[0], model.text_encoder(tokens)[0])
    assert torch.equal(sam(image)[0], model.image_encoder(image)[0])


def test_altered_folders_are_refused(model: HeartBeat, tmp_path: Path) -> None:
    """Unknown fields, other configs, missing, extra, mis-shaped tensors, cut files: all named."""
    whole = tmp_path / "whole"
    model.save_pretrained(whole)

    def altered() -> Path:
        folder = tmp_path / "altered"
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(whole, folder))

    def expect(folder: Path, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            HeartBeat.from_pretrained(folder)

    def index(folder: Path, **changes: object) -> None:
        values = json.loads((folder / "model_index.json").read_text())
        values["config"] |= changes
        (folder / "model_index.json").write_text(json.dumps(values))

    for changes, message in (
        ({"colour": "red"}, "HeartBeatConfig has no field colour"),
        ({"steps": "many"}, "steps is 'many', wanted int"),
        ({"local_hidden": 10**9}, "local_hidden is 1000000000"),
        ({"prediction": "sample"}, "prediction is 'sample'"),
    ):
        index(folder := altered(), **changes)
        expect(folder, ConfigError, message)
    index(folder := altered(), denoiser=to_dict(replace(NANO.denoiser, ff_mult=3)))
    expect(folder, CheckpointError, r"unet: config\.json differs")

    file = (folder := altered()) / "adapter" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["linear.bias"]
    save_file({**state, "more": torch.ones(1), "norm.bias": torch.ones(3)}, file)
    expect(folder, CheckpointError, r"missing linear\.bias; .*not ours more; .*norm\.bias \(3,\)")
    file.write_bytes(file.read_bytes()[:-9])
    expect(folder, CheckpointError, "not a whole safetensors file")
    (folder / "model_index.json").write_text("[1]")
    expect(folder, CheckpointError, "wanted a JSON object")
    expect(tmp_path / "none", CheckpointError, "missing or not JSON")
    (tmp_path / "other").mkdir()
    with pytest.raises(FileError, match="is no model folder"):
        model.save_pretrained(tmp_path / "other")


@torch.no_grad()
def test_tiny_has_the_size_it_was_designed_for() -> None:
    """About 4.4 M parameters and 27 GFLOP per step of 16 frames in the loop."""
    denoiser = Denoiser(TINY.denoiser).eval()
    assert sum(p.numel() for p in denoiser.parameters()) == pytest.approx(4.4e6, rel=0.05)
    with torch.device("meta"):
        meta = Denoiser(TINY.denoiser)
        shape = (1, 16, TINY.denoiser.latent_channels, 32, 32)
        z, text = torch.randn(shape), torch.randn(1, 78, 128)
        kv = meta.context(text, torch.randn(1, 64, 128))
        share, temb = torch.randn(1, 16, 64, 32, 32), meta.time(torch.ones(1))
        with FlopCounterMode(display=False) as counter:
            meta.denoise(z, temb, share, kv)
    assert counter.get_total_flops() == pytest.approx(27e9, rel=0.05)
