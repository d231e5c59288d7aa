"""A heart in motion: masks, mitral valve and flow of an anatomy, for hosts that have none.

Every material point X moves on a line: x(X, t) = X + c(t)·U(X) + r(t), with the contraction c (0 at
ED, 1 at ES) and a small rigid sway r. So masks, flow, valve and scatterers share one motion
exactly. Long-axis coordinates, millimetres: s from the mitral annulus (0) to the LV apex (L), n
across (positive to the image's right). Legend: F frames, H W pixels; maps are (H, W) on the image
grid.
"""

from dataclasses import dataclass
from math import acos, cos, pi, radians, sin, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.anatomy import Anatomy, contraction, opening, sway
from heartbeat_fast.conditions import FRAMES, SIZE
from heartbeat_fast.errors import optional

Map = NDArray[np.float32]


@dataclass(frozen=True)
class Motion:
    """What moves: labels, skeleton (F, H, W) and flow (F, 2, H, W) in pixels per frame."""

    labels: NDArray[np.uint8]
    skeleton: NDArray[np.float32]
    flow: NDArray[np.float32]
    material: NDArray[np.float32]  # (F, H, W, 2): ED position of the point under each pixel


@dataclass(frozen=True, eq=False)
class Beat:
    """One heart's local conditions and their scale: what a host would bring if it had them.

    mask (F,H,W) labels, skeleton (F,H,W), flow (F,2,H,W) as `Conditions` takes them; spacing_mm of
    (rows, columns); fps at which the clip covers its share of the cycle.
    """

    mask: NDArray[np.uint8]
    skeleton: NDArray[np.float32]
    flow: NDArray[np.float32]
    spacing_mm: tuple[float, float]
    fps: float


def beat(heart: Anatomy, frames: int = FRAMES, size: int = SIZE) -> Beat:
    """The local conditions of an anatomy.

    Raises:
        MissingDependency: OpenCV is not installed.
    """
    shape = Shape(heart, size)
    moved = move(shape, frames)
    fps = (frames - 1) / (heart.coverage * 60 / heart.heart_rate)
    return Beat(moved.labels, moved.skeleton, moved.flow, (shape.spacing,) * 2, fps)


class Shape:
    """Reference maps of an anatomy at ED on an image grid.

    Attributes: spacing mm per pixel; origin (x, y) of the sector; label, inside (H, W); U (2, H, W)
    pixels per unit contraction; s, n (H, W) mm.
    """

    def __init__(self, anatomy: Anatomy, size: int = SIZE) -> None:
        self.heart, self.size = anatomy, size
        self.spacing = anatomy.depth / (size * anatomy.reach)
        self.origin = ((size - 1) / 2, size * anatomy.top)  # the sector's tip, pixels
        # axis points from annulus to apex; across points to the image's right
        self.axis = np.array([sin(anatomy.tilt) * -1, -cos(anatomy.tilt)])
        self.across = np.array([-self.axis[1], self.axis[0]])
        self.annulus = np.array(anatomy.apex) - self.axis * anatomy.length
        row, col = np.mgrid[0:size, 0:size].astype(np.float32)
        x = (col - self.origin[0]) * self.spacing - self.annulus[0]
        y = (row - self.origin[1]) * self.spacing - self.annulus[1]
        self.s = (x * self.axis[0] + y * self.axis[1]).astype(np.float32)
        self.n = (x * self.across[0] + y * self.across[1]).astype(np.float32)
        radius = np.hypot(col - self.origin[0], row - self.origin[1])
        angle = np.arctan2(col - self.origin[0], row - self.origin[1])
        self.inside = (
            (np.abs(angle) <= anatomy.sector / 2)
            & (radius < size * anatomy.reach)
            & (radius > 0.012 * size)
        )
        self.label = self._labels()
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
        cv2 = _cv2()
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


def move(shape: Shape, frames: int = FRAMES) -> Motion:
    """Labels, skeleton and flow of every frame from the one displacement field.

    The material point under pixel x solves X = x − r − c·U(X); U contracts (|c∇U| < 0.6), so the
    fixed-point iteration, started from the previous frame's answer, converges in four steps.
    """
    heart, size = shape.heart, shape.size
    row, col = np.mgrid[0:size, 0:size].astype(np.float32)
    grid = np.stack([col, row], -1)
    U = np.ascontiguousarray(shape.U.transpose(1, 2, 0))
    c = contraction(heart, frames)
    r = sway(heart, frames) / shape.spacing
    valve = opening(heart, frames)
    labels = np.empty((frames, size, size), np.uint8)
    skeleton = np.zeros((frames, size, size), np.float32)
    flow = np.zeros((frames, 2, size, size), np.float32)
    cv2, inside = _cv2(), shape.inside
    points = np.empty((frames, size, size, 2), np.float32)
    material = grid
    for t in range(frames):
        for _ in range(4):
            moved = fetch(U, material)
            material = (grid - r[t] - c[t] * moved).astype(np.float32)
        points[t] = material
        labels[t] = fetch(shape.label, material, cv2.INTER_NEAREST)
        labels[t][~inside] = 0
        if t + 1 < frames:
            step = (c[t + 1] - c[t]) * moved + (r[t + 1] - r[t])
            flow[t] = (step * inside[..., None]).transpose(2, 0, 1)
        for curve in shape.leaflets(float(c[t]), float(valve[t])):
            line = np.rint((curve + r[t]) * 16).astype(np.int32)
            thick = max(1, round(size / 128))
            drawn = np.zeros((size, size), np.uint8)
            cv2.polylines(drawn, [line], False, 255, thick, cv2.LINE_AA, shift=4)
            skeleton[t] = np.maximum(skeleton[t], drawn.astype(np.float32) / 255)
    return Motion(labels, skeleton, flow, points)


def sample(image: Map, points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bilinear values of an image (H, W) at pixel positions (..., 2), x first; edges repeated."""
    x = np.clip(points[..., 0], 0, image.shape[1] - 1.001)
    y = np.clip(points[..., 1], 0, image.shape[0] - 1.001)
    col, row = x.astype(np.int32), y.astype(np.int32)
    fx, fy = x - col, y - row
    top = image[row, col] * (1 - fx) + image[row, col + 1] * fx
    bottom = image[row + 1, col] * (1 - fx) + image[row + 1, col + 1] * fx
    return np.asarray(top * (1 - fy) + bottom * fy, np.float32)


def fetch(image: NDArray[Any], points: Map, how: int = 1) -> NDArray[Any]:
    """Values of an image at a grid of pixel positions (H, W, 2), x first, edges repeated."""
    cv2 = _cv2()
    x, y = points[..., 0], points[..., 1]
    return np.asarray(cv2.remap(image, x, y, how, borderMode=cv2.BORDER_REPLICATE))


def _cv2() -> Any:
    return optional("cv2", "media")
