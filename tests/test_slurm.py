"""Slurm: the job script, what is refused, and a run on a real Slurm of three nodes."""

import dataclasses
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import slurm_cluster
from tests.slurm_cluster import SlurmCluster
from tests.support import ROOT, SMOKE, SMOKE_SHA256, summarise_run, worker_environment
from tests.test_ladder_file import ARM
from tests.test_ladder_run import ONE_RUNG, hashed_results, plan, reported, timed
from trainer import cli
from trainer import config as configs
from trainer.chaos import jobs as chaos_jobs
from trainer.chaos import plan as chaos_plan
from trainer.chaos import run as chaos_run
from trainer.chaos.jobs import Jobs
from trainer.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_USAGE, ConfigError, UsageError
from trainer.faults.checker import Reference
from trainer.fleet import slurm as fleet_slurm
from trainer.fleet.backend import Local, Task
from trainer.fleet.run_store import StoredRun
from trainer.fleet.slurm import SlurmJobs, name_of
from trainer.ladder import run as ladder_run
from trainer.ladder.preregistration import pool_of
from trainer.launch import slurm
from trainer.log import events, rundir


def job(run: Path, nodes: str = "1", **changes: object) -> slurm.Job:
    command = ["trainer", "train", str(run / "slurm" / "config.toml"), "--run", str(run)]
    return slurm.Job(run, command, *slurm.parse_nodes(nodes), 1, slurm.Request(**{"time": "10:00", **changes}))  # pyright: ignore


def submit(*arguments: str | Path) -> tuple[int, str]:
    """Exit status and output of `submit`, in this process."""
    done = CliRunner().invoke(cli.app, ["submit", *map(str, arguments)])
    if isinstance(done.exception, UsageError | slurm.SchedulerError):
        return done.exception.exit_status, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86_400), ("1-2:30", 95_400), ("1-2:30:15", 95_415),
     ("x", None), ("1:2:3:4", None), ("", None), ("UNLIMITED", None)],
)  # fmt: skip
def test_a_time_limit_is_read_as_slurm_reads_it(text, seconds):
    assert slurm.parse_time(text) == seconds


def test_the_script_asks_for_nodes_a_notice_and_another_start_and_is_valid_shell(tmp_path):
    run = tmp_path / "a run's"
    script = job(run, "1:3", options={"partition": "gpu", "exclusive": ""}, before=["module load cuda"]).script()
    header = re.findall(r"^#SBATCH (\S+)", script, re.MULTILINE)
    expected = {"--nodes=1-3", "--no-kill", "--signal=B:USR1@120", "--requeue", "--time=10:00", "--partition=gpu"}
    assert expected | {"--exclusive", "--cpus-per-task=1", "--dependency=singleton"} <= set(header)
    assert "\nmodule load cuda\n" in script
    assert "--nnodes=1:$used" in script
    fixed = job(run, "2", options={"no-requeue": ""}).script()
    assert "no-kill" not in fixed and "--requeue" not in fixed and "--nnodes=$used" in fixed
    for text in (script, fixed):
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False, capture_output=True).stderr == ""


@pytest.mark.parametrize(
    ("asked", "given"),
    [("afterok:7", "afterok:7,singleton"), ("afterok:7?afterok:8", "afterok:7?afterok:8"), ("", "singleton")],
)
def test_a_job_depends_on_what_the_user_says_and_on_other_jobs_of_its_run(tmp_path, asked, given):
    script = job(tmp_path, options={"dependency": asked}).script()
    assert re.findall(r"--dependency=(.*)", script) == [shlex.quote(given)]


