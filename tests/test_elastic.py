"""Nodes that leave and nodes that join: several torchrun agents on this machine, each with one worker."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import SMOKE, Job, settings, trainer, wait_until
from trainer.log import events, summary
from trainer.parallel import elastic

pytestmark = pytest.mark.slow

STEPS = 60
SETTINGS = settings(
    budget__steps=STEPS, checkpoint__every_steps=5, data__micro_batches=4, model__n_layers=1, eval__every_steps=0,
    eval__max_tokens=320,
)  # fmt: skip
# The loss of a node is detected after 3 s; a round is closed 1 s after the last call.
RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1,join_timeout=60,read_timeout=30"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("reference") / "run"
    trainer("train", SMOKE, "--run", run, *SETTINGS)
    return summary.summarise(run)


class Nodes:
    """Agents of one job. The first hosts the rendezvous store and must live."""

    def __init__(self, directory: Path, jobs: ExitStack, seconds_a_step: float) -> None:
        self._jobs, self.run = jobs, directory / "run"
        self._directory, self._slow = directory / "jobs", {"before_update": seconds_a_step}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]

    def join(self, **more: Any) -> Job:
        options = [
            "--nnodes=1:3", "--nproc-per-node=1", "--max-restarts=5", "--monitor-interval=0.1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self._port}", f"--rdzv-id={self._port}",
            f"--rdzv-conf={RENDEZVOUS}", "--local-addr=127.0.0.1",
        ]  # fmt: skip
        job = Job(self._directory, SMOKE, self.run, SETTINGS, options, slow=self._slow, **more)
        return self._jobs.enter_context(job)

    def host(self) -> Job:
        """Start the first agent and wait until its store can be reached."""
        first = self.join()
        assert wait_until(self._listens, seconds=30), first.output
        return first

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def await_new_step(self, world_size: int, *jobs: Job, since: float = 0.0) -> float:
        """Wait for an attempt of so many ranks, begun after `since`, to do a step that none before it did.

        Returns the seconds from `since` to the end of that step.
        """

        def first() -> float | None:
            begun = [a["attempt"] for a in attempts(self.run) if a["world_size"] == world_size and a["started"] > since]
            return min((entry.time for attempt in begun for entry in new_steps(self.run, attempt)), default=None)

        at = wait_until(first, seconds=45)
        assert at, "\n".join(job.output[-5000:] for job in jobs)
        return round(at - since, 2)


def attempts(run: Path) -> list[dict[str, Any]]:
    return summary.summarise(run)["attempts"] if (run / "events").exists() and events.read(run) else []


def new_steps(run: Path, attempt: int) -> list[events.Entry]:
    done = [entry for entry in events.read(run) if isinstance(entry.event, events.StepDone)]
    before = max((entry.event.step for entry in done if entry.attempt < attempt), default=0)  # pyright: ignore
    return [entry for entry in done if entry.attempt == attempt and entry.event.step > before]  # pyright: ignore


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Callable[[float], Nodes]]:
    with ExitStack() as jobs:
        yield lambda seconds_a_step: Nodes(tmp_path, jobs, seconds_a_step)


def ends_as_reference(run: Path, reference: dict[str, Any]) -> dict[str, Any]:
    run_summary = summary.summarise(run)
    wanted = ("status", "step", "weights_sha256", "state_sha256", "train")
    assert {key: run_summary[key] for key in wanted} == {key: reference[key] for key in wanted}
    assert run_summary["replayed_differently"] == []
    return run_summary


def test_a_node_joins_another_joins_and_one_dies_and_the_run_ends_as_the_reference(nodes, reference, record_property):
    """1 → 2 → 3 (4 micro-batches over 3 ranks) → 2 ranks; the last by SIGKILL of an agent and its worker at once."""
    team = nodes(0.12)
    first = team.host()
    team.await_new_step(1, first)
    gains = []
    for size in (2, 3):
        joined = time.time()
        last = team.join()
        gains.append(team.await_new_step(size, first, last, since=joined))
    killed = time.time()
    last.kill()
    loss = team.await_new_step(2, first, since=killed)
    assert first.wait(60) == 0, first.output[-6000:]
    run_summary = ends_as_reference(team.run, reference)
    assert [attempt["world_size"] for attempt in run_summary["attempts"]] == [1, 2, 3, 2]
    record_property("seconds", {"gain": gains, "loss": loss})
    print(f"node gained → next new step {gains} s, node lost → next new step {loss} s")
    assert first.leftovers() == []


def test_an_agent_dies_alone_and_its_worker_does_not_outlive_the_job(nodes, reference):
    """The worker of a dead agent continues until its peers start again without it; then it must end on its own."""
    team = nodes(0.1)
    first = team.host()
    second = team.join()
    team.await_new_step(2, first, second)
    killed = time.time()
    os.kill(second.process.pid, signal.SIGKILL)
    team.await_new_step(1, first, second, since=killed)
    assert first.wait(60) == 0, first.output[-6000:]
    ends_as_reference(team.run, reference)
    assert second.process.wait(5) == -signal.SIGKILL
    assert wait_until(lambda: not second.processes(), seconds=5), second.leftovers()


def test_a_worker_under_torchs_own_torchrun_says_which_variable_is_missing(tmp_path):
    run = tmp_path / "run"
    few = settings(budget__steps=2, checkpoint__every_steps=0, eval__every_steps=0)
    options = ["--standalone", "--nproc-per-node=1"]
    # "--", or Python before 3.12.8 takes our --run for an abbreviation of torchrun's --run-path
    plain = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "--", "tests.worker"]
    with Job(tmp_path / "jobs", SMOKE, run, few, [], launch=plain, environment={elastic.SHARED_STORE: "0"}) as job:
        assert job.wait(60) == 0, job.output
    assert elastic.SHARED_STORE in job.output
    warned = [entry.event.message for entry in events.read(run) if isinstance(entry.event, events.Warned)]
    assert warned == [elastic.SHARED_STORE_WARNING]
    assert json.loads(trainer("inspect", run, "--json").stdout)["warnings"]
