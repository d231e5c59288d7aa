"""`heartbeat-export engines`: plans built ahead of use, what the cache holds, what can run here."""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from heartbeat_export.tensorrt_builder import Built

HELP = "TensorRT and TensorRT-RTX plans: build, list, clear, doctor"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="plans of a bundle's graphs, into the engine cache")
    build.add_argument("bundle", nargs="?", metavar="BUNDLE", help="(default: the embedded one)")
    build.add_argument("--engine", choices=("tensorrt_rtx", "tensorrt"), default="tensorrt_rtx")
    build.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="SM86",
        help="compute capability, again for more in the same plan (default: for tensorrt_rtx every "
        "one from Ampere on, which is what its engine looks for; for tensorrt the GPU here)",
    )
    build.add_argument(
        "--each", action="store_true", help="a plan for each target as well as one for all"
    )
    build.add_argument(
        "--random",
        metavar="PRESET",
        help="in place of a bundle: random weights in half precision; nothing is kept",
    )
    build.add_argument("--graph", action="append", default=[], help="again for more (default: all)")
    build.add_argument("--refit", action="store_true", help="masters of quick weight changes")
    build.add_argument("--fresh", action="store_true", help="build what the cache has already")
    build.add_argument(
        "--json", type=Path, metavar="FILE", help="sizes and seconds, for the record"
    )
    actions.add_parser("list", help="what the engine cache holds")
    actions.add_parser("clear", help="empty the engine cache")
    actions.add_parser("doctor", help="what can be built and run here, and why not")


def run(options: argparse.Namespace) -> int:
    """TensorRT and TensorRT-RTX plans. They are local caches: never shipped, never trusted from
    elsewhere, built again where they do not fit."""
    return {"build": _build, "list": _list, "clear": _clear, "doctor": _doctor}[options.action](
        options
    )


def _build(options: argparse.Namespace) -> int:
    from heartbeat_fast.bundle import Bundle

    bundle = None if options.random else Bundle.open(options.bundle)
    plans = []
    for built in _plans(options, bundle):
        took = f"{built.seconds:.2f} s ({built.cpu_seconds:.2f} of processor)"
        where = " ".join(built.targets) or "this GPU"
        print(
            f"{built.graph:8} {built.plan_bytes / 1e6:9.2f} MB  "
            f"{'from the cache' if built.cached else took:30}  {where}",
            flush=True,
        )
        plans.append(asdict(built) | {"targets": list(built.targets)})
    print(f"{len(plans)} plans, {sum(plan['plan_bytes'] for plan in plans) / 1e6:.1f} MB")
    if options.json:
        _record(options, bundle, plans)
    return 0


def _plans(options: argparse.Namespace, bundle: Any) -> "Iterator[Built]":
    """The plans asked for, one after the other."""
    from heartbeat_export.tensorrt_builder import build_all, timed
    from heartbeat_fast.engines.tensorrt_plan import TENSORRT, TENSORRT_RTX

    family = TENSORRT if options.engine == "tensorrt" else TENSORRT_RTX
    if bundle is not None:
        yield from build_all(
            family, bundle, _recipes(options), options.graph, fresh=options.fresh, say=_say
        )
        return
    from heartbeat_export.errors import ExportError
    from heartbeat_export.random_graphs import random_graphs
    from heartbeat_fast.models.config import PRESETS

    if options.random not in PRESETS:
        raise ExportError(f"preset: {options.random!r} came; wanted {', '.join(PRESETS)}")
    for name, proto in random_graphs(PRESETS[options.random], names=options.graph):
        content = proto.SerializeToString()
        del proto
        for recipe in _recipes(options):
            _say(name)
            yield timed(family, content, recipe, name)[0]


def _say(graph: str) -> None:
    print(f"graph {graph}", file=sys.stderr)


