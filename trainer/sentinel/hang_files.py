"""Files by which the watchdogs of an attempt's ranks exchange messages, and the dumps that they leave.

    RUN/live/attempt-0000-rank-00000.json     position of the rank, and how much of the requests it has answered
             attempt-0000-rank-00000.forced   stacks written by C when no Python thread could run
             attempt-0000-requests            a line per request for all ranks' stacks; its size numbers the requests
    RUN/stacks/attempt-0000-rank-00000.txt    stacks; beside it .collectives.json, torch's Flight Recorder

Failed writes are ignored: a run directory that is deleted must not end the training.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer import files
from trainer.sentinel.hang_diagnosis import Collective, RankStatus


class HangFiles:
    """The files of one rank in one attempt. No method raises OSError."""

    def __init__(self, run: Path, rank: int, world_size: int, attempt: int) -> None:
        self._live, self._run, self._world_size = run / "live", run, world_size
        self._attempt, self._rank = f"attempt-{attempt:04d}", rank
        self._requests = self._live / f"{self._attempt}-requests"
        self._own = self._live / self._name(rank, "json")
        self._forced: Any = None
        self.stacks_name = f"stacks/{self._name(rank, 'txt')}"
        """Relative to the run directory."""
        self.stacks = run / self.stacks_name

    def _name(self, rank: int, suffix: str) -> str:
        return f"{self._attempt}-rank-{rank:05d}.{suffix}"

    def open(self) -> None:
        """Remove what dead attempts left and make this rank visible."""
        with contextlib.suppress(OSError):
            self._live.mkdir(parents=True, exist_ok=True)
            _remove(path for path in self._live.iterdir() if not path.name.startswith(self._attempt))
            os.close(files.no_follow(self._requests, os.O_WRONLY | os.O_CREAT))
            self._forced = open(self._own.with_suffix(".forced"), "ab", opener=files.no_follow)  # noqa: SIM115

    def close(self) -> None:
        if self._forced is not None:
            faulthandler.cancel_dump_traceback_later()
            self._forced.close()
            self._forced = None
        self.remove_own()
        with contextlib.suppress(OSError):
            if not list(self._live.glob(f"{self._attempt}-rank-*")):  # this rank is the last to leave
                self._requests.unlink(missing_ok=True)
                self._live.rmdir()

    def remove_own(self) -> None:
        _remove(self._own.with_suffix(suffix) for suffix in (".json", ".forced", ".partial", ".stacks"))

    def arm_forced_dump(self, seconds: float) -> None:
        """Have C write the stacks if no Python thread gets the GIL for so long. Each call restarts the timer."""
        if self._forced is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self._forced.truncate(0)
                faulthandler.dump_traceback_later(seconds, file=self._forced)

    def collect_forced_dumps(self) -> None:
        """Give the ranks that C has dumped, and that could not answer, their file of stacks."""
        for rank in range(self._world_size):
            forced, stacks = self._live / self._name(rank, "forced"), self._run / "stacks" / self._name(rank, "txt")
            with contextlib.suppress(OSError):
                if forced.stat().st_size and not stacks.exists():
                    forced.replace(stacks)

    def requested(self) -> int:
        """Bytes of requests so far."""
        try:
            # Opened, not only listed: network file systems ask the server only then.
            with self._requests.open("rb") as file:
                return os.fstat(file.fileno()).st_size
        except OSError:
            return 0

    def request(self) -> int:
        """Ask all ranks for their stacks. Returns what a rank's `answers` must reach; 0 if nothing can be asked."""
        with contextlib.suppress(OSError), open(self._requests, "ab", opener=files.no_follow) as file:
            file.write(f"{self._rank}\n".encode())
            file.flush()
            return os.fstat(file.fileno()).st_size
        return 0

    def asked_first(self) -> bool:
        """True if no other rank asked before this one."""
        try:
            return self._requests.read_text().split("\n")[0] in (str(self._rank), "")
        except OSError:
            return True

    def publish(self, status: RankStatus) -> bool:
        """Make this rank's status visible. False if it cannot be written."""
        return self._write(self._own, json.dumps(asdict(status)).encode())

    def statuses(self) -> list[RankStatus]:
        """Status of every rank that can be seen; on several machines, they must share the run directory for that."""
        statuses = []
        for rank in range(self._world_size):
            with contextlib.suppress(OSError, ValueError, TypeError):
                fields = files.read_object(self._live / self._name(rank, "json"))
                pending = fields.pop("pending")
                statuses.append(RankStatus(**fields, pending=Collective(**pending) if pending else None))
        return statuses

    def dump_trace(self, trace: bytes) -> None:
        self._write(self.stacks.with_suffix(".collectives.json"), trace)

    def dump_stacks(self, title: str) -> None:
        """Write every thread's stack to its file, or to stderr if that is impossible."""
        partial = self._own.with_suffix(".stacks")
        try:
            self.stacks.parent.mkdir(exist_ok=True)
            with open(partial, "w", encoding="utf-8", opener=files.no_follow) as file:
                _write_stacks(title, file)
            partial.replace(self.stacks)
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                _write_stacks(title, sys.stderr)

    def _write(self, path: Path, content: bytes) -> bool:
        # Not files.write: it waits for locks and for the disk, and both may be what hangs.
        partial = self._own.with_suffix(".partial")
        try:
            with open(partial, "wb", opener=files.no_follow) as file:
                file.write(content)
            partial.replace(path)
        except OSError:
            _remove([partial])
            return False
        return True


def _write_stacks(title: str, file: Any) -> None:
    print(f"{title}\nprocess {os.getpid()} on {socket.gethostname()}, {time.strftime('%F %T %z')}", file=file)
    for thread in threading.enumerate():  # faulthandler prints only the threads' numbers
        print(f"Thread 0x{thread.ident or 0:016x} is {thread.name}", file=file)
    print(file=file, flush=True)
    faulthandler.dump_traceback(file, all_threads=True)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
