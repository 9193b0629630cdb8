"""Processes of this machine as /proc shows them: their owners, their names, what they left behind.

All answers are empty where there is no /proc (macOS), for a process that is gone, and for one of another user.
"""

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROC = Path("/proc")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll `condition` until it is true or time is up. Returns its last value."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


def with_environment(entry: str) -> list[int]:
    """Processes that were started with `entry` (NAME=VALUE) in their environment."""
    pids = (int(path.name) for path in PROC.glob("[0-9]*"))
    return [pid for pid in pids if entry in _read(pid, "environ").split("\0")]


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    return dict(entry.split("=", 1) for entry in _read(pid, "environ").split("\0") if "=" in entry)


def name(pid: int) -> str:
    return _read(pid, "comm").strip()


def command_line(pid: int) -> str:
    return _read(pid, "cmdline").replace("\0", " ").strip()


def stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on: state, parent, … The name before them may hold blanks."""
    return _read(pid, "stat").rpartition(")")[2].split()


def descendants(pid: int) -> list[int]:
    """A process and all that descend from it, by `ps`: for machines without /proc."""
    listed = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
    parents = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found = [pid]
    for ancestor in found:  # the list grows while it is read
        found += [child for child, parent in parents if parent == ancestor]
    return found


def unused_shared_memory() -> set[str]:
    """Segments in /dev/shm that no living process has mapped. Those in use belong to others on this machine."""
    segments = {str(path) for path in Path("/dev/shm").glob("*")}
    maps = [_read(int(path.name), "maps") for path in PROC.glob("[0-9]*")] if segments else []
    mapped = "\n".join(line for text in maps for line in text.splitlines() if "/dev/shm/" in line)
    return {segment for segment in segments if segment not in mapped}


def _read(pid: int, file: str) -> str:
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / file).read_text(encoding="utf-8", errors="replace")
    return ""
