"""Samplers as tables: every linear diffusion sampler is a weighted sum of what it has seen.

DPM-Solver++ (Lu et al., 2211.01095), UniPC (Zhao et al., 2302.04867), DDIM (Song et al.,
2010.02502) and Euler (Karras et al., 2206.00364) never look inside the model's output, so after
step i
    x_{i+1} = T[i,0] h_0 + T[i,1] h_1 + ... + T[i,i+1] h_{i+1},
h_0 the unit noise, h_k the k-th model output. Export reads T off diffusers' own schedulers; this
file runs it and knows neither model nor schedule. Legend: S steps, p order.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.untrusted import parse

SCHEMA_VERSION = 1
MAX_BYTES = 4 * 2**20  # of a samplers.json; 56 tables take 0.3 MB
MAX_STEPS = 1000
LARGEST = 1e6  # of any number in a table: times go to 1000, weights of known samplers to 30
PREDICTIONS = ("v_prediction", "epsilon")
DEFAULT, DEFAULT_STEPS = "dpmpp_2m", 10
Float = NDArray[np.float32]


class SamplerError(HeartBeatError):
    """A sampler or step count that the bundle has no table for, or a table that is not one."""


@dataclass(frozen=True)
class SamplerTable:
    """One sampler at one step count.

    Args:
        name: e.g. "dpmpp_2m".
        steps: S.
        prediction: what the model puts out, "v_prediction" or "epsilon".
        timesteps: S training timesteps, as the model's time embedding takes them.
        init_sigma: the unit noise is multiplied by this to give x_0.
        input_scale: S factors; the model sees x_i · input_scale[i].
        weights: T, S rows of i + 2 weights (row i: h_0 … h_{i+1}).
        multistep: the short form where one exists, else None: S rows of 2p weights on
            x_i, h_{i+1}, x_{i-1}, h_i, …, so that a host keeps p pairs and not the whole history.
    """

    name: str
    steps: int
    prediction: str
    timesteps: tuple[float, ...]
    init_sigma: float
    input_scale: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    multistep: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        for field in ("timesteps", "input_scale"):
            object.__setattr__(self, field, tuple(map(float, getattr(self, field))))
        for field in ("weights", "multistep"):
            if (rows := getattr(self, field)) is not None:
                object.__setattr__(self, field, tuple(tuple(map(float, row)) for row in rows))
        lengths = {len(self.timesteps), len(self.input_scale), len(self.weights)}
        short = {len(row) for row in self.multistep or ()}
        sound = (
            lengths == {self.steps}
            and all(len(row) == i + 2 for i, row in enumerate(self.weights))
            and (self.multistep is None or len(self.multistep) == self.steps)
            and (not short or (len(short) == 1 and min(short) % 2 == 0 and min(short) > 0))
        )
        if not sound:
            raise SamplerError(f"sampler {self.name}: rows do not fit {self.steps} steps: rebuild")


def sample(table: SamplerTable, denoise: Callable[[Float, int], Float], noise: Float) -> Float:
    """Runs a table.

    Args:
        denoise: (z, i) → model output of z's shape; i counts steps, its time is table.timesteps[i].
        noise: h_0, unit normal, any shape.

    Returns the sample x_S, of noise's shape and dtype.
    """
    if table.multistep is None:
        return _dense(table, denoise, noise)
    pairs: list[Float] = []  # x_i, h_{i+1}, x_{i-1}, h_i, …: newest first
    x = noise * noise.dtype.type(table.init_sigma)
    for i, row in enumerate(table.multistep):
        pairs = [x, denoise(x * x.dtype.type(table.input_scale[i]), i), *pairs[: len(row) - 2]]
        x = _weighted(row, pairs)
    return x


def _dense(table: SamplerTable, denoise: Callable[[Float, int], Float], noise: Float) -> Float:
    """The definition itself: the whole history, one row of T a step."""
    history = [noise]
    x = noise * noise.dtype.type(table.init_sigma)
    for i, row in enumerate(table.weights):
        history.append(denoise(x * x.dtype.type(table.input_scale[i]), i))
        x = _weighted(row, history)
    return x


def _weighted(row: tuple[float, ...], arrays: list[Float]) -> Float:
    terms = (a * a.dtype.type(w) for w, a in zip(row, arrays, strict=False) if w != 0.0)
    return np.asarray(sum(terms))


def dump_tables(tables: list[SamplerTable]) -> str:
    """The text of a bundle's samplers.json, which C++ and browser hosts read too."""
    return json.dumps({"schema_version": SCHEMA_VERSION, "tables": [asdict(t) for t in tables]})


