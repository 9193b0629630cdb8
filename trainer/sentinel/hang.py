"""The watchdog: notices that a rank makes no progress, reports which and where, and ends its process.

torchrun then restarts all ranks. The loop calls `Watchdog.heartbeat` at every phase of a step. Two threads per rank
watch: one publishes the rank's position and answers requests for stacks; the other ends the process when the main
thread has made no progress for too long. Both run while the main thread waits for a lock or in a collective, since
torch releases the GIL there. No clocks of different ranks are compared: a rank is alive if it answers a request.
"""

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import get_ident
from time import monotonic
from typing import NamedTuple

from trainer.log.events import Hung
from trainer.phases import Phase
from trainer.sentinel.hang_diagnosis import RankStatus, diagnose, pending_collective
from trainer.sentinel.hang_files import HangFiles

ANSWER_SECONDS = 1.2  # how long the first rank to notice waits for the others' stacks
SECOND_SECONDS = 0.4  # how much longer the others wait, so that the first can report and leave
LAST_RESORT_SECONDS = 1.9  # after this the process ends even if a dead file system holds up the diagnosis
POLL_SECONDS = 0.03


class Heartbeat(NamedTuple):
    """The main thread's last sign of progress."""

    phase: str
    step: int
    time: float
    """Monotonic, in seconds."""


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
    ) -> None:
        """`startup_timeout_seconds` holds until the first step is done. `leave` ends the process, given its status."""
        self._files = HangFiles(run, rank, world_size, attempt)
        self._rank, self._alone = rank, world_size == 1
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
        """Diagnose, report and leave. False if the main thread made progress meanwhile: it was slow, but not hung."""
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
        """Gather all ranks' stacks and find the culprits. None if the main thread has made progress since `last`."""
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
        return RankStatus(self._rank, last.phase, last.step, round(idle, 3), self._answers, recorded=self._alone)

    def _answer(self, request: int) -> tuple[RankStatus, bool]:
        """Dump stacks and Flight Recorder; publish and return this rank's status. The bool: it could be published."""
        status = self._status()
        position = f"rank {self._rank} at {status.phase} of step {status.step}"
        self._files.dump_stacks(f"{position}, {status.idle_seconds} s without progress")
        text = flight_recorder_trace()
        if text is not None:
            self._files.dump_trace(text)
            # Another version of torch may write another format: then the collective is unknown.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                trace = json.loads(text)
                status = replace(status, recorded="entries" in trace or self._alone, pending=pending_collective(trace))
        self._answers = max(self._answers, request)
        status = replace(status, answers=self._answers)
        return status, self._files.publish(status)


def flight_recorder_trace() -> bytes | None:
    """Return torch's record of this process's collectives, as JSON; None if torch has not been imported."""
    # Importing it here would take seconds, and the main thread may hold the import lock.
    c10d = sys.modules.get("torch._C._distributed_c10d")
    dump = getattr(c10d, "_dump_fr_trace_json", None)
    return dump() if dump is not None else None
