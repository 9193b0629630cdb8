"""Directories built by one process and read by many: whole or absent, wherever a builder dies.

A builder holds a lock, works in a directory of another name, and commits by one rename. The kernel drops the lock of a
dead process, so no process waits for it; the next builder removes what it left.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from trainer import errors, files
from trainer.errors import CorpusError

ProgressCallback = Callable[[str, int, int | None], None]
"""Called with (phase, done, total); total is None if unknown."""

WAIT_NOTICE_SECONDS = 2.0  # how often a waiting process reports that it waits


def no_progress(phase: str, done: int, total: int | None) -> None:
    """A progress callback that does nothing."""


def cache_root(configured: str) -> Path:
    """Return data.cache_dir if it is set, else $TOPROPE_CACHE, else ~/.cache/toprope."""
    chosen = configured or os.environ.get("TOPROPE_CACHE")
    try:
        return Path(chosen or "~/.cache/toprope").expanduser()
    except RuntimeError:  # "~" of a user who is not known, as in many containers
        raise CorpusError(
            f"{chosen or '~/.cache/toprope'} has no place: the home directory is not known.\n"
            "  Tokens are kept there between runs. Set data.cache_dir, $TOPROPE_CACHE or $HOME."
        ) from None


def built_once(root: Path, name: str, build: Callable[[Path], None], progress: ProgressCallback) -> Path:
    """Return the directory root/name; if it does not exist, `build(directory)` makes it.

    Any number of processes may call this at once: one builds, the others wait. Raises CorpusError if the cache cannot
    be written, and whatever `build` raises.
    """
    final = root / name
    if files.is_dir(final):
        # checked without the lock: a read-only cache that holds the store is good enough
        return final
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True)
        with _locked(FileLock(root / f"{name}.lock", fallback_to_soft=False), progress):
            if final.is_dir():  # built during the wait for the lock
                return final
            building = root / f"{name}.building"
            if building.exists():  # a builder died
                shutil.rmtree(building)
            building.mkdir()
            try:
                build(building)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
            # Contents before the name: after a power cut, what has the name must be whole.
            for path in (*building.iterdir(), building):
                files.sync(path)
            building.rename(final)
            files.sync(root)
    return final


def remove_built(path: Path) -> None:
    """Remove what `built_once` made. Processes that have mapped it keep it; another one may have removed it already."""
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
    except OSError as error:
        fact, rule = f"The cache {root} cannot be written", "Tokens are kept there between runs."
        remedy = "Set data.cache_dir or $TOPROPE_CACHE to a writable directory with room for the corpus."
        named = error.filename and Path(os.path.abspath(os.fsdecode(error.filename)))  # noqa: PTH100
        if named and not (named.is_relative_to(root.absolute()) or root.absolute().is_relative_to(named)):
            fact, rule, remedy = "The data cannot be prepared", "", "Mend that, and give the same command again."
        raise CorpusError(errors.of_system(error, fact, rule, remedy)) from error


def _locked(lock: FileLock, progress: ProgressCallback) -> AbstractContextManager[object]:
    while True:
        try:
            return lock.acquire(timeout=WAIT_NOTICE_SECONDS)
        except Timeout:
            progress("waiting for another process that prepares the same data", 0, None)
