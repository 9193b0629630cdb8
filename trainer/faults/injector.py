"""The inside hand: a rank that breaks itself where the plan says, once.

`job` asks `arm` for an injector before any work, and tells it of what it makes. An empty plan gives one that hands
everything back untouched. Points beyond those of the run itself (faults/kinds.py) come from hooks on the middle block
(in_forward, in_backward: of a rank's second micro-batch, if it has two), hooks on the optimizers (in_update), and one
call of all_reduce taken apart (in_reduce). Only what a fault of this rank needs is put in place.
"""

import contextlib
import functools
import json
import os
import random
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import Config
from trainer.data import Batches, MicroBatch, Prepared
from trainer.errors import ConfigError
from trainer.faults import corruption, plan, storage
from trainer.faults.plan import PlannedFault
from trainer.log import events, rundir
from trainer.log.events import AttemptStarted, EventLog, FaultFired, Warned
from trainer.phases import Phase
from trainer.step import TrainState

Point = Callable[[str, int], None]

ENTERED_SECONDS = 0.15  # a rank that is hit in a collective has waited in it for so long
PEERS_SECONDS = 0.4  # and its peers come to it so much later
SAVE_SECONDS = 5.0  # how long damage waits for the save under way,
READ_BACK_SECONDS = 0.5  # and then for its being read back
EXIT_STATUS = 3
_now = time.time  # the clock before it jumps


class NoFaults:
    """What `job` tells of a run's making. This one, of an empty plan, hands everything back untouched."""

    notice = ""
    """What rank 0 says in the log, so that nobody takes what follows for an accident."""

    def point(self, other: Point) -> Point:
        """What is called at every point of the run: `other`, and what fires faults."""
        return other

    def startup(self) -> None:
        """Called where a rank starts: before it connects, and again once the run directory is a run's."""

    def join(self, attempt: int, log: EventLog, state: TrainState, prepared: Prepared) -> None:
        """The attempt is about to begin, with these."""

    def batches(self, batches: Batches) -> Batches:
        return batches

    def close(self) -> None:
        """The attempt is over."""


def arm(config: Config, run: Path, rank: int, world_size: int) -> NoFaults:
    """The injector of a rank of the run. Raises ConfigError naming every problem of the plan, on all ranks alike."""
    if not config.faults:
        return NoFaults()
    return FaultInjector(_plan(config, run, world_size), config, run, rank, world_size)


def _plan(config: Config, run: Path, world_size: int) -> list[PlannedFault]:
    """For the world that the run began with: a world that shrinks must not make a good plan a bad one."""
    with contextlib.suppress(ConfigError):
        return plan.make(config, _first_world_size(run) or world_size)
    return plan.make(config, world_size)


def _first_world_size(run: Path) -> int | None:
    first = events.events_directory(run) / "attempt-0000-rank-00000.jsonl"
    starts = (entry.event for entry in events.read_file(first) if isinstance(entry.event, AttemptStarted))
    return next((start.world_size for start in starts), None)


class _Record:
    """RUN/events/faults.jsonl: what has fired, in whatever attempt."""

    def __init__(self, run: Path, rank: int) -> None:
        self._path, self._rank = plan.log_path(run), rank
        fired = [entry.event for entry in plan.fired(run)]
        self._hits = Counter((e.index, e.fault, e.victim) for e in fired if isinstance(e, FaultFired))

    def hits(self, fault: PlannedFault) -> int:
        """How often it has fired: on this rank for one that is planned for all, else on any."""
        return sum(
            times
            for (index, kind, victim), times in self._hits.items()
            if (index, kind) == (fault.index, fault.kind.name) and (fault.ranks is not None or victim == self._rank)
        )

    def write(self, fault: PlannedFault, phase: str, attempt: int) -> None:
        """In one write, so that ranks may write at once and a rank may die right after."""
        event = FaultFired(
            index=fault.index,
            fault=fault.kind.name,
            victim=self._rank,
            step=fault.at_step,
            phase=phase,
            pid=os.getpid(),
        )
        line = {"event": event.kind, "attempt": attempt, "rank": self._rank, "time": _now()} | asdict(event)
        self._path.parent.mkdir(exist_ok=True)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)
        self._hits[fault.index, fault.kind.name, self._rank] += 1


