"""Weights from files: our own folders, and Stable Diffusion 1.5 in every spelling in use.

Spellings of SD1.5, see `unet_name`, `vae_name`, `text_name`: the original single file (LDM names),
diffusers' folders with current and with deprecated attention names, text encoders with and without
`text_model.`. Each stored tensor lands exactly once, or nothing is loaded and one error lists every
fault. Stable Diffusion is read from safetensors only, which hold numbers and no code.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from heartbeat_fast.models.weight_files import CheckpointError as CheckpointError
from heartbeat_fast.models.weight_files import read as read
from heartbeat_fast.models.weight_files import read_any

if TYPE_CHECKING:
    from heartbeat_fast.models.heartbeat import HeartBeat

State = Mapping[str, Tensor]

UNET_BY_LDM = {
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "middle_block.0.": "mid_block.resnets.0.",
    "middle_block.1.": "mid_block.attentions.0.",
    "middle_block.2.": "mid_block.resnets.1.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
}
RESNET_BY_LDM = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "nin_shortcut": "conv_shortcut",
}
VAE_ATTENTION = {  # LDM and deprecated diffusers
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
SINGLE_FILE = {  # the parts' prefixes in the original file
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
# What CLIP's own folder holds besides its text encoder.
CLIP_OTHERS = re.compile(r"vision_model\.|(visual|text)_projection\.|logit_scale$")
CLIP_FILES = ("model.safetensors", "pytorch_model.bin")
# The original file also holds averaged weights and the noise schedule, which we do not take.
NOT_WEIGHTS = re.compile(r"model_ema\.|(betas|logvar|posterior_\w+|\w*alphas_\w+)$")


def unet_name(key: str, layers: int = 2) -> str:
    """Diffusers' current name of a UNet tensor; layers: residual blocks per level."""
    for old, new in UNET_BY_LDM.items():
        if key.startswith(old):
            return _resnet_name(new + key[len(old) :])
    found = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", key)
    if not found:
        return key
    side, number, rest = found[1], int(found[2]), found[4]
    # Going down conv_in counts as block 0, and each level ends with its downsampling.
    level, j = divmod(number - (side == "input"), layers + 1)
    stage = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if rest.startswith("op."):
        return f"{stage}.downsamplers.0.conv.{rest[3:]}"
    if rest.startswith("conv."):
        return f"{stage}.upsamplers.0.{rest}"
    return _resnet_name(f"{stage}.{'resnets' if found[3] == '0' else 'attentions'}.{j}.{rest}")


def vae_name(key: str, levels: int = 4) -> str:
    """Diffusers' current name of a VAE tensor."""
    key = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
    key = key.replace(".mid.attn_1.", ".mid_block.attentions.0.").replace(
        ".norm_out.", ".conv_norm_out."
    )
    key = re.sub(r"\.down\.(\d)\.", r".down_blocks.\1.", key)
    key = re.sub(r"\.up\.(\d)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", key)
    key = re.sub(r"\.block\.(\d)\.", r".resnets.\1.", key)
    key = re.sub(r"\.(down|up)sample\.", r".\1samplers.0.", key)
    return _resnet_name(
        re.sub(
            r"(\.attentions\.0\.)(\w+)(\.\w+)$",
            lambda m: m[1] + VAE_ATTENTION.get(m[2], m[2]) + m[3],
            key,
        )
    )


def text_name(key: str) -> str | None:
    """Name of a CLIP text tensor without `text_model.`; None for position ids, a constant."""
    key = key.removeprefix("text_model.")
    return None if key == "embeddings.position_ids" else key


def _resnet_name(key: str) -> str:
    """The inside of a residual block from LDM's names."""
    for old, new in RESNET_BY_LDM.items():
        key = key.replace(f".{old}.", f".{new}.")
    return key


