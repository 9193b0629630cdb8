"""A small world for quorum's protocol: workers, arbiter, connections and collectives, in any order of events.

The protocol's own machines run here; only what is outside them is imitated. A schedule is a random walk over all that
may happen next: a message arrives, a worker computes a micro-batch or reaches a collective, a collective completes at
one member and fails at another, a worker or the arbiter is killed or starts again. Then the walk goes on without
further kills until nothing more can happen. `ViolationError` tells what must never be:

    two commits of one step with different content · a micro-batch lost or counted twice · members of one epoch in
    different collectives · a state that is not the step's it is taken for · a worker that is ended though it is well ·
    a job that is stuck
"""

import random
from collections import deque
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
    Publish,
    Record,
    Seat,
    Send,
)  # fmt: skip

EOF = None
MOST_EVENTS = 4000


class ViolationError(AssertionError):
    """Something happened that the protocol promises never to happen."""


@dataclass(frozen=True)
class Size:
    """How large a world is."""

    workers: int = 3
    spares: int = 0
    micro_batches: int = 4
    steps: int = 3
    kills: int = 3
    arbiter_kills: int = 0
    overflowing: frozenset[int] = frozenset()
    """Steps whose first pass does not fit the grid."""


@dataclass
class Collective:
    """What the members of an epoch have brought to one collective."""

    kind: tuple[Any, ...]
    brought: dict[int, Any] = field(default_factory=dict)


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
    inside: bool = False
    """True if it has reached the next collective and not left it."""
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
        self.collectives: dict[tuple[int, int], Collective] = {}
        self.gone: dict[int, set[int]] = {}
        """By epoch: members that died or left its group."""
        self.workers: list[Process] = []
        self.by_member: dict[int, Process] = {}
        self.exits: list[tuple[Process, str]] = []
        """What the launcher knows: processes that have ended, and the status of those that left in order."""
        self.told = 0
        """How many of them the arbiter has heard of."""
        self.events = 0
        self.trace: list[tuple[Any, ...]] = []
        """The events so far, for a person who looks into a violation."""
        for slot in range(size.workers + size.spares):
            self.start(slot, spare=slot >= size.workers)

    # The processes around the protocol

    def start(self, slot: int, spare: bool = False) -> None:
        self.workers.append(Process(slot, holding=self.make_holding(), spare=spare))

    def kill(self, worker: Process) -> None:
        worker.alive = False
        worker.down.clear()
        if worker.connected:
            worker.up.append(EOF)
        self.leave_group(worker)
        self.exits.append((worker, ""))
        self.start(worker.slot, worker.spare)

    def leave_group(self, worker: Process) -> None:
        worker.inside = False
        if worker.seat.epoch is not None and worker.seat.member in worker.epoch.members:
            self.gone.setdefault(worker.epoch.number, set()).add(worker.member)

    def kill_arbiter(self) -> None:
        self.arbiter = None
        self.by_member.clear()
        for worker in self.workers:
            if worker.connected:
                worker.up.clear()
                worker.down.append(EOF)

    def restart_arbiter(self) -> None:
        settings = {"wanted": self.size.workers, "reserved": self.size.workers}
        self.arbiter = self.make_arbiter.restarted(self.lines, **settings)
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
                    raise ViolationError(f"worker {name} is ended although it neither lies nor hangs: {why}")

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
            if worker.down:
                choices.append((self.deliver_down, worker))
            choices += self.enabled_at(worker)
            if self.kills and arbiter is not None:
                choices.append((self.chance_to_kill, worker))
        if arbiter is None:
            choices.append((self.restart_arbiter,))
        elif self.told < len(self.exits):
            choices.append((self.tell_exit,))
        if arbiter is not None and self.arbiter_kills and self.random.random() < 0.02:
            choices.append((self.chance_to_kill_arbiter,))
        return choices

    def enabled_at(self, worker: Process) -> list[tuple[Any, ...]]:
        seat = worker.seat
        if not worker.connected:
            return [(self.connect, worker)] if self.arbiter is not None else []
        if seat.over or seat.refused:
            return [(self.leave, worker)]
        if worker.doing == "start":
            return [(self.meet, worker)] if seat.member is not None else []
        if worker.doing == "waiting":
            return [(self.enter, worker)] if seat.fresh else []
        if seat.ended:
            return [(self.meet, worker)]  # whatever it does: it leaves the collective
        if not worker.inside:
            return [(self.work, worker)]
        number, everyone = worker.epoch.number, worker.epoch.members
        collective = self.collectives[number, worker.round]
        choices: list[tuple[Any, ...]] = []
        if len(collective.brought) == len(everyone):
            choices.append((self.complete, worker, collective))
        if self.gone.get(number):
            choices.append((self.meet, worker))  # the collective fails
        return choices

    def step(self) -> bool:
        choices = self.enabled()
        if not choices:
            return False
        self.events += 1
        act, *arguments = self.random.choice(choices)
        self.trace.append((act.__name__, *(a.slot if isinstance(a, Process) else a for a in arguments)))
        act(*arguments)
        return True

    # Events

    def chance_to_kill(self, worker: Process) -> None:
        if self.random.random() < 0.15:
            self.kills -= 1
            self.kill(worker)

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
                self.do(arbiter.closed(member), worker)
            case Met(report):
                self.do(arbiter.met(member, report), worker)
            case Committed(step):
                self.do(arbiter.committed(step), worker)
            case Left(status, reason):
                self.do(arbiter.left(member, status, reason), worker)

    def deliver_down(self, worker: Process) -> None:
        message = worker.down.popleft()
        if message is EOF:
            worker.connected = False
            worker.down.clear()
            worker.seat.disconnected()
            if worker.doing == "waiting" and not worker.seat.fresh:
                worker.doing = "start"  # it reports once more
            return
        worker.seat.hear(message)
        if isinstance(message, Publish) and worker.doing != "waiting":
            raise ViolationError(f"worker {worker.member} is in an epoch already")
        if worker.seat.refused:
            raise ViolationError(f"refused: {worker.seat.refused}")

    def connect(self, worker: Process) -> None:
        worker.connected = True
        identity = {"micro_batches": str(self.size.micro_batches)}
        worker.up.append(
            Hello(worker.seat.member, self.name(worker), self.name(worker), identity, worker.spare, worker.slot)
        )

    def meet(self, worker: Process) -> None:
        self.leave_group(worker)
        worker.doing = "waiting"
        worker.seat.ended = True
        worker.up.append(Met(worker.holding.report()))

    def leave(self, worker: Process) -> None:
        self.leave_group(worker)
        worker.doing = "left"
        self.exits.append((worker, worker.seat.over or FINISHED))
        if worker.connected:
            worker.up.append(EOF)

    def enter(self, worker: Process) -> None:
        epoch, worker.seat.fresh = worker.epoch, False
        worker.round, worker.inside, worker.flag, worker.first = 0, False, False, True
        self.gone.setdefault(epoch.number, set())
        work = worker.holding.enter(epoch, worker.member)
        if epoch.step is None or epoch.receivers:
            worker.doing = "restoring"
        elif epoch.step == self.size.steps:
            worker.doing = "finishing"
        else:
            worker.doing, worker.todo = "computing", list(work)

    def work(self, worker: Process) -> None:
        """The worker's next event of its own: a micro-batch, or it reaches a collective."""
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
        kind = kinds[worker.doing]
        at = self.collectives.setdefault((worker.epoch.number, worker.round), Collective(kind))
        if at.kind != kind:
            raise ViolationError(f"worker {worker.member} is at {kind} while others are at {at.kind}")
        flag = worker.seat.change_wanted
        at.brought[worker.member] = (worker.holding.step, tuple(worker.holding.have), flag)
        worker.inside = True

    def complete(self, worker: Process, collective: Collective) -> None:
        worker.inside, worker.round = False, worker.round + 1
        epoch, holding = worker.epoch, worker.holding
        match collective.kind:
            case ("state", step):
                source = self.disk if step is None else collective.brought[epoch.members[0]][0]
                if step not in (None, source):
                    raise ViolationError(f"a state of step {source} is taken for one of step {step}")
                if step is None or worker.member in epoch.receivers:
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
        while self.step():
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
        arbiter_kills=draw.randint(0, 2),
        overflowing=frozenset(step for step in range(3) if draw.random() < 0.3),
    )
