"""A sampler table run on the device: static buffers, coefficients as tensors, one CUDA graph.

A step reads which step it is from a tensor, so all steps are the same work on the same addresses:
captured once, replayed S times, with nothing read back in between. The table is taken in its dense
form, x_{i+1} = Σ_k T[i,k] h_k (h_0 the noise, h_k the k-th model output), one row of T a step.

Legend: S steps, E time embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heartbeat_fast.sampler import SamplerTable

Step = Callable[..., Any]
WARM_UP = 3  # passes before a capture: cuDNN and Triton choose and compile in them


class Loop:
    """The loop of one step count and one shape of condition sets; other tables of as many steps,
    and other clips, are written into the same buffers."""

    def __init__(
        self, step: Step, dtype: torch.dtype, steps: int, sets: list[list[Tensor]], capture: bool
    ) -> None:
        """Nothing is allocated or captured before the first run.

        Args:
            step: (z, temb, local, *kv) → model output, all of dtype.
            sets: local and K, V of the conditions; with guidance also of none. For their shapes.
            capture: replay as a CUDA graph.
        """
        self._step, self._dtype, self._capture = step, dtype, capture
        self._graph: Any = None
        device = sets[0][0].device
        self._sets = [[torch.empty_like(t, dtype=dtype) for t in each] for each in sets]
        self._index = torch.zeros(1, dtype=torch.int64, device=device)
        self._rows = torch.zeros(steps, steps + 1, device=device)
        self._scales = torch.zeros(steps, device=device)
        self._guidance = torch.ones(1, device=device)

    def run(
        self,
        table: SamplerTable,
        times: Tensor,
        sets: list[list[Tensor]],
        guidance: float,
        noise: Tensor,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """The sample x_S on the device.

        Args:
            times: temb of every step (S,E).  noise: h_0.
            progress: called as each step is queued, which on a GPU is before it is done.
        """
        self._fill(table, times, sets, guidance, noise)
        if self._capture and self._graph is None:
            self._graph = self._captured()
            self._fill(table, times, sets, guidance, noise)  # warming up has moved x
        for i in range(table.steps):
            if self._graph is None:
                self._advance()
            else:
                self._graph.replay()
            if progress is not None:
                progress(i + 1, table.steps)
        return self._x.clone()

    def _fill(
        self,
        table: SamplerTable,
        times: Tensor,
        sets: list[list[Tensor]],
        guidance: float,
        noise: Tensor,
    ) -> None:
        """Writes a clip and a table into the buffers."""
        if not hasattr(self, "_x"):
            self._x, self._times = torch.empty_like(noise), torch.empty_like(times)
            self._history = noise.new_empty(table.steps + 1, *noise.shape)
        rows: NDArray[np.float32] = np.zeros((table.steps, table.steps + 1), np.float32)
        for i, row in enumerate(table.weights):
            rows[i, : len(row)] = row
        self._rows.copy_(torch.from_numpy(rows))
        self._scales.copy_(torch.tensor(table.input_scale))
        self._guidance.fill_(guidance)
        self._times.copy_(times)
        for mine, theirs in zip(self._sets, sets, strict=True):
            for buffer, value in zip(mine, theirs, strict=True):
                buffer.copy_(value)
        self._history.zero_()  # rows reach over steps to come, with weight zero: 0·NaN is NaN
        self._history[0].copy_(noise)
        self._x.copy_(noise * table.init_sigma)
        self._index.zero_()

    def _advance(self) -> None:
        """One step, whichever `index` says."""
        z = (self._x * self._scales.index_select(0, self._index)).to(self._dtype)
        temb = self._times.index_select(0, self._index).to(self._dtype)
        outs = [self._step(z, temb, *each).float() for each in self._sets]
        out = outs[0]
        if len(outs) == 2:
            out = outs[1] + self._guidance * (outs[0] - outs[1])
        self._history.index_copy_(0, self._index + 1, out[None])
        row = self._rows.index_select(0, self._index).view(-1, *[1] * self._x.dim())
        self._x.copy_((row * self._history).sum(0))
        self._index.add_(1)

    def _captured(self) -> Any:
        """The step as a CUDA graph, after a few passes beside the default stream."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._index.zero_()
                self._advance()
        torch.cuda.current_stream().wait_stream(side)
        self._index.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        return graph


def condition_sets(
    conditions: Sequence[Mapping[str, Tensor]], names: tuple[str, ...]
) -> list[list[Tensor]]:
    """local and K, V of each set in the graph's order, an absent image's left out.

    Its values are all zero, so its branch adds exactly nothing, and leaving it out saves it.

    Args:
        conditions: the denoise graph's inputs but z and temb, by name.
        names: the denoise graph's inputs.
    """
    sets = []
    for each in conditions:
        image = [tensor for name, tensor in each.items() if name.endswith("_image_v")]
        present = bool(torch.stack([t.any() for t in image]).any()) if image else False
        sets.append(
            [each[name] for name in names if name in each and (present or "_image_" not in name)]
        )
    return sets
