"""The phantom's geometry: a heart's reference maps (heartbeat_fast/heart.py) and what they echo.

Long-axis coordinates, millimetres: s from the mitral annulus (0) to the LV apex (L), n across
(positive to the image's right). Legend: H W pixels; maps are (H, W) on the image grid.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.anatomy import Anatomy
from heartbeat_fast.heart import Map as Map
from heartbeat_fast.heart import Shape

# Echo levels in dB relative to myocardium; blood sits 25–30 dB below it in harmonic imaging.
BLOOD, TISSUE, PERICARDIUM = -27.0, -7.0, 11.0


class Geometry(Shape):
    """A heart's reference maps with its echo levels: level (H, W) dB."""

    def __init__(self, heart: Anatomy, size: int) -> None:
        super().__init__(heart, size)
        self.level = self._levels()

    def _levels(self) -> Map:
        """Echo level in dB: chambers, walls with angle-dependent brightness, fat, pericardium."""
        heart, s, n = self.heart, self.s, self.n
        rng = np.random.Generator(np.random.PCG64([heart.seed, 0x7E87]))
        heartish = (np.abs(n) < heart.width * 2.6) & (s > -heart.atrium * 1.3)
        level = np.where(heartish, TISSUE - 3, TISSUE - 6).astype(np.float32)
        chamber = (self.label == 1) | (self.label == 3)
        if heart.view == "A4C":
            right, wall = self._right_heart()
            level[wall] = TISSUE + 3
            level[right] = BLOOD + 2
            chamber = chamber | right
        level[self.label == 2] = 0.0
        level[chamber] = np.where(self.label[chamber] == 3, BLOOD - 1, BLOOD)
        # atrial walls, septum primum, annulus: thin bright borders of the chambers
        edge = cv2.morphologyEx(chamber.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3)))
        level[(edge > 0) & ~chamber & (s < 2)] = 2.0
        for side in (-1, 1):
            ring = np.hypot(s, n - side * (self.half_width(0.0) + heart.wall * 0.35))
            level = np.maximum(level, 7 - (ring / 2.2) ** 2)
        # pericardium: a bright thin line just outside the wall, strongest beside the lateral wall
        outside = np.abs(n) - self.half_width(s, heart.wall)
        line = PERICARDIUM * np.exp(-(((outside - 1.6) / 1.5) ** 2)) * (s > 2) * (s < heart.length)
        line *= 0.75 if heart.view == "A2C" else np.where(n > 0, 1.0, 0.0)
        level = np.where(outside > 0, np.maximum(level, level + line), level)
        # papillary muscles: two bumps on the endocardium
        for side, place in ((-1, 0.48), (1, 0.55)):
            bump = np.hypot(
                (s - place * heart.length) / 7,
                (n - side * self.half_width(place * heart.length) * 0.98) / 3.6,
            )
            level = np.where((bump < 1) & (self.label == 1), np.maximum(level, -5.0), level)
        smooth = cv2.GaussianBlur(np.asarray(level, np.float32), (0, 0), self.size / 256 * 0.9)
        # fibre-like unevenness, 2–3 dB, coarse and fine
        for scale, strength in ((14, 2.2), (4, 1.3)):
            noise = rng.standard_normal(level.shape).astype(np.float32)
            field = cv2.GaussianBlur(noise, (0, 0), scale * self.size / 256)
            smooth += strength * field / field.std() * np.where(smooth > BLOOD + 8, 1, 0.35)
        return np.asarray(smooth + self._angle_loss(), np.float32)

    def _right_heart(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Right ventricle and atrium (chamber, free wall), left of the septum as displayed."""
        heart, s, n = self.heart, self.s, self.n
        septum = -(self.half_width(s, heart.wall))
        u = np.clip(s / (heart.length * 0.86), 0, 1)
        rv = heart.width * 1.35 * np.sqrt(1 - u**1.6) * (s >= 0) * (s < heart.length * 0.86)
        reach = np.clip(-s / (heart.atrium * 0.95), 0, 1)
        ra = heart.width * 1.25 * np.sqrt(np.clip(1 - (2 * reach - 0.8) ** 2 / 1.44, 0, 1))
        ra = ra * (s < 0) * (reach < 1)
        base = -(self.half_width(0.0) + heart.wall * 0.55)
        gap = np.where(s >= 0, septum, base) - n
        chamber = (gap > 0.6) & (gap < rv + ra)
        wall = (gap > 0) & (gap < rv + ra + 4) & ~chamber & (s > -heart.atrium)
        valve = (np.abs(s - 1.5) < 1.2) & chamber  # the tricuspid plane
        return chamber & ~valve, wall | valve

    def _angle_loss(self) -> Map:
        """Walls along the beam reflect less: up to −7 dB where the wall is parallel to it."""
        row, col = np.mgrid[0 : self.size, 0 : self.size].astype(np.float32)
        beam = np.stack([col - self.origin[0], row - self.origin[1]])
        beam /= np.maximum(np.hypot(beam[0], beam[1]), 1)
        distance = np.abs(self.n) - self.half_width(self.s, self.heart.wall / 2)
        smooth = cv2.GaussianBlur(np.asarray(distance, np.float32), (0, 0), self.size / 40)
        gy, gx = np.gradient(smooth)
        cosine = np.abs(gx * beam[0] + gy * beam[1]) / np.maximum(np.hypot(gx, gy), 1e-3)
        wall = cv2.GaussianBlur((self.label == 2).astype(np.float32), (0, 0), 1.0)
        return np.asarray(-7 * (1 - cosine) * wall * (1.2 - self.heart.quality), np.float32)