def test_two_runs_of_one_name_have_jobs_of_different_names(tmp_path):
    names = {slurm.name_of(tmp_path / parent / "my run") for parent in ("a", "b")}
    assert len(names) == 2 and all(re.fullmatch(r"my-run-[0-9a-f]{8}", name) for name in names)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"time": "soon"}, "'soon' is no time limit"),
        ({"time": "1:00"}, "--time 1:00 is 60 s"),
        ({"notice_seconds": 5}, "--notice 5 leaves no time"),
        ({"options": {"nodes": "3"}}, "--slurm nodes is what this command gives"),
        ({"options": {"Bad name": ""}}, "'Bad name' is no option of sbatch"),
        ({"options": {"comment": "a\nb"}}, "holds a control character"),
    ],
)
def test_what_slurm_would_refuse_or_could_never_save_is_refused(tmp_path, changes, fact):
    with pytest.raises(ConfigError, match=re.escape(fact)):
        job(tmp_path, **changes).script()


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--nodes", "0"], "'0' is no number of nodes"),
        (["--nodes", "3:1"], "'3:1' is no number of nodes"),
        (["--nodes", "9"], "leaves 1 of 9 ranks without work"),
        (["--nodes", "1:3", "--ranks-per-node", "4"], "leaves 4 of 12 ranks without work"),
        (["--set", 'elastic.mode="quorum"'], "needs a launcher of its own"),
        (["--run", "100%/x"], "is no name for Slurm"),
        ([], "No sbatch on this machine"),
    ],
)
def test_a_bad_submission_ends_with_2_and_leaves_nothing(tmp_path, monkeypatch, arguments, fact):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    status, said = submit(SMOKE, "--on", "slurm", *arguments)
    assert (status, list(tmp_path.iterdir())) == (EXIT_USAGE, [])
    assert fact in said


