"""Identity of source files: SHA-256 of their content. Neither a name nor a time of change says what a file holds.

    CACHE/digests.json    digests of files that have not changed since they were read, so that a start is cheap

A remembered digest counts only if device, inode, size, time of modification and time of change are all the same. Copies
and archives can set a file's time of modification; nothing but a change of the file sets its time of change.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from trainer import files
from trainer.data.cache import ProgressCallback, no_progress
from trainer.errors import CorpusError

_CHUNK = 1 << 20
_REPORTED_BYTES = 1 << 28
# A file may change twice within one tick of the file system's clock; some count whole seconds.
_SETTLED_NS = 2 * 10**9
_REMEMBERED = 100_000


def digests(root: Path, paths: Iterable[Path], progress: ProgressCallback = no_progress) -> list[str]:
    """Return the SHA-256 (hex) of each file's content. `root` is the cache; it need not be writable.

    Raises CorpusError if a file cannot be read or changes while it is read.
    """
    memory, done = _Memory(root / "digests.json"), 0

    def count(size: int) -> None:
        nonlocal done
        if (done + size) // _REPORTED_BYTES > done // _REPORTED_BYTES:
            progress("reading the source for its checksum", done + size, None)
        done += size

    found = [_digest(path, memory, count) for path in paths]
    memory.save()
    return found


def shown(path: Path | str) -> str:
    r"""Return a file's name for messages: bytes that are no UTF-8 appear as \xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _digest(path: Path, memory: "_Memory", count: Callable[[int], None]) -> str:
    try:
        before = path.stat()
        if (known := memory.known.get(_state(before))) is not None:
            return known
        now = time.time_ns()
        found = _content(path, count)
        after = path.stat()
    except OSError as error:
        raise CorpusError(
            f"{shown(path)} cannot be read: {error.strerror}.\n  Check that it is there, and its permissions."
        ) from None
    if _state(after) != _state(before):
        raise CorpusError(f"{shown(path)} changed while it was read.\n  Start again when nothing writes to it.")
    if before.st_ctime_ns < now - _SETTLED_NS:
        memory.add(_state(before), found)
    return found


def _content(path: Path, count: Callable[[int], None]) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
            count(len(chunk))
    return sha.hexdigest()


def _state(status: os.stat_result) -> str:
    return " ".join(
        str(n) for n in (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    )


class _Memory:
    """The file of remembered digests. Whatever is wrong with it, the price is reading the sources once more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new: dict[str, str] = {}
        self.known = self._read()

    def add(self, state: str, digest: str) -> None:
        self._new[state] = self.known[state] = digest

    def save(self) -> None:
        """Write what is new. Of two processes that write at once one may lose its entries, and reads again later."""
        if not self._new:
            return
        entries = dict(list((self._read() | self._new).items())[-_REMEMBERED:])
        with suppress(OSError):  # a read-only cache that holds the store is good enough
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.write(self._path, json.dumps({"sha256": _checksum(entries), "files": entries}))

    def _read(self) -> dict[str, str]:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            content = json.loads(self._path.read_text(encoding="utf-8"))
            if content["sha256"] == _checksum(content["files"]):
                return dict(content["files"])
        return {}


def _checksum(entries: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
