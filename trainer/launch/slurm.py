"""Slurm: a run as a job. The script that trains (templates/slurm.sh), and what is asked of the scheduler.

    RUN/slurm/job.sh         the script as it was submitted last
    RUN/slurm/config.toml    the whole config, which every start of the job reads
    RUN/slurm/job.json       {"job": id, "time": …} of that submission; no id until Slurm has told it
    RUN/slurm/job-ID.txt     what the script says, start after start
    RUN/slurm/job-ID-start-N-NODE.txt    output of the ranks of a node

Slurm starts one torchrun agent a node. A notice before the time limit or a preemption ends in a save, and the job goes
back into the queue. submitit pickles a function for each job, and TorchX gives no notice and never goes back into the
queue: with either, all of this would still be ours. So the script is a template, which users can read and change.

Slurm may take a job without telling so, if it is slow or the process that asks is killed. So a job's name belongs to
one run: before anything is submitted the queue is asked for that name, and asked again for SETTLE_SECONDS after a
submission without an answer. A job that Slurm takes even later waits for the other one (`singleton`), and finds nothing
left to do.
"""

import contextlib
import functools
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout

from trainer import files
from trainer.errors import ConfigError, RunDirectoryError, TopropeError, UsageError, of_system

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "templates"
RENDEZVOUS = "is_host=0,keep_alive_interval=2,keep_alive_max_attempt=3,last_call_timeout=5,store_seconds=60"
"""A lost node is noticed after 6 s. A node that comes 5 s after the fewest have met starts all workers once more."""
RESTARTS = 20
STARTS_IN_VAIN = 5
"""Starts in a row without a new checkpoint after which a job does not go back into the queue."""
NOTICE_SECONDS = 120
LEAST_NOTICE_SECONDS = 30
LEAVING_SECONDS = 10
"""Part of the notice that is left when workers that have not saved are killed: torchrun and srun still have to end."""
ANSWER_SECONDS = 30.0
ASK_SECONDS = 2.0
SETTLE_SECONDS = 60.0
"""After a submission without an answer, a job may appear in the queue for so long."""
UNLIMITED = ("UNLIMITED", "INFINITE")
NEVER_STARTS = (
    "PartitionTimeLimit", "PartitionNodeLimit", "PartitionConfig", "BadConstraints", "InvalidAccount", "InvalidQOS",
)  # fmt: skip
"""Reasons of Slurm's for which a job waits until someone changes it or the partition."""
OWN_OPTIONS = {
    "nodes": "--nodes (a ladder's job has one)", "time": "--time", "signal": "--notice",
    "gpus-per-node": "--gpus-per-node (for a ladder: --slurm gpus=N)",
} | (
    dict.fromkeys(
        ("array", "chdir", "error", "job-name", "no-kill", "ntasks", "ntasks-per-node", "open-mode", "output",
         "parsable", "wait", "wrap"), "",
    )
)  # fmt: skip
"""Options of sbatch that `submit` gives itself, with its own option for each, if there is one."""


class SchedulerError(TopropeError):
    """The scheduler does not answer, or does not do what is asked."""


class UnansweredError(SchedulerError):
    """sbatch was cut off before the answer: Slurm may have taken the job."""


class Queued(NamedTuple):
    """A job of this user that waits, runs or ends just now."""

    id: str
    state: str
    name: str


