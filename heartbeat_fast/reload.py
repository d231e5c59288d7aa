"""New weights between two clips: what runs from a bundle notices that its manifest was replaced.

A rebuild switches a bundle by renaming a new manifest over the old, so one stat a clip (some
microseconds) tells. A new version that is not whole, does not run here, or is for other clips, is
passed over with a warning, said once; the old one goes on from memory.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import numpy as np

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.base import Engine
from heartbeat_fast.errors import BundleError, EngineError, HeartBeatError

Opener = Callable[[Bundle], Engine]
Take = Callable[[Bundle, Engine], None]


class Follow:
    """Watches an opened bundle's folder, and lets newer versions in when no clip is being made."""

    def __init__(self, bundle: Bundle, opener: Opener | None, graphs: Iterable[str] = ()) -> None:
        """opener: an engine on a newer version; None never looks. graphs: those a clip runs."""
        self._bundle, self._opener, self._graphs = bundle, opener, tuple(graphs)
        self._lock, self._clips = threading.Lock(), 0
        self._seen = self._stamp()
        if opener is not None:
            with suppress(BundleError):  # replaced since it was opened?
                if Bundle.open(bundle.path).manifest != bundle.manifest:
                    self._seen = None

    @contextmanager
    def clip(self, take: Take) -> Iterator[None]:
        """One clip: newer weights come in before it, and in no thread while it is made."""
        with self._lock:
            if not self._clips:
                self._refresh(take)
            self._clips += 1
        try:
            yield
        finally:
            with self._lock:
                self._clips -= 1

    def _refresh(self, take: Take) -> None:
        """Gives `take` the newer version, loaded and tried, if there is one and it is good."""
        stamp = self._stamp()
        if self._opener is None or stamp in (None, self._seen):
            return
        self._seen = stamp
        try:
            bundle = Bundle.open(self._bundle.path)
            if bundle.manifest == self._bundle.manifest:
                return
            bundle.verify()
            old, new = ((b.manifest.frames, b.manifest.size) for b in (self._bundle, bundle))
            if old != new:
                raise BundleError(f"frames and size were {old}, are {new}: restart to use it")
            engine = self._opener(bundle)
            self._try(bundle, engine)
            take(bundle, engine)
        except HeartBeatError as error:
            warnings.warn(f"new weights passed over, the old go on: {error}", stacklevel=4)
            return
        self._bundle = bundle

    def _try(self, bundle: Bundle, engine: Engine) -> None:
        """Loads every graph that a clip runs; raises EngineError where one gives no numbers."""
        for graph in self._graphs:
            inputs = bundle.manifest.graphs[graph].inputs
            zeros = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in inputs}
            if not all(np.isfinite(value).all() for value in engine.run(graph, zeros).values()):
                raise EngineError(f"graph {graph}: gives no numbers")

    def _stamp(self) -> tuple[int, ...] | None:
        """The manifest's identity on disk; None while there is none."""
        try:
            found = os.stat(self._bundle.path / "manifest.json")
        except OSError:
            return None
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
