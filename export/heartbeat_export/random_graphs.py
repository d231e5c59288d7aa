"""Graphs of a preset with random weights, one at a time: what engines are built from where no
trained model of that size is at hand, and to see that they build at all.

Nothing is computed: shapes come from the meta device, and weights are drawn after all of torch's
initialisers were skipped, which for Stable Diffusion's size would take longer than the export.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import onnx
import torch

from heartbeat_export.precision import Precision
from heartbeat_export.to_onnx import OPSET, trace, with_weights
from heartbeat_fast.conditions import NAMES, NUM_LABELS
from heartbeat_fast.models.config import HeartBeatConfig
from heartbeat_fast.models.graphs import Tensors, build_graphs
from heartbeat_fast.models.heartbeat import HeartBeat

SCALE = 0.02  # of the weights, uniform in ± this
INITIALISERS = (
    *("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_"),
    *("xavier_uniform_", "xavier_normal_"),
)


def random_graphs(
    config: HeartBeatConfig,
    precision: Precision = "fp16",
    names: Iterable[str] = (),
    opset: int = OPSET,
    seed: int = 0,
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Each graph's name and ONNX model; memory for the whole model and one graph.

    Args:
        names: of graphs; all of them where none is given.

    Raises:
        ExportError: torch could not trace one, or it exceeds 2 GiB.
    """
    shapes = graph_inputs(config)
    with _skipping():
        model = HeartBeat(config).eval()
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-SCALE, SCALE, generator=make)
    for name in names or shapes:
        graph = build_graphs(model)[name]
        inputs = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in shapes[name].items()}
        yield name, with_weights(trace(graph, inputs, opset), graph, precision)


def graph_inputs(config: HeartBeatConfig) -> dict[str, Tensors]:
    """Inputs of every graph on the meta device: shapes and dtypes, no values."""
    F, S, h = config.frames, config.size, config.latent
    shapes = {
        "tokens": (1, config.text.tokens),
        "ef": (1, 1),
        "present": (1, len(NAMES)),
        "image": (1, 3, S, S),
        "sketch": (1, 1, S, S),
        "mask": (1, F, NUM_LABELS, S, S),
        "skeleton": (1, F, 1, S, S),
        "flow": (1, F, 2, S, S),
        "t": (1,),
        "z": (1, F, config.denoiser.latent_channels, h, h),
        "noise": (1, F, 2, S, S),
        "frames": (1, F, 1, S, S),
    }
    whole = {"tokens": torch.int64}
    with torch.device("meta"):
        model = HeartBeat(config).eval()
        known = {k: torch.empty(v, dtype=whole.get(k)) for k, v in shapes.items()}
    inputs: dict[str, Tensors] = {}
    for name, graph in build_graphs(model).items():
        inputs[name] = {key: known[key] for key in graph.inputs}
        with torch.inference_mode():
            values = graph.module(*inputs[name].values())
        values = values if isinstance(values, tuple) else (values,)
        known |= dict(zip(graph.outputs, values, strict=True))
    return inputs


@contextmanager
def _skipping() -> Iterator[None]:
    """torch's initialisers do nothing in here."""
    init = torch.nn.init
    kept = {name: getattr(init, name) for name in INITIALISERS}
    for name in INITIALISERS:
        setattr(init, name, lambda tensor, *_, **__: tensor)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(init, name, function)
