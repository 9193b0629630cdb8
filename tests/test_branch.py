"""Promises about runs that begin from a state of another run: a function of (config, that state), or refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import trainer
from tests.support import SMOKE, outcome, settings, torchrun, with_faults, write_corpus
from tests.support import trainer as command
from trainer import branch, checkpoint, cli
from trainer import config as configs
from trainer.checkpoint import loading
from trainer.errors import CheckpointError, ConfigError, RunDirectoryError, TopropeError
from trainer.launch import quorum
from trainer.log import events, rundir

SMALL: dict[str, Any] = {
    "budget.steps": 6, "checkpoint.every_steps": 2, "checkpoint.keep_last": 3, "data.micro_batches": 4,
    "eval.max_tokens": 512, "model.context": 12,
}  # fmt: skip


def config(**changes: Any) -> configs.Config:
    """A small config; "__" stands for "."."""
    changed = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    return configs.load(SMOKE, [f"{key}={json.dumps(value)}" for key, value in changed.items()])


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer.train(config(), tmp_path_factory.mktemp("branch") / "parent").path


def test_with_the_parents_config_it_ends_as_the_parent_did_and_says_where_it_began(parent: Path, tmp_path: Path):
    run = trainer.train(config(), tmp_path / "run", parent=f"{parent}@2")
    found, before = run.summary(), trainer.open_run(parent).summary()
    assert found["state_sha256"] == before["state_sha256"]
    assert (found["tokens"], found["warnings"]) == (before["tokens"], [])
    assert [row["step"] for row in run.losses()] == [3, 4, 5, 6]
    assert {key: found["parent"][key] for key in ("run", "step")} == {"run": str(parent), "step": 2}
    started = next(event for event in run.events() if event["event"] == "attempt_started")
    assert (started["from_step"], started["parent"]) == (2, f"{parent}@2")


def test_the_newest_state_and_its_digest_are_taken_and_a_copy_of_the_parent_gives_the_same_run(
    parent: Path, tmp_path: Path
):
    longer = config(budget__steps=7)
    runs = [trainer.train(longer, tmp_path / "a", parent=parent)]
    runs.append(trainer.train(longer, tmp_path / "b", parent=shutil.copytree(parent, tmp_path / "copy")))
    summaries = [run.summary() for run in runs]
    assert summaries[0]["parent"]["state_sha256"] == trainer.open_run(parent).summary()["state_sha256"]
    for key in ("fingerprint", "weights_sha256"):
        assert summaries[0][key] == summaries[1][key]
    assert summaries[0]["fingerprint"] != configs.fingerprint(longer)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_sharded_and_killed_it_resumes_to_the_bits_of_a_calm_one_without_its_parent(parent: Path, tmp_path: Path):
    changes = {"optim__learning_rate": 1e-3, "optim__schedule": "linear", "budget__steps": 8}
    calm = trainer.train(config(**changes), tmp_path / "calm", parent=f"{parent}@4").path
    own = shutil.copytree(parent, tmp_path / "own")
    options = settings(**{key.replace(".", "__"): value for key, value in SMALL.items()} | changes)
    # keep_last: the state of step 4 is still there when the kill at step 7 comes, whatever was saved after it.
    again = ("train", SMOKE, "--run", tmp_path / "run", *options)
    start = (*again, *settings(parallel__strategy="fsdp"), *with_faults([{"kind": "exit", "at_step": 7, "rank": 1}]))
    assert torchrun(2, *start, "--from", f"{own}@4", check=False).returncode != 0
    shutil.rmtree(own)
    command(*again, "--from", f"{own}@4")
    expected, found = outcome(calm), outcome(tmp_path / "run")
    assert found == expected


def test_a_quorum_that_has_begun_from_a_parent_is_launched_again_without_it(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plans: list[quorum.Plan] = []
    monkeypatch.setattr(quorum, "launch", lambda plan: plans.append(plan) or 0)
    own = shutil.copytree(parent, tmp_path / "own")
    trainer.train(config(budget__steps=7), tmp_path / "run", parent=own)
    shutil.rmtree(own)
    words = ["launch", str(SMOKE), "--workers", "2", *settings(budget__steps=7), "--from", str(own), "--run"]
    again = CliRunner().invoke(cli.app, [*words, str(tmp_path / "run")])
    assert again.exit_code == 0 and str(own) in plans[0].command
    assert isinstance(CliRunner().invoke(cli.app, [*words, str(tmp_path / "new")]).exception, RunDirectoryError)


def test_another_optimizer_and_other_text_go_on_and_the_log_names_what_is_new(parent: Path, tmp_path: Path):
    other = config(budget__steps=7, optim__optimizer="muon", data__source=write_corpus(tmp_path / "text"))
    run = trainer.train(other, tmp_path / "run", parent=parent)
    assert run.status == "finished"
    (message,) = [warning["message"] for warning in run.summary()["warnings"]]
    assert "does not hold optim.blocks.0" in message


def test_moments_that_begin_at_the_branch_are_corrected_by_their_own_count_also_after_a_resume(tmp_path: Path):
    parent = trainer.train(config(optim__optimizer="muon"), tmp_path / "parent").path
    chosen = config(optim__schedule="constant", budget__steps=8, checkpoint__every_steps=1)
    run = trainer.train(chosen, tmp_path / "run", parent=parent)
    before, after = (loading.read(saved) for saved in checkpoint.committed(run.path)[:0:-1])
    o = chosen.optim
    # The hidden matrices were Muon's, so their moments are new; the table's are as old as the run.
    for name, count, decay in (("blocks.0.mlp.up.weight", 1, o.weight_decay), ("embed.weight", 7, 0.0)):
        first, second = (after[f"optim.{name}.{key}"].double() for key in ("exp_avg", "exp_avg_sq"))
        mean, square = first / (1 - o.beta1**count), second / (1 - o.beta2**count)
        expected = before[f"model.{name}"] * (1 - o.learning_rate * decay)
        expected = expected - o.learning_rate * mean / (square.sqrt() + o.eps)
        torch.testing.assert_close(after[f"model.{name}"].double(), expected.double(), rtol=1e-6, atol=1e-7)
    whole = run.summary()["state_sha256"]
    shutil.rmtree(run.path / "events")
    shutil.rmtree(checkpoint.committed(run.path)[0].path)
    again = trainer.train(chosen, run.path)
    assert [row["step"] for row in again.losses()] == [8]
    assert again.summary()["state_sha256"] == whole
    # A branch of the branch takes over moments with their counts.
    next_parent = branch.origin(tmp_path / "next", config(budget__steps=9), str(run.path))
    assert {*branch.moments_from(next_parent).values()} == {6}


@pytest.mark.parametrize(
    ("at", "changes", "error", "message"),
    [
        ("@3", {}, CheckpointError, r"no checkpoint of step 3; it has 2, 4, 6\.\n  Name one of these"),
        ("", {}, ConfigError, r"budget\.steps = 6 leaves no step after step 6"),
        (
            "@2",
            {"model__width": 64},
            ConfigError,
            r"do not fit the model: .* is \(.* there and \(.* here; \d+ differ",
        ),
        ("@2", {"model__biases": True}, ConfigError, r"do not fit the model: .* is none there and \(\d+.* here"),
        (
            "@2",
            {"data__tokenizer": "chars"},
            ConfigError,
            r'another tokenizer .*\n.* Set data.tokenizer = "/',
        ),
        ("/x@2", {}, RunDirectoryError, "is no run"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_any_work(
    parent: Path, tmp_path: Path, at: str, changes: dict[str, Any], error: type[TopropeError], message: str
):
    with pytest.raises(error, match=message) as refused:
        trainer.train(config(**changes), tmp_path / "run", parent=f"{parent}{at}")
    assert refused.value.exit_status == 2
    assert not rundir.is_run(tmp_path / "run")


def test_a_run_keeps_the_parent_that_it_began_from(parent: Path, tmp_path: Path):
    longer, run = config(budget__steps=7), tmp_path / "run"
    trainer.train(longer, run, parent=parent)
    trainer.train(longer, run)
    trainer.train(longer, run, parent=f"{parent}@6")
    with pytest.raises(RunDirectoryError, match=r"began from .*@6, not from .*@4\.\n.*Leave --from out"):
        trainer.train(longer, run, parent=f"{parent}@4")
    with pytest.raises(RunDirectoryError, match="began without a parent"):
        trainer.train(config(), parent, parent=f"{run}@6")
    with pytest.raises(RunDirectoryError, match=r"budget.steps: 7 → 8"):
        trainer.train(config(budget__steps=8), run)
    assert events.next_attempt(run) == 3


def test_without_a_state_of_its_own_it_needs_the_state_it_began_from(parent: Path, tmp_path: Path):
    own, run = shutil.copytree(parent, tmp_path / "own"), tmp_path / "run"
    longer = config(budget__steps=7)
    trainer.train(longer, run, parent=own)
    for folder in ("checkpoints", "events"):  # as if it had died before its first save
        shutil.rmtree(run / folder)
    other = trainer.train(config(seed=1), tmp_path / "other").path
    newest = own / "checkpoints" / "step-00000006"
    shutil.rmtree(newest)
    with pytest.raises(CheckpointError, match="no checkpoint of step 6"):
        trainer.train(longer, run)
    shutil.copytree(other / "checkpoints" / "step-00000006", newest)
    with pytest.raises(RunDirectoryError, match="another state at step 6"):
        trainer.train(longer, run)
