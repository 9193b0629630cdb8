"""Forked workers: to the process that started them they look like ordinary ones."""

import ast
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from tests import support
from trainer.launch import torchrun
from trainer.launch.agent import LAUNCH
from trainer.log import events

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forked workers are for Linux")

WORKER = """
import json, os, pathlib, signal, sys
report = {
    "arguments": sys.argv[1:], "color": os.environ.get("COLOR"), "shape": os.environ.get("SHAPE"),
    "parent": os.getppid(), "leads_session": os.getsid(0) == os.getpid(), "name": __name__,
    "preloaded": "wave" in sys.modules, "comm": pathlib.Path("/proc/self/comm").read_text().strip(),
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
}
print(json.dumps(report))
{"kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "leave": lambda: sys.exit(7), "raise": lambda: 1 / 0,
 "complain": lambda: sys.exit("no room"), "end": lambda: None, "wait": signal.pause}[sys.argv[1]]()
"""


SEEN = {
    "color": None,
    "shape": "round",
    "leads_session": True,
    "name": "__main__",
    "preloaded": True,
    "interrupt": True,
}


def run(tmp_path: Path, agent: str) -> subprocess.CompletedProcess[str]:
    """Run an agent's script in a process that has no threads; `worker` is a module there."""
    (tmp_path / "worker.py").write_text(WORKER)
    return subprocess.run(
        [sys.executable, "-c", agent], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PYTHONPATH": str(support.ROOT), "COLOR": "red"},
    )  # fmt: skip


def test_a_signal_reaches_a_worker_that_has_just_been_started(tmp_path):
    done = run(
        tmp_path,
        "import os, signal; from trainer.launch import forkserver\n"
        "server = forkserver.fork(['wave'])\n"
        "for _ in range(40):\n"
        "    worker = server.start('worker', ['wait'], {'PATH': os.environ['PATH']})\n"
        "    os.kill(worker.pid, signal.SIGTERM)\n"
        "    print('ended by', worker.wait(30))\n",
    )
    assert done.stdout.count("ended by -15") == 40, done.stdout + done.stderr


def test_a_forked_worker_is_its_agents_child_and_has_its_own_session_arguments_and_environment(tmp_path):
    done = run(
        tmp_path,
        "import os, signal; from trainer.launch import forkserver\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background of some shells
        "server = forkserver.fork(['wave'])\n"
        "for way in ('leave', 'kill', 'raise', 'end'):\n"
        "    worker = server.start('worker', [way, '1'], {'SHAPE': 'round', 'RANK': '3', 'PATH': os.environ['PATH']})\n"
        "    print(worker.wait(30), worker.poll(), os.getpid(), flush=True)\n",
    )
    report, ends = done.stdout.splitlines()[0::2], done.stdout.splitlines()[1::2]
    assert [line.split()[:2] for line in ends] == [["7", "7"], ["-9", "-9"], ["1", "1"], ["0", "0"]], done.stderr
    agent = int(ends[0].split()[2])
    assert json.loads(report[0]) == SEEN | {"arguments": ["leave", "1"], "parent": agent, "comm": "rank 3"}
    assert "ZeroDivisionError" in done.stderr and done.stderr.count("Traceback") == 1


def test_when_the_server_is_gone_the_caller_gets_none(tmp_path):
    done = run(
        tmp_path,
        "import os, signal, pathlib; from trainer.launch import forkserver\n"
        "server = forkserver.fork([])\n"
        "children = pathlib.Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()\n"
        "os.kill(int(children[0]), signal.SIGKILL)\n"
        "print(server.start('worker', ['end'], {'RANK': '0'}))\n",
    )
    assert (done.stdout, done.stderr) == ("None\n", "")


def test_the_server_ends_with_its_agent_and_a_process_with_threads_gets_none(tmp_path):
    done = run(
        tmp_path,
        "import time, threading; from trainer.launch import forkserver\n"
        "server = forkserver.fork([])\n"
        "threading.Thread(target=time.sleep, args=[0.5]).start()\n"
        "print(forkserver.fork([]))\n",
    )
    assert done.stdout == "None\n"  # no process holds the output open any more, or this would wait forever


def test_a_process_with_threads_can_have_children_forked_and_all_threads_hear_of_their_ends(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "worker.py").write_text(WORKER + "print(open('/proc/self/environ').read().split('\\0'))\n")
    mark = uuid.uuid4().hex
    done = run(
        tmp_path,
        "import os, signal, threading, pathlib; from concurrent.futures import ThreadPoolExecutor as Pool\n"
        "from trainer.launch import forkserver\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background of some shells
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "server = forkserver.spawn(['wave', 'tempfile'])\n"
        "here = pathlib.Path('elsewhere').absolute()\n"
        "def start(way):\n"
        f"    environment = {{'TOPROPE_JOB': '{mark}', 'SHAPE': 'round'}}\n"
        "    files = {'directory': here, 'output': here / f'{way}.out', 'errors': here / f'{way}.err'}\n"
        "    return server.start('worker', [way], environment, **files)\n"
        "with Pool(8) as pool:\n"
        "    for way, child in {way: start(way) for way in ('leave', 'kill', 'raise', 'complain', 'end')}.items():\n"
        "        print(os.getpid(), *{pool.submit(child.wait, 30).result() for _ in range(8)})\n"
        "server.close()\n"
        "print(server.start('worker', ['end'], {}))\n",
    )
    *ends, last = done.stdout.splitlines()
    assert [line.split()[1:] for line in ends] == [["7"], ["-9"], ["1"], ["1"], ["0"]] and last == "None", done.stderr
    report, environment = (elsewhere / "end.out").read_text().splitlines()
    parent = int(ends[0].split()[0])
    assert json.loads(report) == SEEN | {"arguments": ["end"], "parent": parent, "comm": "python"}
    assert f"TOPROPE_JOB={mark}" in ast.literal_eval(environment)  # that other processes see: it is found by it
    assert "ZeroDivisionError" in (elsewhere / "raise.err").read_text() and done.stderr == ""
    assert (elsewhere / "complain.err").read_text() == "no room\n"


