"""An ONNX graph to a TensorRT or TensorRT-RTX plan: one builder for both, since both have one API.

Networks are strongly typed, so the graph's own dtypes are the precision, as TensorRT 11 wants it
(it has no precision flags). Shapes are static. TensorRT builds for the GPU at hand; TensorRT-RTX
builds for any list of compute capabilities, without a GPU. A plan that can be refitted (weights
stripped, to be filled in later) needs a GPU to build, with both.
"""

from dataclasses import dataclass
from typing import Any

from heartbeat_fast.engines import cuda, tensorrt_plugins
from heartbeat_fast.errors import EngineError, optional

# What TensorRT-RTX can build for; a graph for none of them is built for the GPU at hand.
TARGETS = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")


@dataclass(frozen=True)
class Family:
    """One of the two libraries: engine name, module, extra, oldest version that is supported."""

    name: str
    module: str
    extra: str
    oldest: tuple[int, int]


TENSORRT = Family("tensorrt", "tensorrt", "tensorrt", (10, 14))
TENSORRT_RTX = Family("tensorrt_rtx", "tensorrt_rtx", "tensorrt-rtx", (1, 3))


@dataclass(frozen=True)
class Recipe:
    """What decides a plan beside its graph.

    Args:
        targets: compute capabilities of TARGETS (TensorRT-RTX alone); none: the GPU at hand.
        refit: weights stripped, to be filled in by a refit: the master of quick weight changes.
        tf32: lets float32 matrices be multiplied with 10-bit mantissas.
    """

    targets: tuple[str, ...] = ()
    refit: bool = False
    tf32: bool = False


def library(family: Family) -> Any:
    """The module of a family.

    Raises:
        MissingDependency: not installed.
        EngineError: older than is supported.
    """
    trt = optional(family.module, family.extra)
    if version(trt) < family.oldest:
        wanted = ".".join(map(str, family.oldest))
        raise EngineError(f"{family.name} {trt.__version__} is installed; wanted {wanted} or later")
    return trt


def version(trt: Any) -> tuple[int, int]:
    """Major and minor version of a family's module."""
    major, minor = (int(part) for part in str(trt.__version__).split(".")[:2])
    return major, minor


def facts(family: Family, graph: str, recipe: Recipe, gpu: cuda.Gpu | None) -> dict[str, Any]:
    """What a plan depends on, for the engine cache's key.

    Args:
        graph: SHA-256 of the ONNX file, which holds architecture, weights, shapes and precision.
        gpu: what it is built for; None where the targets say it.
    """
    device = {"name": gpu.name, "target": gpu.target, "driver": gpu.driver} if gpu else None
    return {
        "engine": family.name,
        "version": library(family).__version__,
        "graph": graph,
        "targets": list(recipe.targets),
        "refit": recipe.refit,
        "tf32": recipe.tf32,
        "device": None if recipe.targets else device,
        "kernels": tensorrt_plugins.digest() if family is TENSORRT else "",
    }


def build(family: Family, content: bytes, recipe: Recipe = Recipe(), name: str = "graph") -> bytes:
    """Builds a plan.

    Args:
        content: the ONNX file, weights inside.
        name: of the graph, for messages.

    Raises:
        EngineError: the recipe cannot be built here, or the library refuses the graph.
    """
    trt = library(family)
    check(family, recipe)
    if tensorrt_plugins.needed(content):
        _plugins(family, trt, name)
    log = logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(content):
        said = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineError(f"graph {name}: {family.name} cannot parse it: {said}")
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    if moving := [tensor.name for tensor in tensors if -1 in tuple(tensor.shape)]:
        raise EngineError(f"graph {name}: {', '.join(moving)} of dynamic shape; wanted static")
    config = _config(trt, builder, recipe)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"graph {name}: {family.name} does not build it: {log.last()}")
    return bytes(plan)


def check(family: Family, recipe: Recipe) -> None:
    """Refuses a recipe that cannot be built on this machine, before anything is parsed.

    Raises:
        EngineError: targets that the family cannot take, no GPU where one is needed, or a version
            whose refit is known to be wrong.
    """
    if unknown := [t for t in recipe.targets if t not in TARGETS]:
        raise EngineError(f"target {unknown[0]} came; {family.name} builds {', '.join(TARGETS)}")
    if recipe.targets and family is TENSORRT:
        raise EngineError("tensorrt builds for the GPU at hand; for other targets: tensorrt_rtx")
    if recipe.refit and family is TENSORRT and version(library(family)) == (11, 3):
        raise EngineError(
            "tensorrt 11.3 may drop a bias from engines built for refitting (its release notes): "
            "install 11.4 or later, or build without refit"
        )
    if not cuda.count():
        if recipe.refit:
            raise EngineError(
                f"{family.name}: a plan for refitting needs a GPU to build, none here: build the "
                "new weights as a plan of their own"
            )
        if not recipe.targets:
            wanted = "name a target such as SM86" if family is TENSORRT_RTX else "build where it is"
            raise EngineError(f"{family.name}: no GPU here to build for: {wanted}")


def _plugins(family: Family, trt: Any, name: str) -> None:
    """Registers what a graph of the plugin flavour needs; raises EngineError where it cannot be."""
    if family is TENSORRT_RTX:
        raise EngineError(
            f"graph {name}: tensorrt_rtx takes no plugins of ours: export the standard flavour"
        )
    tensorrt_plugins.register(trt, cuda.Gpu.find("cuda").target)


def _config(trt: Any, builder: Any, recipe: Recipe) -> Any:
    config = builder.create_builder_config()
    if not recipe.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if recipe.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if recipe.targets:
        config.num_compute_capabilities = len(recipe.targets)
        for i, target in enumerate(recipe.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target), i)
    return config


def logger(trt: Any) -> Any:
    """A logger that keeps what the library says went wrong, for the message of our own error."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def last(self) -> str:
            return self.errors[-1] if self.errors else "it does not say why"

    return Log()
