"""The promise of docs/first-day.md: its files and commands work in an empty folder, with the wheel alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PAGE = (ROOT / "docs/first-day.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
ONE_PROCESS = """
import json, runpy, shlex, subprocess, sys, time
from trainer import cli

for line in json.load(sys.stdin):
    started, words, status = time.monotonic(), shlex.split(line), 0
    print(f"$ {line}", flush=True)
    try:
        if words[:3] == ["python", "-m", "trainer"]:
            sys.argv = words[2:]
            cli.main()
        elif words[0] == "python" and words[1].endswith(".py"):
            runpy.run_path(words[1], run_name="__main__")
        else:
            status = subprocess.run(line, shell=True).returncode
    except SystemExit as end:
        status = end.code or 0
    print(f"= exit {status} after {time.monotonic() - started:.1f} s", flush=True)
"""
"""Runs commands as a shell would, but in one process: torch is imported once."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_command_of_the_first_day_runs_from_the_wheel_in_an_empty_folder(wheel: Path, tmp_path: Path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    commands: list[str] = []
    for _, name, text in BLOCKS:
        if name:
            assert f"`{name}`" in PAGE, "the page tells under which name to save a file"
            (tmp_path / name).write_text(text)
        else:
            commands += [re.sub(r"(ladder run .*)", r"\1 --up-to small", line) for line in text.splitlines()]  # shorter
    python = Path(sys.executable).parent
    environment = os.environ | {
        "PYTHONPATH": str(wheel), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
        "PATH": f"{python}{os.pathsep}{os.environ['PATH']}", "TOPROPE_CACHE": str(tmp_path / "cache"), "COLUMNS": "200",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS], input=json.dumps(commands), cwd=tmp_path, env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    shown = f"{done.stdout}\n{done.stderr}"
    assert re.findall(r"^= exit (\S+) after", done.stdout, re.MULTILINE) == ["0"] * len(commands), shown
    printed = dict(zip(commands, re.split(r"^\$ .*$", done.stdout, flags=re.MULTILINE)[1:], strict=True))

    def of(start: str) -> str:
        return next(text for command, text in printed.items() if command.startswith(f"python -m trainer {start}"))

    assert "The " in of("sample") and "The " in printed["python generate.py"]
    assert "pass" in of("chaos") and "recent" in of("ladder report") and "gated" in of("judge")
    assert (tmp_path / "runs/ladders/mine/report.html").exists()
    status = json.loads((tmp_path / "runs/recent/config.json").read_text())
    assert any(key.startswith("model.code my_model.py") for key in status["mathematics"])
