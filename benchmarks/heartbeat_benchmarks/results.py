"""Results as files: append-only, one JSON a run; and what documents show of the newest ones."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from heartbeat_fast.errors import FileError
from heartbeat_fast.files import atomic

SCHEMA_VERSION = 1
FOLDER = Path("benchmarks/results")


def save(kind: str, content: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write `folder/KIND-TIME-COMMIT.json`, never over another file; returns the path.

    NaN, which JSON does not have, is written as null.
    """
    now = datetime.now(UTC)
    commit = content["fingerprint"]["source"]["commit"][:8] or "nogit"
    path = folder / f"{kind}-{now:%Y%m%dT%H%M%S}-{commit}.json"
    if path.exists():
        raise FileError(f"{path}: exists; results are never overwritten")
    head = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "created": now.isoformat("T", "seconds"),
    }
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(_plain(head | content), indent=1, allow_nan=False) + "\n")
    return path


def load(path: Path) -> dict[str, Any]:
    """A result. Raises: FileError when it is not one of this schema."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        known = result["schema_version"] == SCHEMA_VERSION
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path}: not a result of heartbeat-bench ({error})") from error
    if not known:
        raise FileError(f"{path}: schema {result['schema_version']}; wanted {SCHEMA_VERSION}")
    return result


def newest(
    kind: str,
    folder: Path = FOLDER,
    weights: str | None = None,
    fits: Callable[[dict[str, Any]], bool] = bool,
    of: str = "",
) -> Path | None:
    """The newest result of a kind, of a bundle with these weights or of this name where given, and
    one that `fits`; else None.
    """
    for path in sorted(folder.glob(f"{kind}-*.json"), reverse=True):
        found = load(path)
        ours = of in ("", found["fingerprint"].get("bundle", {}).get("name"))
        if ours and weights in (None, _weights(found)) and fits(found):
            return path
    return None


def _weights(result: dict[str, Any]) -> str | None:
    bundle = result["fingerprint"].get("bundle", {})
    found: str | None = bundle.get("fingerprints", {}).get("weights")
    return found


def insert(document: Path, name: str, table: str) -> bool:
    """Put a table between <!-- bench:NAME --> and <!-- /bench -->; False where there is no such.

    name: "latency", or "latency of tiny" for that bundle's newest.
    """
    text = document.read_text()
    pattern = re.compile(rf"(<!-- bench:{re.escape(name)} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found[1]}{table.strip()}\n{found[2]}", text)
    if count and changed != text:
        with atomic(document) as temporary:
            temporary.write_text(changed)
    return bool(count)


def places(document: Path, name: str) -> list[str]:
    """The bundles whose table of this name a document asks for; "" asks for the newest of any."""
    return re.findall(rf"<!-- bench:{re.escape(name)}(?: of (\S+))? -->", document.read_text())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash for None and NaN."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def _plain(value: Any) -> Any:
    """JSON values only: numpy scalars become numbers, what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