def test_the_script_can_be_printed_without_a_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, said = submit(SMOKE, "--on", "slurm", "--run", tmp_path / "run", "--nodes", "1:2", "--print")
    assert status == EXIT_FINISHED and said.startswith("#!/bin/bash\n") and not (tmp_path / "run").exists()


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands on PATH that answer as Slurm's would; each prints the file of its name, if there is one."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name in ("sbatch", "squeue"):
        program = folder / name
        program.write_text(f'#!/bin/bash\n[[ -f {program}.error ]] && cat {program}.error >&2 && exit 1\n'
                           f"cat {program}.answer\n")  # fmt: skip
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        (folder / f"{name}.answer").touch()
    (folder / "sbatch.answer").write_text("17;here\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize(("reason", "is_told"), [("PartitionTimeLimit", True), ("Priority", False), ("", False)])
def test_a_job_that_slurm_takes_though_it_can_never_start_is_told_so(tmp_path, pretended, reason, is_told):
    (pretended / "squeue.answer").write_text(f"{reason}\n")
    status, said = submit(SMOKE, "--on", "slurm", "--run", tmp_path / "run")
    assert (status, "never starts as it is: PartitionTimeLimit" in said) == (EXIT_FINISHED, is_told)


def test_a_run_whose_job_is_in_the_queue_is_not_submitted_again(tmp_path, pretended):
    run = tmp_path / "run"
    assert slurm.submit(job(run), "seed = 1\n") == "17"
    assert (run / "slurm" / "config.toml").read_text() == "seed = 1\n"
    rundir.check(run, configs.load(SMOKE))  # still a place to start in
    (pretended / "squeue.answer").write_text("9 RUNNING b\n17 PENDING as it was named before\n")
    with pytest.raises(UsageError, match="in use by Slurm's job 17, which is pending"):
        slurm.submit(job(run), "")
    (run / "slurm" / "job.json").unlink()  # a process that was killed before Slurm told it the id
    (pretended / "squeue.answer").write_text(f"9 RUNNING b\n18 PENDING {slurm.name_of(run)}\n")
    with pytest.raises(UsageError, match="in use by Slurm's job 18, which is pending"):
        slurm.submit(job(run), "")
    (pretended / "squeue.answer").write_text("9 RUNNING b\n")
    assert slurm.submit(job(run), "") == "17"


UNANSWERED = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


@pytest.fixture
def sbatch_unheard(pretended, monkeypatch) -> Path:
    """An sbatch that times out after Slurm has taken the job; the answer is the number of its calls, line by line.

    Slurm shows the job when it is asked the third time.
    """
    calls, asked = pretended / "calls", pretended / "asked"
    (pretended / "sbatch").write_text(
        f"#!/bin/bash\nsed -n 's/^#SBATCH --job-name=/21 PENDING /p' \"${{@: -1}}\" >{pretended}/taken\n"
        f"echo call >>{calls}; echo '{UNANSWERED}' >&2; exit 1\n"
    )
    (pretended / "squeue").write_text(
        f"#!/bin/bash\n[[ -f {pretended}/taken ]] || exit 0\necho >>{asked}\n"
        f"(($(wc -l <{asked}) < 3)) || cat {pretended}/taken\n"
    )
    monkeypatch.setattr(slurm, "ASK_SECONDS", 0.0)
    return calls


def test_a_job_that_slurm_took_without_an_answer_is_found_by_its_name(tmp_path, sbatch_unheard, capsys):
    run = tmp_path / "run"
    assert slurm.submit(job(run), "") == slurm.submitted(run) == "21"
    with pytest.raises(UsageError, match="in use by Slurm's job 21"):
        slurm.submit(job(run), "")
    assert sbatch_unheard.read_text() == "call\n"
    assert "has had no answer" in capsys.readouterr().err


def test_a_submission_without_an_answer_is_waited_for_by_the_next_command(tmp_path, sbatch_unheard, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(slurm, "SETTLE_SECONDS", 0.0)
    with pytest.raises(slurm.UnansweredError, match="It may still take the job"):
        slurm.submit(job(run), "")
    monkeypatch.setattr(slurm, "SETTLE_SECONDS", 60.0)
    with pytest.raises(UsageError, match="in use by Slurm's job 21"):
        slurm.submit(job(run), "")
    assert sbatch_unheard.read_text() == "call\n"


@pytest.mark.parametrize(
    ("said", "status"),
    [("sbatch: error: invalid partition specified: gold\nsbatch: error: Batch job submission failed", EXIT_USAGE),
     ("sbatch: error: Unable to contact slurm controller (connect failure)", EXIT_FAILED)],
)  # fmt: skip
def test_what_slurm_does_not_take_leaves_nothing_and_says_why(tmp_path, pretended, said, status):
    (pretended / "sbatch.error").write_text(said)
    with pytest.raises((UsageError, slurm.SchedulerError)) as refused:
        slurm.submit(job(tmp_path / "run"), "")
    assert refused.value.exit_status == status
    assert said.splitlines()[0].removeprefix("sbatch: error: ") in str(refused.value)
    assert not (tmp_path / "run").exists()


PYTHON = """#!/bin/bash
case $* in
    *rendezvous*) echo 127.0.0.1:5 listens; exec sleep 60 ;;
    *launch.torchrun*)
        touch "$0.started"
        [[ $AGENTS == notice ]] && kill -USR1 $PPID && AGENTS=138
        exit $AGENTS ;;
    *open_run*) exit $UNFINISHED ;;
    *nodes.failing*) exec "$REAL" "$@" ;;
    *) exit $PROBE ;;
esac
"""
"""Pretends to be Python on the nodes; the variables say how it ends."""


@pytest.mark.parametrize(
    ("probe", "agents", "unfinished", "queue", "status", "goes_back"),
    [
        (0, "0", 1, "RUNNING 2", 0, False),
        (0, "1", 0, "RUNNING 2", 0, False),  # one node was lost, the others finished
        (0, "1", 1, "RUNNING 2", 1, False),
        (0, "1", 1, "RUNNING 1", 75, True),  # too few nodes are left
        (0, "75", 1, "RUNNING 2", 75, True),
        (0, "notice", 1, "RUNNING 2", 75, True),
        (0, "75", 1, "COMPLETING 2", 75, False),  # cancelled
        (0, "2", 1, "RUNNING 2", 2, False),
        (0, "76", 1, "RUNNING 2", 76, False),
        (66, "0", 1, "RUNNING 2", 2, False),  # a node does not see the run directory
        (127, "0", 1, "RUNNING 2", 2, False),  # no Python there
        (2, "0", 1, "RUNNING 2", 2, False),  # the same, as srun says it
        (1, "0", 1, "RUNNING 2", 2, False),  # a Python without toprope or torch
        (143, "0", 1, "RUNNING 2", 0, False),  # a node was lost before it answered
    ],
)  # fmt: skip
def test_how_a_job_ends_and_when_it_goes_back_into_the_queue(
    tmp_path, pretended, probe, agents, unfinished, queue, status, goes_back
):
    done = run_script(tmp_path / "run", pretended, queue, PROBE=str(probe), AGENTS=agents, UNFINISHED=str(unfinished))
    assert (done.returncode, (pretended / "requeued").exists()) == (status, goes_back), done.stdout + done.stderr
    assert ("Slurm has not put the job back" in done.stdout) == goes_back  # this pretended one never does
    assert (pretended / "python.started").exists() == (probe in (0, 143))


def fail_on(run: Path, node: str, times: int) -> None:
    """Write a log of a run on two nodes that a rank on one of them has ended so many times."""
    names = ["n1", "n2"]
    for attempt in range(times + 1):
        log = events.EventLog.open(run, attempt, 0)
        if attempt:
            killed = {"rank": names.index(node), "pid": None, "exitcode": -9, "signal": "SIGKILL"}
            log.append(events.WorkersLost(failures=[killed], reason=""))
        log.append(made_start(names))
        log.close()


def made_start(names: list[str]) -> events.AttemptStarted:
    return events.AttemptStarted(
        world_size=len(names), from_step=0, steps=9, fingerprint="", host="", pid=1, device="cpu", strategy="",
        parameters=1, tokens_per_step=1, startup_seconds={}, nodes=names,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("times", "nodes", "status", "said"),
    [(2, "1:2", 0, ""), (3, "1:2", 0, "excluded after 3 failures or more: n2"), (3, "2", 76, "--slurm exclude=n2")],
)
def test_a_node_that_failed_three_times_takes_no_part(tmp_path, pretended, times, nodes, status, said):
    run = tmp_path / "run"
    fail_on(run, "n2", times)
    real = {"PROBE": "0", "AGENTS": "0", "UNFINISHED": "1", "REAL": sys.executable, "PYTHONPATH": str(ROOT)}
    done = run_script(run, pretended, "RUNNING 2", nodes=nodes, exclude_after="3", **real)
    assert (done.returncode, said in done.stdout) == (status, True), done.stdout + done.stderr
    srun = (pretended / "srun.asked").read_text() if (pretended / "srun.asked").exists() else ""
    assert ("--nodes=1 --exclude=n2" in srun) == (times > 2 and status == 0)


def test_a_job_does_not_go_back_after_five_starts_in_a_row_without_a_checkpoint(tmp_path, pretended):
    variables = {"PROBE": "0", "AGENTS": "75", "UNFINISHED": "1"}
    starts = [run_script(tmp_path / "run", pretended, "RUNNING 2", **variables) for _ in range(5)]
    assert [done.returncode for done in starts] == [75] * 4 + [1]
    assert "5 starts in a row have saved no checkpoint" in starts[-1].stdout


def run_script(
    run: Path, pretended: Path, queue: str, nodes: str = "1:2", exclude_after: str = "",
    before: Sequence[str] = (), **variables: str,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run the job script of two nodes where all of Slurm, and Python, is pretended."""
    python = pretended / "python"
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    (pretended / "squeue.answer").write_text(queue + "\n")
    (pretended / "scontrol").write_text(
        f"#!/bin/bash\n[[ $1 == requeue ]] && touch {pretended}/requeued\n"
        "[[ $2 == hostnames ]] && printf 'n1\\nn2\\n'; false\n"
    )
    (pretended / "srun").write_text(
        f'#!/bin/bash\necho "$*" >>{pretended}/srun.asked\nwhile [[ $1 == -* ]]; do shift; done; exec "$@"\n'
    )
    python.write_text(PYTHON)
    for program in (pretended / "scontrol", pretended / "srun", python):
        program.chmod(0o755)
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "n1"}
    made = job(run, nodes, python=str(python), before=before)
    script = dataclasses.replace(made, exclude_after=int(exclude_after) if exclude_after else None).script()
    return subprocess.run(
        ["bash"], input=script, text=True, check=False, capture_output=True, env=os.environ | given | variables,
        timeout=30,
    )  # fmt: skip


def test_a_line_that_prepares_the_shell_may_read_unset_variables_and_ends_the_job_with_2_if_it_fails(
    tmp_path, pretended
):
    (pretended / "python.started").unlink(missing_ok=True)
    variables = {"PROBE": "0", "AGENTS": "0", "UNFINISHED": "1"}
    unset = run_script(tmp_path / "unset", pretended, "RUNNING 2", before=["[[ -z $NOT_SET ]]"], **variables)
    assert unset.returncode == 0, unset.stdout + unset.stderr
    (pretended / "python.started").unlink()
    done = run_script(tmp_path / "run", pretended, "RUNNING 2", before=["false # it's"], **variables)
    assert done.returncode == 2 and "UsageError: --before failed: false # it's\n  It prepares" in done.stdout
    assert not (pretended / "python.started").exists()


def test_a_ladders_job_whose_shell_cannot_be_prepared_ends_with_2_for_the_ladder_too(task, pretended, eager):
    request = slurm.Request("10:00", before=["false"])
    assert SlurmJobs(request)(task).poll() is None  # submitted
    done = subprocess.run(["bash", task.stored.directory / "job.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--before failed: false" in done.stdout
    assert (task.stored.directory / "exit-status").read_text() == "2\n"


def test_a_ladder_learns_how_its_job_ended_whatever_variables_the_lines_before_it_set(task, pretended, eager, tmp_path):
    elsewhere = f"cd /; directory={tmp_path / 'elsewhere'}"
    SlurmJobs(slurm.Request("10:00", before=[elsewhere, "false"]))(task).poll()
    subprocess.run(["bash", task.stored.directory / "job.sh"], capture_output=True, check=False)
    assert (task.stored.directory / "exit-status").read_text() == "2\n"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    stored = StoredRun(tmp_path / "pool" / "key")
    stored.directory.mkdir(parents=True)
    stored.prepare(configs.load(SMOKE), "s baseline")
    return Task(stored, "demo s baseline", 1, {"A": "b c"})


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between questions to Slurm, nor for a job that it has taken without an answer."""
    monkeypatch.setattr(fleet_slurm, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(fleet_slurm, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(slurm, "SETTLE_SECONDS", 0.0)


@pytest.mark.parametrize(("written", "status"), [("0", 0), ("1", 1), (None, -9), ("", -9)])
def test_a_job_ends_with_the_status_that_its_script_wrote_or_as_lost(task, pretended, eager, written, status):
    started = SlurmJobs(slurm.Request("10:00"))(task)
    assert started.poll() is None  # submitted
    (pretended / "squeue.answer").write_text(f"17 PENDING {name_of(task.stored.directory)}\n")
    assert started.poll() is None
    if written is not None:
        (task.stored.directory / "exit-status").write_text(written)
    assert started.poll() is None
    (pretended / "squeue.answer").write_text("18 RUNNING another\n")
    assert started.poll() == started.wait() == status
    assert SlurmJobs(slurm.Request("10:00"))(task).poll() is None  # that end was another job's
    script = (task.stored.directory / "job.sh").read_text()
    assert "export A='b c'\n" in script and "#SBATCH --comment='demo s baseline'\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False, capture_output=True).stderr == ""


def test_a_scheduler_that_does_not_answer_is_waited_for_and_a_job_is_submitted_once(task, pretended, eager):
    silent = "squeue: error: Unable to contact slurm controller (connect failure)"
    (pretended / "squeue.error").write_text(silent)
    started = SlurmJobs(slurm.Request("10:00"))(task)
    assert started.poll() is None
    assert not (task.stored.directory / "job.sh").exists()
    (pretended / "squeue.error").unlink()
    (pretended / "sbatch.error").write_text(silent.replace("squeue", "sbatch"))
    assert started.poll() is None
    (pretended / "squeue.answer").write_text(
        f"17 RUNNING {name_of(task.stored.directory)}\n"
    )  # sbatch was heard, after all
    (pretended / "sbatch.error").write_text("sbatch: error: it must not be asked again")
    assert started.poll() is None
    (pretended / "squeue.error").write_text(silent)
    assert started.poll() is None
    started.kill()
    assert started.poll() == EXIT_PREEMPTED


def test_a_job_whose_submission_had_no_answer_is_not_submitted_again_by_this_or_the_next_ladder(
    task, sbatch_unheard, eager, monkeypatch
):
    monkeypatch.setattr(slurm, "SETTLE_SECONDS", 60.0)
    jobs = SlurmJobs(slurm.Request("10:00"))
    started = jobs(task)
    assert [started.poll() for _ in range(2)] == [None, None]
    assert not jobs.works_on(task.stored)  # not yet in the queue
    following = SlurmJobs(slurm.Request("10:00"))
    again = following(task)  # the first one was killed
    assert [again.poll() for _ in range(3)] == [None] * 3
    assert following.works_on(task.stored) and sbatch_unheard.read_text() == "call\n"


@pytest.mark.parametrize("status", [0, 1, 75])
def test_the_end_of_a_job_that_nobody_watched_is_not_followed_by_another_submission(task, pretended, eager, status):
    """The ladder process was killed, and the job ended before the next one asked for the queue."""
    (pretended / "sbatch.error").write_text("sbatch: error: it must not be asked again")
    slurm.note(task.stored.directory / "submission.json", "17")
    (task.stored.directory / "exit-status").write_text(f"{status}\n")
    assert SlurmJobs(slurm.Request("10:00"))(task).poll() == status


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["ladder", "run", "demo", "--max-jobs", "2"], "Add --on slurm"),
        (["chaos", "smoke", "--max-jobs", "2"], "Add --on slurm"),
        (["chaos", "smoke", "--on", "lsf"], "Give --on slurm, or leave it out"),
        (["chaos", "smoke", "--on", "slurm"], "Give one that nodes see"),
        (["chaos", "smoke", "--on", "slurm", "--out", "out", "--shrink"], "Leave it out, or --on slurm"),
    ],
)
def test_options_that_do_not_fit_where_the_work_is_done_are_refused(pretended, arguments, remedy):
    done = CliRunner().invoke(cli.app, arguments)
    assert isinstance(done.exception, UsageError) and remedy in str(done.exception)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


def steps_by(run: Path, nodes: int) -> list[int]:
    """Steps that were made by so many ranks."""
    made = events.read(run) if rundir.is_run(run) else []
    sizes: dict[int, int] = {}
    steps = []
    for entry in made:
        if isinstance(entry.event, events.AttemptStarted):
            sizes[entry.attempt] = entry.event.world_size
        elif isinstance(entry.event, events.StepDone) and sizes.get(entry.attempt) == nodes:
            steps.append(entry.event.step)
    return steps


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(240)
def test_a_run_through_a_lost_node_that_is_excluded_and_a_preemption_ends_with_the_bits_of_a_calm_one(
    cluster, tmp_path, monkeypatch
):
    for name, value in worker_environment({"before_update": 0.1}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    command = ["tests.worker", "train", str(run / "slurm" / "config.toml"), "--run", str(run)]
    request = slurm.Request("10:00", 60, python=sys.executable)
    planned = slurm.Job(run, command, 1, 3, 1, request, exclude_after=1)
    number = slurm.submit(planned, configs.as_toml(configs.load(SMOKE)))

    def told() -> str:
        logs = sorted((run / "slurm").glob("*.txt"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)

    def wait_for(condition, seconds, what):
        try:
            cluster.wait_for(condition, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{told()}") from None

    wait_for(lambda: len(steps_by(run, 3)) > 3, 60, "steps of three nodes")
    cluster.kill_node("n3")
    wait_for(lambda: len(steps_by(run, 2)) > 3, 60, "steps of the two nodes that are left")
    # The node comes back before the next start, and has failed once.
    wait_for(lambda: cluster.nodes()["n3"].startswith("down"), 30, "lost node")
    cluster.start_node("n3")
    wait_for(lambda: cluster.nodes()["n3"] == "idle", 30, "node that is back")
    urgent = ["sbatch", "--partition=urgent", "--nodelist=n1,n2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    cluster.call(*urgent)
    wait_for(lambda: "PENDING" in cluster.state(number), 60, "requeue")
    wait_for(lambda: "COMPLETED" in cluster.state(number), 90, "end")
    story = summarise_run(run)
    assert story["weights_sha256"] == SMOKE_SHA256
    sizes = [(attempt["world_size"], attempt["ended"]) for attempt in story["attempts"]]
    assert sizes == [(3, "failed"), (2, "preempted"), (2, "finished")]
    assert {node["name"]: node["failures"] for node in story["nodes"]} == {"n1": 0, "n2": 0, "n3": 1}
    assert "without n3" in story["incidents"][0]["text"]
    said = (run / "slurm" / f"job-{number}.txt").read_text()
    assert "start 1, on n[1-3]\n" in said and "excluded after 1 failures or more: n3\n" in said
    assert [len(node["ranks"]) for node in story["nodes"]] == [1, 1, 0]
    assert "Traceback" not in told() and "frame #" not in told()


class KilledError(BaseException):
    """The end of a process that watches jobs."""


def test_a_case_whose_job_fails_is_told_with_its_output_and_run_again_by_the_same_command(
    pretended, tmp_path, monkeypatch
):
    path, out = tmp_path / "campaign.toml", tmp_path / "out"
    path.write_text(CAMPAIGN.replace("SMOKE", str(SMOKE)))
    campaign = chaos_plan.load(path, only=["both die"])
    monkeypatch.setattr(chaos_run, "has_reference", lambda report: True)
    monkeypatch.setattr(chaos_run, "reference_of", lambda *_: Reference("w", "s", {}, 7, 1.0, True))
    (case,) = campaign.cases
    directory, submitted = out / "jobs" / case.slug, []

    class Started:
        def poll(self) -> int:
            (directory / "job-7.txt").write_text("ModuleNotFoundError: trainer\n")
            return 1

    elsewhere = Jobs(SlurmJobs(slurm.Request("10:00")), 2, path)
    monkeypatch.setattr(SlurmJobs, "start", lambda _jobs, work: submitted.append(work) or Started())
    for _ in range(2):
        (result,) = chaos_run.run(campaign, out, elsewhere=elsewhere).results
        assert result.outcome == "unknown" and "left with 1" in result.why and "ModuleNotFoundError" in result.why
    assert [(work.directory, work.cpus) for work in submitted] == [(directory, 2)] * 2


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(240)
def test_a_ladder_of_jobs_whose_process_was_killed_gives_the_results_of_a_local_one(cluster, home, monkeypatch):
    for name, value in worker_environment().items():
        monkeypatch.setenv(name, value)
    ladder = plan(home, ONE_RUNG, ARM, name="jobs")
    here, there = timed(home / "here" / "ladder"), home / "there" / "ladder"
    ladder_run.run(ladder, here, backend=Local())
    jobs = SlurmJobs(slurm.Request("10:00", 60, python=sys.executable))

    def die(status: ladder_run.LadderStatus) -> None:
        if any(jobs.works_on(StoredRun(pool_of(there) / run.key)) for run in status.runs):
            raise KilledError

    with pytest.raises(KilledError):
        ladder_run.run(ladder, there, backend=jobs, slots=2, update=die)
    cluster.stop_controller()
    cluster.start_controller()
    done = ladder_run.run(ladder, there, backend=jobs, slots=2)
    assert done.exit_status == EXIT_FINISHED
    assert hashed_results(ladder, pool_of(there)) == hashed_results(ladder, pool_of(here))
    assert json.dumps(reported(ladder, there)) == json.dumps(reported(ladder, here))
    submitted = {name_of(pool_of(there) / run.key) for run in done.distinct}
    known = cluster.call("scontrol", "show", "jobs", "--oneliner")
    assert sorted(re.findall(r"JobName=(toprope-\w+)", known)) == sorted(submitted)


CAMPAIGN = """
question = "Do deaths leave no trace?"
config = "SMOKE"
ranks = 2
[set]
budget.steps = 7
checkpoint.every_steps = 2
eval.every_steps = 0
[[runs]]
name = "a rank dies"
faults = [{ kind = "sigkill", rank = 1, at_step = 5, phase = "before_reduce" }]
[[runs]]
name = "both die"
faults = [{ kind = "sigkill", rank = 0, at_step = 4 }, { kind = "exception", rank = 1, at_step = 6 }]
"""


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(240)
def test_a_campaign_of_jobs_goes_on_after_its_process_was_killed_and_a_job_cancelled(cluster, home, monkeypatch):
    for name, value in worker_environment().items():
        monkeypatch.setenv(name, value)
    path, out = home / "campaign.toml", home / "out"
    path.write_text(CAMPAIGN.replace("SMOKE", str(SMOKE)))
    campaign = chaos_plan.load(path)
    jobs = SlurmJobs(slurm.Request("10:00", 60, python=sys.executable))
    elsewhere = Jobs(jobs, 2, path)
    directories = [out / "jobs" / case.slug for case in campaign.cases]

    def die(seconds: float) -> None:
        if all((directory / "submission.json").exists() for directory in directories):
            raise KilledError
        time.sleep(seconds)

    with monkeypatch.context() as patched:
        patched.setattr(chaos_jobs, "wait", die)
        with pytest.raises(KilledError):
            chaos_run.run(campaign, out, elsewhere=elsewhere)
    cluster.call("scancel", f"--name={name_of(directories[0])}")
    done = chaos_run.run(campaign, out, elsewhere=elsewhere)
    outcomes = [(result.name, result.outcome) for result in done.results]
    assert outcomes == [("a rank dies", "pass"), ("both die", "pass")], [result.why for result in done.results]
    assert chaos_run.run(campaign, out, elsewhere=elsewhere).results == done.results, "nothing was left to do"
