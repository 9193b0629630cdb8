"""Faults from outside: real agents, real signals, and a run that must end with the bits of the reference run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import logs
from tests.support import SMOKE, settings, trainer, wait_until, worker_environment
from trainer import config as configs
from trainer.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED
from trainer.faults import plan as plans
from trainer.faults.fault import KINDS
from trainer.faults.nemesis import Nemesis
from trainer.faults.plan import PlannedFault
from trainer.launch.agent import Agent
from trainer.launch.cluster import Cluster
from trainer.launch.namespaces import Hosts
from trainer.log import events, summary
from trainer.log.events import AttemptStarted

STEPS = 60
SETTINGS = settings(
    budget__steps=STEPS, checkpoint__every_steps=10, data__micro_batches=4, model__n_layers=1, eval__every_steps=0,
    eval__max_tokens=320, elastic__step_timeout_seconds=3.0, elastic__startup_timeout_seconds=10.0,
)  # fmt: skip
SECONDS_A_LAUNCH = 240
LAUNCHES = 5

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find ranks")


def planned(*faults: dict[str, Any], ranks: int = 2) -> list[PlannedFault]:
    return plans.make(configs.parse({"faults": faults}), ranks)


# Without a job: the ranks that are hit, and the time


@dataclass
class Recorded:
    """A cluster that only notes what is done to it, and what the run's record said by then."""

    run: Path
    ranks: Mapping[int, int] = field(default_factory=lambda: {0: 100, 1: 101})
    hosts: Hosts | None = None
    nodes: Sequence[Any] = ()
    store: Any = None
    running: bool = True
    sent: list[tuple[int, int]] = field(default_factory=list)
    recorded: list[int] = field(default_factory=list)

    def workers(self) -> Mapping[int, int]:
        return self.ranks

    def processes(self) -> list[int]:
        return list(self.ranks.values())

    def send(self, pid: int, number: int) -> bool:
        self.sent.append((pid, number))
        self.recorded.append(len(plans.fired(self.run)))
        return True

    def add_node(self) -> Any:
        raise AssertionError("no test asked for a node")

    def start_store(self) -> None:
        raise AssertionError("no test asked for a store")


class Log(logs.Run):
    """A run's log, written as its rank 0 would."""

    def __init__(self, run: Path, attempt: int | None = None) -> None:
        """If an `attempt` is given, it has begun."""
        super().__init__(run)
        run.mkdir()
        if attempt is not None:
            self.claim()
            self.begin(attempt)

    def claim(self) -> None:
        (self.path / "config.json").write_text("{}")

    def begin(self, attempt: int, world_size: int = 2) -> None:
        self.attempt = attempt
        self.write(logs.started(world_size=world_size, pid=100))

    def step(self, step: int) -> None:
        self.write(logs.step(step))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


Start = Callable[..., Nemesis]


@pytest.fixture
def start(run: Path) -> Iterator[Start]:
    """Starts a nemesis with these faults, and stops it after the test."""
    made: list[Nemesis] = []

    def start(cluster: Any, *faults: dict[str, Any], started: float | None = None) -> Nemesis:
        made.append(Nemesis(planned(*faults), run, cluster, time.time() if started is None else started))
        made[-1].start()
        return made[-1]

    yield start
    for nemesis in made:
        nemesis.stop()


def settled(cluster: Recorded, count: int) -> list[tuple[int, int]]:
    """The signals sent, a little after there are so many."""
    wait_until(lambda: len(cluster.sent) >= count, seconds=5)
    time.sleep(0.15)
    return cluster.sent


def test_a_fault_waits_for_its_step_and_is_on_record_before_it_acts(run, start):
    log, cluster = Log(run), Recorded(run)
    start(cluster, {"kind": "straggler", "at_step": 3, "rank": 1, "seconds": 0.1})
    log.claim()
    log.begin(attempt=0)
    log.step(1)
    assert settled(cluster, 0) == []
    log.step(2)
    assert settled(cluster, 2)[:2] == [(101, signal.SIGSTOP), (101, signal.SIGCONT)]
    assert cluster.recorded[0] == 1
    ((entry, event),) = plans.fired(run)
    assert (entry.attempt, entry.rank, event.pid) == (0, -1, os.getpid())
    assert (event.fault, event.victim, event.step) == ("straggler", 1, 3)


def test_a_fault_after_so_many_seconds_counts_from_the_first_launch_and_waits_for_its_attempt(run, start):
    log, cluster = Log(run), Recorded(run)
    later = {"kind": "stopped", "at_seconds": 0, "attempt": 1}
    start(cluster, {"kind": "sigkill", "at_seconds": 5, "rank": 0}, later, started=time.time() - 4.5)
    log.claim()
    log.begin(attempt=0)
    assert cluster.sent == []
    assert settled(cluster, 1) == [(100, signal.SIGKILL)]
    log.begin(attempt=1)
    assert settled(cluster, 2)[1][1] == signal.SIGSTOP
    assert [entry.attempt for entry, _ in plans.fired(run)] == [0, 1]


