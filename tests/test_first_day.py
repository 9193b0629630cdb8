"""The promise of docs/first-day.md: its files and commands work in an empty folder, with the wheel alone."""

import json
import re
from pathlib import Path

import pytest

from tests.support import ROOT, in_one_process

PAGE = (ROOT / "docs/first-day.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_command_of_the_first_day_runs_from_the_wheel_in_an_empty_folder(wheel: Path, tmp_path: Path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    commands: list[str] = []
    for _, name, text in BLOCKS:
        if name:
            assert f"`{name}`" in PAGE, "the page tells under which name to save a file"
            (tmp_path / name).write_text(text.replace("steps = 60", "steps = 20"))  # shorter
        else:
            commands += [re.sub(r"(ladder run .*)", r"\1 --up-to small", line) for line in text.splitlines()]  # shorter
    printed = in_one_process(commands, wheel, tmp_path)

    def of(start: str) -> str:
        return next(text for command, text in printed.items() if command.startswith(f"python -m trainer {start}"))

    assert "The " in of("sample") and "The " in printed["python generate.py"]
    assert "pass" in of("chaos") and "recent" in of("ladder report") and "gated" in of("judge")
    assert (tmp_path / "runs/ladders/mine/report.html").exists()
    status = json.loads((tmp_path / "runs/recent/config.json").read_text())
    assert any(key.startswith("model.code my_model.py") for key in status["mathematics"])
