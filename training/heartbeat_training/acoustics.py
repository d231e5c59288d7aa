"""The phantom's ultrasound: scatterers → point-spread convolution → envelope → log → sector image.

Baseband model of a phased array (Meunier & Bertrand, IEEE TMI 14(2), 1995): the complex image is
the scatterers' field convolved with a separable Gaussian point spread in (depth, beam angle); the
envelope of many scatterers per resolution cell is Rayleigh. Legend: R depth samples, A beams, S
scatterers.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.anatomy import Anatomy
from heartbeat_training.geometry import Map
from heartbeat_training.splat import PER_PIXEL, splat

AXIAL = 1.05  # point-spread σ in depth samples at 256; the lateral one is Anatomy.beam
HEADROOM = 25.0  # dB from myocardium to white: walls mid-grey, pericardium bright, blood near black


@dataclass(frozen=True)
class Probe:
    """Polar grid of a sector image of `size` pixels and its lookup maps."""

    size: int
    origin: tuple[float, float]
    sector: float
    lateral: float  # point-spread σ in beams
    reach: float  # sector radius as a share of the image's height
    depths: int
    beams: int
    to_polar_depth: Map  # (H, W): depth sample of each pixel
    to_polar_beam: Map  # (H, W): beam of each pixel
    inside: NDArray[np.bool_]  # (H, W): pixels of the sector

    @classmethod
    def of(cls, size: int, origin: tuple[float, float], heart: Anatomy) -> "Probe":
        """Depth samples as fine as pixels; the number of beams follows the image size."""
        depths, beams, sector = size, size * 9 // 16, heart.sector
        row, col = np.mgrid[0:size, 0:size].astype(np.float32)
        radius = np.hypot(col - origin[0], row - origin[1]).astype(np.float32)
        angle = np.arctan2(col - origin[0], row - origin[1]).astype(np.float32)
        beam = (angle / sector + 0.5) * (beams - 1)
        near = 0.012 * size
        inside = (np.abs(angle) <= sector / 2) & (radius < size * heart.reach) & (radius > near)
        return cls(
            size,
            origin,
            sector,
            heart.beam,
            heart.reach,
            depths,
            beams,
            radius,
            beam.astype(np.float32),
            inside,
        )

    def shares(self) -> Map:
        """Depth of each sample as a share of the imaging depth, (R, 1)."""
        samples = np.arange(self.depths, dtype=np.float32)[:, None]
        return np.asarray(samples / (self.depths * self.reach), np.float32)

    def polar(self, x: Map, y: Map) -> tuple[Map, Map]:
        """Pixel positions → (depth sample, beam)."""
        dx, dy = x - self.origin[0], y - self.origin[1]
        angle = np.arctan2(dx, dy)
        beam = (angle / self.sector + 0.5) * (self.beams - 1)
        return np.hypot(dx, dy).astype(np.float32), beam.astype(np.float32)


def complex_image(probe: Probe, x: Map, y: Map, re: Map, im: Map) -> NDArray[np.float32]:
    """Scatterers (S,) with complex amplitudes → beamformed complex image (2, R, A).

    Scaled so that unit amplitudes give a mean power of 1 at every depth: a cell holds
    PER_PIXEL·r·Δθ scatterers, and a Gaussian of (σ², bilinear splatting's 1/6 added) passes
    1/(4πσσ').
    """
    depth, beam = probe.polar(x, y)
    field = splat(beam, depth, (re, im), (probe.depths, probe.beams))
    axial = max(AXIAL * probe.size / 256, 0.6)
    radius = np.maximum(np.arange(probe.depths, dtype=np.float32), 4)
    per_cell = PER_PIXEL * radius * probe.sector / (probe.beams - 1)
    passed = 1 / (4 * np.pi * np.sqrt((axial**2 + 1 / 6) * (probe.lateral**2 + 1 / 6)))
    level = 1 / np.sqrt(2 * per_cell * passed)
    blurred = [
        cv2.GaussianBlur(f, (0, 0), probe.lateral, sigmaY=axial, borderType=cv2.BORDER_REFLECT)
        for f in field
    ]
    return np.stack(blurred) * level[None, :, None]


def gain_map(probe: Probe, heart: Anatomy) -> Map:
    """Receive gain in dB (R, A): imperfect time-gain, shaded beams (ribs, lung), weak far field."""
    rng = np.random.Generator(np.random.PCG64([heart.seed, 0x6A1]))
    depth = probe.shares()
    poor = 1 - heart.quality
    shade = rng.standard_normal(probe.beams).astype(np.float32)
    shade = cv2.GaussianBlur(shade[None], (0, 0), probe.beams / 14)[0]
    shade = shade / shade.std() * (1.0 + 2.2 * poor)
    edge = np.abs(np.linspace(-1, 1, probe.beams, dtype=np.float32))
    lateral = -(2 + 7 * poor) * edge**4 + shade * np.ones_like(depth)
    axial = -7 * np.clip(depth - 0.72, 0, 1) / 0.28 + rng.uniform(-2, 2) * depth
    return np.asarray(lateral + axial, np.float32)


def clutter_level(probe: Probe, heart: Anatomy, x: Map, y: Map) -> Map:
    """Amplitude of echoes that do not move, at pixel positions: near-field reverberation, haze."""
    depth = np.hypot(x - probe.origin[0], y - probe.origin[1]) / (probe.depths * probe.reach)
    near = 10 ** ((2 - 46 * (depth / 0.16)) / 20)
    haze = 10 ** ((-37 + 13 * (1 - heart.quality)) / 20)
    return np.asarray(near + haze, np.float32)


def compress(envelope: Map, gain_db: Map, heart: Anatomy) -> Map:
    """Envelope (R, A) → grey in [0, 1]: gain, then logarithmic compression."""
    level = 20 * np.log10(np.maximum(envelope, 1e-6)) + gain_db + heart.gain
    return np.asarray(np.clip((level + heart.dynamic_range - HEADROOM) / heart.dynamic_range, 0, 1))


def scan_convert(probe: Probe, polar: Map) -> NDArray[np.uint8]:
    """Polar grey (R, A) → sector image (H, W) uint8, black outside the sector."""
    image = cv2.remap(
        polar,
        probe.to_polar_beam,
        probe.to_polar_depth,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.asarray(np.rint(np.where(probe.inside, image, 0) * 255), np.uint8)
