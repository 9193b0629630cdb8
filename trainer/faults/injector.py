"""Fires the faults of a plan that strike inside a rank, once each, at their phases.

`job` and `member` ask `arm` for an injector before any work, and pass it the objects that they make. Without faults the
injector touches nothing. Phases for which the run itself has no hook are made here: in_forward and in_backward by hooks
on the middle block, in_update by hooks on the optimizers, in_reduce by replacing one call of all_reduce, widened by
replacing the grids' method. Only the hooks that a fault of this rank needs are set.

In quorum mode nobody waits for a rank that is away: a fault that is due then strikes at the rank's first later passing
of its phase. And others write down what has fired while this process runs, so the record is read again where a fault
may strike more than one rank.
"""

import functools
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from trainer.config import Config
from trainer.data import Batches, Prepared
from trainer.errors import ConfigError
from trainer.faults import plan, storage, tensors
from trainer.faults.corruption import OperatorFault
from trainer.faults.disk import Disk, DiskFault, Operation
from trainer.faults.fault import AFTER_THE_UPDATE, WITHOUT_STEP
from trainer.faults.plan import PlannedFault
from trainer.faults.rank import RankContext
from trainer.faults.wrong_operators import Machine
from trainer.log import events, rundir
from trainer.log.events import AttemptStarted, EventLog, Warned
from trainer.log.history import History
from trainer.model import blocks_of
from trainer.parallel import elastic
from trainer.phases import Hook, Phase
from trainer.step import TrainState

PEERS_SECONDS = 0.4  # peers of a rank that is hit in a collective enter it so much later


def arm(config: Config, run: Path, rank: int, world_size: int) -> "FaultInjector":
    """The injector of a rank of the run. Raises ConfigError naming every problem of the plan, on all ranks alike."""
    planned: list[PlannedFault] = []
    if config.faults:
        first = events.read_file(events.events_directory(run) / "attempt-0000-rank-00000.jsonl")
        starts = events.select(first, AttemptStarted)
        try:
            # For the world that the run began with: a world that shrinks must not make a good plan a bad one. Clusters
            # that live apart stay as many; the log of each counts its own ranks alone.
            is_known = starts and elastic.apart() is None
            planned = plan.make(config, starts[0][1].world_size if is_known else world_size)
        except ConfigError:
            planned = plan.make(config, world_size)
    return FaultInjector(planned, config, run, rank, world_size)


def machine_of(config: Config, run: Path) -> Machine:
    """The operators of the machine that a run was computed on: those that faults made wrong are wrong in it."""
    starts = events.select(events.read(run), AttemptStarted)
    planned = plan.make(config, starts[0][1].world_size) if config.faults and starts else []
    fired = plan.fired(run)
    completed = {attempt.number: attempt.last_step or 0 for attempt in History.read(run).attempts}
    wrong = []
    for fault in planned:
        hits = [(entry.attempt, event.victim) for entry, event in fired if event.index == fault.index]
        if isinstance(fault.kind, OperatorFault) and hits:
            # It ends with its attempt, of which the last step may not have been completed.
            last = min(fault.last_step, 1 + max(completed.get(attempt, 0) for attempt, _ in hits))
            wrong.append((fault.kind.wrong_operator(fault), {victim for _, victim in hits}, fault.at_step, last))
    return Machine(wrong)


