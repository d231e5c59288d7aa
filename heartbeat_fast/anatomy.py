"""A heart in an apical view: what varies from one to the next, and how it moves through a cycle.

The training phantom draws it, and a session moves it where the host has no masks of its own.
"""

from dataclasses import dataclass, replace
from math import cos, pi, radians, sin

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Anatomy:
    """One heart in one view. Lengths in mm, angles in radians, echo levels in dB, EF a fraction."""

    seed: int
    view: str
    ef: float
    heart_rate: float  # beats per minute
    coverage: float  # share of the cardiac cycle that the clip shows, from end-diastole on
    depth: float  # imaging depth
    sector: float  # full opening angle
    reach: float  # sector radius as a share of the image's height
    top: float  # the sector's tip: share of the height left free above it
    beam: float  # lateral point-spread width, in beams
    roundness: float  # exponent of the LV outline: 2 pointed … 3 blunt
    length: float  # LV long axis at ED
    width: float  # LV half width at ED
    wall: float  # myocardial thickness at ED
    atrium: float  # LA height at ED
    apex: tuple[float, float]  # LV apex: lateral offset from the probe, depth
    tilt: float  # long axis against vertical
    sway: float  # amplitude of the whole heart's rocking
    gain: float
    dynamic_range: float
    quality: float  # 0 poor … 1 good: haze, dropout, noise


def sample_anatomy(seed: int, **fixed: object) -> Anatomy:
    """Draw an anatomy; the same seed gives the same heart. `fixed` overrides fields by name."""
    rng = np.random.Generator(np.random.PCG64([seed, 0xA9A7]))
    uniform = rng.uniform
    depth = uniform(125, 170)
    heart = Anatomy(
        seed=seed,
        view="A4C" if uniform() < 0.6 else "A2C",
        ef=float(np.clip(rng.normal(0.55, 0.12), 0.2, 0.75)),
        heart_rate=uniform(50, 95),
        coverage=1.0 if uniform() < 0.5 else uniform(0.40, 0.52),
        depth=depth,
        sector=radians(uniform(68, 88)),
        reach=(reach := uniform(0.78, 0.96)),
        top=uniform(0.01, 0.98 - reach),
        beam=uniform(1.0, 1.8),
        roundness=uniform(2.0, 3.2),
        length=depth * uniform(0.46, 0.57),
        width=depth * uniform(0.13, 0.185),
        wall=uniform(8.0, 12.5),
        atrium=depth * uniform(0.20, 0.29),
        apex=(depth * uniform(-0.04, 0.07), depth * uniform(0.15, 0.23)),
        tilt=radians(uniform(-8, 12)),
        sway=uniform(0.3, 1.6),
        gain=uniform(-4, 6),
        dynamic_range=uniform(48, 66),
        quality=uniform(0, 1),
    )
    return replace(heart, **fixed)  # type: ignore[arg-type]


def systole(heart_rate: float) -> float:
    """Systole's share of the cycle: 0.33 s at 60/min, and it shortens little with the rate."""
    return 0.27 + 0.0013 * heart_rate


def contraction_at(phase: NDArray[np.float64], heart_rate: float) -> NDArray[np.float64]:
    """c at phases 0…1 of a cycle: systole, early filling, diastasis, atrial kick. 0 ED, 1 ES."""
    end = systole(heart_rate)
    fill, kick = end + 0.06, 0.82

    def ramp(start: float, stop: float) -> NDArray[np.float64]:
        x = np.clip((phase - start) / (stop - start), 0, 1)
        return 0.5 - 0.5 * np.cos(pi * x)

    c = ramp(0, end) - 0.72 * ramp(fill, fill + 0.22) - 0.28 * ramp(kick, 1.0)
    return np.asarray(c)


def contraction(heart: Anatomy, frames: int) -> NDArray[np.float64]:
    """c(t) at a clip's frames (F,)."""
    return contraction_at(np.linspace(0, heart.coverage, frames), heart.heart_rate)


def opening(heart: Anatomy, frames: int) -> NDArray[np.float64]:
    """Mitral opening (F,): 0 closed in systole, peaks in early filling (E) and atrial kick (A)."""
    phase = np.linspace(0, heart.coverage, frames)
    start = systole(heart.heart_rate) + 0.04

    def bump(centre: float, half: float) -> NDArray[np.float64]:
        return np.cos(np.clip((phase - centre) / half, -1, 1) * pi / 2) ** 2

    e, a = bump(start + 0.11, 0.15), 0.8 * bump(0.89, 0.13)
    rest = 0.3 * np.clip((phase - start) / 0.1, 0, 1) * np.clip((1 - phase) / 0.08, 0, 1)
    return np.maximum.reduce([e, a, rest])


def sway(heart: Anatomy, frames: int) -> NDArray[np.float64]:
    """Rigid displacement r(t) in mm (F, 2), zero at ED, returning after a cycle."""
    phase = np.linspace(0, heart.coverage, frames)
    direction = np.array([cos(heart.seed), 0.4 * sin(heart.seed)])
    return heart.sway * np.sin(pi * phase)[:, None] ** 2 * direction
