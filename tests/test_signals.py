"""docs/signals.md, row by row: what signals and lost outputs do to a run, alone and under torchrun."""

import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    ROOT,
    SMOKE,
    Job,
    committed_samples,
    run,
    settings,
    summarise_run,
    wait_until,
    worker_environment,
)
from trainer import signals
from trainer.fleet import supervision
from trainer.launch.agent import LAUNCH
from trainer.log import events
from trainer.parallel.arbiter import wait_readable

pytestmark = pytest.mark.slow

ALONE, TORCHRUN = "alone", "torchrun"
STEPS = 40
SETTINGS = settings(
    budget__steps=STEPS, checkpoint__every_steps=0, eval__every_steps=0, wandb__mode="disabled"
)  # fmt: skip
# In a process of its own: Python 3.12 and newer warn of a fork, also that of pty.fork, beside threads such as torch's.
TAKE_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
OUTPUTS = {
    "a closed standard output": (">&-", "closed"),
    "a full standard output": ("", "full"),
    "a reader that left (`… | head`)": ("", "left"),
}
"""{row: (what a shell writes where Python starts in another way then, what tests.lost_output does)}"""


def table() -> dict[str, dict[str, tuple[str, int]]]:
    """{row: {way: (what happens, exit status)}} as the document says."""
    text = (ROOT / "docs" / "signals.md").read_text(encoding="utf-8").replace(r"\|", "!")
    rows = [
        [cell.strip().replace("!", "|") for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    return {row[0]: {ALONE: (row[1], int(row[2])), TORCHRUN: (row[3], int(row[4]))} for row in rows[2:]}


def start(directory: Path, way: str, *more: str, ignoring: bool = False, slow: dict[str, float] | None = None) -> Job:
    options = ["--standalone", "--nproc-per-node=2", "--monitor-interval=0.1"] if way == TORCHRUN else []
    python, *launch = LAUNCH if way == TORCHRUN else (sys.executable, "-m", "tests.worker")
    launch = [python, "-m", "tests.ignoring", *launch[1:]] if ignoring else [python, *launch]
    chosen, slow = [*SETTINGS, *more], slow or {"before_update": 0.15}
    return Job(directory / "jobs", SMOKE, directory / "run", chosen, options, launch=launch, slow=slow)


@contextlib.contextmanager
def training(directory: Path, way: str, *settings: str, **more: Any) -> Iterator[Job]:
    """A job that has done its second step."""
    with start(directory, way, *settings, **more) as job:
        run = directory / "run"
        assert wait_until(lambda: run.is_dir() and max(committed_samples(run), default=0) >= 2, seconds=60), job.output
        yield job


def saved_and_left(run: Path, by: str) -> None:
    summary = summarise_run(run)
    assert summary["status"] == "preempted" and 2 <= summary["step"] < STEPS
    assert [saved["step"] for saved in summary["checkpoints"]] == [summary["step"]]
    asked = {entry.event.signal for entry in events.read(run) if isinstance(entry.event, events.StopRequested)}
    assert asked == {by}


@pytest.mark.parametrize("way", [ALONE, TORCHRUN])
@pytest.mark.parametrize("row", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT (Ctrl-C)"])
def test_a_run_that_is_asked_to_stop_saves_and_leaves(tmp_path: Path, row: str, way: str):
    name, (happens, status) = row.split(maxsplit=1)[0], table()[row][way]
    assert happens == "saves and leaves"
    with training(tmp_path, way) as job:
        job.process.send_signal(signal.Signals[name])
        assert job.wait(20) == status, job.output
        assert job.leftovers() == []
    saved_and_left(tmp_path / "run", name)


@pytest.mark.parametrize("way", [ALONE, TORCHRUN])
def test_signals_that_were_ignored_at_the_start_stay_ignored_by_all_processes(tmp_path: Path, way: str):
    rows = [table()[row][way] for row in table() if row.endswith(("`nohup`", "that ignores it"))]
    assert rows == [("is not disturbed", 0)] * 2
    with training(tmp_path, way, *settings(budget__steps=12), ignoring=True) as job:
        for number in (signal.SIGHUP, signal.SIGINT):
            for pid in job.processes():
                job.send(pid, number)
        assert job.running, "the signals came too late"
        assert job.wait(60) == 0, job.output
    summary = summarise_run(tmp_path / "run")
    assert (summary["status"], len(summary["attempts"])) == ("finished", 1)


@pytest.mark.parametrize("way", [ALONE, TORCHRUN])
def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path: Path, way: str):
    happens, status = table()["Ctrl-C a second time"][way]
    assert happens.startswith("ends at once")
    with training(tmp_path, way, slow={"before_update": 6.0, "from_step": 2}) as job:
        job.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        again = time.monotonic()
        job.process.send_signal(signal.SIGINT)
        assert job.wait(20) % 256 == status, job.output
        assert time.monotonic() - again < 4
        assert wait_until(lambda: not job.processes(), seconds=2)


@pytest.mark.parametrize("way", [ALONE, TORCHRUN])
def test_a_run_in_a_terminal_that_is_closed_saves_and_leaves(tmp_path: Path, way: str):
    happens, status = table()["a terminal that is closed"][way]
    assert happens == "saves and leaves"
    launch = [*LAUNCH, "--standalone", "--nproc-per-node=2", "-m"] if way == TORCHRUN else [sys.executable, "-m"]
    command = [*launch, "tests.worker", "train", str(SMOKE), "--run", str(tmp_path / "run"), *SETTINGS]
    run, (terminal, theirs) = tmp_path / "run", pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", TAKE_TERMINAL, *command], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
        env=os.environ | worker_environment({"before_update": 0.15}),
    ) as process:  # fmt: skip
        os.close(theirs)
        assert wait_until(lambda: run.is_dir() and max(committed_samples(run), default=0) >= 2, seconds=60)
        os.close(terminal)
        assert process.wait(20) == status
    saved_and_left(run, "SIGHUP")


@pytest.mark.parametrize("row", OUTPUTS)
def test_a_lost_output_disturbs_no_run(tmp_path: Path, row: str):
    assert {table()[row][way] for way in (ALONE, TORCHRUN)} == {("is not disturbed", 0)}
    few = settings(budget__steps=2, checkpoint__every_steps=0, eval__every_steps=0, wandb__mode="disabled")
    by_shell, by_ourselves = OUTPUTS[row]
    train = ["trainer", "train", str(SMOKE), *few, "--run"]
    command = [sys.executable, "-m", *train, str(tmp_path / ALONE)]
    lost = [sys.executable, "-m", "tests.lost_output", by_ourselves]
    if by_shell:
        shell = ["bash", "-c", f'"$@" {by_shell}', "bash", *command]
        alone = subprocess.run(shell, cwd=ROOT, check=False, timeout=60, capture_output=True)
    else:
        alone = run([*lost, *command[2:]], check=False, timeout=60)
    launch = [*LAUNCH[2:], "--standalone", "--nproc-per-node=2", "-m", *train, str(tmp_path / TORCHRUN)]
    ranks = run([*lost, *launch], check=False, timeout=60)
    for way, done in ((ALONE, alone), (TORCHRUN, ranks)):
        assert (done.returncode, summarise_run(tmp_path / way)["status"]) == (0, "finished"), done.stderr


@pytest.mark.parametrize(
    "options",
    [
        "--node-rank=0 --master-addr=127.0.0.1 --master-port=PORT",
        "--rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:PORT --rdzv-id=ours --rdzv-conf=is_host=0",
    ],
)
def test_a_torchrun_that_waits_for_nodes_says_so_and_leaves_when_it_is_asked(tmp_path: Path, options: str):
    row = table()["SIGTERM before there are workers"]
    assert row == {ALONE: ("saves and leaves", 75), TORCHRUN: ("leaves: there is nothing to save", 75)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["--nnodes=2", *options.replace("PORT", port).split()]
    with Job(tmp_path / "jobs", SMOKE, tmp_path / "run", SETTINGS, words) as job:
        assert wait_until(lambda: f"torchrun waits at 127.0.0.1:{port}" in job.output, seconds=30), job.output
        assert "until 2 nodes of this job have met" in job.output and "--rdzv-id" in job.output
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(5) == 75, job.output
        assert job.leftovers() == []


def test_the_table_has_a_test_for_each_row():
    asked = {"SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT (Ctrl-C)", "Ctrl-C a second time", "a terminal that is closed"}
    ignored = {"SIGHUP, under `nohup`", "SIGINT, in a background job that ignores it"}
    assert set(table()) == asked | ignored | set(OUTPUTS) | {"SIGTERM before there are workers"}


def test_schedulers_take_the_signals_that_are_not_ignored():
    seen: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
    with supervision.handle_signals(lambda number, _frame: seen.append(number)):
        for number in signals.ASKING:
            os.kill(os.getpid(), number)
    assert seen == list(signals.ASKING)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with supervision.handle_signals(lambda number, _frame: seen.append(number)):
        os.kill(os.getpid(), signal.SIGHUP)
    assert seen == list(signals.ASKING)
    signal.signal(signal.SIGHUP, before[0])
    signal.signal(signal.SIGINT, before[1])


def test_a_launcher_that_sleeps_is_woken_by_a_signal_and_by_the_end_of_a_child():
    sent: list[int] = []
    before = {number: signal.getsignal(number) for number in signals.ASKING}
    stop = signals.PassedOn(sent.append)
    try:
        stop.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_readable(20, stop.woken)
        stop.pass_on()
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        with pytest.raises(BlockingIOError):
            stop.woken.recv(1)
        child.communicate(b"\n")
        wait_readable(20, stop.woken)
        assert stop.woken.recv(100)
    finally:
        stop.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert sent == [signal.SIGUSR1]
