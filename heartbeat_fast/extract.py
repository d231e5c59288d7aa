"""Conditions from pictures and labels: ONE code for training data and for use.

Legend: F frames, H rows, W columns. Lengths are given at 256 pixels and scale with the image.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.conditions import NUM_LABELS, SIZE
from heartbeat_fast.errors import optional

Float = NDArray[np.float32]
LV, LA = 1, 3


def sketch(image: NDArray[Any]) -> Float:
    """Soft edge map of one image: the outlines a hand would draw, not the speckle.

    Gradient of the Gaussian-smoothed image (sigma 3 pixels at 256, more than a speckle grain),
    from 1.5 times its median inside the sector (what speckle leaves: 0) to its 97th percentile
    there (1). The rim of the sector is part of the sketch, but not of these two levels: in real
    images it is by far the strongest edge and would leave the heart in the dark.

    Args:
        image: (H,W), uint8 or float in [0,1].

    Returns:
        (H,W) float32 in [0,1].
    """
    cv2 = _cv2()
    grey = _unit(image)
    scale = max(grey.shape) / SIZE
    smooth = cv2.GaussianBlur(grey, (0, 0), 3.0 * scale)
    dx, dy = cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1)
    edges = np.asarray(cv2.magnitude(dx, dy), np.float32)
    inside = edges[_interior(smooth, scale)]
    if not inside.size:
        return np.zeros_like(edges)
    floor, top = 1.5 * float(np.median(inside)), float(np.percentile(inside, 97))
    soft: Float = np.clip((edges - floor) / max(top - floor, 1e-6), 0, 1)
    return soft


def _interior(smooth: Float, scale: float) -> NDArray[np.bool_]:
    """The sector without its rim, dark chambers included."""
    cv2 = _cv2()
    lit = np.pad((smooth > 0.02).astype(np.uint8), margin := round(13 * scale))
    wide, rim = (
        cv2.getStructuringElement(cv2.MORPH_RECT, (n, n))
        for n in (2 * round(12 * scale) + 1, 2 * round(9 * scale) + 1)
    )
    whole = cv2.morphologyEx(lit, cv2.MORPH_CLOSE, wide)
    inner = cv2.erode(whole, rim, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    H, W = smooth.shape
    return np.asarray(inner[margin : margin + H, margin : margin + W] > 0)


def one_hot(labels: NDArray[Any]) -> Float:
    """Labels (F,H,W) in 0..3 as one-hot (F,4,H,W) float32."""
    classes = np.arange(NUM_LABELS)[:, None, None]
    out: Float = (labels[:, None] == classes).astype(np.float32)
    return out


def skeleton_from_labels(labels: NDArray[Any]) -> Float:
    """The mitral valve as a line from hinge to hinge along the border of LV and LA.

    Args:
        labels: (F,H,W), 1 LV cavity, 3 left atrium. The two may miss each other by a few pixels.

    Returns:
        (F,H,W) float32 in [0,1], the line 3 to 4 pixels wide with its soft edge; zero where LV
        or LA is missing.
    """
    cv2 = _cv2()
    out = np.zeros(labels.shape, np.uint8)
    thickness = max(1, round(2 * max(labels.shape[1:]) / SIZE))
    for frame, canvas in zip(labels, out, strict=True):
        line = _leaflet_line(frame)
        if line is not None:
            points = np.rint(line * 16).astype(np.int32)[:, None]  # in 1/16 pixel
            cv2.polylines(canvas, [points], False, 255, thickness, cv2.LINE_AA, 4)
    return out.astype(np.float32) / np.float32(255)


def _leaflet_line(labels: NDArray[Any]) -> NDArray[np.float64] | None:
    """Points (N,2) as (column, row) along the LV-LA border, first and last the hinges."""
    cv2 = _cv2()
    scale = max(labels.shape) / SIZE
    lv, la = (_largest_part(labels == label) for label in (LV, LA))
    if not (lv.any() and la.any()):
        return None
    # Each chamber's rim: its pixels within a few of the other chamber, however wide the gap.
    to_lv, to_la = (cv2.distanceTransform(1 - part, cv2.DIST_L2, 5) for part in (lv, la))
    gap = float(to_la[lv > 0].min())
    reach = gap + 2.5 * scale
    rims = [np.argwhere((lv > 0) & (to_la <= reach)), np.argwhere((la > 0) & (to_lv <= reach))]
    points = np.concatenate(rims)[:, ::-1].astype(np.float64)
    if gap > 10 * scale or len(points) < 8:
        return None
    # The border is a function over its own principal axis; it ends where either rim ends.
    centre = points.mean(0)
    axes = np.linalg.svd(points - centre, full_matrices=False)[2]
    along, across = ((points - centre) @ axes.T).T
    lv_side, la_side = along[: len(rims[0])], along[len(rims[0]) :]
    first, last = max(lv_side.min(), la_side.min()), min(lv_side.max(), la_side.max())
    if last - first < 4 * scale:
        return None
    inside = (along >= first) & (along <= last)
    # A cubic, since the labels' staircase is not the valve's shape.
    cubic = np.polyfit(along[inside], across[inside], 3)
    position = np.linspace(first, last, 33)
    return np.asarray(centre + np.stack([position, np.polyval(cubic, position)], 1) @ axes)


def _largest_part(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The largest connected region: a stray label pixel must not move a hinge."""
    count, parts, stats, _ = _cv2().connectedComponentsWithStats(mask.astype(np.uint8))
    if count < 2:
        return np.zeros(mask.shape, np.uint8)
    return (parts == 1 + int(np.argmax(stats[1:, 4]))).astype(np.uint8)


