"""Files that others read while they are written anew: they see the old one or the new one, never a part."""

import fcntl
import os
from pathlib import Path
from typing import IO


def write(path: Path, content: str | bytes) -> None:
    """Replace the file `path` whole; text as UTF-8. Of several writers at once, each waits for the one before.

    A death on the way leaves NAME.partial, which the next write takes. Raises OSError.
    """
    partial = path.with_name(f"{path.name}.partial")
    while not _written(partial, path, content.encode() if isinstance(content, str) else content):
        pass


def _written(partial: Path, path: Path, content: bytes) -> bool:
    """False if another writer has put `partial` in place while we waited for it."""
    with partial.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _is_still(partial, file):
            return False
        file.truncate(0)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        partial.replace(path)
    return True


def _is_still(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
