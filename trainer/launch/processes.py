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
    return [pid for pid in pids if entry.encode() in _read(pid, "environ").split(b"\0")]


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    entries = _read(pid, "environ").decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def name(pid: int) -> str:
    return _read(pid, "comm").decode(errors="replace").strip()


def command_line(pid: int) -> str:
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()


def stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on: state, parent, … The name before them may hold blanks."""
    return _read(pid, "stat").decode(errors="replace").rpartition(")")[2].split()


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
    if not segments:
        return segments
    maps = [_read(int(path.name), "maps").decode(errors="replace").splitlines() for path in PROC.glob("[0-9]*")]
    mapped = "\n".join(line for lines in maps for line in lines if "/dev/shm/" in line)
    return {segment for segment in segments if segment not in mapped}


def _read(pid: int, file: str) -> bytes:
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / file).read_bytes()
    return b""
