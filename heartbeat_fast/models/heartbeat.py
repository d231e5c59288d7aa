"""The assembled model: conditions and noisy latents in, noise or v out; and its folder on disk.

Legend: B clips, F frames, C channels, h w latents. A folder is laid out as diffusers lays out a
pipeline: one subfolder per component with config.json and safetensors, model_index.json above.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from heartbeat_fast.errors import FileError
from heartbeat_fast.models.checkpoints import (
    CheckpointError,
    autoencoder,
    faults,
    land,
    raise_for,
    read,
    text_state,
)
from heartbeat_fast.models.codec import build_codec
from heartbeat_fast.models.conditioning import LOCAL_INPUTS, Conditioning
from heartbeat_fast.models.config import HeartBeatConfig, from_dict, to_dict
from heartbeat_fast.models.denoiser import Denoiser
from heartbeat_fast.models.weight_files import Unfilled, read_json

INDEX = "model_index.json"
TRANSFORMERS = ("text_encoder", "image_encoder")  # saved as that library saves


class HeartBeat(Conditioning):
    """HeartBeat (Zhou et al., MICCAI 2024): a video UNet under seven conditions, and its codec."""

    def __init__(self, config: HeartBeatConfig) -> None:
        super().__init__(config)
        self.denoiser = Denoiser(config.denoiser)
        self.codec = build_codec(config.codec)

    def predict(
        self, z: Tensor, t: Tensor, conditions: Mapping[str, Tensor], temporal: bool = True
    ) -> Tensor:
        """The plain pass: every step of the way, nothing kept.

        Args:
            z: noisy latents (B,F,C,h,w).
            t: timesteps (B,).
            conditions: tokens (B,77), ef (B,1), image, sketch, mask, skeleton, flow, present (B,7),
                shaped as `Conditions.arrays` makes them.
            temporal: False makes frames independent of each other.

        Returns:
            Predicted noise or v (`config.prediction`), (B,F,C,h,w).
        """
        c = conditions
        text = self.text_context(c["tokens"], c["ef"], c["present"])
        image = self.image_context(c["image"], c["present"])
        local = self.local_features(c["sketch"], c["mask"], c["skeleton"], c["flow"], c["present"])
        return self.denoiser(z, t, local, text, image, temporal)

    def train(self, mode: bool = True) -> "HeartBeat":
        """As torch's, but components without a trainable parameter stay in evaluation: a frozen
        adapter must not go on gathering BatchNorm statistics."""
        super().train(mode)
        for part in self.children():
            if mode and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def components(self) -> dict[str, nn.Module]:
        """The parts of a folder, by subfolder."""
        small = {"ef_token": self.ef_token, **{n: self.get_submodule(n) for n in LOCAL_INPUTS}}
        return {
            "unet": self.denoiser,
            "vae": autoencoder(self.codec),
            "text_encoder": self.text_encoder,
            "image_encoder": self.image_encoder,
            "adapter": self.adapter,
            "conditions": nn.ModuleDict(small),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model's folder, whole or not at all; one that is there is replaced.

        Raises:
            FileError: something else is there, or it cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / INDEX).is_file():
            raise FileError(f"{folder}: is there and is no model folder; wanted a new name")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                dir=folder.parent, prefix=f".{folder.name}-"
            ) as scratch:
                fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
                self._write(fresh)
                if folder.exists():
                    folder.rename(old)
                fresh.rename(folder)
        except OSError as error:
            raise FileError(f"{folder}: cannot be written ({error.strerror or error})") from error

    def _write(self, folder: Path) -> None:
        """The files of a folder that does not exist yet."""
        parts = self.components()
        index: dict[str, Any] = {"_class_name": "HeartBeat"}
        for name, part in parts.items():
            (folder / name).mkdir(parents=True)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
            _write_json(folder / name / "config.json", _part_config(self.config, name, part))
            # Clones: safetensors refuses tensors that share memory.
            state = {
                key: tensor.detach().clone(memory_format=torch.contiguous_format)
                for key, tensor in part.state_dict().items()
            }
            save_file(state, folder / name / _weights(name), metadata={"format": "pt"})
        _write_json(folder / INDEX, {**index, "config": to_dict(self.config)})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "HeartBeat":
        """Reads a folder that save_pretrained wrote; nothing in it is executed.

        Raises:
            ConfigError: model_index.json has unknown, missing or wrong fields.
            CheckpointError: a file is missing or unreadable, or tensors are missing, extra or
                mis-shaped (all are listed).
        """
        folder = Path(folder)
        config = from_dict(HeartBeatConfig, read_json(folder / INDEX).get("config", {}))
        states = {}
        # Shapes are compared on the meta device first, so a config cannot ask for more memory than
        # the weight files have.
        with torch.device("meta"):
            parts = cls(config).components()
        found: list[str] = []
        for name, part in parts.items():
            if name not in TRANSFORMERS:
                stored = read_json(folder / name / "config.json")
                if stored.get("_class_name") == "EchoCodec":  # folders of earlier releases lack it
                    stored.setdefault("decoder_widths", [])
                stored = {k: v for k, v in stored.items() if k[0] != "_" or k == "_class_name"}
                if stored != json.loads(json.dumps(_part_config(config, name, part))):
                    raise CheckpointError(
                        f"{folder / name}: config.json differs from {INDEX}'s config"
                    )
            state = read(folder / name / _weights(name))
            states[name] = text_state(part, state) if name == "text_encoder" else state
            found += faults(name, part.state_dict(), states[name])
        raise_for(found, folder)
        with Unfilled():  # every parameter was just found in a file
            model = cls(config)
        for name, part in model.components().items():
            land(part, states[name])
        return model


def _weights(part: str) -> str:
    """Name of a part's weight file."""
    stem = "model" if part in TRANSFORMERS else "diffusion_pytorch_model"
    return f"{stem}.safetensors"


