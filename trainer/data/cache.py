"""Directories built by one process and read by many: whole or absent, however often builders die.

A builder holds a lock, works in a directory of another name, and commits by one rename. The kernel drops the lock of
a dead process, so nobody waits for the dead; what a dead builder left is removed by the next one.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trainer.errors import CorpusError

ProgressCallback = Callable[[str, int, int | None], None]
"""Called with (phase, done, total); total is None where it is unknown."""

WAIT_NOTICE_SECONDS = 2.0
_POLL_SECONDS = 0.05


def no_progress(phase: str, done: int, total: int | None) -> None:
    """The progress callable of those who do not care."""


def cache_root(configured: str) -> Path:
    """data.cache_dir, else $TOPROPE_CACHE, else ~/.cache/toprope."""
    return Path(configured or os.environ.get("TOPROPE_CACHE") or "~/.cache/toprope").expanduser()


def built_once(root: Path, name: str, build: Callable[[Path], None], progress: ProgressCallback) -> Path:
    """The directory root/name, built by `build(directory)` if it does not exist yet.

    Any number of processes may ask at once; one builds, the others wait. Raises CorpusError where the cache cannot
    be written, and whatever `build` raises.
    """
    final = root / name
    if final.is_dir():  # a read-only cache that holds the store is good enough
        return final
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True)
        with (root / f"{name}.lock").open("w") as lock, _locked(lock, progress):
            if not final.is_dir():
                _build(final, root / f"{name}.building", build)
    return final


def remove_built(path: Path) -> None:
    """Take what `built_once` made out of the way; who has it mapped keeps it. Somebody else may have been first."""
    aside = path.with_name(f"{path.name}.damaged-{os.getpid()}")
    with _writing(path.parent):
        try:
            path.rename(aside)
        except FileNotFoundError:
            return
        shutil.rmtree(aside)


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # what cannot be read is a CorpusError already
        raise CorpusError(
            f"The cache {root} cannot be written: {error.strerror or error}.\n"
            "  Tokens are kept there between runs. Set data.cache_dir or $TOPROPE_CACHE to a writable directory with "
            "room for the corpus."
        ) from error


@contextmanager
def _locked(lock: IO[str], progress: ProgressCallback) -> Iterator[None]:
    notice_at = time.monotonic() + WAIT_NOTICE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(_POLL_SECONDS)
        if time.monotonic() > notice_at:
            progress("waiting for another process that prepares the same data", 0, None)
            notice_at = time.monotonic() + WAIT_NOTICE_SECONDS
    yield  # closing the file gives the lock back


def _build(final: Path, building: Path, build: Callable[[Path], None]) -> None:
    if building.exists():
        shutil.rmtree(building)
    building.mkdir()
    try:
        build(building)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    for path in (*building.iterdir(), building):
        _sync(path)
    building.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
