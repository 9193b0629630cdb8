"""Multipath TCP: asked for, refused, done without, and a link that dies below a run that does not notice."""

import subprocess
import sys

import pytest

from tests.support import ENVIRONMENT, ROOT, SMOKE, SMOKE_SHA256, summarise_run, wait_until, worker_environment
from tests.test_rendezvous import steps_of
from trainer.errors import EXIT_FINISHED, EXIT_USAGE, UsageError
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


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_link_of_two_that_dies_costs_a_run_over_mptcp_no_restart(tmp_path):
    if reason := namespaces.probe() or transport.missing():
        pytest.skip(reason)
    run = tmp_path / "run"
    environment = worker_environment({"before_update": 0.1}) | {transport.TRANSPORT: "mptcp"}
    with Hosts(2, links=2) as hosts:
        try:
            hosts.allow_multipath()
        except OSError as error:
            pytest.skip(f"ip cannot set up MPTCP: {error}")
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
