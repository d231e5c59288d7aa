"""Texture noise: a complex white field on moving scatterers, the decoder's source of speckle.

Speckle is the envelope of many unresolved scatterers and moves with them (Wagner et al., IEEE TSU
30(3), 1983). So the noise a decoder turns into speckle is carried by scatterers along the flow;
drawn afresh for each frame it would boil. Legend: F frames, H W pixels, S scatterers.
"""

import numpy as np
from numpy.typing import NDArray

PER_PIXEL = 2.0  # scatterers per pixel: at 1 every tenth pixel starves after 16 frames of motion

# One 64-bit addition for three sums: real part, imaginary part and weight of a scatterer side by
# side in an integer. Positions to a sixteenth of a pixel (POSITION bits), so bilinear weights are
# exact in 2·POSITION bits; amplitudes to 2^-AMPLITUDE. A part of FIELD bits holds ±64.
POSITION, AMPLITUDE, FIELD = 4, 10, 25
LEAST = np.float32(0.05)  # of an expected variance: where nearly all scatterers left


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


def whiten(sums: NDArray[np.float32]) -> NDArray[np.float32]:
    """Amplitudes of `splat` (re, im, ones: (3, H, W)) over their expected deviation: (2, H, W).

    Compression crowds scatterers and stretching thins them; without this the texture would brighten
    where tissue shortens.
    """
    deviation = np.sqrt(np.maximum(expected(sums[2]), LEAST))
    return np.asarray(sums[:2] * (1 / deviation), np.float32)


def expected(count: NDArray[np.float32]) -> NDArray[np.float32]:
    """Expected variance (H, W) of `splat` for unit amplitudes: local density × 4/9.

    The sum of squared bilinear weights of one scatterer averages (2/3)² = 4/9; the density is a 5×5
    mean of the splatted count, so that the noise's own fluctuation is kept, only its trend removed.
    """
    return box5(count) * np.float32(4 / 9)


def box5(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """5×5 mean of an image (H, W), edges repeated."""
    padded = np.pad(image, 2, mode="edge")
    height, width = image.shape
    rows = padded[:height].copy()
    for i in range(1, 5):
        rows += padded[i : i + height]
    total = rows[:, :width].copy()
    for i in range(1, 5):
        total += rows[:, i : i + width]
    return np.asarray(total * np.float32(1 / 25), np.float32)


def stream_of(seed: int) -> int:
    """Seed of a clip's texture: another stream than its latents' noise."""
    return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])


def texture(
    flow: NDArray[np.float32] | None, frames: int, size: int, seed: int
) -> NDArray[np.float32]:
    """Unit-variance complex noise carried along a flow.

    flow: (F, 2, size, size) in pixels per frame, frame t → t+1, or None (the texture stands still).
    Returns float32 (F, 2, size, size): real and imaginary part.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    count = int(PER_PIXEL * size * size)
    x = rng.random(count, np.float32) * np.float32(size - 1)
    y = rng.random(count, np.float32) * np.float32(size - 1)
    amplitudes = (
        rng.standard_normal(count, np.float32),
        rng.standard_normal(count, np.float32),
    )
    packed = pack(*amplitudes)
    out = np.empty((frames, 2, size, size), np.float32)
    for t in range(frames):
        sums = packed_splat(x, y, packed, size)
        if sums is None:
            sums = splat(x, y, (*amplitudes, None), (size, size))
        out[t] = whiten(sums)
        if flow is None:
            out[1:] = out[0]
            break
        if t + 1 < frames:
            row, col = (np.rint(at).clip(0, size - 1) for at in (y, x))
            nearest = (row * np.float32(size) + col).astype(np.intp)
            x += flow[t, 0].reshape(-1).take(nearest)
            y += flow[t, 1].reshape(-1).take(nearest)
    return out


def pack(re: NDArray[np.float32], im: NDArray[np.float32]) -> NDArray[np.int64]:
    """Amplitudes (S,) of scatterers and the number one, rounded, side by side: (S,)."""
    real, imaginary = (
        np.rint(part * np.float32(1 << AMPLITUDE)).astype(np.int64) for part in (re, im)
    )
    return real + (imaginary << FIELD) + (np.int64(1) << 2 * FIELD)


def packed_splat(
    x: NDArray[np.float32], y: NDArray[np.float32], packed: NDArray[np.int64], size: int
) -> NDArray[np.float32] | None:
    """`splat` of packed amplitudes: (3, size, size), or None where a sum left its field.

    Scatterers crowd in one pixel by the dozen only under flows that no tissue has. 1.1 ms for
    131,072 scatterers where three sums in float32 take 1.9.
    """
    one = np.float32(1 << POSITION)
    col, row = ((at * one + np.float32(0.5)).astype(np.int32) for at in (x, y))
    most = (size - 1) << POSITION
    inside = (x >= 0) & (y >= 0) & (col < most) & (row < most)
    if not inside.all():  # seldom: picking them out takes as long as a third of the sums
        col, row, packed = col[inside], row[inside], packed[inside]
    cell = ((row >> POSITION) * size + (col >> POSITION)).astype(np.intp)
    fx, fy = ((at & ((1 << POSITION) - 1)).astype(np.int64) for at in (col, row))
    right = packed * fx
    left = (packed << POSITION) - right
    total = np.zeros(size * size, np.int64)
    for corner, value in ((0, left), (1, right)):  # value · fy below, the rest above
        below = value * fy
        np.add.at(total[corner + size :], cell, below)
        np.add.at(total[corner:], cell, (value << POSITION) - below)
    real = _lowest(total)
    total = (total - real) >> FIELD
    imaginary = _lowest(total)
    count = (total - imaginary) >> FIELD
    if count.sum() != len(cell) << 2 * POSITION:
        return None
    sums = np.empty((3, size, size), np.float32)
    weight = 1 << 2 * POSITION
    for out, field, unit in zip(
        sums, (real, imaginary, count), (weight << AMPLITUDE,) * 2 + (weight,), strict=True
    ):
        np.multiply(field.reshape(size, size), np.float32(1 / unit), out=out, casting="unsafe")
    return sums


def _lowest(total: NDArray[np.int64]) -> NDArray[np.int64]:
    """The signed integer in the lowest FIELD bits."""
    return (total << 64 - FIELD) >> 64 - FIELD
