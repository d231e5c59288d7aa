"""What "follows its conditions" and "looks like ultrasound" mean in numbers.

Small pure functions, one figure each. Figures without a natural zero (SSIM of two speckles,
texture, flow error) are read beside the same figure of the source clip, or of its twin with another
speckle.
Legend: F frames, H W pixels; frames are grey uint8 (F, H, W), masks bool (F, H, W).
"""

from math import pi
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from heartbeat_fast import extract

Frames = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Float = NDArray[np.float32]

LV, MYOCARDIUM, LA = 1, 2, 3
PATCH = 32  # pixels, about a wall and a half: larger ones leave too few to average
BANDS = np.linspace(0.02, 0.25, 9)  # edges, cycles/pixel
RAYLEIGH = float(np.sqrt(pi / (4 - pi)))  # mean/std of fully developed speckle, 1.91


def ssim(a: Frames, b: Frames) -> float:
    """Structural similarity, mean over frames: 11×11 Gaussian σ 1.5, K 0.01 and 0.03, range 255.

    SSIM = (2μ_a μ_b + c₁)(2σ_ab + c₂) / ((μ_a² + μ_b² + c₁)(σ_a² + σ_b² + c₂))
    (Wang et al., IEEE TIP 13(4), 2004). The rim of 5 pixels, where the window is cut, does not
    count, as in scikit-image and torchmetrics.
    """
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    scores = []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        mx, my, xx, yy, xy = (
            cv2.GaussianBlur(v, (11, 11), 1.5)[5:-5, 5:-5] for v in (x, y, x * x, y * y, x * y)
        )
        covariance, variances = xy - mx * my, xx - mx * mx + yy - my * my
        score = (2 * mx * my + c1) * (2 * covariance + c2)
        scores.append((score / ((mx * mx + my * my + c1) * (variances + c2))).mean())
    return float(np.mean(scores))


def dice(a: NDArray[np.uint8], b: NDArray[np.uint8], label: int = LV) -> float:
    """2|A∩B| / (|A| + |B|) of one label, mean over frames; 1 where both are empty.

    Source: Dice, Ecology 26(3), 1945.
    """
    one, two = a == label, b == label
    total = one.sum((1, 2)) + two.sum((1, 2))
    both = 2.0 * (one & two).sum((1, 2))
    return float(np.where(total, both / np.maximum(total, 1), 1.0).mean())


def ef_area_length(labels: NDArray[np.uint8]) -> float:
    """Ejection fraction in percent from one view's LV labels; NaN where no LV is seen.

    V = 8A²/(3πL) (single-plane area–length, Lang et al., JASE 28, 2015), L along the principal axis
    of the largest LV region; ED and ES are the frames of largest and smallest area.
    """
    cavities = [_largest(frame == LV) for frame in labels]
    areas = [int(cavity.sum()) for cavity in cavities]
    if min(areas) < 3:
        return float("nan")
    full, empty = (_volume(cavities[int(pick(areas))]) for pick in (np.argmax, np.argmin))
    return 100 * (1 - empty / full)


def _volume(cavity: Mask) -> float:
    """Area–length volume of a cavity (H, W) in pixels³."""
    points = np.argwhere(cavity).astype(np.float64)
    axis = np.linalg.eigh(np.cov(points.T))[1][:, -1]
    along = points @ axis
    length = float(along.max() - along.min()) + 1  # from the first pixel's rim to the last one's
    return 8 * len(points) ** 2 / (3 * pi * length)


def _largest(mask: Mask) -> Mask:
    """The largest connected region."""
    count, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if count < 2:
        return mask
    return np.asarray(parts == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA])))


def tissue(frames: Frames, labels: NDArray[np.uint8]) -> Mask:
    """Where there is speckle to judge: bright on average, 3 pixels off the chambers and the rim.

    Averages over σ = 4 pixels between a quarter and four fifths of white: blood (below), and places
    where compression clips (either end), say nothing of speckle. Pixels are those of an image of
    256 rows; they scale with it.
    """
    chambers = (labels == LV) | (labels == LA)
    out = np.empty(frames.shape, bool)
    scale = frames.shape[1] / 256
    kernel = np.ones((2 * round(3 * scale) + 1,) * 2, np.uint8)
    for t, frame in enumerate(frames):
        mean = cv2.GaussianBlur(frame.astype(np.float32), (0, 0), 4 * scale)
        good = (mean > 0.25 * 255) & (mean < 0.8 * 255) & ~chambers[t]
        out[t] = cv2.erode(good.astype(np.uint8), kernel) > 0
    return out


