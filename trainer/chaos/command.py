"""Any other job under faults: a command, how far its output says it has come, and what it leaves as its result.

Of such a job only the outside is known: exit statuses, processes and files it leaves, its output. Faults come from
outside too. What would need the inside, the event log of a toprope run, is answered with "not applicable".

    CASE/run                    the job's own folder, {run} in the campaign
    CASE/record/progress.jsonl  {time, step} whenever the job had come further than ever before
    CASE/record/events/         the faults that fired
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.chaos.schema import CampaignFile, JobResult, Progress
from trainer.errors import EXIT_FINISHED
from trainer.faults import checker
from trainer.faults.attribution import Evidence
from trainer.faults.checker import NOT_ASKED, Answer
from trainer.faults.fault import KINDS, NODES
from trainer.launch.cluster import Agents, CommandCluster, torchrun_parts
from trainer.launch.namespaces import Hosts
from trainer.log.events import Entry

EQUAL = "result equal"
STEPS_UNKNOWN = 10**9
NEEDS_INSIDE = "needs the inside of the job: only toprope's own event log tells"
POLL_SECONDS = 0.05
ON_ITS_WAY_SECONDS = 0.2
"""Seconds after a fault in which progress does not count: it was on its way when the fault struck."""


@dataclass(frozen=True)
class Command:
    """A command that a campaign breaks, as the campaign file describes it."""

    file: CampaignFile
    words: tuple[str, ...]
    """The command; its first word is a program that exists."""
    here: Path
    ranks: int
    """Number of ranks that the command starts."""
    nodes_problem: str
    """The reason why it cannot be started on several nodes; empty if it can."""

    @property
    def about(self) -> str:
        return shlex.join(self.file.command)

    @property
    def identity(self) -> str:
        parts = self.file.model_dump(include={"command", "directory", "environment", "progress", "result"})
        text = json.dumps([parts, str(self.here), self.ranks, self.file.nodes], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def steps(self) -> int | None:
        return self.file.progress.steps if self.file.progress else None

    @property
    def tells_steps(self) -> bool:
        return bool(self.file.progress and self.file.progress.pattern)

    def fill(self, text: str, run: Path) -> str:
        """Put folders in the place of {run} and {here}."""
        return text.replace("{run}", str(run.absolute())).replace("{here}", str(self.here))

    def path(self, text: str, run: Path) -> Path:
        """A file of the job, by its name in the campaign: relative ones are in the folder where the command works."""
        return self.here / self.fill(self.file.directory, run) / self.fill(text, run)

    def settings(self) -> dict[str, Any]:
        """The settings of a campaign file that describe this command, valid in any folder."""
        tree = self.file.model_dump(include={"command", "directory", "environment", "progress", "result"})
        more = {
            "ranks": self.ranks, "nodes": self.file.nodes,
            "again_after": self.file.again_after, "checkpoints": self.file.checkpoints,
        }  # fmt: skip
        directory = str(self.here / self.file.directory) if "{" not in self.file.directory else self.file.directory
        program, *rest = tree.pop("command")
        # A path starts from the campaign's folder, and the settings may lie in another one.
        is_here = "/" in program or self.words[0] == str(self.here / program)
        command = [self.words[0] if is_here else program, *rest]
        tree = {"command": command} | more | tree | {"directory": directory}
        kept: dict[str, Any] = {key: value for key, value in tree.items() if value not in (None, "", [], {})}
        for table in (kept.get("progress", {}), kept.get("result", {})):
            for key in [key for key, value in table.items() if value in (None, "")]:
                del table[key]
        return _with_folder(kept, str(self.here))

    def not_applicable(self, fault: Mapping[str, Any], nodes: int) -> str:
        """The reason why a [[faults]] table cannot be made on this job; empty if it can, or if it is wrong anyway."""
        kind = KINDS.get(str(fault.get("kind")))
        if kind is None:
            return ""
        if kind.damages_files and not self.file.checkpoints:
            return f"{kind.name} damages a checkpoint, and the campaign's `checkpoints` names no files"
        if reason := kind.not_in.get("restart"):
            return f"{kind.name}: {reason}"
        if not kind.hits_any_job:
            return f"{kind.name} is made inside a rank, and this job is no toprope run"
        if inside := [key for key in ("phase", "attempt") if fault.get(key) not in (None, "")]:
            return f"{kind.name}: {inside[0]} needs the inside of a toprope run"
        if (nodes > 1 or NODES in kind.needs) and self.nodes_problem:
            return f"{kind.name} needs two nodes: {self.nodes_problem}"
        return ""

    def cluster(
        self, directory: Path, start: Path, *, ranks: int, nodes: int, hosts: Hosts | None, own_store: bool
    ) -> CommandCluster:
        """The agents of one start of the job, in the folder of its case. `ranks` on all nodes together."""
        run = directory / "run"
        for folder in (run, record(directory) / "events"):
            folder.mkdir(parents=True, exist_ok=True)
        environment = {key: self.fill(value, run) for key, value in self.file.environment.items()}
        # Lines must be seen when they are written.
        usual = {"WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
        return CommandCluster(
            [self.fill(word, run) for word in self.words], self.path("", run),
            ranks=ranks // nodes, directory=start, nodes=nodes, hosts=hosts, environment=usual | environment,
            own_store=own_store, checkpoints=self.fill(self.file.checkpoints, run),
        )  # fmt: skip


def _with_folder(tree: Any, here: str) -> Any:
    if isinstance(tree, dict):
        return {key: _with_folder(value, here) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_folder(value, here) for value in tree]
    return tree.replace("{here}", here) if isinstance(tree, str) else tree


# Reading the campaign file


def read(path: Path, file: CampaignFile, problems: list[str]) -> Command | None:
    """Return the command of a campaign file, checked; None if it cannot be planned with. Adds what is wrong."""
    found = [*_pattern_problems(file)]
    here = path.parent.absolute()
    words = [file.command[0].replace("{here}", str(here)), *file.command[1:]]
    program = None
    if "/" not in words[0]:
        program = shutil.which(words[0]) or shutil.which(words[0], path=str(Path(sys.executable).parent))
    if program is None and (here / words[0]).is_file():
        program = str(here / words[0])
    if program is None:
        found.append(f"command: there is no program {file.command[0]!r}.\n  Install it, or give its path.")
    script = next((word for word in words[1:] if word.endswith(".py")), "")
    folder = here / file.directory.replace("{here}", str(here))
    if script and "{run}" not in file.directory + script:
        script = script.replace("{here}", str(here))
        if not (folder / script).is_file():
            found.append(f"command: {script} is no file in {folder}.\n  Give its path from there, or {{here}}/….")
    parts = torchrun_parts(words)
    nodes = file.nodes
    ranks = file.ranks
    if parts is not None and (parts.ranks.isdecimal() or not parts.ranks):
        each = int(parts.ranks or 1)
        ranks = each * nodes
        if "ranks" in file.model_fields_set and file.ranks != ranks:
            found.append(
                f"ranks = {file.ranks}, but the command starts {each} on each of {nodes} nodes.\n  Remove ranks."
            )
    elif parts is not None and "ranks" not in file.model_fields_set:
        fact = f"--nproc-per-node = {parts.ranks} does not say how many ranks there are."
        found.append(f"{fact}\n  Set ranks to all of them.")
    elif parts is None and "ranks" not in file.model_fields_set:
        ranks = 1
    nodes_problem = ""
    if parts is None:
        nodes_problem = "nodes are agents of torchrun, and the command is none"
    elif parts.meeting:
        nodes_problem = f"the command says itself how they meet ({parts.meeting[0]})"
    if nodes > 1 and nodes_problem:
        found.append(f"nodes = {nodes}: {nodes_problem}.\n  Leave nodes out, or change the command.")
    problems += found
    if found or program is None:
        return None
    return Command(file, (program, *words[1:]), here, ranks, nodes_problem)


def _pattern_problems(file: CampaignFile) -> Iterator[str]:
    progress, result = file.progress or Progress(file="-"), file.result or JobResult(file="-")
    if not progress.pattern and not progress.file:
        yield "progress says nothing.\n  Give a pattern, a file, or both."
    if progress.steps and not progress.pattern:
        yield "progress.steps is the last step of a pattern, and there is none.\n  Give progress.pattern."
    if not result.file and not result.line and not result.number:
        yield "result says nothing.\n  Give a file, a line or a number."
    if result.line and result.number:
        yield "result has a line and a number.\n  One thing is compared. Give one of them."
    if bool(result.number) != (result.tolerance is not None):
        yield "result.number and result.tolerance belong together.\n  State how far the number may be off, or neither."
    for name, pattern, needs_group in (
        ("progress.pattern", progress.pattern, True),
        ("result.line", result.line, False),
        ("result.number", result.number, True),
    ):
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            yield f"{name} = {pattern!r} is no regular expression: {error}.\n  Python's module re has the rules."
            continue
        if pattern and needs_group and not groups:
            yield f"{name} = {pattern!r} has no group.\n  Put the number into one: step (\\d+)"


# Watching a job


class Watch:
    """Follows the progress of a job by its output, or by one file, in a thread; notes each new maximum on record.

    A context manager: all that the job has written is seen. Also the `Progress` of a nemesis.
    """

    def __init__(self, command: Command, directory: Path, cluster: Agents, ranks: int) -> None:
        progress = command.file.progress
        self._pattern = re.compile(progress.pattern) if progress and progress.pattern else None
        self._file = command.path(progress.file, directory / "run") if progress and progress.file else None
        self._watches = progress is not None
        self._record = record(directory) / "progress.jsonl"
        self._cluster, self._ranks = cluster, ranks
        self._most = max((step for _, step in observed(directory)), default=-1)
        self._read: dict[Path, int] = {}
        """Bytes read so far of each file."""
        self._parts: dict[Path, bytes] = {}
        """The beginning of a line whose end has not been written yet."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="toprope-watch", daemon=True)

    def __enter__(self) -> "Watch":
        if self._watches:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        if self._watches:
            self._thread.join()

    def _follow(self) -> None:
        at_end = False
        while not at_end:
            # Workers that outlive their launcher may go on for a while, but that is no progress of the job.
            at_end = self._stopping.wait(POLL_SECONDS) or not self._cluster.running
            self._look(at_end)

    def _look(self, at_end: bool = False) -> None:
        with contextlib.suppress(OSError):  # the file is not there yet
            if self._pattern is None:
                assert self._file is not None
                self._note(self._file.stat().st_size)
                return
            for path in [self._file] if self._file else [node.log for node in [*self._cluster.nodes]]:
                for line in self._new_lines(path, at_end):
                    for match in self._pattern.finditer(line):
                        with contextlib.suppress(ValueError, TypeError):
                            self._note(int(float(match.group(1))))

    def _new_lines(self, path: Path, at_end: bool) -> list[str]:
        if not path.exists():
            return []
        with path.open("rb") as file:
            begin = self._read.get(path, 0)
            if os.fstat(file.fileno()).st_size < begin:  # written anew after a restart
                begin = 0
                self._parts.pop(path, None)
            file.seek(begin)
            new = file.read()
        self._read[path] = begin + len(new)
        *lines, rest = re.split(rb"[\r\n]", self._parts.pop(path, b"") + new)
        self._parts[path] = rest
        if at_end:
            lines.append(rest)
        return [line.decode(errors="replace") for line in lines]

    def _note(self, step: int) -> None:
        if step > self._most:
            self._most = step
            with self._record.open("a", encoding="utf-8") as record:
                record.write(json.dumps({"time": time.time(), "step": step}) + "\n")

    # For the nemesis. Attempts are not known from outside.

    def poll(self) -> bool:
        return True

    def newest_attempt(self) -> int | None:
        return 0

    def reached(self, attempt: int | None) -> int | None:
        return self._most if self._pattern is not None and self._most >= 0 else None

    def workers(self) -> Mapping[int, int]:
        return {}

    def world_size(self) -> int | None:
        return max([self._ranks, *(rank + 1 for rank in self._cluster.workers())])

    def attempt_of(self, rank: int | None, pid: int | None) -> int:
        return 0


