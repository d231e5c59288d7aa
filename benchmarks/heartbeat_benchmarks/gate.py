"""Quality beside a speed: how far an engine's clip is from the fp32 reference's, and whether that
passes.

The reference is ONNX Runtime in fp32, itself held to torch when the bundle was written (the
manifest's parity). Bounds are PSNR of a whole 8-bit clip, same conditions, seed and steps: 40 dB,
the export's own bound, is an error of 2.6 grey levels; 30 dB, allowed to reduced precision, of 8.
"""

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.conditions import Conditions
from heartbeat_fast.generator import Generator

REFERENCE = "onnxruntime"
FULL_DB, REDUCED_DB = 40.0, 30.0
SAME_DB = 99.0  # for identical clips, since JSON has no infinity
SEED = 7


class Gate:
    """Clips of the reference, made once each, and the generators held to them."""

    def __init__(self, reference: Generator, guidance: float, sampler: str | None) -> None:
        self._reference, self._guidance, self._sampler = reference, guidance, sampler
        self._wanted: dict[tuple[tuple[str, ...], int], NDArray[np.uint8]] = {}

    def verdict(self, generator: Generator, given: Conditions, steps: int) -> dict[str, object]:
        """{"psnr_db", "wanted_db", "passed", "reference"} of one clip."""
        key = (given.present, steps)
        if key not in self._wanted:
            self._wanted[key] = self._clip(self._reference, given, steps)
        came = psnr(self._clip(generator, given, steps), self._wanted[key])
        bound = FULL_DB if generator.engine.precision == "fp32" else REDUCED_DB
        reference = self._reference.engine
        return {
            "psnr_db": round(came, 2),
            "wanted_db": bound,
            "passed": came >= bound,
            "reference": f"{reference.name} {reference.precision}",
        }

    def _clip(self, make: Generator, given: Conditions, steps: int) -> NDArray[np.uint8]:
        return make(
            given, steps=steps, seed=SEED, guidance=self._guidance, sampler=self._sampler
        ).frames


def psnr(got: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of 8-bit frames in dB, at most 99."""
    error = float(np.mean((got.astype(np.float64) - wanted) ** 2))
    return SAME_DB if error == 0 else float(min(SAME_DB, 10 * np.log10(255**2 / error)))
