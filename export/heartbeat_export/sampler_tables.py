"""Reads sampler tables off diffusers' own schedulers with one-hot vectors.

A linear scheduler maps (noise h_0, model outputs h_1 … h_S) to samples. Fed the k-th unit vector
as the k-th model output, its sample after step i *is* row i of T (heartbeat_fast/sampler.py).
Clipping and thresholding are not linear and are refused. Legend: S steps, p order.
"""

from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray

from heartbeat_fast.sampler import SamplerError, SamplerTable

STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 50)
SAMPLERS = {
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
}
SCHEDULE = {  # Stable Diffusion 1.x
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    # The first step must be the last timestep, where training saw the noisiest latents: with
    # "leading" spacing 4 steps start at t = 751 (Lin et al., 2305.08891, section 3.3).
    "timestep_spacing": "trailing",
}
FEW_STEP = "few_step"  # a distilled model's only sampler
MAX_ORDER = 3  # multistep forms longer than this save a host nothing
# One-hot probing is exact but for schedulers that cast samples to float32 on the way.
RESIDUAL = 1e-6


def scheduler(name: str, prediction: str, **options: Any) -> Any:
    """diffusers' scheduler behind a sampler name; options override its configuration.

    Raises:
        SamplerError: unknown sampler.
    """
    if name not in SAMPLERS:
        raise SamplerError(f"sampler: {name!r} came; wanted one of {', '.join(SAMPLERS)}")
    kind, defaults = SAMPLERS[name]
    return kind(**{**SCHEDULE, "prediction_type": prediction, **defaults, **options})


def probe(name: str, diffusion: Any, steps: int) -> SamplerTable:
    """The table of a diffusers scheduler at a step count, probed in float64.

    Raises:
        SamplerError: the scheduler clips or thresholds, so it is not linear.
    """
    config = diffusion.config
    for option in ("clip_sample", "thresholding"):
        if config.get(option):
            raise SamplerError(f"{name}: {option} is not linear, so no table exists: turn it off")
    diffusion.set_timesteps(steps)
    units = torch.eye(steps + 1, dtype=torch.float64)[:, None]  # (S+1, 1, S+1): UniPC wants ≥ 2-D
    x = units[0] * diffusion.init_noise_sigma
    scales, rows = [], []
    for i, t in enumerate(diffusion.timesteps):
        scales.append(float(diffusion.scale_model_input(torch.ones(1, dtype=torch.float64), t)))
        x = diffusion.step(units[i + 1], t, x).prev_sample
        rows.append(x[0].numpy().astype(np.float64))
    dense = np.stack(rows)
    init_sigma = float(diffusion.init_noise_sigma)
    return SamplerTable(
        name=name,
        steps=steps,
        prediction=config["prediction_type"],
        timesteps=tuple(diffusion.timesteps.tolist()),
        init_sigma=init_sigma,
        input_scale=tuple(scales),
        weights=tuple(tuple(row[: i + 2]) for i, row in enumerate(dense)),
        multistep=multistep(dense, init_sigma),
    )


def multistep(
    dense: NDArray[np.float64], init_sigma: float
) -> tuple[tuple[float, ...], ...] | None:
    """The shortest form x_{i+1} = Σ_j a_ij x_{i-j} + b_ij h_{i+1-j}, j < p, of a T (S, S+1).

    Returns S rows of 2p weights on x_i, h_{i+1}, x_{i-1}, h_i, …, or None where p would exceed 3.
    """
    steps = len(dense)
    units = np.eye(steps + 1)
    x = np.vstack([units[:1] * init_sigma, dense])  # x[i] is the sample before step i
    for order in range(1, MAX_ORDER + 1):
        rows = np.zeros((steps, 2 * order))
        for i in range(steps):
            span = [v for j in range(min(order, i + 1)) for v in (x[i - j], units[i + 1 - j])]
            basis = np.stack(span, 1)
            # rcond: x_1 lies in the span of x_0 and h_1; take the short weights, not a difference.
            fit = np.linalg.lstsq(basis, x[i + 1], rcond=RESIDUAL)[0]
            if np.abs(basis @ fit - x[i + 1]).max() > RESIDUAL * np.abs(x[i + 1]).max():
                break
            rows[i, : len(fit)] = fit
        else:
            return tuple(map(tuple, rows.tolist()))
    return None


def build_tables(
    prediction: str, few_steps: tuple[int, ...] = (), **schedule: Any
) -> list[SamplerTable]:
    """Every sampler at every step count a bundle carries, for a model's prediction and schedule.

    few_steps: what a student was distilled to; it knows no other times, so no other table.
    schedule: diffusers' names (beta_start, beta_end, beta_schedule, num_train_timesteps).
    """
    if few_steps:
        return [few_step_table(steps, prediction, **schedule) for steps in few_steps]
    return [
        probe(name, scheduler(name, prediction, **schedule), steps)
        for name in SAMPLERS
        for steps in STEPS
    ]


def few_step_times(steps: int, train_timesteps: int) -> tuple[int, ...]:
    """A student's timesteps: the last one first, then evenly down, never to 0."""
    return tuple(round(train_timesteps * (1 - i / steps)) - 1 for i in range(steps))


def few_step_table(steps: int, prediction: str, **schedule: Any) -> SamplerTable:
    """The table of a student distilled to `steps` (heartbeat_training/stage_student.py).

    Each output gives an estimate of the clean sample; between steps it is noised again with the
    noise h_0 the clip started from, so that this sampler too is a weighted sum.
    """
    solver = scheduler("ddim", prediction, **schedule)
    alphas = solver.alphas_cumprod.double().numpy()
    times = few_step_times(steps, len(alphas))
    units = np.eye(steps + 1)
    x, rows = units[0], []
    for i, t in enumerate(times):
        signal, noise = np.sqrt(alphas[t]), np.sqrt(1 - alphas[t])
        clean = signal * x - noise * units[i + 1]
        if prediction != "v_prediction":
            clean = (x - noise * units[i + 1]) / signal
        a = alphas[times[i + 1]] if i + 1 < steps else 1.0
        x = np.sqrt(a) * clean + np.sqrt(1 - a) * units[0]
        rows.append(x)
    dense = np.stack(rows)
    return SamplerTable(
        name=FEW_STEP,
        steps=steps,
        prediction=prediction,
        timesteps=times,
        init_sigma=1.0,
        input_scale=(1.0,) * steps,
        weights=tuple(tuple(row[: i + 2]) for i, row in enumerate(dense)),
        multistep=multistep(dense, 1.0),
    )