def record(directory: Path) -> Path:
    """Folder in which a campaign notes what it did to a case's job and what it saw."""
    return directory / "record"


def observed(directory: Path) -> list[tuple[float, int]]:
    """(Unix time, step) whenever the job had come further than before."""
    path = record(directory) / "progress.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(entry["time"], entry["step"]) for entry in map(json.loads, lines)]


# What a job leaves, and what must hold


@dataclass(frozen=True)
class CommandReference:
    """The end of the job without faults."""

    result: str | float | None
    """None if the campaign names no result."""
    steps: int | None
    seconds: float
    leftovers: tuple[str, ...] = ()
    """Kinds of things that the job leaves behind by itself."""


@dataclass(frozen=True)
class CommandEvidence(Evidence):
    """A job with faults, as it is seen from outside. `run` is the record of its case."""

    reference: CommandReference  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def entries(self) -> list[Entry]:
        return []  # it has no event log


def result_of(command: Command, directory: Path, output: str) -> tuple[str | float | None, str]:
    """Return (the result of the job in this folder, ""), or (None, why it has none)."""
    wanted = command.file.result
    if wanted is None:
        return None, ""
    if wanted.file:
        path = command.path(wanted.file, directory / "run")
        try:
            content = path.read_bytes()
        except OSError as error:
            return None, f"{path} cannot be read: {error.strerror}"
        if not wanted.line and not wanted.number:
            return f"SHA-256 {hashlib.sha256(content).hexdigest()}", ""
        output = content.decode(errors="replace")
    pattern = wanted.line or wanted.number
    matches = [match for line in re.split(r"[\r\n]", output) for match in re.finditer(pattern, line)]
    if not matches:
        return None, f"no line matches {pattern!r}"
    last = matches[-1]
    text = str(last.group(1) if last.re.groups else last.group())
    if wanted.line:
        return text, ""
    try:
        return float(text), ""
    except ValueError:
        return None, f"{text!r} is no number"


