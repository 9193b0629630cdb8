"""Files that others read while they are replaced: a reader sees the old content or the new, never a part."""

import fcntl
import os
from pathlib import Path
from typing import IO


def write(path: Path, content: str | bytes) -> None:
    """Replace the whole file `path`, durably; text as UTF-8. Concurrent writers take turns. Raises OSError.

    A process that dies on the way leaves NAME.partial, which the next write uses.
    """
    partial = path.with_name(f"{path.name}.partial")
    while not _written(partial, path, content.encode() if isinstance(content, str) else content):
        pass


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _written(partial: Path, path: Path, content: bytes) -> bool:
    """False if another writer has moved `partial` to `path` while this one waited for the lock."""
    with partial.open("ab") as file:
        # Not filelock: it locks a file of its own that stays beside every file ever written. The lock here is on the
        # very file that is renamed, so a writer must check afterwards that its file still has that name.
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
