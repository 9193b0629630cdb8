"""A rank dies and the step goes on: partial sums outlive a failed reduction, and only what is missing is computed."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.support import SMOKE, SMOKE_SHA256, settings, summarise_run, trainer, wait_until, with_faults
from trainer import config as configs
from trainer import job, loop, step
from trainer.config import Config
from trainer.data import Batches, Prepared, prepare
from trainer.errors import CorruptionError
from trainer.log import events
from trainer.log.events import EvalDone, MembersChanged, StepDone
from trainer.parallel.membership import JobOver
from trainer.parallel.partial import PartialSums
from trainer.parallel.protocol import NOBODY, Arbiter, Epoch, Hello, Report, Seat, Send
from trainer.parallel.quorum import Change, MembersChangedError, QuorumMembers, TransferError
from trainer.parallel.world import AllRanks, StepMembers, World, open_store
from trainer.phases import Phase
from trainer.sentinel.corruption import Sentinel
from trainer.step import StepContext, StepResult, TrainState

CPU = torch.device("cpu")
SETTINGS = ["budget.steps=6", "eval.every_steps=3", "eval.max_tokens=192", "model.n_layers=1"]


@pytest.fixture(scope="module")
def config() -> Config:
    return configs.load(SMOKE, SETTINGS)


@pytest.fixture(scope="module")
def prepared(config: Config) -> Prepared:
    return prepare(config.data, config.eval, config.model.context)


def build(config: Config, prepared: Prepared, sentinel: Sentinel | None = None) -> TrainState:
    watch = (sentinel or Sentinel(config)).watch
    return job.build(config, prepared.tokenizer.vocab_size, World(0, 1, CPU), watch)


@dataclass(frozen=True)
class DyingWorld(World):
    """Two ranks, of which the other dies in reduction number `dies_in`; what was to be reduced is lost."""

    dies_in: int = 0
    reductions: Iterator[int] = field(default_factory=lambda: iter(range(10)))

    def sum(self, tensor: Tensor) -> None:
        if next(self.reductions) == self.dies_in:
            tensor.fill_(torch.nan)
            raise RuntimeError("Connection closed by peer")

    max = sum


def compute(
    state: TrainState, config: Config, prepared: Prepared, members: StepMembers
) -> tuple[StepResult, list[Tensor], list[int]]:
    """(result, gradients and magnitudes, micro-batches that were computed) of a step."""
    batches, computed = job.batches_of(config, prepared), []

    def note(phase: str, _step: int) -> None:
        if phase == Phase.BEFORE_BACKWARD:
            computed.append(current[-1])

    real, current = batches.micro_batch, []
    noting = SimpleNamespace(micro_batch=lambda step, index: current.append(index) or real(step, index))
    context = StepContext(config, AllRanks(members.world, 8), cast(Batches, noting), note)
    result = step.compute_gradients(state, context, members)
    assert state.grids is not None
    return result, [*(grad.clone() for _, grad, _ in state.sharding.gradients()), state.grids.seen.clone()], computed


def alone(partial: PartialSums | None = None, own: tuple[int, ...] | None = None) -> StepMembers:
    return StepMembers(World(0, 1, CPU), range(8), own, partial)


@pytest.mark.parametrize("dies_in", [0, 1, 2], ids=["gradients", "losses", "magnitudes"])
def test_after_a_failed_reduction_only_what_is_missing_is_computed(config: Config, prepared: Prepared, dies_in: int):
    state, partial = build(config, prepared), PartialSums()
    compute(state, config, prepared, alone())  # the first computation widens its grid
    calm, calm_sums, _ = compute(state, config, prepared, alone())
    dying = StepMembers(DyingWorld(0, 2, CPU, dies_in=dies_in), range(8), (0, 2, 5), partial)
    with pytest.raises(RuntimeError, match="closed by peer"):
        compute(state, config, prepared, dying)
    assert partial.done(state.step) == (0, 2, 5)
    assert state.grids is not None
    partial.put_back([*state.sharding.reduced_in_place(), state.grids.seen])
    result, sums, computed = compute(state, config, prepared, alone(partial, (7, 1, 3, 4, 6)))
    assert (result, computed) == (calm, [7, 1, 3, 4, 6])
    assert all(torch.equal(left, right) for left, right in zip(calm_sums, sums, strict=True))


def test_a_second_pass_over_a_step_computes_every_micro_batch(config: Config, prepared: Prepared):
    """The first step finds the finest grid too fine: what is kept of it is of no use on the grid that fits."""
    calm, calm_sums, _ = compute(build(config, prepared), config, prepared, alone())
    state, partial = build(config, prepared), PartialSums()
    result, sums, computed = compute(state, config, prepared, alone(partial, (3, 0, 1, 2, 4, 5, 6, 7)))
    assert (result, calm.redone) == (calm, 1)
    assert computed == [3, 0, 1, 2, 4, 5, 6, 7, *range(8)]
    assert all(torch.equal(left, right) for left, right in zip(calm_sums, sums, strict=True))
    assert partial.done(state.step) == ()


Death = tuple[str, int | None, int]
"""Phase, completed steps (None: any), and at which passing."""


class Killed(BaseException):
    pass


class Job:
    """An arbiter, and members that are threads of this process: real gloo groups, and no sockets to the arbiter."""

    def __init__(self, config: Config, prepared: Prepared, workers: int) -> None:
        self.config, self.prepared = config, prepared
        self.arbiter, self.changed = Arbiter(wanted=workers), threading.Condition()
        self.workers: list[Worker] = []
        self.commits: dict[int, list[str]] = {}
        self.reported: set[int] = set()

    def perform(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send) and action.member != NOBODY:
                next(w for w in self.workers if w.seat.member in (action.member, None)).hear(action.message)
        self.changed.notify_all()

    def start(self, dies: Death | None = None) -> "Worker":
        worker = self.prepare(dies)
        worker.thread.start()
        return worker

    def prepare(self, dies: Death | None = None) -> "Worker":
        """A worker that has its number, and does not run yet."""
        worker = Worker(self, dies)
        self.workers.append(worker)
        with self.changed:
            hello = Hello(None, f"worker {len(self.workers)}", worker.store, {"micro_batches": "8"})
            self.perform(self.arbiter.hello(hello)[1])
        return worker

    def ended(self, timeout: float = 60) -> "Job":
        for worker in self.workers:
            worker.thread.join(timeout)
            assert not worker.thread.is_alive(), "stuck"
        return self

    def distinct_commits(self) -> dict[int, set[str]]:
        """{step: hashes of the weights that members had after it}."""
        return {step: set(hashes) for step, hashes in self.commits.items()}

    @property
    def survivors(self) -> list["Worker"]:
        return [worker for worker in self.workers if worker.result is not None]

    def hash(self) -> str:
        (only,) = {worker.result for worker in self.survivors}
        return only


class Worker:
    """A member, and its membership: `parallel.membership` without sockets."""

    def __init__(self, job: Job, dies: Death | None) -> None:
        self.job, self.dies, self.seat = job, dies, Seat()
        self.passed = 0
        self.error: BaseException = Killed()
        self.dies_when: Callable[[], bool] = lambda: True
        self.holds: tuple[str, int] | None = None
        """Phase and step in which this one waits until another member is ready to join."""
        self.slow_pieces = 0
        self.waits_for = 2
        self.sentinel = Sentinel(job.config)
        self.state = build(job.config, job.prepared, self.sentinel)
        self.spoil: Callable[[str, int, TrainState], None] = lambda phase, step, state: None
        """Called at each phase: what goes wrong on this worker."""
        self.server = open_store("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.store = f"127.0.0.1:{self.server.port}"
        self.computed: list[tuple[int, int]] = []
        self.changes: list[Change] = []
        self.records: list[Any] = []
        self.result: Any = None
        self.thread = threading.Thread(target=self.run, daemon=True)

    def steps(self) -> list[StepDone]:
        return [event for event in self.records if isinstance(event, StepDone)]

    # The membership.

    @property
    def member(self) -> int:
        assert self.seat.member is not None
        return self.seat.member

    @property
    def ended(self) -> bool:
        return self.seat.ended

    @property
    def change_wanted(self) -> bool:
        return self.seat.change_wanted

    def hear(self, message: Any) -> None:
        self.seat.hear(message)

    def meet(self, report: Report, waiting: Any = None) -> Epoch:
        job = self.job
        with job.changed:
            self.seat.ended = True
            job.reported.add(self.member)
            job.perform(job.arbiter.met(self.member, report))
            if not job.changed.wait_for(lambda: self.seat.fresh or self.seat.over, 60):
                raise TimeoutError("no epoch")
            if self.seat.over:
                raise JobOver(self.seat.over)
            self.seat.fresh = False
            assert self.seat.epoch is not None
            return self.seat.epoch

    def committed(self, step: int) -> None:
        with self.job.changed:
            self.job.commits.setdefault(step, []).append(self.state.weights_sha256())
            self.job.changed.notify_all()

    def at(self, place: str, step: int) -> None:
        self.pass_by(place, step)

    def heartbeat(self, place: str, step: int) -> None:
        pass

    # The worker.

    def run(self) -> None:
        members = QuorumMembers(self, CPU, 8, 60, lambda state, world: self.pass_by("restore", 0), self.changes.append)

        def hook(phase: str, step: int) -> None:
            self.pass_by(phase, step)

        real = job.batches_of(self.job.config, self.job.prepared)

        def micro_batch(step: int, index: int) -> Any:
            self.computed.append((step, index))
            return real.micro_batch(step, index)

        batches = cast(Batches, SimpleNamespace(micro_batch=micro_batch))
        guarded = self.sentinel.wrap_hook(members.wrap_hook(hook))
        log = cast(Any, SimpleNamespace(append=self.records.append))
        watched = self.sentinel.wrap_members(members, self.state, batches, log)
        context = StepContext(self.job.config, watched, batches, guarded, change_wanted=lambda: self.change_wanted)
        score = job.scorer(self.job.config, self.job.prepared, lambda: members.world, guarded)
        checkpointer = cast(Any, NoCheckpointer(members, self.sentinel))
        try:
            loop.train(self.state, loop.Collaborators(context, self.records.append, score, checkpointer))
            self.result = self.state.weights_sha256()
            with self.job.changed:
                self.job.perform(self.job.arbiter.left(self.member, "finished", ""))
        except Killed:
            members.world.link.drop()  # the kernel closes the sockets of a dead process
            with self.job.changed:
                self.job.perform(self.job.arbiter.closed(self.member))
        except JobOver:
            pass
        except (TransferError, CorruptionError) as error:
            self.error = error
            members.world.link.drop()
            with self.job.changed:
                self.job.perform(self.job.arbiter.closed(self.member))

    def pass_by(self, phase: str, step: int) -> None:
        self.spoil(phase, step, self.state)
        if self.dies is not None and self.dies[:2] in ((phase, step), (phase, None)):
            self.passed += 1
            if self.passed == self.dies[2]:
                with self.job.changed:
                    self.job.changed.notify_all()
                    assert self.job.changed.wait_for(self.dies_when, 60)
                raise self.error
        if phase == Phase.IN_TRANSFER and self.slow_pieces:
            self.slow_pieces -= 1
            time.sleep(0.2)
        if (phase, step) == self.holds:
            with self.job.changed:
                assert self.job.changed.wait_for(lambda: self.waits_for in self.job.reported, 60)


class NoCheckpointer:
    def __init__(self, members: QuorumMembers, sentinel: Sentinel) -> None:
        self.members, self.sentinel = members, sentinel

    def save(self, state: TrainState) -> None:
        self.sentinel.check_before_save(state.step)
        self.members.world.agree(lambda: None)

    def poll(self) -> None:
        pass

    def finish(self, state: TrainState) -> None:
        self.members.world.agree(lambda: None)


@pytest.fixture(scope="module")
def calm(config: Config, prepared: Prepared) -> Job:
    job = Job(config, prepared, 1)
    job.start()
    return job.ended()


PHASES = [
    (Phase.BEFORE_FORWARD, 2, 1), (Phase.BEFORE_BACKWARD, 2, 2), (Phase.BEFORE_REDUCE, 2, 1), ("collective", 2, 3),
    ("collective", 2, 5), (Phase.AFTER_REDUCE, 2, 1), (Phase.BEFORE_UPDATE, 2, 1), (Phase.AFTER_UPDATE, 3, 1),
    (Phase.IN_EVAL, 3, 1), ("collective", 3, 1),
]  # fmt: skip
FIRST_STEP = [("restore", 0, 1), (Phase.BEFORE_FORWARD, 0, 5), (Phase.BEFORE_REDUCE, 0, 2), ("collective", 0, 10)]
"""The first step widens its grid: its second pass begins with a rank's fourth micro-batch."""


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("death", [*PHASES, *FIRST_STEP], ids=lambda death: f"{death[0]} of step {death[1]}")
def test_a_death_at_any_point_leaves_the_bits_as_they_are(calm: Job, death: Death, victim: int):
    job = Job(calm.config, calm.prepared, 3)
    for number in range(3):
        job.start(death if number == victim else None)
    job.ended()
    assert len(job.survivors) == 2
    assert job.hash() == calm.hash()
    assert job.distinct_commits() == calm.distinct_commits()


