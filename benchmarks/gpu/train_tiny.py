"""Train `tiny` on this machine, in pieces of a few minutes each: data, then stage after stage.

Phantoms are rendered here, on all cores, in shards that a later piece takes up where this one
stopped. Each stage of heartbeat-train runs until the time is up, is asked to stop as a batch system
would, and leaves a checkpoint; run the same command again to go on. The newest finished stage goes
to $OUT as one file of half-precision tensors; --unpack makes a model folder of such a file.
"""

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

# Forked renderers must not each start a team of BLAS threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from heartbeat_fast.files import atomic
from heartbeat_fast.models.config import PRESETS, HeartBeatConfig, from_dict, to_dict
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_training.clips import ClipCache, phantoms
from heartbeat_training.hardware import Hardware
from heartbeat_training.pipeline import STAGES, run_stage
from heartbeat_training.recipes import PLANS, Plan
from heartbeat_training.stage_codec import PairCache
from heartbeat_training.stopping import STOP_FILE

OUT = Path(os.environ.get("OUT", "out/gpu"))
SHARD = 25  # anatomies a worker renders at once
PAIR_FRAMES, PAIR_OFFSET = 4, 1_000_000  # as heartbeat_training.pipeline asks for them
STUDENT = ("student", "decoder")  # few steps; after the last stage
LARGEST = 64 * 2**20  # bytes of the file that leaves this machine


class TimeUp(Exception):
    """This piece's minutes are over; nothing is lost."""


def main() -> int:
    """One piece; exit code 0 when every stage is done, 75 (try again) when some are not."""
    options = _options()
    if options.unpack:
        unpack(options.unpack, options.to)
        return 0
    OUT.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    run, plan = options.run, PLANS[options.preset].scaled(options.share)
    log: list[dict[str, Any]] = []
    stages = (*STAGES, *(STUDENT if options.student else ()))
    try:
        _timed(log, "data", partial(render, plan, options.preset, run, options.workers, end))
        for stage in stages:
            if not (run / f"model-{stage}").exists():
                _timed(log, stage, partial(_stage, stage, options, end))
        code = 0
    except TimeUp as stop:
        code = 75
        print(f"stopped: {stop}; run the same command again")
    done = [stage for stage in stages if (run / f"model-{stage}").exists()]
    size = pack(run / f"model-{done[-1]}", OUT / "tiny-weights.safetensors") if done else 0
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {"device": device, "preset": options.preset, "share": options.share, "log": log}
    result |= {"done": done, "wanted": stages, "bytes": size}
    (OUT / "train-tiny.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{device}, {options.preset} × {options.share:g}: {len(done)} of {len(stages)} stages")
    for row in log:
        print(f"{row['what']:10} {row['seconds']:7.1f} s  {row['state']}")
    return code


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=("tiny", "nano"), default="tiny")
    parser.add_argument("--run", type=Path, default=Path("runs/gpu-tiny"))
    parser.add_argument("--minutes", type=float, default=8.5, help="of this piece")
    parser.add_argument("--share", type=float, default=1.0, help="of every stage's steps")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--student", action="store_true", help="then few steps, small decoder")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="make a model folder of it")
    parser.add_argument("--to", type=Path, default=Path("runs/gpu-tiny/model"), metavar="DIR")
    return parser.parse_args()


def _timed(log: list[dict[str, Any]], what: str, do: Callable[[], None]) -> None:
    """Does it, and notes how long it took and whether it was finished."""
    start, state = time.monotonic(), "stopped"
    try:
        do()
        state = "done"
    finally:
        log.append({"what": what, "seconds": time.monotonic() - start, "state": state})


