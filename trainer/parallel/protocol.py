"""Quorum's protocol as two machines without I/O, clock or torch: they run on sockets and in a simulation alike.

An epoch is a set of workers that compute together. It ends when one of them dies, or asks for another one; then every
living member reports what it holds, and the arbiter publishes the next epoch. parallel/README.md has it on one page.

`Arbiter` decides who the members are. `Holding` is a model of a worker's books for the random walk: which state it
has, and which micro-batches of the next step are in its partial sums. The real ones are kept by parallel/quorum.py.
"""

import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

FINISHED, PREEMPTED, FAILED, HOPELESS = "finished", "preempted", "failed", "hopeless"
"""Ways for a worker to leave. `FAILED` ends this worker alone, `HOPELESS` the job: the error would only be repeated."""
MICRO_BATCHES = "micro_batches"
"""The one key that the identity of a worker must have: how many of them a step has."""


@dataclass(frozen=True)
class Report:
    """State and sums that a worker holds, reported when it is in no epoch."""

    step: int | None = None
    """Committed steps of the state in memory; None without a whole state."""
    have: tuple[int, ...] = ()
    """Micro-batches of the step after it that are in the partial sums."""
    key: str = ""
    """The pass that the sums belong to; empty for the first pass over a step, on the grid that was committed."""
    note: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the members decide by. The arbiter passes it on unread."""


@dataclass(frozen=True)
class Epoch:
    """The workers that compute together until one dies or another joins; the same value at all of them."""

    number: int
    members: tuple[int, ...]
    """In the order of their ranks. The first one has the state, if any has, and of those that have it, it is the
    longest a member: it writes for all."""
    store: str
    """HOST:PORT of the store that the first member hosts."""
    step: int | None
    """Committed steps of the newest state; None if nobody holds one: then all restore from disk."""
    receivers: tuple[int, ...]
    """Members that take the state from the first one."""
    kept: Mapping[int, tuple[int, ...]]
    """By member: micro-batches whose sums stay. Whoever keeps none throws its sums away."""
    work: Mapping[int, tuple[int, ...]]
    """By member: micro-batches to compute in the epoch's first step. Each one is in `kept` or `work` once."""
    reports: Mapping[int, Report]
    left: Mapping[int, str]
    """By member of the epoch before: why it is no longer one. So too of those before, since a step was last committed:
    whoever was to record them may have died first."""


class Hello(NamedTuple):
    """A worker's first message. `member` is None at first, later the number that it was given."""

    member: int | None
    name: str
    """Name that its launcher gives it."""
    store: str
    identity: Mapping[str, str]
    spare: bool = False
    place: int = -1
    """Its place among its launcher's workers: its number too, if no other worker ever had it."""


class Met(NamedTuple):
    """A worker is out of its epoch and waits for the next."""

    report: Report


class Committed(NamedTuple):
    """A worker has applied a step. Not every one is told, and none after the report that follows it."""

    step: int


class Left(NamedTuple):
    """A worker is about to leave in order."""

    status: str
    reason: str


class Stuck(NamedTuple):
    """A worker's main thread makes no progress: `reached` collectives in this epoch, now at `place`."""

    reached: int
    place: str
    step: int


class Position(NamedTuple):
    """The answer to `Where`, which a thread gives while the main thread waits."""

    asked: int
    reached: int
    place: str
    step: int
    idle: float
    """Seconds since the main thread last made progress."""


class Welcome(NamedTuple):
    """A worker's number, never given twice, and what the job tells it."""

    member: int
    facts: Mapping[str, Any]


class Refused(NamedTuple):
    """A worker may not take part."""

    reason: str


class Publish(NamedTuple):
    """The next epoch, to its members."""

    epoch: Epoch


class Ended(NamedTuple):
    """An epoch is over: leave the collective, keep the sums, report."""

    number: int


class Change(NamedTuple):
    """Somebody waits to join: the members leave this epoch together after a committed step."""

    number: int


class Where(NamedTuple):
    """The arbiter asks how far this worker is."""

    asked: int