@dataclass(frozen=True)
class Request:
    """Options of every job of a user, and how Python is started on a node."""

    time: str
    """Time limit of each start, as Slurm takes it."""
    notice_seconds: int = NOTICE_SECONDS
    """From the notice to the end of the time limit."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Further options of sbatch; one without a value has an empty one."""
    python: str = "python"
    """Shell words that start Python on the nodes."""
    before: Sequence[str] = ()
    """Shell lines that prepare the environment: `module load …`."""

    def check(self) -> None:
        """Raise ConfigError, with all problems, for what Slurm would refuse or what could never save."""
        problems: list[str] = []
        seconds = parse_time(self.time)
        if seconds is None and self.time.upper() not in UNLIMITED:
            problems.append(
                f"--time {self.time!r} is no time limit.\n  Slurm takes minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S: "
                "2:00:00 is two hours."
            )
        if self.notice_seconds < LEAST_NOTICE_SECONDS:
            problems.append(
                f"--notice {self.notice_seconds} leaves no time to save and leave.\n  Ranks finish their step and "
                f"write a checkpoint in it. Give at least {LEAST_NOTICE_SECONDS} seconds."
            )
        elif seconds is not None and seconds <= self.notice_seconds:
            problems.append(
                f"--time {self.time} is {seconds} s, and the notice to save comes {self.notice_seconds} s before its "
                "end: no time is left to train.\n  Give a longer --time, or a shorter --notice."
            )
        for name, value in self.options.items():
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                problems.append(f"--slurm {name!r} is no option of sbatch.\n  Write one without dashes: partition=gpu.")
            elif name in OWN_OPTIONS:
                own = OWN_OPTIONS[name]
                remedy = f"Give {own} instead." if own else "The job depends on it. Leave it out."
                problems.append(f"--slurm {name} is what this command gives to sbatch itself.\n  {remedy}")
            elif not value.isprintable():
                problems.append(f"--slurm {name}={value!r} holds a control character.\n  Write it in one line.")
        if problems:
            raise ConfigError(problems)

    def script(self, template: str, own: Mapping[str, str], output: Path, **values: object) -> str:
        """Return a job script. `own` are options of sbatch, and `output` is where its output goes.

        Raises ConfigError if Slurm cannot write to a file of that name.
        """
        if "%" in str(output) or not str(output).isprintable():
            raise ConfigError(
                [f"{output.parent} is no name for Slurm, which replaces what follows a %.\n  Give another directory."]
            )
        given = {
            "time": self.time, "signal": f"B:USR1@{self.notice_seconds}", "requeue": "", "open-mode": "append",
            "output": str(output.with_name(f"{output.stem}%j{output.suffix}")),
        }  # fmt: skip
        given |= {**own, **self.options, "dependency": self._dependency()}
        if "no-requeue" in given:
            del given["requeue"]
        return _template(template).render(
            options=[f"--{name}" + (f"={shlex.quote(value)}" if value else "") for name, value in given.items()],
            before=self.before,
            python=self.python,
            shutdown_seconds=self.notice_seconds - LEAVING_SECONDS,
            **values,
        )

    def _dependency(self) -> str:
        """The dependency of every job: two jobs of one name never run at once."""
        asked = self.options.get("dependency", "")
        # With "?" any one dependency is enough, so a further one would be wrong there.
        return asked if "?" in asked else ",".join(filter(None, [asked, "singleton"]))


@dataclass(frozen=True)
class Job:
    """A run as Slurm runs it: one torchrun agent on each node."""

    run: Path
    """Run directory, absolute."""
    command: Sequence[str]
    """Module that each rank runs, with its arguments."""
    fewest: int
    nodes: int
    """Nodes that the job asks for. It starts, and goes on, with any number from `fewest`."""
    ranks: int
    """Ranks on each node."""
    request: Request
    threads: int = 1
    """CPU threads of each rank."""
    gpus_per_node: int | None = None
    exclude_after: int | None = None
    """Failures of a node after which it takes no part; None: it always may."""

    def script(self) -> str:
        """Return the job script. Raises ConfigError for what Slurm would refuse."""
        self.request.check()
        elastic = self.fewest < self.nodes
        own = {
            "job-name": name_of(self.run),
            # Without ntasks-per-node, with which Slurm gives the fewest nodes however many are free.
            "nodes": f"{self.fewest}-{self.nodes}" if elastic else str(self.nodes),
            "cpus-per-task": str(self.ranks * self.threads),
        }
        if elastic:
            own["no-kill"] = ""  # a lost node does not end the job
        if self.gpus_per_node:
            own["gpus-per-node"] = str(self.gpus_per_node)
        return self.request.script(
            "slurm.sh",
            own,
            self.run / "slurm" / "job-.txt",
            run=str(self.run),
            command=shlex.join(self.command),
            elastic=elastic,
            fewest=self.fewest,
            ranks=self.ranks,
            restarts=RESTARTS,
            starts_in_vain=STARTS_IN_VAIN,
            exclude_after=self.exclude_after,
            rendezvous=RENDEZVOUS,
        )


