"""Condition sets by the names a user would give them.

The ladder ("text" … "+flow"), "all" and "none"; one condition, or several joined by "+"
("mask+ef"); all but one ("all-flow"). Groups stand for several: ladder, singles, without.
"""

from collections.abc import Iterable

from heartbeat_fast.conditions import NAMES
from heartbeat_fast.errors import HeartBeatError
from heartbeat_training.evaluate import ALL, LADDER

NONE = "none"
GROUPS = {
    "ladder": tuple(LADDER),
    "singles": tuple(name for name in NAMES if name not in LADDER),
    "without": tuple(f"{ALL}-{name}" for name in NAMES),
}


def conditions_of(name: str) -> tuple[str, ...]:
    """The conditions of a set, in the order of NAMES.

    Raises:
        HeartBeatError: no such set; lists what may be asked for.
    """
    if name in LADDER:
        return LADDER[name]
    if name in (ALL, NONE):
        return NAMES if name == ALL else ()
    left_out = name.removeprefix(f"{ALL}-")
    if left_out != name and left_out in NAMES:
        return tuple(one for one in NAMES if one != left_out)
    asked = name.split("+")
    if not set(asked) <= set(NAMES):
        raise HeartBeatError(
            f"--sets: {name!r} came; wanted {', '.join((*LADDER, ALL, NONE))}, "
            f"{ALL}-X, or any of {', '.join(NAMES)} joined by +"
        )
    return tuple(one for one in NAMES if one in asked)


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Names with groups spelled out, each once, checked.

    Raises:
        HeartBeatError: one is no set.
    """
    found = [one for name in names for one in GROUPS.get(name, (name,))]
    for name in found:
        conditions_of(name)
    return tuple(dict.fromkeys(found))
