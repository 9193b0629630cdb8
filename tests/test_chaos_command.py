"""Campaigns over jobs that are no toprope runs: what is known from outside is checked, the rest is not applicable."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, trainer
from trainer import tomlfile
from trainer.chaos import command, plan, results, run
from trainer.chaos.results import Report, Result
from trainer.errors import ConfigError, TopropeError
from trainer.faults import checker
from trainer.faults.checker import CLEAN, FIRED, NOT_ASKED, RECOVERED, STATUS
from trainer.faults.fault import KINDS
from trainer.launch.cluster import CommandCluster, torchrun_parts

JOB = ROOT / "tests" / "foreign_job.py"
PROGRESS = "[progress]\npattern = 'step (\\d+)'\nwithin_seconds = 30.0\n"
LINE = "[result]\nline = 'weights (\\w+)'\n"
KILL = '[[runs]]\nname = "kill"\nfaults = [{ kind = "sigkill", rank = 1, at_step = 10 }]\n'
INSIDE = {checker.SAMPLES, checker.KEPT, checker.DETECTED, checker.ATTRIBUTED, checker.TIME}

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find ranks")


def write(directory: Path, text: str, *options: str, settings: str = "") -> Path:
    path = directory / "campaign.toml"
    words = [sys.executable, str(JOB), "{run}", *options]
    path.write_text(f"command = {json.dumps(words)}\nranks = 2\n{settings}\n{text}", encoding="utf-8")
    return path


def campaign(directory: Path, text: str, *options: str, settings: str = "timeout_seconds = 60.0") -> Report:
    return run.run(plan.load(write(directory, text, *options, settings=settings)), directory / "out")


def answers(result: Result) -> dict[str, str]:
    return {answer.invariant: answer.answer for answer in result.answers}


def problems(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        plan.load(path)
    return str(caught.value)


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A job that resumes where it was, under several faults."""
    faults = """
[[runs]]
name = "launcher dies"
faults = [{ kind = "agent_killed", at_step = 10 }]

[[runs]]
name = "checkpoint gone"
faults = [{ kind = "missing_shard", rank = 0, at_step = 10 }]

[[runs]]
name = "after seconds"
faults = [{ kind = "sigsegv", rank = 0, at_seconds = 0.5 }]

[[runs]]
name = "too late"
faults = [{ kind = "sigkill", rank = 0, at_step = 1000 }]

[[runs]]
name = "inside"
faults = [{ kind = "sigkill", rank = 1, at_step = 10 }, { kind = "nan_loss", rank = 0, at_step = 3 }]
"""
    saved = "timeout_seconds = 60.0\ncheckpoints = '{run}/count'\n"
    return campaign(tmp_path_factory.mktemp("survived"), PROGRESS + LINE + KILL + faults, settings=saved)


def of(report: Report, name: str) -> Result:
    return next(result for result in report.results if result.name == name)


@needs_proc
def test_a_killed_rank_of_any_job_is_found_and_the_job_comes_back_to_the_same_result(survived: Report):
    found = of(survived, "kill")
    assert (found.outcome, found.why) == ("pass", "")
    asked = {FIRED, command.EQUAL, CLEAN, RECOVERED, STATUS}
    assert answers(found) == dict.fromkeys(asked, "pass") | dict.fromkeys(INSIDE, NOT_ASKED)
    (measured,) = found.measured
    assert (measured["victim"], measured["detect_seconds"], measured["attributed_correctly"]) == (1, None, None)
    assert command.ON_ITS_WAY_SECONDS < measured["recover_seconds"] < 30
    assert len(found.launches) == 1


@needs_proc
def test_after_the_launchers_death_the_same_command_is_given_again(survived: Report):
    found = of(survived, "launcher dies")
    assert found.outcome == "pass"
    assert [launch["status"] for launch in found.launches] == [137, 0]


@needs_proc
def test_the_newest_checkpoint_of_any_job_can_be_damaged_from_outside(survived: Report):
    found = of(survived, "checkpoint gone")
    assert (found.outcome, found.why) == ("pass", "")
    lines = (Path(found.run).parent / "start-0" / "node-0.txt").read_text().splitlines()
    assert lines.count("step 1") == 2, "it started over"


