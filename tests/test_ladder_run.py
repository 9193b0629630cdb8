"""Promises about running ladders, kept with real processes in seconds."""

import dataclasses
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from tests.support import start, summarise_run, trainer, wait_until
from tests.test_ladder_file import ARM, HEAD, SIZES, TARGET_TABLE, write
from trainer import api, checkpoint, cli, ensemble, provenance
from trainer import config as configs
from trainer.data import EvalWindows, prepare
from trainer.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_PREEMPTED,
    ConfigError,
    RunDirectoryError,
    TopropeError,
    UsageError,
)
from trainer.fleet import gpus, scheduling
from trainer.fleet.backend import Local, Process, Task
from trainer.fleet.run_store import RunState, StoredRun
from trainer.ladder import collect, ensembles, preregistration, report, run, slots, speed, tuning
from trainer.ladder.plan import load, sizes
from trainer.ladder.plan.ladder import AA, Ladder, PlannedRun
from trainer.ladder.preregistration import pool_of
from trainer.ladder.run import LadderStatus
from trainer.ladder.slots import Slots
from trainer.ladder.speed import Speed
from trainer.ladder.stats.records import BASELINE, RunResult
from trainer.ladder.stored import stored
from trainer.log import events, rundir

RUNGS = "".join(f'[[rungs]]\nname = "{n}"\nwidth = {w}\nn_layers = 1\n' for n, w in (("s", 16), ("m", 24)))
PLAIN = HEAD.replace("[0, 1]", "[0]") + "slots = 2\n" + SIZES + RUNGS + TARGET_TABLE
STORM = """
[[faults]]
kind = "sigkill"
at_step = 8
[[faults]]
kind = "exit"
at_step = 12
rung = "m"
[[faults]]
kind = "torn_save"
at_step = 20
rung = "s"
"""
SLOW = PLAIN.replace("tokens_per_parameter = 0.2", "tokens_per_parameter = 20")
ONE_RUNG = PLAIN.replace(RUNGS, RUNGS[: RUNGS.index("[[rungs]]", 1)])
WILD = '[[arms]]\nname = "wild"\nset = { optim.learning_rate = 1e30 }\n'


@pytest.fixture(scope="module")
def backend() -> Local:
    return Local()


def plan(home: Path, *parts: str, name: str = "ladder") -> Ladder:
    return load.load(write(home, "".join(parts), name))


@pytest.fixture(scope="module")
def reference(home, backend) -> tuple[Ladder, Path, LadderStatus]:
    """A ladder without faults, and where its runs are."""
    ladder = plan(home, PLAIN, ARM, name="reference")
    out = home / "ladders" / "reference"
    return ladder, pool_of(out), run.run(ladder, out, backend=backend)


def timed(out: Path) -> Path:
    """The folder of a ladder that a call before has timed: no run is tried first."""
    speed.save(Speed({1: 1e-9}, {}), out)
    return out


def final_runs(ladder: Ladder, pool: Path) -> list[PlannedRun]:
    return tuning.final(ladder, tuning.choices(ladder, pool))


def run_results(ladder: Ladder, pool: Path) -> list[RunResult]:
    return collect.run_results(collect.collect_runs(ladder, pool, final_runs(ladder, pool)))


def hashed_results(ladder: Ladder, pool: Path) -> list[tuple[RunResult, str | None]]:
    """Results without their times, with the hash of the weights."""
    known = collect.collect_runs(ladder, pool, ladder.runs)
    hashes = {(collected.arm, collected.rung, collected.seed): collected.weights_sha256 for collected in known}
    return [
        (dataclasses.replace(result, seconds=None), hashes[result.arm, result.rung, result.seed])
        for result in run_results(ladder, pool)
    ]


def test_the_api_resumes_a_ladder_and_gives_its_runs_and_verdicts_as_records(reference):
    ladder, _, done = reference
    opened = api.open_ladder(ladder.path, ladder.path.parent / "ladders" / "reference")
    assert [row["status"] for row in opened.run().runs()] == ["finished"] * len(done.runs)
    report = opened.report()
    assert {row["arm"] for row in report.verdicts()} <= {AA, "no qk-norm"}
    assert report.tree == json.loads((opened.out / "report.json").read_text())
    with pytest.raises(ConfigError):
        api.open_ladder("no-such-ladder")


def test_every_run_finishes_and_is_what_the_plain_command_makes_of_its_config(reference, home):
    ladder, pool, done = reference
    assert done.exit_status == EXIT_FINISHED
    assert [run.arm for run in done.runs] == [BASELINE, AA, "no qk-norm"] * 2
    planned = ladder.runs[1]
    stored = StoredRun(pool / planned.key)
    trainer("train", stored.config, "--run", home / "plain")
    made, plain = summarise_run(stored.run), summarise_run(home / "plain")
    for key in ("weights_sha256", "state_sha256", "train", "eval", "fingerprint"):
        assert made[key] == plain[key], key
    assert made["weights_sha256"] is not None


def test_results_are_what_the_logs_say(reference):
    ladder, pool, _ = reference
    results = run_results(ladder, pool)
    assert len(results) == len(ladder.runs)
    for result, planned in zip(results, ladder.runs, strict=True):
        run_summary = summarise_run(StoredRun(pool / planned.key).run)
        assert (result.arm, result.rung, result.seed) == (planned.arm, planned.rung, planned.seed)
        assert [planned.config.budget.steps, result.loss] == run_summary["eval"]["val"][-1][:2]
        assert result.tokens == run_summary["tokens"]
        assert result.seconds is not None
        assert 0 < result.seconds < run_summary["goodput"]["wall_seconds"]
    first = {result.arm: result.loss for result in results if result.rung == "s"}
    assert len(set(first.values())) == 3  # also of the A/A arm, whose weights are another draw


