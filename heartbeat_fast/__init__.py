"""HeartBeat's echo generator as a compiled runtime. Importing it loads numpy, not torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heartbeat_fast.bundle import Bundle as Bundle
    from heartbeat_fast.clip import Clip as Clip
    from heartbeat_fast.conditions import Conditions as Conditions
    from heartbeat_fast.errors import HeartBeatError as HeartBeatError
    from heartbeat_fast.generator import Generator as Generator
    from heartbeat_fast.record import Record as Record
    from heartbeat_fast.stream import Session as Session

_HOME = {
    "Bundle": "bundle",
    "Clip": "clip",
    "Conditions": "conditions",
    "Generator": "generator",
    "HeartBeatError": "errors",
    "Record": "record",
    "Session": "stream",
}
__all__ = ["Bundle", "Clip", "Conditions", "Generator", "HeartBeatError", "Record", "Session"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Public names load on first use, so `import heartbeat_fast` stays free (a test holds it)."""
    if name in _HOME:
        return getattr(import_module(f"heartbeat_fast.{_HOME[name]}"), name)
    raise AttributeError(f"module 'heartbeat_fast' has no attribute {name!r}")
