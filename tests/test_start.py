"""The first minute: built-in configs by name, a folder to start from, the schema, and the Python API."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support import ENVIRONMENT, ROOT, settings, trainer
from trainer import builtin
from trainer import config as configs
from trainer.chaos import plan
from trainer.errors import ConfigError, RunDirectoryError, UsageError
from trainer.ladder.plan import load


def python(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, in this directory."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=directory, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
    )


def test_a_built_in_config_is_found_by_name_from_any_directory_and_a_file_there_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert builtin.find(Path("smoke")).samefile(ROOT / "configs/smoke.toml")
    assert builtin.find(Path("demo"), "ladders").samefile(ROOT / "configs/ladders/demo.toml")
    assert builtin.find(Path("smoke"), "chaos").samefile(ROOT / "configs/chaos/smoke.toml")
    (tmp_path / "smoke").touch()
    for as_written in ("smoke", "smoke.toml", "sub/smoke"):
        assert builtin.find(Path(as_written)) == Path(as_written)
    with pytest.raises(ConfigError, match=r"neither a file here nor a built-in config(.|\n)*gpt_tiny"):
        builtin.find(Path("smok"))


def test_init_writes_a_folder_whose_readme_commands_work_and_overwrites_nothing(tmp_path):
    folder = tmp_path / "mine"
    assert "train.toml" in trainer("init", folder).stdout
    commands = re.findall(r"^toprope (.*?)(?:  +#.*)?$", (folder / "README.md").read_text(), re.MULTILINE)
    assert [shlex.split(line)[0] for line in commands] == [
        "train", "train", "inspect", "sample", "chaos", "ladder", "ladder", "ladder"
    ]  # fmt: skip
    few = settings(budget__steps=2, optim__warmup_steps=1, data__max_megabytes=0.5, wandb__mode="disabled")
    for line in commands[:4]:
        words = line.replace("runs/train", str(folder / "run")).replace("train.toml", str(folder / "train.toml"))
        arguments = shlex.split(words)
        trainer(*arguments, *(["--run", folder / "run", *few] if arguments[0] == "train" else []))
    assert plan.load(folder / "campaign.toml").cases
    assert len(load.load(folder / "ladder.toml").runs) == 18
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UsageError, match=r"holds .*train\.toml.* already"):
        builtin.start(folder, "{}")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_every_setting_has_a_description_and_every_built_in_config_only_settings_of_the_schema():
    schema = configs.json_schema()
    tables = {"": schema} | schema["$defs"]
    undescribed = [
        f"{table}.{name}"
        for table, tree in tables.items()
        for name, setting in tree["properties"].items()
        if not setting.get("description")
    ]
    assert undescribed == []
    assert json.loads(trainer("schema").stdout) == json.loads(json.dumps(schema))
    for path in (ROOT / "configs").glob("*.toml"):
        for name, value in tomllib.loads(path.read_text()).items():
            assert name in schema["properties"]
            if isinstance(value, dict):
                table = schema["$defs"][schema["properties"][name]["$ref"].rpartition("/")[2]]
                assert value.keys() <= table["properties"].keys()


def test_a_dry_run_names_what_it_cannot_read_and_refuses_what_training_would(tmp_path):
    (tmp_path / "short.txt").write_text("To be, or not to be.")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    smoke = ["train", "smoke", "--dry-run"]
    absent = trainer(*smoke, *settings(data__source="none.txt", data__max_megabytes=0.0))
    assert "note: none.txt does not exist" in absent.stderr
    for wrong, message in (
        (settings(data__source=str(tmp_path / "short.txt")), "model.context = 32 is longer than the training split"),
        (["--run", str(tmp_path / "other")], "so it is no run"),
    ):
        refused = trainer(*smoke, *wrong, check=False)
        assert refused.returncode == 2 and message in refused.stderr


def test_importing_the_package_loads_neither_torch_nor_pydantic(tmp_path):
    code = "import sys, trainer; sys.exit(bool({'torch', 'numpy', 'pydantic'} & sys.modules.keys()))"
    assert python(code, tmp_path).returncode == 0


def test_the_code_of_the_api_page_runs_and_a_second_call_finds_the_run_finished(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
    again = (
        "\nimport signal\nassert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        'same = trainer.train(run.config, "runs/api")\n'
        "assert same.losses() == run.losses() and len(run.losses()) == 20\n"
        'assert {"event", "attempt", "rank", "time"} <= run.events()[0].keys()\n'
    )
    done = python(code + again, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_api_refuses_what_the_command_line_refuses(tmp_path):
    import trainer as package

    names: Any = package
    with pytest.raises(RunDirectoryError):
        package.open_run(tmp_path)
    with pytest.raises(ConfigError, match=r"budget\.steps"):
        package.train({"budget": {"steps": 0}}, tmp_path / "run")
    with pytest.raises(AttributeError):
        _ = names.no_such_name
    assert package.Config is configs.Config
