"""The rendezvous store as a process of its own: served, refused, and outlived by the agents that meet there."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, SMOKE, SMOKE_SHA256, start, summarise_run, wait_until, worker_environment
from trainer.errors import EXIT_FINISHED, EXIT_PREEMPTED, UsageError
from trainer.launch import rendezvous
from trainer.launch.cluster import Cluster
from trainer.log import events, rundir


class PatientCluster(Cluster):
    """Its agents look for a store that is gone, and its job may come back after it has saved and left."""

    def _meeting(self, number: int) -> list[str]:
        more = f",{rendezvous.STORE_SECONDS}=60,{rendezvous.RESUMABLE}=1"
        return [option + more * option.startswith("--rdzv-conf=") for option in super()._meeting(number)]


def two_nodes(run: Path, directory: Path, step_seconds: float) -> PatientCluster:
    """Agents of two nodes that train smoke, with a store that belongs to neither."""
    return PatientCluster(
        SMOKE, run, (), ranks=1, nodes=2, own_store=True, directory=directory, warm=True,
        worker=("tests.worker", "train"), environment=worker_environment({"before_update": step_seconds}),
    )  # fmt: skip


def steps_of(run: Path) -> list[int]:
    found = events.read(run) if rundir.is_run(run) else []
    return [entry.event.step for entry in found if isinstance(entry.event, events.StepDone)]


@pytest.mark.slow
def test_agents_outlive_a_store_that_comes_back_empty_and_meet_there_when_a_worker_dies(tmp_path):
    run = tmp_path / "run"
    cluster = two_nodes(run, tmp_path / "start", step_seconds=0.15)
    with cluster:
        cluster.start()
        assert wait_until(lambda: len(steps_of(run)) > 3, 60), cluster.output
        assert cluster.store is not None
        cluster.store.kill()
        before = len(steps_of(run))
        cluster.start_store()
        assert wait_until(lambda: len(steps_of(run)) > before + 5, 30), cluster.output
        assert cluster.send(cluster.workers()[1], signal.SIGKILL)
        assert cluster.wait(60) == EXIT_FINISHED, cluster.output
    story = summarise_run(run)
    assert story["weights_sha256"] == SMOKE_SHA256
    assert [attempt["world_size"] for attempt in story["attempts"]] == [2, 2]


@pytest.mark.slow
def test_agents_that_left_with_75_since_one_was_asked_to_meet_again_under_the_same_id(tmp_path):
    """As when Kubernetes evicts one pod of a job: all ranks save, and all pods are started again."""
    run = tmp_path / "run"
    cluster = two_nodes(run, tmp_path / "start", step_seconds=0.1)
    with cluster:
        cluster.start()
        assert wait_until(lambda: len(steps_of(run)) > 3, 60), cluster.output
        assert cluster.nodes[1].signal(signal.SIGTERM)
        assert [node.process.wait(30) for node in cluster.nodes] == [EXIT_PREEMPTED] * 2, cluster.output
        again = [cluster.add_node(), cluster.add_node()]
        assert [node.process.wait(60) for node in again] == [EXIT_FINISHED] * 2, again[0].output
    story = summarise_run(run)
    assert story["weights_sha256"] == SMOKE_SHA256
    assert [attempt["ended"] for attempt in story["attempts"]][:: len(story["attempts"]) - 1] == [
        "preempted",
        "finished",
    ]


@pytest.mark.slow
def test_64_agents_meet_lose_eight_and_gain_eight():
    """The script checks that all have the same size, and each a rank of its own."""
    settings = "is_host=0,keep_alive_interval=2,keep_alive_max_attempt=3,last_call_timeout=3"
    command = [sys.executable, "-m", "scripts.bench_meeting", "64", "8", settings]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=110, cwd=ROOT)
    measured = json.loads(done.stdout)
    assert (measured["agents"], measured["lost"]) == (64, 8)
    assert measured["after_loss"] > 6  # 3 s of last call, and 4 or more until the missing heartbeats are noticed


@pytest.mark.parametrize("listen", ["", "29400", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999", ":29400"])
def test_what_is_no_address_is_refused(listen):
    with pytest.raises(UsageError, match="is no address"):
        rendezvous.serve(listen)


def test_a_port_that_another_process_has_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="cannot be listened at"):
        rendezvous.serve(f"127.0.0.1:{taken.getsockname()[1]}")


def test_the_store_is_served_until_a_signal_asks_to_leave(tmp_path):
    said = tmp_path / "said.txt"
    served = start([sys.executable, "-m", "trainer", "rendezvous", "--listen", "127.0.0.1:0"], said)
    try:
        assert wait_until(lambda: said.exists() and said.read_text().endswith(" listens\n"), 20)
        served.send_signal(signal.SIGTERM)
        assert served.wait(20) == EXIT_FINISHED
    finally:
        served.kill()