@pytest.mark.parametrize("victim", [0, 1])
def test_survivors_compute_none_of_their_own_micro_batches_again(calm: Job, victim: int):
    (redone,) = [done.redone for done in calm.workers[0].steps() if done.step == 5]
    assert redone == 0  # else each is computed once a pass
    job = Job(calm.config, calm.prepared, 3)
    for number in range(3):
        job.start(("collective", 4, 1) if number == victim else None)
    job.ended()
    computed = [index for worker in job.survivors for step, index in worker.computed if step == 4]
    assert sorted(computed) == list(range(8))


def test_a_member_that_is_a_step_behind_gets_the_state_from_a_peer(calm: Job):
    """The others apply the step, but its last reduction fails here: then its sums are of no use any more."""
    job = Job(calm.config, calm.prepared, 3)
    job.start()
    behind = job.start(("collective", 4, 6))
    behind.error = MembersChangedError("as if the connection were reset")
    behind.dies_when = lambda: len(job.commits.get(5, ())) == 2
    job.start()
    job.ended()
    (change,) = [change for change in behind.changes if change.received]
    assert change.step == 5
    assert len(job.survivors) == 3
    assert job.hash() == calm.hash()
    assert job.distinct_commits() == calm.distinct_commits()


def test_a_newcomer_gets_the_state_between_two_steps(calm: Job):
    job = Job(calm.config, calm.prepared, 2)
    first, second = job.start(), job.start((Phase.AFTER_UPDATE, 2, 1))
    first.holds = (Phase.BEFORE_REDUCE, 3)
    second.thread.join(60)
    third = job.start()
    job.ended()
    assert first.result == third.result == calm.hash()
    change = third.changes[0]
    assert change.received and change.step in (2, 3, 4)  # 2: it is let in by the epoch that the death begins
    assert {step for step, _ in third.computed} == set(range(change.step, 6))


