"""Noticing that a rank makes no progress, saying which and where, and ending its process so that torchrun restarts it.

The loop calls `Watchdog.heartbeat` at every phase of a step. Two threads per rank watch beside it.
One publishes the rank's position in RUN/live and answers requests for stacks; the other ends the process when the
main thread gave no sign for too long. Both go on while the main thread waits in a collective (torch lets go of the
GIL there) or for a lock. Nobody's clock is compared with another's: a rank is alive if it answers a request.
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
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import get_ident
from time import monotonic
from typing import Any

from trainer.log.events import Hung
from trainer.phases import Phase

# In the order of a step. Only used where the Flight Recorder is off, to tell who is behind.
PHASES = (
    Phase.STARTUP, Phase.IN_LOAD,
    Phase.BEFORE_FORWARD, Phase.BEFORE_BACKWARD, Phase.BEFORE_REDUCE, Phase.AFTER_REDUCE, Phase.BEFORE_UPDATE,
    Phase.AFTER_UPDATE, Phase.WAITING_FOR_SAVE, Phase.IN_EVAL, "done",
)  # fmt: skip
ANSWER_SECONDS = 1.2  # how long the first to notice waits for the others' stacks
SECOND_SECONDS = 0.4  # how much longer the others leave it the report
LAST_RESORT_SECONDS = 1.9  # then the process ends, even if a dead file system holds up the diagnosis
POLL_SECONDS = 0.03


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has entered and not left."""

    name: str
    sequence: int
    """Number of collectives on this group so far: what ranks must agree on."""
    group: str
    sizes: str

    def __str__(self) -> str:
        return f'{self.name} #{self.sequence} of group "{self.group}", {self.sizes}'


@dataclass(frozen=True)
class RankStatus:
    """What a rank says about itself, or, if it does not answer, last said."""

    rank: int
    phase: str
    step: int
    idle: float
    """Seconds without a sign of progress."""
    answers: int
    """How much of the file of requests it has read and answered; -1 before the first."""
    recorded: bool = False
    """Whether the Flight Recorder was on, so that no pending collective means that there is none."""
    pending: Collective | None = None
    alive: bool = True


def diagnose(views: Sequence[RankStatus], limit_seconds: float) -> list[dict[str, Any]]:
    """The ranks that hold up the others, each {rank, point, step, why}; empty where that cannot be told.

    `views` are of the ranks whose position is known; `limit_seconds` is the time without progress that was too long.
    """
    silent, living = [v for v in views if not v.alive], [v for v in views if v.alive]
    waiting, outside = [v for v in living if v.pending], [v for v in living if not v.pending]
    culprits = [_silent(view, waiting) for view in silent]
    stuck = [view for view in outside if view.idle >= limit_seconds / 2]
    if any(not view.recorded for view in outside):
        return culprits or _behind(living)
    beside = f", while rank {waiting[0].rank} waits in {waiting[0].pending}" if waiting else ""
    culprits += [_culprit(v, f"has made no progress for {v.idle:.1f} s and is in no collective{beside}") for v in stuck]
    if not culprits and waiting:
        culprits = [_culprit(v, f"goes on, but is not in the collective{beside}") for v in outside]
    return culprits or _odd_ones_out(waiting)


def _culprit(view: RankStatus, why: str) -> dict[str, Any]:
    return {"rank": view.rank, "point": view.phase, "step": view.step, "why": why}


def _silent(view: RankStatus, waiting: Sequence[RankStatus]) -> dict[str, Any]:
    """A rank that cannot say where it is. What it last published may be some short steps old; but it has done all
    collectives before the one that the others wait in, so it is at their step, or still at the end of the one before.
    """
    why = "does not answer: its process is stopped or gone"
    if not waiting:
        return _culprit(view, why)
    first = min(waiting, key=lambda view: view.step)
    if view.step < first.step - 1:
        why += f"; last seen at {view.phase} of step {view.step}"
        view = replace(view, phase="unknown", step=first.step)
    return _culprit(view, f"{why}, while rank {first.rank} waits in {first.pending} at {first.phase}")


def _behind(living: Sequence[RankStatus]) -> list[dict[str, Any]]:
    """Without a Flight Recorder: the ranks at the earliest place, if not all are there."""
    places = {v.rank: (v.step, PHASES.index(v.phase)) for v in living if v.phase in PHASES}
    if len(places) < len(living) or len(set(places.values())) < 2:
        return []
    first = min(places.values())
    return [_culprit(v, "is behind the other ranks") for v in living if places[v.rank] == first]


