"""Stable Diffusion 1.5's files: every tensor of the real key lists lands once, in each spelling."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from heartbeat_fast.models.checkpoints import (
    CheckpointError,
    autoencoder,
    load_sd15,
    load_sd15_state,
    text_name,
    unet_name,
    vae_name,
)
from heartbeat_fast.models.config import BASE, NANO, CodecConfig, DenoiserConfig, HeartBeatConfig
from heartbeat_fast.models.heartbeat import HeartBeat

SHARED = Path(__file__).parents[2] / "shared"
SD15 = SHARED / "data" / "sd15"
needs_lists = pytest.mark.skipif(not SD15.is_dir(), reason="SD1.5's key lists are not at hand")

SMALL = HeartBeatConfig(
    name="small",
    frames=2,
    size=64,
    denoiser=DenoiserConfig(
        local_channels=8,
        channels=(32, 32, 64, 64),
        heads=(4,) * 4,
        groups=8,
        context_dim=32,
        frames=2,
    ),
    text=replace(NANO.text, layers=2),
    image=NANO.image,
    codec=CodecConfig(widths=(32, 32, 32, 32)),
)


def meta_base() -> HeartBeat:
    """The base preset without memory."""
    with torch.device("meta"):
        return HeartBeat(BASE)


def storage(tensor: Tensor) -> int:
    """What tells tensors of the meta device apart, which have no addresses."""
    return int(tensor.untyped_storage()._cdata)


def key_list(name: str, prefix: str = "") -> dict[str, Tensor]:
    """A key list as tensors on the meta device."""
    state = {}
    for line in (SD15 / "keylists" / f"{name}.txt").read_text().split("\n"):
        if line.strip():
            key, shape = line.split(" ")
            state[prefix + key] = torch.empty(json.loads(shape), device="meta")
    return state


UNETS = ["UNET-v1-SD", "diffusers-UNet2DConditionModel"]
VAES = ["VAE-v1-SD", "diffusers-AutoencoderKL", "hf-file-vae-fp32-deprecated-attn-names"]
TEXTS = ["CLIP-v1-SD", "hf-file-text_encoder", "transformers-CLIPTextModel"]


@needs_lists
@pytest.mark.parametrize("spelling", range(3))
def test_every_tensor_lands_exactly_once(spelling: int) -> None:
    """All tensors of the real lists go to distinct tensors of the model, and fill it."""
    model = meta_base()
    lists = (UNETS[spelling % 2], VAES[spelling], TEXTS[spelling])
    unet, vae, text = (key_list(name) for name in lists)
    assert (len(unet), len(vae)) == (686, 248)
    unet_names = {unet_name(key): tensor for key, tensor in unet.items()}
    vae_names = {vae_name(key): tensor for key, tensor in vae.items()}
    text_names = {text_name(key) for key in text} - {None}
    assert (len(unet_names), len(vae_names), len(text_names)) == (686, 248, 196)

    load_sd15_state(model, {"unet": unet, "vae": vae, "text_encoder": text}, Path("lists"))

    own = model.denoiser.state_dict()
    assert {k for k in own if "_ip." not in k and "_temporal." not in k} == set(unet_names)
    assert own["conv_in.weight"].shape == (320, 4 + 64, 3, 3)
    assert set(autoencoder(model.codec).state_dict()) == set(vae_names)
    assert len(model.text_encoder.state_dict()) == 196
    # The model now holds the lists' own tensors, told apart by their storages; conv_in has grown.
    taken = Counter(storage(t) for t in model.state_dict().values())
    given = [t for k, t in {**unet_names, **vae, **text}.items() if "position_ids" not in k]
    grown = unet_names["conv_in.weight"]
    assert all(taken[storage(t)] == 1 for t in given if t is not grown)


@needs_lists
def test_names_are_diffusers_own() -> None:
    """LDM's and the deprecated names become exactly the current lists, shape by shape."""
    for name, variants, current in (
        (unet_name, UNETS, "diffusers-UNet2DConditionModel"),
        (vae_name, VAES, "diffusers-AutoencoderKL"),
        (text_name, TEXTS, "transformers-CLIPTextModel"),
    ):
        wanted = {k: t.shape for k, t in key_list(current).items()}
        for variant in variants:
            got = {name(k): t.shape for k, t in key_list(variant).items() if name(k)}
            assert set(got) == set(wanted), variant
            assert all(got[k][: len(s)] == s for k, s in wanted.items()), variant


@needs_lists
def test_base_is_the_published_configuration() -> None:
    """Diffusers' and transformers' models built from the published configs have base's tensors."""
    folder = SD15 / "runwayml-stable-diffusion-v1-5"
    model = meta_base()
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            json.loads((folder / "unet/config.json").read_text())
        )
        vae = AutoencoderKL.from_config(json.loads((folder / "vae/config.json").read_text()))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    own = model.denoiser.state_dict()
    for key, tensor in unet.state_dict().items():
        assert own[key].shape == tensor.shape or key == "conv_in.weight"
    for ours, theirs in ((autoencoder(model.codec), vae), (model.text_encoder, text)):
        shapes = {k: t.shape for k, t in theirs.state_dict().items()}
        assert {k: t.shape for k, t in ours.state_dict().items()} == shapes
    assert model.text_encoder.config.hidden_act == text.config.hidden_act


