"""The scanned sector of a clip: where the image is, and what lies outside it.

Simulators and viewers ask for it: apex, angles, depth, millimetres per pixel, and the mask of
scanned pixels. Whoever made the clip may know it; else it is read off the frames, whose outside is
black. Legend: F frames, H rows, W columns; lengths in pixels, angles in degrees.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIT = 10  # grey levels: generated black stays below, tissue above
LEAST_FIT = 0.85  # intersection over union with the lit pixels, below which it is no sector
Float = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Sector:
    """A circular sector, tip up, as phased and curved arrays scan it.

    Args:
        apex: (column, row) where the two edges meet; may lie outside the image.
        left, right: angles of the edges against straight down, degrees, left negative.
        near, far: radii of the first and last sample.
        fit: intersection over union with the lit pixels where estimated, 1 where known.
    """

    apex: tuple[float, float]
    left: float
    right: float
    near: float
    far: float
    fit: float = 1.0

    def mask(self, height: int, width: int) -> Mask:
        """(H,W), true where the clip shows tissue."""
        rows, columns = np.mgrid[:height, :width].astype(np.float64)
        across, down = columns - self.apex[0], rows - self.apex[1]
        radius, angle = np.hypot(across, down), np.degrees(np.arctan2(across, down))
        inside = (radius >= self.near) & (radius <= self.far)
        return np.asarray(inside & (angle >= self.left) & (angle <= self.right))

    def facts(self, spacing_mm: tuple[float, float]) -> dict[str, Any]:
        """The geometry as JSON values, with the depth in mm (apex to last sample)."""
        numbers = {
            key: [round(v, 3) for v in value] if isinstance(value, tuple) else round(value, 3)
            for key, value in asdict(self).items()
        }
        return {
            **numbers,
            "depth_mm": round(self.far * spacing_mm[0], 3),
            "mm_per_pixel": list(spacing_mm),
            "outside": 0,
        }


def estimate(frames: NDArray[np.uint8]) -> Sector | None:
    """The sector of a clip, from the pixels that are lit in any frame.

    The two edges are lines through each row's outermost lit pixels (Theil–Sen, so that dark tissue
    at an edge does not tilt them); they meet at the apex. Then all numbers are moved as long as the
    overlap with the lit pixels grows.

    Args:
        frames: (F,H,W).

    Returns:
        The sector; None where the lit pixels form none (a full rectangle, a blank clip).
    """
    lit = _filled(frames.max(0) > LIT)
    start = _from_edges(lit)
    return None if start is None else _refined(start, lit)


def _filled(lit: Mask) -> Mask:
    """Without specks, and with dark chambers: what lies between lit pixels of a row or column."""
    H, W = lit.shape
    padded = np.pad(lit, 1).astype(np.uint8)
    count = sum(padded[y : y + H, x : x + W] for y in range(3) for x in range(3))
    solid = lit & (np.asarray(count) >= 4)
    between = [
        np.logical_or.accumulate(solid, axis)
        & np.flip(np.logical_or.accumulate(np.flip(solid, axis), axis), axis)
        for axis in (0, 1)
    ]
    return np.asarray(between[0] | between[1])


def _from_edges(lit: Mask) -> Sector | None:
    H, W = lit.shape
    rows = np.flatnonzero(lit.any(1))
    if len(rows) < max(8, H // 4):
        return None
    first = lit[rows].argmax(1).astype(np.float64)
    last = W - 1 - lit[rows, ::-1].argmax(1).astype(np.float64)
    lines = [_line(rows, first, W), _line(rows, W - 1 - last, W)]
    if lines[0] is None or lines[1] is None:
        return None
    (slope_l, at_l), (slope_r, at_r) = lines[0], lines[1]
    slope_r, at_r = -slope_r, W - 1 - at_r
    if slope_r - slope_l < 0.1:  # the edges are all but parallel: a linear array, or no sector
        return None
    row = (at_l - at_r) / (slope_r - slope_l)
    column = at_l + slope_l * row
    down, across = np.nonzero(lit)
    radius = np.hypot(across - column, down - row)
    return Sector(
        (float(column), float(row)),
        float(np.degrees(np.arctan(slope_l))),
        float(np.degrees(np.arctan(slope_r))),
        float(np.percentile(radius, 0.2)),
        float(np.percentile(radius, 99.8)),
        0.0,
    )


def _line(rows: NDArray[np.int_], edge: Float, width: int) -> tuple[float, float] | None:
    """Slope and intercept of an edge, columns over rows, between the tip and the arc's corner."""
    corner = int(edge.argmin())
    use = np.arange(len(rows) // 20, max(corner - len(rows) // 20, 0))
    use = use[edge[use] > 1]  # cut off by the image's border
    if len(use) < max(4, len(rows) // 8):
        return None
    y, x = rows[use].astype(np.float64), edge[use]
    half = len(y) // 2
    slope = float(np.median((x[half:] - x[: len(x) - half]) / (y[half:] - y[: len(y) - half])))
    return slope, float(np.percentile(x - slope * y, 35))


def _refined(sector: Sector, lit: Mask) -> Sector | None:
    """Hill climbing on the overlap, by turns, with halving steps."""
    H, W = lit.shape
    stride = max(1, max(H, W) // 128)  # every second pixel at 256 finds the same to 0.2 pixels
    rows, columns = (grid.astype(np.float32) for grid in np.mgrid[:H:stride, :W:stride])
    target = lit[::stride, ::stride]

    def overlap(p: Float) -> float:
        across, down = columns - np.float32(p[0]), rows - np.float32(p[1])
        square = across * across + down * down
        inside = (square >= p[4] * abs(p[4])) & (square <= p[5] * p[5]) & (down > -p[5])
        inside &= across * np.cos(p[2]) >= down * np.sin(p[2])
        inside &= across * np.cos(p[3]) <= down * np.sin(p[3])
        return float((inside & target).sum() / max((inside | target).sum(), 1))

    angles = np.radians([sector.left, sector.right])
    best = np.array([*sector.apex, *angles, sector.near, sector.far])
    score = overlap(best)
    pixels = H / 64
    step = np.array([pixels, pixels, 0.04, 0.04, pixels, pixels])
    for _ in range(4):
        for k in range(len(best)):
            for sign in (1.0, -1.0):
                while (moved := overlap(trial := best + sign * step * (np.arange(6) == k))) > score:
                    best, score = trial, moved
        step /= 2
    if score < LEAST_FIT:
        return None
    column, row, left, right, near, far = (float(value) for value in best)
    return Sector(
        (column, row), float(np.degrees(left)), float(np.degrees(right)), max(near, 0.0), far, score
    )
