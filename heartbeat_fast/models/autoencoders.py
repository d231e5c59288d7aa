"""Published autoencoders as codecs: what a small decoder is distilled from, or starts as.

Two families: diffusers' AutoencoderKL (Stable Diffusion's VAE) and TAESD (Ollin Boer Bohan, MIT),
as a diffusers folder or as its own two files. TAEF2, the member for FLUX.2's latents, has a
normalised 1×1 branch in some blocks, which diffusers' network lacks and `PooledBlock` adds.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from heartbeat_fast.files import atomic
from heartbeat_fast.models.checkpoints import faults, land, raise_for, rename, vae_name
from heartbeat_fast.models.codec import Codec, KLCodec, small_decoder
from heartbeat_fast.models.config import CodecConfig, ConfigError, from_dict
from heartbeat_fast.models.weight_files import (
    TORCH_FILES,
    CheckpointError,
    read,
    read_any,
    read_json,
)

State = dict[str, Tensor]
SUFFIXES = (".safetensors", *TORCH_FILES)
FILES = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
LAST = "layers.18."  # of the decoder: the convolution to colours


class PooledBlock(nn.Module):
    """x → block(x + branch(x)), the branch of two 1×1 convolutions around a normalisation."""

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.conv = block.get_submodule("conv")
        self.pool = nn.Sequential(
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.GroupNorm(4, 4 * width),
            nn.ReLU(),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class TinyCodec(Codec):
    """A TAESD autoencoder for grey frames. Its latents are the large model's, already scaled.

    channels: of the latents. encoder, decoder: the layers that are PooledBlocks.
    """

    def __init__(
        self, channels: int, width: int, encoder: set[int] | None = None, decoder: Any = None
    ) -> None:
        super().__init__()
        from diffusers import AutoencoderTiny

        widths = (width,) * 4
        whole: Any = AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
        )
        self.encoder: Any = whole.encoder
        self.decoder: Any = small_decoder(channels, widths, colours=3)
        for part, pooled in ((self.encoder, encoder), (self.decoder, decoder)):
            for i in pooled or ():
                part.layers[i] = PooledBlock(part.layers[i], width)

    def encode(self, frames: Tensor) -> Tensor:
        """Grey frames (N, 1, H, W) in [0, 1] → latents (N, C, H/8, W/8)."""
        return self.encoder(frames.expand(-1, 3, -1, -1) * 2 - 1)

    def paint(self, raw: Tensor, noise: Tensor) -> Tensor:
        """Latents (N, C, h, w) → grey frames (N, 1, 8h, 8w); `noise` is not used."""
        return self.decoder(raw).mean(1, keepdim=True) / 2 + 0.5


def open_autoencoder(folder: str | Path) -> Codec:
    """A published autoencoder, frozen.

    Args:
        folder: a diffusers folder of AutoencoderKL or AutoencoderTiny (or one that has it as
            `vae/`), or a folder with TAESD's two files, `*encoder` and `*decoder`.

    Raises:
        CheckpointError: none of these, unreadable, or tensors missing, extra or mis-shaped.
    """
    folder = Path(folder)
    folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    if not (folder / "config.json").is_file():
        return _tiny(_two_files(folder), folder)
    told = read_json(folder / "config.json")
    if told.get("_class_name") == "AutoencoderKL":
        return _kl(told, folder)
    return _tiny(_stored(folder), folder)


def load_small_decoder(decoder: nn.Module, path: str | Path) -> None:
    """Starts a codec's small decoder from a published TAESD decoder, or from one of our own.

    Where colours are stored and grey is wanted, the last convolution becomes their mean.

    Args:
        path: a diffusers folder of AutoencoderTiny, a decoder's file, or a folder that
            `save_small_decoder` wrote.

    Raises:
        CheckpointError: unreadable, or tensors missing, extra or mis-shaped, all listed.
    """
    path = Path(path)
    state, wanted = _decoder_of(path), decoder.state_dict()
    for name in (f"{LAST}weight", f"{LAST}bias"):
        if name in state and state[name].shape[0] == 3 and wanted[name].shape[0] == 1:
            state[name] = state[name].float().mean(0, keepdim=True)
    raise_for(faults("decoder", wanted, state), path)
    land(decoder, state)


def width_of(path: str | Path) -> int:
    """Channels of a stored decoder's layers. Raises: CheckpointError: it is no TAESD decoder."""
    first = _decoder_of(Path(path)).get("layers.0.weight")
    if first is None or first.ndim != 4:
        raise CheckpointError(f"{path}: wanted a decoder of the TAESD family")
    return int(first.shape[0])


