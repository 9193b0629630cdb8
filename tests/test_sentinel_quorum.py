"""The sentinel where members change: they check one another, heal from a peer, and go on without one that is wrong."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.faulty_runs import fault
from tests.support import SMOKE, settings, summarise_run, trainer, with_faults
from tests.test_quorum import Death, Job, Worker
from trainer import config as configs
from trainer.config import Config
from trainer.data import Prepared, prepare
from trainer.errors import CorruptionError, QuarantineError
from trainer.log.events import Corrupted
from trainer.phases import Phase
from trainer.step import TrainState

SETTINGS = ["budget.steps=6", "eval.every_steps=0", "model.n_layers=1"]
ON = ['sentinel.audit="1"', "sentinel.state_hash_every_steps=1"]


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    config = configs.load(SMOKE, SETTINGS)
    return prepare(config.data, config.eval, config.model.context)


@pytest.fixture(scope="module")
def calm(prepared: Prepared) -> Job:
    """The same steps without a sentinel, on one worker."""
    job = Job(configs.load(SMOKE, SETTINGS), prepared, 1)
    job.start()
    return job.ended()


@pytest.fixture(scope="module")
def watched() -> Config:
    return configs.load(SMOKE, [*SETTINGS, *ON])


@dataclass
class Flip:
    """Flips a bit of a worker's weights or gradients at a phase, so often, after `first` completed steps or more."""

    what: str
    phase: str
    first: int
    times: int = 1

    def __call__(self, phase: str, step: int, state: TrainState) -> None:
        if phase == self.phase and step >= self.first and self.times:
            self.times -= 1
            tensor = next(iter(state.sharding.parameters.values())).data
            if self.what == "gradient":
                tensor = next(gradient for _, gradient, _ in state.sharding.gradients())
            tensor.view(torch.int32).view(-1)[7] ^= 1 << 21


class FlipOnce(Flip):
    """Flips it in the first computation of a step alone."""

    last = -1

    def __call__(self, phase: str, step: int, state: TrainState) -> None:
        if step != self.last and phase == self.phase:
            super().__call__(phase, step, state)
            self.last = step


def run(config: Config, prepared: Prepared, spoils: dict[int, Flip], deaths: dict[int, Death], workers: int = 3) -> Job:
    job = Job(config, prepared, workers)
    started = [job.prepare(deaths.get(number)) for number in range(workers)]
    for number, spoil in spoils.items():
        started[number].spoil = spoil
    for worker in started:
        worker.thread.start()
    return job.ended()


def found(worker: Worker) -> list[tuple[int, str, int | None, str]]:
    return [(e.step, e.what, e.culprit, e.action) for e in worker.records if isinstance(e, Corrupted)]


def ends_as(calm: Job, job: Job, survivors: int) -> None:
    assert len(job.survivors) == survivors
    assert job.hash() == calm.hash()
    assert job.distinct_commits() == calm.distinct_commits()


@pytest.mark.parametrize(
    "death",
    [
        None, (Phase.BEFORE_FORWARD, 2, 2), *(("collective", 2, n) for n in (1, 5, 9, 13)), (Phase.BEFORE_UPDATE, 2, 1),
        (Phase.AFTER_UPDATE, 3, 1), ("collective", 3, 1), ("collective", 0, 12),
    ],
    ids=lambda death: f"{death[0]} of step {death[1]}, {death[2]}" if death else "no death",
)  # fmt: skip
def test_a_death_at_any_point_of_a_checked_step_leaves_the_bits_and_accuses_nobody(
    calm: Job, watched: Config, prepared: Prepared, death: Death | None
):
    job = run(watched, prepared, {}, {} if death is None else {1: death})
    ends_as(calm, job, survivors=3 if death is None else 2)
    assert [found(worker) for worker in job.workers] == [[], [], []]


