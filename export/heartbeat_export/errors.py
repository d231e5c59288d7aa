"""What an export raises."""

from heartbeat_fast.errors import HeartBeatError


class ExportError(HeartBeatError):
    """A graph could not be written, or does not match torch."""
