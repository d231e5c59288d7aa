"""What new weights mean for the engines compiled on this machine: refitted, built, or left to be.

A compiled graph is found by the SHA-256 of its file, so one of old weights is never served for new
ones, whatever happens here: this only spares the next start a build. A TensorRT plan whose master
is in the cache (`heartbeat-export engines build --refit`) takes the new weights by a refit, before
the bundle is switched, and is kept once its outputs are torch's. The rest is stale: it stays for a
rollback until the cache wants its place, and the next open compiles anew what it needs; with `warm`
that is done here, so that a running generator need not.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import onnx

from heartbeat_export import parity, tensorrt_builder
from heartbeat_export.decide import Decision, Road
from heartbeat_export.errors import ExportError
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines import auto, cuda
from heartbeat_fast.engines.cache import EngineCache, fingerprint
from heartbeat_fast.engines.openvino_engine import ALWAYS_EXACT, OpenVinoEngine
from heartbeat_fast.engines.tensorrt_engine import TensorRtEngine
from heartbeat_fast.engines.tensorrt_plan import Recipe, build, check, facts
from heartbeat_fast.engines.tensorrt_rtx_engine import TensorRtRtxEngine
from heartbeat_fast.engines.torch_engine import TorchEngine
from heartbeat_fast.errors import EngineError, HeartBeatError
from heartbeat_fast.models.graphs import Tensors, example_inputs
from heartbeat_fast.models.heartbeat import HeartBeat

PLANNED: tuple[type[TensorRtEngine], ...] = (TensorRtEngine, TensorRtRtxEngine)
OPENVINO_HINTS = {"f32": "fp32", "bf16": "bf16"}  # its name of a precision → ours

UNCHANGED, BEFORE = "its graph did not change", "these weights were compiled here before"


class Action(StrEnum):
    """What becomes of a compiled graph."""

    KEPT = "kept"  # its graph did not change
    FOUND = "found"  # the new weights were compiled here before
    REFITTED = "refitted"
    BUILT = "built"
    STALE = "stale"  # the next open compiles it


@dataclass(frozen=True)
class Outcome:
    """One compiled graph of an engine: what was done, why, and in how many seconds."""

    engine: str
    graph: str
    action: Action
    why: str
    seconds: float = 0.0


@dataclass(frozen=True)
class _Plan:
    """A TensorRT plan of the old weights, or the master of one."""

    kind: type[TensorRtEngine]
    graph: str
    recipe: Recipe
    gpu: cuda.Gpu | None

    def facts(self, bundle: Bundle, refit: bool = False) -> dict[str, object]:
        """Its key in the cache for a bundle's weights; with refit that of its master."""
        recipe, sha = replace(self.recipe, refit=refit), bundle.manifest.graphs[self.graph].sha256
        return facts(self.kind.family, sha, recipe, None if recipe.targets else self.gpu)


