"""Scatterers of a phantom, spread on a grid. Legend: S scatterers, H W pixels."""

import numpy as np
from numpy.typing import NDArray

# A pixel, at random places. Texture noise has a lattice of one a pixel (heartbeat_fast/speckle.py).
PER_PIXEL = 2.0


def splat(
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    values: tuple[NDArray[np.float32] | None, ...],
    size: tuple[int, int],
) -> NDArray[np.float32]:
    """Bilinear sums of scatterers on a grid.

    x, y: (S,) positions in pixels (x along columns); values: K arrays (S,), None for ones; size:
    (H, W). Returns (K, H, W) float32. Scatterers outside the grid are ignored.
    """
    height, width = size
    inside = (x >= 0) & (y >= 0) & (x < width - 1) & (y < height - 1)
    if not inside.all():  # seldom: picking them out takes as long as a third of the sums
        x, y = x[inside], y[inside]
        values = tuple(None if value is None else value[inside] for value in values)
    col, row = np.floor(x), np.floor(y)
    fx, fy = x - col, y - row
    gx, gy = 1 - fx, 1 - fy
    cell = row.astype(np.intp) * width + col.astype(np.intp)
    out = np.zeros((len(values), height * width), np.float32)
    for offset, weight in ((0, gx * gy), (1, fx * gy), (width, gx * fy), (width + 1, fx * fy)):
        corner = cell + offset
        for total, value in zip(out, values, strict=True):
            np.add.at(total, corner, weight if value is None else weight * value)
    return out.reshape(len(values), height, width)
