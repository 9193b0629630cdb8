"""The launcher of quorum mode: whom it starts again, what it passes on, with which status it leaves.

Its workers compute nothing (tests/quorum_worker.py), but they, the arbiter and the launcher are real processes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tests.support import ROOT, SMOKE
from trainer import config as configs
from trainer.errors import ConfigError, WorldError
from trainer.launch import quorum
from trainer.parallel import arbiter, elastic

pytestmark = [pytest.mark.timeout(60), pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")]


class Launched:
    """A launcher with workers that do as `behaviour` says."""

    def __init__(
        self, directory: Path, behaviour: str, workers: int, spares: int = 0, what: str = "launch",
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        directory.mkdir(exist_ok=True)
        self.directory = directory
        command = [sys.executable, "-m", "tests.quorum_worker", what, directory, behaviour, workers, spares]
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(variables), text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def joined_by(
        self, name: str, behaviour: str, variables: Mapping[str, str] = MappingProxyType({})
    ) -> "Launched":  # fmt: skip
        """A launcher on what stands for another node: it knows the run directory, and its workers have their own."""
        run = self.directory / "run"
        address = json.loads((run / "quorum" / "address.json").read_text())["address"]
        told = {"RUN": str(run), "JOIN": address} | dict(variables)
        return Launched(self.directory / name, behaviour, 1, what="join", variables=told)

    def ends(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=50)
        return self.process.returncode, errors

    def lives(self, slot: int) -> int:
        """Count the starts of a worker in this slot."""
        return len((self.directory / f"lives of {slot}").read_text().split())

    def members(self, epoch: int) -> str:
        return (self.directory / f"epoch {epoch}").read_text()

    def members_over_time(self) -> list[str]:
        """The members of each epoch up to the successor's first, in the order of their numbers."""
        last = int((self.directory / "successor").read_text())
        return ["".join(sorted(self.members(epoch).split())) for epoch in range(1, last + 1)]

    def wait_for(self, name: str) -> None:
        while not (self.directory / name).exists():
            assert self.process.poll() is None
            time.sleep(0.02)


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[list[Launched]]:
    started: list[Launched] = []
    yield started
    for job in started:
        job.process.kill()
        job.process.communicate()


def test_a_killed_worker_is_started_again_alone_and_joins(tmp_path: Path, launched: list[Launched]):
    launched.append(job := Launched(tmp_path, "dies once", 3))
    assert job.ends() == (0, "")
    assert [job.lives(slot) for slot in range(3)] == [1, 2, 1]
    # The successor may be quicker than a member that is still on its way out of the first epoch.
    assert job.members_over_time() in (["012", "02", "023"], ["012", "023"])


def test_a_spare_takes_the_place_of_a_killed_worker(tmp_path: Path, launched: list[Launched]):
    launched.append(job := Launched(tmp_path, "a spare", 2, spares=1))
    job.wait_for("epoch 1")
    for number in range(3):
        job.wait_for(f"pid of {number}")
    first, second = job.members(1).split()
    (spare,) = {"0", "1", "2"} - {first, second}
    os.kill(int((tmp_path / f"pid of {second}").read_text()), signal.SIGKILL)
    # At once, or an epoch later if it was still on its way to the arbiter.
    job.wait_for("epoch 2")
    epoch = 2 if spare in job.members(2).split() else 3
    job.wait_for(f"epoch {epoch}")
    assert {*job.members(epoch).split()} == {first, spare}
    (tmp_path / "told").touch()
    assert job.ends()[0] == 0


def test_a_worker_that_dies_at_every_start_is_given_up_by_name_and_the_others_finish(
    tmp_path: Path, launched: list[Launched]
):
    launched.append(job := Launched(tmp_path, "dies at every start", 2))
    assert job.process.stderr is not None
    said = job.process.stderr.readline()
    assert "worker 1 of" in said
    assert f"{quorum.STARTS} times in a row before it took part. This node has 1 left." in said
    (tmp_path / "told").touch()
    assert (job.ends()[0], job.lives(0), job.lives(1)) == (0, 1, 1 + quorum.STARTS)


@pytest.mark.parametrize(
    ("behaviour", "status", "left"), [("quarantined", 0, 2), ("all quarantined", 76, 0)], ids=["one", "all"]
)
def test_a_worker_in_quarantine_is_not_started_again_and_the_others_finish_if_there_are_any(
    tmp_path: Path, launched: list[Launched], behaviour: str, status: int, left: int
):
    launched.append(job := Launched(tmp_path, behaviour, 3))
    ended, errors = job.ends()
    assert (ended, [job.lives(slot) for slot in range(3)]) == (status, [1, 1, 1])
    assert f"quarantined, because it computed wrong twice. This node has {left} left." in errors


