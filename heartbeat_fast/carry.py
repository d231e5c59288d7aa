"""A clip that starts from the last one: its latents, noised again to a step inside the sampler.

As SDEdit (Meng et al., 2108.01073) does, but multistep samplers want a history. They get the one
they would have had if the model had predicted the old latents z all along: then every sample is
x_i = α_i z + σ_i ε, every output its counterpart, and step k continues at full order. The levels
(α_i, σ_i) are read off the table itself, so no host needs to know the noise schedule.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.sampler import SamplerError, SamplerTable

Float = NDArray[np.float32]
# What the model puts out for z and ε seen at level u = (α, σ): H·u + g.
_TURN, _NONE = np.array([[0.0, -1.0], [1.0, 0.0]]), np.zeros((2, 2))
OUTPUTS = {
    "v_prediction": (_TURN, np.zeros(2)),
    "epsilon": (_NONE, np.array([0.0, 1.0])),
}
# Of α² + σ² = 1. Solvers keep it to 1e-6; few-step tables, which add the initial noise again as if
# it held nothing of z, to 0.06 at their first step and 0.03 later.
TOLERANCE = 0.08


def levels(table: SamplerTable) -> NDArray[np.float64]:
    """(α_i, σ_i) of what the model sees before each step, (S, 2).

    A sampler that is exact for a constant prediction ends in z, weights (1, 0), whatever z and ε
    are: one linear equation for the level it started at, from which the others follow.

    Raises:
        SamplerError: the table is not variance-preserving (stochastic, or not a sampler of z).
    """
    if table.prediction not in OUTPUTS:
        raise SamplerError(f"sampler {table.name}: predicts {table.prediction}: cannot be resumed")
    H, g = OUTPUTS[table.prediction]
    # x_i = A_i x_0 + b_i in the plane of (z, ε); a model output likewise.
    samples = [(np.eye(2), np.zeros(2))]
    outputs: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for row, scale in zip(table.weights, table.input_scale, strict=True):
        A, b = samples[-1]
        outputs.append((scale * (H @ A), scale * (H @ b) + g))
        first = row[0] / table.init_sigma
        terms = list(zip(row[1:], outputs, strict=True))
        samples.append(
            (
                first * np.eye(2) + sum(w * out[0] for w, out in terms),
                np.asarray(sum(w * out[1] for w, out in terms)),
            )
        )
    A, b = samples.pop()
    try:
        start = np.linalg.solve(A, np.array([1.0, 0.0]) - b)
    except np.linalg.LinAlgError:
        start = np.full(2, np.inf)
    seen = np.stack(
        [s * (A @ start + b) for s, (A, b) in zip(table.input_scale, samples, strict=True)]
    )
    if not (np.abs((seen**2).sum(1) - 1) < TOLERANCE).all():
        raise SamplerError(
            f"sampler {table.name}, {table.steps} steps: its noise levels cannot be read off: "
            "start every clip anew (carry 0)"
        )
    return seen


def resume(
    table: SamplerTable,
    denoise: Callable[[Float, int], Float],
    z: Float,
    noise: Float,
    start: int,
) -> Float:
    """Runs a table from step `start` on, 0 ≤ start < S, from latents z noised by `noise`.

    Args:
        denoise: as for `sampler.sample`.
        z: clean latents.  noise: unit noise of z's shape.

    Returns the sample x_S.

    Raises:
        SamplerError: start is out of range, or the table has no readable levels.
    """
    if not 0 <= start < table.steps:
        raise SamplerError(f"start: {start} came; {table.name} has steps 0 to {table.steps - 1}")
    seen = levels(table)[: start + 1]
    H, g = OUTPUTS[table.prediction]

    def mix(weights: NDArray[np.float64]) -> Float:
        return np.asarray(weights[0] * z + weights[1] * noise, z.dtype)

    past = [mix(u / s) for u, s in zip(seen, table.input_scale, strict=False)]
    outputs = [mix(H @ u + g) for u in seen[:start]]
    x = past.pop()
    if table.multistep is None:
        history = [(past[0] if past else x) / z.dtype.type(table.init_sigma), *outputs]
        for i in range(start, table.steps):
            history.append(denoise(x * z.dtype.type(table.input_scale[i]), i))
            x = _weighted(table.weights[i], history)
        return x
    pairs = [array for pair in zip(past[::-1], outputs[::-1], strict=True) for array in pair]
    for i in range(start, table.steps):
        row = table.multistep[i]
        pairs = [x, denoise(x * z.dtype.type(table.input_scale[i]), i), *pairs[: len(row) - 2]]
        x = _weighted(row, pairs)
    return x


def _weighted(row: tuple[float, ...], arrays: list[Float]) -> Float:
    terms = (a * a.dtype.type(w) for w, a in zip(row, arrays, strict=False) if w != 0.0)
    return np.asarray(sum(terms))
