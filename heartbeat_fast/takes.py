"""More than a clip: many sessions in one call, and takes longer than the model's frames.

Legend: N sessions, F frames of the model's clip, L frames of a take, C channels, h w latents.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.clip import Clip
from heartbeat_fast.conditions import NAMES, Conditions
from heartbeat_fast.controls import Settings, host_array
from heartbeat_fast.errors import ConditionError
from heartbeat_fast.generator import Float, Generator, Stopwatch
from heartbeat_fast.sampler import sample
from heartbeat_fast.stream import Session
from heartbeat_fast.warm import Warm

SEQUENCES = ("mask", "skeleton", "flow")
LONGEST = 1024  # frames of a take


def next_batch(
    sessions: Sequence[Session], out: Any = None, timeout: float | None = None
) -> NDArray[np.uint8]:
    """The next clips of many sessions, in one call.

    Args:
        out: where they go, uint8 (N,F,H,W): numpy, torch or anything with DLPack on the CPU.
        timeout: seconds for all of them.

    Returns:
        `out` as a numpy view, or a new array. Each clip is copied into it once.

    Raises:
        DeadlineError, EngineError: as `Session.next`, of the first session that fails.
        ConditionError: out is of another shape or type.
    """
    start = time.monotonic()
    batch = None if out is None else host_array("out", out)
    for i, session in enumerate(sessions):
        left = None if timeout is None else max(timeout - (time.monotonic() - start), 0.0)
        frames = session.next(left).frames
        if batch is None:
            batch = np.empty((len(sessions), *frames.shape), np.uint8)
        if batch.shape != (len(sessions), *frames.shape) or batch.dtype != np.uint8:
            raise ConditionError(
                f"out: {batch.dtype} {batch.shape} came; wanted uint8 "
                f"{(len(sessions), *frames.shape)}"
            )
        batch[i] = frames
    if batch is None:
        raise ConditionError("sessions: none came; wanted one or more")
    return np.asarray(batch)


def long_take(
    generator: Generator,
    conditions: Conditions,
    settings: Settings | None = None,
    *,
    overlap: int = 4,
    seed: int = 0,
) -> Clip:
    """A clip of any length, denoised in overlapping windows that agree at every step.

    Where windows overlap, their outputs are averaged before the sampler goes on, as MultiDiffusion
    (Bar-Tal et al., 2302.08113) does for panoramas, with weights that fade towards a window's ends;
    speckle is carried along the whole flow, so that it does not start anew at a window.

    Args:
        conditions: of L frames, L at least the model's F: what the take shows as a sequence (mask,
            skeleton, flow) has L frames, text, EF, image and sketch hold for every window.
        overlap: frames that neighbouring windows share, 1 to F − 1; more is smoother and slower.

    Returns:
        The clip, frames (L,H,W).

    Raises:
        ConditionError: L or overlap is out of range, or the size is not the model's.
    """
    settings, warm = settings or Settings(), Warm.of(generator)
    F, L = warm.bundle.manifest.frames, conditions.frames
    if not (F <= L <= LONGEST and 1 <= overlap < F):
        raise ConditionError(
            f"take: {L} frames, overlap {overlap} came; wanted {F} to {LONGEST}, 1 to {F - 1}"
        )
    starts = windows(L, F, overlap)
    watch = Stopwatch()
    with warm.turn():
        table = warm.table(settings.sampler, settings.steps)
        encoded = [warm.encode(_window(conditions, start, F), watch) for start in starts]
        model = warm.model(table, settings.guidance, watch)
        noise = np.float32(settings.temperature) * warm.noise(seed, L)
        weights = _weights(starts, F, L)

        def all_windows(z: Float, i: int) -> Float:
            out = np.zeros_like(z)
            for start, one, weight in zip(starts, encoded, weights, strict=True):
                here = slice(start, start + F)
                out[:, here] += weight * model(np.ascontiguousarray(z[:, here]), i, one)
            return out

        with watch("denoise"):
            latents = sample(table, all_windows, noise)
        frames = warm.decode_long(latents, conditions.flow, seed, watch)
        provenance = warm.provenance(conditions, watch)
    provenance |= {
        **{"sampler": table.name, "steps": table.steps, "guidance": settings.guidance},
        **{"seed": seed, "temperature": settings.temperature, "overlap": overlap},
        "windows": len(starts),
    }
    return Clip(frames, settings.spacing_mm, settings.fps, provenance, conditions)


def windows(length: int, frames: int, overlap: int) -> list[int]:
    """First frames of windows that cover a take; the last one may overlap more."""
    starts = list(range(0, length - frames, frames - overlap))
    return [*starts, length - frames]


def _weights(starts: list[int], frames: int, length: int) -> list[Float]:
    """Each window's share of every frame of its own, (F,1,1,1); shares of a frame sum to 1."""
    ramp = np.minimum(np.arange(1, frames + 1), np.arange(frames, 0, -1)).astype(np.float32)
    total = np.zeros(length, np.float32)
    for start in starts:
        total[start : start + frames] += ramp
    return [(ramp / total[s : s + frames])[:, None, None, None] for s in starts]


def _window(conditions: Conditions, start: int, frames: int) -> Conditions:
    values: dict[str, Any] = {name: getattr(conditions, name) for name in NAMES}
    for name in SEQUENCES:
        if values[name] is not None:
            values[name] = values[name][start : start + frames]
    return Conditions(**values, frames=frames, size=conditions.size)
