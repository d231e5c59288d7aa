"""HeartBeat's attention operations: a plain specification, and one file per fast path."""
