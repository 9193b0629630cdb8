"""The event log: typed records of what happened in a run, one JSONL file per attempt and rank.

It is the one source of truth: console, W&B, plots, `inspect` and the fault checker read nothing else. Files are
append-only. A process may die in the middle of a line, so a torn last line is dropped on reading; damage anywhere else
is an error.
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from trainer import files
from trainer.errors import RunDirectoryError, of_system
from trainer.tomlfile import mistakes

_KINDS: dict[str, type["Event"]] = {}


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events: each class is a frozen dataclass of keyword arguments."""

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind, _KINDS[kind] = kind, cls
        dataclass(frozen=True, kw_only=True)(cls)


class AttemptStarted(Event, kind="attempt_started"):
    """A rank is about to train. One per rank and attempt."""

    world_size: int
    from_step: int
    steps: int
    fingerprint: str
    host: str
    pid: int
    device: str
    strategy: str
    parameters: int
    tokens_per_step: int
    startup_seconds: dict[str, float]  # from the start of the process to this event, by cause
    computes_with: dict[str, str] | None = None
    """Code, device and the like that this rank computes with (provenance.py); None in logs from before."""
    other_bits: Sequence[str] = ()
    """Differences between this and what the run was computed with before, which were accepted on purpose."""
    parent: str = ""
    """RUN@STEP, if this attempt took its state from another run."""
    state_from: str = ""
    """Place of the state of `from_step`: "memory" or "disk"; empty at the start, and in logs from before."""
    first_epoch_steps: int | None = None
    """Steps, from the first, whose text is read for the first time; None in logs from before it was recorded."""
    nodes: Sequence[str] = ()
    """Name of every rank's node, by rank. Rank 0 writes it; empty in logs from before, and where ranks may change."""


class StepDone(Event, kind="step"):
    """The weights of `step` are final. Written by rank 0."""

    step: int  # steps completed: the first update makes step 1
    loss: float  # mean over the step's tokens, nats per token, of the weights before the update
    grad_norm: float
    learning_rate: float
    tokens: int  # tokens trained on in this step
    seconds: float
    samples: str  # digest of the sample ids that the ranks really computed, in micro-batch order
    redone: int  # number of times the step was computed again on a coarser grid
    flushed: float | None  # share of non-zero gradient entries rounded to zero; None where it was not measured
    memory_bytes: int | None = None  # peak so far of rank 0: of its device, on CPUs of the process
    text_bytes: int | None = None
    """UTF-8 bytes that the step's targets stand for; None after the first epoch, and in logs from before."""


class RankPace(Event, kind="pace"):
    """Speed of a rank's computing, without its waiting for others. Each rank writes its own, from time to time."""

    step: int
    node: str
    seconds_per_micro_batch: float  # median over the last steps that were measured


class EvalDone(Event, kind="eval"):
    """A held-out set was scored with the weights of `step`."""

    step: int
    set: str
    loss: float  # nats per token
    bits_per_byte: float | None  # None if the tokens that were scored stand for no text
    tokens: int
    seconds: float
    digest: str  # digest of the tokens that were scored


class ChangesApplied(Event, kind="changes_applied"):
    """Islands: what they have learnt of a fragment was applied to the outer weights. Written by rank 0."""

    step: int  # after which it was applied
    sent_after: int  # step after which it was sent
    fragment: int
    bytes: int  # given by the cluster of rank 0, each tensor once for however many receive it; 0 if it is alone
    waited_seconds: float  # for which its steps waited until it had arrived


class ClusterAwaited(Event, kind="cluster_awaited"):
    """Islands that live apart: the steps have waited for a cluster that is late, or dead. Written by who waited."""

    step: int
    cluster: int
    seconds: float


class CheckpointSaved(Event, kind="checkpoint"):
    """A checkpoint was committed and verified. Rank 0 notes it when the loop next polls, so a little late."""

    step: int
    bytes: int
    seconds: float  # from the beginning of the save to its commit, most of it beside the next steps
    stall_seconds: float  # wait of the loop: for the copy in memory, and for an earlier save still under way