def test_an_ensemble_is_scored_when_its_members_have_finished_and_its_members_are_runs_like_others(
    home, backend, monkeypatch
):
    ladder = plan(home, ONE_RUNG, '[[arms]]\nname = "two"\nensemble = 2\n', name="ensemble")
    out = timed(home / "ladders" / "ensemble")
    pool = pool_of(out)
    assert collect.collect_runs(ladder, pool, ladder.runs)[-1].status == "waiting"
    done = run.run(ladder, out, backend=backend)
    assert (done.exit_status, len(done.distinct)) == (EXIT_FINISHED, 2), "the baseline and A/A are its members"
    base, aa, two = collect.collect_runs(ladder, pool, ladder.runs)
    tree = ensemble.describe([StoredRun(pool / member.key).run for member in ladder.runs[-1].members])
    assert (two.status, two.loss, two.digest) == ("finished", tree["ensemble"]["val"]["loss"], base.digest)
    assert base.loss is not None and aa.loss is not None and two.loss is not None
    assert two.loss < (base.loss + aa.loss) / 2
    assert two.flops == base.flops + aa.flops == tree["training_flops"]
    assert two.undisturbed_seconds == sum(run.undisturbed_seconds or 0.0 for run in (base, aa))
    shown = report.build_report(report.collect_ladder(ladder, out))
    assert (shown["flops"], shown["counts"]) == (two.flops, {"finished": 2}), "each member counts once"
    score = ensembles.path_of(pool, ladder.runs[-1])
    before = score.stat().st_mtime_ns
    run.run(ladder, out, backend=backend)
    assert score.stat().st_mtime_ns == before, "it is not scored again"
    copied = shutil.copytree(pool, home / "unscored")
    ensembles.path_of(copied, ladder.runs[-1]).unlink()
    (newest, *_) = checkpoint.committed(StoredRun(copied / ladder.runs[0].key).run)
    os.truncate(next(newest.path.glob("*.distcp")), 100)
    monkeypatch.setattr(ensembles.subprocess, "run", score_here)
    with pytest.raises(TopropeError, match=r"could not be scored: .* holds other weights than its log ended with\.\n"):
        ensembles.score(copied, ladder.runs)


