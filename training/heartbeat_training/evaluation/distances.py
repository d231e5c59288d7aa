"""Distances between two sets of features: Fréchet (FID, FVD) and kernel (KID), never without doubt.

With a hundred clips both are estimates with a large bias, so each comes with N, an interval over
patients and the floor: the same distance between random halves of the real set. Halves are
different patients, generated clips share theirs with the real ones: a model can come below it.
Legend: N, M samples, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.errors import HeartBeatError

Features = NDArray[np.float64]
Distance = Callable[[Features, Features], float]
RESAMPLES = 100
FEWEST = 4  # patients that can be halved and resampled at all


class EvaluationError(HeartBeatError):
    """Too few clips or patients for a figure, or sets that do not belong together."""


@dataclass(frozen=True)
class Measured:
    """A distance with its doubt.

    value; low, high: 95 % interval over patients; floor: mean distance between random halves of the
    real set and floor_n samples in each; n: samples on either side.
    """

    value: float
    low: float
    high: float
    floor: float
    floor_n: int
    n: int


def frechet(x: Features, y: Features) -> float:
    """Fréchet distance of the Gaussians fitted to x (N, D) and y (M, D).

    d² = |μ₁−μ₂|² + tr(S₁ + S₂ − 2 (S₁S₂)^½) (Dowson & Landau, J. Multivar. Anal. 12, 1982; Heusel
    et al., 1706.08500). tr (S₁S₂)^½ is the nuclear norm of A Bᵀ, where S = AᵀA: no root of a
    singular matrix is taken, so N < D is as exact as N > D.
    """
    _check(x, y)
    a, b = _factor(x), _factor(y)
    shared = float(np.linalg.svd(a @ b.T, compute_uv=False).sum())
    means = float(((x.mean(0) - y.mean(0)) ** 2).sum())
    return means + float((a**2).sum() + (b**2).sum()) - 2 * shared


def _factor(x: Features) -> Features:
    """A of S = AᵀA, at most D rows; S is the unbiased covariance."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return centred if len(x) <= x.shape[1] else np.asarray(np.linalg.qr(centred, mode="r"))


def kid(x: Features, y: Features, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """Kernel inception distance: unbiased MMD² with (x·y/D + 1)³, mean over random subsets.

    Source: Bińkowski et al., 1801.01401. `size` is cut to the smaller set; then one subset is all
    there is. Unbiased, so near zero it may be negative.
    """
    _check(x, y)
    size = min(size, len(x), len(y))
    if size == len(x) == len(y):
        return _mmd(x, y)
    rng = np.random.default_rng(seed)
    picks = ((rng.permutation(len(s))[:size] for s in (x, y)) for _ in range(subsets))
    return float(np.mean([_mmd(x[i], y[j]) for i, j in picks]))


def _mmd(x: Features, y: Features) -> float:
    xx, xy, yy = (((a @ b.T) / a.shape[1] + 1) ** 3 for a, b in ((x, x), (x, y), (y, y)))
    n = len(x)
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2 * xy.mean())


def measure(
    distance: Distance,
    real: Features,
    fake: Features,
    patients: NDArray[np.str_],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Measured:
    """A distance of two sets whose rows i belong together, with interval and floor.

    real, fake: (N, D); patients: (N,), whose rows are drawn or left out together.

    Raises: EvaluationError for fewer than four patients, or sets of different lengths.
    """
    names = np.unique(patients)
    if len(real) != len(fake) or len(real) != len(patients):
        raise EvaluationError(
            f"sets: {len(real)} real, {len(fake)} generated, {len(patients)} patients; wanted equal"
        )
    if len(names) < FEWEST:
        raise EvaluationError(f"patients: {len(names)} came; a distance needs {FEWEST} or more")
    rows = [np.flatnonzero(patients == name) for name in names]

    def resampled(drawn: NDArray[np.int_]) -> float:
        index = np.concatenate([rows[i] for i in drawn])
        return distance(real[index], fake[index])

    value = distance(real, fake)
    low, high = interval(value, resampled, len(names), resamples, seed)
    floor, floor_n = halves(distance, real, patients, seed=seed)
    return Measured(value, low, high, floor, floor_n, len(real))


def interval(
    value: float,
    statistic: Callable[[NDArray[np.int_]], float],
    count: int,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % bootstrap interval around `value` over `count` units, Efron, Ann. Stat. 7(1), 1979.

    `statistic` gets unit indices drawn with replacement. Drawn sets hold doubles, which biases
    Fréchet distances, so the resamples' spread about their own mean is laid around the value.
    """
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(rng.integers(count, size=count)) for _ in range(resamples)])
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return float("nan"), float("nan")
    low, high = np.quantile(drawn - drawn.mean(), (0.025, 0.975))
    return float(value + low), float(value + high)


def halves(
    distance: Distance, real: Features, patients: NDArray[np.str_], repeats: int = 10, seed: int = 0
) -> tuple[float, int]:
    """The floor: mean distance between random halves of the patients, and samples in a half."""
    rng = np.random.default_rng(seed)
    names, found, sizes = np.unique(patients), [], []
    for _ in range(repeats):
        first = np.isin(patients, rng.permutation(names)[: len(names) // 2])
        found.append(distance(real[first], real[~first]))
        sizes.append(min(int(first.sum()), int((~first).sum())))
    return float(np.mean(found)), min(sizes)


def mean_interval(
    values: NDArray[np.float64], patients: NDArray[np.str_], seed: int = 0
) -> tuple[float, float, float]:
    """Mean of what is finite, with its 95 % interval over patients; NaN where nothing is."""
    good = np.isfinite(values)
    if not good.any():
        return (float("nan"),) * 3
    values, patients = values[good], patients[good]
    rows = [values[patients == name] for name in np.unique(patients)]
    mean = float(values.mean())

    def resampled(drawn: NDArray[np.int_]) -> float:
        return float(np.concatenate([rows[i] for i in drawn]).mean())

    return mean, *interval(mean, resampled, len(rows), 1000, seed)


def _check(x: Features, y: Features) -> None:
    if min(len(x), len(y)) < 2 or x.shape[1:] != y.shape[1:]:
        raise EvaluationError(f"features: {x.shape} and {y.shape} came; wanted (N, D), N 2 or more")
