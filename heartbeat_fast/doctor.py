"""What this machine can run, and why not: engines, processor, file formats, the bundle."""

import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from heartbeat_fast import __version__
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.auto import prospects
from heartbeat_fast.engines.base import engine_class, names
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.machine import processor, threads
from heartbeat_fast.errors import BundleError
from heartbeat_fast.inputs import sources

FORMATS = {"cv2": "media", "av": "media", "nibabel": "formats", "pydicom": "dicom"}


def examine(bundle: str | Path | None = None) -> dict[str, Any]:
    """Everything `heartbeat doctor` says, as JSON values. Runs no graph and makes no file."""
    engines = {}
    for name in names():
        kind = engine_class(name)
        can, why = kind.available()
        precisions = list(kind.precisions()) if can else []
        engines[name] = {"available": can, "detail": why, "precisions": precisions}
    checked = _bundle(bundle)
    return {
        "ready": checked["sound"] and any(engine["available"] for engine in engines.values()),
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "threads": threads(),
        "engines": engines,
        "auto": prospects(Bundle.open(bundle), "auto") if checked["sound"] else [],
        "cache": EngineCache().state(),
        "formats": {
            module: True if find_spec(module) else f"pip install 'heartbeat_fast[{extra}]'"
            for module, extra in FORMATS.items()
        },
        "sources": sorted(sources()),
        "bundle": checked,
    }


def describe(report: dict[str, Any]) -> str:
    """A report as lines to read."""
    cpu, bundle = report["processor"], report["bundle"]
    lines = [
        f"heartbeat_fast {report['version']}, Python {report['python']}, {report['platform']}",
        f"processor  {cpu['name']}, {report['threads']} threads, {', '.join(cpu['flags']) or '-'}",
    ]
    for name, engine in report["engines"].items():
        choice = f"; {', '.join(engine['precisions'])}" if engine["precisions"] else ""
        lines.append(f"engine     {_tick(engine['available'])} {name}: {engine['detail']}{choice}")
    lines += [f"auto       {i + 1}. {line}" for i, line in enumerate(report["auto"])]
    lines.append(f"cache      {report['cache']}")
    for module, state in report["formats"].items():
        lines.append(
            f"formats    {_tick(state is True)} {module}{'' if state is True else ': '}"
            f"{'' if state is True else state}"
        )
    lines.append(f"sources    {', '.join(report['sources']) or 'none'}")
    lines.append(f"bundle     {_tick(bundle['sound'])} {bundle['detail']}")
    lines.append("ready" if report["ready"] else "not ready: see the lines marked ✗")
    return "\n".join(lines)


def _tick(good: bool) -> str:
    return "✓" if good else "✗"


def _bundle(path: str | Path | None) -> dict[str, Any]:
    try:
        opened = Bundle.open(path)
        opened.verify()
    except BundleError as error:
        return {"sound": False, "detail": str(error)}
    manifest = opened.manifest
    size = sum(graph.bytes for graph in manifest.graphs.values())
    return {
        "sound": True,
        "detail": f"{manifest.name}: {manifest.frames} frames of {manifest.size}², "
        f"{size / 1e6:.1f} MB, {len(manifest.graphs)} graphs verified, {opened.path}",
        "path": str(opened.path),
        "name": manifest.name,
        "fingerprints": manifest.fingerprints,
        "parity": manifest.parity,
    }