def _odd_ones_out(waiting: Sequence[RankStatus]) -> list[dict[str, Any]]:
    """All wait: those who wait for something else than most. Whether they skipped a collective or did one too many
    makes no difference, but who is right among equals cannot be told."""

    # Not the group's name: in a hybrid mesh healthy ranks wait in different groups of one kind.
    def place(view: RankStatus) -> tuple[Any, ...]:
        pending = view.pending
        assert pending is not None
        return view.step, view.phase, pending.name, pending.sequence, pending.sizes

    counts = Counter(place(view) for view in waiting)
    if len(counts) < 2:
        return []
    usual, votes = counts.most_common(1)[0]
    if 2 * votes <= len(waiting):
        return []
    one = next(view for view in waiting if place(view) == usual)
    others = f"most ranks wait in {one.pending} at {one.phase} of step {one.step}"
    return [_culprit(v, f"waits in {v.pending}, but {others}") for v in waiting if place(v) != usual]


def pending_collective(trace: dict[str, Any]) -> Collective | None:
    """The oldest collective in a Flight Recorder trace that is not over."""
    open_entries = [e for e in trace.get("entries", []) if not e["retired"] and e["state"] != "completed"]
    if not open_entries:
        return None
    entry = min(open_entries, key=lambda entry: entry["record_id"])
    dtypes = "+".join(entry["input_dtypes"])
    group = " ".join(part for part in entry["process_group"] if part)
    return Collective(entry["profiling_name"], entry["collective_seq_id"], group, f"{dtypes} {entry['input_sizes']}")