class Over(NamedTuple):
    """The job is over. To workers and launchers."""

    status: str


class Launcher(NamedTuple):
    """A launcher's first message, and again when it changes: how many workers it has."""

    node: str
    workers: int


class Gone(NamedTuple):
    """A launcher says that a worker of its has ended."""

    name: str
    why: str


class End(NamedTuple):
    """A launcher ends the job."""

    status: str
    reason: str


class Kill(NamedTuple):
    """To the launcher of a worker: end it. The arbiter counts it as dead already."""

    name: str
    why: str


class Progress(NamedTuple):
    """To launchers: the highest step that was committed, and by name the workers that are members."""

    step: int
    members: Mapping[str, int]


Message = (
    Hello | Met | Committed | Left | Stuck | Position | Welcome | Refused | Publish | Ended | Change | Where | Over
    | Launcher | Gone | End | Kill | Progress
)  # fmt: skip
MESSAGES: dict[str, Any] = {kind.__name__: kind for kind in typing.get_args(Message)}


class Send(NamedTuple):
    """Action: send a worker a message."""

    member: int
    message: Message


class Record(NamedTuple):
    """Action: make a line of the arbiter's log durable before any later action."""

    line: Mapping[str, Any]


Action = Send | Record | Kill
NOBODY = -1
"""The addressee of a refusal: the worker that has just said hello, and got no number."""


@dataclass
class Seat:
    """Facts that a worker has heard from the arbiter."""

    member: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    epoch: Epoch | None = None
    ended: bool = True
    """True if this worker must not compute in `epoch` any more."""
    change_wanted: bool = False
    """True if somebody waits to join: then leave the epoch after a committed step, all members together."""
    over: str = ""
    refused: str = ""
    fresh: bool = False
    """True if `epoch` was published and not yet entered. It may have ended meanwhile; it is entered all the same."""

    def hear(self, message: Message) -> None:
        match message:
            case Welcome(member, facts):
                self.member, self.facts = member, facts
            case Publish(epoch):
                self.epoch, self.ended, self.change_wanted, self.fresh = epoch, False, False, True
            case Ended(number) if self.epoch is not None and number == self.epoch.number:
                self.ended = True
            case Change(number) if self.epoch is not None and number == self.epoch.number:
                self.change_wanted = True
            case Over(status):
                self.over, self.ended = status, True
            case Refused(reason):
                self.refused, self.ended = reason, True

    def disconnected(self) -> None:
        """The arbiter is out of reach. Others may have gone on without this worker, so it stops."""
        self.ended = True


@dataclass
class Holding:
    """A worker's books. They say what may be reported, and what must be thrown away on entering an epoch."""

    step: int | None = None
    have: list[int] = field(default_factory=list)
    key: str = ""

    def enter(self, epoch: Epoch, member: int) -> tuple[int, ...]:
        """Enter an epoch; return the micro-batches to compute in its first step.

        A receiver holds no state until `received`. Without a state in the epoch, all restore, then call `received`.
        """
        if epoch.step is None or member in epoch.receivers:
            self.step = None
        if self.step is None or not epoch.kept.get(member):
            self.begin_again()
        return epoch.work[member]

    def received(self, step: int) -> None:
        """A whole state of `step` is in memory."""
        self.step, self.have, self.key = step, [], ""

    def added(self, micro_batch: int) -> None:
        """A micro-batch is in the partial sums."""
        self.have.append(micro_batch)

    def begin_again(self, key: str = "") -> None:
        """The partial sums were set to zero, for a pass that `key` names."""
        self.have, self.key = [], key

    def committed(self) -> None:
        """The step was applied."""
        assert self.step is not None
        self.received(self.step + 1)

    def report(self, note: Mapping[str, Any] | None = None) -> Report:
        if self.step is None:
            return Report(note=note or {})
        return Report(self.step, tuple(self.have), self.key, note or {})