def test_only_the_worker_that_is_stopped_is_ended_and_a_successor_joins(tmp_path: Path, launched: list[Launched]):
    launched.append(job := Launched(tmp_path, "stops", 3))
    status, errors = job.ends()
    assert (status, [job.lives(slot) for slot in range(3)]) == (0, [1, 2, 1])
    assert errors.startswith("worker 1 of")
    assert errors.endswith("is ended: it does not run: it did not say how far it is.\n")
    # The successor may be quicker than a member that is still on its way out of the first epoch.
    assert job.members_over_time() in (["012", "02", "023"], ["012", "023"])


@pytest.mark.parametrize(("behaviour", "status"), [("wrong usage", 2), ("hopeless", 1)])
def test_an_error_that_would_be_repeated_ends_the_job_and_is_not_tried_again(
    tmp_path: Path, launched: list[Launched], behaviour: str, status: int
):
    launched.append(job := Launched(tmp_path, behaviour, 2))
    assert job.ends()[0] == status
    assert job.lives(0) == 1


def test_a_signal_to_the_launcher_lets_the_workers_save_and_ends_with_75(tmp_path: Path, launched: list[Launched]):
    launched.append(job := Launched(tmp_path, "waits", 2))
    job.wait_for("epoch 1")
    job.process.send_signal(signal.SIGINT)
    assert job.ends() == (75, "")


def test_a_worker_that_is_asked_to_stop_stops_the_job(tmp_path: Path, launched: list[Launched]):
    launched.append(job := Launched(tmp_path, "waits", 2))
    job.wait_for("epoch 1")
    os.kill(int((tmp_path / "lives of 1").read_text()), signal.SIGTERM)
    assert job.ends() == (75, "")


def test_a_killed_arbiter_is_started_again_and_nobody_else(tmp_path: Path, launched: list[Launched]):
    launched.append(job := Launched(tmp_path, "waits", 2))
    job.wait_for("epoch 1")
    children = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text().split()
    arbiters = [pid for pid in children if "trainer.parallel.arbiter" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(*arbiters), signal.SIGKILL)
    job.wait_for("epoch 2")
    assert job.members(2) == job.members(1)
    job.process.send_signal(signal.SIGTERM)
    assert job.ends() == (75, "")
    assert [job.lives(slot) for slot in range(2)] == [1, 1]


def test_a_second_launcher_for_the_same_run_is_refused(tmp_path: Path, launched: list[Launched]):
    launched.append(first := Launched(tmp_path, "waits", 1))
    first.wait_for("epoch 1")
    address = tmp_path / "run" / "quorum" / "address.json"
    assert address.stat().st_mode & 0o077 == 0, "others could read the token"
    before = json.loads(address.read_text())
    launched.append(second := Launched(tmp_path, "waits", 1))
    status, errors = second.ends()
    assert status != 0
    assert "is in use by" in errors
    assert json.loads(address.read_text()) == before


def test_a_second_arbiter_for_the_same_run_is_refused(tmp_path: Path, launched: list[Launched]):
    launched.append(first := Launched(tmp_path, "waits", 1))
    first.wait_for("epoch 1")
    launched.append(second := Launched(tmp_path, "", 1, what="serve"))
    assert "is in use by" in second.ends()[1]
    assert second.process.returncode == 2
    assert first.process.poll() is None


def test_a_node_that_computes_with_another_torch_is_refused_by_name_and_the_job_goes_on(
    tmp_path: Path, launched: list[Launched]
):
    launched.append(job := Launched(tmp_path, "until told", 2))
    job.wait_for("epoch 1")
    launched.append(other := job.joined_by("other", "another torch"))
    status, errors = other.ends()
    assert "its torch is of tomorrow, that of the job of today" in errors
    assert (status, other.lives(0)) == (2, 1), "the same would be refused again"
    (tmp_path / "told").touch()
    assert job.ends() == (0, "")
    assert [job.lives(slot) for slot in range(2)] == [1, 1]


