"""The graphs of a bundle as torch modules: one definition for the torch engine and for export.

Work is moved out of the loop: per clip `text, image, local, context`, per sampler `time`, per step
`denoise` alone, then `decode`. Legend: F frames, C channels, H W pixels, h w latents, N tokens,
D context width, E time embeddings of all residual blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heartbeat_fast.conditions import NAMES, NUM_LABELS
from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.models.heartbeat import HeartBeat

Tensors = dict[str, Tensor]
HALF_FROM = 1024  # elements: from here weights are stored in half; norms and biases stay exact


@dataclass(frozen=True)
class Graph:
    """One graph: a module of positional tensors, and the names of what goes in and comes out."""

    module: "Part"
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Part(nn.Module):
    """A method of the model as a module of its own, which is what torch.export takes."""

    def __init__(self, model: HeartBeat, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.model, *inputs)


def build_graphs(model: HeartBeat) -> dict[str, Graph]:
    """Every graph of bundle.GRAPHS, batch 1.

    text: tokens (1,77), ef (1,1), present (1,7) → text_context (1,N,D). image: (1,3,H,W), present →
    image_context (1,N',D). local: sketch, mask, skeleton, flow, present → conv_in's share
    (1,F,C0,h,w). context: both → K and V of every cross-attention. time: t (1,) → temb (1,E).
    denoise: z (1,F,C,h,w), temb, local, kv_… → out as z. decode: z, noise (1,F,2,H,W) → frames
    (1,F,1,H,W) in [0,1]. encode: back.
    """
    model = model.eval()
    kv = model.denoiser.kv_names

    def graph(call: Callable[..., Any], inputs: str, *outputs: str) -> Graph:
        return Graph(Part(model, call), tuple(inputs.split()), outputs)

    return {
        "text": graph(HeartBeat.text_context, "tokens ef present", "text_context"),
        "image": graph(HeartBeat.image_context, "image present", "image_context"),
        "local": graph(_local, "sketch mask skeleton flow present", "local"),
        "context": graph(_context, "text_context image_context", *kv),
        "time": graph(lambda m, t: m.denoiser.time(t), "t", "temb"),
        "denoise": graph(_denoise, " ".join(("z temb local", *kv)), "out"),
        "decode": graph(_decode, "z noise", "frames"),
        "encode": graph(_encode, "frames", "z"),
    }


def _local(model: HeartBeat, *conditions: Tensor) -> Tensor:
    return model.denoiser.local_share(model.local_features(*conditions))


def _context(model: HeartBeat, text: Tensor, image: Tensor) -> tuple[Tensor, ...]:
    return model.denoiser.context(text, image)


def _denoise(model: HeartBeat, z: Tensor, temb: Tensor, local: Tensor, *kv: Tensor) -> Tensor:
    return model.denoiser.denoise(z, temb, local, kv)


def _decode(model: HeartBeat, z: Tensor, noise: Tensor) -> Tensor:
    frames = model.codec.decode(z.flatten(0, 1), noise.flatten(0, 1))
    return frames.unflatten(0, z.shape[:2])


def _encode(model: HeartBeat, frames: Tensor) -> Tensor:
    return model.codec.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])


def example_inputs(model: HeartBeat, seed: int = 0) -> dict[str, Tensors]:
    """Fixed random inputs for every graph: each gets what the graphs before it put out.

    All conditions are present. Returns {graph: {input: tensor}}, float32 but for the tokens.
    """
    config = model.config
    F, S, h = config.frames, config.size, config.latent
    make = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=make)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make)

    text = config.text
    tokens = torch.randint(text.vocab - 2, (1, text.tokens), generator=make)
    tokens[:, 0], tokens[:, 12:] = text.start, text.end
    labels = torch.randint(NUM_LABELS, (1, F, S, S), generator=make)
    known: Tensors = {
        "tokens": tokens,
        "ef": uniform(1, 1),
        "present": torch.ones(1, len(NAMES)),
        "image": uniform(1, 3, S, S),
        "sketch": uniform(1, 1, S, S),
        "mask": nn.functional.one_hot(labels, NUM_LABELS).movedim(-1, 2).float(),
        "skeleton": uniform(1, F, 1, S, S),
        "flow": normal(1, F, 2, S, S),
        "t": torch.full((1,), 500.0),
        "z": normal(1, F, config.denoiser.latent_channels, h, h),
        "noise": normal(1, F, 2, S, S),
        "frames": uniform(1, F, 1, S, S),
    }
    examples: dict[str, Tensors] = {}
    for name, graph in build_graphs(model).items():
        examples[name] = {key: known[key] for key in graph.inputs}
        with torch.inference_mode():
            values = graph.module(*examples[name].values())
        values = values if isinstance(values, tuple) else (values,)
        known |= dict(zip(graph.outputs, values, strict=True))
    return examples


def round_to_half(model: HeartBeat) -> HeartBeat:
    """Rounds the large weights in place to what half precision can hold, and returns the model.

    A bundle stores them in half; rounded first, torch and every engine run the same numbers.

    Raises:
        HeartBeatError: a weight exceeds half's 65504.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() >= HALF_FROM:
                half = parameter.half()
                if not half.isfinite().all():
                    raise HeartBeatError(f"weight {name}: exceeds half precision's 65504")
                parameter.copy_(half)
    return model