class FaultInjector:
    def __init__(self, planned: Sequence[PlannedFault], config: Config, run: Path, rank: int, world_size: int) -> None:
        # The number is the same on all ranks: none can have begun its attempt before all are connected.
        self._rank = RankContext(config, run, rank, world_size, events.next_attempt(run))
        self._read_hits()
        inside = [fault for fault in planned if not fault.from_outside]
        self._waiting = {fault.index: fault for fault in inside if self._times_fired(fault) < fault.times}
        self.notice = _notice(planned) if self._waiting or any(fault.from_outside for fault in planned) else ""
        """Warning for the log, so that a reader does not take what follows for an accident."""
        self._lock = threading.Lock()
        self._said: set[int] = set()
        self._entering: set[int] = set()
        """Faults that wait for this rank's next all_reduce."""
        if self._mine():
            _, hard = resource.getrlimit(resource.RLIMIT_CORE)
            resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # without core dumps
        if planned and rank == 0:
            storage.bring_back(run)  # the process that moved them away may have died before it moved them back

    # Called by `job` or `member`, in this order.

    def wrap_hook(self, hook: Hook) -> Hook:
        """A hook that calls `hook` and then fires what is due; `hook` itself where no fault concerns this rank."""
        if not self._mine() and not any(fault.phase == Phase.IN_REDUCE for fault in self._waiting.values()):
            return hook

        def both(phase: str, step: int) -> None:
            hook(phase, step)
            self.pass_by(phase, step)

        return both

    def attach(
        self, attempt: int, log: EventLog, state: TrainState, prepared: Prepared, *,
        member: int | None = None, is_main: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        """Receive the objects of an attempt that is about to begin. In quorum mode: this worker's number, and how to
        find out whether it is the main member.
        """
        rank = self._rank
        rank.attempt, rank.log, rank.state, rank.prepared = attempt, log, state, prepared
        rank.member, rank.is_main = member, is_main
        own_faults = self._mine()
        phases = {fault.phase for fault in own_faults}
        # Hooks cost time in every step, so they are set only for phases at which this rank is hit.
        if phases & {Phase.IN_FORWARD, Phase.IN_BACKWARD}:
            blocks = blocks_of(state.model) or [state.model]
            tensors.after_forward(blocks[(len(blocks) - 1) // 2], self._after_block)
        if Phase.IN_UPDATE in phases:
            for optimizer in state.optimizers:
                optimizer.register_step_post_hook(lambda *_: self.pass_by(Phase.IN_UPDATE, rank.step))
        if Phase.WIDENED in phases and state.grids is not None:
            setattr(state.grids, "widen", self._widening(state.grids.widen))  # noqa: B010
        if any(isinstance(fault.kind, DiskFault) for fault in own_faults):
            disk = Disk(rank.run, self._take)
            disk.install()
            rank.undo.callback(disk.remove)

    def wrap_batches(self, batches: Batches) -> Batches:
        self._rank.batches = batches
        return batches

    def close(self) -> None:
        """The attempt is over."""
        if self._rank.finished:
            self.pass_by(Phase.AFTER_END, self._rank.step)
        self._rank.undo.close()

    # Faults that are due, and their record.

    def pass_by(self, phase: str, step: int) -> None:
        """The rank passes a phase of its run."""
        if phase == Phase.STARTUP and not self._may_die_in_startup():
            return  # the phase is passed again when it may
        self._rank.pass_by(phase, step)
        if phase == Phase.BEFORE_REDUCE:
            self._fire_in_reduce(step)
        for fault in self._due(phase, step):
            if not isinstance(fault.kind, DiskFault):  # those fire in the write, not at the phase
                self._fire(fault, phase, step)

    def _may_die_in_startup(self) -> bool:
        """False where a death would leave a directory that is no run's, or the number of the attempt is not known."""
        knows_attempt = not elastic.in_quorum() or self._rank.log is not None
        return knows_attempt and rundir.config_path(self._rank.run).exists()

    def _mine(self) -> list[PlannedFault]:
        return [fault for fault in list(self._waiting.values()) if fault.kind.again_on_main or self._may_hit(fault)]

    def _may_hit(self, fault: PlannedFault) -> bool:
        """True if this rank is among those that a fault was planned for."""
        return self._rank.rank in fault.victims(self._rank.world_size)

    def _due(self, phase: str, step: int) -> list[PlannedFault]:
        return [fault for fault in self._mine() if self._is_due(fault, phase, step)]

    def _is_due(self, fault: PlannedFault, phase: str, step: int) -> bool:
        if phase in fault.kind.again_at and self._fired_before(fault):
            is_left = self._times_fired(fault) < fault.times
            return is_left and (not fault.kind.again_on_main or self._rank.is_main())
        if not self._may_hit(fault) or not self._is_moment(fault, phase, step) or self._times_fired(fault):
            return False
        return not fault.on_main or (self._rank.is_main() and not self._fired_before(fault))

    def _is_moment(self, fault: PlannedFault, phase: str, step: int) -> bool:
        if phase != fault.phase or fault.attempt not in (None, self._rank.attempt):
            return False
        return fault.point_step in (None, step) or (fault.mode == "quorum" and step > (fault.point_step or 0))

    def _fired_before(self, fault: PlannedFault) -> bool:
        """True if it has fired, here or on a rank whose process has written it down since this one began."""
        if fault.kind.again_on_main or fault.on_main:
            self._read_hits()
        return bool(self._times_fired(fault))

    def _read_hits(self) -> None:
        fired = plan.fired(self._rank.run)
        self._hits = Counter((event.index, event.fault, event.victim) for _, event in fired)

    def _times_fired(self, fault: PlannedFault) -> int:
        """Number of times a fault has fired: on this rank if it is planned for several ranks, else on any."""
        return sum(
            times
            for (index, kind, victim), times in self._hits.items()
            if (index, kind) == (fault.index, fault.kind.name)
            and (victim == self._rank.rank or fault.on_main or (fault.ranks is not None and len(fault.ranks) == 1))
        )

    def _claim(self, fault: PlannedFault, phase: str, step: int) -> bool:
        """True if this thread must make the fault, which is then on record before it acts. `step` as for hooks."""
        rank = self._rank
        if obstacle := fault.kind.obstacle(fault, rank):
            if rank.log is not None and fault.index not in self._said:
                self._said.add(fault.index)
                rank.log.append(Warned(message=f"the fault {fault} did not fire: {obstacle}"))
            return False
        with self._lock:
            # The saving thread may have claimed it meanwhile.
            if fault.index not in self._waiting:
                return False
            is_late = fault.mode == "quorum" and phase not in WITHOUT_STEP
            at_step = step + (phase not in AFTER_THE_UPDATE) if is_late else fault.at_step
            about: dict[str, Any] = {"victim": rank.rank, "step": at_step, "phase": phase, "member": rank.member}
            plan.record(rank.run, fault, rank.attempt, rank.rank, **about)
            self._hits[fault.index, fault.kind.name, rank.rank] += 1
            if self._times_fired(fault) >= fault.times:
                del self._waiting[fault.index]
        return True

    def _take(self, operation: Operation, phase: str, step: int) -> PlannedFault | None:
        """The fault of this disk operation that is due, on record as fired; None if there is none."""
        for fault in self._due(phase, step):
            is_it = isinstance(fault.kind, DiskFault) and fault.kind.operation == operation
            if is_it and self._claim(fault, phase, step):
                return fault
        return None

    # Firing.

    def _fire(self, fault: PlannedFault, phase: str, step: int) -> None:
        if self._claim(fault, phase, step):
            fault.kind.fire(fault, self._rank)

    def _fire_in_reduce(self, step: int) -> None:
        """All ranks are about to reduce: those that are hit enter the collective and are hit in it."""
        rank = self._rank
        for fault in [f for f in list(self._waiting.values()) if self._is_moment(f, Phase.IN_REDUCE, step)]:
            victims = fault.victims(rank.world_size)
            is_victim = rank.rank in victims and (not fault.on_main or rank.is_main())
            if fault.mode == "quorum":
                self._read_hits()
                if fault.index in self._entering or (not is_victim and step != fault.point_step):
                    continue  # peers do not know when a victim that was away is back
            if self._times_fired(fault):
                continue
            # A victim must still be waiting in the collective when it is hit, so another rank has to enter it late.
            together = len(victims) == rank.world_size > 1 and not fault.on_main
            if not is_victim or (together and rank.rank == victims[-1]):
                time.sleep(PEERS_SECONDS)
            if not is_victim:
                continue
            act = functools.partial(self._fire, fault, Phase.IN_REDUCE, step)
            apart = elastic.apart()
            if (rank.world_size if apart is None else apart.ranks) > 1:
                self._entering.add(fault.index)  # where it is alone now, the next collective comes later
                rank.act_in_all_reduce(act)
            else:
                act()

    def _widening(self, widen: Callable[[], Any]) -> Callable[[], Any]:
        def widen_and_pass() -> Any:
            widened = widen()
            self.pass_by(Phase.WIDENED, self._rank.step)
            return widened

        return widen_and_pass

    def _after_block(self, output: Any) -> Any:
        """Change the output of a block, or the first tensor in it: a block of the user's own may return several."""
        leaves, structure = pytree.tree_flatten(output)
        trained = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not (trained and self._rank.in_chosen_micro_batch()):
            return output
        leaves[trained[0]] = self._change(Phase.IN_FORWARD, leaves[trained[0]])
        leaves[trained[0]].register_hook(functools.partial(self._change, Phase.IN_BACKWARD))
        return pytree.tree_unflatten(leaves, structure)

    def _change(self, phase: str, tensor: Tensor) -> Tensor:
        for fault in self._due(phase, self._rank.step):
            if self._claim(fault, phase, self._rank.step):
                tensor = fault.kind.change(fault, self._rank, tensor)
        return tensor


def _notice(planned: Sequence[PlannedFault]) -> str:
    alone = len(planned) == 1
    listed = "; ".join(str(fault) for fault in planned[:10]) + ("; …" if len(planned) > 10 else "")
    outside = sum(fault.from_outside for fault in planned)
    aside = f" ({outside} of them from outside, by `trainer chaos` alone)" if outside else ""
    return f"{len(planned)} fault{'' if alone else 's'} on purpose {'is' if alone else 'are'} armed{aside}: {listed}"
