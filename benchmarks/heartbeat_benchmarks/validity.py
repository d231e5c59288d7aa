"""Whether a run may be trusted: who else used the processors, and whether their speed held."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DRIFT = 0.1  # of the matrix peak, from before to after
OTHERS = 0.1  # of the processors' time, used by other processes or taken by the hypervisor
STAT = Path("/proc/stat")


@dataclass
class Watch:
    """Processor time of everybody, and of this process and the children it waited for.

    Counts from when it is made. In a container the rest of the machine counts as "others", as it
    should: it takes the same processors.
    """

    _start: float = field(default_factory=time.monotonic)
    _busy: tuple[float, float] | None = field(default_factory=lambda: _busy())
    _own: float = field(default_factory=lambda: _own())

    def read(self) -> dict[str, Any]:
        """Wall seconds so far, and as shares of all processors' time: own, others, stolen.

        Shares are None where the system does not count them.
        """
        wall = time.monotonic() - self._start
        now = _busy()
        found: dict[str, Any] = {"wall_s": round(wall, 2), "own": None, "others": None}
        if self._busy is None or now is None or wall <= 0:
            return found | {"stolen": None}
        whole = wall * (os.cpu_count() or 1)
        own = (_own() - self._own) / whole
        busy, stolen = ((b - a) / whole for a, b in zip(self._busy, now, strict=True))
        shares = {"own": own, "others": max(0.0, busy - own), "stolen": stolen}
        return found | {name: round(share, 4) for name, share in shares.items()}


def verdict(
    before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], used: dict[str, Any]
) -> dict[str, Any]:
    """{"valid", "reasons"}: no reason, no doubt. Peaks as probe.measure, used as Watch.read."""
    reasons = []
    for dtype in before.keys() & after.keys():
        was, became = before[dtype]["gflops"], after[dtype]["gflops"]
        if abs(became / was - 1) > DRIFT:
            reasons.append(f"{dtype} matrix speed went from {was:.0f} to {became:.0f} GFLOP/s")
    for who, share in (("other processes used", used["others"]), ("was stolen:", used["stolen"])):
        if share is not None and share > OTHERS:
            reasons.append(f"{who} {100 * share:.0f} % of the processors' time")
    return {"valid": not reasons, "reasons": sorted(reasons)}


def too_few(runs: int, wanted: int) -> list[str]:
    """A reason where the sample is too small for the percentile it was made for."""
    return [f"{runs} clips a row; {wanted} carry a p90"] if runs < wanted else []


def _busy() -> tuple[float, float] | None:
    """Seconds that all processors were busy for anybody, and stolen; None off Linux."""
    try:
        words = STAT.read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, irq, soft, stolen = map(int, words[:8])
    except (OSError, ValueError):
        return None
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + soft) / tick, stolen / tick


def _own() -> float:
    """Processor seconds of this process and the children it has waited for."""
    return sum(os.times()[:4])