def score_here(command: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
    """The process that scores, in this one: importing torch anew takes seconds."""
    assert command[1:] == ["-m", "trainer.ladder.ensembles"]
    with mock.patch.object(sys, "stdin", io.StringIO(input)), pytest.raises(SystemExit) as left:
        ensembles.main()
    return subprocess.CompletedProcess(command, 1, "", f"{left.value}\n")


@pytest.mark.slow
def test_a_taught_run_begins_when_its_teachers_have_finished_and_learns_from_their_weights(home, backend):
    ladder = plan(home, ONE_RUNG, '[[arms]]\nname = "taught"\ndistil = 2\n', name="taught")
    out = timed(home / "ladders" / "taught")
    pool = pool_of(out)
    done = run.run(ladder, out, backend=backend)
    assert (done.exit_status, len(done.distinct)) == (EXIT_FINISHED, 3)
    base, aa, taught = collect.collect_runs(ladder, pool, ladder.runs)
    *teachers, student = ladder.runs[-1].members
    made = rundir.config_of(StoredRun(pool / student.key).run).distil
    expected = [summarise_run(StoredRun(pool / teacher.key).run)["weights_sha256"] for teacher in teachers]
    assert [*made.weights_sha256] == expected and [Path(one).parent.name for one in made.runs] == [base.key, aa.key]
    began = min(entry.time for entry in events.read(StoredRun(pool / student.key).run))
    ended = [max(entry.time for entry in events.read(StoredRun(pool / one.key).run)) for one in teachers]
    assert began > max(ended)
    assert taught.status == "finished" and taught.loss not in (None, base.loss)
    assert taught.digest == base.digest and taught.flops == ladder.runs[-1].flops
    shown = report.build_report(report.collect_ladder(ladder, out))
    assert (shown["flops"], shown["counts"]) == (taught.flops, {"finished": 3}), "each run counts once"
    assert run.run(ladder, out, backend=backend).started == 0
    copied = shutil.copytree(pool, home / "anew")
    (log,) = events.events_directory(StoredRun(copied / base.key).run).glob("*.jsonl")
    log.write_text(log.read_text().replace(expected[0], "0" * 64))
    *_, again = collect.collect_runs(ladder, copied, ladder.runs)
    assert again.status == "missing" and "learnt from other weights than its teachers" in again.reason


def test_a_run_that_was_scored_on_another_text_is_missing_and_says_why(reference, home):
    ladder, pool, _ = reference
    copied = home / "rescored" / "pool"
    shutil.copytree(pool, copied)
    (log,) = events.events_directory(StoredRun(copied / ladder.runs[2].key).run).glob("*.jsonl")
    digest = collect.collect_runs(ladder, copied, ladder.runs)[2].digest
    assert digest is not None
    log.write_text(log.read_text().replace(digest, "f" * 64))
    found = collect.collect_runs(ladder, copied, ladder.runs)
    assert [collected.status for collected in found] == ["finished"] * 2 + ["missing"] + ["finished"] * 3
    assert "scored on another text" in found[2].reason
    assert len(run_results(ladder, copied)) == 5


def test_a_run_whose_bits_per_byte_are_unknown_is_missing_in_a_ladder_of_bits_and_says_why(reference, home):
    ladder, pool, _ = reference
    copied = home / "unknown" / "pool"
    planned = ladder.runs[0]
    shutil.copytree(pool / planned.key, copied / planned.key)
    (log,) = events.events_directory(StoredRun(copied / planned.key).run).glob("*.jsonl")
    assert collect.collect_run(planned, copied, "val", "bits_per_byte").loss is not None
    log.write_text(re.sub(r'"bits_per_byte": [0-9.]+', '"bits_per_byte": null', log.read_text()))
    found = collect.collect_run(planned, copied, "val", "bits_per_byte")
    assert found.status == "missing" and found.loss is None
    assert "stand for no text" in found.reason
    assert collect.collect_run(planned, copied, "val", "nats_per_token").status == "finished"


def test_a_second_held_out_set_is_read_from_the_runs_and_a_score_on_other_text_is_none(reference, home):
    ladder, pool, _ = reference
    copied = home / "task" / "pool"
    for number, planned in enumerate(ladder.runs):
        shutil.copytree(pool / planned.key, copied / planned.key)
        (log,) = events.events_directory(StoredRun(copied / planned.key).run).glob("*.jsonl")
        digest = collect.collect_run(planned, pool, "val", "nats_per_token").digest or ""
        lines = log.read_text().splitlines()
        scores = [line.replace('"val"', '"task"') for line in lines if '"event": "eval"' in line]
        scores = [score.replace(digest, "f" * 64) if number == 2 else score for score in scores]
        log.write_text("\n".join([*lines, *scores]) + "\n")
    asked = dataclasses.replace(ladder, file=ladder.file.model_copy(update={"downstream": "task"}))
    found = collect.collect_runs(asked, copied, ladder.runs)
    assert [run.downstream for run in found] == [None if n == 2 else run.loss for n, run in enumerate(found)]
    assert all(run.loss is not None for run in found)
    assert all(run.downstream is None for run in collect.collect_runs(ladder, copied, ladder.runs)), "not asked for"
    three = ladder.runs[1:4]
    for planned in (
        three[0],
        three[2],
    ):  # most are of another text: their score neither counts nor outvotes the third's
        about = rundir.config_path(StoredRun(copied / planned.key).run)
        about.write_text(json.dumps(json.loads(about.read_text()) | {"data_sha256": "e" * 64}))
    after = collect.collect_runs(asked, copied, three)
    assert [run.status for run in after] == ["missing", "finished", "missing"]
    assert [run.downstream for run in after] == [None, after[1].loss, None]


def test_a_run_without_a_code_length_is_missing_in_a_ladder_of_it_and_says_why(reference, home):
    ladder, pool, _ = reference
    copied = home / "no code" / "pool"
    planned = ladder.runs[0]
    shutil.copytree(pool / planned.key, copied / planned.key)
    (log,) = events.events_directory(StoredRun(copied / planned.key).run).glob("*.jsonl")
    whole = log.read_text()
    for epoch, why in ((10, "reads text again after step 10"), (0, "more than an epoch"), ("null", "older toprope")):
        log.write_text(re.sub(r'"first_epoch_steps": [0-9]+', f'"first_epoch_steps": {epoch}', whole))
        found = collect.collect_run(planned, copied, "code_length", "nats_per_token")
        assert (found.status, found.loss) == ("missing", None)
        assert why in found.reason


def test_a_finished_run_is_never_run_again_and_two_ladders_share_it(reference, home, backend):
    ladder, pool, _ = reference
    again = run.run(ladder, home / "ladders" / "reference", backend=backend)
    assert (again.started, again.exit_status) == (0, EXIT_FINISHED)
    wider = plan(home, PLAIN, ARM, WILD, name="wider")
    done = run.run(wider, home / "ladders" / "wider", backend=backend)
    assert done.started == 2  # both rungs of the new arm, each given up at once: it would only fail again
    assert done.exit_status == EXIT_FAILED
    assert set(done.missing) == {"s wild seed 0", "m wild seed 0"}
    assert all("not finite" in why for why in done.missing.values())
    assert hashed_results(ladder, pool) == [pair for pair in hashed_results(wider, pool) if pair[0].arm != "wild"]
    wild = [result for result in run_results(wider, pool) if result.arm == "wild"]
    assert [result.loss != result.loss for result in wild] == [True, True]
    assert [result.seconds for result in wild] == [None, None]


def test_small_rungs_can_be_run_alone_and_the_rest_later(reference, home, backend):
    ladder, _, _ = reference
    out = home / "parts" / "reference"
    refused = verb("run", ladder.path, "--out", out, "--up-to", "l").exception
    assert isinstance(refused, ConfigError)
    assert "there is no rung 'l'" in str(refused)
    assert not out.exists()
    part = run.run(ladder, timed(out), up_to="s", backend=backend)
    assert (part.started, part.exit_status) == (3, EXIT_FINISHED)
    assert (run.read_status(ladder, out).count("finished"), run.read_status(ladder, out).count("waiting")) == (3, 3)
    record = preregistration.read(out)
    assert record is not None and len(record.runs) == 6  # what is planned is the whole
    whole = run.run(ladder, out, backend=backend)
    assert (whole.started, whole.exit_status) == (3, EXIT_FINISHED)
    assert hashed_results(ladder, pool_of(out)) == hashed_results(*reference[:2])


def test_a_storm_leaves_every_run_with_the_bits_of_the_undisturbed_ladder(reference, home, backend):
    ladder, pool, _ = reference
    storm = plan(home, PLAIN, ARM, STORM, name="storm")
    out = timed(home / "stormy" / "storm")
    done = run.run(storm, out, backend=backend)
    assert done.exit_status == EXIT_FINISHED, done.missing
    assert hashed_results(storm, pool_of(out)) == hashed_results(ladder, pool)
    stormy, quiet = reported(storm, out), reported(ladder, home / "ladders" / "reference")
    assert {key for key in quiet if stormy[key] != quiet[key]} == {"name", "file"}
    storm_runs = collect.collect_runs(storm, pool_of(out), storm.runs)
    assert [sorted({fault["kind"] for fault in collected.faults}) for collected in storm_runs] == [
        ["sigkill", "torn_save"] if collected.rung == "s" else ["exit", "sigkill"] for collected in storm_runs
    ]
    assert all(collected.attempts > 1 and collected.replayed > 0 for collected in storm_runs)
    lengths = [
        [collect.collect_run(planned, at, "code_length", "bits_per_byte").loss for planned in of.runs]
        for of, at in ((storm, pool_of(out)), (ladder, pool))
    ]
    assert lengths[0] == lengths[1] and None not in lengths[0]
    incidents = [
        incident["kind"] for incident in summarise_run(StoredRun(pool_of(out) / storm.runs[0].key).run)["incidents"]
    ]
    assert "worker_lost" in incidents  # the run's own log says why it was started again


def test_a_ladder_killed_at_random_five_times_gives_the_report_of_one_that_was_not_byte_for_byte(
    reference, home, backend
):
    ladder = plan(home, PLAIN, ARM, '[[rungs]]\nname = "l"\nwidth = 32\nn_layers = 1\n', name="three")
    whole = home / "ladders" / "three"  # beside the reference ladder, which has two of its rungs
    assert run.run(ladder, whole, backend=backend).started == 3
    assert reported(ladder, whole)["fit"] is not None
    out, rng = timed(home / "killed" / "three"), random.Random(1)
    killed = pool_of(out)
    for _ in range(5):
        # So many events later: by then a few steps are made, a save is half written, or another run has begun.
        deadly = events_of(killed) + rng.randint(1, 25)
        scheduler = start(command(ladder.path, out), home / "killed.txt")
        assert wait_until(lambda: events_of(killed) >= deadly, 30)  # noqa: B023
        scheduler.kill()
        scheduler.wait()
    assert run.read_status(ladder, out).count("finished") < len(ladder.runs)
    done = run.run(ladder, out, backend=backend)
    assert done.exit_status == EXIT_FINISHED, done.missing
    assert hashed_results(ladder, killed) == hashed_results(ladder, pool_of(whole))
    assert json.dumps(reported(ladder, out)) == json.dumps(reported(ladder, whole))
    assert sum(collected.attempts for collected in collect.collect_runs(ladder, killed, ladder.runs)) > len(ladder.runs)


def reported(ladder: Ladder, out: Path) -> dict[str, Any]:
    """The part of the report that is the same for every execution of the ladder."""
    return report.without_execution(report.build_report(report.collect_ladder(ladder, out)))


def test_the_report_of_a_real_ladder_lies_beside_its_record_and_knows_its_runs(reference, home):
    ladder, _, _ = reference
    out = home / "ladders" / "reference"
    done = verb("report", ladder.path, "--out", out)
    assert done.exit_code == EXIT_FINISHED, done.output
    assert "2 rungs, and a curve of 3 parameters needs 3" in " ".join(done.output.split())
    tree = json.loads((out / "report.json").read_text())
    assert report.without_execution(tree) == reported(ladder, out)
    assert tree["counts"] == {"finished": 6}
    assert (len(tree["noise"]), len(tree["differences"])) == (6, 4)
    assert [row["attempts"] for row in tree["course"]["runs"]] == [1] * 6
    assert tree["course"]["criterion_history"][0]["finished_runs"] == 0
    assert str(home) not in (out / "report.html").read_text()
    assert (out / "loss.png").exists()
    assert not (out / "wandb").exists()  # as its runs are not in W&B either


def test_asked_to_stop_it_saves_every_run_leaves_no_process_and_says_how_to_resume(home, backend):
    path = write(home, SLOW, "slow")
    out, screen = timed(home / "stopped" / "slow"), home / "stopped.txt"
    process = start(command(path, out), screen)
    pool = pool_of(out)
    assert wait_until(lambda: events_of(pool, 'step"') > 20, 60)
    ladder = load.load(path)
    with pytest.raises(RunDirectoryError, match="is in use by another `ladder run`"):
        run.run(ladder, out, backend=backend)
    process.send_signal(signal.SIGINT)
    status, said = process.wait(60), screen.read_text()
    assert status == EXIT_PREEMPTED, said
    assert f"Continue with: python -m trainer ladder run {path} --out {out}" in " ".join(said.split())
    states = run.read_status(ladder, out)
    assert [states.state(planned).status for planned in ladder.runs[:2]] == ["stopped", "stopped"]
    for planned in ladder.runs[:2]:
        run_summary = summarise_run(StoredRun(pool / planned.key).run)
        assert (run_summary["status"], run_summary["checkpoints"][-1]["step"]) == ("preempted", run_summary["step"])


def test_a_run_that_cannot_start_is_given_up_with_its_reason_and_tried_once_more_by_the_next_call(home, backend):
    ladder = plan(home, PLAIN.replace("slots = 2", "slots = 2\nset = { seed = 3 }"), name="broken")

    def breaking(task: Task) -> Process:
        if AA in task.name:
            task.stored.config.write_text("this is no TOML")
        return backend(task)

    out = timed(home / "broken" / "broken")
    done = run.run(ladder, out, backend=breaking)
    assert done.exit_status == EXIT_FAILED
    assert set(done.missing) == {"s A/A seed 0", "m A/A seed 0"}
    assert all("is not valid TOML" in why for why in done.missing.values())
    assert (done.count("finished"), done.started) == (2, 4)
    assert [collected.arm for collected in run_results(ladder, pool_of(out))] == [BASELINE, BASELINE]
    repaired = run.run(ladder, out, backend=backend)
    assert (repaired.exit_status, repaired.started) == (EXIT_FINISHED, 2)


def test_a_run_that_dies_again_and_again_without_coming_further_is_given_up(home, backend):
    """Each start dies before the first checkpoint, and no fault of the plan explains it."""
    text = ONE_RUNG.replace("[0]", "[4]\naa = false\nrestarts = 2")

    def deadly(task: Task) -> Process:
        process = backend(task)
        process.kill()
        return process

    done = run.run(plan(home, text, name="deadly"), timed(home / "deadly" / "deadly"), backend=deadly)
    (why,) = done.missing.values()
    assert why.startswith("It was ended by SIGKILL, 3 times in a row without progress.")
    assert done.started == 3


def test_a_sweep_decides_the_rate_of_the_runs_that_follow_and_an_edge_is_reported(home, backend):
    text = PLAIN.replace("[0]", "[0]\naa = false")
    ladder = plan(home, text, "[tuning]\nrates = [0.001, 0.3, 1.0]\nseed = 9\n", name="tuned")
    out = timed(home / "tuned" / "tuned")
    assert final_runs(ladder, pool_of(out)) == []
    done = run.run(ladder, out, backend=backend)
    assert done.exit_status == EXIT_FINISHED
    assert len(done.runs) == 2 * (3 + 1)
    for choice in tuning.choices(ladder, pool_of(out)):
        losses = {float(rate): loss for rate, loss in choice.losses.items() if loss is not None}
        assert len(losses) == 3
        assert choice.rate is not None
        assert choice.rate == min(losses, key=lambda rate: losses[rate])
        assert choice.at_edge == (choice.rate != 0.3)
        (final,) = [made for made in final_runs(ladder, pool_of(out)) if made.rung == choice.rung]
        assert final.config.optim.learning_rate == pytest.approx(1e-2 * choice.rate)
        assert choice.flops == pytest.approx(3 * final.flops)
    assert len(run_results(ladder, pool_of(out))) == 2


def test_runs_of_two_ranks_are_torchrun_s_and_end_with_the_same_bits(reference, home, backend):
    _, pool, _ = reference
    small = ONE_RUNG.replace("slots = 2", "slots = 1\nranks = 2\naa = false")
    fault = '[[faults]]\nkind = "sigkill"\nrank = 1\nat_step = 8\n'
    ladder = plan(home, small, fault, name="pairs")
    out = timed(home / "pairs" / "pairs")
    done = run.run(ladder, out, backend=backend)
    assert done.exit_status == EXIT_FINISHED, done.missing
    (collected,) = collect.collect_runs(ladder, pool_of(out), ladder.runs)
    assert collected.key == next(iter(reference[0].runs)).key
    assert collected.weights_sha256 == summarise_run(pool / collected.key / "run")["weights_sha256"]
    assert (collected.machine or ("", "", 0))[2] == 2


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Any:
    """Pretend a machine with GPUs of 80 GiB, of which so many are free on each, and with so many cores."""

    def pretend(*free: float, cores: int = 16, total: float = 80) -> None:
        lines = "".join(f"{n}, GPU-{n}{n}aa-bb, {total * 1024:.0f}, {gib * 1024:.0f}\n" for n, gib in enumerate(free))
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{lines}END\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr("torch.cuda.device_count", lambda: len(free))
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)

    return pretend


