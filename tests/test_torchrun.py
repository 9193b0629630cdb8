"""Nodes meet, train and part under our torchrun: real agents on this machine."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, SMOKE, Job, settings, summarise_run, trainer, wait_until, with_faults
from trainer.errors import WorldError
from trainer.launch.agent import LAUNCH
from trainer.launch.torchrun import require_host_name
from trainer.parallel import elastic

SETTINGS = settings(budget__steps=12, checkpoint__every_steps=4, eval__every_steps=0, wandb__mode="disabled")
slow = pytest.mark.slow
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
MEETINGS = {
    "static": "--nnodes=2 --node-rank=NODE --master-addr=127.0.0.1 --master-port=PORT",
    "c10d": "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:PORT --rdzv-conf=keep_alive_interval=1",
    "c10d in a file": "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=FILE --rdzv-id=ours --rdzv-conf=store_type=file "
    "--local-addr=127.0.0.1",
} | {
    backend: f"--nnodes=2 --rdzv-backend={backend} --rdzv-endpoint=127.0.0.1:PORT --rdzv-id=us --local-addr=127.0.0.1"
    for backend in ("etcd-v2",)
}


@contextlib.contextmanager
def etcd(directory: Path, port: str) -> Iterator[None]:
    """An etcd server that listens at this port. Skips the test where there is none, or no client for torch."""
    if shutil.which("etcd") is None or importlib.util.find_spec("etcd") is None:
        pytest.skip("needs the program etcd (Debian: etcd-server) and the Python package python-etcd")
    urls = [f"--{kind}-client-urls=http://127.0.0.1:{port}" for kind in ("listen", "advertise")]
    command = ["etcd", "--enable-v2", f"--data-dir={directory}", *urls, "--listen-peer-urls=http://127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            assert wait_until(lambda: listens(int(port)), seconds=20)
            yield
        finally:
            server.kill()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def node(directory: Path, options: str, *more: str, **of_job: Any) -> Job:
    words = [*options.split(), "--nproc-per-node=1", "--monitor-interval=0.1", "--max-restarts=2"]
    return Job(directory / "jobs", SMOKE, directory / "run", [*SETTINGS, *more], words, **of_job)


@slow
@pytest.mark.parametrize("meeting", MEETINGS.values(), ids=MEETINGS)
def test_two_nodes_train_restart_and_end_in_silence_however_they_meet(tmp_path: Path, port: str, meeting: str):
    meeting = meeting.replace("PORT", port).replace("FILE", str(tmp_path / "store"))
    dies = with_faults([{"kind": "sigkill", "rank": 1, "at_step": 6, "phase": "before_forward"}])
    with ExitStack() as stack:
        if "etcd" in meeting:
            stack.enter_context(etcd(tmp_path / "etcd", port))
        nodes = [stack.enter_context(node(tmp_path, meeting.replace("NODE", str(n)), *dies)) for n in range(2)]
        assert [job.wait(60) for job in nodes] == [0, 0], [job.output for job in nodes]
        assert [job.leftovers() for job in nodes] == [[], []]
    run = summarise_run(tmp_path / "run")
    assert (run["status"], [attempt["world_size"] for attempt in run["attempts"]]) == ("finished", [2, 2])
    silent, shows = sorted((job.output for job in nodes), key=len)
    if "backend=etcd " in meeting:  # its older way: it meets again only after seconds, says so, and gives ranks anew
        assert not re.search("Traceback|Error", silent + shows)
        return
    assert silent == ""
    assert not re.search("Traceback|Error|torch|c10d|socket", shows), shows


@slow
@pytest.mark.parametrize("first", ["127.0.0.1", "127.0.0.3"], ids=["it has the first rank", "it has the last rank"])
def test_a_node_that_dies_between_meeting_and_ranks_is_replaced_within_seconds(tmp_path: Path, port: str, first: str):
    """The ranks of nodes follow their addresses; the node that dies has 127.0.0.2."""
    meeting = (
        f"--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{port} --rdzv-id=ours --local-addr=ADDRESS "
        "--rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1,is_host="
    )
    dies = (
        "import os; from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo as Info\n"
        "Info.build = lambda *_, **__: os.kill(os.getpid(), 9)\n"
        "from trainer.launch.torchrun import torchrun; torchrun()"
    )
    with ExitStack() as stack:
        host = stack.enter_context(node(tmp_path, meeting.replace("ADDRESS", first) + "1"))
        other = meeting.replace("ADDRESS", "127.0.0.2") + "0"
        with node(tmp_path, other, launch=[sys.executable, "-c", dies]) as dying:
            assert dying.wait(60) == -signal.SIGKILL
        began = time.monotonic()
        replacement = stack.enter_context(node(tmp_path, other))
        assert [host.wait(60), replacement.wait(60)] == [0, 0], host.output + replacement.output
    assert time.monotonic() - began < 25
    assert "Traceback" not in host.output + replacement.output


@slow
@linux
def test_on_one_machine_nothing_listens_to_other_machines_and_workers_end_with_their_agent(tmp_path: Path):
    """Also a worker that is stopped. The same command, given at once, finds the run directory free."""
    options = ["--standalone", "--nproc-per-node=2"]
    with Job(tmp_path / "jobs", SMOKE, tmp_path / "run", SETTINGS, options, slow={"before_update": 0.5}) as job:
        assert wait_until((tmp_path / "run" / "checkpoints").exists, seconds=60), job.output
        assert not listening_everywhere(job.processes())
        workers = job.workers()
        assert job.send(workers[1], signal.SIGSTOP)
        job.process.kill()
        resumed = trainer("train", SMOKE, "--run", tmp_path / "run", *SETTINGS)
        assert "finished step 12/12" in resumed.stdout
        assert not set(workers.values()) & set(job.processes())


def listening_everywhere(pids: list[int]) -> list[str]:
    """Sockets of these processes that listen on every address."""
    links = []
    for link in (link for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(link.readlink()))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links]
    assert listening, "the store of the agent, and that of rank 0"
    return [address for address in listening if not int(address.partition(":")[0], 16)]


@slow
@pytest.mark.parametrize("options", ["--standalone", ""], ids=["standalone", "no option at all"])
def test_on_one_machine_no_host_name_is_needed(tmp_path: Path, options: str):
    nameless = ["unshare", "--uts", "bash", "-c", 'hostname no-such-host-xyz && exec "$@"', "bash"]
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("only root changes the name of a host, with unshare")
    command = [*LAUNCH, *options.split(), "--nproc-per-node=2", "-m", "trainer", "train", SMOKE, *SETTINGS]
    done = subprocess.run(
        [*nameless, *command, "--run", tmp_path / "run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


def test_a_host_name_that_does_not_resolve_is_told_within_five_seconds_with_the_remedy():
    def refuses(*_: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    for resolve in (refuses, lambda *_: time.sleep(30), lambda *_: "\ud800".encode()):
        began = time.monotonic()
        with pytest.raises(WorldError) as refused:
            require_host_name(resolve)
        assert time.monotonic() - began < 5
        assert repr(socket.gethostname()) in str(refused.value) and "--local-addr" in str(refused.value)
    require_host_name(lambda *_: ["an address"])


@pytest.mark.parametrize("name", elastic.LAUNCHERS)
def test_ranks_that_another_launcher_has_started_are_told_the_command_that_works(monkeypatch, name: str):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for harmless in ("1", "", "many"):
        monkeypatch.setenv(name, harmless)
        elastic.belong_to_agent()
    monkeypatch.setenv(name, "2")
    with pytest.raises(WorldError, match="torchrun --standalone --nproc-per-node=2 -m trainer train"):
        elastic.belong_to_agent()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"RANK": None, "MASTER_ADDR": None}, "RANK is not set, MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ],
)
def test_an_environment_that_torchrun_did_not_make_whole_is_refused(monkeypatch, change, told: str):
    whole = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in ({"TORCHELASTIC_RUN_ID": "x"} | whole | change).items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(WorldError, match=re.escape(told)):
        elastic.belong_to_agent()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.0.1", "::1", "[::1]"])
def test_a_loopback_address_is_known_as_one(host: str):
    assert elastic.is_loopback(host)


@pytest.mark.parametrize("host", ["", "10.0.0.1", "0.0.0.0", "node-1", "localhost.example.org", "/tmp/localhost"])
def test_a_name_that_may_mean_another_address_elsewhere_is_no_loopback_address(host: str):
    assert not elastic.is_loopback(host)