@pytest.mark.parametrize(
    ("flip", "finding"),
    [
        (Flip("weights", Phase.BEFORE_FORWARD, 4), (5, "state", 1, "repaired")),
        (Flip("gradient", Phase.BEFORE_REDUCE, 4), (5, "gradient", 1, "repaired")),
        (Flip("gradient", Phase.AFTER_REDUCE, 4), (5, "reduction", 1, "repaired")),
        (Flip("weights", Phase.AFTER_UPDATE, 5), (5, "state", 1, "repaired")),
    ],
    ids=["weights", "gradient", "received sum", "update"],
)  # fmt: skip
def test_what_one_member_has_wrong_is_repaired_in_its_step_and_the_main_member_logs_it(
    calm: Job, watched: Config, prepared: Prepared, flip: Flip, finding: tuple[int, str, int | None, str]
):
    job = run(watched, prepared, {1: Flip(**vars(flip))}, {})
    assert len(job.survivors) == 3 and job.hash() == calm.hash()
    assert [found(worker) for worker in job.workers] == [[finding], [], []]


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("times", [1000, 2], ids=["that stays wrong", "that is wrong in two steps"])
def test_a_member_that_stays_wrong_or_is_wrong_twice_is_excluded_and_the_others_go_on_with_the_bits_of_all(
    calm: Job, watched: Config, prepared: Prepared, wrong: int, times: int
):
    kind = Flip if times > 2 else FlipOnce
    job = run(watched, prepared, {wrong: kind("gradient", Phase.BEFORE_REDUCE, 4, times)}, {})
    ends_as(calm, job, survivors=2)
    (error,) = [worker.error for worker in job.workers if worker.result is None]
    assert job.workers[wrong].result is None and isinstance(error, QuarantineError)
    assert f"replace node {socket.gethostname()}. The others go on" in str(error)
    last = [finding for worker in job.workers for finding in found(worker)][-1]
    assert last == (5 if times > 2 else 6, "gradient", wrong, "excluded")


def test_a_member_that_joined_after_the_first_time_decides_as_those_that_counted_it(
    calm: Job, watched: Config, prepared: Prepared
):
    job = Job(watched, prepared, 3)
    first, wrong, dying = (job.prepare(death) for death in (None, None, (Phase.AFTER_UPDATE, 4, 1)))
    wrong.spoil = Twice(Flip("gradient", Phase.AFTER_REDUCE, 3), Flip("gradient", Phase.AFTER_REDUCE, 5))
    first.holds = (Phase.BEFORE_REDUCE, 4)
    first.waits_for = 3
    for worker in (first, wrong, dying):
        worker.thread.start()
    dying.thread.join(60)
    joined = job.start()
    job.ended()
    assert {worker.member for worker in job.survivors} == {first.member, joined.member}
    assert job.hash() == calm.hash()
    assert found(first) == [(4, "reduction", 1, "repaired"), (6, "reduction", 1, "excluded")]


@dataclass
class Twice:
    first: Callable[[str, int, TrainState], None]
    second: Callable[[str, int, TrainState], None]

    def __call__(self, phase: str, step: int, state: TrainState) -> None:
        self.first(phase, step, state)
        self.second(phase, step, state)


def test_a_state_that_changed_before_the_members_meet_is_handed_to_nobody(
    calm: Job, watched: Config, prepared: Prepared
):
    """It changes while member 2's death is waited for. Its rank leaves instead of meeting the others."""
    job = run(watched, prepared, {0: Flip("weights", "collective", 3)}, {2: (Phase.AFTER_UPDATE, 3, 1)})
    assert [worker.member for worker in job.survivors] == [1]
    assert job.hash() == calm.hash()
    assert found(job.workers[0]) == [(3, "state", 0, "restarted")]
    assert isinstance(job.workers[0].error, CorruptionError) and job.workers[0].error.restart


FEW = settings(budget__steps=160, eval__max_tokens=128, model__n_layers=1)


@pytest.fixture(scope="module")
def few_sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights that a run of one rank ends with."""
    run = tmp_path_factory.mktemp("few") / "run"
    trainer("train", SMOKE, "--run", run, *FEW)
    return summarise_run(run)["weights_sha256"]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("strategy", "workers", "wrong", "left"), [("replicate", 3, 1, 2), ("hybrid", 4, 2, 1)])
def test_a_launched_job_goes_on_without_the_member_that_computes_wrong_and_names_its_node(
    tmp_path: Path, few_sha256: str, strategy: str, workers: int, wrong: int, left: int
):
    chosen = [
        *FEW,
        *with_faults([fault("always_wrong", 5, wrong)]),
        *settings(parallel__strategy=strategy, sentinel__audit="1", sentinel__state_hash_every_steps=1),
    ]
    done = trainer("launch", SMOKE, "--workers", str(workers), "--run", tmp_path / "run", *chosen)
    summary = summarise_run(tmp_path / "run")
    assert (summary["status"], summary["weights_sha256"]) == ("finished", few_sha256)
    assert set(summary["sentinel"]["found"]) == {"excluded"}
    corrupted = [incident for incident in summary["incidents"] if incident["kind"] == "corrupted"]
    assert {(incident["rank"], incident["step"]) for incident in corrupted} == {(1, 5)}
    assert f"its worker on node {socket.gethostname()} is not started again" in corrupted[0]["text"]
    assert f"quarantined, because it computed wrong twice. This node has {left} left." in done.stderr