def rename(state: State, name: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The state under other names; None drops a tensor.

    Raises:
        CheckpointError: two tensors with one name.
    """
    out: dict[str, Tensor] = {}
    twice = []
    for key, tensor in state.items():
        new = name(key)
        if new in out:
            twice.append(f"{key} (as {new})")
        elif new is not None:
            out[new] = tensor
    if twice:
        raise CheckpointError(f"stored twice: {', '.join(twice)}")
    return out


def faults(part: str, wanted: State, state: State) -> list[str]:
    """One line per kind of fault: what is missing, extra or of another shape; none if it fits."""
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    kinds = {
        "missing": sorted(shapes.keys() - state.keys()),
        "not ours": sorted(state.keys() - shapes.keys()),
        "mis-shaped": [
            f"{key} {tuple(state[key].shape)}, wanted {shape}"
            for key, shape in shapes.items()
            if key in state and tuple(state[key].shape) != shape
        ],
    }
    return [f"{part}: {kind} {', '.join(keys)}" for kind, keys in kinds.items() if keys]


def raise_for(found: Iterable[str], source: Path) -> None:
    """Raises CheckpointError with all faults, if there are any."""
    text = "; ".join(found)
    if text:
        raise CheckpointError(f"{source} does not fit the model: {text}")


def land(module: nn.Module, state: State) -> None:
    """Puts tensors that were found to fit into their module, in its own precision. Works on the
    meta device too: the module then takes the state's tensors."""
    wanted = module.state_dict()
    state = {key: tensor.to(wanted[key].dtype) for key, tensor in state.items()}
    module.load_state_dict(state, strict=False, assign=True)


def load_sd15(model: "HeartBeat", path: str | Path) -> None:
    """Starts a `base` model from Stable Diffusion 1.5: UNet, VAE and CLIP text encoder.

    What SD1.5 lacks starts as nothing: conv_in's weights for the local features and the image
    branch's values are set to zero, as the temporal layers' outputs are from the start. The
    denoiser then equals SD1.5's UNet frame by frame, whatever the local and image conditions.

    Args:
        path: a diffusers folder (unet/, vae/, text_encoder/) or an original single file.

    Raises:
        CheckpointError: unreadable, or missing, extra or mis-shaped tensors, all listed.
    """
    path = Path(path)
    load_sd15_state(model, _folder(path) if path.is_dir() else _single_file(path), path)


def load_sd15_state(model: "HeartBeat", parts: Mapping[str, State], source: Path) -> None:
    """As load_sd15, from tensors by part ("unet", "vae", "text_encoder") in any spelling."""
    config = model.denoiser.config
    unet = rename(parts["unet"], lambda key: unet_name(key, config.layers))
    vae_model, text_model = autoencoder(model.codec), model.text_encoder
    vae = rename(parts["vae"], lambda key: vae_name(key, len(model.config.codec.widths)))
    vae_wanted = vae_model.state_dict()
    # LDM's VAE attention is made of 1×1 convolutions, diffusers' of linear layers.
    vae = {
        k: t[:, :, 0, 0] if _is_conv_for_linear(t, vae_wanted.get(k)) else t for k, t in vae.items()
    }
    text = text_state(text_model, parts["text_encoder"])

    denoiser = model.denoiser.state_dict()
    added = {
        key: tensor for key, tensor in denoiser.items() if "_ip." in key or "_temporal." in key
    }
    wanted = {key: tensor for key, tensor in denoiser.items() if key not in added}
    wanted["conv_in.weight"] = wanted["conv_in.weight"][:, : config.latent_channels]
    found = faults("unet", wanted, unet) + faults("vae", vae_wanted, vae)
    raise_for(found + faults("text_encoder", text_model.state_dict(), text), source)

    stem = unet["conv_in.weight"]
    local = stem.new_zeros(stem.shape[0], config.local_channels, *stem.shape[2:])
    unet["conv_in.weight"] = torch.cat([stem, local], dim=1)
    for key, tensor in added.items():
        if "to_v_ip." in key:
            unet[key] = torch.zeros_like(tensor)
    land(model.denoiser, unet)
    land(vae_model, vae)
    land(text_model, text)


def load_clip(text_model: nn.Module, path: str | Path) -> None:
    """Puts CLIP's text encoder (ViT-L/14 for `base`) into a CLIPTextModel of its size.

    Args:
        path: CLIP's own transformers folder, a text encoder's folder, or one of their files.

    Raises:
        CheckpointError: unreadable, or missing, extra or mis-shaped tensors, all listed.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in CLIP_FILES]
        path = next((file for file in files if file.is_file()), files[0])
    state = {k: t for k, t in read_any(path).items() if not CLIP_OTHERS.match(k)}
    text = text_state(text_model, state)
    raise_for(faults("text_encoder", text_model.state_dict(), text), path)
    land(text_model, text)


def text_state(text_model: nn.Module, state: State) -> dict[str, Tensor]:
    """A CLIP text state under the names of the installed transformers."""
    prefix = (
        "text_model." if any(k.startswith("text_model.") for k in text_model.state_dict()) else ""
    )
    return {prefix + key: tensor for key, tensor in rename(state, text_name).items()}


def autoencoder(codec: nn.Module) -> nn.Module:
    """The module whose weights a vae/ folder holds: diffusers' own, where a codec wraps it.

    By its class's name: `tiny` is trained on machines that have no diffusers.
    """
    return next((m for m in codec.modules() if type(m).__name__ == "AutoencoderKL"), codec)


def _is_conv_for_linear(tensor: Tensor, wanted: Tensor | None) -> bool:
    """Whether a 1×1 convolution's weight is stored where a linear layer's is wanted."""
    return wanted is not None and wanted.ndim == 2 and tuple(tensor.shape[2:]) == (1, 1)


def _folder(path: Path) -> dict[str, dict[str, Tensor]]:
    """The parts of a diffusers folder; half precision where nothing else is there."""
    parts = {}
    for part in SINGLE_FILE:
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        files = [path / part / f"{stem}{half}.safetensors" for half in ("", ".fp16")]
        parts[part] = read(next((file for file in files if file.is_file()), files[0]))
    return parts


def _single_file(path: Path) -> dict[str, dict[str, Tensor]]:
    """The parts of an original file."""
    state = read(path)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in SINGLE_FILE}
    unknown = []
    for key, tensor in state.items():
        part = next((p for p, prefix in SINGLE_FILE.items() if key.startswith(prefix)), None)
        if part is not None:
            parts[part][key.removeprefix(SINGLE_FILE[part])] = tensor
        elif not NOT_WEIGHTS.match(key):
            unknown.append(key)
    raise_for([f"file: not ours {', '.join(sorted(unknown))}"] if unknown else [], path)
    return parts