def parse_nodes(text: str) -> tuple[int, int]:
    """Return (fewest, most) of "3" or "1:3". Raises UsageError if it is neither."""
    first, _, last = text.partition(":")
    if re.fullmatch(r"[1-9]\d{0,4}(:[1-9]\d{0,4})?", text) and int(first) <= int(last or first):
        return int(first), int(last or first)
    raise UsageError(
        f"--nodes {text!r} is no number of nodes.\n  Give a number, or the fewest and the most: --nodes 1:3."
    )


def parse_time(text: str) -> int | None:
    """Seconds of a time limit as Slurm writes it; None if it is none, or unlimited."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        return None
    days, *parts = (int(part) if part is not None else None for part in found.groups())
    numbers = [part for part in parts if part is not None]
    # Without days the first number of one or two is minutes; with days it is hours.
    if days is None and len(numbers) < 3:
        numbers = [0, *numbers]
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return ((days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds


def parse_options(given: Iterable[str]) -> dict[str, str]:
    """Return {option: value} of `--slurm` arguments: "partition=gpu", or "exclusive"."""
    return {name.removeprefix("--"): value for name, _, value in (text.partition("=") for text in given)}


def submit(job: Job, config: str) -> str:
    """Submit a job, whose config is the TOML text `config`, and return its id.

    Raises UsageError, with nothing submitted, if there is no Slurm here, if it refuses the job, or if a job of this run
    is in its queue already; UnansweredError if nobody knows whether it was.
    """
    script = job.script()
    require()
    directory = job.run / "slurm"
    made = next((path for path in (job.run, directory) if not path.exists()), None)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / "lock", fallback_to_soft=False).acquire(timeout=ANSWER_SECONDS):
            _refuse_second(job.run)
            files.write(directory / "config.toml", config)
            files.write(directory / "job.sh", script)
            note(directory / "job.json")
            try:
                number = sbatch(directory / "job.sh")
            except UnansweredError as error:
                number = _taken_unheard(job.run)
                if number is None:
                    raise error from None  # the job may still come, and needs its directory
            except TopropeError:
                (directory / "job.json").unlink()
                if made is not None:
                    shutil.rmtree(made)
                raise
            note(directory / "job.json", number)
    except Timeout:
        raise RunDirectoryError(
            f"{job.run} is being submitted by another process.\n  Wait for it, or give another --run."
        ) from None
    except OSError as error:
        rule, remedy = "The job's script, its output and checkpoints go there.", "Give a --run that can be written."
        raise RunDirectoryError(of_system(error, f"{job.run} cannot be written", rule, remedy)) from None
    return number


def name_of(run: Path) -> str:
    """Name of the job of a run, which no other run has."""
    digest = hashlib.sha256(str(run).encode()).hexdigest()
    return re.sub(r"\s", "-", f"{run.name}-{digest[:8]}")


def note(path: Path, job: str | None = None) -> None:
    """Write down a submission: before it, without an id; and when Slurm has told the id."""
    files.write(path, json.dumps({"job": job, "time": time.time()}) + "\n")


def seconds_unsettled(path: Path) -> float:
    """Seconds for which a job that was noted there, and is not in the queue, may still appear in it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        noted = files.read_object(path)
        if noted["job"] is None:
            return min(max(0.0, noted["time"] + SETTLE_SECONDS - time.time()), SETTLE_SECONDS)
    return 0.0


