"""Image embeddings, computed once per image and kept on disk by content.

A frozen encoder gives the same embedding for the same image for ever, and MedSAM ViT-B's costs
seconds on a CPU: training reads it from a file instead. Half precision: what follows is a BatchNorm
and a convolution in bfloat16.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from heartbeat_fast.files import atomic

Encoder = Callable[[Tensor], Tensor]  # images (N,3,H,W) in [0,1] to embeddings (N,C,h,w)


class EmbeddingCache:
    """An encoder that looks on disk first: one safetensors file per image and encoder.

    Args:
        folder: where the files lie; may be shared by encoders and processes.
        encoder: images (N,3,H,W) in [0,1] to (N,C,h,w).
        identity: what tells this encoder from any other, e.g. `fingerprint` of its weights.
        shape: (C,h,w) of an embedding; a file of another shape is replaced.
    """

    def __init__(
        self, folder: str | Path, encoder: Encoder, identity: str, shape: tuple[int, int, int]
    ) -> None:
        self.folder, self.encoder = Path(folder), encoder
        self.identity, self.shape = identity, shape

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """Grey image (H,W) to its embedding (C,h,w), float16.

        Raises:
            FileError: the embedding cannot be written.
        """
        path = self.path(image)
        kept = self._read(path)
        if kept is not None:
            return kept
        grey = torch.from_numpy(image.astype(np.float32) / 255)
        embedding = self.encoder(grey.expand(1, 3, *image.shape))[0].half().contiguous().cpu()
        with atomic(path) as temporary:
            save_file({"embedding": embedding}, temporary)
        return embedding

    def fill(self, images: Iterable[NDArray[np.uint8]]) -> None:
        """Make the embeddings that are not on disk yet; those that are, are not read."""
        for image in images:
            if not self.path(image).is_file():
                self(image)

    def path(self, image: NDArray[np.uint8]) -> Path:
        """Where an image's embedding lies."""
        digest = hashlib.sha256(f"{self.identity} {image.shape}".encode())
        digest.update(np.ascontiguousarray(image, np.uint8).tobytes())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, path: Path) -> Tensor | None:
        """A kept embedding; None if there is none or it is damaged."""
        try:
            with safe_open(path, "pt") as file:
                header = file.get_slice("embedding")
                if tuple(header.get_shape()) != self.shape or header.get_dtype() != "F16":
                    return None
                return file.get_tensor("embedding")
        except (OSError, SafetensorError):
            return None


def fingerprint(tensors: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, shapes and bytes of tensors, or of a module's."""
    digest = hashlib.sha256()
    named = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