@dataclass
class Follower:
    """The engine cache beside one rebuild.

    Args:
        old: the bundle as it is.  decision: see decide.py.  model: with the new weights.
        cache: the user's own where none is given.  warm: compile now what the next open would.
    """

    old: Bundle
    decision: Decision
    model: HeartBeat
    cache: EngineCache
    warm: bool = False

    def foresee(self) -> list[Outcome]:
        """What `follow` will do, before there is a new version."""
        changed = {*self.decision.changed, *self.decision.retrace}
        if self.decision.road is Road.FULL:
            changed = set(self.old.manifest.graphs)
        planned = [self._foreseen(plan, plan.graph in changed) for plan in self._plans()]
        return planned + self._openvino(changed)

    def follow(self, new: Bundle) -> list[Outcome]:
        """Does it, for a version whose files are in place and that is not switched to yet.

        Nothing here fails a rebuild: what goes wrong is an outcome's reason.
        """
        before, after = self.old.manifest.graphs, new.manifest.graphs
        changed = {name for name in after if after[name].sha256 != before[name].sha256}
        outcomes = []
        for plan in self._plans():
            outcome, start = self._foreseen(plan, plan.graph in changed), time.perf_counter()
            if plan.graph in changed and self.cache.get(plan.facts(new)) is not None:
                outcome = replace(outcome, action=Action.FOUND, why=BEFORE)
            if outcome.action == Action.REFITTED:
                try:
                    self._refit(plan, new)
                except HeartBeatError as error:
                    outcome = replace(outcome, action=Action.STALE, why=str(error))
            if outcome.action == Action.STALE and self.warm:
                outcome = self._built(plan, new, outcome)
            outcomes.append(replace(outcome, seconds=round(time.perf_counter() - start, 3)))
        return outcomes + self._openvino(changed, new)

    def _plans(self) -> Iterator[_Plan]:
        """TensorRT's plans of the bundle as it is, one for a plan and its master."""
        names = {spec.sha256: name for name, spec in self.old.manifest.graphs.items()}
        seen = set()
        for entry in self.cache.headers():
            said = entry.facts
            kind = next((kind for kind in PLANNED if kind.name == said.get("engine")), None)
            if kind is None or said.get("graph") not in names:
                continue
            recipe = Recipe(tuple(said.get("targets") or ()), tf32=bool(said.get("tf32")))
            plan = _Plan(kind, names[said["graph"]], recipe, _gpu())
            try:
                wanted = plan.facts(self.old, refit=bool(said.get("refit")))
            except HeartBeatError:  # no library any more: nothing can load the plan
                continue
            if plan.gpu is None:  # to be told why, not to be passed over
                wanted["device"] = said.get("device")
            if fingerprint(wanted) == entry.key and plan not in seen:
                seen.add(plan)
                yield plan

    def _foreseen(self, plan: _Plan, changed: bool) -> Outcome:
        """Kept, to be refitted, or stale and why."""
        name, graph = plan.kind.name, plan.graph
        if not changed:
            return Outcome(name, graph, Action.KEPT, UNCHANGED)
        try:
            self._check(plan)
        except HeartBeatError as error:
            return Outcome(name, graph, Action.STALE, str(error))
        return Outcome(name, graph, Action.REFITTED, "its master takes new weights")

    def _check(self, plan: _Plan) -> None:
        """Raises HeartBeatError where a plan cannot be refitted, by what can be known before."""
        graph, family = plan.graph, plan.kind.family
        if self.decision.road is Road.FULL or graph in self.decision.retrace:
            raise ExportError("its graph was traced anew, and a refit changes numbers alone")
        check(family, replace(plan.recipe, refit=True))
        if plan.gpu is None or plan.recipe != plan.kind.recipe_for(plan.gpu):
            raise ExportError("built ahead for other GPUs, where it cannot be tried here")
        if self.cache.get(plan.facts(self.old, refit=True)) is None:
            make = f"heartbeat-export engines build {self.old.path} --engine {family.name} --refit"
            raise ExportError(f"no master to refit: {make}")

    def _refit(self, plan: _Plan, new: Bundle) -> None:
        """A refitted plan and its master under the new weights' keys, once it passed the gate.

        Raises:
            HeartBeatError: a weight cannot be put in, or the outputs are not torch's.
        """
        graph = plan.graph
        master = self.cache.get(plan.facts(self.old, refit=True)) or b""
        content = json.loads(new.read(new.manifest.files["weights_map"]))
        proto = onnx.load_from_string(new.read(new.manifest.graphs[graph]))
        family, weights = plan.kind.family, content["graphs"].get(graph, {})
        made = tensorrt_builder.refit(family, master, proto, weights, graph)
        with tempfile.TemporaryDirectory() as scratch:
            trial = EngineCache(Path(scratch) / "cache")
            trial.put(plan.facts(new), made, graph)
            engine = plan.kind(new, "cuda", trial)
            inputs = {graph: self._inputs[graph]}
            error = parity.graph_errors(engine, TorchEngine(self.model, new), inputs)[graph]
        if not error <= parity.bounds(new.manifest.precision).error:
            raise ExportError(f"refitted, it was {error:.2e} from torch, which does not pass")
        label = f"{new.manifest.name} {graph}"
        self.cache.put(plan.facts(new), made, label)
        # The master holds no weights: it serves the next ones too.
        self.cache.put(plan.facts(new, refit=True), master, label)

    def _built(self, plan: _Plan, new: Bundle, outcome: Outcome) -> Outcome:
        """A plan of the new weights; the outcome as it is, with the reason, where there is none."""
        spec = new.manifest.graphs[plan.graph]
        try:
            made = build(plan.kind.family, new.read(spec), plan.recipe, plan.graph)
            self.cache.put(plan.facts(new), made, f"{new.manifest.name} {plan.graph}")
        except HeartBeatError as error:
            return replace(outcome, why=f"{outcome.why}; {error}")
        return replace(outcome, action=Action.BUILT)

    def _openvino(self, changed: set[str], new: Bundle | None = None) -> list[Outcome]:
        """OpenVINO's compiled graphs, which take no other weights."""
        names = {spec.sha256: name for name, spec in self.old.manifest.graphs.items()}
        held = [e.facts for e in self.cache.headers() if "graph" in e.facts]
        held = [said for said in held if said.get("engine", "openvino") == "openvino"]
        here = {(bool(said.get("int8")), said["graph"]) for said in held}
        outcomes, precisions = dict[Outcome, None](), set[str]()
        for said in held:
            if (graph := names.get(said["graph"])) is None:
                continue
            int8 = bool(said.get("int8"))
            hint = said.get("options", {}).get("INFERENCE_PRECISION_HINT")
            if graph not in ALWAYS_EXACT and not int8 and hint in OPENVINO_HINTS:
                precisions.add(OPENVINO_HINTS[hint])
            action, why = Action.STALE, "it takes no refit"
            if graph not in changed:
                action, why = Action.KEPT, UNCHANGED
            elif new is not None and (int8, new.manifest.graphs[graph].sha256) in here:
                action, why = Action.FOUND, BEFORE
            elif int8:
                command = f"heartbeat-export quantise --bundle {self.old.path}"
                why = f"calibrated on the old weights: {command}"
            outcomes[Outcome("openvino:int8" if int8 else "openvino", graph, action, why)] = None
        if new is None or not self.warm:
            return list(outcomes)
        return self._warmed(list(outcomes), sorted(precisions), new)

    def _warmed(self, outcomes: list[Outcome], precisions: list[str], new: Bundle) -> list[Outcome]:
        """OpenVINO's graphs compiled, and compared as `auto` does when it opens."""
        stale = [o for o in outcomes if (o.engine, o.action) == ("openvino", Action.STALE)]
        if not stale or not precisions:
            return outcomes
        start = time.perf_counter()
        try:
            for name in precisions:
                engine = OpenVinoEngine(new, precision=name, cache=self.cache)
                auto.judged(engine, f"openvino:{name}", new, self.cache)
        except HeartBeatError as error:
            why = f"cannot be compiled now: {error}"
            return [replace(o, why=why) if o in stale else o for o in outcomes]
        took = round(time.perf_counter() - start, 3)  # of all of them
        built = {o: replace(o, action=Action.BUILT, seconds=took) for o in stale}
        return [built.get(o, o) for o in outcomes]

    @cached_property
    def _inputs(self) -> dict[str, Tensors]:
        return example_inputs(self.model)


def _gpu() -> cuda.Gpu | None:
    """The first GPU, if there is one."""
    try:
        return cuda.Gpu.find("cuda")
    except EngineError:
        return None
