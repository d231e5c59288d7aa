"""The processes of a run: which one this is, what its share of a batch is, who goes first.

They are what the launcher says in RANK, WORLD_SIZE and LOCAL_RANK, as torchrun and `accelerate
launch` both do. Only the first process writes.
"""

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
from torch import distributed

from heartbeat_fast.errors import HeartBeatError

WAIT = timedelta(minutes=30)  # for the first process to write a large checkpoint or a cache


class ParallelError(HeartBeatError):
    """A stage cannot be split or placed as asked."""


def join() -> tuple[int, int]:
    """This process's number and how many there are; the first call joins them."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if not distributed.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        distributed.init_process_group(backend, timeout=WAIT)
        atexit.register(_leave)
    return distributed.get_rank(), distributed.get_world_size()


def _leave() -> None:
    """Ends the group while the interpreter is whole.

    gloo's threads need it to release the tensors of the last collective; met by its end instead,
    they abort the process: exit code 134 in a third of runs. Sleeping lets go of the interpreter.
    """
    time.sleep(0.3)
    distributed.destroy_process_group()


@contextmanager
def main_first() -> Iterator[bool]:
    """The first process runs the block, then the others: whoever builds a cache, builds it once.

    Yields whether this is the first process.
    """
    rank, world = join()
    if rank:
        distributed.barrier()
    try:
        yield rank == 0
    finally:
        if world > 1 and rank == 0:
            distributed.barrier()


def share(batch: int, rank: int, world: int) -> slice:
    """The rows of process `rank`. Raises: ParallelError when some process would have none."""
    if batch < world:
        raise ParallelError(f"{world} processes for a batch of {batch}: wanted at most {batch}")
    return slice(batch * rank // world, batch * (rank + 1) // world)


def pieces(batch: int, rank: int, world: int, micro_batch: int) -> list[tuple[slice, int]]:
    """Slices of a share and how many of their rows count; as many in every process.

    Processes must meet in every pass, so one whose rows are used up repeats one that counts zero.
    """
    mine = share(batch, rank, world)
    rows = mine.stop - mine.start
    largest = -(-batch // world)
    count = -(-largest // (micro_batch or largest))
    cuts = [rows * k // count for k in range(count + 1)]
    return [(slice(a, b), b - a) if b > a else (slice(0, 1), 0) for a, b in pairwise(cuts)]


def gather(value: Any) -> list[Any]:
    """Every process's value, in order; all must call it together."""
    _, world = join()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    distributed.all_gather_object(values, value)
    return values


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises: ParallelError for a device that is not there."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    if name.startswith("cuda") and not cuda:
        raise ParallelError(f"device {name}: torch sees no CUDA device; wanted --device cpu")
    if name == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)
