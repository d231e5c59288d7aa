"""`auto`: the fastest engine whose numbers are right here.

Candidates stand in the order of their expected speed. Before one is used its graphs are compared
with the reference on fixed inputs; the verdict is kept, so the next start costs nothing.
"""

import json
import sys
import warnings
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast import __version__
from heartbeat_fast.bundle import GRAPHS, Bundle, TensorSpec
from heartbeat_fast.engines.base import Arrays, Engine, engine_class, open_engine
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.machine import has_nvidia, processor
from heartbeat_fast.errors import EngineError

# Expected speed, fastest first (docs/engines.md has the measurements). int8 is never chosen for
# somebody: it changes the clip. torch needs a model folder, which a bundle does not bring.
ON_CPU = ("openvino:bf16", "openvino:fp32", "onnxruntime")
ON_GPU = ("tensorrt", "tensorrt_rtx", "onnxruntime")
REFERENCES = ("onnxruntime", "openvino:fp32")  # the first that is installed, on the CPU
# Relative L2 of any graph's output. Measured on tiny: fp32 3e-6, bf16 at most 1.3e-2.
TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 5e-2}


def open_fastest(bundle: Bundle, device: str, cache: EngineCache | None = None) -> Engine:
    """The first candidate for this device that can run here and passes; a warning says why those
    before it that are installed do not. `heartbeat doctor` says which others there are.

    Args:
        device: as in open_engine; "auto" is an NVIDIA GPU where there is one, else the CPU.
        cache: of verdicts; the user's own where none is given.

    Raises:
        EngineError: no candidate runs here.
    """
    cache = cache or EngineCache()
    reasons: list[str] = []
    missing: list[str] = []
    for choice, where in candidates(device):
        if reason := unfit(choice):
            (reasons if installed(choice) else missing).append(reason)
            continue
        try:
            engine = open_engine(choice, bundle, where)
            errors = judged(engine, choice, bundle, cache)
        except EngineError as error:
            reasons.append(f"engine {choice} failed: {error}")
            continue
        if reason := refusal(choice, engine.precision, errors):
            reasons.append(reason)
            continue
        if reasons:
            said = "; ".join(dict.fromkeys(reasons))
            warnings.warn(f"{said}: using {choice} on {where}", stacklevel=3)
        return engine
    why = "; ".join(dict.fromkeys(missing + reasons))
    raise EngineError(f"no engine for {device!r} runs here: {why}")


def candidates(device: str) -> list[tuple[str, str]]:
    """(choice, device) in order of expected speed. Precisions the processor lacks are left out, as
    are GPUs where there is none: nothing was lost there, so nothing need be said."""
    if device == "auto":
        return [*(candidates("cuda") if has_nvidia() else ()), *candidates("cpu")]
    choices = {"cpu": ON_CPU, "cuda": ON_GPU}.get(device, ("onnxruntime",))
    known = []
    for choice in choices:
        name, _, precision = choice.partition(":")
        can, _ = engine_class(name).available()
        if not can or not precision or precision in engine_class(name).precisions():
            known.append((choice, device))
    return known


def unfit(choice: str) -> str:
    """Why an engine cannot run here, "" if it can."""
    name = choice.partition(":")[0]
    can, why = engine_class(name).available()
    return "" if can else f"engine {name} cannot run here: {why}"


def installed(choice: str) -> bool:
    """Whether an engine's library is there. Who has not installed an optional one lacks nothing."""
    module = choice.partition(":")[0]  # engines bear their modules' names
    return sys.modules.get(module) is not None or find_spec(module) is not None


def refusal(choice: str, precision: str, errors: dict[str, float]) -> str:
    """Why an engine with these errors is not used, "" if it is."""
    allowed = TOLERANCE[precision]
    worst = max(errors, key=lambda graph: errors[graph], default="")
    if not worst or errors[worst] <= allowed:
        return ""
    return (
        f"engine {choice} ({precision}) fails parity here: graph {worst} is "
        f"{errors[worst]:.1e} from the reference, at most {allowed} passes"
    )