def test_a_node_whose_workers_never_start_leaves_by_name_and_the_job_goes_on(tmp_path: Path, launched: list[Launched]):
    launched.append(job := Launched(tmp_path, "until told", 2))
    job.wait_for("epoch 1")
    launched.append(other := job.joined_by("other", "never starts"))
    status, errors = other.ends()
    assert (status, other.lives(0)) == (1, quorum.STARTS)
    assert "This node has left the job: worker 0 of" in errors
    (tmp_path / "told").touch()
    assert job.ends() == (0, "")
    assert [job.lives(slot) for slot in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"TOPROPE_QUORUM_TOKEN": "wrong"}, "has closed the connection: it does not know this token"),
        ({"RUN": "elsewhere"}, "is not there, so the job's token is unknown"),
    ],
    ids=["wrong", "missing"],
)
def test_a_node_without_the_right_token_is_refused_before_any_work(
    tmp_path: Path, launched: list[Launched], variables: dict[str, str], reason: str
):
    launched.append(job := Launched(tmp_path, "until told", 1))
    job.wait_for("epoch 1")
    launched.append(other := job.joined_by("other", "until told", variables))
    status, errors = other.ends()
    assert (status, list(other.directory.iterdir())) == (2, [])
    assert reason in errors
    (tmp_path / "told").touch()
    assert job.ends() == (0, "")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no arbiter"), (None, "no arbiter has answered")],
    ids=["a web server", "nobody"],
)
def test_a_node_that_finds_no_arbiter_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, reason: str
):
    monkeypatch.setenv(arbiter.TOKEN, "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        plan = quorum.Plan(configs.load(SMOKE), [], tmp_path, 1, join=f"127.0.0.1:{server.getsockname()[1]}")

        def serve() -> None:
            with server.accept()[0] as peer:
                peer.sendall(answer)

        if answer is None:
            server.close()
        else:
            threading.Thread(target=serve).start()
        with pytest.raises(WorldError, match=reason):
            quorum.knock(plan, patience_seconds=0.3)


def test_an_arbiter_alone_serves_two_nodes_and_goes_on_where_it_was_killed(tmp_path: Path, launched: list[Launched]):
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    launched.append(first := Launched(tmp_path, "", 2, what="serve", variables={"LISTEN": listen}))
    first.wait_for("run/quorum/address.json")
    nodes = [first.joined_by(name, "until told") for name in ("a", "b")]
    launched.extend(nodes)
    nodes[0].wait_for("epoch 1")
    first.process.kill()
    first.process.wait()
    launched.append(second := Launched(tmp_path, "", 2, what="serve", variables={"LISTEN": listen}))
    nodes[0].wait_for("epoch 2")
    assert nodes[0].members(2) == nodes[0].members(1) == "0 2"
    for node in nodes:
        (node.directory / "told").touch()
    assert [job.ends() for job in (second, *nodes)] == [(0, "")] * 3
    assert [node.lives(0) for node in nodes] == [1, 1]


def test_quorum_mode_under_torchrun_is_refused_with_the_command_that_works(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(WorldError, match="python -m trainer launch CONFIG --workers 3"):
        elastic.check_mode("quorum")
    elastic.check_mode("restart")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (['parallel.strategy="fsdp"'], "needs every rank for every step"),
        (["checkpoint.memory_every_steps=1"], "has no effect here"),
        (['parallel.strategy="hybrid"'], "does not divide the world of 3 ranks"),
        (["numerics.exact=false"], "a death would change the result"),
        (["data.micro_batches=2"], "leaves 1 of 3 ranks without work"),
    ],
)
def test_a_config_that_cannot_outlive_a_death_is_refused_before_any_work(
    tmp_path: Path, settings: list[str], reason: str
):
    plan = quorum.Plan(configs.load(SMOKE, settings), [], tmp_path / "run", workers=3)
    with pytest.raises(ConfigError, match=reason):
        quorum.check(plan)
    assert not (tmp_path / "run").exists()


def test_spares_of_a_hybrid_run_come_in_whole_groups(tmp_path: Path):
    chosen = configs.load(SMOKE, ['parallel.strategy="hybrid"'])
    quorum.check(quorum.Plan(chosen, [], tmp_path / "run", workers=4, spares=2))
    with pytest.raises(ConfigError, match=r"--spares 1: parallel\.shard_ranks = 2 processes take a place together"):
        quorum.check(quorum.Plan(chosen, [], tmp_path / "run", workers=4, spares=1))


@pytest.mark.parametrize("more", [{"spares": 1}, {"join": "127.0.0.1:1"}, {"listen": "127.0.0.1:1"}])
def test_a_sharded_run_without_copies_has_no_use_for_spares_and_joiners_and_says_so(
    tmp_path: Path, more: dict[str, Any]
):
    chosen = configs.load(SMOKE, ['parallel.strategy="fsdp"'])
    with pytest.raises(ConfigError, match="Leave out --spares, --listen, --join and --arbiter-only"):
        quorum.become_torchrun(quorum.Plan(chosen, [], tmp_path / "run", workers=2, **more))


def test_the_processes_of_a_group_end_together(tmp_path: Path):
    meeting = tempfile.TemporaryDirectory(dir=tmp_path)
    sleepers = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    group = quorum.GroupOfProcesses(sleepers, meeting)
    assert (group.poll(), group.pid) == (None, sleepers[0].pid)
    sleepers[1].send_signal(signal.SIGKILL)
    while (status := group.poll()) is None:
        time.sleep(0.02)
    assert (status, [sleeper.poll() for sleeper in sleepers]) == (-signal.SIGKILL, [-signal.SIGKILL] * 2)
    assert not Path(meeting.name).exists()


def test_workers_end_with_their_launcher(tmp_path: Path, launched: list[Launched]):
    launched.append(job := Launched(tmp_path, "waits", 2))
    job.wait_for("epoch 1")
    workers = [int((tmp_path / f"lives of {slot}").read_text()) for slot in range(2)]
    job.process.kill()
    while any(Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in workers):
        time.sleep(0.05)
