"""Training clips with their conditions, in memory-mapped files: written once, read at random.

Conditions come from the same code as at inference (heartbeat_fast.extract through Record); what is
derived per step is only cheap: one-hot masks, flow upsampled. Legend: M clips, F frames, H W
pixels.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from heartbeat_fast import extract
from heartbeat_fast.record import Record
from heartbeat_training.phantom import record

FLOW_STRIDE = (
    4  # tissue motion is smooth over far more than 4 pixels: stored at a quarter of the size
)

Array = NDArray[Any]


class ClipCache:
    """Clips and conditions of M records.

    frames, labels, skeleton (M, F, H, W) uint8; flow (M, F, 2, H/4, W/4) float16 in full-size
    pixels; sketch (M, H, W) uint8; rows: list of {"text", "ef", "labels"
    (whether there are any)}.
    """

    def __init__(self, folder: Path) -> None:
        names = ("frames", "labels", "skeleton", "flow", "sketch")
        self.frames, self.labels, self.skeleton, self.flow, self.sketch = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in names
        )
        self.rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def build(
        folder: Path, records: Iterable[Record], count: int, conditions: Path | None = None
    ) -> None:
        """Write `count` records of one shape into `folder`; done before → nothing to do.

        conditions: a folder where extracted conditions are kept by content, for other runs on the
        same clips; None to keep none.
        """
        from heartbeat_training.datasets.cache import cached_conditions  # it imports this module

        if (folder / "rows.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        maps: dict[str, Array] = {}
        rows = []
        for i, item in enumerate(records):
            arrays = cached_conditions(item, conditions) if conditions else arrays_of(item)
            for name, array in arrays.items():
                if name not in maps:
                    maps[name] = np.lib.format.open_memmap(
                        folder / f"{name}.npy", "w+", array.dtype, (count, *array.shape)
                    )
                maps[name][i] = array
            labelled = item.labels is not None
            rows.append({"text": item.text, "ef": item.ef, "labels": labelled})
        # written last: its presence says that the arrays are complete
        (folder / "rows.json").write_text(json.dumps(rows))

    def flow_of(self, clip: int, frames: Array) -> Array:
        """Flow at full size for some frames of a clip: (len(frames), 2, H, W) float32."""
        size = self.frames.shape[-1]
        small = self.flow[clip, frames].astype(np.float32)
        return np.stack([[cv2.resize(c, (size, size)) for c in pair] for pair in small])


def arrays_of(item: Record) -> dict[str, Array]:
    """One record as the cache stores it."""
    conditions = item.conditions()
    assert conditions.sketch is not None
    assert conditions.flow is not None
    skeleton = item.skeleton if item.skeleton is not None else conditions.skeleton
    F, H, W = item.frames.shape
    small = (W // FLOW_STRIDE, H // FLOW_STRIDE)
    flow = [
        [cv2.resize(c, small, interpolation=cv2.INTER_AREA) for c in f] for f in conditions.flow
    ]
    zeros = np.zeros((F, H, W), np.float32)
    return {
        "frames": item.frames,
        "labels": item.labels if item.labels is not None else np.zeros((F, H, W), np.uint8),
        "skeleton": _bytes(skeleton if skeleton is not None else zeros),
        "flow": np.asarray(flow, np.float16),
        "sketch": _bytes(conditions.sketch),
    }


def _bytes(image: Array) -> NDArray[np.uint8]:
    return np.asarray(np.rint(image * 255), np.uint8)


def phantoms(seeds: range, frames: int, size: int) -> Iterable[Record]:
    """Records as users will bring them: some with the simulator's exact valve and flow, some with
    what extraction makes of masks and frames."""
    for seed in seeds:
        item = record(seed, frames=frames, size=size)
        exact: Callable[[], float] = np.random.Generator(np.random.PCG64([seed, 0xC11])).random
        assert item.labels is not None
        if exact() < 0.4:
            item = replace(item, skeleton=extract.skeleton_from_labels(item.labels))
        if exact() < 0.4:
            item = replace(item, flow=extract.flow(item.frames))
        yield item