def skeleton_from_leaflets(mask: NDArray[Any]) -> Float:
    """Hand-drawn leaflets thinned to their centre lines (Zhang & Suen, CACM 27(3), 1984).

    Args:
        mask: (H,W) or (F,H,W), non-zero inside the leaflets.

    Returns:
        Same shape, float32 0/1, lines one pixel wide; each piece of the mask keeps a line.
    """
    morphology = optional("skimage.morphology", "formats")
    frames = mask[None] if mask.ndim == 2 else mask
    thin = [morphology.skeletonize(frame != 0, method="zhang") for frame in frames]
    return np.stack(thin).astype(np.float32).reshape(mask.shape)


def flow(frames: NDArray[Any]) -> Float:
    """Tissue motion by dense inverse search (Kroeger et al., ECCV 2016), smoothed over tissue.

    Args:
        frames: (F,H,W), uint8 or float in [0,1].

    Returns:
        (F,2,H,W) float32, pixels per frame along columns and rows, frame t to t+1; the last frame
        is zero, and so is everything where there is no signal.
    """
    cv2 = _cv2()
    scale = max(frames.shape[1:]) / SIZE
    grey = [_bytes(frame) for frame in frames]
    # On phantoms and interpolated CAMUS the medium preset beat the faster ones and Farneback in
    # end-point error, warp error and time (docs/decisions.md); blurring the frames first did harm.
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    out = np.zeros((frames.shape[0], 2, *frames.shape[1:]), np.float32)
    for t in range(len(frames) - 1):
        motion = search.calc(grey[t], grey[t + 1], None)
        # Normalised blur: motion is averaged over tissue, never over the black outside.
        near = cv2.GaussianBlur(grey[t].astype(np.float32), (0, 0), 4 * scale)
        tissue = np.clip((near - 4) / 8, 0, 1)
        share = cv2.GaussianBlur(tissue, (0, 0), 4 * scale)[..., None] + 1e-6
        blurred = cv2.GaussianBlur(motion * tissue[..., None], (0, 0), 4 * scale)
        out[t] = (blurred / share * tissue[..., None]).transpose(2, 0, 1)
    return out


def _unit(image: NDArray[Any]) -> Float:
    unit: Float = image.astype(np.float32)
    return unit / np.float32(255) if image.dtype == np.uint8 else unit


def _bytes(image: NDArray[Any]) -> NDArray[np.uint8]:
    if image.dtype == np.uint8:
        return image
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def _cv2() -> Any:
    return optional("cv2", "media")