def check(command: Command, evidence: CommandEvidence, output: str) -> list[Answer]:
    """An answer to each invariant of a campaign; to those that need the inside, "not applicable".

    `output` is that of the last start.
    """
    left = [leftover for leftover in evidence.leftovers if shape(leftover) not in evidence.reference.leftovers]
    given = {
        checker.FIRED: checker.every_fault_fired(evidence),
        EQUAL: _equal(command, evidence, *result_of(command, evidence.run.parent, output)),
        checker.CLEAN: checker.answer_of(checker.CLEAN, left),
        checker.RECOVERED: _recovered(command, evidence),
        checker.STATUS: checker.answer_of(
            checker.STATUS, checker.status_problems(evidence, explained=command.file.again_after)
        ),
    }
    asked = [EQUAL if name == checker.EQUAL else name for name in checker.INVARIANTS]
    return [given.get(name, Answer(name, NOT_ASKED, NEEDS_INSIDE)) for name in asked]


def shape(leftover: str) -> str:
    """Describe a thing left behind, without the part of its name that differs from start to start."""
    kind, _, name = leftover.partition(" ")
    # A temporary name ends with eight random characters.
    return kind if kind == "process" else f"{kind} {re.sub('[a-z0-9_]{8}(?=[.]|$)|[0-9]+', '', Path(name).name)}"


