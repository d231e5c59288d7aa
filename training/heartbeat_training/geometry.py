"""The phantom's geometry: an apical view as reference maps at ED and one displacement field.

Every material point X moves on a line: x(X, t) = X + c(t)·U(X) + r(t), with the contraction c (0 at
ED, 1 at ES) and a small rigid sway r. So masks, flow, valve and scatterers share one motion
exactly. Long-axis coordinates, millimetres: s from the mitral annulus (0) to the LV apex (L), n
across (positive to the image's right). Legend: H W pixels; maps are (H, W) on the image grid.
"""

from math import acos, cos, pi, radians, sin, sqrt

import cv2
import numpy as np
from numpy.typing import NDArray

from heartbeat_training.anatomy import Anatomy

Map = NDArray[np.float32]

# Echo levels in dB relative to myocardium; blood sits 25–30 dB below it in harmonic imaging.
BLOOD, TISSUE, PERICARDIUM = -27.0, -7.0, 11.0


class Geometry:
    """Reference maps of an anatomy on an image grid.

    Attributes: spacing mm per pixel; label (H, W) uint8; level (H, W) dB; U (2, H, W) pixels per
    unit contraction; s, n (H, W) mm.
    """

    def __init__(self, heart: Anatomy, size: int) -> None:
        self.heart, self.size = heart, size
        self.spacing = heart.depth / (size * heart.reach)
        self.origin = ((size - 1) / 2, size * heart.top)  # the probe's apex of the sector, pixels
        # axis points from annulus to apex; across points to the image's right
        self.axis = np.array([sin(heart.tilt) * -1, -cos(heart.tilt)])
        self.across = np.array([-self.axis[1], self.axis[0]])
        self.annulus = np.array(heart.apex) - self.axis * heart.length
        row, col = np.mgrid[0:size, 0:size].astype(np.float32)
        x = (col - self.origin[0]) * self.spacing - self.annulus[0]
        y = (row - self.origin[1]) * self.spacing - self.annulus[1]
        self.s = (x * self.axis[0] + y * self.axis[1]).astype(np.float32)
        self.n = (x * self.across[0] + y * self.across[1]).astype(np.float32)
        self.label = self._labels()
        self.level = self._levels()
        self.U = self._displacement()

    def to_pixels(self, s: Map, n: Map) -> NDArray[np.float32]:
        """Long-axis coordinates in mm → pixel positions (..., 2), x first."""
        mm = self.annulus + np.multiply.outer(s, self.axis) + np.multiply.outer(n, self.across)
        return np.asarray(mm / self.spacing + np.array(self.origin), np.float32)

    def half_width(self, s: Map | float, grow: float = 0.0) -> Map:
        """Endocardial half width w(s); `grow` mm outside it (the wall). Zero beyond the apex.

        A half ellipse whose base narrows to the annulus (three quarters of the widest part).
        """
        heart = self.heart
        u = np.clip(np.asarray(s, np.float32) / (heart.length + grow), 0, 1)
        narrow = 1 - 0.26 * np.exp(-((u / 0.22) ** 2))
        return np.asarray(
            (heart.width + grow) * np.sqrt(1 - u**heart.roundness) * narrow, np.float32
        )

    def _labels(self) -> NDArray[np.uint8]:
        heart, s, n = self.heart, self.s, self.n
        label = np.zeros(s.shape, np.uint8)
        basal = (s >= 0) & (s <= heart.length + heart.wall)
        label[basal & (np.abs(n) < self.half_width(s, heart.wall))] = 2
        label[(s >= 0) & (s < heart.length) & (np.abs(n) < self.half_width(s))] = 1
        reach = -s / heart.atrium
        # the atrium: a rounded chamber as wide as the annulus at its mouth
        mouth = self.half_width(0.0) / (heart.width * 1.02)
        half = (
            heart.width
            * 1.02
            * np.sqrt(np.clip(1 - (2.0 * np.clip(reach, 0, 1) - 0.80) ** 2 / 1.44, 0, 1))
            * (0.75 + 0.25 * mouth)
        )
        label[(s < 0) & (reach < 1) & (np.abs(n) < half)] = 3
        return label

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

    def _displacement(self) -> NDArray[np.float32]:
        """U in pixels. (1 − ε_L)(1 − ε_R)² = 1 − EF makes the area–length EF exact.

        Longitudinal: the base moves to the fixed apex. Radial: the endocardium moves in by ε_R·w,
        the epicardium by a quarter of it (the wall thickens), both fading outside.
        """
        heart, s, n = self.heart, self.s, self.n
        # the blur below costs 3.5 % of the stroke, measured over 12 anatomies: asked for in advance
        ef = min(1.035 * heart.ef, 0.85)
        along = 0.30 * ef
        inward = 1 - sqrt((1 - ef) / (1 - along))
        toward = along * np.clip(heart.length - s, 0, heart.length)
        toward = toward * np.exp(-np.clip(-s, 0, None) / (heart.atrium * 0.55))
        toward = toward * np.exp(-((n / (heart.depth * 0.45)) ** 2))
        w = np.maximum(self.half_width(np.clip(s, 0, None)), 1e-3)
        q = (np.abs(n) - w) / heart.wall
        share = np.where(
            q < 0,
            np.abs(n) / w,
            np.where(
                q < 1, 1 - 0.75 * q, 0.25 * np.exp(-np.clip(q - 1, 0, None) * heart.wall / 18)
            ),
        )
        fade = np.exp(-np.clip(-s, 0, None) / (heart.atrium * 0.35))
        radial = -np.sign(n) * inward * w * share * fade
        if heart.view == "A4C":  # the right ventricle's free wall moves to the septum
            centre = -(heart.width + heart.wall + heart.width * 1.3)
            radial += (
                0.22
                * heart.width
                * np.exp(-(((n - centre) / (heart.width * 0.7)) ** 2))
                * np.clip(1 - s / heart.length, 0, 1)
                * fade
            )
        flow = (
            np.stack(
                [
                    toward * self.axis[0] + radial * self.across[0],
                    toward * self.axis[1] + radial * self.across[1],
                ]
            )
            / self.spacing
        )
        # a light blur takes the kinks out of the piecewise profile, so that the map stays
        # invertible
        blur = [cv2.GaussianBlur(f.astype(np.float32), (0, 0), self.size / 256 * 1.5) for f in flow]
        return np.stack(blur)

    def leaflets(self, c: float, open_: float) -> list[NDArray[np.float32]]:
        """Both mitral leaflets as polylines of pixel positions (P, 2) at contraction c, before
        sway.
        """
        a = float(self.half_width(0.0)) * 1.0
        ends = self.to_pixels(np.zeros(2, np.float32), np.array([-a, a], np.float32))
        moved = ends + c * np.stack([sample(self.U[k], ends) for k in range(2)], -1)
        across = (moved[1] - moved[0]) / max(np.hypot(*(moved[1] - moved[0])), 1e-3)
        up = np.array([across[1], -across[0]])  # towards the LV apex
        up = up if up @ self.axis > 0 else -up
        gap = float(np.hypot(*(moved[1] - moved[0])))
        curves = []
        # in A4C the anterior leaflet hangs at the septum (left) and is the longer one
        for hinge, inward, ratio in ((moved[0], across, 0.57), (moved[1], -across, 0.457)):
            closed = acos((0.555 if ratio > 0.5 else 0.445) / ratio)
            angle = closed + open_ * (radians(78) - closed)
            u = np.linspace(0, 1, 24)[:, None]
            bend = 0.06 * np.sin(pi * u) * (1 - 1.6 * open_)
            point = hinge + gap * ratio * (u * (cos(angle) * inward + sin(angle) * up) + bend * up)
            curves.append(point.astype(np.float32))
        return curves


def sample(image: Map, points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bilinear values of an image (H, W) at pixel positions (..., 2), x first; edges repeated."""
    x = np.clip(points[..., 0], 0, image.shape[1] - 1.001)
    y = np.clip(points[..., 1], 0, image.shape[0] - 1.001)
    col, row = x.astype(np.int32), y.astype(np.int32)
    fx, fy = x - col, y - row
    top = image[row, col] * (1 - fx) + image[row, col + 1] * fx
    bottom = image[row + 1, col] * (1 - fx) + image[row + 1, col + 1] * fx
    return np.asarray(top * (1 - fy) + bottom * fy, np.float32)
