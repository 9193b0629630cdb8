"""Multipath TCP: asked for, refused, done without, and a link that dies below a run that does not notice."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import ENVIRONMENT, ROOT, SMOKE, SMOKE_SHA256, summarise_run, wait_until, worker_environment
from tests.test_rendezvous import steps_of
from trainer import config as configs
from trainer.errors import EXIT_FINISHED, EXIT_USAGE, UsageError
from trainer.faults import plan as plans
from trainer.faults.nemesis import Outside
from trainer.launch import namespaces, transport
from trainer.launch.cluster import Cluster
from trainer.launch.namespaces import Hosts


def test_a_transport_that_is_not_known_ends_torchrun_with_2_before_any_work():
    command = [sys.executable, "-m", "trainer.launch.torchrun", "--standalone", "-m", "trainer"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=ENVIRONMENT | {transport.TRANSPORT: "udp"}, cwd=ROOT
    )
    assert done.returncode == EXIT_USAGE and "TOPROPE_TRANSPORT=udp is no transport" in done.stderr


@pytest.mark.parametrize("wanted", ["", "tcp"])
def test_plain_tcp_changes_nothing_and_says_nothing(monkeypatch, capsys, wanted):
    monkeypatch.setenv(transport.TRANSPORT, wanted)
    monkeypatch.setattr(transport, "missing", lambda: pytest.fail("asked for what nobody wants"))
    transport.prepare("trainer")
    assert capsys.readouterr() == ("", "")


def test_without_mptcp_plain_tcp_is_used_and_a_line_says_why(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(transport.TRANSPORT, "mptcp")
    (off := tmp_path / "enabled").write_text("0\n")
    monkeypatch.setattr(transport, "ENABLED", off)
    transport.missing.cache_clear()
    try:
        transport.prepare("trainer")
    finally:
        transport.missing.cache_clear()
    reason = "MPTCP is off" if sys.platform == "linux" else "MPTCP needs Linux"
    assert f"TOPROPE_TRANSPORT=mptcp: plain TCP is used: {reason}" in capsys.readouterr().err


def test_a_compiler_that_fails_is_a_reason_too(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(transport.TRANSPORT, "mptcp")
    monkeypatch.setenv("TOPROPE_CACHE", str(tmp_path))
    monkeypatch.setattr(transport, "missing", lambda: "")
    monkeypatch.setattr(transport, "_compiler", lambda: "false")
    transport.prepare("trainer")
    assert "plain TCP is used: false -shared" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_transport_is_refused(monkeypatch):
    monkeypatch.setenv(transport.TRANSPORT, "rdma")
    with pytest.raises(UsageError, match="Give tcp or mptcp"):
        transport.prepare("trainer")


class Links:
    """Hosts that note what is done to their links."""

    links = 2

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def _until_the_end(self, what: str, host: int) -> Iterator[None]:
        self.done.append((what, host))
        yield
        self.done.append((f"not {what}", host))

    def down(self, host: int) -> Any:
        return self._until_the_end("down", host)

    def slow(self, host: int, milliseconds: float) -> Any:
        return self._until_the_end("slow", host)


@pytest.mark.parametrize(("kind", "done"), [("link_dies_of_two", "down"), ("link_slow_of_two", "slow")])
def test_a_fault_of_one_link_of_two_hits_the_last_node_and_ends(kind, done):
    hosts, node = Links(), SimpleNamespace(running=True, host=1)
    cluster: Any = SimpleNamespace(hosts=hosts, nodes=[SimpleNamespace(running=True, host=0), node], running=True)
    (fault,) = plans.make(configs.parse({"faults": [{"kind": kind, "at_step": 3, "seconds": 0.01}]}), 2, 2)
    assert fault.kind.obstacle_outside(fault, cluster) == ""
    fault.kind.fire_from_outside(fault, Outside(cluster), {})
    assert hosts.done == [(done, 1), (f"not {done}", 1)]
    hosts.links = 1
    assert "fewer than 2 links" in fault.kind.obstacle_outside(fault, cluster)


@pytest.mark.skipif(namespaces.shaping() is not None, reason=namespaces.shaping() or "")
def test_a_second_link_is_made_slow_alone_and_keeps_its_rate_after_a_slower_time():
    with Hosts(1, links=2) as hosts:

        def rates() -> list[str]:
            shown = (hosts._run(1, "tc", "qdisc", "show", "dev", f"eth{link}") for link in range(2))
            return [found[1] if (found := re.search(r"rate (\S+)", text)) else "" for text in shown]

        with hosts.slow(0, 5, "80mbit", link=1):
            with hosts.slow(0, 5, "8mbit", link=1):
                assert rates() == ["", "8Mbit"]
            assert rates() == ["", "80Mbit"]
        assert rates() == ["", ""]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_link_of_two_that_dies_costs_a_run_over_mptcp_no_restart(tmp_path):
    if reason := transport.missing() or namespaces.multipath():
        pytest.skip(reason)
    run = tmp_path / "run"
    environment = worker_environment({"before_update": 0.1}) | {transport.TRANSPORT: "mptcp"}
    with Hosts(2, links=2) as hosts:
        hosts.allow_multipath()
        cluster = Cluster(
            SMOKE, run, (), ranks=1, nodes=2, hosts=hosts, directory=tmp_path / "start",
            worker=("tests.worker", "train"), environment=environment,
        )  # fmt: skip
        with cluster:
            cluster.start()
            assert wait_until(lambda: len(steps_of(run)) > 5, 60), cluster.output
            with hosts.down(1):
                assert cluster.wait(60) == EXIT_FINISHED, cluster.output
    story = summarise_run(run)
    assert (len(story["attempts"]), story["weights_sha256"]) == (1, SMOKE_SHA256)
    assert story["train"][-1][0] == story["steps"]
