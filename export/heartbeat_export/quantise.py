"""int8 for OpenVINO: post-training quantisation by NNCF, calibrated on the generator's own inputs.

The calibration set is what the denoiser and the decoder really get: latents of every second step of
clips under several condition sets, since the first step's latents look nothing like the last's.
SmoothQuant (Xiao et al., 2211.10438) moves outliers of activations into weights. What comes out is
a local cache of this machine, never part of a bundle, and is kept only if its clips pass the gate.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray

from heartbeat_export.errors import ExportError
from heartbeat_export.parity import psnr
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.engines.base import Arrays, Engine
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.openvino_engine import QUANTISED, OpenVinoEngine, quantised_facts
from heartbeat_fast.errors import optional
from heartbeat_fast.generator import Generator
from heartbeat_fast.inputs import open_source

# Seeds apart from those that models train on and evaluations hold out; None: all conditions.
CALIBRATION: dict[int, tuple[str, ...] | None] = {
    900_001: None,
    900_002: ("text", "mask"),
    900_003: ("text", "ef"),
    900_004: ("image", "sketch", "skeleton", "flow"),
}
HELD_OUT: dict[int, tuple[str, ...] | None] = {900_101: None, 900_102: ("text", "mask")}
SMOOTH = 0.5  # SmoothQuant's alpha for matrix products
MIN_PSNR = 35.0  # dB of a held-out clip against fp32's; on tiny it had 47, bfloat16 60

Say = Callable[[str], None]


class Recording:
    """An engine that notes what goes into some graphs."""

    def __init__(self, engine: Engine, graphs: tuple[str, ...]) -> None:
        self.name, self.precision, self.device = engine.name, engine.precision, engine.device
        self._engine = engine
        self.seen: dict[str, list[Arrays]] = {graph: [] for graph in graphs}

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """As Engine.run."""
        if graph in self.seen:
            self.seen[graph].append(dict(inputs))
        return self._engine.run(graph, inputs)


def quantise(
    bundle: Bundle,
    *,
    cache: EngineCache | None = None,
    source: str = "phantom",
    steps: int | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Puts the bundle's int8 graphs into the cache, where "openvino:int8" finds them.

    Args:
        cache: the user's own where none is given.
        source: of records, as in `heartbeat sample --from phantom:7`.
        steps: of the sampler; the bundle's default where none is given.
        say: called with one line a step.

    Returns the held-out clips' PSNR in dB against fp32, and int8 layers per graph.

    Raises:
        ExportError: no int8 here, or the clips differ too much; nothing is kept then.
        MissingDependency: OpenVINO or NNCF is not installed.
    """
    cache = cache or EngineCache()
    if "int8" not in OpenVinoEngine.precisions():
        raise ExportError("int8: OpenVINO has none on this processor; use fp32")
    exact = Generator(bundle, OpenVinoEngine(bundle, precision="fp32", cache=cache))
    recording = Recording(exact.engine, QUANTISED)
    say(f"calibration: {len(CALIBRATION)} clips of {source}")
    for seed, names in CALIBRATION.items():
        Generator(bundle, cast(Engine, recording))(
            _conditions(bundle, source, seed, names), steps=steps, seed=1
        )
    made, layers = {}, {}
    for graph in QUANTISED:
        made[graph], layers[graph] = _graph(bundle, graph, recording.seen[graph])
        say(f"{graph}: {layers[graph]} layers in int8")
    figures = _gated(bundle, exact, made, source, steps)
    for graph, packed in made.items():
        cache.put(quantised_facts(bundle, graph), packed, f"{graph} in int8 for OpenVINO")
    return {"psnr_db": figures, "layers": layers}


def _gated(
    bundle: Bundle, exact: Generator, made: dict[str, bytes], source: str, steps: int | None
) -> list[float]:
    """PSNR of held-out clips, from a cache that goes when this returns or raises."""
    with tempfile.TemporaryDirectory() as folder:
        trial = EngineCache(Path(folder) / "cache")
        for graph, packed in made.items():
            trial.put(quantised_facts(bundle, graph), packed, graph)
        rounded = Generator(bundle, OpenVinoEngine(bundle, precision="int8", cache=trial))
        figures = []
        for seed, names in HELD_OUT.items():
            conditions = _conditions(bundle, source, seed, names)
            got, wanted = (make(conditions, steps=steps, seed=2) for make in (rounded, exact))
            figures.append(round(psnr(got.frames, wanted.frames), 2))
    if min(figures) < MIN_PSNR:
        raise ExportError(
            f"int8: held-out clips at {figures} dB of fp32's; at least {MIN_PSNR} passes: stay "
            "with bf16 or fp32"
        )
    return figures


def _graph(bundle: Bundle, graph: str, seen: list[Arrays]) -> tuple[bytes, int]:
    """A graph in int8, packed as quantised_facts says, and its number of quantised tensors."""
    ov, nncf = optional("openvino", "openvino"), _nncf()
    model = ov.Core().read_model(bundle.read(bundle.manifest.graphs[graph]))
    samples = seen[::2] if len(seen) > 2 * len(CALIBRATION) else seen
    alphas = nncf.AdvancedSmoothQuantParameters(matmul=SMOOTH, convolution=-1)
    rounded = nncf.quantize(
        model,
        nncf.Dataset(samples),
        preset=nncf.QuantizationPreset.MIXED,  # weights symmetric, activations not
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=alphas),
    )
    count = sum(node.get_type_name() == "FakeQuantize" for node in rounded.get_ops())
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "graph.xml"
        ov.save_model(rounded, xml, compress_to_fp16=False)
        text, weights = xml.read_bytes(), xml.with_suffix(".bin").read_bytes()
    return len(text).to_bytes(8, "little") + text + weights, count


def _conditions(
    bundle: Bundle, source: str, seed: int, names: tuple[str, ...] | None
) -> Conditions:
    frames, size = bundle.manifest.frames, bundle.manifest.size
    found = open_source(f"{source}:{seed}", None, frames, size).conditions(None)
    return found if names is None else found.only(names)


def _nncf() -> Any:
    """NNCF, quiet; without the usage reports it would send, which this variable keeps it from."""
    os.environ.setdefault("NNCF_CI", "1")
    nncf = optional("nncf", "quantise")
    nncf.set_log_level(logging.ERROR)
    return nncf
