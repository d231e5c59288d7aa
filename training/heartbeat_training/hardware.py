"""On what a stage runs: device, sharding, micro-batches, recomputation, compilation.

None of it changes what is learned beyond rounding, so none of it belongs to the recipe: a run may
be resumed on other hardware. Light to import: the command line adds these options before torch.
"""

import argparse
from dataclasses import dataclass

from heartbeat_fast.errors import HeartBeatError

SHARDINGS = ("ddp", "fsdp")


@dataclass(frozen=True)
class Hardware:
    """How a stage is run; the processes themselves come from the launcher's environment.

    device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1". sharding, for more than one
    process: "ddp" (every process holds everything) or "fsdp" (parameters, gradients, moments and
    averages are spread). micro_batch: rows that a process holds at once, 0 for its whole share.
    checkpointing: blocks are recomputed in the backward pass. compile: blocks go through
    torch.compile.
    """

    device: str = "auto"
    sharding: str = "ddp"
    micro_batch: int = 0
    checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.sharding not in SHARDINGS:
            raise HeartBeatError(f"sharding {self.sharding!r}: wanted one of {SHARDINGS}")
        if self.micro_batch < 0:
            raise HeartBeatError(f"micro-batch {self.micro_batch}: wanted 0 (whole share) or more")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --device, --sharding, --micro-batch, --checkpointing and --compile."""
    group = parser.add_argument_group("hardware (docs/scale.md)")
    default = Hardware()
    group.add_argument("--device", default=default.device, help="auto, cpu, cuda, cuda:1 (auto)")
    group.add_argument(
        "--sharding",
        choices=SHARDINGS,
        default=default.sharding,
        help="several processes: everything in each (ddp), or spread over them (fsdp)",
    )
    group.add_argument(
        "--micro-batch",
        type=int,
        default=default.micro_batch,
        metavar="ROWS",
        help="rows a process holds at once; gradients are summed over the rest (0: its share)",
    )
    group.add_argument(
        "--checkpointing", action="store_true", help="recompute blocks to save memory"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the blocks")


def from_options(arguments: argparse.Namespace) -> Hardware:
    """The Hardware that `add_options` parsed."""
    return Hardware(
        device=arguments.device,
        sharding=arguments.sharding,
        micro_batch=arguments.micro_batch,
        checkpointing=arguments.checkpointing,
        compile=arguments.compile,
    )