def prospects(bundle: Bundle, device: str, cache: EngineCache | None = None) -> list[str]:
    """What `auto` knows of each candidate before it opens one; a line each, for `doctor`."""
    cache, lines = cache or EngineCache(), []
    reference = _reference(bundle)
    for choice, where in candidates(device):
        name = f"{choice} on {where}"
        if reason := unfit(choice):
            lines.append(reason)
        elif (choice, where) == (reference, "cpu"):
            lines.append(f"{name}: the reference")
        elif (content := cache.get(verdict_facts(choice, where, reference, bundle))) is None:
            lines.append(f"{name}: parity not measured yet, the first start does")
        else:
            errors: dict[str, float] = json.loads(content)
            precision = choice.partition(":")[2] or bundle.manifest.precision
            worst = max(errors, key=lambda graph: errors[graph])
            passed = f"{name}: passes parity, worst graph {worst} {errors[worst]:.1e}"
            lines.append(refusal(choice, precision, errors) or passed)
    return lines


def judged(engine: Engine, choice: str, bundle: Bundle, cache: EngineCache) -> dict[str, float]:
    """Relative error of each graph, from the cache of verdicts or measured now; {} for the
    reference itself."""
    reference = _reference(bundle)
    if (choice, engine.device) == (reference, "cpu"):
        return {}
    facts = verdict_facts(choice, engine.device, reference, bundle)
    if (content := cache.get(facts)) is not None:
        found: dict[str, float] = json.loads(content)
        return found
    errors = graph_errors(engine, open_engine(reference, bundle), bundle)
    cache.put(facts, json.dumps(errors).encode(), f"parity of {choice}")
    return errors


def verdict_facts(choice: str, device: str, reference: str, bundle: Bundle) -> dict[str, Any]:
    """What a verdict depends on: the graphs' bytes, our version and both engines', the machine."""
    versions = {
        known: engine_class(known.partition(":")[0]).available()[1] for known in (choice, reference)
    }
    graphs = {name: spec.sha256 for name, spec in bundle.manifest.graphs.items()}
    return {
        "heartbeat_fast": __version__,
        "versions": versions,
        "device": device,
        "processor": processor(),
        "graphs": graphs,
    }


def graph_errors(engine: Engine, reference: Engine, bundle: Bundle) -> dict[str, float]:
    """Per graph ‖got − wanted‖ / ‖wanted‖, the largest of its outputs; infinite where an output is
    not finite. A graph gets what the reference's graphs before it put out, else fixed noise."""
    errors = {}
    known: Arrays = {}
    for graph in GRAPHS:
        spec = bundle.manifest.graphs[graph]
        inputs = {tensor.name: known.get(tensor.name, _example(tensor)) for tensor in spec.inputs}
        wanted, got = reference.run(graph, inputs), engine.run(graph, inputs)
        errors[graph] = max(_distance(got[name], wanted[name]) for name in wanted)
        if graph != "encode":
            known |= wanted
    return errors


def _reference(bundle: Bundle) -> str:
    """The first that is installed and takes the bundle; "" if none does."""
    for known in REFERENCES:
        with suppress(EngineError):
            open_engine(known, bundle)
            return known
    return ""


def _example(tensor: TensorSpec) -> NDArray[Any]:
    """Fixed values of a kind that the input takes: images and labels in [0,1], the rest normal."""
    chance = np.random.Generator(np.random.PCG64(0))
    if tensor.dtype == "int64":
        return chance.integers(1, 100, tensor.shape)
    if tensor.name in ("z", "noise", "flow"):
        return chance.standard_normal(tensor.shape, np.float32)
    if tensor.name == "t":
        return np.full(tensor.shape, 500, np.float32)
    if tensor.name == "present":
        return np.ones(tensor.shape, np.float32)
    return chance.random(tensor.shape, np.float32)


def _distance(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    if not np.isfinite(got).all():
        return float("inf")
    length = float(np.linalg.norm(wanted.astype(np.float64)))
    return float(np.linalg.norm(got.astype(np.float64) - wanted)) / max(length, 1e-12)
