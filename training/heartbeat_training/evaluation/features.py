"""What a distance between sets of images or clips is measured in: features of a fixed network.

The field's own networks (FID's Inception, FVD's I3D) are read from local files, since nothing is
fetched here; a small ImageNet network that comes by pip stands in for both. Figures measured with a
stand-in say so in their name and compare with nothing published, only among themselves.
Legend: N images, B clips, F frames, H W pixels, D features.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heartbeat_fast.errors import FileError
from heartbeat_fast.files import readable
from heartbeat_training.evaluation.efficientnet import open_efficientnet
from heartbeat_training.evaluation.inception import open_inception

Frames = NDArray[np.uint8]
Features = NDArray[np.float64]

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
I3D_FILE = "i3d_torchscript.pt"
STAND_IN = "stand-in, not comparable with published"
BATCH = 16  # images at a time
GAIN = 4.0  # of frame differences, which span a quarter of the greys at most


class ImageFeatures(Protocol):
    """Images to features. `comparable`: whether FID in these features is what papers report."""

    name: str
    dim: int
    comparable: bool

    def __call__(self, frames: Frames) -> Features:
        """Grey frames (N, H, W) → (N, D)."""
        ...


class VideoFeatures(Protocol):
    """Clips to features. `comparable`: whether FVD in these features is what papers report."""

    name: str
    dim: int
    comparable: bool

    def __call__(self, clips: Frames) -> Features:
        """Grey clips (B, F, H, W) → (B, D)."""
        ...


class NetworkFeatures:
    """Image features of a network that takes (N, 3, H, W) from 0 to 255; grey is tripled."""

    def __init__(self, name: str, network: nn.Module, dim: int, comparable: bool) -> None:
        self.name, self.network, self.dim, self.comparable = name, network, dim, comparable

    def __call__(self, frames: Frames) -> Features:
        """Grey frames (N, H, W) → (N, D)."""
        out = np.empty((len(frames), self.dim))
        for start in range(0, len(frames), BATCH):
            grey = torch.from_numpy(frames[start : start + BATCH].astype(np.float32))
            with torch.inference_mode():
                found = self.network(grey[:, None].repeat(1, 3, 1, 1))
            out[start : start + BATCH] = found.numpy()
        return out


class PooledFeatures:
    """The stand-in for video: image features over time.

    Mean over frames (what is shown), deviation over frames (how much it changes), mean over
    magnified frame differences (how it moves). D is three times the images'.
    """

    comparable = False

    def __init__(self, images: ImageFeatures) -> None:
        self.images, self.dim = images, 3 * images.dim
        self.name = f"{images.name.split(' (')[0]}, frames and differences ({STAND_IN} FVD)"

    def __call__(self, clips: Frames) -> Features:
        """Grey clips (B, F, H, W) → (B, 3D). Raises: FileError for clips of one frame."""
        if clips.shape[1] < 2:
            raise FileError(f"clips of {clips.shape[1]} frame came; wanted two or more")
        return np.stack([self._clip(clip) for clip in clips])

    def _clip(self, clip: Frames) -> NDArray[np.float64]:
        change = np.diff(clip.astype(np.float32), axis=0) * GAIN + 127
        still, moving = self.images(clip), self.images(change.clip(0, 255).astype(np.uint8))
        return np.concatenate([still.mean(0), still.std(0), moving.mean(0)])


class I3dFeatures:
    """FVD's I3D in StyleGAN-V's protocol: TorchScript, resized to 224 and rescaled inside; D = 400.

    Source: Carreira & Zisserman, 1705.07750; Unterthiner et al., 1812.01717; Skorokhodov et al.,
    2112.14683 (the protocol). Features are those before the softmax.
    """

    name, dim, comparable = "I3D, Kinetics-400 (FVD)", 400, True

    def __init__(self, module: Callable[..., Tensor]) -> None:
        self.module = module

    def __call__(self, clips: Frames) -> Features:
        """Grey clips (B, F, H, W), F at least 10 → (B, D)."""
        out = np.empty((len(clips), self.dim))
        for i, clip in enumerate(clips):
            video = torch.from_numpy(clip.astype(np.float32))[None, None].repeat(1, 3, 1, 1, 1)
            with torch.inference_mode():
                found = self.module(video, rescale=True, resize=True, return_features=True)
            out[i] = found[0].numpy()
        return out


def open_image_features(weights: Path | None = None) -> ImageFeatures:
    """FID's Inception where `weights` holds INCEPTION_FILE, else the stand-in.

    Raises: FileError for a file that is something else; MissingDependency without the stand-in.
    """
    file = weights / INCEPTION_FILE if weights else None
    if file is not None and file.exists():
        return NetworkFeatures("Inception-v3 2015-12-05 (FID)", open_inception(file), 2048, True)
    name = f"EfficientNet-Lite0 ({STAND_IN} FID)"
    return NetworkFeatures(name, open_efficientnet(), 1280, False)


def open_video_features(
    images: ImageFeatures, weights: Path | None = None, trust_torchscript: bool = False
) -> VideoFeatures:
    """FVD's I3D where `weights` holds I3D_FILE, else `images` pooled over time.

    trust_torchscript: TorchScript is a program, not data, so loading it must be asked for.

    Raises: FileError when the file is there but not trusted, or is no TorchScript.
    """
    file = weights / I3D_FILE if weights else None
    if file is None or not file.exists():
        return PooledFeatures(images)
    if not trust_torchscript:
        raise FileError(
            f"{file}: TorchScript runs code from the file; if you know where it comes from, add "
            "--trust-torchscript, otherwise move it away"
        )
    try:
        module = torch.jit.load(str(readable(file)), map_location="cpu").eval()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise FileError(f"{file}: not TorchScript ({reason}); fetch it anew") from error
    return I3dFeatures(module)
