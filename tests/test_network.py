"""Hosts in network namespaces, and runs whose nodes lose each other there."""

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, wait_until
from tests.test_nemesis import Attack, real, reference  # noqa: F401
from trainer.errors import EXIT_FINISHED
from trainer.launch import namespaces as network
from trainer.launch.agent import Agent
from trainer.launch.namespaces import Hosts
from trainer.launch.processes import with_environment

pytestmark = pytest.mark.skipif(network.probe() is not None, reason=network.probe() or "")

ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 5000)) as server:
    while True:
        connection, _ = server.accept()
        with connection:
            while data := connection.recv(2**16):
                connection.sendall(data)
"""
ASK = """
import socket, sys, time
address, size, limit = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
began = time.monotonic()
try:
    with socket.create_connection((address, 5000), timeout=limit) as connection:
        connection.settimeout(limit)
        connection.sendall(bytes(size))
        got = 0
        while got < size:
            got += len(connection.recv(2**16))
    print(time.monotonic() - began)
except OSError as error:
    print(type(error).__name__)
"""
LISTEN = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
    receiver.bind((sys.argv[1], 5001))
    print("ready", flush=True)
    while True:
        print(receiver.recv(100).decode(), flush=True)
"""
SEND = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    sender.sendto(sys.argv[2].encode(), (sys.argv[1], 5001))
"""


def python(hosts: Hosts, host: int, program: str, *arguments: str, **more: Any) -> subprocess.Popen[str]:
    command = [*hosts.command(host), sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **more)


def ask(hosts: Hosts, host: int, other: int, size: int = 10, limit: float = 5.0) -> float | str:
    """Seconds that it takes to send so many bytes there and back, or the name of the error."""
    answer, _ = python(hosts, host, ASK, hosts.address(other), str(size), str(limit)).communicate(timeout=60)
    return float(answer) if answer[0].isdigit() else answer.strip()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    before = of_the_machine()
    with Hosts(2) as made:
        inside = namespaces(made)
        yield made
    assert of_the_machine() == before and not held(inside)


@pytest.fixture
def pair(hosts: Hosts) -> Iterator[Hosts]:
    """Two hosts, the first of which answers."""
    server = python(hosts, 0, ECHO, hosts.address(0))
    try:
        wait_until(lambda: isinstance(ask(hosts, 0, 0), float), seconds=20)
        yield hosts
    finally:
        server.kill()
        server.communicate()


def of_the_machine() -> set[str]:
    """Links, routes and named namespaces of this machine."""
    commands = ("ip -o link", "ip route show table all", "ip netns")
    done = [subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout for command in commands]
    return {line for output in done for line in output.splitlines()}


def namespaces(hosts: Hosts) -> set[str]:
    return {str(Path(f"/proc/{holder.pid}/ns/net").readlink()) for holder in hosts._holders}


def held(namespaces: set[str]) -> list[str]:
    """The given namespaces in which a process still lives."""
    found = []
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):
            if str(path.readlink()) in namespaces:
                found.append(str(path))
    return found


def test_hosts_see_each_other_and_not_the_machine_nor_it_them():
    before = of_the_machine()
    with Hosts(2) as hosts, socket.create_server(("127.0.0.1", 0)) as server:
        assert of_the_machine() == before, "no link, route or name there"
        port = server.getsockname()[1]
        program = f"import socket; print(socket.socket().connect_ex(('127.0.0.1', {port})))"
        assert python(hosts, 0, program).communicate(timeout=20)[0] == f"{errno.ECONNREFUSED}\n"
        program = "import socket; print(socket.socket().connect_ex(('192.0.2.1', 5000)))"
        assert python(hosts, 0, program).communicate(timeout=20)[0] == f"{errno.ENETUNREACH}\n"


def test_a_link_that_is_down_loses_all_until_it_is_up(pair):
    with pair.down(1):
        assert ask(pair, 1, 0, limit=1.0) in ("TimeoutError", "OSError")
    assert isinstance(ask(pair, 1, 0), float)


def test_one_way_loss_loses_what_a_host_sends_and_nothing_else(hosts):
    listeners = [python(hosts, host, LISTEN, hosts.address(host)) for host in (0, 1)]
    outputs = [listener.stdout for listener in listeners]
    try:
        assert [output.readline() for output in outputs if output] == ["ready\n", "ready\n"]

        def ping(word: str) -> None:
            for host in (0, 1):
                python(hosts, host, SEND, hosts.address(1 - host), word).communicate(timeout=20)

        ping("before")  # they know each other's link addresses from here on
        with hosts.dropping(1):
            ping("during")
        ping("after")
        heard = [[output.readline().strip() for _ in range(2 + host)] for host, output in enumerate(outputs) if output]
        assert heard == [["before", "after"], ["before", "during", "after"]]
    finally:
        for listener in listeners:
            listener.kill()
            listener.communicate()


@pytest.mark.skipif(network.shaping() is not None, reason=network.shaping() or "")
def test_a_slow_link_is_slow_until_it_is_restored_even_while_it_also_loses_all(pair):
    """A megabyte each way through 20 megabit a second takes 0.4 s at least, if both ways overlap wholly."""
    fast = ask(pair, 1, 0, 10**6)
    with contextlib.ExitStack() as dropping:
        with pair.slow(1, 20):
            slow = ask(pair, 1, 0, 10**6, limit=20)
            assert isinstance(slow, float) and slow > 0.35, (fast, slow)
            dropping.enter_context(pair.dropping(1))
        assert ask(pair, 1, 0, limit=0.5) == "TimeoutError", "what is restored is the speed alone"
    restored = ask(pair, 1, 0, 10**6)
    assert isinstance(restored, float) and restored < 0.35, (fast, slow, restored)


def test_nothing_is_left_of_hosts_whose_making_fails_or_whose_use_raises(monkeypatch):
    before, hosts, inside = of_the_machine(), Hosts(2), set[str]()

    def fail_inside() -> None:
        with hosts:
            inside.update(namespaces(hosts))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert len(inside) == 3 and not held(inside) and of_the_machine() == before
    with pytest.raises(OSError, match="closed"):
        hosts.command(0)
    inside.clear()  # the kernel may give the numbers of closed namespaces away again
    hold = Hosts._hold
    monkeypatch.setattr(Hosts, "_hold", lambda self: (hold(self), inside.update(namespaces(self)))[0])
    monkeypatch.setattr(network, "INTERFACE", "a name too long for a link")
    with pytest.raises(OSError, match="a name too long"), Hosts(2):
        pass
    assert len(inside) == 2 and not held(inside)


def test_nothing_is_left_of_hosts_whose_maker_is_killed():
    program = (
        "import time\nfrom trainer.launch.namespaces import Hosts\n"
        "with Hosts(2) as hosts:\n    print(*[holder.pid for holder in hosts._holders], flush=True)\n    time.sleep(60)"
    )
    maker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert maker.stdout
    holders = maker.stdout.readline().split()
    inside = {str(Path(f"/proc/{pid}/ns/net").readlink()) for pid in holders}
    assert len(inside) == 3 and len(held(inside)) == 3
    os.kill(maker.pid, signal.SIGKILL)
    maker.communicate()
    assert wait_until(lambda: not held(inside), seconds=5)


def test_a_job_on_a_host_is_its_starters_own(tmp_path, hosts):
    """A job in foreign namespaces is still found, signalled and ended, and its files belong to its starter."""
    made = tmp_path / "made"
    program = (
        "import pathlib, subprocess, sys\npathlib.Path(sys.argv[1]).touch()\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    launch = [*hosts.command(0), sys.executable]
    with Agent(["-c", program, str(made)], tmp_path / "job.txt", launch=launch) as job:
        found = wait_until(lambda: len(job.processes()) == 2 and job.processes(), seconds=20)
        assert found and found[0] == job.process.pid, job.output
        inside, own = (Path(f"/proc/{pid}/ns/net").readlink() for pid in (found[1], os.getpid()))
        assert inside != own and job.connected() is False
        assert made.stat().st_uid == os.getuid()
        assert job.send(found[1], signal.SIGTERM)
        assert wait_until(lambda: not job.running, seconds=20), "it has waited for the other"
    with Agent(["-c", program, str(made)], tmp_path / "again.txt", launch=launch) as job:
        assert wait_until(lambda: len(job.processes()) == 2, seconds=20), job.output
        job.kill()
        assert job.leftovers() == []


def test_a_forked_process_can_enter_a_host_of_root_as_nsenter_does(hosts):
    command = [*hosts.command(1), "python", "-m", "trainer"]
    file, words = network.entered(command)
    if os.geteuid() == 0:
        assert Path(file).readlink() == Path(f"/proc/{hosts._holders[2].pid}/ns/net").readlink()
        assert words == ["python", "-m", "trainer"]
    else:
        assert (file, words) == ("", command)
    assert network.entered(["python", "-m", "trainer"]) == ("", ["python", "-m", "trainer"])


def test_a_missing_need_is_the_reason(monkeypatch):
    monkeypatch.setattr(network.shutil, "which", lambda tool: None if tool == "tc" else f"/usr/bin/{tool}")
    assert network.probe.__wrapped__() == "network namespaces need tc (iproute2)"
    monkeypatch.setattr(network.sys, "platform", "darwin")
    assert network.probe.__wrapped__() == "network namespaces need Linux"


def test_a_refused_user_namespace_is_the_reason(monkeypatch, tmp_path):
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    why = "--net cat: unshare failed: Operation not permitted"
    monkeypatch.setattr(network.os, "geteuid", lambda: 1000)
    wanted = f"network namespaces need root, or a user namespace: unshare --user --map-root-user {why}"
    assert network.probe.__wrapped__() == wanted
    monkeypatch.setattr(network.os, "geteuid", lambda: 0)
    assert network.probe.__wrapped__() == f"network namespaces cannot be made here: unshare {why}"


# The same as an ordinary user, where the tests run as root

NOBODY = 65534
AsNobody = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def as_nobody() -> Iterator[AsNobody]:
    """Runs this Python with the given arguments as a user without any right. Nothing of it may be left."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root, and setpriv to be less than that")
    home = Path(tempfile.mkdtemp(prefix="toprope-nobody-"))
    mark = f"TOPROPE_NOBODY={uuid.uuid4().hex}"
    usual = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    of_nobody = dict.fromkeys(("HOME", "TMPDIR", "TOPROPE_CACHE"), str(home)) | dict([mark.split("=")])
    python = _python_of_all(home)
    # setpriv's own command, `env`, is still found with root's rights; the command that `env` starts is not.
    less = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env", str(python)]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = usual | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | of_nobody
        return subprocess.run(
            [*less, *arguments], capture_output=True, text=True, timeout=300, check=False, cwd=home, env=environment
        )

    try:
        for path in (home, *home.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        probed = run("-c", "import torch\nfrom trainer.launch import namespaces as network\nprint(network.shaping())")
        if probed.stdout.strip() != "None":
            pytest.skip(f"of no use to an ordinary user: {(probed.stdout + probed.stderr).strip()[-300:]}")
        yield run
        assert wait_until(lambda: not with_environment(mark), seconds=5), "processes are left"
    finally:
        for pid in with_environment(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(home)


def _python_of_all(directory: Path) -> Path:
    """This Python; if it lies in a closed home, the system's of the same version with our packages."""
    closed = [path for path in Path(sys.executable).resolve().parents if not path.stat().st_mode & 0o001]
    other = shutil.which(f"python3.{sys.version_info.minor}", path=os.defpath)
    if not closed or other is None:
        return Path(sys.executable)
    environment = directory / "python"
    packages = environment / "lib" / Path(sysconfig.get_path("purelib")).relative_to(f"{sys.prefix}/lib")
    packages.mkdir(parents=True)
    (packages / "ours.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (environment / "pyvenv.cfg").write_text(f"home = {Path(other).parent}\n")
    (environment / "bin").mkdir()
    (environment / "bin" / "python").symlink_to(other)
    return environment / "bin" / "python"


@pytest.mark.slow
def test_an_ordinary_user_has_such_hosts_too(as_nobody):
    done = as_nobody("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", __file__, "-m", "not slow")
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout + done.stderr


# Runs


def ended(attack: Attack, reference: dict[str, Any]) -> None:  # noqa: F811
    """Ends with the reference run's bits, at once or after another start: both sides may have lost what they need."""
    attack.survive(reference)
    assert attack.statuses[-1] == EXIT_FINISHED and len(attack.statuses) <= 2


@real
def test_a_node_behind_a_failed_switch_is_gone_and_comes_back(tmp_path, hosts, reference):  # noqa: F811
    began = time.monotonic()
    attack = Attack(tmp_path, [{"kind": "partition", "at_step": 10, "seconds": 10.0}], 2, hosts, seconds_a_step=0.1)
    ended(attack, reference)
    print(f"{time.monotonic() - began:.1f} s, worlds of {attack.sizes()}")


@real
def test_a_node_whose_packets_are_dropped(tmp_path, hosts, reference):  # noqa: F811
    attack = Attack(tmp_path, [{"kind": "one_way_loss", "at_step": 10, "seconds": 8.0}], 2, hosts, seconds_a_step=0.1)
    ended(attack, reference)


@real
def test_a_loose_connector_and_a_congested_network_are_no_faults(tmp_path, hosts, reference):  # noqa: F811
    faults: list[dict[str, Any]] = [{"kind": "link_flap", "at_step": 5, "seconds": 0.2, "times": 2}]
    if network.shaping() is None:
        faults.append({"kind": "slow_link", "at_step": 35, "seconds": 2.0})
    attack = Attack(tmp_path, faults, 2, hosts)
    ended(attack, reference)
    assert len(attack.sizes()) == 1, "it went on"
