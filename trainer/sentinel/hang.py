"""The watchdog: notices that a rank makes no progress, reports which and where, and ends its process.

torchrun then restarts all ranks. The loop calls `Watchdog.heartbeat` at every phase of a step. Two threads per rank
watch: one publishes the rank's position and answers requests for stacks; the other ends the process when the main
thread has made no progress for too long. Both run while the main thread waits for a lock or in a collective, since
torch releases the GIL there. No clocks of different ranks are compared: a rank is alive if it answers a request.

The watchdogs of an attempt's ranks exchange messages by files, and leave dumps:

    RUN/live/attempt-0000-rank-00000.json     position of the rank, and how much of the requests it has answered
             attempt-0000-rank-00000.forced   stacks written by C when no Python thread could run
             attempt-0000-requests            a line per request for all ranks' stacks; its size numbers the requests
    RUN/stacks/attempt-0000-rank-00000.txt    stacks; beside it .collectives.json, torch's Flight Recorder
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from threading import get_ident
from time import monotonic
from typing import Any, NamedTuple

from trainer import files
from trainer.log.events import Hung
from trainer.phases import Phase
from trainer.sentinel.hang_diagnosis import (
    Collective,
    RankStatus,
    diagnose,
    is_recorded,
    patience,
    pending_collective,
)

ANSWER_SECONDS = 1.2  # how long the first rank to notice waits for the others' stacks
SECOND_SECONDS = 0.4  # how much longer the others wait, so that the first can report and leave
LAST_RESORT_SECONDS = 1.9  # after this the process ends even if a dead file system holds up the diagnosis
POLL_SECONDS = 0.03


class Heartbeat(NamedTuple):
    """The main thread's last sign of progress."""

    phase: str
    step: int
    time: float  # monotonic, in seconds