def divide(missing: Iterable[int], kept: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """Deal micro-batches in turn to the members, `kept` in order of rank: those that hold fewest first.

    With nothing kept this is how World.assign_micro_batches deals.
    """
    ranks = {member: rank for rank, member in enumerate(kept)}
    load = {member: len(held) for member, held in kept.items()}
    work: dict[int, list[int]] = {member: [] for member in kept}
    for micro_batch in sorted(missing):
        least = min(load, key=lambda member: (load[member], ranks[member]))
        work[least].append(micro_batch)
        load[least] += 1
    return {member: tuple(given) for member, given in work.items()}


@dataclass
class _Worker:
    """A worker that the arbiter is connected with."""

    store: str
    spare: bool
    report: Report | None = None
    """None while it prepares or takes part in an epoch."""


@dataclass
class _Search:
    """The search for the one that holds up the others."""

    number: int
    asked_at: float
    reached: int
    """Most collectives that a member says it has reached."""
    answers: dict[int, Position] = field(default_factory=dict)


@dataclass
class Arbiter:
    """Decides who takes part. Every method is a transition: it returns what is to be done, in order."""

    wanted: int
    """Workers that shall take part; others that are ready wait as spares."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Told to every worker."""
    patience_seconds: float = 300.0
    """A worker without progress for so long holds up the others: elastic.step_timeout_seconds."""
    answer_seconds: float = 5.0
    """A worker that does not say within this time how far it is, does not run."""
    return_seconds: float = 30.0
    """A worker that has not come back so long after the arbiter was restarted is dead."""
    reserved: int = 0
    """Numbers below this one are for the first workers in these places."""
    identity: Mapping[str, str] = field(default_factory=dict)
    epoch: Epoch | None = None
    over: str = ""
    highest_step: int = 0
    names: dict[int, str] = field(default_factory=dict)
    """By number: what a worker's launcher calls it."""
    _workers: dict[int, _Worker] = field(default_factory=dict)
    _running: bool = False
    """True while the members of `epoch` compute; false while they report."""
    _left: dict[int, str] = field(default_factory=dict)
    """Members of `epoch` that are members no longer, and why."""
    _untold: dict[int, str] = field(default_factory=dict)
    """The same of earlier epochs, since a step was last committed."""
    _dead: set[int] = field(default_factory=set)
    _awaited: set[int] = field(default_factory=set)
    """Members that a restarted arbiter has not heard yet."""
    _changing: bool = False
    _ended_at: float | None = None
    _search: _Search | None = None
    _searches: int = 0

    @classmethod
    def restarted(cls, lines: Iterable[Mapping[str, Any]], now: float = 0.0, **settings: Any) -> "Arbiter":
        """Return the arbiter whose actions `Record` have left these lines. Its workers come back, or are dead."""
        arbiter = cls(**settings)
        arbiter._ended_at = now
        for line in lines:
            match line["what"]:
                case "worker":
                    arbiter.names[line["member"]] = line["name"]
                    arbiter.identity = line["identity"]
                case "epoch":
                    arbiter.epoch, arbiter._left = decode_epoch(line["epoch"]), {}
                    arbiter._untold = dict(arbiter.epoch.left)
                    arbiter.highest_step = max(arbiter.highest_step, arbiter.epoch.step or 0)
                case "lost":
                    arbiter._dead.add(line["member"])
                    if arbiter._is_member(line["member"]):
                        arbiter._left[line["member"]] = line["why"]
                case "over":
                    arbiter.over = line["status"]
        members = arbiter.epoch.members if arbiter.epoch else ()
        arbiter._awaited = {member for member in members if member not in arbiter._dead}
        return arbiter

    @property
    def awaited(self) -> tuple[int, ...]:
        """Members of the last epoch that have not come back since the arbiter was restarted."""
        return tuple(sorted(self._awaited))

    @property
    def members(self) -> tuple[int, ...]:
        """Living members of the present epoch."""
        return tuple(m for m in self.epoch.members if m in self._workers) if self.epoch else ()

    @property
    def waiting(self) -> tuple[int, ...]:
        """Workers that are ready to join, in the order in which they may."""
        ready = [m for m, w in self._workers.items() if w.report is not None and not self._is_member(m)]
        return tuple(sorted(ready, key=lambda m: (self._workers[m].spare, m)))

    # What workers say

    def hello(self, hello: Hello) -> tuple[int | None, list[Action]]:
        """Return the number of a worker that has connected, and what to do; None if it is refused, with the reason."""
        refusal = self._refusal(hello)
        if refusal:
            return None, [Send(NOBODY, Refused(refusal))]
        actions: list[Action] = []
        member = hello.member
        if member is None:
            is_free = 0 <= hello.place < self.reserved and hello.place not in self.names
            member = hello.place if is_free else max([self.reserved - 1, *self.names]) + 1
            self.identity = self.identity or dict(hello.identity)
            line = {"what": "worker", "member": member, "name": hello.name, "identity": dict(self.identity)}
            actions.append(Record(line))
        self.names[member] = hello.name
        self._awaited.discard(member)
        self._workers[member] = _Worker(hello.store, hello.spare)
        actions.append(Send(member, Welcome(member, self.facts)))
        if self.over:
            actions.append(Send(member, Over(self.over)))
        return member, actions

    def _refusal(self, hello: Hello) -> str:
        if MICRO_BATCHES not in hello.identity or not hello.identity[MICRO_BATCHES].isdecimal():
            return f"it does not say {MICRO_BATCHES}, how many of them a step has"
        for name in sorted({*self.identity, *hello.identity} if self.identity else ()):
            own, others = hello.identity.get(name), self.identity.get(name)
            if own != others:
                return f"its {name} is {own}, that of the job {others}"
        if hello.member is not None:
            if hello.member in self._dead:
                return f"worker {hello.member} was taken for dead, and the others went on without it"
            if hello.member not in self.names or hello.member in self._workers:
                return f"worker {hello.member} is not one that may come back"
        return ""

    def met(self, member: int, report: Report, now: float = 0.0) -> list[Action]:
        """A worker is out of its epoch."""
        if member not in self._workers:
            return []
        if self.over:
            return [Send(member, Over(self.over))]
        if report.step is not None and not self._is_member(member):
            return self._drop(member, "it claims to have a state, but was no member", now)
        if any(not 0 <= m < self._micro_batches for m in report.have) or len(set(report.have)) < len(report.have):
            return self._drop(member, "it claims to have micro-batches that no step has", now)
        self._workers[member].report = report
        actions = self._end(now) if self._is_member(member) else []
        return actions + self._next_epoch()

    def closed(self, member: int, why: str = "its connection closed", now: float = 0.0) -> list[Action]:
        """A worker is dead."""
        if self._workers.pop(member, None) is None and member not in self._awaited:
            return []
        self._awaited.discard(member)
        self._dead.add(member)
        actions: list[Action] = [Record({"what": "lost", "member": member, "why": why})]
        if self._is_member(member):
            self._left[member] = why
            # A member that saves or finishes with others may wait for this one.
            actions += [Send(m, Over(self.over)) for m in self.members] if self.over else self._end(now)
        return actions + self._next_epoch()

    def gone(self, name: str, why: str, now: float = 0.0) -> list[Action]:
        """A launcher says that a worker has ended: it may know before the connection closes."""
        found = [m for m, known in self.names.items() if known == name and m not in self._dead]
        return [action for m in found for action in self.closed(m, why, now)]

    def left(self, member: int, status: str, reason: str, now: float = 0.0) -> list[Action]:
        """A worker leaves in order."""
        if status == FAILED:
            return self.closed(member, reason or "it failed", now)
        self._workers.pop(member, None)
        self._dead.add(member)
        # A newcomer that was asked to stop says nothing about the others.
        return [] if status == PREEMPTED and not self._is_member(member) else self.end(status, reason)

    def committed(self, step: int) -> list[Action]:
        self.highest_step, self._untold = max(self.highest_step, step), {}
        return []

    def want(self, workers: int) -> list[Action]:
        """Another number of workers shall take part: at least one, at most one a micro-batch. Nobody is sent away."""
        self.wanted = max(workers, 1)
        return self._next_epoch()

    def end(self, status: str, reason: str = "") -> list[Action]:
        """The job is over."""
        if self.over:
            return []
        self.over = FAILED if status == HOPELESS else status
        actions: list[Action] = [Record({"what": "over", "status": self.over, "reason": reason})]
        # Members that finish or save do so together, and are left alone; an error ends all.
        told = [m for m, worker in self._workers.items() if worker.report is not None or self.over == FAILED]
        return actions + [Send(m, Over(self.over)) for m in told]

    # Who holds up the others

    def stuck(self, member: int, stuck: Stuck, now: float) -> list[Action]:
        """A member makes no progress. It may be the victim: ask all members how far they are."""
        if not self._running or self._search or self.over or not self._is_member(member):
            return []
        self._searches += 1
        self._search = _Search(self._searches, now, stuck.reached)
        return [Send(m, Where(self._searches)) for m in self.members]

    def position(self, member: int, position: Position, now: float) -> list[Action]:
        search = self._search
        if search is None or position.asked != search.number:
            return []
        search.answers[member] = position
        search.reached = max(search.reached, position.reached)
        return self.tick(now) if len(search.answers) == len(self.members) else []

    def tick(self, now: float) -> list[Action]:
        """Time has passed: end members that hold up the others."""
        if self.over:
            return []
        if not self._running:
            return self._end_silent(now)
        search = self._search
        if search is None or (now < search.asked_at + self.answer_seconds and len(search.answers) < len(self.members)):
            return []
        self._search = None
        mute = [m for m in self.members if m not in search.answers]
        idle = {m: at for m, at in search.answers.items() if at.idle > self.patience_seconds / 2}
        behind = {m: at for m, at in idle.items() if at.reached < search.reached and m in self._workers}
        actions: list[Action] = []
        for m in mute:
            actions += self._drop(m, "it does not run: it did not say how far it is", now)
        for m, at in behind.items() if not mute else ():
            actions += self._drop(m, f"it has not reached the collective of the others: {at.place}", now)
        # All wait in the same collective: nobody is to blame, so it is tried again. Else somebody is slow, and works.
        return actions or (self._end(now) if len(idle) == len(self.members) else [])

    def _end_silent(self, now: float) -> list[Action]:
        if self._ended_at is None:
            return []
        actions: list[Action] = []
        if self._awaited and now >= self._ended_at + self.return_seconds:
            for m in self.awaited:
                actions += self.closed(m, "it did not come back to the restarted arbiter", now)
        if actions or now < self._ended_at + self.patience_seconds:
            return actions
        silent = [m for m in self.members if self._workers[m].report is None]
        for m in silent if len(silent) < len(self.members) else ():
            actions += self._drop(m, "it has not left the last epoch", now)
        return actions

    def _drop(self, member: int, why: str, now: float) -> list[Action]:
        return [Kill(self.names[member], why), *self.closed(member, why, now)]

    # Epochs

    @property
    def _micro_batches(self) -> int:
        return int(self.identity[MICRO_BATCHES])

    def _is_member(self, member: int) -> bool:
        return self.epoch is not None and member in self.epoch.members

    def _end(self, now: float) -> list[Action]:
        """End the present epoch, if it has not ended: its members report."""
        if not self._running or self.epoch is None:
            return []
        self._running, self._search, self._ended_at = False, None, now
        return [Send(m, Ended(self.epoch.number)) for m in self.members if self._workers[m].report is None]

    def _next_epoch(self) -> list[Action]:
        """Publish an epoch if it is time to, or ask the members to let others in."""
        if self.over or not self.identity:
            return []
        members, waiting, wanted = self.members, self.waiting, min(self.wanted, self._micro_batches)
        if self._running and self.epoch is not None:
            if not waiting or len(members) >= wanted or self._changing:
                return []
            self._changing = True
            return [Send(m, Change(self.epoch.number)) for m in members]
        if self._awaited or any(self._workers[m].report is None for m in members):
            return []
        if not members and len(waiting) < wanted:
            return []  # the job starts, or everybody has died: all meet before they start from disk
        return self._publish(members, waiting[: max(wanted - len(members), 0)])

    def _publish(self, staying: tuple[int, ...], joining: tuple[int, ...]) -> list[Action]:
        reports = {m: self._workers[m].report or Report() for m in (*staying, *joining)}
        step = max((r.step for r in reports.values() if r.step is not None), default=None)
        newest = tuple(m for m in reports if step is not None and reports[m].step == step)
        members = newest + tuple(m for m in reports if m not in newest)
        kept = dict.fromkeys(members, ()) | {m: reports[m].have for m in newest}
        held = [micro_batch for have in kept.values() for micro_batch in have]
        # Sums of different passes do not belong together. Then all begin the step again.
        if any(reports[m].key for m in newest) or len(set(held)) < len(held):
            kept, held = dict.fromkeys(members, ()), []
        self.epoch = Epoch(
            number=self.epoch.number + 1 if self.epoch else 1,
            members=members,
            store=self._workers[members[0]].store,
            step=step,
            receivers=tuple(m for m in members if step is not None and m not in newest),
            kept=kept,
            work=divide(set(range(self._micro_batches)) - set(held), kept),
            reports=reports,
            left=self._untold | self._left,
        )
        self._untold, self.highest_step = dict(self.epoch.left), max(self.highest_step, step or 0)
        self._running, self._changing, self._left, self._ended_at = True, False, {}, None
        for m in members:
            self._workers[m].report = None
        sent = [Send(m, Publish(self.epoch)) for m in members]
        return [Record({"what": "epoch", "epoch": encode(self.epoch)}), *sent]


def encode(value: Any) -> Any:
    """Return a message, an epoch or a report as what JSON knows. A message is [its name, its fields]."""
    if isinstance(value, Epoch | Report):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if type(value).__name__ in MESSAGES and isinstance(value, tuple):
        return [type(value).__name__, [encode(part) for part in value]]
    if isinstance(value, Mapping):
        return {str(key): encode(part) for key, part in value.items()}
    return [encode(part) for part in value] if isinstance(value, list | tuple) else value


def decode(value: Any) -> Message:
    """Return the message that `encode` has made into `value`. Raises ValueError for anything else."""
    try:
        name, parts = value
        if name == "Met":
            return Met(_decode_report(*parts))
        if name == "Publish":
            return Publish(decode_epoch(*parts))
        message = MESSAGES[name](*parts)
        for part, kind in zip(message, MESSAGES[name].__annotations__.values(), strict=True):
            if not _fits(part, kind):
                raise TypeError(f"{part!r} is no {kind}")
        return message
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"no message: {error}") from None


