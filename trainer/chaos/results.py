"""Results of a campaign: plain records, written as JSON and read back."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer import files
from trainer.errors import RunDirectoryError
from trainer.faults import checker
from trainer.faults.checker import Answer, Answers

Outcome = Literal["pass", "fail", "unknown", "undetected", "skipped", "not applicable"]
Table = dict[str, Any]
"""One [[faults]] table."""
_RENAMED = {
    "calm": "reference",
    "told_as": "detected_as",
    "named_rightly": "attributed_correctly",
    "named rightly": "attributed correctly",
}
"""Keys and invariants of reports of older versions, with their present names."""
_WORST_FIRST: tuple[Answers, ...] = ("fail", "undetected", "unknown")


@dataclass
class Setup:
    """All that decides one run of a campaign, as plain values."""

    name: str
    kinds: list[str]
    faults: list[Table]
    """plan.tree of each planned fault: all values that a fault could draw are in it."""
    ranks: int
    nodes: int
    strategy: str
    seed: int | None
    """Seed of the storm that drew the faults; None without a storm."""
    repeat: int
    overrides: list[str] = field(default_factory=list)
    """key=value of all settings beside config and faults."""
    limits: dict[str, float] = field(default_factory=dict)
    """timeout_seconds and restarts of the campaign; a run beyond them fails."""
    mode: str = "restart"
    """elastic.mode: "restart" under torchrun, "quorum" under `trainer launch`."""
    spares: int = 0
    transport: str = "tcp"
    """Transport of the connections between nodes: "tcp" or "mptcp"."""
    apart: bool = False
    """Clusters of islands live apart, under `trainer launch --islands`."""

    def values(self) -> dict[str, Any]:
        return {own.name: getattr(self, own.name) for own in dataclasses.fields(Setup)}

    def is_same_run_as(self, other: "Setup") -> bool:
        """True if both are the same run, whichever their repeats are."""
        return self.values() | {"repeat": 0} == other.values() | {"repeat": 0}


@dataclass(kw_only=True)
class Result(Setup):
    """One run of one case."""

    outcome: Outcome
    why: str
    """One line: the first of the worst answers, or the reason why the case was not run."""
    answers: list[Answer] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    """{started, ended, status} of each start of the job; Unix seconds."""
    measured: list[dict[str, Any]] = field(default_factory=list)
    """`checker.measure` of the run."""
    timeline: dict[str, Any] = field(default_factory=dict)
    """`log.timeline.read_timeline` of the run; {} if skipped."""
    run: str = ""
    """Run directory; "" if skipped."""
    seconds: float = 0.0
    commit: str = ""
    """git_commit of the run's config.json: the code that it was made with; "" if it is not known."""

    @property
    def was_made(self) -> bool:
        """False for a case whose job ended without a result: it is run again."""
        return bool(self.answers) or self.outcome != "unknown"


@dataclass
class Report:
    campaign: str
    question: str
    config: str
    machine: str
    started: float
    seconds: float
    reference: dict[str, Any]
    """{weights_sha256, state_sha256, steps, seconds, exact}; of a command also {result, leftovers}"""
    results: list[Result]
    interrupted: bool

    @property
    def passed(self) -> bool:
        """True if the campaign was not interrupted, and each case passed, was skipped or does not apply to the job."""
        good = ("pass", "skipped", checker.NOT_ASKED)
        return not self.interrupted and all(result.outcome in good for result in self.results)


def worst(answers: list[Answer]) -> Answer | None:
    """Return the first of the worst answers; None if all pass."""
    bad = (answer for wanted in _WORST_FIRST for answer in answers if answer.answer == wanted)
    return next(bad, None)


def outcome(answers: list[Answer]) -> tuple[Outcome, str]:
    """Return (the worst answer, its reason)."""
    if (bad := worst(answers)) is not None:
        return bad.answer, f"{bad.invariant}: {bad.why}"  # pyright: ignore[reportReturnType]
    return "pass", next((answer.why for answer in answers if answer.why and answer.answer == "pass"), "")


def to_json(report: Report) -> dict[str, Any]:
    return dataclasses.asdict(report) | {"passed": report.passed}


def from_json(tree: dict[str, Any]) -> Report:
    """Inverse of `to_json`; reads reports of older versions too."""
    known: dict[str, Any] = _renamed({key: value for key, value in tree.items() if key != "passed"})
    known["results"] = [_result_from_json(result) for result in tree["results"]]
    return Report(**known)


def _present(name: str) -> str:
    return _RENAMED.get(name, name)


def _renamed(tree: dict[str, Any]) -> dict[str, Any]:
    return {_present(key): value for key, value in tree.items()}


def _result_from_json(tree: dict[str, Any]) -> Result:
    measured, answers = [_renamed(fault) for fault in tree["measured"]], []
    for given in tree["answers"]:
        invariant, answer = _present(given["invariant"]), given["answer"]
        key = checker.MEASURED_AS.get(invariant)
        # Older versions wrote "pass" too where nothing was measured.
        unasked = answer == "pass" and key and all(fault.get(key) is None for fault in measured)
        answers.append(Answer(invariant, checker.NOT_ASKED if unasked else answer, given["why"]))
    run = tree["run"].replace("/cells/", "/cases/")  # see rename_old_layout
    return Result(**tree | {"answers": answers, "measured": measured, "run": run})


def read_result(path: Path) -> Result:
    """Read the result of one case, as it was written alone."""
    return _result_from_json(files.read_object(path))


def rename_old_layout(out: Path) -> None:
    """Rename the directories that an older version wrote in OUT to their present names."""
    for old, new in (("calm", "reference"), ("cells", "cases")):
        if (out / old).is_dir() and not (out / new).exists():
            (out / old).rename(out / new)


def write(path: Path, report: Report) -> None:
    """Replace the file as a whole: a reader during a campaign sees one state or the next."""
    files.write(path, json.dumps(to_json(report), indent=1))


def read(path: Path) -> Report | None:
    """Read a report; None if the file does not exist. Raises RunDirectoryError if it is no report."""
    try:
        return from_json(files.read_object(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirectoryError(
            f"{path} is no report of a campaign ({type(error).__name__}: {error}).\n"
            "  Move it away, or give another --out."
        ) from None
