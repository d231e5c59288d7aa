"""MedSAM ViT-B's image encoder from its published forms, into transformers' SamVisionModel.

Ma et al., "Segment anything in medical images", Nature Communications 15, 2024. Two forms are in
use: a transformers folder (SamModel's names) and the `.pth` of the original training code, whose
names are segment-anything's. Only the image encoder is taken; it stays frozen.
"""

import re
from pathlib import Path

from torch import nn

from heartbeat_fast.models.checkpoints import faults, land, raise_for, rename
from heartbeat_fast.models.weight_files import CheckpointError, read_any

FILES = ("model.safetensors", "pytorch_model.bin")  # of a transformers folder, the safe one first
OTHER_PARTS = ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.")
SAM_BY_ORIGINAL = {  # segment-anything's names inside image_encoder
    "patch_embed.proj": "patch_embed.projection",
    "neck.0": "neck.conv1",
    "neck.1": "neck.layer_norm1",
    "neck.2": "neck.conv2",
    "neck.3": "neck.layer_norm2",
}


def medsam_name(key: str) -> str | None:
    """SamVisionModel's name of a tensor of either form; None for the parts behind the encoder."""
    if key.startswith(OTHER_PARTS):
        return None
    if not key.startswith("image_encoder."):
        return key
    key = key.removeprefix("image_encoder.")
    key = re.sub(r"^blocks\.(\d+)\.norm([12])\.", r"layers.\1.layer_norm\2.", key)
    key = re.sub(r"^blocks\.", "layers.", key)
    for old, new in SAM_BY_ORIGINAL.items():
        if key.startswith(f"{old}."):
            key = new + key.removeprefix(old)
    return f"vision_encoder.{key}"


def load_medsam(encoder: nn.Module, path: str | Path) -> None:
    """Puts MedSAM's image encoder into a SamVisionModel of its size.

    Args:
        encoder: `model.image_encoder` of a `base` model.
        path: a transformers folder, or one file with either form's names.

    Raises:
        CheckpointError: missing, unreadable without running code, or missing, extra or mis-shaped
            tensors, all listed.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
    state = read_any(path)
    if any(key.startswith("image_encoder.patch_embed.seq.") for key in state):
        raise CheckpointError(
            f"{path}: is LiteMedSAM (TinyViT); wanted MedSAM ViT-B, or use models/litemedsam.py"
        )
    state = rename(state, medsam_name)
    raise_for(faults("image_encoder", encoder.state_dict(), state), path)
    land(encoder, state)
