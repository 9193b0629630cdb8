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

Outcome = Literal["pass", "fail", "unknown", "undetected", "skipped"]
_RENAMED = {
    "calm": "reference",
    "told_as": "detected_as",
    "named_rightly": "attributed_correctly",
    "named rightly": "attributed correctly",
}
"""Keys and invariants of reports of older versions, with their present names."""
_WORST_FIRST: tuple[Answers, ...] = ("fail", "undetected", "unknown")


@dataclass
class Result:
    """One run of one case."""

    name: str
    kinds: list[str]
    faults: list[dict[str, Any]]
    """plan.tree of each planned fault."""
    ranks: int
    nodes: int
    strategy: str
    seed: int | None
    """Seed of the storm that drew the faults; None without a storm."""
    repeat: int
    outcome: Outcome
    why: str
    """One line: the first of the worst answers, or the reason why the case was skipped."""
    answers: list[Answer] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    """{started, ended, status} of each start of the job; Unix seconds."""
    measured: list[dict[str, Any]] = field(default_factory=list)
    """One entry for each fault that fired: {index, kind, victim, step, fired, detect_seconds, recover_seconds,
    detected_as, attributed_correctly}."""
    timeline: dict[str, Any] = field(default_factory=dict)
    """`log.timeline.read_timeline` of the run; {} if skipped."""
    run: str = ""
    """Run directory; "" if skipped."""
    seconds: float = 0.0
    overrides: list[str] = field(default_factory=list)
    """key=value of all settings beside config and faults."""
    limits: dict[str, float] = field(default_factory=dict)
    """timeout_seconds and restarts of the campaign at the time of the run."""


@dataclass
class Report:
    campaign: str
    question: str
    config: str
    machine: str
    started: float
    seconds: float
    reference: dict[str, Any]
    """{weights_sha256, state_sha256, steps, seconds, exact}"""
    results: list[Result]
    interrupted: bool

    @property
    def passed(self) -> bool:
        """True if the campaign was not interrupted, and each case passed or was skipped."""
        return not self.interrupted and all(result.outcome in ("pass", "skipped") for result in self.results)


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
    known = {_RENAMED.get(key, key): value for key, value in tree.items() if key not in ("passed", "results")}
    return Report(**known, results=[_result_from_json(result) for result in tree["results"]])


def _result_from_json(tree: dict[str, Any]) -> Result:
    answers = [
        Answer(**answer | {"invariant": _RENAMED.get(answer["invariant"], answer["invariant"])})
        for answer in tree["answers"]
    ]
    measured = [{_RENAMED.get(key, key): value for key, value in fault.items()} for fault in tree["measured"]]
    # Older versions wrote "pass" too where nothing was measured.
    for number, answer in enumerate(answers):
        key = checker.MEASURED_AS.get(answer.invariant)
        if answer.answer == "pass" and key and all(fault.get(key) is None for fault in measured):
            answers[number] = Answer(answer.invariant, checker.NOT_ASKED)
    run = tree["run"].replace("/cells/", "/cases/")  # see rename_old_layout
    return Result(**tree | {"answers": answers, "measured": measured, "run": run})


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{path} is no report of a campaign ({type(error).__name__}: {error}).\n"
            "  Move it away, or give another --out."
        ) from None