def test_a_state_that_arrives_with_another_hash_is_not_used(calm: Job):
    job = Job(calm.config, calm.prepared, 2)
    first, second = job.start(), job.start((Phase.AFTER_UPDATE, 2, 1))
    first.holds = (Phase.BEFORE_REDUCE, 3)
    second.thread.join(60)
    third = job.start()
    third.state.state_sha256 = lambda: "00" * 32
    job.ended()
    assert isinstance(third.error, TransferError)
    assert first.result == calm.hash()


def test_a_piece_of_the_state_may_take_longer_than_a_look_at_the_epoch(calm: Job):
    job = Job(calm.config, calm.prepared, 2)
    first, second = job.start(), job.start((Phase.AFTER_UPDATE, 2, 1))
    first.holds, first.slow_pieces = (Phase.BEFORE_REDUCE, 3), 3
    second.thread.join(60)
    third = job.start()
    job.ended()
    assert first.result == third.result == calm.hash()
    assert job.arbiter.epoch is not None
    assert job.arbiter.epoch.number <= 3, "one epoch for the start, one for the death, one for the newcomer"


def test_a_state_that_arrived_in_part_is_not_used_when_its_giver_dies(calm: Job):
    """Nobody is left who has it, and there is no checkpoint: all begin with what they have built."""
    job = Job(calm.config, calm.prepared, 2)
    giver, second = job.start((Phase.IN_TRANSFER, None, 3)), job.start((Phase.AFTER_UPDATE, 2, 1))
    giver.holds = (Phase.BEFORE_REDUCE, 3)
    second.thread.join(60)
    third = job.start()
    third.thread.join(60)
    assert isinstance(third.error, TransferError)
    fresh = [job.start(), job.start()]
    job.ended()
    assert {worker.result for worker in fresh} == {calm.hash()}