class CheckpointFailed(Event, kind="checkpoint_failed"):
    """A save did not become a checkpoint; training continues and earlier checkpoints are intact."""

    step: int
    reason: str
    in_a_row: int
    on_rank: int | None = None  # the rank (in quorum mode the member) that failed first; None if one was lost meanwhile
    stall_seconds: float | None = None  # wait of the loop; None where it was not measured


class CheckpointRejected(Event, kind="checkpoint_rejected"):
    """A committed checkpoint is damaged and was passed over on loading."""

    step: int
    reason: str


class NotFinite(Event, kind="not_finite"):
    """A step's loss or gradient was not finite. It was not applied; the step is computed again once."""

    step: int
    loss: float
    grad_norm: float
    trial: int  # 0 for the first computation, 1 for the second, after which the run stops


class Corrupted(Event, kind="corrupted"):
    """Ranks or recomputations disagreed on bits that must be equal. Rank 0 writes it for all."""

    step: int
    what: str
    """state, gradient (as a rank added it up), reduction (as it received it), micro_batch, update, tokens (as it read
    them), or store (of the tokens, on disk)."""
    culprit: int | None  # the rank that was wrong; None if it is unknown
    micro_batch: int | None
    parameter: str | None  # the first one that differs; None if it is unknown
    action: str
    """repaired, recomputed, reported (and applied), restarted (from the checkpoint, or one worker alone from a peer's
    state), stopped, quarantined (with its node), or excluded (it alone: the others go on in the same attempt)."""
    found: str  # one line for people
    node: str | None = None  # host of the culprit, where it is quarantined


class Hung(Event, kind="hung"):
    """A rank saw no progress for too long and ends its process. Written by the rank that noticed."""

    step: int
    point: str  # the phase that this rank is in (trainer/phases.py)
    seconds: float  # time without progress
    culprits: list[dict[str, Any]]  # ranks that hold up the others, each {rank, point, step, why}
    collective: str | None  # the pending collective, from torch's Flight Recorder
    stacks: str  # file with the stacks of this rank's threads, relative to the run directory


class MembersChanged(Event, kind="members_changed"):
    """Workers were lost or have joined, and the others went on. Written by the main member of the new epoch."""

    epoch: int
    members: list[int]  # by rank; the first one is the main member
    lost: dict[str, str]  # by member: how it was noticed
    joined: list[int]
    step: int  # completed steps of the state that they go on from
    kept: dict[str, list[int]]  # by member: micro-batches of the interrupted step whose sums were kept
    given: dict[str, list[int]]  # by member: those that were missing, and that it had to compute
    seconds: float  # from the end of the epoch before, as the main member noticed it, until they could go on
    world_size: int | None = None  # ranks: with replica groups, more than members; None in older logs


class WorkersLost(Event, kind="workers_lost"):
    """The launcher's view of what ended the attempt before this one. Written by rank 0 of the next attempt."""

    failures: list[dict[str, Any]]  # {rank, pid, exitcode, signal} of the workers that failed first
    reason: str  # one line for people


class FaultFired(Event, kind="fault_fired"):
    """A fault on purpose is about to act. In events/faults.jsonl, written by the process that makes it."""

    index: int  # position in the plan
    fault: str  # kind of the fault
    victim: int | None  # the rank that it hits; None if it hits no particular one
    step: int | None
    phase: str | None
    pid: int  # process that made the fault
    member: int | None = None  # quorum mode: the victim's number among the job's workers, by which incidents name it


class StopRequested(Event, kind="stop_requested"):
    """A signal asked this rank to save and leave."""

    signal: str
    step: int


class Warned(Event, kind="warning"):
    """Something that a person should know and that does not stop the run."""

    message: str


class AttemptEnded(Event, kind="attempt_ended"):
    """A rank left the loop in order. A rank that was killed leaves no such record."""

    status: str  # finished, preempted or failed
    step: int
    reason: str
    weights_sha256: str | None
    state_sha256: str | None


@dataclass(frozen=True)
class Entry:
    """One event, with the rank, attempt and time at which it was written."""

    attempt: int
    rank: int
    time: float  # Unix time in seconds
    event: Event


LOST_A_PEER = "lost a peer"
"""Reason in the AttemptEnded of a rank that failed only because another was gone."""