def test_the_newest_file_that_holds_something_is_the_checkpoint(tmp_path):
    for age, name, content in (
        (3, "a.pt", "x"),
        (1, "sub/b.pt", "xy"),
        (2, "c.pt", "z"),
        (0, "d.pt", ""),
        (0, "e.txt", "x"),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        os.utime(path, (1000 - age, 1000 - age))
    for pattern in ("**/*.pt", f"{tmp_path}/**/*.pt"):
        job = CommandCluster(["x"], tmp_path, ranks=1, directory=tmp_path, checkpoints=pattern)
        assert [path.name for path in job.checkpoints()] == ["b.pt", "c.pt", "a.pt"]


@needs_proc
def test_a_fault_after_so_many_seconds_needs_no_progress(survived: Report):
    assert of(survived, "after seconds").outcome == "pass"


def test_a_fault_that_never_fired_is_unknown(survived: Report):
    assert of(survived, "too late").outcome == "unknown"
    assert answers(of(survived, "too late"))[RECOVERED] == "unknown"


def test_what_needs_the_inside_is_not_applicable_and_is_not_run(survived: Report):
    found = of(survived, "inside")
    assert (found.outcome, found.run, found.answers) == (NOT_ASKED, "", [])
    assert "nan_loss is made inside a rank" in found.why
    assert not survived.passed  # one fault did not fire
    survived.results.remove(of(survived, "too late"))
    assert survived.passed


def test_report_and_page_of_a_command_name_it_and_its_result(survived: Report):
    page, stored = Path(survived.results[0].run).parents[2] / "report.html", survived.reference["result"]
    assert "foreign_job.py" in survived.config and stored in page.read_text()
    assert "Incidents" not in page.read_text()


@pytest.mark.parametrize(
    ("result", "same", "other"),
    [
        ("[result]\nfile = '{run}/weights'\n", "pass", "fail"),
        ("[result]\nline = 'loss .*'\n", "pass", "fail"),
        ("[result]\nnumber = 'loss (.*)'\ntolerance = 0.02\n", "pass", "pass"),
        ("[result]\nnumber = 'loss (.*)'\ntolerance = 0.005\n", "pass", "fail"),
        ("[result]\nfile = '{run}/weights'\nnumber = 'w(.*)'\ntolerance = 1.0\n", "pass", "pass"),
        ("", NOT_ASKED, NOT_ASKED),
    ],
)
def test_a_changed_result_is_told_from_one_within_its_tolerance(tmp_path, result, same, other):
    loaded = plan.load(write(tmp_path, PROGRESS + result + KILL))
    assert loaded.command is not None
    ends: list[tuple[Path, str]] = []
    for name, value in (("reference", 1.50), ("same", 1.50), ("other", 1.51)):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run" / "weights").write_text(f"w{value}\n")
        ends.append((tmp_path / name, f"step 1\nloss 9\rloss {value}\n"))
    reference = command.CommandReference(command.result_of(loaded.command, *ends[0])[0], 1, 1.0)
    (case,) = loaded.cases
    for (directory, output), expected in zip(ends[1:], (same, other), strict=True):
        launches = [{"started": 0.0, "ended": 1.0, "status": 0}]
        seen = command.CommandEvidence(command.record(directory), case.config, case.planned, reference, launches)
        given = {answer.invariant: answer for answer in command.check(loaded.command, seen, output)}
        assert given[command.EQUAL].answer == expected, given[command.EQUAL]


def test_what_the_reference_run_leaves_too_is_known_by_its_name_without_the_random_part():
    first, second = (
        "file /a/start-0/node-0.tmp/torchelastic_fhx2sio2",
        "file /b/start-1/node-0.tmp/torchelastic_8oab_0z1",
    )
    assert command.shape(first) == command.shape(second) == "file torchelastic_"
    assert command.shape("segment /dev/shm/torch_123_4") == command.shape("segment /dev/shm/torch_99_12")
    assert command.shape("process 12: 'sleep 20'") == command.shape("process 7: 'python'")
    assert command.shape("file /a/pymp-abcd1234") != command.shape(first)


@needs_proc
def test_a_process_that_is_left_behind_is_found_and_ended(tmp_path):
    (found,) = campaign(tmp_path, PROGRESS + LINE + KILL, "--leaves").results
    assert answers(found)[CLEAN] == "fail" and "sleep 20" in found.why


@needs_proc
@pytest.mark.slow
def test_a_job_that_gives_up_or_hangs_fails_unless_its_user_would_start_it_again(tmp_path):
    again = "again_after = [1]\n"
    for settings, outcome, statuses in (("", "fail", [1]), (again, "pass", [1, 0])):
        folder = tmp_path / (outcome + "ed")
        folder.mkdir()
        (found,) = campaign(folder, PROGRESS + LINE + KILL, "--restarts", "0", settings=settings).results
        assert (found.outcome, [launch["status"] for launch in found.launches]) == (outcome, statuses)
    stop = KILL.replace("sigkill", "stopped").replace("rank = 1", "rank = 0")
    (found,) = campaign(tmp_path, PROGRESS + LINE + stop, settings="timeout_seconds = 4.0").results
    assert answers(found)[RECOVERED] == answers(found)[STATUS] == answers(found)[command.EQUAL] == "fail"
    assert "did not end on its own" in str(found.answers)


@needs_proc
def test_a_failure_is_written_as_a_campaign_that_does_the_same_again(tmp_path):
    path = write(tmp_path, PROGRESS + "[result]\nfile = '{run}/weights'\n" + KILL, "--loses")
    loaded = plan.load(path)
    report = run.run(loaded, tmp_path / "out")
    again = run.keep_replay(loaded, report, tmp_path / "out")
    assert again is not None
    replayed = plan.load(again)
    (case,) = replayed.cases
    assert (case.name, case.faults) == ("kill", report.results[0].faults)
    assert loaded.command is not None and replayed.command is not None
    assert (replayed.command.words, replayed.command.ranks) == (loaded.command.words, loaded.command.ranks)


def test_a_program_that_lies_beside_the_campaign_is_found_from_any_folder(tmp_path):
    (tmp_path / "job.sh").write_text("#!/bin/sh\n")
    (tmp_path / "job.sh").chmod(0o755)
    path = tmp_path / "campaign.toml"
    path.write_text(f"command = ['job.sh']\nranks = 2\n{PROGRESS}{LINE}{KILL}")
    given = plan.load(path).command
    assert given is not None
    (tmp_path / "other").mkdir()
    moved = tmp_path / "other" / "campaign.toml"
    moved.write_text("".join(f"{key} = {tomlfile.text(value)}\n" for key, value in given.settings().items()) + KILL)
    found = plan.load(moved).command
    assert found is not None and found.words == given.words == (str(tmp_path / "job.sh"),)


def test_a_reference_run_without_progress_or_result_ends_the_campaign(tmp_path):
    for text, hint in (
        (PROGRESS.replace("step", "iteration"), "no progress"),
        (LINE.replace("weights", "hash"), "no line"),
    ):
        folder = tmp_path / hint.replace(" ", "-")
        folder.mkdir()
        with pytest.raises(TopropeError, match=hint):
            campaign(folder, text + KILL.replace("at_step = 10", "at_seconds = 1"), "--steps", "2")


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        ("[progress]\npattern = 'step ('\n" + KILL, ["no regular expression"]),
        ("[progress]\npattern = 'step'\n" + KILL, ["has no group"]),
        ("[progress]\nsteps = 3\nfile = 'log'\n" + KILL, ["there is none"]),
        ("[result]\nnumber = '(.)'\n" + PROGRESS + KILL, ["belong together"]),
        ("[result]\ntolerance = 1.0\n" + PROGRESS + KILL, ["says nothing", "belong together"]),
        ("[result]\nline = 'a'\nnumber = '(.)'\ntolerance = 0.0\n" + PROGRESS + KILL, ["One thing is compared"]),
        (KILL, ["does not know the job's steps", "progress.pattern"]),
        (PROGRESS + KILL.replace("sigkill", "sigkil"), ["Did you mean 'sigkill'?"]),
        (PROGRESS + KILL.replace("rank = 1", "rank = 7"), ["ranks 0 to 1"]),
        (PROGRESS + KILL.replace("sigkill", "nan_loss"), ["is made inside a rank", "from outside"]),
        (PROGRESS + KILL + 'strategy = "fsdp"\n', ["for runs of toprope"]),
        ("[set]\nbudget.steps = 3\n" + PROGRESS + KILL, ["set has no effect beside command"]),
        (PROGRESS + "[storm]\n", ["nothing to spread"]),
        (
            PROGRESS + "steps = 30\n[storm]\nmix = { sigkill = 1.0, nan_loss = 1.0 }\n",
            ["nan_loss", "is made inside a rank"],
        ),
    ],
)
def test_a_wrong_campaign_over_a_command_is_refused_before_any_work(tmp_path, text, hints):
    message = problems(write(tmp_path, text))
    for hint in hints:
        assert hint in message, message


