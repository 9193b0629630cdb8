"""Docker: what compose.yaml promises of its containers, and an image that is built and run where that is possible."""

import os
import shlex
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.support import ROOT, summarise_run
from trainer.launch import cluster

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
NODES = ("node-a", "node-b", "node-c")


@pytest.mark.parametrize("name", ["rendezvous", *NODES])
def test_a_container_has_no_rights_that_it_does_not_need_and_says_how_it_is(name):
    service = COMPOSE["services"][name]
    assert service["user"] == "1000:1000" and service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"] and "privileged" not in service
    assert service["healthcheck"]["test"][0] == "CMD"


def test_three_nodes_meet_at_a_rendezvous_of_their_own_and_any_of_them_may_be_lost():
    assert set(COMPOSE["services"]) == {"rendezvous", *NODES}
    commands = [COMPOSE["services"][name]["command"] for name in NODES]
    assert commands[0] == commands[1] == commands[2]
    parts = cluster.torchrun_parts(["torchrun", *commands[0]])
    assert parts is not None and "--nnodes=1:3" in commands[0]
    assert "--rdzv-endpoint=rendezvous:29400" in commands[0]
    assert COMPOSE["services"]["rendezvous"]["entrypoint"][-1] == "0.0.0.0:29400"
    assert {COMPOSE["services"][name]["hostname"] for name in NODES} == set(NODES)


def test_a_container_that_is_stopped_has_the_time_to_save():
    node = COMPOSE["services"]["node-a"]
    (shutdown,) = [int(word.partition("=")[2]) for word in node["command"] if word.startswith("--shutdown-timeout=")]
    assert shutdown < int(node["stop_grace_period"].removesuffix("s"))
    assert set(node["volumes"]) == {"runs:/runs", "cache:/cache"} and set(COMPOSE["volumes"]) == {"runs", "cache"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_image_trains_to_the_same_bits_on_one_and_two_ranks_without_rights(tmp_path):
    """TOPROPE_TEST_BASE names the base image; TOPROPE_TEST_BUILD has further options of `podman build` (volumes with
    wheels), TOPROPE_TEST_GLOBAL those of podman itself (a runtime)."""
    base = os.environ.get("TOPROPE_TEST_BASE")
    if shutil.which("podman") is None or not base:
        pytest.skip(
            "no podman here" if base else "TOPROPE_TEST_BASE names no image with Python 3.11 (docs/clusters.md)"
        )
    further = shlex.split(os.environ.get("TOPROPE_TEST_BUILD", ""))
    build = ["podman", "build", "--isolation", "chroot", "--network", "host", "--build-arg", f"BASE={base}", *further]
    image = f"localhost/toprope-test-{os.getpid()}"
    try:
        subprocess.run([*build, "--file", "docker/Dockerfile", "--tag", image, "."], check=True, cwd=ROOT)
        run = ["podman", *shlex.split(os.environ.get("TOPROPE_TEST_GLOBAL", "")), "run", "--rm", "--network", "none"]
        rights = ["--user", "1000:1000", "--read-only", "--cap-drop", "ALL", "--tmpfs", "/tmp:mode=1777"]
        limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
        places = [part for name in ("runs", "cache") for part in ("--volume", f"{tmp_path / name}:/{name}")]
        for name in ("runs", "cache"):
            (tmp_path / name).mkdir()
            os.chown(tmp_path / name, 1000, 1000)
        command = [*run, *rights, *limits, *places, image]
        subprocess.run(command, check=True)
        two = "--standalone --nproc-per-node=2 -m trainer train configs/smoke.toml --run /runs/two"
        subprocess.run([*command, *two.split()], check=True)
    finally:
        subprocess.run(["podman", "rmi", "--force", image], check=False)
    # Not those of this machine: the text is the standard library of the image's Python.
    one, other = (summarise_run(tmp_path / "runs" / name)["weights_sha256"] for name in ("smoke", "two"))
    assert one is not None and one == other