@functools.cache
def _model(cls: type[Event]) -> type[BaseModel]:
    """Return a strict model of an event's line."""
    types = typing.get_type_hints(cls)
    fields: dict[str, Any] = {"attempt": (int, ...), "rank": (int, ...), "time": (float, ...)}
    for field in dataclasses.fields(cls):
        fields[field.name] = (types[field.name], ... if field.default is dataclasses.MISSING else field.default)
    return create_model(cls.__name__, __config__=ConfigDict(strict=True, extra="forbid"), **fields)


class EventLog:
    """Appends one rank's events to its file and passes each to the subscribers in this process.

    A full disk does not end the run: bytes that could not be written are kept, and tried again with the next event and
    on closing. The file has one writer while it is open, so a line that was cut short continues where it ended.
    """

    def __init__(self, path: Path, attempt: int, rank: int, clock: Callable[[], float] = time.time) -> None:
        self._path, self._attempt, self._rank, self._clock = path, attempt, rank, clock
        self._subscribers: list[Callable[[Entry], None]] = []
        self._file: IO[bytes] | None = None
        self._unwritten = b""
        self._writing = threading.Lock()  # the watchdog reports from its own thread
        self._in_trouble = False

    @classmethod
    def open(cls, run: Path, attempt: int, rank: int) -> Self:
        return cls(path_of(run, attempt, rank), attempt, rank)

    def create(self) -> None:
        """Create the file before the first event."""
        self._write(b"")

    def subscribe(self, subscriber: Callable[[Entry], None]) -> None:
        self._subscribers.append(subscriber)

    def append(self, event: Event) -> None:
        entry = Entry(self._attempt, self._rank, self._clock(), event)
        record = {"event": event.kind, "attempt": entry.attempt, "rank": entry.rank, "time": entry.time}
        # NaN and Infinity are legal here: a loss that is not finite must not be written as something else.
        trouble = self._write(json.dumps(record | dataclasses.asdict(event)).encode() + b"\n")
        # Subscribers come after the file: what people see is on disk, if the disk takes it.
        for subscriber in self._subscribers:
            subscriber(entry)
        if trouble and not self._in_trouble:
            self._in_trouble = True  # the warning is an event too
            message = (
                f"the log {self._path} cannot be written: {trouble}. Its events are kept in memory until it can, and "
                "lost if the process dies before. Make room."
            )
            if not self._subscribers:  # else they show the warning
                print(f"rank {self._rank}: {message}", file=sys.stderr, flush=True)
            self.append(Warned(message=message))
        self._in_trouble = bool(trouble)

    def close(self) -> None:
        trouble = self._write(b"") if self._unwritten else None
        if trouble:
            lost = f"{self._unwritten.count(10)} events are lost: {self._path}: {trouble}."
            effect = "`inspect` will not know of them. The checkpoints do not depend on the log."
            print(f"rank {self._rank}: {lost}\n  {effect}", file=sys.stderr, flush=True)
        if self._file is not None:
            self._file.close()

    def _write(self, line: bytes) -> str | None:
        """Write what is waiting, then `line`. Returns the reason if some of it could not be written."""
        with self._writing:
            self._unwritten += line
            try:
                if self._file is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = open(self._path, "ab", buffering=0, opener=files.no_follow)  # noqa: SIM115
                while self._unwritten:
                    self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            except OSError as error:
                return error.strerror or str(error)
        return None


class Writer(Protocol):
    """Takes events: an `EventLog`, or what chooses one."""

    def append(self, event: Event) -> None: ...


E = TypeVar("E", bound=Event)


def select(entries: Iterable[Entry], kind: type[E], rank: int | None = None) -> list[tuple[Entry, E]]:
    """Return the entries with an event of this kind, each with its event; those of one rank if `rank` is given."""
    return [(e, e.event) for e in entries if isinstance(e.event, kind) and rank in (None, e.rank)]


def events_directory(run: Path) -> Path:
    return run / "events"


def path_of(run: Path, attempt: int, rank: int) -> Path:
    return events_directory(run) / f"attempt-{attempt:04d}-rank-{rank:05d}.jsonl"


