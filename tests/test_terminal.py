"""Promises about what happens when nobody can read what is printed, or the terminal lacks a letter."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.logs import Run, entry, started
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


@pytest.mark.parametrize("redirected", TO.values(), ids=TO)
def test_a_process_goes_on_whatever_becomes_of_its_output_and_prints_into_no_file_of_its_own(
    tmp_path: Path, redirected: str
):
    own = tmp_path / "own"
    command = f'set -o pipefail; "$0" -c "$1" "$2" {redirected}'
    done = subprocess.run(["bash", "-c", command, sys.executable, GOES_ON, own], check=False, capture_output=True)
    assert own.read_text().split() == ["0", "1", "2", "done"]
    assert done.returncode == 0


def test_what_is_printed_arrives_in_order_and_whole_with_a_question_mark_for_a_letter_that_is_missing():
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
    with Console(parse({}), is_terminal=is_terminal, file=file) as console:
        console(entry(started(), 0))
    with preparation(file=file) as progress:
        progress("encoding 東京", 0, None)
    file.flush()
    first, second = written.getvalue().decode(encoding).splitlines()
    assert "1,234,567 parameters" in first and "steps 0 ? 60" in first
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
