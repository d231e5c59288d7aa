"""Texture noise: a complex white field on moving scatterers, the decoder's source of speckle.

Speckle is the envelope of many unresolved scatterers and moves with them (Wagner et al., IEEE TSU
30(3), 1983). So the noise a decoder turns into speckle is carried by scatterers along the flow;
drawn afresh for each frame it would boil. Legend: F frames, H W pixels, S scatterers.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]

# Positions to a sixteenth of a pixel, so bilinear weights are whole in 1/256, and amplitudes to
# 2^-AMPLITUDE: sums are whole, the same in any order and on any host. 31 bits hold ±2,048: eight
# deviations of all 65,536 scatterers of a clip in one pixel.
POSITION, AMPLITUDE = 4, 12
LEAST = np.float32(0.05)  # of an expected variance: where nearly all scatterers left


def texture(flow: Floats | None, frames: int, size: int, seed: int) -> Floats:
    """Unit-variance complex noise carried along a flow.

    flow: (F, 2, size, size) in pixels per frame, frame t → t+1, or None (the texture stands still).
    Returns float32 (F, 2, size, size): real and imaginary part.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    x, y = lattice(rng, size)
    values = np.stack([whole(rng.standard_normal(size * size, np.float32)) for _ in "ri"])
    still = np.zeros((3, size * size), np.int32)  # sums of those that never move, half of them
    if flow is not None and frames > 1:
        bits = np.ascontiguousarray(flow[: frames - 1], np.float32).view(np.int32)
        bits = np.bitwise_or.reduce(bits.reshape(-1, size * size)) & 0x7FFFFFFF  # -0 is no motion
        moves = (bits != 0).take(_pixel(x, y, size))
        rest = ~moves
        Scatterers(x[rest], y[rest], values.compress(rest, axis=1), size).add(still)
        x, y, values = x[moves], y[moves], values.compress(moves, axis=1)
    scatterers, sums = Scatterers(x, y, values, size), np.empty_like(still)
    out = np.empty((frames, 2, size, size), np.float32)
    for t in range(frames if flow is not None else 1):
        if t and flow is not None:
            scatterers.move(flow[t - 1])
        np.copyto(sums, still)
        scatterers.add(sums)
        whiten(sums.reshape(3, size, size), out[t])
    if flow is None:
        out[1:] = out[0]
    return out


def stream_of(seed: int) -> int:
    """Seed of a clip's texture: another stream than its latents' noise."""
    return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])


def lattice(rng: np.random.Generator, size: int) -> tuple[Floats, Floats]:
    """Positions x, y (size²,) of scatterers, one anywhere in each cell of a lattice, row by row.

    Cells keep them apart: the noise's variance at one pixel, over its expected one, deviates by 0.6
    after 16 frames of a heart's motion, as with twice as many scatterers at random places.
    """
    side = np.float32((size - 1) / size)
    cells = np.arange(size, dtype=np.float32)
    x = (rng.random((size, size), np.float32) + cells) * side
    y = (rng.random((size, size), np.float32) + cells[:, None]) * side
    return x.reshape(-1), y.reshape(-1)


