"""Docker: what compose.yaml promises of its containers, and an image that is built and run where that is possible."""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import ROOT, summarise_run, wait_until
from trainer.launch import cluster
from trainer.log import rundir
from trainer.log.history import History

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


BASE, IMAGE = os.environ.get("TOPROPE_TEST_BASE"), os.environ.get("TOPROPE_TEST_IMAGE")


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """An image of this tree: built, which takes minutes, or the one that TOPROPE_TEST_IMAGE names.

    TOPROPE_TEST_BASE names the base image; TOPROPE_TEST_BUILD has further options of `podman build` (volumes with
    wheels). CONTAINERS_CONF, of podman's own, names a file with settings of the machine (a runtime, limits).
    """
    if not (BASE or IMAGE):
        pytest.skip("TOPROPE_TEST_BASE names no image with Python 3.11 to build from (docs/clusters.md)")
    if shutil.which("podman") is None:
        pytest.skip("no podman here")
    if IMAGE:
        yield IMAGE
        return
    further = shlex.split(os.environ.get("TOPROPE_TEST_BUILD", ""))
    build = ["podman", "build", "--isolation", "chroot", "--network", "host", "--build-arg", f"BASE={BASE}", *further]
    made = f"localhost/toprope-test-{os.getpid()}"
    try:
        subprocess.run([*build, "--file", "docker/Dockerfile", "--tag", made, "."], check=True, cwd=ROOT)
        yield made
    finally:
        subprocess.run(["podman", "rmi", "--force", made], check=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_image_trains_to_the_same_bits_on_one_and_two_ranks_without_rights(image, tmp_path):
    run = ["podman", "run", "--rm", "--pull", "never", "--network", "none"]
    rights = ["--user", "1000:1000", "--read-only", "--cap-drop", "ALL", "--tmpfs", "/tmp:mode=1777"]
    places = [part for name in ("runs", "cache") for part in ("--volume", f"{tmp_path / name}:/{name}")]
    for name in ("runs", "cache"):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, 1000, 1000)
    command = [*run, *rights, *places, image]
    subprocess.run(command, check=True)
    two = "--standalone --nproc-per-node=2 -m trainer train configs/smoke.toml --run /runs/two"
    subprocess.run([*command, *two.split()], check=True)
    # Not those of this machine: the text is the standard library of the image's Python.
    one, other = (summarise_run(tmp_path / "runs" / name)["weights_sha256"] for name in ("smoke", "two"))
    assert one is not None and one == other


class Project:
    """compose.yaml as podman-compose runs it, with names and volumes of its own."""

    def __init__(self, image: str, directory: Path, **variables: str) -> None:
        self.name, self._environment = f"toprope-test-{os.getpid()}", os.environ | variables
        (override := directory / "override.yaml").write_text(
            yaml.safe_dump({"services": {name: {"image": image} for name in COMPOSE["services"]}})
        )
        files = ["--file", str(ROOT / "docker" / "compose.yaml"), "--file", str(override)]
        self._command = ["podman-compose", "--project-name", self.name, *files]

    def __call__(self, *command: str) -> None:
        subprocess.run([*self._command, *command], check=True, env=self._environment, timeout=300)

    def container(self, service: str) -> str:
        return f"{self.name}_{service}_1"

    def inspect(self, service: str) -> dict[str, Any]:
        return json.loads(podman("inspect", self.container(service)))[0]

    def healthy(self, service: str) -> bool:
        """True if its healthcheck, made now, passes, and podman counts it as healthy: there may be no systemd here."""
        checked = subprocess.run(["podman", "healthcheck", "run", self.container(service)], check=False)
        return checked.returncode == 0 and self.inspect(service)["State"]["Health"]["Status"] == "healthy"


def podman(*command: str) -> str:
    return subprocess.run(["podman", *command], check=True, stdout=subprocess.PIPE, text=True, timeout=600).stdout


@pytest.fixture
def project(image: str, tmp_path: Path) -> Iterator[Project]:
    if shutil.which("podman-compose") is None:
        pytest.skip("no podman-compose here: pip install podman-compose")
    made = Project(image, tmp_path, CONFIG="/runs/long.toml", RUN="long")
    try:
        yield made
    finally:
        made("down", "--volumes", "--timeout", "1")


LONG = """
extends = "/toprope/configs/smoke.toml"

[budget]
steps = 150

[checkpoint]
every_steps = 10

[eval]
every_steps = 1
max_tokens = 65536
"""
"""Evaluating after each step makes the run long enough to lose a node and get it back."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_containers_train_on_through_the_death_of_one_and_end_with_the_bits_of_one_rank(image, project):
    project("up", "--no-start")
    volume = Path(podman("volume", "inspect", "--format", "{{.Mountpoint}}", f"{project.name}_runs").strip())
    (volume / "long.toml").write_text(LONG)
    run = volume / "long"
    project("up", "--detach", "rendezvous")
    assert wait_until(lambda: project.healthy("rendezvous"), 60)
    project("up", "--detach")

    def has_steps_of(nodes: set[str]) -> bool:
        attempts = History.read(run).attempts if rundir.is_run(run) else []
        last = attempts[-1] if attempts else None
        if last is None or last.start is None or last.last_step is None:
            return False
        return set(last.start[1].nodes) == nodes and last.last_step > last.start[1].from_step + 2

    def wait_for(nodes: set[str]) -> None:
        assert wait_until(lambda: has_steps_of(nodes), 180), podman("logs", project.container("node-a"))[-5000:]

    wait_for({"node-a", "node-b", "node-c"})
    for service in COMPOSE["services"]:
        told = project.inspect(service)
        assert told["Config"]["User"] == "1000:1000" and told["HostConfig"]["ReadonlyRootfs"]
        assert not told["EffectiveCaps"] and not told["BoundingCaps"]
    status = "import os; print(os.getuid(), open('/proc/self/status').read()); open('/toprope/x', 'w')"
    inside = ["podman", "exec", project.container("node-a"), "python", "-c", status]
    tried = subprocess.run(inside, check=False, capture_output=True, text=True)
    assert tried.stdout.startswith("1000 ") and "Read-only file system" in tried.stderr
    assert "CapEff:\t0000000000000000" in tried.stdout and "NoNewPrivs:\t1" in tried.stdout
    assert project.healthy("node-a")

    podman("kill", project.container("node-b"))
    wait_for({"node-a", "node-c"})
    podman("start", project.container("node-b"))
    wait_for({"node-a", "node-b", "node-c"})
    ended = [podman("wait", project.container(name)).strip() for name in NODES]
    assert ended == ["0", "0", "0"]
    volumes = ["--volume", f"{project.name}_runs:/runs", "--volume", f"{project.name}_cache:/cache"]
    alone = ["--standalone", "--nproc-per-node=1", "-m", "trainer", "train", "/runs/long.toml", "--run", "/runs/alone"]
    podman("run", "--rm", "--pull", "never", "--tmpfs", "/tmp", *volumes, image, *alone)
    one, three = (summarise_run(volume / name)["weights_sha256"] for name in ("alone", "long"))
    assert one is not None and one == three