def sbatch(script: Path) -> str:
    """Submit a script; return the job's id. Raises UsageError if Slurm refuses it, SchedulerError if it cannot be
    reached, UnansweredError if it may have taken the job."""
    done = _ask("sbatch", "--parsable", str(script))
    if not done.returncode:
        return done.stdout.strip().partition(";")[0]
    if re.search(r"[Uu]nable to contact|Connection refused", done.stderr):
        raise SchedulerError(f"Slurm does not answer: {_words(done)}.\n  Nothing was submitted. Try again later.")
    if re.search(r"[Tt]imed out|did not answer|Zero Bytes|Connection reset", done.stderr):
        raise UnansweredError(
            f"Slurm did not answer: {_words(done)}.\n  It may still take the job. The same command looks for it in the "
            "queue before it submits another."
        )
    raise UsageError(
        f"Slurm does not take the job: {_words(done)}.\n  Nothing was submitted. `sinfo` shows partitions, nodes and "
        "time limits; --slurm key=value passes an option to sbatch."
    )


def require() -> None:
    """Raise UsageError if Slurm's commands are not on this machine."""
    if missing := [name for name in ("sbatch", "squeue") if shutil.which(name) is None]:
        raise UsageError(
            f"No {missing[0]} on this machine, so nothing can be submitted.\n  Give the command on a login node of the "
            "cluster. --print shows the job script anywhere."
        )


def obstacle(job: str) -> str:
    """The reason, as Slurm names it, why a job that was just submitted never starts as it is; "" if none is known."""
    reason = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%r").stdout.strip()
    return reason if reason in NEVER_STARTS else ""


def submitted(run: Path) -> str | None:
    """Id of the job that was submitted last for a run; None if there was none, or Slurm has not told it."""
    try:
        job = files.read_object(run / "slurm" / "job.json")["job"]
    except (OSError, ValueError, KeyError):
        return None
    return None if job is None else str(job)


def queue() -> list[Queued]:
    """This user's jobs that wait, run or end just now. Raises SchedulerError if Slurm does not answer."""
    done = _ask("squeue", "--me", "--noheader", "--format=%i %T %j")
    if done.returncode:
        raise SchedulerError(f"squeue fails: {_words(done)}.\n  Wait until Slurm answers, then try again.")
    return [Queued(*line.split(maxsplit=2)) for line in done.stdout.splitlines() if len(line.split()) > 2]


def _refuse_second(run: Path) -> None:
    last, unsettled = submitted(run), seconds_unsettled(run / "slurm" / "job.json")
    deadline = time.monotonic() + unsettled
    if unsettled:
        _say_that_it_looks(run, unsettled)
    while True:
        asked_at = time.monotonic()
        for job in queue():
            if job.id == last or job.name == name_of(run):
                raise RunDirectoryError(
                    f"{run} is in use by Slurm's job {job.id}, which is {job.state.lower()}.\n  Two jobs would write "
                    f"over each other. Wait for it, end it with `scancel {job.id}`, or give another --run."
                )
        if asked_at >= deadline:
            return
        time.sleep(ASK_SECONDS)


def _taken_unheard(run: Path) -> str | None:
    """Id of the job of a run that Slurm has taken without an answer; None if none appears in the queue."""
    deadline = time.monotonic() + SETTLE_SECONDS
    _say_that_it_looks(run, SETTLE_SECONDS)
    while True:
        asked_at = time.monotonic()
        with contextlib.suppress(SchedulerError):
            if found := [job.id for job in queue() if job.name == name_of(run)]:
                return found[0]
        if asked_at >= deadline:
            return None
        time.sleep(ASK_SECONDS)


def _say_that_it_looks(run: Path, seconds: float) -> None:
    print(
        f"A submission of {run} has had no answer: the queue is asked for its job for up to {seconds:.0f} s.",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} did not answer in {ANSWER_SECONDS:g} s")


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """The error output of a command of Slurm's, in one line."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).rstrip(". ") for line in done.stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or f"exit status {done.returncode}"


@functools.cache
def _template(name: str) -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["quote"] = shlex.quote
    return environment.get_template(name)
