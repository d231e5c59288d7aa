"""Sums in whole numbers: those of float32; scatterers of a lattice: noise of unit variance."""

import numpy as np
import pytest
from numpy.typing import NDArray

from heartbeat_fast.speckle import (
    AMPLITUDE,
    POSITION,
    Floats,
    Scatterers,
    box5,
    lattice,
    texture,
    whole,
)
from heartbeat_training.splat import splat

SIZE, COUNT = 64, 8192
Four = tuple[Floats, ...]


@pytest.fixture(scope="module")
def scatterers() -> Four:
    """Positions on the sixteenths of a pixel, a few outside the grid, and their amplitudes."""
    rng = np.random.default_rng(5)
    x, y = (rng.integers(-16, 16 * (SIZE + 1), COUNT) / np.float32(16) for _ in "xy")
    re, im = (rng.standard_normal(COUNT, np.float32) for _ in "ri")
    return tuple(np.asarray(part, np.float32) for part in (x, y, re, im))


def summed(*scatterers: NDArray[np.float32]) -> NDArray[np.int32]:
    """Whole sums (3, SIZE, SIZE) of positions x, y and amplitudes."""
    x, y, *values = scatterers
    sums = np.zeros((3, SIZE * SIZE), np.int32)
    Scatterers(x, y, np.stack([whole(v) for v in values]), SIZE).add(sums)
    return sums.reshape(3, SIZE, SIZE)


def test_whole_sums_are_those_of_float(scatterers: Four) -> None:
    """Where positions need no rounding, only that of the amplitudes is left."""
    x, y, re, im = scatterers
    wanted, got = splat(x, y, (re, im, None), (SIZE, SIZE)), summed(*scatterers)
    one = 1 << 2 * POSITION
    dozen = 12 * 2.0 ** -(AMPLITUDE + 1)  # as many in a pixel, each rounded by half a unit
    assert np.abs(got[:2] / (one << AMPLITUDE) - wanted[:2]).max() < dozen
    assert np.array_equal(got[2] / one, wanted[2])


def test_whole_sums_do_not_depend_on_order(scatterers: Four) -> None:
    """To the bit, on every host."""
    back = [part[::-1] for part in scatterers]
    assert np.array_equal(summed(*scatterers), summed(*back))


def test_positions_are_rounded_to_the_nearest_sixteenth(scatterers: Four) -> None:
    """A shift of a 64th of a pixel changes nothing, one of a 16th does."""
    x, y, re, im = scatterers
    x = x.clip(1, SIZE - 2)
    here = summed(x, y, re, im)
    assert np.array_equal(here, summed(x + np.float32(1 / 64), y, re, im))
    assert not np.array_equal(here, summed(x + np.float32(1 / 16), y, re, im))


def test_every_scatterer_in_one_pixel_overflows_nothing() -> None:
    """A clip's 65,536 with amplitudes of their usual size: exact sums."""
    count = 256 * 256
    at = np.full(count, 20.0, np.float32)
    re, im = np.random.default_rng(1).standard_normal((2, count)).astype(np.float32)
    got = summed(at, at, re, im)[:, 20, 20].astype(np.int64)
    exact = [whole(re).astype(np.int64).sum(), whole(im).astype(np.int64).sum(), count]
    assert got.tolist() == [value << 2 * POSITION for value in exact]


def test_what_never_moves_is_summed_once_to_the_same_bits() -> None:
    """A flow over half the picture, and the same flow with the smallest motion everywhere else."""
    flow = np.zeros((4, 2, SIZE, SIZE), np.float32)
    flow[:, 0, :, : SIZE // 2] = 0.3
    flow[:, 1, SIZE // 2 :] = -0.0  # no motion either
    crept = np.where(flow == 0, np.float32(1e-20), flow)
    assert np.array_equal(texture(flow, 4, SIZE, 3), texture(crept, 4, SIZE, 3))


def test_a_flow_into_one_pixel_still_gives_a_texture() -> None:
    """What no tissue does: finite, and of its size."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    flow = np.stack([30 - columns, 30 - rows])[None].repeat(4, 0)
    made = texture(flow, 4, SIZE, 1)
    assert np.isfinite(made).all()
    assert np.abs(made).max() < 50


def test_the_last_frames_flow_moves_nothing() -> None:
    """There is no frame after the last."""
    flow = np.zeros((3, 2, SIZE, SIZE), np.float32)
    flow[-1] = 5
    assert np.array_equal(texture(flow, 3, SIZE, 2), texture(None, 3, SIZE, 2))


def test_lattice_starves_no_pixel_oftener_than_twice_as_many_at_random() -> None:
    """Variance at a pixel over its expected one, for unit amplitudes: deviation 0.58, 0.62."""

    def deviation(x: Floats, y: Floats) -> float:
        column, row = np.floor(x).astype(int), np.floor(y).astype(int)
        fx, fy = x - column, y - row
        squares = np.zeros((SIZE, SIZE))
        weights = ((1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy)
        for (dy, dx), weight in zip(np.ndindex(2, 2), weights, strict=True):
            np.add.at(squares, (row + dy, column + dx), weight**2)
        count = splat(x, y, (None,), (SIZE, SIZE))[0]
        share = squares / (box5((count * 256).astype(np.int32)) / 256 / 25 * 4 / 9)
        return float(share[4:-4, 4:-4].std())

    rng = np.random.default_rng(0)
    cells = lattice(rng, SIZE)
    x, y = rng.random((2, 2 * SIZE * SIZE), np.float32) * np.float32(SIZE - 1)
    assert deviation(*cells) < deviation(x, y)


def test_box5_repeats_the_edges() -> None:
    """Against numpy's padding and sliding windows."""
    image = np.random.default_rng(2).integers(0, 999, (SIZE, SIZE)).astype(np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, 2, mode="edge"), (5, 5))
    assert np.array_equal(box5(image), windows.sum((2, 3)))
