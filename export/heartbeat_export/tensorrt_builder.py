"""Plans of a bundle's graphs, ahead of use, and new weights in an existing plan.

A plan for refitting (the master) is built once with its weights stripped. New weights are put in
whole, never only those that changed: a refit of a refit has mixed old and new (TensorRT issue
#3628), so each starts from the master. Missing, unknown and rejected weights are named.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from heartbeat_export.errors import ExportError
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines import cuda
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.tensorrt_plan import (
    Family,
    Recipe,
    build,
    check,
    facts,
    library,
    logger,
)

FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
}
NAMED = 5  # of the weights that an error lists


@dataclass(frozen=True)
class Built:
    """One plan.

    targets: none: the GPU here.  seconds, cpu_seconds: of the build, by the clock and of processor
    time, which a busy machine does not stretch.  cached: it was there already, nothing was built.
    """

    graph: str
    targets: tuple[str, ...]
    onnx_bytes: int
    plan_bytes: int
    seconds: float
    cpu_seconds: float
    cached: bool


def build_all(
    family: Family,
    bundle: Bundle,
    recipes: Iterable[Recipe],
    graphs: Iterable[str] = (),
    cache: EngineCache | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Built]:
    """Builds plans into the engine cache, where the engines find them.

    Args:
        recipes: one plan of each graph for each.
        graphs: names; all where none is given.
        fresh: builds what the cache has already, e.g. to measure it.
        say: called with the name of each graph before it is built.

    Raises:
        EngineError: a recipe cannot be built here, or the library refuses a graph.
        BundleError: a graph's file is not what the manifest says.
        ExportError: no such graph.
    """
    cache, specs = cache or EngineCache(), bundle.manifest.graphs
    recipes = list(recipes)
    for recipe in recipes:
        check(family, recipe)
    for name in graphs or specs:
        if name not in specs:
            raise ExportError(f"graph: {name!r} came; the bundle has {', '.join(specs)}")
        for recipe in recipes:
            gpu = None if recipe.targets else cuda.Gpu.find("cuda")
            key = facts(family, specs[name].sha256, recipe, gpu)
            plan = None if fresh else cache.get(key)
            if plan is not None:
                yield Built(name, recipe.targets, specs[name].bytes, len(plan), 0.0, 0.0, True)
                continue
            say(name)
            built, plan = timed(family, bundle.read(specs[name]), recipe, name)
            cache.put(key, plan, f"{bundle.manifest.name} {name}")
            yield built


def timed(family: Family, content: bytes, recipe: Recipe, name: str) -> tuple[Built, bytes]:
    """A plan, and what it took to build it.

    Raises:
        EngineError: the recipe cannot be built here, or the library refuses the graph.
    """
    clock, processor = time.perf_counter(), time.process_time()
    plan = build(family, content, recipe, name)
    seconds = round(time.perf_counter() - clock, 3)
    spent = round(time.process_time() - processor, 3)
    return Built(name, recipe.targets, len(content), len(plan), seconds, spent, False), plan


def refit(
    family: Family,
    master: bytes,
    proto: onnx.ModelProto,
    weights: Iterable[str],
    name: str = "graph",
) -> bytes:
    """The plan of a graph with other weights, from its master.

    Args:
        master: a plan built with Recipe(refit=True) from a graph of the same architecture.
        proto: the graph with the new weights in its initializers (weight_map.apply puts them
            there); all of them go in, whatever changed.
        weights: the initializers that are weights: the graph's keys in weights_map.json.
        name: of the graph, for messages.

    Returns:
        A plan with weights, that can itself be refitted.

    Raises:
        ExportError: the plan lacks a weight (it was folded into a constant: rebuild), wants one
            that the graph lacks, or the library refuses one; names them.
        EngineError: no GPU, which a refit needs.
    """
    check(family, Recipe(refit=True))
    trt = library(family)
    log = logger(trt)
    engine = trt.Runtime(log).deserialize_cuda_engine(master)
    if engine is None or not engine.refittable:
        raise ExportError(f"graph {name}: its plan was not built for refitting: {log.last()}")
    refitter = trt.Refitter(engine, log)
    refitter.weights_validation = True
    given = {t.name: t for t in proto.graph.initializer if t.data_type in FLOATS}
    wanted = set(refitter.get_all_weights())
    _none(
        name, "folded into constants, so that the graph must be built anew", set(weights) - wanted
    )
    _none(name, "wanted by the plan and not in the graph", wanted - set(given))
    alive = [_weights(trt, given[weight]) for weight in sorted(wanted)]
    accepted = {
        w: refitter.set_named_weights(w, new)
        for w, (new, _) in zip(sorted(wanted), alive, strict=True)
    }
    _none(
        name,
        "of another shape or type than the plan's",
        {w for w, ok in accepted.items() if not ok},
    )
    _none(name, "still missing", set(refitter.get_missing_weights()))
    if not refitter.refit_cuda_engine():
        raise ExportError(f"graph {name}: {family.name} refuses the weights: {log.last()}")
    return _serialised(trt, engine)


def _serialised(trt: Any, engine: Any) -> bytes:
    """The plan with its weights inside, still open to a refit."""
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    return bytes(engine.serialize_with_config(config))


def _weights(trt: Any, tensor: onnx.TensorProto) -> tuple[Any, Any]:
    """An initializer as the library's Weights, which only point at the array returned beside."""
    array = np.ascontiguousarray(numpy_helper.to_array(tensor))
    kind = getattr(trt.DataType, FLOATS[tensor.data_type])
    return trt.Weights(kind, array.ctypes.data, array.size), array


def _none(graph: str, what: str, names: set[str]) -> None:
    """Raises ExportError where names are left."""
    if names:
        some = ", ".join(sorted(names)[:NAMED])
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise ExportError(f"graph {graph}: {len(names)} weights {what}: {some}{more}")
