"""A small world for quorum's protocol: workers, arbiter, connections and collectives, in any order of events.

The protocol's own machines run here; only what is outside them is imitated. A schedule is a random walk over all that
may happen next: a message arrives, a worker computes a micro-batch or reaches a collective, a collective completes at
one member and fails at another, a worker or the arbiter is killed or starts again, a worker or its main thread stops.
Then the walk goes on without further kills until nothing more can happen. Only then does the clock move: those that
wait say that they are stuck, and the arbiter's limits pass. `ViolationError` tells what must never be:

    two commits of one step with different content · a micro-batch lost or counted twice · members of one epoch in
    different collectives · a state that is not the step's it is taken for · a worker that is ended though it is well ·
    a job that is stuck

A worker may be a replica group: some processes, each of which meets those of its place in the other groups. They reach,
complete and leave a collective one by one, and then decide together. One of them may die before the others.
"""

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trainer.parallel.protocol import (
    FINISHED,
    NOBODY,
    Arbiter,
    Committed,
    Epoch,
    Hello,
    Holding,
    Kill,
    Left,
    Met,
    Position,
    Publish,
    Record,
    Seat,
    Send,
    Stuck,
    Where,
)  # fmt: skip

EOF = None
MOST_EVENTS = 4000


class ViolationError(AssertionError):
    """Something happened that the protocol promises never to happen."""


@dataclass(frozen=True)
class Size:
    """Size of a simulated world, and the faults that may strike it."""

    workers: int = 3
    spares: int = 0
    group: int = 1
    """Processes that are one worker."""
    micro_batches: int = 4
    steps: int = 3
    kills: int = 3
    kill_chance: float = 0.15
    """The smaller, the later in the job they come."""
    arbiter_kills: int = 0
    stops: int = 0
    overflowing: frozenset[int] = frozenset()
    """Steps whose first pass does not fit the grid."""


@dataclass
class Collective:
    """Contributions of an epoch's members to one collective."""

    kind: tuple[Any, ...]
    brought: dict[int, Any] = field(default_factory=dict)
    found: int = 0
    """The newest step on disk, as they find it when they restore together."""


@dataclass
class Process:
    """A worker's process."""

    slot: int
    seat: Seat = field(default_factory=Seat)
    holding: Holding = field(default_factory=Holding)
    alive: bool = True
    connected: bool = False
    doing: str = "start"
    todo: list[int] = field(default_factory=list)
    spare: bool = False
    round: int = 0
    """Collectives completed in this epoch."""
    places: dict[int, str] = field(default_factory=dict)
    """In a collective: by place, how far that process of the group is: "before", "inside", "passed" or "failed"."""
    brings: tuple[Any, ...] = ()
    dead_place: int | None = None
    """A process of the group that has died before the others."""
    stopped: str = ""
    """Part that does not run: "process" (the first one), "main thread" of it, or "place" (another one of the group)."""
    given_up: bool = False
    """The arbiter takes it for dead, and nobody has ended it."""
    reached: int = 0
    """Collectives that its first process has reached in this epoch."""
    flag: bool = False
    first: bool = True
    """True in the epoch's first step, whose division the epoch gives."""
    up: deque[Any] = field(default_factory=deque)
    down: deque[Any] = field(default_factory=deque)

    @property
    def epoch(self) -> Epoch:
        assert self.seat.epoch is not None
        return self.seat.epoch

    @property
    def member(self) -> int:
        assert self.seat.member is not None
        return self.seat.member