@pytest.fixture
def needs(monkeypatch) -> Any:
    """Pretend that a run of each rung takes so many GiB of each of its GPUs."""

    def pretend(**gib: float | None) -> None:
        def needed(config: Any, ranks: int) -> int | None:
            found = gib["s" if config.model.width == 16 else "m"]
            return None if found is None else int(found * 2**30)

        monkeypatch.setattr(slots, "_needed", needed)

    return pretend


ON_GPUS = PLAIN.replace("slots = 2\n", ""), "[set]\nparallel.device = 'auto'\n"


def test_gpus_whose_memory_is_unknown_are_shared_out_among_slots_and_each_run_sees_its_own(home, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    monkeypatch.setattr(gpus, "_listed", list)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ladder = plan(home, PLAIN.replace("slots = 2", "ranks = 2"), ON_GPUS[1], name="gpus")

    def devices() -> list[str]:
        found = slots.of(ladder)
        return [found.devices(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(found.count)]

    assert devices() == ["0,1", "2,3"]  # of two GPUs each; the fifth is left over
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,3,1,0")
    assert devices() == ["7,6", "3,1"]
    tasks: list[Task] = []
    speed.probe(ladder, slots.of(ladder), lambda task: tasks.append(task) or mock.Mock(wait=lambda: 0))
    assert [task.environment["CUDA_VISIBLE_DEVICES"] for task in tasks] == ["7,6", "3,1"] * 2
    alone = plan(home, PLAIN.replace("slots = 2", ""), "[set]\nparallel.device = 'cpu'\n", name="cores")
    assert slots.of(alone).devices(1) == {}


def test_a_baseline_with_islands_is_timed_in_rounds_that_are_as_short_as_the_probe(home):
    """A whole round would take too long, and a round that is longer than the run is refused."""
    more = "[set]\nislands.count = 2\nislands.inner_steps = 8\nislands.overlap_steps = 7\n"
    ladder, timed = plan(home, PLAIN, more, name="islands"), list[configs.Config]()

    def start(task: Task) -> Any:
        timed.append(configs.load(task.stored.config, ()))
        return mock.Mock(wait=lambda: 0)

    speed.probe(ladder, slots.of(ladder), start)
    assert {(config.islands.count, config.islands.inner_steps) for config in timed} == {(2, speed.PROBE_STEPS)}


def test_small_runs_share_a_gpu_as_its_free_memory_allows_and_large_ones_have_room_kept(home, machine, needs):
    ladder = plan(home, *ON_GPUS, name="shared")
    small, large = (next(planned for planned in ladder.runs if planned.rung == rung) for rung in "sm")
    machine(80, 30)
    needs(s=20, m=50)
    found = slots.of(ladder)
    assert found.all_for(small) == [0, 1, 2, 4, 6] and found.all_for(large) == [0, 1]
    assert [found.devices(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1, 2)] == ["0", "1", "0"]
    assert found.free_for(small, {}) == 0 and found.free_for(small, {0: small}) == 1  # the emptiest GPU first
    assert found.free_for(small, {0: small, 1: small}) == 2
    assert found.free_for(large, {0: small, 1: small}) == 2  # 70 of 80 GiB
    assert found.free_for(large, {0: small, 1: small, 2: small}) is None  # it waits
    assert found.free_for(small, {0: large, 1: small}) == 2 and found.free_for(large, {0: large, 1: small}) is None
    assert found.free_for(large, {0: large}) == 1  # alone it is tried in any case


@pytest.mark.parametrize(
    ("gib", "cores", "count"),
    [(10, 16, 8), (10, 3, 3), (1, 16, 16), (None, 16, 1)],
    ids=["memory", "a core feeds each run", "small runs", "a model that cannot be traced"],
)
def test_memory_and_cores_say_how_many_runs_share_one_gpu(home, machine, needs, gib, cores, count):
    machine(80, cores=cores)
    needs(s=gib, m=gib)
    assert slots.of(plan(home, *ON_GPUS, name="one")).count == count


def test_a_file_s_slots_are_taken_as_they_are_and_spread_over_the_gpus(home, machine, needs):
    machine(80, 80)
    needs(s=70, m=70)
    ladder = plan(home, PLAIN.replace("slots = 2", "slots = 4"), ON_GPUS[1], name="fixed")
    found = slots.of(ladder)
    assert (found.count, found.by_memory, found.all_for(ladder.runs[0])) == (4, False, [0, 1, 2, 3])
    assert [found.devices(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["0", "1", "0", "1"]


def test_a_run_of_several_ranks_takes_as_many_gpus_and_the_one_with_least_memory_counts(home, machine, needs):
    machine(80, 20, 80, 80, cores=32)
    needs(s=15, m=15)
    text = PLAIN.replace("slots = 2", "ranks = 2")
    ladder = plan(home, text, ON_GPUS[1], name="groups")
    found = slots.of(ladder)
    assert found.all_for(ladder.runs[0]) == [0, 1, 3, 5, 7, 9]
    assert [found.devices(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["0,1", "2,3"]


def test_gpus_are_found_by_number_or_uuid_and_those_of_two_kinds_by_the_smallest(machine, monkeypatch):
    machine(70, 50)
    assert [(gpu.name, gpu.free) for gpu in gpus.visible(2)] == [("0", 70 * 2**30), ("1", 50 * 2**30)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-11aa,MIG-5,1")
    assert [gpu.free for gpu in gpus.visible(3)] == [50 * 2**30, None, 50 * 2**30]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    two_kinds = [("0", "GPU-a", 80, 70), ("1", "GPU-b", 40, 30)]
    monkeypatch.setattr(gpus, "_listed", lambda: two_kinds)
    assert [gpu.free for gpu in gpus.visible(2)] == [30, 30]  # CUDA may number them the other way round
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert [gpu.free for gpu in gpus.visible(2)] == [70, 30]


def test_without_a_driver_or_with_fields_that_it_does_not_know_memory_is_unknown(machine, tmp_path):
    machine(80)
    for script in ("echo failed; exit 9", "echo '0, GPU-a, [N/A], [N/A]'", "echo No devices were found"):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        assert [gpu.free for gpu in gpus.visible(1)] == [None]


def test_the_memory_that_a_run_needs_is_its_dry_run_s_with_room_for_what_that_does_not_count(home, machine):
    from trainer import costs

    machine(80)
    ladder = plan(home, *ON_GPUS, '[[arms]]\nname = "taught"\ndistil = 2\n', name="needs")
    planned = ladder.runs[0]
    told = costs.memory_per_rank(planned.config, sizes.vocab_of(planned.config.data, planned.config.eval, 0), 1)
    places = slots.of(ladder)
    needed = places.needed(planned)
    assert needed is not None and needed == slots.CONTEXT_BYTES + int(slots.TEMPORARIES * told["total"])
    *_, student = next(run for run in ladder.runs if run.arm == "taught" and run.rung == planned.rung).members
    assert places.needed(student) == needed + int(slots.TEMPORARIES * 2 * 4 * planned.parameters)


def test_a_ladder_fills_the_gpus_starts_no_run_that_has_no_room_and_finishes(home, machine, needs):
    """Pretended runs: two of the smallest fit on a GPU beside one another, and nothing beside one of the largest."""
    machine(60, 60)
    needs(s=20, m=50)
    ladder = plan(home, *ON_GPUS, ARM, name="filled")
    running: list[tuple[str, str]] = []
    beside: list[int] = []

    def start(task: Task) -> Any:
        gpu, rung = task.environment["CUDA_VISIBLE_DEVICES"], "s" if f"{ladder.name} s " in task.name else "m"
        running.append(place := (gpu, rung))
        there = [other for its_gpu, other in running if its_gpu == gpu]
        beside.append(len(there))
        assert sum({"s": 20, "m": 50}[other] for other in there) <= 60
        polls = iter(range(3))

        def poll() -> int | None:
            if next(polls, None) is not None:
                return None
            if not task.stored.has_finished():
                running.remove(place)
                write_end(task.stored)
            return 0

        return mock.Mock(poll=poll)

    out = timed(home / "filled" / "filled")
    done = run.run(ladder, out, backend=start)
    assert done.exit_status == EXIT_FINISHED, done.missing
    assert len(beside) == 6 and max(beside) == 2 and running == []


def write_end(stored: StoredRun) -> None:
    """Have a run finished by its log."""
    log = events.events_directory(stored.run) / "attempt-0000-rank-00000.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text(json.dumps({"event": "attempt_ended", "status": "finished"}) + "\n")


def test_an_edited_file_is_reported_and_a_criterion_changed_after_the_fact_is_recorded(reference, home):
    ladder, _, _ = reference
    out = home / "ladders" / "reference"
    assert preregistration.compare(ladder, out).lines == []
    text = (home / "reference.toml").read_text().replace('name = "m"\nwidth = 24', 'name = "m"\nwidth = 48')
    elsewhere = home / "edited"
    elsewhere.mkdir()
    (elsewhere / "tiny.toml").write_text((home / "tiny.toml").read_text())
    changed = load.load(write(elsewhere, text + "[criterion]\nmin_gain = 1.1\n", "reference"))
    edits = preregistration.compare(changed, out)
    assert edits.lines == ["criterion.min_gain: 1.02 → 1.1", "rungs.m.width: 24 → 48"]
    assert (edits.kept, edits.dropped) == (3, 3)
    assert "3 finished runs are kept, 3 finished runs are no longer wanted" in str(edits)
    preregistration.write(changed, out)
    record = preregistration.read(out)
    history = record.criterion_history if record else []
    assert [entry["criterion"]["min_gain"] for entry in history] == [1.02, 1.1]
    assert [entry["finished_runs"] for entry in history] == [0, 6]
    preregistration.write(ladder, out)
    with pytest.raises(RunDirectoryError, match="belongs to ladder 'reference'"):
        preregistration.compare(plan(home, PLAIN, name="other"), out)


def test_a_run_on_another_text_than_the_source_holds_now_is_missing_with_the_reason(reference, tmp_path):
    ladder, pool, _ = reference
    copy = shutil.copytree(pool, tmp_path / "pool")
    other = ladder.runs[0]
    about = copy / other.key / "run" / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"data_sha256": "e" * 64}))
    found = collect.collect_runs(ladder, copy, ladder.runs)
    assert [result.status for result in found] == ["missing"] + ["finished"] * (len(found) - 1)
    assert f"trained on another text than {other.config.data.source!r} holds now" in found[0].reason


def test_a_ladder_finds_its_runs_where_its_text_lies_elsewhere_and_not_where_that_is_another(reference, home, tmp_path):
    before, pool, _ = reference
    corpus, out = shutil.copytree(home / "corpus", tmp_path / "corpus"), pool.parent / "moved"
    moved = plan(home, PLAIN, ARM, f'[set]\ndata.source = "{corpus}/*.txt"\n', name="moved")
    assert not {planned.key for planned in moved.runs} & {planned.key for planned in before.runs}
    assert {run.read_status(moved, out).state(made).status for made in moved.runs} == {"finished"}
    assert run_results(moved, pool) == run_results(before, pool)
    preregistration.write(moved, out)
    record = preregistration.read(out)
    assert record is not None and record.runs.keys() == {planned.key for planned in before.runs}
    text = corpus / "07.txt"
    text.write_text(text.read_text().replace("document", "dokument"))
    assert {run.read_status(moved, out).state(made).status for made in moved.runs} == {"waiting"}


def test_a_run_is_found_by_the_content_of_the_sets_that_it_was_scored_on(reference, home, tmp_path):
    before, pool, _ = reference

    def scored_on(name: str) -> PlannedRun:
        """The first run, scored on a set of its own too."""
        (tmp_path / name).write_text(f"{name[:1]} held-out text, " * 40)
        scored = before.runs[0].config.eval.model_copy(
            update={"sets": ("val", "own"), "sources": {"own": str(tmp_path / name)}}
        )
        changed = before.runs[0].config.model_copy(update={"eval": scored})
        return dataclasses.replace(before.runs[0], config=changed)

    planned = scored_on("a.txt")
    made = StoredRun(shutil.copytree(pool / before.runs[0].key, tmp_path / "pool" / planned.key))
    about = made.run / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"config": planned.config.model_dump(mode="json")}))
    tokens = prepare(planned.config.data, planned.config.eval, 16).eval_sets["own"].tokens
    digest = EvalWindows(tokens, context=16, sequences=2, max_tokens=512).digest
    (log,) = events.events_directory(made.run).glob("*.jsonl")
    (score,) = [json.loads(line) for line in log.read_text().splitlines() if '"event": "eval"' in line]
    log.write_text(log.read_text() + json.dumps(score | {"set": "own", "digest": digest}) + "\n")
    for name, key in (("a copy.txt", planned.key), ("b.txt", None)):
        other = scored_on(name)
        assert stored(tmp_path / "pool", other).directory.name == (key or other.key)
    # Resumed, an unfinished run would have the new place in its config.json, and be lost under its key.
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"status": "finished"' not in line))
    other = scored_on("a copy.txt")
    assert stored(tmp_path / "pool", other).directory.name == other.key


def test_runs_by_other_code_are_made_anew_and_the_functions_that_changed_are_named(reference, home, monkeypatch):
    before, pool, _ = reference
    code = {file: dict(parts) for file, parts in provenance.code().items()}
    code["model.py"]["MLP.forward"] = "0" * 16
    monkeypatch.setattr(provenance, "code", lambda: code)
    ladder = plan(home, PLAIN, ARM, name="reference")
    assert not {run.key for run in ladder.runs} & {run.key for run in before.runs}
    assert {run.read_status(ladder, pool.parent / "reference").state(made).status for made in ladder.runs} == {
        "waiting"
    }
    edits = preregistration.compare(ladder, pool.parent / "reference")
    assert (edits.lines, edits.kept, edits.dropped) == (["code: model.py: MLP.forward"], 0, 6)


def test_runs_that_were_made_before_code_was_recorded_keep_their_keys_while_it_is_the_same(home, monkeypatch):
    monkeypatch.setattr(provenance, "CODE_BEFORE_RECORDS", provenance.code_digest())
    planned = plan(home, PLAIN, name="older").runs[0]
    scored = json.dumps(configs.flatten(planned.config.eval.model_dump(mode="json")), sort_keys=True)
    assert planned.key == hashlib.sha256(f"{configs.fingerprint(planned.config)} {scored}".encode()).hexdigest()[:16]


def test_a_plan_measures_a_few_steps_and_starts_nothing_else(home, backend, tmp_path):
    path = write(home, PLAIN + ARM, "planned")
    found = json.loads(verb("plan", path, "--out", tmp_path / "planned", "--json").stdout)
    assert (len(found["runs"]), found["measured"]) == (6, "6 steps of s and m, now")
    assert 0 < found["hours"] == pytest.approx(found["hours_left"])
    assert found["flops"] == pytest.approx(sum(row["flops"] for row in found["runs"]))
    assert not (tmp_path / "pool").exists()
    status = json.loads(verb("status", path, "--out", tmp_path / "planned", "--json").stdout)
    assert status["counts"] == {"finished": 0, "running": 0, "stopped": 0, "waiting": 6, "missing": 0}


def test_a_stop_while_the_baseline_is_tried_leaves_nothing_and_75(home, backend, tmp_path):
    path, screen = write(home, SLOW, "early"), tmp_path / "screen.txt"
    with tempfile.TemporaryDirectory(prefix="t") as short:
        variables = {"TMPDIR": short, "TOPROPE_CACHE": str(tmp_path / "cache")}
        process = start(command(path, tmp_path / "out" / "early"), screen, variables=variables)
        try:
            assert wait_until(lambda: any(Path(short).glob("toprope-probe-*/*/*")), 60)
            process.send_signal(signal.SIGTERM)
            status, said = process.wait(60), screen.read_text()
        finally:
            process.kill()
        assert status == EXIT_PREEMPTED, said
        assert "Continue with" in said
        assert list(Path(short).glob("toprope-probe-*")) == []
    assert not (tmp_path / "out" / "pool").exists()


@pytest.mark.parametrize("what", ["plan", "run"])
def test_a_baseline_that_fails_is_refused_before_any_run(home, backend, tmp_path, what):
    path = write(home, PLAIN + "[set]\noptim.learning_rate = 1e30\n", "hopeless")
    failed = verb(what, path, "--out", tmp_path / "hopeless").exception
    assert isinstance(failed, UsageError)
    assert "the baseline fails in its first 6 steps.\nNumericsError" in str(failed)
    assert not (tmp_path / "pool").exists()


def test_plan_and_status_show_a_person_sizes_and_a_matrix(reference, home, backend):
    shown = verb("plan", home / "reference.toml", "--out", home / "ladders" / "reference").stdout
    for part in ("no qk-norm", "16 × 1", "8.19k", "6 runs, 6 of them finished", "1.02× compute at"):
        assert part in shown, shown
    stands = verb("status", home / "reference.toml", "--out", home / "ladders" / "reference").stdout
    assert "100% of" in stands and "6 finished" in stands


def test_a_wrong_ladder_leaves_with_2_and_makes_nothing(home, tmp_path):
    path = write(home, PLAIN + '[[arms]]\nname = "nothing"\n', "wrong")
    refused = verb("run", path, "--out", tmp_path / "wrong").exception
    assert isinstance(refused, ConfigError)
    assert "arm 'nothing' changes nothing" in str(refused)
    assert list(tmp_path.iterdir()) == []


def test_time_left_is_that_of_the_runs_left_at_the_speed_measured(reference):
    ladder, _, _ = reference
    first, *rest = [planned for planned in ladder.runs if planned.rung == "s"]
    steps = first.config.budget.steps
    states = {first.key: RunState("finished", steps, "", 0.5, 2.0), rest[0].key: RunState("running", steps // 2)}
    status = LadderStatus([first, *rest], states, Slots(2))
    each = steps * 0.5 + 2.0
    left = (steps - steps // 2) * 0.5 + 2.0 + each
    assert status.seconds_left == pytest.approx(left / 2 if left / 2 > each else each)
    assert LadderStatus([first], {}, Slots(2)).seconds_left is None
    assert speed.measured([first], states).seconds(first) == pytest.approx(each)


def test_the_smallest_run_is_next_unless_a_long_one_would_then_be_alone_at_the_end():
    assert scheduling.next_of([1, 1, 1, 4, 4], [0, 0]) == 0
    assert scheduling.next_of([1, 1, 4, 4, 4], [0, 1]) == 2  # else two 4s end at 5, and the third alone at 9
    assert scheduling.next_of([3], [0, 9]) == 0


def test_earlier_measurements_are_kept_and_taken_at_the_pace_of_now(tmp_path):
    earlier = Speed({100: 1.0, 1000: 4.0}, {})
    assert Speed({100: 2.0}, {}).scale_earlier(earlier) == Speed({100: 2.0, 1000: 8.0}, {})
    assert Speed({}, {}).scale_earlier(earlier) == earlier
    speed.save(earlier, tmp_path)
    assert speed.load(tmp_path) == earlier


def test_a_spike_is_a_loss_far_above_those_before_it():
    quiet = [3.0 + 0.01 * (number % 5) for number in range(60)]
    assert collect.find_spikes(quiet) == []
    assert collect.find_spikes([*quiet[:50], 4.0, *quiet[50:]]) == [51]


# Helpers


def command(path: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "trainer", "ladder", "run", str(path), "--out", str(out)]


def verb(*arguments: str | Path) -> Any:
    """`python -m trainer ladder …` in this process."""
    return CliRunner().invoke(cli.app, ["ladder", *map(str, arguments)])


def events_of(pool: Path, kind: str = "") -> int:
    """Number of events, or of those of one kind, in the logs of a pool's runs."""
    return sum(path.read_text().count(f'"event": "{kind}') for path in pool.glob("*/run/events/*.jsonl"))