def _recipes(options: argparse.Namespace) -> list[Any]:
    """One recipe for all targets, with `each` also one for each of them."""
    from heartbeat_fast.engines.tensorrt_plan import Recipe
    from heartbeat_fast.engines.tensorrt_rtx_engine import PORTABLE

    targets = tuple(options.target)
    if options.engine == "tensorrt_rtx" and not targets:
        targets = PORTABLE.targets
    sets = [*((target,) for target in targets if options.each and len(targets) > 1), targets]
    return [Recipe(chosen, refit=options.refit) for chosen in sets]


def _record(options: argparse.Namespace, bundle: Any, plans: list[dict[str, Any]]) -> None:
    """A result file: what was built, of what, on what."""
    from importlib.metadata import version

    from heartbeat_export.commands.write_onnx import source_revision
    from heartbeat_fast import __version__
    from heartbeat_fast.engines.machine import processor
    from heartbeat_fast.engines.tensorrt_plan import TENSORRT, TENSORRT_RTX, library
    from heartbeat_fast.files import atomic

    family = TENSORRT if options.engine == "tensorrt" else TENSORRT_RTX
    revision = source_revision()
    content = {
        "schema_version": 1,
        "kind": "engines",
        "created": datetime.now(UTC).isoformat("T", "seconds"),
        "fingerprint": {
            "machine": {"cpu": processor(), "os": platform.platform()},
            "software": {
                "python": platform.python_version(),
                "heartbeat_fast": __version__,
                family.name: library(family).__version__,
                "onnx": version("onnx"),
            },
            "source": {
                "commit": revision.removesuffix("-dirty"),
                "dirty": revision.endswith("-dirty"),
            },
            "command": " ".join(["heartbeat-export", *sys.argv[1:]]),
            "bundle": bundle.manifest.identity() if bundle else {"random": options.random},
        },
        "note": "built, not run: no time or parity of these plans on a GPU is claimed here",
        "plans": plans,
    }
    with atomic(options.json) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    print(options.json)


def _list(options: argparse.Namespace) -> int:
    from heartbeat_fast.engines.cache import EngineCache

    cache = EngineCache()
    for entry in cache.entries():
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        made = f"{entry.facts.get('engine', '')} {entry.facts.get('version', '')}".strip()
        where = " ".join(entry.facts.get("targets") or ())
        print(f"{when}  {entry.bytes / 1e6:9.2f} MB  {entry.label}  {made}  {where}".rstrip())
    print(cache.state())
    return 0


def _clear(options: argparse.Namespace) -> int:
    from heartbeat_fast.engines.cache import EngineCache

    print(f"{EngineCache().clear()} engines removed")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from heartbeat_fast.engines import cuda
    from heartbeat_fast.engines.cache import EngineCache
    from heartbeat_fast.engines.tensorrt_engine import TensorRtEngine
    from heartbeat_fast.engines.tensorrt_plan import TENSORRT_RTX, Recipe, check, library
    from heartbeat_fast.engines.tensorrt_rtx_engine import PORTABLE, TensorRtRtxEngine
    from heartbeat_fast.errors import HeartBeatError

    def says(what: str, good: bool, why: str) -> None:
        print(f"{what:22} {'✓' if good else '✗'} {why}")

    try:
        check(TENSORRT_RTX, PORTABLE)
        made = library(TENSORRT_RTX).__version__
        says("tensorrt_rtx builds", True, f"{made}: {' '.join(PORTABLE.targets)}")
    except HeartBeatError as error:
        says("tensorrt_rtx builds", False, str(error))
    for engine in (TensorRtRtxEngine, TensorRtEngine):
        says(f"{engine.name} runs", *engine.available())
        try:
            check(engine.family, Recipe(refit=True))
            says(f"{engine.name} refits", True, "masters can be built here")
        except HeartBeatError as error:
            says(f"{engine.name} refits", False, str(error))
    says("GPUs", cuda.count() > 0, str(cuda.count()))
    print(f"cache                    {EngineCache().state()}")
    return 0