class World:
    """One schedule."""

    def __init__(
        self, seed: int, size: Size, arbiter: type[Arbiter] = Arbiter, holding: Callable[[], Holding] = Holding
    ) -> None:
        self.random, self.size, self.make_arbiter, self.make_holding = random.Random(seed), size, arbiter, holding
        self.lines: list[Any] = []
        self.arbiter: Arbiter | None = arbiter(wanted=size.workers, reserved=size.workers)
        self.kills, self.arbiter_kills = size.kills, size.arbiter_kills
        self.disk = 0
        self.commits: dict[int, tuple[Any, ...]] = {}
        self.collectives: dict[tuple[int, int, int], Collective] = {}
        """By epoch, round and place."""
        self.gone: dict[tuple[int, int], set[int]] = {}
        """By epoch and place: members whose process there has died, or left its group."""
        self.workers: list[Process] = []
        self.by_member: dict[int, Process] = {}
        self.exits: list[tuple[Process, str]] = []
        """Ends that the launcher knows: processes that have ended, and the status of those that left in order."""
        self.told = 0
        """Number of `exits` that the arbiter has heard of."""
        self.events, self.now = 0, 0.0
        self.stops = size.stops
        self.happened = Counter[str]()
        """Counts of what has happened, by name."""
        self.trace: list[tuple[Any, ...]] = []
        """The events so far, for a person who looks into a violation."""
        for slot in range(size.workers + size.spares):
            self.start(slot, spare=slot >= size.workers)

    # The processes around the protocol

    def start(self, slot: int, spare: bool = False) -> None:
        self.workers.append(Process(slot, holding=self.make_holding(), spare=spare))

    def kill(self, worker: Process) -> None:
        self.happened[f"killed while {worker.doing}"] += 1
        worker.alive = False
        worker.down.clear()
        if worker.connected:
            worker.up.append(EOF)
        self.leave_group(worker)
        self.exits.append((worker, ""))
        self.start(worker.slot, worker.spare)

    def leave_group(self, worker: Process, *places: int) -> None:
        """Some processes of a worker, or all, let go of the others in their places."""
        if worker.seat.epoch is not None and worker.seat.member in worker.epoch.members:
            for place in places or range(self.size.group):
                self.gone.setdefault((worker.epoch.number, place), set()).add(worker.member)

    def kill_arbiter(self) -> None:
        self.happened["arbiter killed"] += 1
        self.arbiter = None
        self.by_member.clear()
        for worker in self.workers:
            if worker.connected:
                worker.up.clear()
                worker.down.append(EOF)

    def restart_arbiter(self) -> None:
        settings = {"wanted": self.size.workers, "reserved": self.size.workers}
        self.arbiter = self.make_arbiter.restarted(self.lines, self.now, **settings)
        self.told = 0

    def do(self, actions: list[Any], talking: Process | None = None) -> None:
        for action in actions:
            match action:
                case Record(line):
                    self.lines.append(line)
                case Send(member, message):
                    worker = talking if member == NOBODY else self.by_member.get(member, talking)
                    if worker is not None and worker.alive and worker.connected:
                        worker.down.append(message)
                case Kill(name, why):
                    worker = self.workers[int(name)]
                    if not worker.stopped and worker.dead_place is None:
                        raise ViolationError(f"worker {name} is ended although it neither lies nor hangs: {why}")
                    self.by_member.pop(worker.member, None)
                    worker.connected = False
                    self.kill(worker)

    def name(self, worker: Process) -> str:
        return str(self.workers.index(worker))

    # What may happen next

    def enabled(self) -> list[tuple[Any, ...]]:
        choices: list[tuple[Any, ...]] = []
        arbiter = self.arbiter
        for worker in self.workers:
            if worker.up and arbiter is not None:
                choices.append((self.deliver_up, worker))
            if not worker.alive or worker.doing == "left":
                continue
            if worker.down and worker.stopped != "process":
                choices.append((self.deliver_down, worker))
            choices += self.enabled_at(worker)
            if self.kills and arbiter is not None and worker.dead_place is None:
                choices.append((self.chance_to_kill, worker))
            if self.stops and self.may_stop(worker):
                choices.append((self.chance_to_stop, worker))
        if arbiter is None:
            choices.append((self.restart_arbiter,))
        elif self.told < len(self.exits):
            choices.append((self.tell_exit,))
        if arbiter is not None and self.arbiter_kills and self.random.random() < 0.02:
            choices.append((self.chance_to_kill_arbiter,))
        return choices

    def enabled_at(self, worker: Process) -> list[tuple[Any, ...]]:
        seat = worker.seat
        runs = worker.stopped in ("", "place")
        if worker.dead_place is not None:  # the others of its group cannot decide anything without it
            inside = self.enabled_inside(worker) if runs else []
            return [*inside, *([(self.kill, worker)] if self.arbiter is not None else [])]
        if worker.stopped:
            return self.enabled_inside(worker) if runs else []
        if not worker.connected:
            return [(self.connect, worker)] if self.arbiter is not None else []
        if seat.over or seat.refused:
            return [(self.leave, worker)]
        if worker.doing == "start":
            return [(self.meet, worker)] if seat.member is not None else []
        if worker.doing == "waiting":
            return [(self.enter, worker)] if seat.fresh else []
        if worker.places:
            return self.enabled_inside(worker)
        return [(self.meet, worker)] if seat.ended else [(self.work, worker)]

    def enabled_inside(self, worker: Process) -> list[tuple[Any, ...]]:
        """Return what the processes of a worker may do in a collective, each for itself."""
        choices: list[tuple[Any, ...]] = []
        for place, state in worker.places.items():
            stopped = worker.stopped == "place" and place == self.size.group - 1
            if stopped or place == worker.dead_place or state not in ("before", "inside"):
                continue
            if state == "before":
                choices.append((self.reach, worker, place))
            elif len(self.collective(worker, place).brought) == len(worker.epoch.members):
                choices.append((self.over, worker, place, "passed"))
            if worker.seat.ended or self.gone.get((worker.epoch.number, place)):
                choices.append((self.over, worker, place, "failed"))
        return choices

    def collective(self, worker: Process, place: int) -> Collective:
        return self.collectives[worker.epoch.number, worker.round, place]

    def step(self) -> bool:
        choices = self.enabled()
        if not choices:
            return False
        self.events += 1
        act, *arguments = self.random.choice(choices)
        self.trace.append((act.__name__, *(a.slot if isinstance(a, Process) else a for a in arguments)))
        if not act.__name__.startswith("chance_to"):
            self.happened[act.__name__] += 1
        act(*arguments)
        return True

    # Events

    def chance_to_kill(self, worker: Process) -> None:
        if self.random.random() < self.size.kill_chance:
            self.kills -= 1
            # The process that is connected with the arbiter takes the others with it; another one is missed first.
            place = self.random.randrange(self.size.group)
            if place:
                worker.dead_place = place
                self.happened["a process of a group killed before the others"] += 1
                self.leave_group(worker, place)
            else:
                self.kill(worker)

    def may_stop(self, worker: Process) -> bool:
        """True for a member at work, if another one runs: the last one that runs has nobody to notice it."""
        others = (w for w in self.workers if w is not worker and self.is_at_work(w))
        return self.is_at_work(worker) and any(others)

    def is_at_work(self, worker: Process) -> bool:
        busy = worker.doing in ("restoring", "computing", "committing", "finishing")
        return worker.alive and busy and not worker.stopped and worker.dead_place is None

    def chance_to_stop(self, worker: Process) -> None:
        if self.random.random() < 0.1:
            self.stops -= 1
            worker.stopped = self.random.choice(["process", "main thread", "place"][: 3 if self.size.group > 1 else 2])
            self.happened[f"stopped: {worker.stopped}"] += 1

    def pass_time(self) -> bool:
        """Nothing more happens until a limit has passed. Returns False if then nothing happens either."""
        arbiter = self.arbiter
        if arbiter is None or not any(w.alive and w.stopped for w in self.workers):
            return False
        before = self.traffic()
        for member, worker in list(self.by_member.items()):
            # A thread of its own speaks for the first process.
            if worker.alive and worker.stopped != "process" and worker.doing != "waiting" and not worker.seat.ended:
                self.do(arbiter.stuck(member, Stuck(worker.reached, worker.doing, 0), self.now))
        for limit in (arbiter.answer_seconds, arbiter.return_seconds, arbiter.patience_seconds):
            if self.traffic() != before:
                return True
            self.now += limit
            awaited = {*arbiter.awaited}
            self.do(arbiter.tick(self.now))
            for worker in self.workers:
                worker.given_up |= worker.seat.member in awaited - {*arbiter.awaited}
        if self.traffic() == before:
            if not arbiter.over and any(not self.by_member[m].stopped for m in arbiter.members):
                return False  # a member that runs waits for one that does not, and nobody notices
            for worker in self.workers:  # none runs: whoever stopped them lets them go on
                worker.stopped = ""
        return True

    def traffic(self) -> tuple[int, ...]:
        assert self.arbiter is not None
        return (*(len(w.down) for w in self.workers), len(self.lines), self.arbiter._searches, len(self.exits))

    def chance_to_kill_arbiter(self) -> None:
        self.arbiter_kills -= 1
        self.kill_arbiter()

    def tell_exit(self) -> None:
        worker, status = self.exits[self.told]
        self.told += 1
        assert self.arbiter is not None
        self.do(self.arbiter.end(status) if status else self.arbiter.gone(self.name(worker), "it was killed"))

    def deliver_up(self, worker: Process) -> None:
        assert self.arbiter is not None
        message, arbiter = worker.up.popleft(), self.arbiter
        if isinstance(message, Hello):
            member, actions = arbiter.hello(message)
            if member is not None:
                self.by_member[member] = worker
            self.do(actions, worker)
            return
        member = next((m for m, w in self.by_member.items() if w is worker), None)
        if member is None:
            return
        match message:
            case None:
                del self.by_member[member]
                self.do(arbiter.closed(member, now=self.now), worker)
            case Met(report):
                self.do(arbiter.met(member, report, self.now), worker)
            case Committed(step):
                self.do(arbiter.committed(step), worker)
            case Left(status, reason):
                self.do(arbiter.left(member, status, reason, self.now), worker)
            case Position():
                self.do(arbiter.position(member, message, self.now), worker)

    def deliver_down(self, worker: Process) -> None:
        message = worker.down.popleft()
        if message is EOF:
            worker.connected = False
            worker.down.clear()
            worker.seat.disconnected()
            if worker.doing == "waiting" and not worker.seat.fresh:
                worker.doing = "start"  # it reports once more
            return
        if isinstance(message, Where):
            idle = self.make_arbiter.patience_seconds
            worker.up.append(Position(message.asked, worker.reached, worker.doing, 0, idle))
            return
        worker.seat.hear(message)
        if isinstance(message, Publish):
            worker.reached = 0
            if worker.doing != "waiting":
                raise ViolationError(f"worker {worker.member} is in an epoch already")
        if worker.seat.refused and not worker.given_up:
            raise ViolationError(f"refused: {worker.seat.refused}")

    def connect(self, worker: Process) -> None:
        worker.connected = True
        identity = {"micro_batches": str(self.size.micro_batches)}
        worker.up.append(
            Hello(worker.seat.member, self.name(worker), self.name(worker), identity, worker.spare, worker.slot)
        )

    def meet(self, worker: Process) -> None:
        self.leave_group(worker)
        worker.places = {}
        worker.doing = "waiting"
        worker.seat.ended = True
        worker.up.append(Met(worker.holding.report()))

    def leave(self, worker: Process) -> None:
        self.leave_group(worker)
        worker.doing = "left"
        if worker.seat.refused:
            worker.alive = False
            self.exits.append((worker, ""))
            self.start(worker.slot, worker.spare)
            return
        self.exits.append((worker, worker.seat.over or FINISHED))
        if worker.connected:
            worker.up.append(EOF)

    def enter(self, worker: Process) -> None:
        epoch, worker.seat.fresh = worker.epoch, False
        worker.round, worker.places, worker.flag, worker.first = 0, {}, False, True
        work = worker.holding.enter(epoch, worker.member)
        if epoch.step is None or epoch.receivers:
            worker.doing = "restoring"
        elif epoch.step == self.size.steps:
            worker.doing = "finishing"
        else:
            worker.doing, worker.todo = "computing", list(work)

    def work(self, worker: Process) -> None:
        """The worker's next event of its own: a micro-batch, or the way to a collective begins."""
        if worker.doing == "computing" and worker.todo:
            worker.holding.added(worker.todo.pop(0))
            return
        if worker.doing == "committing":
            self.commit(worker)
            return
        kinds = {
            "restoring": ("state", worker.epoch.step),
            "computing": ("reduce", worker.holding.step, worker.holding.key),
            "finishing": ("finish", worker.holding.step),
        }
        # A group adds up what its processes have, and whether its first one heard that somebody waits.
        have, flag = tuple(worker.holding.have), worker.seat.change_wanted
        worker.brings = (kinds[worker.doing], worker.holding.step, have, flag)
        worker.places = dict.fromkeys(range(self.size.group), "before")

    def reach(self, worker: Process, place: int) -> None:
        """A process of the worker enters the collective of its place."""
        kind, *brought = worker.brings
        at = self.collectives.setdefault((worker.epoch.number, worker.round, place), Collective(kind, found=self.disk))
        if at.kind != kind:
            raise ViolationError(f"worker {worker.member} is at {kind} while others are at {at.kind}")
        at.brought[worker.member] = tuple(brought)
        worker.places[place] = "inside"
        worker.reached += place == 0

    def over(self, worker: Process, place: int, how: str) -> None:
        """The collective is over for a process of the worker. With the last one all decide: it has passed, or not."""
        worker.places[place] = how
        if not {*worker.places.values()} & {"before", "inside"}:
            if "failed" in worker.places.values():
                self.meet(worker)
            else:
                self.complete(worker, self.collective(worker, 0))

    def complete(self, worker: Process, collective: Collective) -> None:
        worker.places, worker.round = {}, worker.round + 1
        epoch, holding = worker.epoch, worker.holding
        match collective.kind:
            case ("state", step):
                source = collective.found if step is None else collective.brought[epoch.members[0]][0]
                if step not in (None, source):
                    raise ViolationError(f"a state of step {source} is taken for one of step {step}")
                if step is None or worker.member in epoch.receivers:
                    self.happened["state from disk" if step is None else "state from a peer"] += 1
                    holding.received(source)
                worker.todo = list(epoch.work[worker.member])
                worker.doing = "finishing" if source == self.size.steps else "computing"
            case ("finish", _):
                if worker.connected:
                    worker.up.append(Left(FINISHED, ""))
                self.leave(worker)
            case ("reduce", step, key):
                content = sorted(m for _, have, _ in collective.brought.values() for m in have)
                worker.flag = any(flag for _, _, flag in collective.brought.values())
                if step in self.size.overflowing and not key:
                    self.happened["grid widened"] += 1
                    holding.begin_again("wider")
                    worker.todo, worker.first = self.share(worker), False
                    return
                if content != list(range(self.size.micro_batches)):
                    raise ViolationError(f"step {step} would be made of micro-batches {content}")
                worker.doing = "committing"

    def share(self, worker: Process) -> list[int]:
        """An ordinary division of a step over the members."""
        members = worker.epoch.members
        return list(range(members.index(worker.member), self.size.micro_batches, len(members)))

    def commit(self, worker: Process) -> None:
        holding = worker.holding
        holding.committed()
        assert holding.step is not None
        if self.random.random() < 0.5:  # a thread tells it now and then
            worker.up.append(Committed(holding.step))
        worker.first = False
        if worker.epoch.members[0] == worker.member and self.random.random() < 0.5:
            self.disk = max(self.disk, holding.step)
        if worker.flag:
            self.meet(worker)
        elif holding.step == self.size.steps:
            worker.doing = "finishing"
        else:
            worker.doing, worker.todo = "computing", self.share(worker)

    def run(self) -> "World":
        while self.step() or self.pass_time():
            if self.events > MOST_EVENTS:
                raise ViolationError("the job does not come to an end")
        assert self.arbiter is not None
        left = [w for w in self.workers if w.alive and w.doing != "left"]
        if self.arbiter.over != FINISHED or left:
            doing = [(w.doing, w.connected, w.seat.ended, w.holding.report()) for w in left]
            raise ViolationError(f"stuck: over={self.arbiter.over!r}, {doing}, arbiter {self.arbiter}")
        return self


def random_size(seed: int) -> Size:
    """Return a world for a seed; the walk through it takes the same seed."""
    draw = random.Random(f"size {seed}")
    return Size(
        workers=draw.randint(1, 4),
        spares=draw.randint(0, 1),
        micro_batches=draw.randint(4, 6),
        steps=draw.randint(1, 3),
        kills=draw.randint(0, 6),
        kill_chance=draw.choice((0.15, 0.02)),
        arbiter_kills=draw.randint(0, 2),
        stops=draw.choice((0, 0, 1, 2)),
        overflowing=frozenset(step for step in range(3) if draw.random() < 0.3),
        group=draw.choice((1, 1, 2, 3)),
    )
