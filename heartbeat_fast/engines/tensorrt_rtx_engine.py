"""TensorRT-RTX on workstations: one plan for every RTX GPU, built anywhere, compiled when loaded.

A plan holds no machine code for one GPU; the library compiles that when a context first runs, and
keeps it in a runtime cache. That is code as well, so it goes through the engine cache too.
"""

from typing import Any

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines import cuda
from heartbeat_fast.engines.cache import EngineCache, fingerprint
from heartbeat_fast.engines.tensorrt_engine import Loaded, TensorRtEngine
from heartbeat_fast.engines.tensorrt_plan import TARGETS, TENSORRT_RTX, Recipe, facts
from heartbeat_fast.engines.tensorrt_plugins import refuse
from heartbeat_fast.errors import EngineError

# Ampere and later: Turing (SM75) has no bfloat16. One more target costs a plan some 2 kB.
PORTABLE = Recipe(tuple(target for target in TARGETS if target != "SM75"))


class TensorRtRtxEngine(TensorRtEngine):
    """Runs the bundle's graphs as plans that any RTX GPU can load."""

    name = "tensorrt_rtx"
    family = TENSORRT_RTX
    recorded = ()  # the library records the whole graph itself, once it has compiled it

    def __init__(
        self, bundle: Bundle, device: str = "cuda", cache: EngineCache | None = None
    ) -> None:
        """As TensorRtEngine.

        Raises:
            EngineError: a bundle of the plugin flavour, too.
        """
        refuse(bundle, self.name)
        super().__init__(bundle, device, cache)

    @classmethod
    def recipe_for(cls, gpu: cuda.Gpu) -> Recipe:
        """The portable recipe.

        Raises:
            EngineError: TensorRT-RTX does not know this GPU.
        """
        if gpu.target not in PORTABLE.targets:
            known = ", ".join(PORTABLE.targets)
            raise EngineError(
                f"{gpu.name} is {gpu.target}; tensorrt_rtx plans are for {known}: use tensorrt"
            )
        return PORTABLE

    def context(self, graph: str, engine: Any) -> Any:
        """A context with the compiled kernels of earlier runs, if there are any."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if graph in TensorRtEngine.recorded:
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        cache = config.create_runtime_cache()
        if (kernels := self.cache.get(self._kernels(graph))) is not None:
            cache.deserialize(kernels)
        config.set_runtime_cache(cache)
        return engine.create_execution_context(config)

    def ran(self, graph: str, loaded: Loaded) -> None:
        """After the first run its compiled kernels are kept."""
        super().ran(graph, loaded)
        wanted = self._kernels(graph)
        if loaded.runs > 1 or self.cache.path(wanted).exists():
            return
        kernels = loaded.context.get_runtime_config().get_runtime_cache().serialize()
        if kernels is not None:
            self.cache.put(wanted, bytes(kernels), f"{graph} compiled for {self.gpu.name}")

    def _kernels(self, graph: str) -> dict[str, Any]:
        """What compiled kernels depend on: the plan, and the GPU with its driver."""
        spec = self._bundle.manifest.graphs[graph]
        plan = fingerprint(facts(self.family, spec.sha256, self.recipe, None))
        gpu = self.gpu
        return {
            "compiled": plan,
            "gpu": gpu.name,
            "target": gpu.target,
            "driver": gpu.driver,
        }
