"""BatchNorm that does not see how a batch is split: moving averages normalise, and learn apart.

torch's BatchNorm normalises by the statistics of whatever rows it is given, so the same batch in
micro-batches, or over processes, is another computation. Here each step normalises by the moving
averages of the steps before, as inference will, and afterwards they learn from the whole batch:
counts, sums and sums of squares add up exactly over any split. The first step, which has no
averages yet, looks at its batch once beforehand. No gradient runs through the averages: for the
image adapter of `base`, whose input is a frozen encoder's embedding, that is the same normalisation
with less noise (docs/scale.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


class Statistics:
    """The moving averages of some BatchNorm layers, by name, gathered over a whole batch."""

    def __init__(self, norms: dict[str, _BatchNorm]) -> None:
        self._norms = norms
        self._sums: dict[str, Tensor] = {}
        self._gathering = False
        for name, norm in norms.items():
            norm.forward = self._forward(name, norm)  # type: ignore[method-assign]

    def buffers(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: means, variances, batches seen."""
        return {
            f"{name}.{key}": buffer
            for name, norm in self._norms.items()
            for key, buffer in norm.named_buffers()
        }

    def fresh(self) -> bool:
        """Whether some layer has seen no batch yet."""
        return any(int(norm.num_batches_tracked or 0) == 0 for norm in self._norms.values())

    @contextmanager
    def gather(self, counts: bool = True) -> Iterator[None]:
        """Forward passes inside add to the sums, unless these rows do not count."""
        self._gathering = counts
        try:
            yield
        finally:
            self._gathering = False

    def update(self, shared: bool, replace: bool = False) -> None:
        """Averages move by momentum towards the gathered batch, or become its statistics.

        shared: sums are added over all processes first.
        """
        for name, norm in self._norms.items():
            sums = self._sums.pop(name)
            if shared:
                all_reduce(sums, ReduceOp.SUM)
            n, mean = sums[0, 0], sums[1] / sums[0, 0]
            var = (sums[2] / n - mean**2).clamp(min=0) * n / (n - 1).clamp(min=1)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.num_batches_tracked is not None
            if not replace:
                norm.num_batches_tracked += 1
            momentum = (
                1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            )
            norm.running_mean.lerp_(mean.to(norm.running_mean), 1.0 if replace else momentum)
            norm.running_var.lerp_(var.to(norm.running_var), 1.0 if replace else momentum)

    def _forward(self, name: str, norm: _BatchNorm) -> Any:
        def forward(x: Tensor) -> Tensor:
            if self._gathering:
                self._add(name, x.detach())
            mean, var = norm.running_mean, norm.running_var
            return functional.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0, norm.eps)

        return forward

    def _add(self, name: str, x: Tensor) -> None:
        """Count, sum and sum of squares per channel, (3, C) in double."""
        axes = [axis for axis in range(x.ndim) if axis != 1]
        var, mean = (v.double() for v in torch.var_mean(x.float(), axes, correction=0))
        n = torch.full_like(mean, x.numel() // x.shape[1])
        sums = torch.stack([n, n * mean, n * (var + mean**2)])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
