"""Files that nobody else could have written: how they are opened, and what is asked of them."""

import os

# No links; and a pipe put in a file's place must not hang whoever opens it.
READ = os.O_RDONLY
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
    READ |= getattr(os, _flag, 0)


class Unsound(Exception):
    """Why a file or folder is not used."""


def check_owned(status: os.stat_result) -> None:
    """Raises Unsound where another user owns it or others may touch it. Windows keeps a user's
    folders apart by access lists, and its modes say nothing."""
    if not hasattr(os, "geteuid"):
        return
    if status.st_uid != os.geteuid():
        raise Unsound(f"owned by user {status.st_uid}, not {os.geteuid()}")
    if status.st_mode & 0o077:
        raise Unsound(f"open to other users, mode {status.st_mode & 0o777:03o}; wanted 700 or 600")