def _part_config(config: HeartBeatConfig, name: str, part: nn.Module) -> dict[str, Any]:
    """config.json of a part: transformers' and diffusers' own where the class is theirs."""
    if name in TRANSFORMERS:
        return part.config.to_dict()  # type: ignore[union-attr, operator]
    if type(part).__name__ == "AutoencoderKL":
        # Without its notes to itself: one is a list made of a set, another order in every process.
        told = {k: v for k, v in part.config.items() if k[0] != "_"}  # type: ignore[union-attr, operator]
        return {"_class_name": "AutoencoderKL", **told}
    dim = config.denoiser.context_dim
    own = {
        "unet": to_dict(config.denoiser),
        "vae": to_dict(config.codec),
        "adapter": {**to_dict(config.image), "context_dim": dim},
        "conditions": {
            "local_hidden": config.local_hidden,
            "local_channels": config.denoiser.local_channels,
            "context_dim": dim,
        },
    }
    return {"_class_name": type(part).__name__, **own[name]}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Readable JSON, synced to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def stage_parameters(
    model: HeartBeat, stage: int, train_cross_attention: bool = True, thaw: bool = False
) -> dict[str, nn.Parameter]:
    """What a training stage trains, by name.

    Stage 1, images: everything but the codec, the temporal layers and the flow encoder; text and
    image encoders only where they do not come pretrained. Stage 2, clips: the temporal layers and
    the flow encoder. The paper's text freezes cross-attention in stage 2 and its figure does not:
    train_cross_attention decides. thaw: stage 2 trains what stage 1 did as well.
    """
    temporal = {f"denoiser.{name}" for name in model.denoiser.temporal_parameters()}
    cross = {f"denoiser.{name}" for name in model.denoiser.cross_attention_parameters()}
    encoders = ("text_encoder.", "image_encoder.") if model.config.pretrained else ()
    frozen = ("codec.", "flow.", *encoders)
    named = dict(model.named_parameters())
    if stage == 1:
        return {k: p for k, p in named.items() if k not in temporal and not k.startswith(frozen)}
    if thaw:
        return {k: p for k, p in named.items() if not k.startswith(("codec.", *encoders))}
    chosen = temporal | cross if train_cross_attention else temporal
    return {k: p for k, p in named.items() if k in chosen or k.startswith("flow.")}


def train_only(model: HeartBeat, parameters: Mapping[str, nn.Parameter]) -> None:
    """Lets exactly these parameters of the model ask for gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in parameters)