@needs_lists
def test_faults_are_listed_together_and_nothing_is_loaded() -> None:
    """A missing, an extra and a mis-shaped tensor, in three parts: one error names each."""
    model = meta_base()
    unet, vae, text = (key_list(name) for name in (UNETS[0], VAES[0], TEXTS[0]))
    unet["input_blocks.4.1.extra"] = torch.empty(3, device="meta")
    del vae["decoder.conv_in.bias"]
    text["final_layer_norm.bias"] = torch.empty(5, device="meta")
    before = {k: id(t) for k, t in model.state_dict(keep_vars=True).items()}
    with pytest.raises(CheckpointError) as error:
        load_sd15_state(model, {"unet": unet, "vae": vae, "text_encoder": text}, Path("lists"))
    message = str(error.value)
    assert "unet: not ours down_blocks.1.attentions.0.extra" in message
    assert "vae: missing decoder.conv_in.bias" in message
    assert "final_layer_norm.bias (5,), wanted (768,)" in message
    assert "\n" not in message
    assert before == {k: id(t) for k, t in model.state_dict(keep_vars=True).items()}


@needs_lists
def test_a_tensor_stored_twice_is_refused() -> None:
    """Old and current name of one tensor in the same file."""
    vae = key_list(VAES[1])
    vae["encoder.mid_block.attentions.0.query.bias"] = torch.empty(512, device="meta")
    with pytest.raises(CheckpointError, match=r"stored twice: .*query\.bias"):
        load_sd15_state(
            meta_base(),
            {"unet": key_list(UNETS[0]), "vae": vae, "text_encoder": key_list(TEXTS[0])},
            Path("lists"),
        )


def small_parts() -> tuple[UNet2DConditionModel, dict[str, dict[str, Tensor]]]:
    """A narrow SD1.5 by diffusers and transformers, and its tensors by part."""
    torch.manual_seed(0)
    denoiser = SMALL.denoiser
    unet = UNet2DConditionModel(
        block_out_channels=denoiser.channels,
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    ).eval()
    model = HeartBeat(SMALL)
    return unet, {
        "unet": unet.state_dict(),
        "vae": autoencoder(model.codec).state_dict(),
        "text_encoder": model.text_encoder.state_dict(),
    }


@pytest.mark.parametrize("half", ["", ".fp16"])
@torch.no_grad()
def test_loaded_model_equals_the_unet_for_any_condition(tmp_path: Path, half: str) -> None:
    """From a diffusers folder: video output equals diffusers' frame by frame, local features and
    image tokens present or not, until training changes that."""
    unet, parts = small_parts()
    for part, state in parts.items():
        (tmp_path / part).mkdir()
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        kept = {k: t.half() if half else t for k, t in state.items()}
        save_file(kept, tmp_path / part / f"{stem}{half}.safetensors")
    model = HeartBeat(SMALL).eval()
    load_sd15(model, tmp_path)
    if half:
        unet = unet.half().float()
    z, local = torch.randn(2, 2, 4, 8, 8), torch.randn(2, 2, 8, 8, 8)
    t, text, image = torch.tensor([7, 900]), torch.randn(2, 9, 32), torch.randn(2, 4, 32)
    expected = unet(z.flatten(0, 1), t.repeat_interleave(2), text.repeat_interleave(2, 0)).sample
    out = model.denoiser(z, t, local, text, image).flatten(0, 1)
    assert ((out - expected).abs().max() / expected.abs().max()).item() <= 1e-5
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(p.requires_grad for p in model.denoiser.parameters())


def test_single_file_and_what_it_may_hold_besides(tmp_path: Path) -> None:
    """Parts by their prefixes; averaged weights and schedule ignored; unknown tensors listed."""
    _, parts = small_parts()
    prefixes = (
        "model.diffusion_model.",
        "first_stage_model.",
        "cond_stage_model.transformer.text_model.",
    )
    state = {
        prefix + key: tensor
        for prefix, part in zip(prefixes, parts.values(), strict=True)
        for key, tensor in part.items()
    }
    state |= {"model_ema.decay": torch.ones(1), "sqrt_alphas_cumprod": torch.ones(5)}
    path = tmp_path / "v1-5.safetensors"
    save_file(state, path)
    model = HeartBeat(SMALL)
    load_sd15(model, path)
    key = "mid_block.attentions.0.proj_in.weight"
    assert torch.equal(model.denoiser.state_dict()[key], parts["unet"][key])
    save_file({**state, "lora.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"not ours lora\.weight"):
        load_sd15(model, path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    """A pickle, a missing file, a truncated one."""
    model = HeartBeat(SMALL)
    (tmp_path / "v1-5.ckpt").write_bytes(b"anything")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    for name, message in (
        ("v1-5.ckpt", "other formats can hold code"),
        ("none.safetensors", "no such file"),
        ("cut.safetensors", "not a whole safetensors file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_sd15(model, tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"unet.*no such file"):
        load_sd15(model, tmp_path / "empty")
