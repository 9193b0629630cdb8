"""The run directory: how it is recognised, which commit it records, which files it may hold."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.logs import Run
from tests.support import ENVIRONMENT, SMOKE, wait_until
from trainer import cli
from trainer import config as configs
from trainer.checkpoint import files
from trainer.config import Config
from trainer.errors import EXIT_USAGE, ConfigError, RunDirectoryError
from trainer.launch.agent import Agent
from trainer.log import events, rundir


def leave(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit status of a command, run in this process for speed."""
    monkeypatch.setattr(sys, "argv", ["trainer", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.parametrize("name", ["step-lr3e-3", "step-00000040", ".step-00000040.replaced", "steps"])
def test_a_directory_that_holds_a_config_is_a_run_whatever_its_name(monkeypatch, capsys, tmp_path, name):
    run = Run(tmp_path / name)
    run.record()
    assert leave(monkeypatch, "verify", run.path) == 0
    assert "has no checkpoints" in capsys.readouterr().out


def test_a_checkpoint_is_known_from_within_and_through_a_link(monkeypatch, capsys, run):
    staging = files.final_path(run.path, 4)
    staging.mkdir(parents=True)
    files.write_manifest(staging, {"step": 4, "files": {}})
    (run.path / "latest").symlink_to(staging)
    monkeypatch.chdir(staging)
    for path in (".", run.path / "latest", staging):
        assert leave(monkeypatch, "verify", path) == 0
        assert capsys.readouterr().out == "step-00000004  intact\n"
    (staging / ".DS_Store").touch()
    assert leave(monkeypatch, "verify", staging) == 0
    assert capsys.readouterr().out == "step-00000004  intact (also there, listed in no manifest: .DS_Store)\n"


@pytest.mark.parametrize("name", [".DS_Store", "._attempt-0007-rank-00000.jsonl", ".nfs0000000000000001.jsonl"])
def test_hidden_files_of_a_desktop_or_a_file_system_change_nothing(run, name):
    run.train(3)
    before = events.read(run.path), events.next_attempt(run.path)
    (events.events_directory(run.path) / name).write_bytes(b"\x00\x05\x16\x07 no event\n")
    assert (events.read(run.path), events.next_attempt(run.path)) == before
    new = run.path.with_name("new")
    new.mkdir()
    (new / name).touch()
    with rundir.claim(new, Config()):
        assert (new / "lock").exists()


def committed(root: Path) -> str:
    """Make a repository with one commit, and return it."""
    (root / "file").write_text("theirs")
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", root.name]):
        subprocess.run([*git, *command], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_our_own_checkout_or_unknown(monkeypatch, tmp_path):
    theirs = committed(tmp_path)
    ours = tmp_path / "venv" / "ours"
    ours.mkdir(parents=True)
    assert rundir.git_commit(ours) is None, "an installed package in another repository"
    (ours / "pyproject.toml").touch()
    assert rundir.git_commit(ours) is None, "a source tree copied into another repository"
    commit = committed(ours)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert theirs != commit == rundir.git_commit(ours), "started by a hook of another repository"
    (ours / "file").write_text("changed")
    assert rundir.git_commit(ours) == f"{commit}+"
    (ours / "pyproject.toml").unlink()
    assert rundir.git_commit(ours) is None, "an environment that is a repository itself"


@pytest.mark.parametrize(
    "settings",
    [{"optim": {"warmup_steps": 8}, "budget": {"steps": 8}}, {"optim": {"decay_fraction": 0.5}}],
    ids=["no step to decay in", "a setting without effect"],
)
def test_a_rule_that_was_added_since_does_not_close_a_run(run, settings):
    with pytest.raises(ConfigError):
        configs.parse(settings)
    rundir.record(run.path, configs.parse(settings, check_rules=False), {"data_sha256": "d" * 64})
    stored = rundir.config_of(run.path).model_dump()
    assert {part: {name: stored[part][name] for name in table} for part, table in settings.items()} == settings


def test_a_library_that_is_not_installed_is_recorded_as_unknown(monkeypatch, tmp_path):
    """A machine without a package index may lack what the run does without, such as wandb."""
    monkeypatch.setattr(rundir, "LIBRARIES", ("torch", "no-such-library"))
    run = Run(tmp_path / "run")
    run.record()
    versions = rundir.read(run.path)["versions"]
    assert versions["torch"] and versions["no-such-library"] is None


def test_a_rank_that_sees_another_directory_than_rank_0_is_refused_with_its_node(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "SHARING_SECONDS", 0.0)
    shared, own = tmp_path / "shared", tmp_path / "own"
    with rundir.claim(shared, Config()):
        owner = rundir.owner_of(shared)
        rundir.check_shared(shared, owner)
        with pytest.raises(RunDirectoryError, match="is not the directory that rank 0 has claimed"):
            rundir.check_shared(own, owner)
        own.mkdir()
        (own / "lock").write_text("process 1 on n2\n")  # of an earlier job there
        with pytest.raises(RunDirectoryError, match=f"{re.escape(owner)}.*\n.*that all nodes share"):
            rundir.check_shared(own, owner)


@pytest.mark.slow
def test_two_nodes_whose_run_directories_are_their_own_leave_with_2_before_any_step(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    agents = list[Agent]()
    for node in range(2):
        (directory := tmp_path / f"node-{node}").mkdir()
        meeting = ["--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command = [*meeting, "--nproc-per-node=1", "-m", "trainer", "train", str(SMOKE), "--run", "run"]
        log = tmp_path / f"agent-{node}.txt"
        agents.append(Agent(command, log, environment=ENVIRONMENT, directory=directory, warm=True))
    with agents[0], agents[1]:
        assert wait_until(lambda: not any(agent.running for agent in agents), 60), agents[0].output
        assert [agent.process.wait(10) for agent in agents] == [EXIT_USAGE, EXIT_USAGE], agents[0].output
        assert "is not the directory that rank 0 has claimed" in agents[0].output
    assert not any(rundir.is_run(tmp_path / f"node-{node}" / "run") for node in range(2))