class Watchdog:
    """Ends this rank's process when its main thread makes no progress. `start` and `heartbeat` are for that thread.

    Time in which the process itself did not run (SIGSTOP, a suspended machine) is not counted.
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
        self._files = _Files(run, rank, world_size, attempt)
        self._rank, self._alone = rank, world_size == 1
        self._step_timeout, self._startup_timeout = step_timeout_seconds, startup_timeout_seconds
        self.report, self._leave = report, leave
        self._interval = min(0.5, step_timeout_seconds / 8, startup_timeout_seconds / 8)
        self._main = get_ident()
        self._last: tuple[str, int, float] = (Phase.STARTUP, 0, monotonic())
        self._stepped = False
        self._idle = 0.0
        self._answers = -1
        self._answering = threading.Lock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def heartbeat(self, phase: str, step: int) -> None:
        """A sign of progress. Other threads' signs are ignored: theirs must not hide that the main thread is stuck."""
        if get_ident() == self._main:
            self._last = (phase, step, monotonic())
            if phase == Phase.AFTER_UPDATE:
                self._stepped = True

    def start(self) -> None:
        self._main = get_ident()
        self._last = (self._last[0], self._last[1], monotonic())
        self._files.open()
        self._files.publish(self._view())
        for target in (self._beat, self._watch):
            thread = threading.Thread(target=target, name=f"toprope-watchdog{target.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """The attempt is over: end the threads and remove the files."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._files.close()

    @property
    def _limit(self) -> float:
        return self._step_timeout if self._stepped else self._startup_timeout

    def _beat(self) -> None:
        """Publish the position and answer requests, so that a peer that hangs can tell who holds it up."""
        published, armed = None, 0.0
        while not self._stopping.wait(self._interval):
            if monotonic() - armed > self._limit / 4:
                armed = monotonic()
                self._files.arm(self._limit)
            with self._answering:
                last, requests = self._last, self._files.requests()
                if requests > self._answers and requests > 0:
                    self._answer(requests)
                elif last is not published:
                    self._files.publish(self._view())
                published = last

    def _watch(self) -> None:
        seen, woke = self._last, monotonic()
        while not self._stopping.wait(self._interval):
            now, last = monotonic(), self._last
            # After a long gap this process did not run (stopped, suspended): that is not held against it.
            ran = now - woke if now - woke < 4 * self._interval else self._interval
            self._idle = min(now - last[2], ran if last is not seen else self._idle + ran)
            seen, woke = last, now
            if self._idle >= self._limit:
                if self._gives_up(last):
                    return
                woke = monotonic()

    def _gives_up(self, last: tuple[str, int, float]) -> bool:
        """Find out why, report, leave. False if the main thread went on meanwhile: slow, but not hung."""
        last_resort = threading.Timer(LAST_RESORT_SECONDS, self._leave_without_report)
        last_resort.daemon = True
        try:
            last_resort.start()
            event = self._investigate(last)
            if event is None:
                last_resort.cancel()
                return False
            self.report(event)
        except Exception:  # whatever goes wrong here, a log that cannot be written say, the hung process must end
            traceback.print_exc()
        self._files.remove_own()
        last_resort.cancel()
        self._leave(1)
        return True

    def _investigate(self, last: tuple[str, int, float]) -> Hung | None:
        """Gather all ranks' stacks and find the culprits. None once the main thread has gone on from `last`."""
        noticed, limit = monotonic(), self._limit
        mine = self._files.request()
        with self._answering:
            own, published = self._answer(mine)
        # Where this rank cannot ask or answer, a full disk say, silence of the others means nothing.
        views = self._ask(mine, last, noticed) if mine and published else [own]
        if self._stopping.is_set() or self._last is not last:
            return None
        self._files.collect_forced_dumps()
        return Hung(
            step=last[1],
            point=last[0],
            seconds=round(self._idle + monotonic() - noticed, 3),
            culprits=diagnose([replace(v, alive=v.rank == self._rank or v.answers >= mine) for v in views], limit),
            collective=str(own.pending) if own.pending else None,
            stacks=self._files.stacks_name if self._files.stacks.exists() else "",
        )

    def _leave_without_report(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(f"rank {self._rank} hangs, and so does saying why: its process ends.", file=sys.stderr, flush=True)
        self._leave(1)

    def _ask(self, mine: int, last: tuple[str, int, float], noticed: float) -> list[RankStatus]:
        """Wait, a bounded time, until all ranks that can be seen have dumped their stacks; return what they say."""
        # When the first to notice leaves, the others' collectives fail: it alone need report.
        is_first = self._files.asked_first()
        deadline = noticed + (ANSWER_SECONDS if is_first else ANSWER_SECONDS + SECOND_SECONDS)
        while True:
            views = self._files.views()
            answered = all(view.answers >= mine or view.rank == self._rank for view in views)
            if (answered and is_first) or monotonic() > deadline or self._last is not last:
                return views
            if self._stopping.wait(POLL_SECONDS):
                return views

    def _view(self) -> RankStatus:
        phase, step, since = self._last
        idle = min(self._idle + self._interval, monotonic() - since)
        return RankStatus(self._rank, phase, step, round(idle, 3), self._answers, recorded=self._alone)

    def _answer(self, requests: int) -> tuple[RankStatus, bool]:
        """Dump stacks and Flight Recorder and publish what they say: returns that, and whether it could be written."""
        view = self._view()
        self._files.dump_stacks(
            f"rank {self._rank} at {view.phase} of step {view.step}, {view.idle} s without progress"
        )
        text = flight_recorder_trace()
        if text is not None:
            self._files.dump_trace(text)
            with contextlib.suppress(ValueError, KeyError, TypeError):  # another torch's format: then we do not know
                trace = json.loads(text)
                view = replace(view, recorded="entries" in trace or self._alone, pending=pending_collective(trace))
        self._answers = max(self._answers, requests)
        view = replace(view, answers=self._answers)
        return view, self._files.publish(view)


def flight_recorder_trace() -> bytes | None:
    """torch's record of this process's collectives, as JSON; None if torch was not imported."""
    # Never import it here: that takes seconds, and the main thread may hold the import lock.
    c10d = sys.modules.get("torch._C._distributed_c10d")
    dump = getattr(c10d, "_dump_fr_trace_json", None)
    return dump() if dump is not None else None


class _Files:
    """RUN/live: position and answers of each rank of this attempt, and requests for stacks. RUN/stacks: the dumps.

    Whoever deletes the run directory must not end the training: what cannot be written is left out.
    """

    def __init__(self, run: Path, rank: int, world_size: int, attempt: int) -> None:
        self._live, self._run, self._world_size = run / "live", run, world_size
        self._attempt, self._rank = f"attempt-{attempt:04d}", rank
        self._requests = self._live / f"{self._attempt}-requests"
        self._own = self._live / self._name(rank, "json")
        self._forced = self._live / self._name(rank, "forced")
        self._forced_file: Any = None
        self.stacks_name = f"stacks/{self._name(rank, 'txt')}"
        self.stacks = run / self.stacks_name

    def _name(self, rank: int, suffix: str) -> str:
        return f"{self._attempt}-rank-{rank:05d}.{suffix}"

    def open(self) -> None:
        """Remove what dead attempts left and make this rank visible."""
        with contextlib.suppress(OSError):
            self._live.mkdir(parents=True, exist_ok=True)
            _remove(path for path in self._live.iterdir() if not path.name.startswith(self._attempt))
            self._requests.open("ab").close()
            self._forced_file = self._forced.open("ab")

    def close(self) -> None:
        if self._forced_file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._forced_file.close()
            self._forced_file = None
        self.remove_own()
        with contextlib.suppress(OSError):
            if not list(self._live.glob(f"{self._attempt}-rank-*")):
                self._requests.unlink(missing_ok=True)
                self._live.rmdir()

    def remove_own(self) -> None:
        _remove(self._own.with_suffix(suffix) for suffix in (".json", ".forced", ".partial", ".stacks"))

    def arm(self, seconds: float) -> None:
        """Have C write the stacks, for a peer to find, should no Python thread get the GIL for so long."""
        if self._forced_file is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self._forced_file.truncate(0)
                faulthandler.dump_traceback_later(seconds, file=self._forced_file)

    def collect_forced_dumps(self) -> None:
        for rank in range(self._world_size):
            forced, stacks = self._live / self._name(rank, "forced"), self._run / "stacks" / self._name(rank, "txt")
            with contextlib.suppress(OSError):
                if forced.stat().st_size and not stacks.exists():
                    forced.replace(stacks)

    def requests(self) -> int:
        """Bytes of requests so far."""
        try:
            with self._requests.open("rb") as file:  # opened, since network file systems look at the server only then
                return os.fstat(file.fileno()).st_size
        except OSError:
            return 0

    def request(self) -> int:
        """Ask all ranks for their stacks; returns what a rank's `answers` must reach to have heard it."""
        with contextlib.suppress(OSError), self._requests.open("ab") as file:
            file.write(f"{self._rank}\n".encode())
            file.flush()
            return os.fstat(file.fileno()).st_size
        return 0

    def asked_first(self) -> bool:
        try:
            return self._requests.read_text().split("\n")[0] in (str(self._rank), "")
        except OSError:
            return True

    def publish(self, view: RankStatus) -> bool:
        return self._write(self._own, json.dumps(asdict(view)).encode())

    def views(self) -> list[RankStatus]:
        """Of all ranks that can be seen: none of another machine, unless they share the run directory."""
        views = []
        for rank in range(self._world_size):
            with contextlib.suppress(OSError, ValueError, TypeError):
                fields = json.loads((self._live / self._name(rank, "json")).read_bytes())
                pending = fields.pop("pending")
                views.append(RankStatus(**fields, pending=Collective(**pending) if pending else None))
        return views

    def dump_trace(self, trace: bytes) -> None:
        self._write(self.stacks.with_suffix(".collectives.json"), trace)

    def dump_stacks(self, about: str) -> None:
        """Every thread's stack, to the file or, should that be impossible, to stderr."""
        partial = self._own.with_suffix(".stacks")
        try:
            self.stacks.parent.mkdir(exist_ok=True)
            with partial.open("w", encoding="utf-8") as file:
                _write_stacks(about, file)
            partial.replace(self.stacks)
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                _write_stacks(about, sys.stderr)

    def _write(self, path: Path, content: bytes) -> bool:
        partial = self._own.with_suffix(".partial")
        try:
            partial.write_bytes(content)
            partial.replace(path)
        except OSError:
            _remove([partial])
            return False
        return True


def _write_stacks(about: str, file: Any) -> None:
    print(f"{about}\nprocess {os.getpid()} on {socket.gethostname()}, {time.strftime('%F %T %z')}", file=file)
    for thread in threading.enumerate():
        print(f"Thread 0x{thread.ident or 0:016x} is {thread.name}", file=file)
    print(file=file, flush=True)
    faulthandler.dump_traceback(file, all_threads=True)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