def load_tables(content: bytes) -> dict[tuple[str, int], SamplerTable]:
    """The tables of a samplers.json's bytes by (name, steps).

    Raises:
        SamplerError: not such a file, of another schema version, or with numbers no sampler has.
    """
    try:
        fields = parse(content, MAX_BYTES)
        if (version := fields["schema_version"]) != SCHEMA_VERSION:
            raise SamplerError(f"samplers.json: schema {version} came; wanted {SCHEMA_VERSION}")
        tables = [SamplerTable(**_checked(row)) for row in fields["tables"]]
    except SamplerError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise SamplerError(
            f"samplers.json: not a sampler file ({error!r}): export again"
        ) from error
    found = {(table.name, table.steps): table for table in tables}
    if len(found) != len(tables):
        raise SamplerError("samplers.json: the same sampler and steps twice: export again")
    return found


def _checked(row: Any) -> dict[str, Any]:
    """A table's fields, of the types that JSON has for them and with numbers in reach."""
    name, steps = row["name"], row["steps"]
    numbers = [row["init_sigma"], *row["timesteps"], *row["input_scale"]]
    for rows in (row["weights"], row.get("multistep") or ()):
        numbers += [weight for line in rows for weight in line]
    if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= 64):
        raise SamplerError(f"samplers.json: sampler name {str(name)[:40]!r}: export again")
    what = f"samplers.json: {name}"
    if type(steps) is not int or not 0 < steps <= MAX_STEPS:
        raise SamplerError(f"{what}: {str(steps)[:40]} steps; wanted 1 to {MAX_STEPS}")
    if row["prediction"] not in PREDICTIONS:
        raise SamplerError(f"{what}: unknown prediction; wanted {', '.join(PREDICTIONS)}")
    if not all(type(n) in (int, float) and abs(n) <= LARGEST for n in numbers):
        raise SamplerError(f"{what}: a weight or time is no number up to {LARGEST:g}: export again")
    return dict(row)


def choose(
    tables: dict[tuple[str, int], SamplerTable], name: str | None, steps: int | None
) -> SamplerTable:
    """The table that is asked for, or what suits the bundle where nothing is.

    No name: dpmpp_2m where there is one, else the bundle's first. No steps: 10 where there are so
    many, else the most; a distilled bundle has one sampler of 1, 2 and 4 steps.

    Raises:
        SamplerError: the bundle has none; the message lists what it has.
    """
    names = [known for known, _ in tables]
    if name is None:
        name = DEFAULT if DEFAULT in names else next(iter(names), DEFAULT)
    if steps is None:
        counts = [s for n, s in tables if n == name]
        steps = DEFAULT_STEPS if DEFAULT_STEPS in counts else max(counts, default=DEFAULT_STEPS)
    return pick(tables, name, steps)


def pick(tables: dict[tuple[str, int], SamplerTable], name: str, steps: int) -> SamplerTable:
    """The table of a sampler at a step count.

    Raises:
        SamplerError: the bundle has none; the message lists what it has.
    """
    if table := tables.get((name, steps)):
        return table
    if counts := sorted(s for n, s in tables if n == name):
        raise SamplerError(f"steps: {steps} came; {name} has {', '.join(map(str, counts))}")
    known = ", ".join(sorted({n for n, _ in tables}))
    raise SamplerError(f"sampler: {name!r} came; this bundle has {known}")