class FaultInjector(NoFaults):
    """The injector of a plan that is not empty."""

    def __init__(self, planned: Sequence[PlannedFault], config: Config, run: Path, rank: int, world_size: int) -> None:
        self._config, self._run, self._rank, self._size = config, run, rank, world_size
        self.notice = _notice(planned)
        self._attempt = events.next_attempt(run)  # no rank can have begun its attempt before all are connected
        self._record = _Record(run, rank)
        inside = [fault for fault in planned if not fault.by_nemesis]
        self._waiting = {fault.index: fault for fault in inside if self._record.hits(fault) < _times(fault)}
        self._lock = threading.Lock()
        self._training = threading.get_ident()
        self._undo = contextlib.ExitStack()
        self._step = self._micro_batch = 0
        self._saving, self._committed = -1, (-1, 0.0)
        """The step that is being saved; the last that was committed, and when (time.monotonic)."""
        self._said: set[int] = set()
        self._log: EventLog | None = None
        self._poison: str | None = None
        self._stall_seconds = 0.0
        self._slow: list[PlannedFault] = []
        self._wrong_sums: tuple[corruption.WrongSum, int] | None = None
        if self._mine():
            _, hard = resource.getrlimit(resource.RLIMIT_CORE)
            resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # nobody wants the core dumps
        if rank == 0:
            storage.bring_back(run)  # what a process moved away that died before its time

    def point(self, other: Point) -> Point:
        if not self._mine() and not any(fault.phase == Phase.IN_REDUCE for fault in self._waiting.values()):
            return other

        def both(point: str, step: int) -> None:
            other(point, step)
            self.pass_by(point, step)

        return both

    def startup(self) -> None:
        if rundir.config_path(self._run).exists():  # else a death now would leave a directory that is no run's
            self.pass_by(Phase.STARTUP, 0)

    def join(self, attempt: int, log: EventLog, state: TrainState, prepared: Prepared) -> None:
        self._attempt, self._log, self._state, self._prepared = attempt, log, state, prepared
        mine = self._mine()
        phases, kinds = {fault.phase for fault in mine}, {fault.kind.name for fault in mine}
        if phases & {Phase.IN_FORWARD, Phase.IN_BACKWARD}:
            blocks = cast(nn.ModuleList, state.model.blocks)
            corruption.after(blocks[(len(blocks) - 1) // 2], self._after_block)
        if Phase.IN_UPDATE in phases:
            for optimizer in state.optimizers:
                optimizer.register_step_post_hook(lambda *_: self.pass_by(Phase.IN_UPDATE, self._step))
        if "nan_loss" in kinds:
            state.model.register_forward_hook(self._after_model)
        if kinds & storage.KINDS:
            disk = storage.Disk(self._run, self._take)
            disk.install()
            self._undo.callback(disk.remove)

    def batches(self, batches: Batches) -> Batches:
        self._batches = batches
        if any(fault.kind.name == "stalled_data" for fault in self._mine()):
            read = batches.micro_batch

            def micro_batch(step: int, index: int) -> MicroBatch:
                seconds, self._stall_seconds = self._stall_seconds, 0.0
                time.sleep(seconds)
                return read(step, index)

            setattr(batches, "micro_batch", micro_batch)  # noqa: B010
        return batches

    def close(self) -> None:
        self._leave_wrong_sums()
        self._undo.close()

    def pass_by(self, point: str, step: int) -> None:
        """A rank passes a point of its run."""
        if threading.get_ident() == self._training:
            self._follow(point, step)
        elif point == Phase.AFTER_COMMIT:
            self._committed = step, time.monotonic()
        for fault in self._due(point, step):
            if fault.kind.name not in storage.KINDS:  # the disk itself knows when these are due
                self._fire(fault, point)

    def _follow(self, point: str, step: int) -> None:
        """What goes on from point to point."""
        if point == Phase.BEFORE_FORWARD:
            self._step, self._micro_batch = step, self._micro_batch + 1
        elif point == Phase.BEFORE_BACKWARD and self._micro_batch == 1:
            for fault in self._slow:
                time.sleep(fault.settings["seconds"] if step < _last_step(fault) else 0)
        elif point == Phase.BEFORE_REDUCE:
            self._micro_batch = 0
            self._before_reduce(step)
        elif point == Phase.WAITING_FOR_SAVE:
            self._saving = step
        elif point == Phase.AFTER_UPDATE and self._wrong_sums and step >= self._wrong_sums[1]:
            self._leave_wrong_sums()

    def _mine(self) -> list[PlannedFault]:
        return [fault for fault in list(self._waiting.values()) if self._rank in fault.victims(self._size)]

    def _due(self, point: str, step: int) -> list[PlannedFault]:
        return [fault for fault in self._mine() if self._is_due(fault, point, step)]

    def _is_due(self, fault: PlannedFault, point: str, step: int) -> bool:
        if self._record.hits(fault):  # it comes again, in the next start: on loading, or where nothing is there to load
            return point in (Phase.IN_LOAD, Phase.BEFORE_FORWARD)
        return (
            point == fault.phase
            and fault.point_step in (None, step)
            and fault.attempt in (None, self._attempt)
        )  # fmt: skip

    def _take(self, kinds: frozenset[str], phase: str, step: int) -> PlannedFault | None:
        """For the disk: a fault of these kinds that is due there, recorded as fired."""
        for fault in self._due(phase, step):
            if fault.kind.name in kinds and self._claim(fault, phase):
                return fault
        return None

    def _claim(self, fault: PlannedFault, point: str) -> bool:
        """Whether it is ours to make now: then it stands in the record, before it acts."""
        with self._lock:
            if fault.index not in self._waiting:
                return False
            self._record.write(fault, point, self._attempt)
            if self._record.hits(fault) >= _times(fault):
                del self._waiting[fault.index]
        return True

    def _fire(self, fault: PlannedFault, point: str, tensor: Tensor | None = None) -> Tensor | None:
        """Make a fault; what becomes of the tensor at whose making the rank is, if that changes."""
        if fault.kind.name in storage.DAMAGE:
            self._await_save()
        obstacle = self._obstacle(fault)
        if obstacle:
            self._say(fault, obstacle)
        elif self._claim(fault, point):
            return ACTS[fault.kind.name](self, fault, tensor)
        return None

    def _await_save(self) -> None:
        """Until the save under way, if there is one, is over: what is damaged before that never was a checkpoint."""
        deadline = time.monotonic() + SAVE_SECONDS
        while self._saving > self._committed[0] and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(max(0.0, self._committed[1] + READ_BACK_SECONDS - time.monotonic()))

    def _obstacle(self, fault: PlannedFault) -> str:
        """Why it cannot be made here and now; empty if it can."""
        name = fault.kind.name
        if name in storage.DAMAGE and storage.damage(self._run, name, self.chance(fault)) is None:
            return "there is no checkpoint to damage, or, for a swap, only one"
        if name == "skipped_collective" and self._size == 1:
            return "one rank alone has no collectives"
        if name == "vanished_checkpoints" and not storage.can_vanish(self._run):
            return "there is no directory of checkpoints, or it is away already"
        if name == "corrupt_tokens" and not (self._config.data.cache_dir or os.environ.get("TOPROPE_CACHE")):
            return "the token store is in the user's own cache; name another in data.cache_dir or $TOPROPE_CACHE"
        return ""

    def _say(self, fault: PlannedFault, obstacle: str) -> None:
        if self._log is not None and fault.index not in self._said:
            self._said.add(fault.index)
            self._log.append(Warned(message=f"the fault {fault} did not fire: {obstacle}"))

    def chance(self, fault: PlannedFault) -> random.Random:
        """What draws a fault's place: the same in every process of the run, whatever other faults there are."""
        what = (fault.kind.name, fault.ranks, fault.at_step, fault.phase, fault.attempt)
        return random.Random(f"{self._config.seed}-{what}-place")

    # Points that the run itself has no name for.

    def _in_the_micro_batch(self) -> bool:
        own = len(range(self._rank, self._config.data.micro_batches, self._size))
        return self._micro_batch == min(2, own)

    def _after_block(self, output: Tensor) -> Tensor:
        if not (output.requires_grad and self._in_the_micro_batch()):
            return output
        output = self._through(Phase.IN_FORWARD, output)
        output.register_hook(functools.partial(self._through, Phase.IN_BACKWARD))
        return output

    def _through(self, point: str, tensor: Tensor) -> Tensor:
        for fault in self._due(point, self._step):
            changed = self._fire(fault, point, tensor)
            tensor = tensor if changed is None else changed
        return tensor

    def _after_model(self, _model: nn.Module, _arguments: Any, output: Any) -> Any:
        if self._poison is None or not torch.is_grad_enabled():
            return None
        factor, self._poison = float(self._poison), None
        return type(output)(*(part * factor for part in output))

    def _before_reduce(self, step: int) -> None:
        for fault in [fault for fault in list(self._waiting.values()) if self._is_due(fault, Phase.IN_REDUCE, step)]:
            victims = fault.victims(self._size)
            if self._rank not in victims or (len(victims) == self._size > 1 and self._rank == victims[-1]):
                time.sleep(PEERS_SECONDS)
            if self._rank in victims and self._size > 1:
                self._take_apart(functools.partial(self._fire, fault, Phase.IN_REDUCE))
            elif self._rank in victims:
                self._fire(fault, Phase.IN_REDUCE)

    def _take_apart(self, act: Callable[[], Any]) -> None:
        """Enter this thread's next all_reduce, act, then wait for its end."""

        def entered(call: Callable[..., Any]) -> None:
            work = call(async_op=True)
            time.sleep(ENTERED_SECONDS)
            act()
            work.wait()

        self.instead_of_all_reduce(entered)

    def instead_of_all_reduce(self, act: Callable[[Callable[..., Any]], None]) -> None:
        """Once, in this thread: `act` is given the call instead of it being made."""
        real = dist.all_reduce

        def once(*arguments: Any, **more: Any) -> Any:
            call = functools.partial(real, *arguments, **more)
            if threading.get_ident() != self._training:
                return call()
            setattr(dist, "all_reduce", real)  # noqa: B010
            return act(call)

        setattr(dist, "all_reduce", once)  # noqa: B010

    # What the table of acts below does.

    def raise_(self, fault: PlannedFault) -> None:
        raise RuntimeError(f"a fault on purpose: {fault}")

    def wait_for_lock(self, fault: PlannedFault) -> None:
        lock, held = threading.Lock(), threading.Event()

        def keep() -> None:
            with lock:
                held.set()
                time.sleep(fault.settings["seconds"])

        threading.Thread(target=keep, name="toprope-lock", daemon=True).start()
        held.wait()
        with lock:
            pass

    def stall_data(self, fault: PlannedFault) -> None:
        self._stall_seconds = fault.settings["seconds"]

    def slow_down(self, fault: PlannedFault) -> None:
        self._slow.append(fault)
        time.sleep(fault.settings["seconds"])

    def damage(self, fault: PlannedFault) -> None:
        damage = storage.damage(self._run, fault.kind.name, self.chance(fault))
        assert damage is not None
        damage()
        _kill(signal.SIGKILL)

    def vanish(self, fault: PlannedFault) -> None:
        self._undo.callback(storage.vanish(self._run, fault.settings["seconds"]).join)

    def corrupt_tokens(self, fault: PlannedFault) -> None:
        """Of a sample that this rank is about to read: another token, one that the vocabulary has."""
        step = fault.point_step
        assert step is not None
        store = self._prepared.train
        window = int(self._batches.micro_batch(step, self._rank).sample_ids[0])
        token = window * self._config.model.context + 1
        storage.flip_bit(store.directory / "train.bin", token * store.tokens.dtype.itemsize, bit=0)
        _kill(signal.SIGKILL)

    def poison_loss(self, fault: PlannedFault) -> None:
        self._poison = fault.settings["value"]

    def spoil_weights(self, fault: PlannedFault) -> None:
        """Of a block's matrix, where every token meets it."""
        parameters = self._state.sharding.parameters.items()
        matrices = [corruption.local(p) for name, p in parameters if name.startswith("blocks.") and p.ndim == 2]
        corruption.spoil(matrices, fault.settings["value"], self.chance(fault))

    def flip_gradient(self, fault: PlannedFault) -> None:
        gradients = [gradient for _, gradient, _ in self._state.sharding.gradients()]
        corruption.flip(gradients, fault.settings["bits"], self.chance(fault))

    def flip_weights(self, fault: PlannedFault) -> None:
        weights = [corruption.local(parameter) for parameter in self._state.sharding.parameters.values()]
        corruption.flip(weights, fault.settings["bits"], self.chance(fault))

    def flip_moments(self, fault: PlannedFault) -> None:
        states = [moments for optimizer in self._state.optimizers for moments in optimizer.state.values()]
        moments = [corruption.local(tensor) for state in states for name, tensor in state.items() if name != "step"]
        corruption.flip(moments, fault.settings["bits"], self.chance(fault))

    def flipped(self, fault: PlannedFault, tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        changed = tensor.clone(memory_format=torch.contiguous_format)
        corruption.flip([changed], fault.settings["bits"], self.chance(fault))
        return changed

    def spoiled(self, fault: PlannedFault, tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        changed = tensor.clone(memory_format=torch.contiguous_format)
        corruption.spoil([changed], fault.settings["value"], self.chance(fault))
        return changed

    def sum_wrongly(self, fault: PlannedFault) -> None:
        self._leave_wrong_sums()
        mode = corruption.WrongSum()
        mode.__enter__()
        self._wrong_sums = mode, _last_step(fault)

    def _leave_wrong_sums(self) -> None:
        if self._wrong_sums:
            mode, self._wrong_sums = self._wrong_sums[0], None
            mode.__exit__(None, None, None)

    def jump_clock(self, fault: PlannedFault) -> None:
        """Of all that asks `time.time`. The log has taken hold of it before."""
        seconds, real, log = fault.settings["seconds"], time.time, self._log
        setattr(time, "time", lambda: real() + seconds)  # noqa: B010
        self._undo.callback(setattr, time, "time", real)
        setattr(log, "_clock", time.time)  # noqa: B010


def _notice(planned: Sequence[PlannedFault]) -> str:
    one = len(planned) == 1
    listed = "; ".join(str(fault) for fault in planned[:10]) + ("; …" if len(planned) > 10 else "")
    outside = sum(fault.by_nemesis for fault in planned)
    aside = f" ({outside} of them from outside, by `trainer chaos` alone)" if outside else ""
    return f"{len(planned)} fault{'' if one else 's'} on purpose {'is' if one else 'are'} armed{aside}: {listed}"


def _times(fault: PlannedFault) -> int:
    """How often it fires on a rank."""
    return fault.settings["times"] if fault.kind.name == "repeated_kill" else 1


def _last_step(fault: PlannedFault) -> int:
    """The last step that a fault of several steps lasts for, as the points count after its update."""
    assert fault.at_step is not None
    return fault.at_step - 1 + fault.settings["steps"]


def _kill(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def _exceed_limit() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), hard))
    torch.empty(2**34, dtype=torch.uint8)
    raise MemoryError("a fault on purpose: memory_limit")  # where the limit does not count


def _fill_and_die(megabytes: int) -> None:
    _filled = [os.urandom(2**20) for _ in range(megabytes)]
    _kill(signal.SIGKILL)


Act = Callable[[FaultInjector, PlannedFault, Tensor | None], Tensor | None]


def _plain(act: Callable[[FaultInjector, PlannedFault], Any]) -> Act:
    def made(armed: FaultInjector, fault: PlannedFault, tensor: Tensor | None) -> None:
        act(armed, fault)

    return made


def _signal(number: signal.Signals) -> Act:
    return _plain(lambda armed, fault: _kill(number))


ACTS: dict[str, Act] = {
    "sigkill": _signal(signal.SIGKILL),
    "repeated_kill": _signal(signal.SIGKILL),
    "sigsegv": _signal(signal.SIGSEGV),
    "sigabrt": _signal(signal.SIGABRT),
    "sigterm": _signal(signal.SIGTERM),
    "stopped": _signal(signal.SIGSTOP),
    "exit": _plain(lambda armed, fault: os._exit(EXIT_STATUS)),
    "exception": _plain(FaultInjector.raise_),
    "memory_limit": _plain(lambda armed, fault: _exceed_limit()),
    "memory_kill": _plain(lambda armed, fault: _fill_and_die(fault.settings["megabytes"])),
    "skipped_collective": _plain(lambda armed, fault: armed.instead_of_all_reduce(lambda call: None)),
    "lock_held": _plain(FaultInjector.wait_for_lock),
    "stalled_data": _plain(FaultInjector.stall_data),
    "slow_rank": _plain(FaultInjector.slow_down),
    **dict.fromkeys(storage.DAMAGE, _plain(FaultInjector.damage)),
    "vanished_checkpoints": _plain(FaultInjector.vanish),
    "corrupt_tokens": _plain(FaultInjector.corrupt_tokens),
    "nan_loss": _plain(FaultInjector.poison_loss),
    "nan_gradient": FaultInjector.spoiled,
    "nan_weights": _plain(FaultInjector.spoil_weights),
    "spike": lambda armed, fault, tensor: None if tensor is None else tensor * corruption.SPIKE,
    "flip_gradient": _plain(FaultInjector.flip_gradient),
    "flip_reduced": _plain(FaultInjector.flip_gradient),
    "flip_weights": _plain(FaultInjector.flip_weights),
    "flip_moments": _plain(FaultInjector.flip_moments),
    "flip_activations": FaultInjector.flipped,
    "wrong_operator": _plain(FaultInjector.sum_wrongly),
    "clock_jump": _plain(FaultInjector.jump_clock),
}
"""What each kind does to the rank it hits. Those of storage.KINDS are made there."""