def test_nobody_waits_for_the_sockets_of_a_member_that_is_stopped(calm: Job):
    """It stands before the reduction that the others wait in. The arbiter takes it for dead, the kernel does not."""
    job = Job(calm.config, calm.prepared, 3)
    job.start()
    silent = job.start((Phase.BEFORE_REDUCE, 4, 1))
    silent.dies_when = lambda: len(job.survivors) == 2
    job.start()
    with job.changed:
        assert job.changed.wait_for(lambda: silent.passed == 1, 60)
        job.perform(job.arbiter.closed(silent.member))
    job.ended()
    assert job.hash() == calm.hash()


def test_all_but_one_may_die_in_one_step(calm: Job):
    job = Job(calm.config, calm.prepared, 4)
    deaths = [(Phase.BEFORE_FORWARD, 2, 2), None, ("collective", 2, 1), (Phase.BEFORE_REDUCE, 2, 1)]
    for death in deaths:
        job.start(death)
    job.ended()
    assert [worker.member for worker in job.survivors] == [1]
    assert job.hash() == calm.hash()
    assert job.distinct_commits() == calm.distinct_commits()


def kill_the_writer(run: Path, at_step: int) -> None:
    """SIGKILL the first member once it has recorded this step."""
    log = events.path_of(run, 0, 0)
    assert wait_until(lambda: log.exists() and f'"step": {at_step},' in log.read_text(), 60)
    ((_, start),) = events.select(events.read_file(log), events.AttemptStarted)
    os.kill(start.pid, signal.SIGKILL)


