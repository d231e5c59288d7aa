"""What a rebuild says of itself: the command's text and JSON, and the benchmark's raw rows."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from heartbeat_export.decide import Road
from heartbeat_export.local_engines import Outcome


@dataclass
class Report:
    """What a rebuild did, or with dry_run would do.

    Args:
        road, reasons, changed: see decide.Decision.
        before, after: fingerprints of the weights.  build: of the result on the gate's engine.
        engines: what became of the graphs that engines had compiled here (local_engines.Outcome).
        parity: relative L2 by graph; after a full export also a clip in dB.
        written: bytes of new files.  seconds: by stage; all of it under "all".
    """

    bundle: str
    road: str = Road.NOTHING.value
    reasons: list[str] = field(default_factory=list)
    changed: dict[str, list[str]] = field(default_factory=dict)
    before: str = ""
    after: str = ""
    build: str = ""
    engines: list[dict[str, Any]] = field(default_factory=list)
    parity: dict[str, Any] = field(default_factory=dict)
    written: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    dry_run: bool = False

    def tell(self, outcomes: list[Outcome]) -> None:
        """What became of compiled engines."""
        self.engines = [asdict(outcome) for outcome in outcomes]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the wall-clock time of a block to `seconds`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
