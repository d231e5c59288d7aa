"""One cold start, in a process of its own: interpreter, imports, bundle, first clip.

`measure` runs this file as `python -m heartbeat_benchmarks.cold_start`; it prints a line of JSON.
The process holds the runtime and nothing else, so its peak memory is the runtime's.
"""

import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heartbeat_fast.conditions import Conditions

MEMORY = "peak memory"


def measure(
    bundle: Path, engine: str, steps: int, sampler: str | None, given: "Conditions"
) -> dict[str, float]:
    """Milliseconds of import, open, first clip, second clip; and peak memory in MB.

    Raises:
        HeartBeatError: the process did not end well.
    """
    import numpy as np

    from heartbeat_fast.errors import HeartBeatError

    arrays = {name: np.asarray(getattr(given, name)) for name in given.present}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "conditions.npz"
        np.savez(file, allow_pickle=False, frames=given.frames, size=given.size, **arrays)
        options = [str(bundle), engine, str(steps), sampler or "", str(file), repr(time.time())]
        command = [sys.executable, "-m", "heartbeat_benchmarks.cold_start", *options]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise HeartBeatError(f"cold start: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main(arguments: list[str]) -> int:
    """Arguments: bundle, engine, steps, sampler, an npz of conditions, the parent's clock."""
    bundle, engine, steps, sampler, file, spawned = arguments
    import numpy as np

    from heartbeat_fast.conditions import NAMES, Conditions
    from heartbeat_fast.generator import Generator

    marks = [float(spawned), time.time()]
    generator = Generator.open(bundle, engine)
    marks.append(time.time())
    with np.load(file) as data:
        given: dict[str, Any] = {name: data[name] for name in NAMES if name in data}
        if "text" in given:
            given["text"] = str(given["text"])
        conditions = Conditions(**given, frames=int(data["frames"]), size=int(data["size"]))
    marks.append(time.time())
    for _ in range(2):
        generator(conditions, steps=int(steps), sampler=sampler or None)
        marks.append(time.time())
    import_, open_, _, first, second = ((b - a) * 1e3 for a, b in pairwise(marks))
    stages = {"import": import_, "open": open_, "first clip": first, "second clip": second}
    print(json.dumps(stages | {MEMORY: peak_memory_mb()}))
    return 0


def peak_memory_mb() -> float:
    """The most memory this process has held; NaN where the system does not say.

    On Linux from /proc: there getrusage counts what the parent held when it forked, and a benchmark
    with torch in it holds three times what the runtime does.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text().splitlines()
        return round(int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 2**10, 1)
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    # kilobytes on Linux, bytes on macOS
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
