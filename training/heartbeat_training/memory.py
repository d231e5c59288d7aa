"""How much memory a stage of `base` takes on each GPU, by arithmetic: nothing is allocated.

Weights, gradients and Adam's moments follow from the parameter counts, what is kept for the
backward pass from `activations`. Not derived but allowed for: what CUDA and its libraries hold for
themselves, and fragmentation. No GPU was at hand to compare with; the tests compare the arithmetic
with tensors that autograd saves.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.models.config import HeartBeatConfig
from heartbeat_fast.models.heartbeat import HeartBeat, train_only
from heartbeat_training.activations import FULL, Cost, costs, weight_copies
from heartbeat_training.paper import learned
from heartbeat_training.parallel import BLOCKS

GIB = 2**30
RUNTIME = 1.5 * GIB  # CUDA context, cuBLAS and cuDNN workspaces: an allowance
FRAGMENTATION = 0.08  # of everything else: an allowance
SHARDINGS = ("none", "ddp", "fsdp")


class PlanError(HeartBeatError):
    """A stage does not fit, or the batch cannot be divided as asked."""


@dataclass(frozen=True)
class Request:
    """What is asked: a stage on so many GPUs of so much memory (GiB).

    sharding: "none" or "ddp" (every GPU holds everything), "fsdp" (weights, gradients, moments and
    averages are spread). micro_batch: rows that a GPU holds at once; 0 for as many as fit.
    """

    stage: str = "stage2"
    batch: int = 16
    gpus: int = 1
    sharding: str = "none"
    checkpointing: bool = False
    gpu_memory: float = 48.0
    train_cross_attention: bool = False
    micro_batch: int = 0

    def __post_init__(self) -> None:
        if min(self.batch, self.gpus) < 1 or self.batch % self.gpus:
            raise PlanError(f"a batch of {self.batch} cannot be shared by {self.gpus} GPUs evenly")
        if self.micro_batch < 0 or (self.micro_batch and self.rows % self.micro_batch):
            raise PlanError(
                f"micro-batch {self.micro_batch}: wanted a divisor of {self.rows}, a GPU's rows"
            )

    @property
    def rows(self) -> int:
        """A GPU's share of the batch."""
        return self.batch // self.gpus


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step, by what they are."""

    weights: float
    gradients: float
    moments: float
    average: float
    gathered: float  # fsdp: the layers that are whole for the moment; ddp: its buckets
    weight_copies: float  # bfloat16, for the backward pass
    inputs: float
    activations: float
    temporary: float  # gradients in flight and recomputed layers, or the optimizer's
    allowance: float

    @property
    def total(self) -> float:
        """Their sum."""
        return float(sum(asdict(self).values()))


@dataclass(frozen=True)
class MemoryPlan:
    """The answer: parameters by module, the micro-batch, its memory, and the work of a step."""

    request: Request
    trainable: dict[str, int]
    frozen: dict[str, int]
    micro_batch: int
    memory: Memory
    totals: dict[int, float]  # bytes by micro-batch
    row_activations: float  # bytes a row keeps
    row_flop: float  # forward pass of a row

    @property
    def accumulation(self) -> int:
        """Micro-batches per step and GPU."""
        return self.request.rows // self.micro_batch

    @property
    def fits(self) -> bool:
        """Whether the GPU is large enough."""
        return self.memory.total <= self.request.gpu_memory * GIB

    @property
    def step_flop(self) -> float:
        """Of a whole step: backward is twice forward at most, checkpoints run forward again."""
        return self.row_flop * self.request.batch * (4 if self.request.checkpointing else 3)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes."""
        memory = {**asdict(self.memory), "total": self.memory.total}
        derived = {"accumulation": self.accumulation, "fits": self.fits}
        return {**asdict(self), "memory": memory, **derived, "step_flop": self.step_flop}