@pytest.mark.slow
def test_the_death_of_the_writer_restarts_nobody_else_and_its_successor_joins(tmp_path: Path):
    run = tmp_path / "run"
    killer = threading.Thread(target=kill_the_writer, args=(run, 22))
    killer.start()
    done = trainer("launch", SMOKE, "--workers", "3", "--run", run)
    killer.join()
    entries = events.read(run)
    summary = summarise_run(run)
    assert summary["weights_sha256"] == SMOKE_SHA256
    assert [attempt["ended"] for attempt in summary["attempts"]] == ["finished"]
    death, join = [event for _, event in events.select(entries, MembersChanged)]
    assert (list(death.lost), death.joined) == (["0"], [])
    assert sorted(index for part in (death.kept, death.given) for own in part.values() for index in own) == [*range(8)]
    assert (join.lost, join.joined) == ({}, [3])
    # Two processes have written this log, one after the other: nothing is missing, nothing is there twice.
    assert [event.step for _, event in events.select(entries, StepDone)] == [*range(1, 61)]
    assert [event.step for _, event in events.select(entries, EvalDone)] == [30, 60]
    (incident,) = summary["incidents"]
    assert (incident["kind"], incident["rank"], incident["lost_steps"]) == ("worker_lost", 0, 0)
    assert "worker 0 was lost" in done.stdout and "joined" in done.stdout, done.stdout


@pytest.mark.slow
def test_a_process_of_a_hybrid_run_dies_and_the_other_group_finishes_the_step(tmp_path: Path):
    run = tmp_path / "run"
    kills = with_faults({"kind": "sigkill", "rank": rank, "at_step": step} for rank, step in ((3, 12), (0, 41)))
    done = trainer("launch", SMOKE, "--workers", "4", "--run", run, *settings(parallel__strategy="hybrid"), *kills)
    entries = events.read(run)
    assert summarise_run(run)["weights_sha256"] == SMOKE_SHA256
    deaths = [event for _, event in events.select(entries, MembersChanged) if event.lost]
    # Ranks 2 and 3 are worker 1: one dies, and both leave. Rank 0 is of the main member.
    assert [list(death.lost) for death in deaths] == [["1"], ["0"]]
    for death in deaths:
        shares = [own for part in (death.kept, death.given) for own in part.values()]
        assert sorted(index for own in shares for index in own) == [*range(8)]
    assert [event.step for _, event in events.select(entries, StepDone)] == [*range(1, 61)]
    assert events.select(entries, events.AttemptStarted)[0][1].world_size == 4
    assert "worker 1 was lost" in done.stdout, done.stdout
