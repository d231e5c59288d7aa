"""What a stage has learned so far: parameters, their moving averages, Adam's moments, statistics.

It goes to and from flat, named tensors in full size, whatever the parameters are spread over, so a
checkpoint does not know how many processes wrote it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from heartbeat_training.checkpoints import CheckpointError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class State:
    """Parameters by name, their averages, the optimizer, and BatchNorm's statistics by name.

    Names in a checkpoint: model.NAME, ema.NAME, adam.MOMENT.NAME, buffer.NAME.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor], lr: float
    ) -> None:
        self.parameters, self.buffers = dict(parameters), dict(buffers)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=lr, foreach=True)

    def average(self, decay: float) -> None:
        """ema ← decay · ema + (1 − decay) · parameter."""
        with torch.no_grad():
            averages = [_local(average) for average in self.ema.values()]
            now = [_local(p.detach()) for p in self.parameters.values()]
            torch._foreach_lerp_(averages, now, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint stores; all processes must call it together."""
        flat = {f"buffer.{name}": tensor for name, tensor in self.buffers.items()}
        for name, p in self.parameters.items():
            flat[f"model.{name}"] = whole(p.detach())
            flat[f"ema.{name}"] = whole(self.ema[name])
            for key, value in self.optimizer.state.get(p, {}).items():
                flat[f"adam.{key}.{name}"] = whole(value)
        return flat

    def load(self, file: Path) -> None:
        """Inverse of `tensors`, one tensor at a time.

        Raises: CheckpointError when the file holds other parameters or other shapes.
        """
        with safe_open(file, framework="pt") as stored, torch.no_grad():
            names = set(stored.keys())
            self._compare(file, stored, names)
            for name, p in self.parameters.items():
                _fill(p, stored.get_tensor(f"model.{name}"))
                _fill(self.ema[name], stored.get_tensor(f"ema.{name}"))
                if f"adam.step.{name}" not in names:
                    continue
                first, second = torch.zeros_like(p), torch.zeros_like(p)
                _fill(first, stored.get_tensor(f"adam.exp_avg.{name}"))
                _fill(second, stored.get_tensor(f"adam.exp_avg_sq.{name}"))
                step = stored.get_tensor(f"adam.step.{name}").clone()
                self.optimizer.state[p] = dict(zip(MOMENTS, (step, first, second), strict=True))
            for name, buffer in self.buffers.items():
                if f"buffer.{name}" in names:  # the first format had none
                    buffer.copy_(stored.get_tensor(f"buffer.{name}"))

    def _compare(self, file: Path, stored: Any, names: set[str]) -> None:
        """The same parameters of the same shapes, or an error that names the first other one."""
        wanted = {f"model.{name}": tuple(p.shape) for name, p in self.parameters.items()}
        there = {n: tuple(stored.get_slice(n).get_shape()) for n in names if n.startswith("model.")}
        for name in sorted(wanted.keys() | there.keys()):
            if wanted.get(name) != there.get(name):
                raise CheckpointError(
                    f"{file}: {name} is {there.get(name, 'absent')}, the stage's is "
                    f"{wanted.get(name, 'absent')}; choose another --run"
                )

    def use_ema(self) -> None:
        """Put the averaged weights into the model."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.ema[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights are in the model for a while."""
        kept = [p.detach().clone() for p in self.parameters.values()]
        self.use_ema()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.parameters.values(), kept, strict=True):
                    p.copy_(value)


def _local(tensor: Tensor) -> Tensor:
    """This process's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; parts are brought together in main memory, one tensor at a time."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _fill(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor's values in; of a spread target, only this process's part."""
    if isinstance(target, DTensor):
        value = value.to(target.device)
        spread = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(spread.to_local())
    else:
        target.copy_(value)
