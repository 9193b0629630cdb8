"""Promises about what happens when nobody can read what is printed, or the terminal lacks a letter."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.logs import Run, entry, started
from tests.support import ROOT
from trainer.config import parse
from trainer.show.console import Console, preparation
from trainer.show.live import LiveTable

GOES_ON = """
import os, subprocess, sys
from trainer.show import terminal
terminal.take()
with open(sys.argv[1], "w") as own:
    for n in range(3):
        print("step", n, "→", "x" * 70_000, flush=True)
        print("a warning →", file=sys.stderr, flush=True)
        os.system("echo a child prints; echo and complains >&2")
        own.write(f"{n}\\n")
    terminal.take(unbuffered=True)
    print("the end")
    own.write("done\\n")
"""
TO = {
    "a closed output": ">&-",
    "neither output nor errors": ">&- 2>&-",
    "no input, output, errors": "<&- >&- 2>&-",
    "a full disk": ">/dev/full 2>/dev/full",
    "a reader that left": "2>&1 | true",
}


TURNS_TO_A_LOG = """
import os, sys
from trainer.show import terminal
terminal.take()
print("on the terminal", file=sys.stderr)
os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 2)
terminal.take(unbuffered=True)
print("SomeError: in the log", file=sys.stderr)
"""


def test_a_process_that_turns_from_a_terminal_to_a_log_writes_no_control_codes_there(tmp_path: Path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", TURNS_TO_A_LOG, tmp_path / "log"]
    subprocess.run(command, check=True, stderr=theirs, env=os.environ | {"TERM": "xterm-256color"})
    shown = os.read(ours, 1000).decode()
    assert shown.startswith("\r\x1b[K") and "on the terminal" in shown
    assert (tmp_path / "log").read_text() == "SomeError: in the log\n"
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("redirected", TO.values(), ids=TO)
def test_a_process_goes_on_whatever_becomes_of_its_output_and_prints_into_no_file_of_its_own(
    tmp_path: Path, redirected: str
):
    own = tmp_path / "own"
    command = f'set -o pipefail; "$0" -c "$1" "$2" {redirected}'
    done = subprocess.run(["bash", "-c", command, sys.executable, GOES_ON, own], check=False, capture_output=True)
    assert own.read_text().split() == ["0", "1", "2", "done"]
    assert done.returncode == 0


def test_output_arrives_in_order_and_whole_with_a_question_mark_for_a_letter_that_is_missing():
    program = "from trainer.show import terminal; terminal.take(); print('0 → 5 é'); print('x' * 300_000)"
    for encoding, first in (("latin-1", "0 ? 5 é"), ("ascii", "0 ? 5 ?"), ("utf-8", "0 → 5 é")):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
        assert done.stdout.decode(encoding) == f"{first}\n{'x' * 300_000}\n"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp437"])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_line_of_a_run_is_lost_for_a_letter_that_the_terminal_lacks(encoding: str, is_terminal: bool):
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding=encoding)
    with Console(parse({}), Path("run"), is_terminal=is_terminal, file=file) as console:
        console(entry(started(), 0))
    with preparation(file=file) as progress:
        progress("encoding 東京", 0, None)
    file.flush()
    *first, second = written.getvalue().decode(encoding).split("\n")[:-1]
    assert re.search(r"1,234,567 parameters .*steps\s+0 \? 60", " ".join(first))
    assert second == "encoding ??"


def test_data_are_prepared_though_nobody_reads_how_far(monkeypatch: pytest.MonkeyPatch):
    reading, writing = os.pipe()
    os.close(reading)
    closed = io.StringIO()
    closed.close()
    left = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stdout", None)
    for file in (left, closed, None):
        with preparation(file=file) as progress:
            progress("encoding", 0, None)
        with LiveTable(file) as table:
            table.print("a line")
    with pytest.raises(BrokenPipeError):
        left.close()


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_result_that_could_not_be_written_is_a_failure_but_a_reader_that_leaves_is_not(run: Run, as_json: list[str]):
    run.train(3, seconds=0.5)
    command = [sys.executable, "-m", "trainer", "inspect", str(run.path), *as_json]
    with Path("/dev/full").open("w") as full:
        failed = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("OutputError: Standard output cannot be written: No space left on device.")
    reading, writing = os.pipe()
    os.close(reading)
    left = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (left.returncode, left.stderr) == (0, "")


SHARED_TERMINAL = """
import os, signal, sys, time
from pathlib import Path
from tests.logs import ended, entry, killed, started, step
from trainer.config import parse
from trainer.log.events import Warned
from trainer.show import terminal
from trainer.show.console import Console

def trains(*events, attempt=0, earlier=()):
    screen = Console(parse({"budget": {"steps": 60}}), Path("runs/a"), earlier=earlier)
    for event in events:
        screen(entry(event, 1, attempt))
    return screen

def is_killed():
    trains(started(), step(7))
    os.kill(os.getpid(), signal.SIGKILL)

def complains():
    terminal.take()
    print("a line of torch,", "in two parts", file=sys.stderr)

def resumes():
    before = [entry(started(), 0), entry(step(7), 1)]
    trains(started(5), killed(pid=1), step(6), attempt=1, earlier=before)
    os.kill(os.getpid(), signal.SIGKILL)

def finishes():
    trains(started(5), step(60), ended(), attempt=2).close()

for name in sys.argv[1:]:
    if os.fork() == 0:
        globals()[name]()
        os._exit(0)
    os.wait()
"""


def screen_of(written: str) -> list[str]:
    """The lines that a terminal then shows; it knows the control codes that are in use here."""
    lines, row, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", written):
        if code == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif code == "\r":
            column = 0
        elif code in ("\x1b[K", "\x1b[2K"):
            lines[row] = lines[row][:column] if code == "\x1b[K" else " " * column
        elif code == "\x1b[1A":
            row -= 1
        assert code == "\x1b[1A" or not re.search("[A-HJ]$", code), "a move that this terminal does not know"
        lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
        column += len(text)
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize(
    "story",
    [
        ["is_killed", "complains", "resumes", "complains", "finishes"],
        ["is_killed", "resumes", "finishes"],
        ["complains", "is_killed", "finishes", "complains"],
    ],
    ids=" ".join,
)
def test_processes_that_share_a_terminal_and_are_killed_there_leave_one_clean_story(story: list[str], columns: int):
    controller, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SHARED_TERMINAL, *story]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # Linux reports the end of a terminal like this
            while more := os.read(controller, 2**16):
                written += more
    os.close(controller)
    lines = screen_of(written.decode())
    begins = {
        "is_killed": ["attempt 0 · 2 ranks"],
        "complains": ["a line of torch, in two parts"],
        "resumes": ["attempt 1 · 2 ranks", "restart  rank 1 was killed (SIGKILL) after step 7; resumed"],
        "finishes": ["attempt 2 · 2 ranks", "finished step 60/60", "next  python -m trainer inspect runs/a"],
    }
    whole = [line for line in lines if not line.startswith("  ")]
    assert len(whole) == sum(len(begins[name]) for name in story)
    for line, begin in zip(whole, (begin for name in story for begin in begins[name]), strict=True):
        assert line.startswith(begin[: columns - 10]), lines
    assert all(len(line) <= columns or "a" * 64 in line for line in lines)
    shown = written.decode()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor stays hidden"