def test_a_worker_that_has_not_written_yet_belongs_to_the_attempt_that_is_coming(run, start):
    Log(run, attempt=3)  # whose rank 0 is process 100, so these are the next:
    cluster = Recorded(run, ranks={0: 200, 1: 201})
    start(cluster, {"kind": "sigkill", "at_seconds": 0, "rank": 0}, {"kind": "sigabrt", "at_seconds": 0, "rank": 1})
    settled(cluster, 2)
    assert [(entry.attempt, event.step) for entry, event in plans.fired(run)] == [(4, None), (3, 1)]


def test_a_recorded_fault_does_not_fire_again(run, start):
    Log(run, attempt=0)
    faults = {"kind": "sigterm", "at_seconds": 0, "rank": "all"}, {"kind": "sigkill", "at_seconds": 0, "rank": 1}
    first, second = Recorded(run), Recorded(run)
    for cluster in (first, second):
        start(cluster, *faults)
        settled(cluster, 3 if cluster is first else 0)
    assert sorted(first.sent) == [(100, signal.SIGTERM), (101, signal.SIGKILL), (101, signal.SIGTERM)]
    assert second.sent == []
    assert [(event.index, event.victim) for _, event in plans.fired(run)] == [(0, 0), (0, 1), (1, 1)]


def test_nothing_is_written_where_the_run_has_not_yet_claimed_its_directory(run, start):
    log, cluster = Log(run), Recorded(run)
    start(cluster, {"kind": "sigkill", "at_seconds": 0, "rank": 1})
    assert settled(cluster, 0) == [] and list(run.iterdir()) == []
    log.claim()
    assert settled(cluster, 1) == [(101, signal.SIGKILL)]


def test_a_rank_that_is_not_there_is_waited_for_and_a_smaller_world_has_other_victims(run, start):
    log, cluster = Log(run, attempt=0), Recorded(run, ranks={0: 100})
    start(cluster, {"kind": "sigkill", "at_seconds": 0, "rank": 1})
    assert settled(cluster, 0) == []
    log.begin(attempt=1, world_size=1)
    assert settled(cluster, 1) == [(100, signal.SIGKILL)]


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS.values() if kind.group == "network"])
def test_a_fault_that_the_cluster_cannot_make_is_a_problem_and_no_firing(run, start, kind):
    Log(run, attempt=0)
    nemesis = start(Recorded(run), {"kind": kind, "at_step": 1})
    assert wait_until(lambda: nemesis.problems, seconds=5)
    assert kind in nemesis.problems[0] and plans.fired(run) == []


# Real processes, without torch


def sleepers(log: Path) -> Agent:
    """A job of one process that starts another."""
    program = (
        "import os, subprocess, sys, time\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
        "time.sleep(60)"
    )
    return Agent(["-c", program], log, launch=[sys.executable])


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@needs_proc
def test_a_job_signals_its_own_processes_and_no_others(tmp_path):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with sleepers(tmp_path / "first.txt") as first, sleepers(tmp_path / "second.txt") as second:
            assert wait_until(lambda: len(first.processes()) == len(second.processes()) == 2, seconds=10)
            child = int(first.output)
            assert first.processes() == [first.process.pid, child]
            for foreign in (stranger.pid, os.getpid(), *second.processes(), 2**22 + 1):
                assert not first.send(foreign, signal.SIGKILL)
            assert first.send(child, signal.SIGSTOP) and wait_until(lambda: state(child) == "T", seconds=5)
            assert first.send(child, signal.SIGCONT) and wait_until(lambda: state(child) == "S", seconds=5)
            first.process.kill()
            first.process.wait()
            assert first.processes() == [child], "found even after its agent has ended"
            assert not first.signal(signal.SIGKILL) and len(first.leftovers()) == 1
            first.kill()
            assert first.leftovers() == [] and second.running and stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@needs_proc
def test_stopping_lets_a_stopped_straggler_continue(tmp_path, run, start):
    Log(run, attempt=0)
    with sleepers(tmp_path / "log.txt") as job:
        assert wait_until(lambda: job.output, seconds=10)
        child = int(job.output)
        cluster = Recorded(run, ranks={0: child})
        cluster.send = job.send  # type: ignore[method-assign]
        nemesis = start(cluster, {"kind": "straggler", "at_step": 1, "rank": 0, "seconds": 60, "duty": 1.0})
        assert wait_until(lambda: state(child) == "T", seconds=5)
        nemesis.stop()
        assert state(child) != "T" and nemesis.problems == []


# Real jobs


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("reference") / "run"
    trainer("train", SMOKE, "--run", run, *SETTINGS)
    return summary.summarise(run)