def _stage(stage: str, options: argparse.Namespace, end: float) -> None:
    """One stage, until it is done or the time is up."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeUp(f"before {stage}")
    # A file, not a signal: one that comes before the loop listens would be lost.
    asked = options.run / "stop"
    asked.unlink(missing_ok=True)
    os.environ[STOP_FILE] = str(asked)
    alarm = threading.Timer(left, asked.touch)
    alarm.daemon = True
    alarm.start()
    try:
        hardware = Hardware(compile=options.compile)
        run_stage(stage, options.preset, options.run, hardware=hardware, share=options.share)
    except SystemExit as stop:
        raise TimeUp(f"in {stage}, at its checkpoint") from stop
    finally:
        alarm.cancel()


def render(plan: Plan, preset: str, run: Path, workers: int, end: float) -> None:
    """All phantoms of the plan into run/pairs and run/clips, where heartbeat-train looks.

    Raises: TimeUp between two shards.
    """
    config = PRESETS[preset]
    seeds = range(plan.first_seed, plan.first_seed + plan.clips)
    pairs = range(plan.first_seed + PAIR_OFFSET, plan.first_seed + PAIR_OFFSET + plan.pairs)
    torch.set_num_threads(1)  # a fork holds no other threads than this one
    for folder, mark, wanted, build in (
        (run / "pairs", "done", pairs, partial(_pairs, config)),
        (run / "clips", "rows.json", seeds, partial(_clips, config)),
    ):
        if (folder / mark).exists():
            continue
        chunks = [wanted[i : i + SHARD] for i in range(0, len(wanted), SHARD)]
        parts = [(folder / f"shard-{chunk[0]}", chunk) for chunk in chunks]
        with ProcessPoolExecutor(workers) as pool:
            jobs = [pool.submit(build, *part, end) for part in parts]
            late = [job for job in jobs if not job.result()]
        if late:
            raise TimeUp(f"with {len(jobs) - len(late)} of {len(jobs)} shards of {folder.name}")
        join([part for part, _ in parts], folder, mark)
    torch.set_num_threads(workers)


def _pairs(config: HeartBeatConfig, part: Path, seeds: range, end: float) -> bool:
    """One shard of the codec's frames; False where no time is left for it."""
    if (part / "done").exists() or time.monotonic() < end:
        PairCache.build(part, seeds, PAIR_FRAMES, config.size)
        return True
    return False


def _clips(config: HeartBeatConfig, part: Path, seeds: range, end: float) -> bool:
    """One shard of clips; False where no time is left for it."""
    if (part / "rows.json").exists() or time.monotonic() < end:
        ClipCache.build(part, phantoms(seeds, config.frames, config.size), len(seeds))
        return True
    return False


def join(parts: list[Path], folder: Path, mark: str) -> None:
    """Shards' arrays one behind the other in `folder`, its mark last; then the shards go."""
    for name in sorted(path.name for path in parts[0].glob("*.npy")):
        arrays = [np.load(part / name, mmap_mode="r") for part in parts]
        shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
        whole = np.lib.format.open_memmap(folder / name, "w+", arrays[0].dtype, shape)
        np.concatenate(arrays, out=whole)
    rows = [json.loads((part / mark).read_text() or "[]") for part in parts]
    (folder / mark).write_text(json.dumps([row for some in rows for row in some]))
    for part in parts:
        shutil.rmtree(part)


def pack(model: Path, file: Path) -> int:
    """A model folder as one file: tensors in half precision, config, tokenizer and provenance as
    its metadata. Returns its length in bytes."""
    whole = HeartBeat.from_pretrained(model)
    tensors = {
        k: (v.half() if v.is_floating_point() else v).contiguous().clone()
        for k, v in whole.state_dict().items()
    }
    texts = {
        name: (model / name).read_text("utf-8") for name in ("tokenizer.json", "provenance.json")
    }
    with atomic(file) as temporary:
        save_file(tensors, temporary, {"config": json.dumps(to_dict(whole.config)), **texts})
    size = file.stat().st_size
    if size > LARGEST:
        print(f"{file}: {size / 2**20:.0f} MiB, too large to bring home", file=sys.stderr)
    return size


def unpack(file: Path, folder: Path) -> None:
    """The model folder of a packed file, as heartbeat-export takes it."""
    with safe_open(file, "pt") as content:
        texts = content.metadata()
        model = HeartBeat(from_dict(HeartBeatConfig, json.loads(texts.pop("config"))))
        model.load_state_dict({key: content.get_tensor(key).float() for key in content.keys()})  # noqa: SIM118
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "provenance.json"):
        (folder / name).write_text(texts[name], "utf-8")
    Console().print(f"{folder}: written")


if __name__ == "__main__":
    sys.exit(main())
