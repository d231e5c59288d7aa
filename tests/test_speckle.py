"""Three sums in one integer: the same texture as three sums in float32."""

import numpy as np
import pytest
from numpy.typing import NDArray

from heartbeat_fast.speckle import AMPLITUDE, FIELD, POSITION, pack, packed_splat, splat, texture

SIZE, SCATTERERS = 64, 8192
Scatterers = tuple[NDArray[np.float32], ...]


@pytest.fixture(scope="module")
def scatterers() -> Scatterers:
    """Positions on the sixteenths of a pixel, a few outside the grid, and their amplitudes."""
    rng = np.random.default_rng(5)
    x, y = (rng.integers(-16, 16 * (SIZE + 1), SCATTERERS) / np.float32(16) for _ in "xy")
    re, im = (rng.standard_normal(SCATTERERS, np.float32) for _ in "ri")
    return tuple(np.asarray(part, np.float32) for part in (x, y, re, im))


def summed(*scatterers: NDArray[np.float32]) -> NDArray[np.float32]:
    """`packed_splat`, which must have an answer."""
    x, y, re, im = scatterers
    sums = packed_splat(x, y, pack(re, im), SIZE)
    assert sums is not None
    return sums


def test_packed_sums_are_those_of_float(scatterers: Scatterers) -> None:
    """Where positions need no rounding, only that of the amplitudes is left."""
    x, y, re, im = scatterers
    wanted, got = splat(x, y, (re, im, None), (SIZE, SIZE)), summed(*scatterers)
    assert np.abs(got[:2] - wanted[:2]).max() < 12 * 2.0 ** -(AMPLITUDE + 1)  # a dozen in a pixel
    assert np.array_equal(got[2], wanted[2])


def test_packed_sums_do_not_depend_on_order(scatterers: Scatterers) -> None:
    """Whole numbers: to the bit, on every host."""
    back = [part[::-1] for part in scatterers]
    assert np.array_equal(summed(*scatterers), summed(*back))


def test_a_sum_that_leaves_its_field_is_noticed() -> None:
    """Every scatterer in one pixel: no answer, rather than parts that ran into each other."""
    at = np.full(SCATTERERS, 20.0, np.float32)
    packed = pack(np.ones(SCATTERERS, np.float32), np.ones(SCATTERERS, np.float32))
    most = 2 ** (63 - 2 * FIELD - 2 * POSITION)  # weights of one in the uppermost part
    assert packed_splat(at, at, packed, SIZE) is None
    assert packed_splat(at[:most], at[:most], packed[:most], SIZE) is None
    assert packed_splat(at[: most - 1], at[: most - 1], packed[: most - 1], SIZE) is not None


def test_a_flow_into_one_pixel_still_gives_a_texture() -> None:
    """What no tissue does: sums in float32 take over, finite and of its size."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    flow = np.stack([30 - columns, 30 - rows])[None].repeat(4, 0)
    made = texture(flow, 4, SIZE, 1)
    assert np.isfinite(made).all()
    assert np.abs(made).max() < 50


def test_positions_are_rounded_to_the_nearest_sixteenth(scatterers: Scatterers) -> None:
    """A shift of a 64th of a pixel changes nothing, one of a 16th does."""
    x, y, re, im = scatterers
    x = x.clip(1, SIZE - 2)
    here = summed(x, y, re, im)
    assert np.array_equal(here, summed(x + np.float32(1 / 64), y, re, im))
    assert not np.array_equal(here, summed(x + np.float32(1 / 16), y, re, im))