class Watchdog:
    """Ends this rank's process when its main thread makes no progress. `start` and `heartbeat` are for that thread.

    Time in which the process itself did not run (SIGSTOP, a suspended machine) does not count.
    """

    def __init__(
        self,
        run: Path,
        rank: int,
        world_size: int,
        attempt: int,
        step_timeout_seconds: float,
        startup_timeout_seconds: float,
        report: Callable[[Hung], None],
        leave: Callable[[int], None] = os._exit,
        meet_rarely: bool = False,
    ) -> None:
        """`startup_timeout_seconds` holds until the first step is done. `leave` ends the process, given its status.

        `meet_rarely`: ranks may be many steps apart when they meet, so waiting for one that makes progress is no hang.
        """
        self._files = HangFiles(run, rank, world_size, attempt)
        self._rank, self._world_size, self._alone, self._meet_rarely = rank, world_size, world_size == 1, meet_rarely
        self._step_timeout, self._startup_timeout = step_timeout_seconds, startup_timeout_seconds
        self.report, self._leave = report, leave
        self._interval = min(0.5, step_timeout_seconds / 8, startup_timeout_seconds / 8)
        self._main = get_ident()
        self._last = Heartbeat(Phase.STARTUP, 0, monotonic())
        self._stepped = False
        self._idle = 0.0
        """Seconds without progress in which the process ran."""
        self._answers = -1
        self._answering = threading.Lock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def heartbeat(self, phase: str, step: int) -> None:
        """Report progress. Calls by other threads are ignored: they must not hide that the main thread is stuck."""
        if get_ident() == self._main:
            self._last = Heartbeat(phase, step, monotonic())
            if phase == Phase.AFTER_UPDATE:
                self._stepped = True

    def start(self) -> None:
        self._main = get_ident()
        self._last = self._last._replace(time=monotonic())
        self._files.open()
        self._files.publish(self._status())
        for name, target in (("publish", self._publish), ("watch", self._watch)):
            thread = threading.Thread(target=target, name=f"toprope-watchdog-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End the threads and remove the files: the attempt is over."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._files.close()

    @property
    def _limit(self) -> float:
        return self._step_timeout if self._stepped else self._startup_timeout

    def _publish(self) -> None:
        """Thread: publish this rank's position and answer requests: peers use both to find the rank at fault."""
        published, armed = None, 0.0
        while not self._stopping.wait(self._interval):
            if monotonic() - armed > self._limit / 4:
                armed = monotonic()
                self._files.arm_forced_dump(self._limit)
            with self._answering:
                last, requested = self._last, self._files.requested()
                if requested > self._answers and requested > 0:
                    self._answer(requested)
                elif last is not published:
                    self._files.publish(self._status())
                published = last

    def _watch(self) -> None:
        """Thread: measure the time without progress, and act when it exceeds the limit."""
        seen, woke = self._last, monotonic()
        while not self._stopping.wait(self._interval):
            now, last = monotonic(), self._last
            # After a long gap this process did not run (stopped, suspended): that does not count against it.
            ran = now - woke if now - woke < 4 * self._interval else self._interval
            self._idle = min(now - last.time, ran if last is not seen else self._idle + ran)
            seen, woke = last, now
            if self._idle >= self._limit:
                if self._gives_up(last):
                    return
                woke = monotonic()  # the diagnosis took time that is not the main thread's

    def _gives_up(self, last: Heartbeat) -> bool:
        """Diagnose, report and leave. False if it is no hang: this rank was slow, or waits for one that is."""
        last_resort = threading.Timer(LAST_RESORT_SECONDS, self._leave_without_report)
        last_resort.daemon = True
        try:
            last_resort.start()
            event = self._investigate(last)
            if event is None:
                last_resort.cancel()
                return False
            self.report(event)
        except Exception:  # whatever fails here, such as writing the log, the hung process must end
            traceback.print_exc()
        self._files.remove_own()
        last_resort.cancel()
        self._leave(1)
        return True

    def _investigate(self, last: Heartbeat) -> Hung | None:
        """Gather all ranks' stacks and find the culprits. None if it is no hang, or not yet."""
        noticed, limit = monotonic(), self._limit
        request = self._files.request()
        with self._answering:
            own, published = self._answer(request)
        # If this rank cannot ask or answer, e.g. on a full disk, missing answers of the others prove nothing.
        statuses = self._wait_for_answers(request, last, noticed) if request and published else [own]
        if self._stopping.is_set() or self._last is not last:
            return None
        self._files.collect_forced_dumps()
        judged = [replace(s, alive=s.rank == self._rank or s.answers >= request) for s in statuses]
        if self._meet_rarely and len(judged) == self._world_size and (left := patience(own, judged)):
            self._idle = max(0.0, limit - left)  # asks again when those that it waits for might be stuck
            return None
        return Hung(
            step=last.step,
            point=last.phase,
            seconds=round(self._idle + monotonic() - noticed, 3),
            culprits=diagnose(judged, limit),
            collective=str(own.pending) if own.pending else None,
            stacks=self._files.stacks_name if self._files.stacks.exists() else "",
        )

    def _leave_without_report(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(f"rank {self._rank} hangs, and so does its report: its process ends.", file=sys.stderr, flush=True)
        self._leave(1)

    def _wait_for_answers(self, request: int, last: Heartbeat, noticed: float) -> list[RankStatus]:
        """Wait until all ranks that can be seen have dumped their stacks, or the time is up; return their statuses."""
        # When the first rank to notice leaves, the others' collectives fail, so its report is the one that is needed.
        is_first = self._files.asked_first()
        deadline = noticed + (ANSWER_SECONDS if is_first else ANSWER_SECONDS + SECOND_SECONDS)
        while True:
            statuses = self._files.statuses()
            answered = all(status.answers >= request or status.rank == self._rank for status in statuses)
            if (answered and is_first) or monotonic() > deadline or self._last is not last:
                return statuses
            if self._stopping.wait(POLL_SECONDS):
                return statuses

    def _status(self) -> RankStatus:
        last = self._last
        idle = min(self._idle + self._interval, monotonic() - last.time)
        left = round(max(0.0, self._limit - idle), 3)
        return RankStatus(
            self._rank, last.phase, last.step, round(idle, 3), self._answers, recorded=self._alone, left_seconds=left
        )

    def _answer(self, request: int) -> tuple[RankStatus, bool]:
        """Dump stacks and Flight Recorder; publish and return this rank's status. The bool: it could be published."""
        status = self._status()
        position = f"rank {self._rank} at {status.phase} of step {status.step}"
        self._files.dump_stacks(f"{position}, {status.idle_seconds} s without progress")
        texts = flight_recorder_traces()
        if texts:
            self._files.dump_trace(texts[0] if len(texts) == 1 else b"[" + b",".join(texts) + b"]")
            # Another version of torch may write another format: then the collective is unknown.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                traces = [json.loads(text) for text in texts]
                recorded = all(map(is_recorded, traces)) or self._alone
                status = replace(status, recorded=recorded, pending=pending_collective(*traces))
        self._answers = max(self._answers, request)
        status = replace(status, answers=self._answers)
        return status, self._files.publish(status)


def flight_recorder_traces() -> list[bytes]:
    """Return torch's records of this process's collectives, as JSON; none if torch has not been imported.

    NCCL keeps one of its own. Where ranks train over NCCL, gloo's has only what they tell each other between steps.
    """
    # Importing it here would take seconds, and the main thread may hold the import lock.
    c10d = sys.modules.get("torch._C._distributed_c10d")
    traces = []
    for name in ("_dump_fr_trace_json", *(["_dump_nccl_trace_json"] if _trains_over_nccl() else [])):
        # Private to torch: another version may not have it, or ask for arguments. An empty record says "not recorded".
        try:
            traces.append(getattr(c10d, name)())
        except (AttributeError, RuntimeError, TypeError):
            traces.append(b"{}")
    return traces if c10d is not None else []


def _trains_over_nccl() -> bool:
    """True if the collectives of this process's GPU go over NCCL."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return False
    return "nccl" in str(distributed.get_backend_config())


class HangFiles:
    """The files of one rank in one attempt.

    No method raises OSError: a run directory that is deleted must not end the training.
    """

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