@pytest.mark.parametrize(
    ("head", "hint"),
    [
        ('command = ["no-such-launcher", "x"]', "no program 'no-such-launcher'"),
        ('command = ["torchrun", "no_such.py"]', "no_such.py is no file"),
        (f'command = ["torchrun", "--nproc-per-node=2", "{JOB}"]\nranks = 3', "starts 2 on each of 1 nodes"),
        (f'command = ["{sys.executable}", "{JOB}"]\nnodes = 2', "agents of torchrun"),
        (f'command = ["torchrun", "--nnodes=2", "{JOB}"]\nnodes = 2', "itself how they meet (--nnodes)"),
        ('config = "smoke.toml"\ncommand = ["torchrun"]', "both config and command"),
        ('config = "smoke.toml"\nagain_after = [1]', "no effect beside config"),
        ("ranks = 2", "neither a config nor a command"),
        ("command = []", "neither a config nor a command"),
    ],
)
def test_a_command_that_cannot_be_started_as_asked_is_refused(tmp_path, head, hint):
    path = tmp_path / "campaign.toml"
    path.write_text(f"{head}\n{PROGRESS}{KILL}")
    assert hint in problems(path)


def test_the_catalogue_strikes_any_job_from_outside_only_and_a_storm_draws_what_can_be_made(tmp_path):
    text = PROGRESS + "steps = 30\n[catalogue]\n[pairs]\nsample = 5\n[storm]\nmix = 'llama3'\nseeds = [0, 1]\n"
    path = tmp_path / "campaign.toml"
    words = ["torchrun", "--standalone", "--nproc-per-node", "2", str(JOB)]
    path.write_text(f"command = {json.dumps(words)}\n{text}")
    cases = plan.load(path).cases
    catalogue = [case for case in cases if case.name in KINDS]
    assert {case.name for case in catalogue} == {*KINDS}
    torchrun = [kind for kind in KINDS.values() if "restart" not in kind.not_in]
    made = {kind.name for kind in torchrun if kind.from_outside or kind.signal_number}
    assert {case.name for case in catalogue if not case.not_applicable} == made
    path.write_text("checkpoints = '*.pt'\n" + path.read_text())
    with_files = {case.name for case in plan.load(path).cases if case.name in KINDS and not case.not_applicable}
    assert with_files - made == {"truncated_shard", "flipped_shard", "missing_shard"}
    others = [case for case in cases if case.name not in KINDS]
    assert len(others) == 7 and not any(case.not_applicable for case in others)
    storms = [case for case in others if case.seed is not None]
    assert all(fault.from_outside for case in storms for fault in case.planned) and all(case.planned for case in storms)


