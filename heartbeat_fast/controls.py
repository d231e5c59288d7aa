"""What a session is asked for: settings for its life, and wishes that change at any time."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from heartbeat_fast.anatomy import Anatomy, sample_anatomy
from heartbeat_fast.conditions import NAMES
from heartbeat_fast.errors import ConditionError
from heartbeat_fast.generator import TEMPERATURE
from heartbeat_fast.warm import GROUPS

CONTROLS = (*NAMES, "heart_rate", "anatomy", "seed")
MOVING = ("mask", "skeleton", "flow")
SLOWEST, FASTEST = 20.0, 250.0  # beats per minute


@dataclass(frozen=True)
class Settings:
    """How a session generates; fixed for its life.

    Args:
        steps, sampler, guidance, temperature: as `Generator` takes them.
        carry: share of the steps a changed clip takes over from the last one, 0 (none) to 1 (all
            but one): higher is faster and steadier, lower follows a change further.
        vary: another noise for every beat; else an unchanged beat is played again, at no cost.
        fade: seconds over which a new clip replaces the one shown.
        patience: seconds for which newer changes may cancel a clip begun for older ones.
        spacing_mm, fps: of clips without an anatomy, which brings its own.
    """

    steps: int | None = None
    sampler: str | None = None
    guidance: float = 1.0
    temperature: float = TEMPERATURE
    carry: float = 0.5
    vary: bool = False
    fade: float = 0.2
    patience: float = 1.0
    spacing_mm: tuple[float, float] = (1.0, 1.0)
    fps: float = 30.0

    def __post_init__(self) -> None:
        for name, high in (("carry", 1), ("fade", 10), ("patience", 60), ("temperature", 2)):
            if not 0 <= (value := getattr(self, name)) <= high:
                raise ConditionError(f"{name}: {value} came; wanted 0 to {high}")


@dataclass(frozen=True, eq=False)
class Wish:
    """What the next clip shall show: conditions by name, controls, and what changed when."""

    values: Mapping[str, Any] = field(default_factory=dict)
    anatomy: Anatomy | None = None
    heart_rate: float = 60.0
    seed: int = 0
    version: int = 0
    at: float = 0.0  # steady clock
    stamps: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(GROUPS, 0))

    def heart(self) -> Anatomy | None:
        """The anatomy that stands in for local conditions, at these controls; None if not asked."""
        if self.anatomy is None or any(self.values.get(n) is not None for n in MOVING):
            return None
        ef = self.values.get("ef")
        ef = self.anatomy.ef if ef is None else ef / 100
        return replace(self.anatomy, ef=ef, heart_rate=self.heart_rate)

    def changed(self, changes: Mapping[str, Any], at: float) -> "Wish":
        """With changes applied; itself where nothing differs."""
        values = {**self.values, **{n: v for n, v in changes.items() if n in NAMES}}
        rest = {n: v for n, v in changes.items() if n not in NAMES}
        new = replace(self, values=values, **rest)
        touched = {n for n in NAMES if not _same(values.get(n), self.values.get(n))}
        heart = new.heart() != self.heart()
        if not touched and not heart and new.seed == self.seed:
            return new  # heart rate alone is a matter of playing
        version = self.version + 1
        stamps = {
            group: version
            if touched & set(names) or (heart and group == "local")
            else self.stamps[group]
            for group, names in GROUPS.items()
        }
        return replace(new, version=version, at=at, stamps=stamps)


def host_array(name: str, value: Any) -> Any:
    """An array of another library as a view of the same memory; anything else as it is.

    Raises:
        ConditionError: it lies on a device, or needs a copy to be seen.
    """
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        return value
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError) as error:
        raise ConditionError(
            f"{name}: cannot be read where it lies ({error}): give a detached copy on the CPU"
        ) from error


def check_control(name: str, value: Any) -> Any:
    """A control that is no condition, in the form a wish keeps it.

    Raises:
        ConditionError: unknown, or out of range.
    """
    if name == "anatomy":
        if value is None or isinstance(value, Anatomy):
            return value
        if type(value) is int and 0 <= value < 2**63:
            return sample_anatomy(value, coverage=1.0)
        raise ConditionError(f"anatomy: {value!r} came; wanted an Anatomy, a seed or None")
    if name == "seed":
        if type(value) is int and 0 <= value < 2**63:
            return value
        raise ConditionError(f"seed: {value!r} came; wanted an integer, 0 or more")
    if name != "heart_rate":
        raise ConditionError(f"{name}: unknown; wanted any of {', '.join(CONTROLS)}")
    try:
        rate = float(value)
    except (TypeError, ValueError) as error:
        raise ConditionError(f"heart_rate: {value!r} came; wanted beats per minute") from error
    if not SLOWEST <= rate <= FASTEST:
        raise ConditionError(f"heart_rate: {rate:g} came; wanted {SLOWEST:g} to {FASTEST:g}")
    return rate


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return a is b or (type(a) is type(b) and bool(a == b))