def test_a_child_of_a_server_can_have_a_server_of_its_own_that_is_forked(tmp_path):
    (tmp_path / "caller.py").write_text(
        "import os, sys; from trainer.launch import forkserver\n"
        "server = forkserver.fork_in_child(['wave'])\n"
        "print(server.start('worker', ['leave'], {'PATH': os.environ['PATH']}).wait(30), flush=True)\n"
    )
    done = run(
        tmp_path,
        "import os; from trainer.launch import forkserver\n"
        "print(forkserver.fork_in_child([]), flush=True)\n"
        "print(forkserver.fork(['wave']).start('caller', [], {'PATH': os.environ['PATH']}).wait(30))\n",
    )
    assert [line for line in done.stdout.splitlines() if "{" not in line] == ["None", "7", "0"], done.stderr


def test_a_process_with_two_servers_is_the_parent_of_the_children_of_both(tmp_path):
    done = run(
        tmp_path,
        "import os; from concurrent.futures import ThreadPoolExecutor as Pool\n"
        "from trainer.launch import forkserver\n"
        "servers = [forkserver.spawn([]) for _ in range(2)]\n"
        "def status(number):\n"
        "    return servers[number % 2].start('worker', ['leave'], {'PATH': os.environ['PATH']}).wait(30)\n"
        "with Pool(4) as pool:\n"
        "    print({*pool.map(status, range(40))})\n",
    )
    assert done.stdout.splitlines()[-1] == "{7}", done.stderr


def test_a_forked_worker_runs_its_own_finalizers_and_none_that_it_inherited(tmp_path):
    finalizer = "import weakref\nclass Some: ...\nsome = Some()\nweakref.finalize(some, print, '{}')\n"
    (tmp_path / "inherited.py").write_text(finalizer.format("not again"))
    (tmp_path / "ends.py").write_text("import inherited\n" + finalizer.format("its own"))
    done = run(
        tmp_path,
        "import os; from trainer.launch import forkserver\n"
        "server = forkserver.fork(['inherited'])\n"
        "print(server.start('ends', [], {'PATH': os.environ['PATH']}).wait(30))\n",
    )
    assert (done.stdout, done.stderr) == ("its own\n0\n", "")


def test_what_few_workers_import_is_loaded_once_the_first_one_runs(tmp_path):
    done = run(
        tmp_path,
        "import os, sys, time; from trainer.launch import forkserver\n"
        "sys.modules['torch'] = os\n"
        "forkserver.LATER, forkserver.IDLE_SECONDS = ('wave',), 0.1\n"
        "server = forkserver.fork([])\n"
        "for _ in range(2):\n"
        "    server.start('worker', ['end'], {'PATH': os.environ['PATH']}).wait(30)\n"
        "    time.sleep(1)\n",
    )
    assert [json.loads(line)["preloaded"] for line in done.stdout.splitlines()] == [False, True], done.stderr


@pytest.mark.parametrize(("cuda", "hip", "forks"), [(None, None, True), ("13.0", None, False), (None, "7.1", False)])
def test_torchrun_forks_no_worker_with_a_build_of_torch_for_gpus(monkeypatch, cuda, hip, forks):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert torchrun._has_no_gpu() == forks


def test_under_torchrun_workers_are_forked_and_end_with_the_bits_of_ordinary_ones(tmp_path):
    def imports(run: Path, *options: str) -> float:
        short = support.settings(budget__steps=3, optim__warmup_steps=1, wandb__mode="disabled")
        arguments = [*options, "-m", "trainer", "train", str(support.SMOKE), "--run", str(run), *short]
        support.run([*LAUNCH, "--standalone", "--nproc-per-node", "2", *arguments], check=True, timeout=100)
        starts = [e.event for e in events.read(run) if isinstance(e.event, events.AttemptStarted)]
        return starts[0].startup_seconds["imports"]

    forked = imports(tmp_path / "forked")
    ordinary = imports(tmp_path / "ordinary", "--log-dir", str(tmp_path / "logs"), "--redirects", "3")
    if torchrun._has_no_gpu():
        assert forked < ordinary / 2
    hashes = [support.summarise_run(tmp_path / name)["state_sha256"] for name in ("forked", "ordinary")]
    assert hashes[0] == hashes[1] is not None
