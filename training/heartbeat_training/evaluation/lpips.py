"""LPIPS v0.1: distance of two images in the layers of an ImageNet network, weighed by people.

Needs the network's own weights, which are not ours to ship: torchvision's VGG16 or AlexNet file,
and the heads beside it. Without them there is no LPIPS, never another figure under its name.
Legend: N images, H W pixels. Source: Zhang et al., 1801.03924.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heartbeat_fast.errors import FileError
from heartbeat_training.evaluation.weights import load, read_state

HEADS = "lpips_lin"
# VGG16: output channels of the 3×3 convolutions between two poolings; the last of each is read.
VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
TRUNKS = {"vgg16-397923af.pth": "vgg", "alexnet-owt-7be5be79.pth": "alex"}
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
BATCH = 8


class Lpips:
    """LPIPS of one trunk."""

    def __init__(
        self, name: str, trunk: nn.Sequential, taps: list[int], heads: list[Tensor]
    ) -> None:
        self.name, self.trunk, self.taps, self.heads = f"LPIPS v0.1 {name}", trunk, taps, heads

    def __call__(self, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
        """Mean over frames of two grey clips (N, H, W)."""
        scores = []
        for start in range(0, len(a), BATCH):
            with torch.inference_mode():
                one, two = (self._layers(x[start : start + BATCH]) for x in (a, b))
                scores.append(self._distance(one, two))
        return float(torch.cat(scores).mean())

    def _layers(self, frames: NDArray[np.uint8]) -> list[Tensor]:
        """Tapped activations, of unit length along channels."""
        grey = torch.from_numpy(frames.astype(np.float32) / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
        x, found = (grey - mean) / deviation, []
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            if i in self.taps:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def _distance(self, one: list[Tensor], two: list[Tensor]) -> Tensor:
        """(N,): Σ over layers of the weighed squared differences, mean over places."""
        parts = [
            (head * (a - b) ** 2).sum(1).mean((1, 2))
            for head, a, b in zip(self.heads, one, two, strict=True)
        ]
        return torch.stack(parts).sum(0)


def open_lpips(weights: Path | None) -> tuple[Lpips | None, str]:
    """LPIPS from a folder with a trunk's file and lpips_lin/{vgg,alex}.pth, VGG first.

    Returns None and the reason where files are lacking. Raises: FileError for a file of another
    network.
    """
    wanted = " or ".join(TRUNKS)
    if weights is None:
        return None, f"no folder of weights was given; LPIPS needs {wanted} and {HEADS}/"
    for file, name in TRUNKS.items():
        if (weights / file).is_file():
            heads = weights / HEADS / f"{name}.pth"
            if not heads.is_file():
                return None, f"{heads}: missing; LPIPS needs its heads beside {file}"
            return _open(name, weights / file, heads), ""
    return (
        None,
        f"{weights}: LPIPS needs {wanted} of torchvision in it; heads alone measure nothing",
    )


def _open(name: str, file: Path, heads: Path) -> Lpips:
    trunk, taps = _alex() if name == "alex" else _vgg()
    read_state(trunk, file, drop=("classifier.",), rename=lambda key: key.removeprefix("features."))
    state = load(heads)
    try:
        weights = [state[f"lin{i}.model.1.weight"][0] for i in range(len(taps))]
    except KeyError as error:
        raise FileError(f"{heads}: no {error} in it; wanted LPIPS heads of version 0.1") from error
    trunk.eval().requires_grad_(False)
    return Lpips(name, trunk, taps, weights)


def _vgg() -> tuple[nn.Sequential, list[int]]:
    layers: list[nn.Module] = []
    taps: list[int] = []
    width = 3
    for stage in VGG:
        layers += [nn.MaxPool2d(2)] if taps else []
        for out in stage:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
        taps.append(len(layers) - 1)
    return nn.Sequential(*layers), taps


def _alex() -> tuple[nn.Sequential, list[int]]:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for inside, out in pairwise((192, 384, 256, 256)):
        layers += [nn.Conv2d(inside, out, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers), [1, 4, 7, 9, 11]
