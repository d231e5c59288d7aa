"""A model of a few formulas behind a real bundle's manifest: sessions and servers in milliseconds.

It denoises towards a picture that its conditions decide, from the exact noise levels of Stable
Diffusion's schedule, so what a session does with steps, latents and encodings shows in the frames.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.bundle import EMBEDDED, Bundle
from heartbeat_fast.conditions import NAMES
from heartbeat_fast.engines.base import Arrays, check_inputs

FRAMES, SIZE, LATENT = 4, 64, (2, 8, 8)
KV = "kv_toy"
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHA = np.sqrt(np.cumprod(1 - BETAS))
PULL = 0.7  # how far a step's guess goes to the conditions' picture, the rest stays where it was


def toy_bundle(folder: Path, frames: int = FRAMES, size: int = SIZE) -> Bundle:
    """A bundle with the embedded one's tables and tokenizer, and no graphs worth reading."""
    shutil.copytree(EMBEDDED, folder)
    data = json.loads((folder / "manifest.json").read_text())
    F, S, latent = frames, size, [1, frames, LATENT[0], size // 8, size // 8]
    shapes = {
        **{"tokens": [1, 77], "ef": [1, 1], "present": [1, 7], "t": [1], "temb": [1, 1]},
        **{"image": [1, 3, S, S], "sketch": [1, 1, S, S], "mask": [1, F, 4, S, S]},
        **{"skeleton": [1, F, 1, S, S], "flow": [1, F, 2, S, S], "noise": [1, F, 2, S, S]},
        **{"text_context": [1, 1, 2], "image_context": [1, 1, 1], KV: [1, 1, 3]},
        **{"frames": [1, F, 1, S, S], **dict.fromkeys(("z", "out", "local"), latent)},
    }
    for name, graph in data["graphs"].items():
        for side in ("inputs", "outputs"):
            names = [t["name"] for t in graph[side] if not t["name"].startswith("kv_")]
            if len(names) != len(graph[side]):
                names.append(KV)
            graph[side] = [
                {
                    "name": tensor,
                    "dtype": "int64" if tensor == "tokens" else "float32",
                    "shape": shapes[tensor],
                }
                for tensor in names
            ]
        assert name
    data |= {"name": "toy", "frames": frames, "size": size, "latent": latent[2:]}
    data["fingerprints"]["weights"] = "toy"
    (folder / "manifest.json").write_text(json.dumps(data))
    return Bundle.open(folder)


class ToyEngine:
    """Notes which graphs ran; `before` and `after` do to them what a test asks for."""

    name, precision, device = "toy", "fp32", "cpu"

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.ran: list[str] = []
        self.before: Callable[[str], None] = lambda graph: None
        self.after: Callable[[str, Arrays], Arrays] = lambda graph, out: out

    @staticmethod
    def available() -> tuple[bool, str]:
        return True, ""

    @staticmethod
    def precisions() -> tuple[str, ...]:
        return ("fp32",)

    @classmethod
    def open(cls, bundle: Bundle, device: str = "cpu", source: str = "") -> "ToyEngine":
        return cls(bundle)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        self.before(graph)
        check_inputs(graph, self.bundle.manifest.graphs[graph], inputs)
        self.ran.append(graph)
        out = {name: np.asarray(v, np.float32) for name, v in self._run(graph, inputs).items()}
        return self.after(graph, out)

    def _run(self, graph: str, given: Mapping[str, NDArray[Any]]) -> Arrays:
        if graph == "text":
            words = (given["tokens"] * np.arange(1, 78)).sum() % 97 / 97
            ef = given["ef"] * given["present"][:, NAMES.index("ef")]
            return {"text_context": np.array([[[words, ef[0, 0]]]])}
        if graph == "image":
            return {"image_context": given["image"].mean(keepdims=True).reshape(1, 1, 1)}
        if graph == "context":
            return {KV: np.concatenate([given["text_context"], given["image_context"]], -1)}
        if graph == "local":
            return {"local": self._local(given)}
        if graph == "time":
            return {"temb": given["t"][None]}
        if graph == "denoise":
            return {"out": self._denoise(given)}
        assert graph == "decode", graph
        grey = 0.5 + 0.25 * np.kron(given["z"][:, :, :1], np.ones((8, 8)))
        return {"frames": grey + 0.02 * given["noise"][:, :, :1]}

    def _local(self, given: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        F, C, h, w = self.bundle.manifest.frames, *LATENT[:1], *self.bundle.manifest.latent[1:]

        def small(x: NDArray[Any]) -> NDArray[Any]:
            return x.reshape(*x.shape[:-2], h, 8, w, 8).mean((-1, -3))

        mask, flow = small(given["mask"]), small(given["flow"])
        picture = mask[:, :, 1] - mask[:, :, 2] + small(given["skeleton"])[:, :, 0]
        picture = picture + 0.1 * flow.sum(2) + small(given["sketch"])[:, None, 0]
        return np.broadcast_to(picture[:, :, None], (1, F, C, h, w))

    def _denoise(self, given: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        alpha = ALPHA[int(given["temb"][0, 0])]
        sigma = np.sqrt(1 - alpha**2)
        words, ef, image = given[KV][0, 0]
        wanted = given["local"] + words + 2 * ef + image
        guess = PULL * wanted + (1 - PULL) * alpha * given["z"]
        return np.asarray((alpha * given["z"] - guess) / sigma)
