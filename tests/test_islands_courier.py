"""Promises about clusters that live apart on hosts that share no directory: `launch --islands N --listen`, `--join`."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trainer
from tests.support import SMOKE, outcome, settings, wait_until, with_faults, write_corpus
from trainer import config as configs
from trainer.errors import EXIT_FINISHED, WorldError
from trainer.islands import letters
from trainer.islands.post import Post
from trainer.launch import courier
from trainer.parallel import arbiter

TOKEN = "a token that both know"
POST = "post-0a1b2c3d"


@dataclasses.dataclass
class Hosts:
    """Two hosts, each with a run directory of its own; cluster 0 is on the first one."""

    first: Path
    other: Path
    address: tuple[str, int]
    listening: courier.Listening

    def join(self, token: str = TOKEN, clusters: int = 3, wanted: int = 1) -> courier.Joined:
        joined = courier.Joined(self.address, token, self.other, clusters, wanted, patience=5.0)
        (self.other / "islands" / joined.post).mkdir(parents=True, exist_ok=True)
        joined.begin()
        return joined

    def posts(self) -> tuple[Post, Post]:
        """Those of clusters 0 and 1."""
        both = Post(self.first / "islands" / POST, 0, 3, 20.0), Post(self.other / "islands" / POST, 1, 3, 20.0)
        for post in both:
            post.at(1)
        return both


def read_config(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


@pytest.fixture
def hosts(tmp_path, monkeypatch) -> Iterator[Hosts]:
    monkeypatch.setattr(courier.rundir, "read", read_config)
    monkeypatch.setattr(courier, "AGAIN_SECONDS", 0.05)
    first, other = tmp_path / "first", tmp_path / "other"
    (first / "islands" / POST).mkdir(parents=True)
    listener = arbiter.listen("127.0.0.1", 0)
    listening = courier.Listening(listener, TOKEN, first, first / "islands" / POST, 3)
    listening.begin()
    yield Hosts(first, other, listener.getsockname()[:2], listening)
    listening.close()


def save(run: Path, step: int) -> dict[str, bytes]:
    """A checkpoint of several pieces; the name of one of its files begins with a dot."""
    files = {"manifest.json": b"{}", ".metadata": os.urandom(100), "0.distcp": os.urandom(5 * 2**19), "empty": b""}
    staged = run / "checkpoints" / "staged"
    staged.mkdir(parents=True)
    for name, content in files.items():
        (staged / name).write_bytes(content)
    staged.rename(staged.with_name(f"step-{step:08d}"))
    return files


def receive_all(link: courier.Link) -> None:
    while True:
        courier.receive(link)


def saved(run: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "checkpoints" / f"step-{step:08d}").iterdir()}


def test_what_a_cluster_says_on_one_host_is_heard_on_the_other_also_after_the_connection_broke(hosts):
    (hosts.first / "config.json").write_text('{"run_id": "r"}')
    four = save(hosts.first, 4)
    joined = hosts.join()
    assert (joined.numbers, joined.post) == ([1], POST)
    assert saved(hosts.other, 4) == four, "who begins has what it begins from"
    assert (hosts.other / "config.json").read_bytes() == b'{"run_id": "r"}'
    zero, one = hosts.posts()
    zero.give(zero.next(), b"from 0")
    one.give(one.next(), b"from 1")
    assert (zero.take(zero._place / "step-00000001" / "01", 1), one.take(one._place / "step-00000001" / "01", 0)) == (
        b"from 1", b"from 0",
    )  # fmt: skip
    assert joined._side is not None
    joined._side.close()
    zero.at(2)
    zero.give(zero.next(), b"later")
    one.at(2)
    assert one.take(one.next(), 0) == b"later"
    eight = save(hosts.first, 8)
    assert wait_until((hosts.other / "checkpoints" / "step-00000008").exists, 20)
    assert saved(hosts.other, 8) == eight
    zero.forget(1)
    assert wait_until(lambda: letters.forgotten(one._place) == 1, 20)
    assert not (one._place / "step-00000001").exists()
    (zero._place / letters.OVER).write_text("0")
    hosts.listening.close()
    assert letters.over(one._place) == EXIT_FINISHED, "what was there before the end has been sent"
    joined.close()


def test_a_cluster_has_a_launcher_as_long_as_that_one_is_connected(hosts):
    joined = hosts.join(wanted=2)
    assert joined.numbers == [1, 2]
    assert courier.lock_of(hosts.first, 1) is None
    joined._is_over.set()
    assert joined._side is not None
    joined._side.close()
    assert wait_until(lambda: courier.lock_of(hosts.first, 1) is not None, 20)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"token": "another"}, "does not know this token"),
        ({"clusters": 4}, "its job has --islands 3, not 4"),
    ],
)
def test_who_does_not_belong_to_the_job_is_refused(hosts, more, said):
    with pytest.raises(WorldError, match=said):
        hosts.join(**more)


def test_a_run_directory_of_another_run_and_a_job_without_a_free_cluster_are_refused(hosts):
    hosts.other.mkdir()
    (hosts.other / "config.json").write_text('{"run_id": "another"}')
    with pytest.raises(WorldError, match="the run directory here is of run another, that there of none"):
        hosts.join()
    (hosts.other / "config.json").unlink()
    locks = [courier.lock_of(hosts.first, cluster) for cluster in (1, 2)]
    with pytest.raises(WorldError, match="all clusters have launchers"):
        hosts.join()
    for lock in locks:
        assert lock is not None
        lock.release()


@pytest.mark.parametrize(
    "header",
    [
        {"message": "../../outside"}, {"message": "step-00000001/../../x"}, {"config": True}, {"of job": "over"},
        {"piece": "step-00000004/../../x", "of": "ab"}, {"kept": ["step-00000004"]}, {"other": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_frame_that_the_other_side_may_not_send_ends_the_connection_and_writes_nothing(hosts, header):
    before = sorted(hosts.first.rglob("*"))
    with contextlib.closing(courier.connect(*hosts.address)) as sock:
        link = courier.greet(sock, TOKEN, is_server=False)
        hello = {"clusters": 3, "wanted": 1, "keeps": [], "post": "", "mark": "m", "run_id": "", "has": [], "saved": []}
        courier.send(link, hello)
        courier.receive(link)
        courier.send(link, header, b"content")
        with pytest.raises((EOFError, OSError)):
            receive_all(link)
        link.close()
    assert [path for path in sorted(hosts.first.rglob("*")) if path not in before and path.suffix != ".lock"] == []


# Whole jobs.

SMALL: dict[str, Any] = {
    "budget.steps": 12, "checkpoint.every_steps": 4, "data.micro_batches": 4, "data.micro_batch_sequences": 1,
    "elastic.step_timeout_seconds": 30.0, "eval.every_steps": 6, "eval.max_tokens": 512, "islands.count": 2,
    "islands.inner_steps": 4, "islands.quantise": "int4", "model.context": 12, "model.n_layers": 1,
}  # fmt: skip


@pytest.mark.slow
def test_clusters_on_hosts_that_share_no_directory_end_with_the_bits_of_one_process(tmp_path):
    """The cluster of the second host dies in step 7, and begins again from the checkpoint that was copied there."""
    own = SMALL | {"data.source": write_corpus(tmp_path / "corpus")}
    trainer.train(configs.load(SMOKE, [f"{key}={json.dumps(value)}" for key, value in own.items()]), tmp_path / "calm")
    arguments = settings(**{key.replace(".", "__"): value for key, value in own.items()})
    kill = with_faults([{"kind": "sigkill", "rank": 1, "at_step": 7, "phase": "before_update"}])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "trainer", "launch", str(SMOKE), "--islands", "2", "--workers", "1"]
    environment = os.environ | {arbiter.TOKEN: TOKEN}
    with contextlib.ExitStack() as stack:
        both = []
        for name, where in (("first", "--listen"), ("other", "--join")):
            output = stack.enter_context((tmp_path / f"{name}.txt").open("w"))
            both.append(
                subprocess.Popen(
                    [*command, where, address, "--run", str(tmp_path / name), *arguments, *kill], env=environment,
                    stdout=output, stderr=output,
                )
            )  # fmt: skip
            stack.callback(both[-1].wait, 60)
            stack.callback(both[-1].send_signal, signal.SIGKILL)
        statuses = [launcher.wait(timeout=120) for launcher in both]
    said = [(tmp_path / f"{name}.txt").read_text() for name in ("first", "other")]
    assert statuses == [0, 0], said
    assert outcome(tmp_path / "first") == outcome(tmp_path / "calm")
    assert "cluster 1 was ended by SIGKILL. It is started again; the others go on." in said[1]
    assert not (tmp_path / "other" / "events").exists(), "the run itself is on the first host"
