"""A place for checkpoints in this machine's memory. What lies there outlives the processes of a job, not the machine.

    /dev/shm/toprope-0a1b…/run              path of the run's directory
                           token            drawn at each start: ranks that read the same one share this memory
                           checkpoints/     as in the run's directory: step-00000037/

No torch here: launchers import it.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from pathlib import Path

from trainer.errors import meaning

ROOT = Path("/dev/shm")
"""A file system in memory; Linux has it."""
ABANDONED_SECONDS = 3600.0
"""After so long without a copy, the place of a run that is not there any more is removed by any other start."""
SHARE = 0.5
"""Share of the memory free there that may be used: other programs share it, and crash when it is full."""
COPIES = 2
"""So many lie there at once: the newest one, and the one that is being written."""
_NAME = re.compile(r"toprope-[0-9a-f]{16}(?:\.[0-9a-f]{8}\.removed)?")


def place(run: Path, run_id: str) -> Path:
    """The place of a run. A copy of the run's directory has another one: its jobs may train at the same time."""
    digest = hashlib.sha256(f"{run_id} {run.resolve()}".encode()).hexdigest()
    return ROOT / f"toprope-{digest[:16]}"


def prepare(path: Path, run: Path, needed: int) -> str | None:
    """Make the place `path` of `run`, or take over what an earlier job left there; give it a new token.

    `needed` are the bytes of one copy. Returns why there can be no copies, as part of a sentence; None if there can.
    """
    try:
        if not ROOT.is_dir():
            return f"this machine has no {ROOT}"
        _remove_orphans()
        path.mkdir(mode=0o700, exist_ok=True)
        if not _is_own(path):  # whoever can write there could choose our weights
            return f"{path} is no directory of this user"
        free = shutil.disk_usage(ROOT).free + sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if COPIES * needed > SHARE * free:
            megabytes = f"{COPIES * needed / 1e6:,.1f} MB, more than half of the {free / 1e6:,.1f} MB"
            return f"{COPIES} copies take {megabytes} that are free in {ROOT}"
        (path / "run").write_text(str(run.resolve()), encoding="utf-8")
        (path / "token").write_text(secrets.token_hex(8), encoding="utf-8")
    except OSError as error:
        return f"{path} cannot be written ({error.strerror}). {meaning(error)}".removesuffix(".")
    return None


def run_of(path: Path) -> Path | None:
    """The directory of the run whose place this is; None if it is no place, or is being made or removed."""
    try:
        return Path((path / "run").read_text(encoding="utf-8")) if _NAME.fullmatch(path.name) else None
    except (OSError, ValueError):
        return None


def token(path: Path) -> str | None:
    """The token that rank 0 has written, as this process sees it; None if it sees none."""
    try:
        return (path / "token").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def discard(path: Path) -> None:
    """Remove a place, at once for everybody who writes to it; errors are ignored."""
    if not _NAME.fullmatch(path.name) or not _is_own(path):
        return
    doomed = path.with_name(f"{path.name[:24]}.{secrets.token_hex(4)}.removed")
    with contextlib.suppress(OSError):
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _remove_orphans() -> None:
    """Remove the places of runs that are no longer there, and what a process that died left while removing."""
    for path in ROOT.glob("toprope-*"):
        with contextlib.suppress(OSError, ValueError):
            if path.name.endswith(".removed"):
                discard(path)
                continue
            has_run = Path((path / "run").read_text(encoding="utf-8")).is_dir()
            written = max(entry.stat().st_mtime for entry in (path / "token", path / "checkpoints") if entry.exists())
            # A run may be invisible here and train all the same: in another container that shares this memory.
            if not has_run and time.time() - written >= ABANDONED_SECONDS:
                discard(path)


def _is_own(path: Path) -> bool:
    """True for a directory, not a link, of this user."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
