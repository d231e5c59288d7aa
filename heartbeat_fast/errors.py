"""Every error this package raises on purpose: one line that says what came and what is wanted."""

from importlib import import_module
from typing import Any


class HeartBeatError(ValueError):
    """Base of all our errors. The command line prints it as one line and exits with code 2."""


class ConditionError(HeartBeatError):
    """A condition has the wrong shape, range, label values, length, or is not finite."""


class RecordError(HeartBeatError):
    """A record (frames, labels, spacing, frame rate) is inconsistent."""


class FileError(HeartBeatError):
    """A file is missing, unreadable, of an unknown kind, too large, or could not be written."""


class BundleError(HeartBeatError):
    """A bundle is truncated, altered, or of another schema version."""


class EngineError(HeartBeatError):
    """An engine is unknown or cannot run here."""


class ServeError(HeartBeatError):
    """A server cannot listen where it was asked to."""


class MissingDependency(HeartBeatError):
    """An optional library is not installed; the message names the extra that brings it."""


def optional(module: str, extra: str) -> Any:
    """Imports an optional library on first use.

    Raises:
        MissingDependency: not installed; names `pip install 'heartbeat_fast[extra]'`.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"{module} is not installed ({error}): pip install 'heartbeat_fast[{extra}]'"
        ) from error
