"""Generated clips under the real ones whose conditions they were given: to be looked at."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heartbeat_fast.clip import MARK, save_images
from heartbeat_training.evaluation.cases import Case

MOST = 6  # patients in a row: 1536 pixels
FPS = 15.0


def beside(path: Path, cases: list[Case], clips: dict[str, list[NDArray[np.uint8]]]) -> Path:
    """Writes a picture of the first MOST cases: real clips on top, a row for each set below.

    Args:
        path: .gif, .mp4 or .webp; .png gives a strip.  clips: by set, a clip (F, H, W) a case.

    Raises: FileError for another suffix; MissingDependency for .mp4 without its library.
    """
    rows = [[case.frames for case in cases], *clips.values()]
    sheet = np.concatenate([np.concatenate(row[:MOST], 2) for row in rows], 1)
    note = f"top: real; below, {MARK.lower()}: {'; '.join(clips)}"
    return save_images(path, [Image.fromarray(frame) for frame in sheet], FPS, note)