def mend(path: Path) -> None:
    """Cut off a torn last line: the file's next writer is another process. Without a file there is nothing to do."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb+", opener=files.no_follow) as file:
        end = file.seek(0, os.SEEK_END)
        start = max(0, end - 2**20)
        file.seek(start)
        tail = file.read()
        if not tail.endswith(b"\n") and tail:
            file.truncate(start + tail.rfind(b"\n") + 1)


def to_record(event: Event) -> dict[str, Any]:
    """An event as what JSON knows, for a process that may have to write it."""
    return {"event": event.kind, **dataclasses.asdict(event)}


def from_record(record: Mapping[str, Any]) -> Event:
    return _decode({"attempt": 0, "rank": 0, "time": 0.0, **record}).event


def next_attempt(run: Path) -> int:
    """Number of the attempt that starts now, counted from the log: 0 for a new run."""
    names = _names(events_directory(run), "attempt-*-rank-*.jsonl")
    return max((int(name.split("-")[1]) for name in names), default=-1) + 1


def _names(directory: Path, pattern: str) -> list[str]:
    try:
        return files.names(directory, pattern)
    except NotADirectoryError:  # the run itself is a file, which its claim refuses
        return []
    except OSError as error:
        fact, rule = f"{directory} cannot be listed", "It holds the run's log."
        raise RunDirectoryError(of_system(error, fact, rule, "Make it readable.")) from None


class Follower:
    """Reads a run's log while it grows. Each line is returned once; a torn last line waits until it is whole.

    A poll that finds nothing new costs one stat per file. `names` is a pattern of names in RUN/events: by default the
    ranks' logs and the faults made on purpose.
    """

    def __init__(self, run: Path, names: str = "*.jsonl") -> None:
        self._directory, self._pattern = events_directory(run), names
        self._files: dict[str, _File] = {}

    def poll(self) -> list[Entry]:
        """Return what was written since the last poll, in order of attempt, then time.

        Raises RunDirectoryError on a damaged line; the next poll continues after it.
        """
        for name in _names(self._directory, self._pattern):
            if not name.startswith("."):  # ._NAME and the like, which a desktop or a copier leaves
                self._files.setdefault(name, _File(self._directory / name))
        new = [entry for file in self._files.values() for entry in file.poll()]
        return sorted(new, key=lambda e: (e.attempt, e.time, e.rank))


def read(run: Path) -> list[Entry]:
    """All events of a run in order of attempt, then time. Raises RunDirectoryError on a damaged log."""
    return Follower(run).poll()


def read_file(path: Path) -> Iterator[Entry]:
    """The events of one file in the order they were written; none where there is no file."""
    return _File(path).poll()


class _File:
    """One file of the log and how far it has been read."""

    def __init__(self, path: Path) -> None:
        self._path, self._bytes, self._lines = path, 0, 0

    def poll(self) -> Iterator[Entry]:
        try:
            if self._path.stat().st_size <= self._bytes:
                return
            with self._path.open("rb") as file:
                file.seek(self._bytes)
                *whole, _torn = file.read().split(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            rule, remedy = "It is part of the run's log.", "Make it readable, or move it away to read the rest."
            raise RunDirectoryError(of_system(error, f"{self._path} cannot be read", rule, remedy)) from None
        for line in whole:
            # Before decoding: a damaged line is reported once, not at every poll.
            self._bytes, self._lines = self._bytes + len(line) + 1, self._lines + 1
            try:
                yield _decode(files.parse_object(line.decode(errors="replace")))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RunDirectoryError(
                    f"{self._path}:{self._lines} is no event: {error}.\n"
                    "  The log is append-only; only its last line may be torn. Restore the file, or move it away to "
                    "read the rest of the run."
                ) from None


def _decode(record: dict[str, Any]) -> Entry:
    kind = record.pop("event")
    if kind not in _KINDS:
        raise ValueError(f"this toprope knows no {kind!r}; a newer one may have written it, and can read it")
    cls = _KINDS[kind]
    try:
        _model(cls).model_validate(record)
    except ValidationError as error:
        raise ValueError("; ".join(f"{wrong.where}: {wrong.rule}" for wrong in mistakes(error, record))) from None
    return Entry(record.pop("attempt"), record.pop("rank"), record.pop("time"), cls(**record))