def _decoder_of(path: Path) -> State:
    return decoder_state(_stored(path) if path.is_dir() else read_any(path))


def save_small_decoder(decoder: nn.Module, folder: str | Path, about: Mapping[str, Any]) -> None:
    """Writes a small decoder for `load_small_decoder`; about: what config.json is to say.

    Raises:
        FileError: it cannot be written.
    """
    folder = Path(folder)
    state = {k: t.detach().cpu().contiguous().clone() for k, t in decoder.state_dict().items()}
    with atomic(folder / FILES[0]) as file:
        save_file(state, file, metadata={"format": "pt"})
    with atomic(folder / "config.json") as file:
        told = {"_class_name": type(decoder).__name__, **about}
        file.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


def decoder_state(state: Mapping[str, Tensor]) -> State:
    """A TAESD decoder's tensors under diffusers' names, of a file in any spelling.

    TAESD's own file counts the clamp before the first convolution as a layer.
    """
    if any(key.startswith("decoder.") for key in state):
        state = {k: t for k, t in state.items() if not k.startswith("encoder.")}
    shift = 0 if any("layers." in key for key in state) else 1
    return rename(state, lambda key: _layer(key.removeprefix("decoder."), shift))


def _layer(key: str, shift: int) -> str:
    """layers.N.rest from layers.N.rest or (N + shift).rest; anything else as it is."""
    found = re.fullmatch(r"(?:layers\.)?(\d{1,3})\.(.+)", key)
    return f"layers.{int(found[1]) - shift}.{found[2]}" if found else key


def _kl(told: Mapping[str, Any], folder: Path) -> Codec:
    """AutoencoderKL of a diffusers folder, whose config is `told`."""
    if told.get("layers_per_block", 2) != 2 or told.get("shift_factor"):
        raise CheckpointError(f"{folder}: wanted two layers a block and no shift of the latents")
    fields = {"block_out_channels": "widths", "latent_channels": "latent_channels"}
    fields["scaling_factor"] = "scale"
    try:
        config = from_dict(CodecConfig, {ours: told[key] for key, ours in fields.items()})
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{folder}: config.json lacks or misstates {error}") from error
    state = rename(_stored(folder), lambda key: vae_name(key, len(config.widths)))
    with torch.device("meta"):
        codec = KLCodec(config)
    raise_for(faults("vae", codec.vae.state_dict(), state), folder)
    land(codec.vae, state)
    return codec.eval().requires_grad_(False)


def _tiny(state: State, folder: Path) -> Codec:
    """A TAESD autoencoder of tensors "encoder.…" and "decoder.…" in diffusers' names."""
    first = state.get("decoder.layers.0.weight")
    if first is None or first.ndim != 4:
        raise CheckpointError(f"{folder}: wanted AutoencoderKL or the TAESD family")
    pooled = {
        part: {int(k.split(".")[2]) for k in state if re.match(rf"{part}\.layers\.\d+\.pool\.", k)}
        for part in ("encoder", "decoder")
    }
    with torch.device("meta"):
        try:
            codec = TinyCodec(first.shape[1], first.shape[0], **pooled)
        except (AttributeError, IndexError) as error:
            raise CheckpointError(f"{folder}: a branch where TAESD has no block") from error
    raise_for(faults("autoencoder", codec.state_dict(), state), folder)
    land(codec, state)
    return codec.eval().requires_grad_(False)


def _two_files(folder: Path) -> State:
    """TAESD's own files under diffusers' names."""
    found = {}
    for part, shift in (("encoder", 0), ("decoder", 1)):
        files = [p for p in sorted(folder.glob(f"*{part}.*")) if p.suffix in SUFFIXES]
        if len(files) != 1:
            raise CheckpointError(
                f"{folder}: {len(files)} {part} files; wanted config.json and weights as diffusers "
                "writes them, or TAESD's encoder and decoder"
            )
        for key, tensor in read_any(files[0]).items():
            found[f"{part}.{_layer(key, shift)}"] = tensor
    return found


def _stored(folder: Path) -> State:
    """The tensors of a diffusers folder."""
    files = [folder / name for name in FILES]
    return read(next((file for file in files if file.is_file()), files[0]))
