"""The phantom: moving scatterers imaged by a phased array, with exact masks, valve and flow.

`record(seed)` gives what a loader of real clips gives; `render` adds what only a simulator knows:
the scatterers' own field, for which the decoder's texture noise is a stand-in (models/codec.py).
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.anatomy import contraction, sample_anatomy, sway
from heartbeat_fast.heart import Map, Motion, fetch, move, sample
from heartbeat_fast.record import Record
from heartbeat_training.acoustics import (
    Probe,
    clutter_level,
    complex_image,
    compress,
    gain_map,
    scan_convert,
)
from heartbeat_training.geometry import Geometry
from heartbeat_training.splat import PER_PIXEL, splat


def record(seed: int, **options: object) -> Record:
    """One phantom clip as a Record, 16 frames of 256×256 unless `frames` or `size` say otherwise.

    Options: speckle (seed of the texture, default = seed), frames, size, and any Anatomy field
    (view, ef, quality …). The same arguments give the same bytes.
    """
    frames, size = int(str(options.pop("frames", 16))), int(str(options.pop("size", 256)))
    speckle = int(str(options.pop("speckle", seed)))
    heart = sample_anatomy(seed, **options)
    geometry = Geometry(heart, size)
    motion = move(geometry, frames)
    images, _ = render(geometry, motion, speckle)
    return to_record(geometry, motion, images)


def to_record(geometry: Geometry, motion: Motion, images: NDArray[np.uint8]) -> Record:
    """Assemble the record of a rendered phantom."""
    heart, frames = geometry.heart, len(images)
    seconds = heart.coverage * 60 / heart.heart_rate
    return Record(
        frames=images,
        labels=motion.labels,
        spacing_mm=(geometry.spacing, geometry.spacing),
        fps=(frames - 1) / seconds,
        view=heart.view,
        ef=100 * heart.ef,
        patient=f"phantom-{heart.seed:06d}",
        source="phantom",
        skeleton=motion.skeleton,
        flow=motion.flow,
    )


def render(
    geometry: Geometry, motion: Motion, speckle: int, noise: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    """Image the scatterers: frames (F, H, W) uint8 and, when asked, the field (F, 2, H, W) behind
    them.

    The field is the scatterers' amplitudes on the pixel grid, whitened by their known local power:
    the exact counterpart of `speckle.texture`, from which a decoder can be taught to make speckle.
    """
    heart, size, frames = geometry.heart, geometry.size, len(motion.labels)
    rng = np.random.Generator(np.random.PCG64([heart.seed, speckle, 0x5EC]))
    probe = Probe.of(size, geometry.origin, heart)
    gain = gain_map(probe, heart)
    c, r = contraction(heart, frames), sway(heart, frames) / geometry.spacing
    tissue = Tissue(geometry, probe, rng)
    still = Scatterers.draw(rng, probe)
    haze = clutter_level(probe, heart, still.x, still.y)
    echo_still = complex_image(probe, still.x, still.y, still.re * haze, still.im * haze)
    floor = np.float32(10 ** ((-40 + 8 * (1 - heart.quality)) / 20))

    images = np.empty((frames, size, size), np.uint8)
    field = np.empty((frames, 2, size, size), np.float32) if noise else None
    for t in range(frames):
        # the leaflets, 6 dB above myocardium, light up the scatterers they pass
        leaf = 4 * cv2.GaussianBlur(motion.skeleton[t], (0, 0), 0.8 * size / 256)
        x, y, power, crowding = tissue.at(float(c[t]), r[t], leaf)
        weight = np.sqrt(power * crowding)
        echo = complex_image(probe, x, y, tissue.grains.re * weight, tissue.grains.im * weight)
        echo += echo_still + floor * rng.standard_normal(echo.shape).astype(np.float32)
        polar = compress(np.hypot(echo[0], echo[1]), gain, heart)
        images[t] = scan_convert(probe, polar.astype(np.float32))
        if field is not None:
            local = fetch(tissue.power, motion.material[t]) + leaf
            moving = weight / np.sqrt(power + clutter_level(probe, heart, x, y) ** 2)
            standing = haze / np.sqrt(at_nearest(local, still.x, still.y) + haze**2)
            sums = tissue.grains.on_grid(x, y, moving, size)
            sums += still.on_grid(still.x, still.y, standing.astype(np.float32), size)
            field[t] = sums / UNIT
    return images, field


# Standard deviation of `splat` for unit amplitudes: PER_PIXEL scatterers, mean squared weight 4/9.
UNIT = np.float32(np.sqrt(PER_PIXEL * 4 / 9))


@dataclass(frozen=True)
class Scatterers:
    """Positions in pixels and complex amplitudes, each (S,)."""

    x: Map
    y: Map
    re: Map
    im: Map

    @classmethod
    def draw(cls, rng: np.random.Generator, probe: Probe) -> "Scatterers":
        """Uniform over the sector and a margin of 3 %, from which scatterers may move in."""
        size = probe.size
        start = rng.random((2, int(PER_PIXEL * size * size)), np.float32) * np.float32(size - 1)
        margin = np.ones((2 * (size // 32) + 1,) * 2, np.uint8)
        near = cv2.dilate(probe.inside.astype(np.uint8), margin)
        x, y = start[:, at_nearest(near, start[0], start[1]) > 0]
        re, im = rng.standard_normal((2, len(x)), np.float32)
        return cls(x, y, re, im)

    def on_grid(self, x: Map, y: Map, weight: Map, size: int) -> Map:
        """Weighted amplitudes splatted at given positions: (2, H, W)."""
        return splat(x, y, (self.re * weight, self.im * weight), (size, size))


class Tissue:
    """The moving scatterers with their motion and echo power, all looked up once at ED."""

    def __init__(self, geometry: Geometry, probe: Probe, rng: np.random.Generator) -> None:
        self.grains = Scatterers.draw(rng, probe)
        self.power = np.asarray(10 ** (geometry.level / 10), np.float32)
        start = np.stack([self.grains.x, self.grains.y], -1)
        self._drift = [sample(geometry.U[k], start) for k in range(2)]
        self._power = sample(self.power, start)
        # det(I + c∇U) = 1 + c·div U + c²·det ∇U
        (uy, ux), (vy, vx) = np.gradient(geometry.U[0]), np.gradient(geometry.U[1])
        self._strain = sample(ux + vy, start), sample(ux * vy - uy * vx, start)

    def at(self, c: float, r: NDArray[np.float64], leaf: Map) -> tuple[Map, Map, Map, Map]:
        """x, y, echo power and the area factor that undoes crowding."""
        x = self.grains.x + np.float32(c) * self._drift[0] + np.float32(r[0])
        y = self.grains.y + np.float32(c) * self._drift[1] + np.float32(r[1])
        crowding = np.maximum(1 + c * self._strain[0] + c * c * self._strain[1], 0.1)
        return x, y, self._power + at_nearest(leaf, x, y), crowding.astype(np.float32)


def at_nearest(image: NDArray[Any], x: Map, y: Map) -> NDArray[Any]:
    """Values of an image (H, W) at the pixels nearest to positions (S,), edges repeated."""
    height, width = image.shape
    col = np.clip(np.rint(x), 0, width - 1).astype(np.int32)
    row = np.clip(np.rint(y), 0, height - 1).astype(np.int32)
    return np.asarray(image.reshape(-1)[row * width + col])


def render_pair(
    seed: int, frames: int, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """One anatomy under two independent speckles: frames A, frames B, and B's field."""
    geometry = Geometry(sample_anatomy(seed), size)
    motion = move(geometry, frames)
    a, _ = render(geometry, motion, 1)
    b, field = render(geometry, motion, 2, noise=True)
    assert field is not None
    return a, b, field
