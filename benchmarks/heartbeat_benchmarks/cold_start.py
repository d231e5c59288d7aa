"""One cold start, in a process of its own: interpreter, imports, bundle, first clip.

Run by latency.py as `python -m heartbeat_benchmarks.cold_start`; prints one line of JSON.
"""

import json
import sys
import time
from itertools import pairwise
from typing import Any


def main(arguments: list[str]) -> int:
    """Arguments: bundle, engine, steps, an npz of conditions, the parent's clock at the spawn."""
    bundle, engine, steps, file, spawned = arguments
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
        generator(conditions, steps=int(steps))
        marks.append(time.time())
    import_, open_, _, first, second = ((b - a) * 1e3 for a, b in pairwise(marks))
    print(
        json.dumps({"import": import_, "open": open_, "first clip": first, "second clip": second})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