def power_spectrum(frames: Frames, mask: Mask) -> NDArray[np.float64]:
    """Radial power spectrum of tissue in dB, per band of BANDS; grey levels² per pixel.

    Welch's averaged periodograms (IEEE Trans. Audio 15(2), 1967): Hann-windowed patches, half
    overlapping, at least half tissue; the window is zero off tissue, the mean under it is removed.
    """
    row, col = np.meshgrid(*[np.fft.fftfreq(PATCH)] * 2, indexing="ij")
    band = np.digitize(np.hypot(row, col), BANDS)
    hann = np.outer(np.hanning(PATCH), np.hanning(PATCH))
    total, count = np.zeros((PATCH, PATCH)), 0
    steps = range(0, frames.shape[1] - PATCH + 1, PATCH // 2)
    for frame, inside in zip(frames, mask, strict=True):
        soft = cv2.GaussianBlur(inside.astype(np.float64), (0, 0), 1.5)
        for place in ((slice(r, r + PATCH), slice(c, c + PATCH)) for r in steps for c in steps):
            if inside[place].mean() < 0.5:
                continue
            window = hann * soft[place]
            patch = frame[place] - np.average(frame[place], weights=window)
            total += np.abs(np.fft.fft2(patch * window)) ** 2 / (window**2).sum()
            count += 1
    if not count:
        return np.full(len(BANDS) - 1, np.nan)
    return 10 * np.log10([total[band == b].mean() / count for b in range(1, len(BANDS))])


def speckle_ratio(frames: Frames, mask: Mask, dynamic_range: float) -> float:
    """Mean over standard deviation of the envelope in tissue; RAYLEIGH for developed speckle.

    Log compression is undone, envelope ∝ 10^(grey · range / 20), range in dB; slow changes of the
    level are divided out (local mean over σ = 6 pixels of tissue).
    Source: Wagner et al., IEEE Trans. Sonics Ultrasonics 30(3), 1983.
    """
    values = []
    for frame, inside in zip(frames, mask, strict=True):
        envelope = 10 ** (frame.astype(np.float64) / 255 * dynamic_range / 20)
        values.append((envelope / np.maximum(_local(envelope, inside, 6), 1e-9))[inside])
    level = np.concatenate(values)
    return float(level.mean() / level.std()) if level.size else float("nan")


def speckle_correlation(frames: Frames, flow: Float, mask: Mask) -> float:
    """Correlation of speckle in frame t with frame t+1 fetched back along the flow, mean over t.

    Speckle is the frame minus its local mean in tissue (σ = 4 pixels). flow: (F, 2, H, W) in pixels
    per frame. Pearson's r over tissue: 1 when the texture rides on the tissue, 0 when it boils.
    """
    scores = []
    for t in range(len(frames) - 1):
        both = mask[t] & warp(mask[t + 1].astype(np.float32), flow[t]).astype(bool)
        if both.sum() < 100:
            continue
        now = frames[t] - _local(frames[t].astype(np.float64), mask[t], 4)
        then = frames[t + 1] - _local(frames[t + 1].astype(np.float64), mask[t + 1], 4)
        fetched = warp(then.astype(np.float32), flow[t])
        scores.append(np.corrcoef(now[both], fetched[both])[0, 1])
    return float(np.mean(scores)) if scores else float("nan")


def warp(image: Float, flow: Float) -> Float:
    """Image t+1 (H, W) fetched back along the flow t → t+1 (2, H, W): what frame t should show."""
    row, col = np.mgrid[0 : image.shape[0], 0 : image.shape[1]].astype(np.float32)
    return np.asarray(cv2.remap(image, col + flow[0], row + flow[1], cv2.INTER_LINEAR))


def flicker(frames: Frames, flow: Float, mask: Mask) -> float:
    """Frame-to-frame deviation of low-passed brightness (σ = 6) in still tissue, grey levels.

    Still: the quarter of what is tissue in every frame that moves least by the flow (F, 2, H, W).
    """
    always = mask.all(0)
    if not always.any():
        return float("nan")
    speed = np.hypot(flow[:, 0], flow[:, 1]).mean(0)
    still = always & (speed <= np.quantile(speed[always], 0.25))
    smooth = np.stack([cv2.GaussianBlur(f.astype(np.float32), (0, 0), 6) for f in frames])
    return float(np.diff(smooth[:, still], axis=0).std())


def flow_error(frames: Frames, flow: Float, mask: Mask) -> float:
    """End-point error in pixels (Otte & Nagel, ECCV 1994) of the frames' motion against `flow`.

    The frames' motion is what `extract.flow` sees in them; the error is averaged over tissue.
    """
    seen = extract.flow(frames)[:-1]
    error = np.hypot(seen[:, 0] - flow[:-1, 0], seen[:, 1] - flow[:-1, 1])
    return float(error[mask[:-1]].mean()) if mask[:-1].any() else float("nan")


def pearson(a: NDArray[Any] | list[float], b: NDArray[Any] | list[float]) -> float:
    """Pearson's r of two series, leaving out pairs with a NaN; NaN for fewer than three pairs."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    good = np.isfinite(x) & np.isfinite(y)
    return float(np.corrcoef(x[good], y[good])[0, 1]) if good.sum() > 2 else float("nan")


def _local(image: NDArray[np.float64], inside: Mask, sigma: float) -> NDArray[np.float64]:
    """Gaussian mean over the tissue alone: blur(image·mask) / blur(mask)."""
    weight = inside.astype(np.float64)
    share = cv2.GaussianBlur(weight, (0, 0), sigma)
    mean = cv2.GaussianBlur(image * weight, (0, 0), sigma)
    return np.asarray(mean / np.maximum(share, 1e-6))