def _equal(command: Command, evidence: CommandEvidence, result: str | float | None, why: str) -> Answer:
    wanted, reference = command.file.result, evidence.reference
    if wanted is None:
        return Answer(EQUAL, NOT_ASKED, "the campaign names no result")
    if not evidence.launches or evidence.launches[-1]["status"] != EXIT_FINISHED:
        return Answer(EQUAL, "fail", "the job did not finish")
    if result is None:
        return Answer(EQUAL, "fail", why)
    if isinstance(result, float) and isinstance(reference.result, float):
        assert wanted.tolerance is not None
        difference = abs(result - reference.result)
        if difference <= wanted.tolerance:  # false for a NaN
            return Answer(EQUAL, "pass")
        said = f"{result:g} differs by {difference:g} from the reference run's {reference.result:g}"
        return Answer(EQUAL, "fail", f"{said}; {wanted.tolerance:g} is tolerated")
    if result == reference.result:
        return Answer(EQUAL, "pass")
    return Answer(EQUAL, "fail", f"{_short(result)} is not the reference run's {_short(reference.result)}")


def _short(result: Any) -> str:
    text = str(result)
    return text if len(text) <= 40 else f"{text[:39]}…"


def measure(command: Command, evidence: CommandEvidence) -> list[dict[str, Any]]:
    """For each fault that fired the keys of `checker.measure`; what needs the inside is None."""
    seen = observed(evidence.run.parent)
    return [
        dict.fromkeys(("detect_seconds", "detected_as", "attributed_correctly"))
        | {"index": firing.fault.index, "kind": firing.fault.kind.name, "victim": firing.first.victim}
        | {"step": firing.first.step, "fired": firing.time}
        | {"recover_seconds": _seconds_to_progress(command, evidence, firing.time, seen)}
        for firing in evidence.firings
    ]


def _seconds_to_progress(
    command: Command, evidence: Evidence, fired: float, seen: Sequence[tuple[float, int]]
) -> float | None:
    """Seconds from a fault until the job was further than ever before it, or had finished; None if neither came."""
    if command.file.progress is None:
        return None
    times = [when for when, _ in seen if when > fired + ON_ITS_WAY_SECONDS][:1]
    times += [launch["ended"] for launch in evidence.launches[-1:] if launch["status"] == EXIT_FINISHED]
    return max(0.0, min(times) - fired) if times else None


def _recovered(command: Command, evidence: CommandEvidence) -> Answer:
    progress = command.file.progress
    if progress is None:
        return Answer(checker.RECOVERED, NOT_ASKED, "the campaign does not say what progress is")
    if not evidence.firings:
        return Answer(checker.RECOVERED, "unknown", "no fault fired")
    problems = []
    for found in measure(command, evidence):
        seconds, name = found["recover_seconds"], found["kind"]
        if seconds is None:
            problems.append(f"{name}: no progress beyond that before it followed")
            continue
        # Faults that strike while the job comes back take their own time.
        meanwhile = sum(found["fired"] <= firing.time <= found["fired"] + seconds for firing in evidence.firings)
        bound = progress.within_seconds * max(1, meanwhile)
        if seconds > bound:
            problems.append(f"{name}: new progress came after {seconds:.1f} s, the bound is {bound:g} s")
    return checker.answer_of(checker.RECOVERED, problems)
