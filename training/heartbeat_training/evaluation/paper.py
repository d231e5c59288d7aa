"""What the paper printed, to stand beside ours: HeartBeat, MICCAI 2024 (arXiv 2406.14098), Table 1.

SSIM is against the source clip. FVD is on the paper's own scale: others quote the same cells times
16, its frame count, so it is probably FVD/16. Its 91 test clips are not public.
"""

from typing import NamedTuple

SCALE_NOTE = (
    "The paper's FVD is on a scale of its own: 6.08 (97.28 if x16); ours is shown as FVD/16"
)
BASE = "Base T,M"


class Row(NamedTuple):
    """One row of Table 1: conditions, and (FID, FVD, SSIM) for either view."""

    conditions: tuple[str, ...]
    A2C: tuple[float, float, float]
    A4C: tuple[float, float, float]


T, I, S, M, V, O = "text", "image", "sketch", "mask", "skeleton", "flow"  # noqa: E741
# HeartBeat-Base was a training of its own with text and mask; ours is one model given just these.
TABLE = {
    "T": Row((T,), (107.66, 19.07, 0.53), (76.46, 23.83, 0.53)),
    "T,I": Row((T, I), (36.34, 9.60, 0.61), (36.00, 12.58, 0.61)),
    "T,S,I": Row((T, S, I), (27.38, 7.04, 0.66), (35.42, 13.48, 0.64)),
    "T,S,I,M": Row((T, S, I, M), (26.30, 6.74, 0.66), (33.77, 12.59, 0.64)),
    "+MV": Row((T, S, I, M, V), (25.98, 6.94, 0.66), (33.98, 12.00, 0.64)),
    "+O": Row((T, S, I, M, V, O), (25.23, 6.08, 0.66), (31.99, 9.96, 0.65)),
    BASE: Row((T, M), (23.57, 6.97, 0.65), (31.08, 10.80, 0.64)),
}
SIX = TABLE["+O"].conditions