def test_a_torchrun_command_is_taken_apart_into_launcher_options_and_program():
    words = ["/x/torchrun", "--standalone", "--nproc_per_node", "4", "--max-restarts=3", "-t", "3", "a.py", "--lr", "1"]
    parts = torchrun_parts(words)
    assert parts is not None
    assert (parts.launcher, parts.options, parts.ranks) == (words[:1], ["--max-restarts=3", "-t", "3"], "4")
    assert (parts.meeting, parts.program) == ([], ["a.py", "--lr", "1"])
    module = torchrun_parts(["python", "-m", "torch.distributed.run", "--rdzv-id", "7", "-m", "package.train"])
    assert module is not None
    assert (module.launcher[-1], module.meeting, module.program) == (
        "torch.distributed.run", ["--rdzv-id"], ["-m", "package.train"],
    )  # fmt: skip
    assert torchrun_parts(["python", "train.py"]) is None


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_plain_loop_starts_over_after_a_kill_and_ends_with_the_hash_of_its_reference_run(tmp_path):
    """The campaign as it is shipped, but for the program's name: torchrun forks the workers that are modules."""
    text, script = (ROOT / "configs" / "chaos" / "plain-loop.toml").read_text(), '"../../examples/plain_loop.py"'
    assert script in text
    path, out = tmp_path / "plain-loop.toml", tmp_path / "out"
    path.write_text(text.replace(script, '"-m", "examples.plain_loop"'))
    done = trainer("chaos", path, "--out", out, "--only", "a rank is killed", timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    stored: Any = results.read(out / "report.json")
    (found,) = stored.results
    assert answers(found)[command.EQUAL] == "pass"
    assert len(stored.reference["result"]) == 64 and stored.reference["steps"] == 30
