"""Promises about scripts/demo, with programs that only note what they were asked to do."""

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, wait_until

STAGES = (
    "gpt_tiny.toml",
    "sample",
    "gpt_tiny_storm.toml",
    "inspect",
    "plot",
    "readme_picture",
    "train configs/smoke.toml",
    "launch configs/smoke.toml",
    "plot",
    "ladder run",
    "ladder report",
    "ready",
)
PROGRAM = """#!/usr/bin/env bash
[[ $1 == -c ]] && exec cat
[[ $* == *--json* ]] && { case "$*" in *reference*) echo "$REFERENCE_HASH" ;; *) echo storm ;; esac; exit; }
echo "$*" >>asked.log
if [[ "$*" == *"$STOPS_AT"* ]]; then trap 'exit 75' INT TERM HUP; touch waiting; while :; do sleep 0.02; done; fi
"""


class Demo:
    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.started = folder, folder / "asked.log", list[subprocess.Popen[str]]()
        for name in ("scripts", ".venv/bin"):
            (folder / name).mkdir(parents=True)
        for name in ("scripts/setup", ".venv/bin/python", ".venv/bin/torchrun"):
            (folder / name).write_text("#!/bin/sh\n" if name == "scripts/setup" else PROGRAM)
        (folder / "scripts/demo").write_bytes((ROOT / "scripts/demo").read_bytes())
        for path in (*folder.glob("scripts/*"), *folder.glob(".venv/bin/*")):
            path.chmod(0o755)

    def start(self, *arguments: str, stops_at: str = "nothing", reference: str = "storm") -> subprocess.Popen[str]:
        self.log.write_text("")
        process = subprocess.Popen(
            ["scripts/demo", *arguments], cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"STOPS_AT": stops_at, "REFERENCE_HASH": reference}, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def asked(self) -> list[str]:
        return [
            next(stage for stage in reversed(STAGES) if stage in line) for line in self.log.read_text().splitlines()
        ]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    made = Demo(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_the_demo_shows_its_first_result_after_one_run_and_says_what_comes_next(demo: Demo):
    running = demo.start("runs/here")
    shown, _ = running.communicate(timeout=20)
    assert running.returncode == 0, shown
    assert demo.asked() == [*STAGES]
    assert shown.index("trainer sample runs/here/reference") < shown.index("Next: ") < shown.index("gpt_tiny_storm")
    assert "Continue with" not in shown


@pytest.mark.parametrize(
    ("stage", "number", "status"),
    [("gpt_tiny.toml", signal.SIGINT, 130), ("inspect", signal.SIGTERM, 143), ("ladder run", signal.SIGHUP, 143)],
)
def test_the_demo_is_stopped_by_a_signal_and_continued_by_the_command_that_it_names(demo: Demo, stage, number, status):
    stopped = demo.start("runs/my demo", stops_at=stage)
    assert wait_until((demo.folder / "waiting").exists, 20)
    os.killpg(stopped.pid, number)
    shown, _ = stopped.communicate(timeout=20)
    assert (stopped.returncode, demo.asked()) == (status, [*STAGES[: STAGES.index(stage) + 1]]), shown
    (command,) = [line.partition(": ")[2] for line in shown.splitlines() if "Continue with: " in line]
    script, *arguments = shlex.split(command)
    assert (script, arguments) == ("scripts/demo", ["runs/my demo"])
    again = demo.start(*arguments)
    again.communicate(timeout=20)
    assert (again.returncode, demo.asked()) == (0, [*STAGES]), "finished runs end at once"


def test_the_demo_fails_if_the_faults_changed_a_bit(demo: Demo):
    running = demo.start("runs/here", reference="another")
    shown, _ = running.communicate(timeout=20)
    assert running.returncode == 1 and "the hashes differ" in shown and "Continue" not in shown
    assert "ladder run" not in demo.asked()
