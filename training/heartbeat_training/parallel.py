"""One stage on one or many processes: placed, split, wrapped in DDP or FSDP, and given back plain.

A batch is one list of rows whoever computes them: process r takes its share in pieces, every
piece's mean loss is weighted by its rows, and gradients are averaged, so any split adds up to the
gradient of the whole batch.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from heartbeat_training.batch_norm import Statistics
from heartbeat_training.hardware import Hardware
from heartbeat_training.processes import ParallelError, join, pick_device, pieces, share
from heartbeat_training.state import whole

# What is recomputed, compiled and gathered as one: ours, CLIP's and SAM's, by class name so that
# nothing is imported for it.
BLOCKS = ("ResBlock", "Transformer", "CLIPEncoderLayer", "SamVisionLayer")
# Layers of blocks that the denoiser calls before the blocks: FSDP must not wait for the block.
EARLY = ("time_emb_proj", "attn2.to_k", "attn2.to_v", "attn2.to_k_ip", "attn2.to_v_ip")
BACKEND = "inductor"  # of torch.compile


class Learner(Protocol):
    """The part of a stage that is split; its networks are attributes of it."""

    def parameters(self) -> dict[str, nn.Parameter]: ...

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def picture(self, step: int) -> Any: ...


class Whole(nn.Module):
    """A stage as one module, as wrappers want it: forward is its loss, or its picture of a step."""

    def __init__(self, stage: Learner) -> None:
        super().__init__()
        networks = {k: v for k, v in vars(stage).items() if isinstance(v, nn.Module)}
        self.networks = nn.ModuleDict(networks)
        self._stage = (stage,)

    def forward(self, batch: dict[str, Tensor], picture: int | None = None) -> Any:
        """Scalars of a batch; with `picture`, the picture of that step."""
        stage = self._stage[0]
        return stage.loss(batch) if picture is None else stage.picture(picture)


class Parallel:
    """A stage while it learns. As a context it hands the networks back as they were, but learned.

    parameters: what learns, by the stage's names; spread tensors under FSDP.
    statistics: BatchNorm's moving averages.
    """

    def __init__(self, stage: Learner, batch: int, hardware: Hardware, bf16: bool) -> None:
        self.rank, self.world = join()
        self.batch, self.bf16 = batch, bf16
        self.device = pick_device(hardware.device)
        self.rows = share(batch, self.rank, self.world)
        self._pieces = pieces(batch, self.rank, self.world, hardware.micro_batch)
        learned = stage.parameters()
        self._whole = Whole(stage)
        self._home = next(iter(learned.values())).device
        self._whole.to(self.device)
        places = _places(self._whole, learned)
        _freeze_others(self._whole, learned)
        self._kept = _remember(self._whole)
        self.statistics = Statistics(_norms(self._whole, learned))
        for block in _blocks(self._whole):
            _rewrite(block, hardware)
        self._sync: Callable[[], AbstractContextManager[None]] = nullcontext
        self._learner: nn.Module = self._whole
        if self.world > 1:
            self._wrap(hardware.sharding)
        self.parameters = {k: getattr(module, name) for k, (module, name) in places.items()}

    def _wrap(self, sharding: str) -> None:
        """DDP or FSDP around the whole, from the first process's values."""
        for tensor in (*self._whole.parameters(), *self._whole.buffers()):
            if tensor.is_floating_point():
                distributed.broadcast(tensor.data, 0)
        if sharding == "ddp":
            ddp = DistributedDataParallel(self._whole, init_sync=False)
            ddp.broadcast_buffers = False  # statistics are equal everywhere as they are
            self._learner, self._sync = ddp, ddp.no_sync
            return
        mesh = init_device_mesh(self.device.type, (self.world,))
        originals = list(self._whole.parameters())
        for p in originals:  # FSDP cuts along the first axis of contiguous tensors
            p.data = p.data.contiguous()
        for block in _blocks(self._whole):
            for name, part in block.named_modules():
                if name.endswith(EARLY):
                    fully_shard(part, mesh=mesh)
            fully_shard(block, mesh=mesh)
        fully_shard(self._whole, mesh=mesh, reshard_after_forward=True)
        for p in originals:  # kept for the names' sake, without their memory
            p.data = p.data.new_empty(0)

    def learn(self, batch: dict[str, Tensor]) -> dict[str, tuple[float, int]]:
        """Gradients of the batch's mean loss, from this process's rows of it.

        Returns each scalar's sum over rows and their number, since a scalar may be missing where it
        has no meaning.
        """
        if self.statistics.fresh():
            with torch.no_grad():
                for part, count in self._parts(batch):
                    self._forward(self._whole, part, count)
            self.statistics.update(self.world > 1, replace=True)
        sums: dict[str, Tensor] = {}
        rows: dict[str, int] = {}
        for index, (part, count) in enumerate(self._parts(batch)):
            last = index + 1 == len(self._pieces)
            with nullcontext() if last else self._sync():
                scalars = self._forward(self._learner, part, count)
                (scalars["loss"] * (count * self.world / self.batch)).backward()
            for name, value in scalars.items() if count else ():
                # Doubles: a mean over one piece is then the scalar itself, to the bit.
                sums[name] = count * value.detach().double() + sums.get(name, 0.0)
                rows[name] = count + rows.get(name, 0)
        self.statistics.update(self.world > 1)
        totals = torch.stack([*sums.values()]).tolist()
        return {k: (total, rows[k]) for k, total in zip(sums, totals, strict=True)}

    def _forward(self, module: nn.Module, part: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        with bf16, self.statistics.gather(count > 0):
            return module(part)

    def _parts(self, batch: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Pieces of the share on the device, with how many rows count."""
        for rows, count in self._pieces:
            part = {k: v[rows].to(self.device, non_blocking=True) for k, v in batch.items()}
            yield part, count

    def clip(self, largest: float) -> float:
        """Scale gradients to a norm of at most `largest`; returns the norm before."""
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), largest)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def picture(self, step: int) -> Any:
        """The stage's picture; all processes must ask for it together."""
        return self._whole({}, picture=step)

    def __enter__(self) -> "Parallel":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Plain networks again; after an error the values of spread parameters are lost."""
        spread = {} if error else dict(self._whole.named_parameters())
        full = {k: whole(p.detach()) for k, p in spread.items() if isinstance(p, DTensor)}
        _restore(self._kept)
        for name, p in self._whole.named_parameters():
            if name in full:
                p.data = full[name]
        self._whole.to(self._home)


def _blocks(root: nn.Module) -> list[nn.Module]:
    return [module for module in root.modules() if type(module).__name__ in BLOCKS]


def _rewrite(block: nn.Module, hardware: Hardware) -> None:
    """Compile a block, recompute it in the backward pass, or both."""
    if hardware.compile:
        # Every block is a variant of the same code; past the limit they would run uncompiled.
        torch._dynamo.config.recompile_limit = 256
        block.forward = torch.compile(block.forward, backend=BACKEND)
    if hardware.checkpointing:
        # No random state is kept: a loss draws nothing, and the next batch is drawn meanwhile.
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def _places(root: nn.Module, learned: dict[str, nn.Parameter]) -> dict[str, tuple[nn.Module, str]]:
    """Which attribute of which module each parameter of the stage is."""
    there = {
        id(p): (module, name)
        for module in root.modules()
        for name, p in module.named_parameters(recurse=False)
    }
    lost = [name for name, p in learned.items() if id(p) not in there]
    if lost:
        raise ParallelError(f"{lost[0]}: in none of the stage's networks, its attributes")
    return {name: there[id(p)] for name, p in learned.items()}


def _freeze_others(root: nn.Module, learned: dict[str, nn.Parameter]) -> None:
    chosen = {id(p) for p in learned.values()}
    for p in root.parameters():
        p.requires_grad_(id(p) in chosen)


def _norms(root: nn.Module, learned: dict[str, nn.Parameter]) -> dict[str, _BatchNorm]:
    """BatchNorm layers that learn; frozen ones keep the statistics they came with."""
    chosen = {id(p) for p in learned.values()}
    return {
        name.removeprefix("networks."): module
        for name, module in root.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and any(id(p) in chosen for p in module.parameters(recurse=False))
    }


Kept = list[tuple[nn.Module, type, dict[str, Any]]]


def _remember(root: nn.Module) -> Kept:
    """What rewriting and wrapping change in modules: class, hooks, methods, parameters."""
    kept = []
    for module in root.modules():
        values = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        kept.append((module, type(module), values | {"_buffers": module._buffers}))
    return kept


def _restore(kept: Kept) -> None:
    for module, kind, values in kept:
        values = values | {"_buffers": module._buffers}
        module.__class__ = kind
        vars(module).clear()
        vars(module).update(values)
