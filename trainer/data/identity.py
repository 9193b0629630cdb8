"""Identity of source files: SHA-256 of their content. Neither a name nor a time of change says what a file holds.

    CACHE/digests.json    digests of files that have not changed since they were read, so that a start is cheap

A remembered digest counts only if device, inode, size, time of modification and time of change are all the same. Copies
and archives can set a file's time of modification; nothing but a change of the file sets its time of change.
"""

import functools
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from trainer import files
from trainer.data.cache import ProgressCallback, no_progress
from trainer.errors import CorpusError, of_system

_REPORTED_BYTES = 1 << 28
# A file may change twice within one tick of the file system's clock; some count whole seconds.
_SETTLED_NS = 2 * 10**9
_REMEMBERED = 100_000


def digests(root: Path, paths: Iterable[Path], progress: ProgressCallback = no_progress) -> list[str]:
    """Return the SHA-256 (hex) of each file's content. `root` is the cache; it need not be writable.

    Raises CorpusError if a file cannot be read or changes while it is read.
    """
    memory, found = root / "digests.json", []
    known, new = _remembered(memory), {}
    total = reported = 0

    def count(done: int) -> None:
        nonlocal reported
        if (total + done) // _REPORTED_BYTES > reported:
            reported = (total + done) // _REPORTED_BYTES
            progress("reading the source for its checksum", total + done, None)

    for path in paths:
        try:
            status, started = path.stat(), time.time_ns()
            state = _state(status)
            digest = known.get(state)
            if digest is None:
                digest = files.sha256(path, count)
                total += status.st_size
                if _state(path.stat()) != state:
                    rule = "Start again when nothing writes to it."
                    raise CorpusError(f"{shown(path)} changed while it was read.\n  {rule}")
                if status.st_ctime_ns < started - _SETTLED_NS:
                    new[state] = digest
        except OSError as error:
            remedy = "Check that it is there, and its permissions."
            raise CorpusError(of_system(error, f"{shown(path)} cannot be read", "", remedy)) from None
        found.append(digest)
    if new:
        # Of two processes that write at once one may lose its entries, and reads again later.
        entries = dict(list({**_remembered(memory), **new}.items())[-_REMEMBERED:])
        with suppress(OSError):  # a read-only cache that holds the store is good enough
            root.mkdir(parents=True, exist_ok=True)
            files.write(memory, json.dumps({"sha256": files.json_sha256(entries), "files": entries}))
    return found


def shown(path: Path | str) -> str:
    r"""Return a file's name for messages: bytes that are no UTF-8 appear as \xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _state(status: os.stat_result) -> str:
    return " ".join(
        str(n) for n in (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    )


def _remembered(memory: Path) -> Mapping[str, str]:
    """Return the remembered digests. Whatever is wrong with them, the price is reading the sources once more."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return _read(memory, _state(memory.stat()))
    return {}


@functools.lru_cache(maxsize=1)
def _read(memory: Path, _state: str) -> dict[str, str]:
    """Read them; once while the file is the same, as a start asks for them several times."""
    content = files.read_object(memory)
    if content["sha256"] != files.json_sha256(content["files"]):
        raise ValueError(f"{memory} is damaged")
    return dict(content["files"])