class Attack:
    """A run under a plan: launched, and launched again with the same command, until it has finished."""

    def __init__(
        self,
        directory: Path,
        faults: Sequence[dict[str, Any]],
        nodes: int,
        hosts: Hosts | None = None,
        seconds_a_step: float = 0.07,
    ) -> None:
        self.directory, self.run, self.nodes, self.hosts = directory, directory / "run", nodes, hosts
        self._seconds_a_step = seconds_a_step
        self.ranks = 2 if nodes == 1 else 1
        self.plan = planned(*faults, ranks=self.ranks * nodes)
        self.statuses: list[int] = []
        self.outputs: list[str] = []

    def run_to_end(self) -> dict[str, Any]:
        """Launch until the run has finished; returns its summary. No launch may leave anything behind."""
        environment = worker_environment({"before_update": self._seconds_a_step})
        began = time.time()
        for number in range(LAUNCHES):
            with Cluster(
                SMOKE, self.run, SETTINGS[1::2], ranks=self.ranks, nodes=self.nodes, hosts=self.hosts,
                directory=self.directory / f"launch-{number}", environment=environment,
                own_store=any(fault.kind.needs_store for fault in self.plan), worker=("tests.worker", "train"),
                warm=True,
            ) as cluster:  # fmt: skip
                cluster.start()
                nemesis = Nemesis(self.plan, self.run, cluster, began)
                nemesis.start()
                status = cluster.wait(SECONDS_A_LAUNCH)
                nemesis.stop()
                self.outputs.append(cluster.output)
                assert status is not None, cluster.output[-6000:]
                assert nemesis.problems == []
                assert cluster.leftovers() == []
            self.statuses.append(status)
            if status == EXIT_FINISHED:
                return summary.summarise(self.run)
        raise AssertionError(f"{self.statuses}\n{self.outputs[-1][-6000:]}")

    def survive(self, reference: dict[str, Any]) -> None:
        """Run to the end: it must equal the reference, and every fault must have fired."""
        run_summary = self.run_to_end()
        wanted = ("status", "step", "weights_sha256", "state_sha256", "train", "eval")
        assert {key: run_summary[key] for key in wanted} == {key: reference[key] for key in wanted}
        assert run_summary["replayed_differently"] == []
        assert sorted({event.index for _, event in plans.fired(self.run)}) == [fault.index for fault in self.plan]

    def sizes(self) -> list[int]:
        """World sizes of the attempts."""
        return [
            e.event.world_size for e in events.read(self.run) if e.rank == 0 and isinstance(e.event, AttemptStarted)
        ]


def real(test: Any) -> Any:
    """Mark for tests of real jobs: slow, and the machine may be shared."""
    return pytest.mark.slow(pytest.mark.timeout(400)(needs_proc(test)))


@real
def test_signals_at_a_wall_time_end_as_the_reference(tmp_path, reference):
    """One after the other, each in the attempt after the last; a rank that it stops is detected and replaced."""
    kinds = ("sigkill", "sigabrt", "stopped")
    faults = [{"kind": kind, "at_seconds": 0, "attempt": n, "rank": n % 2} for n, kind in enumerate(kinds)]
    attack = Attack(tmp_path, [*faults, {"kind": "straggler", "at_step": 30, "seconds": 0.6, "rank": 1}], nodes=1)
    attack.survive(reference)
    assert attack.statuses == [EXIT_FINISHED]
    assert len(attack.sizes()) == 4


@real
def test_a_notice_then_a_dead_agent_then_a_dead_node_and_the_same_command_resumes(tmp_path, reference):
    faults = [
        {"kind": "sigterm", "at_seconds": 0, "rank": 1},
        {"kind": "agent_killed", "at_step": 20},
        {"kind": "node_killed", "at_step": 40},
    ]
    attack = Attack(tmp_path, faults, nodes=1)
    attack.survive(reference)
    assert attack.statuses == [EXIT_PREEMPTED, 137, 137, EXIT_FINISHED]


@real
def test_a_node_leaves_another_joins_one_joins_and_dies_and_one_joins_slowly(tmp_path, reference):
    faults = [
        {"kind": "node_leaves", "at_step": 5},
        {"kind": "node_joins", "at_step": 12},
        {"kind": "node_flaps", "at_step": 28, "times": 1},
        {"kind": "slow_joiner", "at_step": 45, "seconds": 1.0},
    ]
    attack = Attack(tmp_path, faults, nodes=2, seconds_a_step=0.2)
    attack.survive(reference)
    assert attack.statuses == [EXIT_FINISHED]
    sizes = attack.sizes()
    assert sizes[:3] == [2, 1, 2] and 3 in sizes


@real
def test_the_rendezvous_store_freezes_without_effect_then_restarts_empty_then_is_gone(tmp_path, reference):
    faults = [
        {"kind": "store_unreachable", "at_step": 5, "seconds": 1.0},
        {"kind": "store_restarted", "at_step": 30},
        {"kind": "store_killed", "at_step": 45},
    ]
    attack = Attack(tmp_path, faults, nodes=2)
    attack.survive(reference)
    assert len(attack.statuses) == 3
    # The agent gives up, or its workers, asked to leave, are the first to have left.
    assert set(attack.statuses[:2]) <= {EXIT_FAILED, EXIT_PREEMPTED}
    assert "Traceback" not in attack.outputs[0] and "The same command resumes" in attack.outputs[0]