class Scatterers:
    """Scatterers that move, and their bilinear sums in whole numbers.

    Args:
        x, y: (S,) positions in pixels, x along columns; moved in place. values: (K, S) amplitudes
            as of `whole`.

    Buffers are made once: fresh ones cost a frame's sums 1.35 ms instead of 0.46, in page faults.
    """

    def __init__(self, x: Floats, y: Floats, values: Integers, size: int) -> None:
        self.x, self.y, self.values, self.size = x, y, values, size
        self._cell = np.empty(len(x), np.intp)
        self._integers = np.empty((6, len(x)), np.int32)
        self._floats = np.empty((2, len(x)), np.float32)

    def add(self, sums: Integers) -> None:
        """Adds to sums (K + 1, size²) in 2^-(AMPLITUDE + 2·POSITION); the last counts scatterers,
        in 2^(-2·POSITION). Those outside the grid are ignored."""
        column, row, right, below, both, product = self._integers
        one, cell = 1 << POSITION, self._cell
        for to, at in ((column, self.x), (row, self.y)):
            place = np.clip(at, -1, self.size, out=self._floats[0])
            place *= one
            np.copyto(to, np.rint(place, out=place), casting="unsafe")
        most = (self.size - 1) * one
        inside = np.less(column.view(np.uint32), most)  # negative ones are large without a sign
        inside &= np.less(row.view(np.uint32), most)
        np.bitwise_and(column, one - 1, out=right)
        np.bitwise_and(row, one - 1, out=below)
        row >>= POSITION
        column >>= POSITION
        row *= self.size
        np.add(row, column, out=cell)
        np.multiply(right, below, out=both)  # weights: both = fx·fy, right = fx·(1 - fy), …
        right *= one
        right -= both
        below *= one
        below -= both
        here = np.subtract(one * one, right, out=row)
        here -= below
        here -= both
        if not inside.all():
            cell *= inside
            for weight in (here, right, below, both):
                weight *= inside
        corners = (0, 1, self.size, self.size + 1)
        for corner, weight in zip(corners, (here, right, below, both), strict=True):
            for total, value in zip(sums[:-1], self.values, strict=True):
                np.add.at(total[corner:], cell, np.multiply(weight, value, out=product))
            np.add.at(sums[-1, corner:], cell, weight)

    def move(self, flow: Floats) -> None:
        """Moves every scatterer by the flow (2, size, size) at its nearest pixel."""
        _pixel(self.x, self.y, self.size, self._floats, self._cell)
        for at, step in zip((self.x, self.y), flow, strict=True):
            # "clip" never clips here; "raise" would copy the result through a buffer
            at += np.take(step, self._cell, out=self._floats[0], mode="clip")


def _pixel(
    x: Floats,
    y: Floats,
    size: int,
    buffers: Floats | None = None,
    out: NDArray[np.intp] | None = None,
) -> NDArray[np.intp]:
    """Index (S,) of the pixel nearest to each position; for those outside, at the edge."""
    column, row = np.empty((2, len(x)), np.float32) if buffers is None else buffers
    for to, at in ((column, x), (row, y)):
        np.clip(np.rint(at, out=to), 0, size - 1, out=to)
    row *= size
    row += column
    cell = np.empty(len(x), np.intp) if out is None else out
    np.copyto(cell, row, casting="unsafe")
    return cell


def whole(amplitudes: Floats) -> Integers:
    """Amplitudes in 2^-AMPLITUDE, rounded."""
    return np.rint(amplitudes * np.float32(1 << AMPLITUDE)).astype(np.int32)


def whiten(sums: Integers, out: Floats) -> None:
    """Sums of `Scatterers` (re, im, count: (3, H, W)) over their expected deviation: (2, H, W).

    Compression crowds scatterers and stretching thins them; without this the texture would brighten
    where tissue shortens.
    """
    weight = 1 << 2 * POSITION
    variance = box5(sums[2]) * np.float32(4 / 9 / 25 / weight)
    np.maximum(variance, LEAST, out=variance)
    scale = np.float32(1 / (weight << AMPLITUDE)) / np.sqrt(variance, out=variance)
    np.copyto(out, sums[:2], casting="same_kind")
    out *= scale


def box5(image: Integers) -> Floats:
    """Sums over the 5×5 neighbours of every pixel of an image (H, W), edges repeated.

    Of a count of scatterers, 25 times their local density. One scatterer's squared bilinear weights
    average (2/3)² = 4/9, so the density's 4/9 is the variance that unit amplitudes are expected to
    have; the mean over neighbours keeps the noise's own fluctuation and takes out its trend.
    """
    height, width = image.shape
    padded = np.empty((height + 4, width + 4), image.dtype)
    padded[2:-2, 2:-2] = image
    padded[:2, 2:-2], padded[-2:, 2:-2] = image[0], image[-1]
    padded[:, :2], padded[:, -2:] = padded[:, 2:3], padded[:, -3:-2]
    pairs = padded[:-1] + padded[1:]
    rows = pairs[:-3] + pairs[2:-1]
    rows += padded[4:]
    pairs = rows[:, :-1] + rows[:, 1:]
    total = pairs[:, :-3] + pairs[:, 2:-1]
    total += rows[:, 4:]
    return total.astype(np.float32)