def _fits(part: object, kind: Any) -> bool:
    """True if a part of a message is of the declared type."""
    simple = {int: int, str: str, bool: bool, float: int | float, int | None: int | None}.get(kind)
    if simple is None:
        return isinstance(part, Mapping)
    return isinstance(part, simple) and (kind is bool or not isinstance(part, bool))


def _decode_report(value: Mapping[str, Any]) -> Report:
    step, have, key = value["step"], value["have"], value["key"]
    if not _fits(step, int | None) or not isinstance(key, str) or not all(_fits(m, int) for m in have):
        raise TypeError("no report")
    return Report(step, tuple(have), key, dict(value["note"]))


def decode_epoch(value: Mapping[str, Any]) -> Epoch:
    """Return the epoch that `encode` has made into `value`."""

    def by_member(name: str) -> dict[int, tuple[int, ...]]:
        return {int(member): tuple(held) for member, held in value[name].items()}

    return Epoch(
        number=value["number"],
        members=tuple(value["members"]),
        store=value["store"],
        step=value["step"],
        receivers=tuple(value["receivers"]),
        kept=by_member("kept"),
        work=by_member("work"),
        reports={int(member): _decode_report(report) for member, report in value["reports"].items()},
        left={int(member): why for member, why in value["left"].items()},
    )