def plan(config: HeartBeatConfig, request: Request) -> MemoryPlan:
    """The largest micro-batch that fits, or the one asked for, with its memory.

    If not even one row fits, the plan of one row is returned; `fits` says so.
    """
    with torch.device("meta"):
        model = HeartBeat(config)
    train_only(model, learned(model, request.stage, request.train_cross_attention))
    stage = 1 if request.stage == "stage1" else 2
    layers = list(costs(model, stage))
    images = 1 if stage == 1 else config.frames  # per row
    row = images * kept(layers, request.checkpointing)
    memory = {
        m: _memory(model, request, layers, m * images, m * row, stage)
        for m in range(1, request.rows + 1)
        if request.rows % m == 0
    }
    fitting = [m for m, found in memory.items() if found.total <= request.gpu_memory * GIB]
    micro = request.micro_batch or max(fitting, default=1)
    return MemoryPlan(
        request,
        _count(model, True),
        _count(model, False),
        micro,
        memory[micro],
        {m: found.total for m, found in memory.items()},
        row,
        images * sum(layer.flop for layer in layers),
    )


def kept(layers: Iterable[Cost], checkpointing: bool) -> float:
    """Bytes that an image keeps until its backward pass."""
    return sum(x.source if checkpointing and x.checkpointed else x.kept for x in layers)


def _memory(
    model: HeartBeat,
    request: Request,
    layers: list[Cost],
    images: int,
    activations: float,
    stage: int,
) -> Memory:
    trained = FULL * sum(_count(model, True).values())
    everything = trained + FULL * sum(_count(model, False).values())
    spread = request.gpus if request.sharding == "fsdp" else 1
    gathered, copies = 0.0, float(weight_copies(model, stage))
    if request.sharding == "fsdp":
        # A block and the one fetched ahead of it are whole, and what is in no block.
        blocks = [FULL * sum(p.numel() for p in b.parameters()) for b in _blocks(model)]
        block = max(blocks)
        gathered = 2.0 * block + everything - sum(blocks)
        copies = block / 2 if request.checkpointing else copies  # a checkpoint keeps no copies
    elif request.gpus > 1:
        gathered = trained  # gradients are summed in buckets
    # Gradients in flight: no more than the fullest layer keeps. A checkpoint recomputes that layer.
    fullest = images * max(layer.kept for layer in layers)
    temporary = fullest * (2 if request.checkpointing else 1)
    inputs = images * _input_bytes(model.config, 1 if stage == 1 else model.config.frames)
    # While Adam steps, activations are gone and its denominators are there.
    if trained / spread > copies + inputs + activations + temporary:
        copies, inputs, activations, temporary = 0.0, 0.0, 0.0, trained / spread
    fixed = (everything + 4 * trained) / spread + gathered
    moving = copies + inputs + activations + temporary
    return Memory(
        weights=everything / spread,
        gradients=trained / spread,
        moments=2 * trained / spread,
        average=trained / spread,
        gathered=gathered,
        weight_copies=copies,
        inputs=inputs,
        activations=activations,
        temporary=temporary,
        allowance=RUNTIME + FRAGMENTATION * (fixed + moving),
    )


def _input_bytes(config: HeartBeatConfig, frames: int) -> float:
    """An image's share of a batch, all float32: mask, valve, flow, latents and noise, and of what
    the clip has once, sketch and embedding."""
    image = config.image
    once = config.size**2 + image.channels * (image.size // image.patch) ** 2
    latents = 2 * config.codec.latent_channels * config.latent**2
    return FULL * ((4 + 1 + 2) * config.size**2 + latents + once / frames)


def _blocks(model: HeartBeat) -> list[torch.nn.Module]:
    """What FSDP gathers at once."""
    return [module for module in model.modules() if type(module).__name__ in BLOCKS]


def _count(model: HeartBeat, trainable: bool) -> dict[str, int]:
    """Parameters by component, without the empty ones."""
    counts = {
        name: sum(p.numel() for p in part.parameters() if p.requires_grad == trainable)
        for name, part in model.named_children()
    }
    return {name: count for name, count in counts.items() if count}
