"""How long a viewer waits: from one changed condition to the first frame that shows it.

In a warm session (heartbeat_fast/stream.py) all else is encoded already, and the clip starts from
the last one's latents, `carry` of the steps on. All frames of a clip come at once, so the first one
waits for the whole clip. Every change differs from what was there, so nothing is played again.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from heartbeat_benchmarks.timing import summary
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.controls import Settings
from heartbeat_fast.generator import Generator
from heartbeat_fast.stream import Session

PROMPTS = ("An ECHO with 2-chamber view.", "An ECHO with 4-chamber view.")


def measure(
    generator: Generator, hearts: Sequence[Conditions], settings: Settings, runs: int
) -> Iterator[dict[str, Any]]:
    """{"changed", "carry", "ms": summary with samples} for every condition that is present.

    hearts: at least two, with the same conditions.
    """
    names = hearts[0].present
    with Session(generator, settings) as session:
        session.set(**{name: getattr(hearts[0], name) for name in names})
        session.next()
        for name in names:
            samples = []
            for i in range(1, runs + 2):  # the first one warms up
                value = PROMPTS[i % 2] if name == "text" else getattr(hearts[i % 2], name)
                before = session.wish.version
                start = time.perf_counter()
                if session.set(**{name: value}) == before:
                    continue
                session.next()
                samples.append(round((time.perf_counter() - start) * 1e3, 3))
            samples = samples[1:]
            ms = summary(samples) | {"samples": samples}
            yield {"changed": name, "carry": settings.carry, "ms": ms}
