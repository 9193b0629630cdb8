"""OUT/ladder.json: the plan of a ladder, its date, and later edits of its file. Written before the first run.

It decides nothing; the runs are read from the pool. It shows whether a criterion was written down before the runs had
finished, or changed afterwards.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from trainer import config as configs
from trainer import files, provenance
from trainer.errors import RunDirectoryError
from trainer.fleet.run_store import StoredRun
from trainer.ladder.plan import load
from trainer.ladder.plan.ladder import Ladder
from trainer.ladder.plan.schema import AddedRuns
from trainer.ladder.stored import stored
from trainer.log import rundir

FORMAT = 1


class Addition(AddedRuns):
    """Runs that were added, with the reason."""

    look: int
    """Number of the look at the verdicts that they follow; the first is that of the ladder as planned."""
    time: float
    finished_runs: int
    probability: float
    """Probability that these runs settle the question of the arm, as estimated before they were made."""
    hours: float
    """Estimate of their duration."""


class Record(BaseModel):
    """Contents of ladder.json."""

    format: int = FORMAT
    name: str
    path: str
    first_planned: float
    """Unix time, as all times here."""
    criterion_history: list[dict[str, Any]] = []
    """{time, criterion, finished_runs} whenever the criterion changed."""
    edits: list[dict[str, Any]] = []
    """{time, lines, finished_runs} of each edit of the file."""
    settings: dict[str, Any] = {}
    additions: list[Addition] = []
    """Runs that the file does not ask for, in the order in which they were added."""
    code: dict[str, dict[str, str]] | None = None
    """Digests of the code that the runs are computed by; None in records of before it was recorded."""
    runs: dict[str, str] = {}
    """{key: name}"""


@dataclass(frozen=True)
class Edits:
    """Differences between a ladder file and the plan that was recorded."""

    lines: list[str] = field(default_factory=list)
    """One for each edited setting."""
    kept: int = 0
    """Number of finished runs of the old plan that the new one still wants."""
    dropped: int = 0
    """Number of finished runs of the old plan that the new one does not want."""

    def __str__(self) -> str:
        if not self.lines:
            return ""
        lost = f", {self.dropped} finished runs are no longer wanted" if self.dropped else ""
        listed = "\n".join(f"  {line}" for line in self.lines)
        fact = "The ladder file, or the code that computes its runs, was edited since it was planned:"
        return f"{fact}\n{listed}\n{self.kept} finished runs are kept{lost}."


def pool_of(out: Path) -> Path:
    """Store of the runs of all ladders beside OUT."""
    return out.parent / "pool"


def read(out: Path) -> Record | None:
    """Return the recorded plan; None if there is none. Raises RunDirectoryError if the file cannot be read as one."""
    path = out / "ladder.json"
    try:
        record = Record.model_validate(files.read_object(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        fact = f"{path} is no record of a ladder ({type(error).__name__}: {error})"
        raise RunDirectoryError(f"{fact}.\n  Move it away, or give another --out.") from None
    if record.format > FORMAT:
        raise RunDirectoryError(f"{path} was written by a newer toprope.\n  Use that, or give another --out.")
    return record


def compare(ladder: Ladder, out: Path) -> Edits:
    """Compare the ladder with the plan recorded in OUT. Raises RunDirectoryError if OUT is another ladder's."""
    before = read(out)
    if before is None and rundir.config_path(out).exists():
        raise RunDirectoryError(f"{out} is a training run's directory.\n  Give another --out.")
    if before is None:
        return Edits()
    if before.name != ladder.name:
        raise RunDirectoryError(
            f"{out} belongs to ladder {before.name!r}, and this one is {ladder.name!r}.\n  Give another --out."
        )
    finished, wanted = _finished(before.runs, out), _names(ladder, out)
    kept = sum(key in wanted for key in finished)
    lines = configs.differences(before.settings, ladder.settings)
    if before.code is not None:
        lines += provenance.code_changes(before.code, provenance.code())
    return Edits(lines, kept, len(finished) - kept)


def with_additions(ladder: Ladder, out: Path) -> Ladder:
    """Return the ladder with the runs that were added to it in OUT."""
    record = read(out)
    return load.extended(ladder, record.additions) if record is not None and record.name == ladder.name else ladder


def add(ladder: Ladder, out: Path, added: AddedRuns, probability: float, hours: float) -> Addition:
    """Record runs before they are made; `ladder` has them. Raises RunDirectoryError if OUT has no plan."""
    record = read(out)
    if record is None:
        raise RunDirectoryError(f"{out} has no plan.\n  Run the ladder first.")
    addition = Addition(
        **added.model_dump(), look=len(record.additions) + 1, time=time.time(), probability=probability, hours=hours,
        finished_runs=len(_finished(record.runs, out)),
    )  # fmt: skip
    record.additions.append(addition)
    record.runs = _names(ladder, out)
    files.write(out / "ladder.json", record.model_dump_json(indent=1) + "\n")
    return addition


def write(ladder: Ladder, out: Path) -> Edits:
    """Record the plan and its edits; return the edits."""
    recorded, edits, now = read(out), compare(ladder, out), time.time()
    if recorded is not None and not edits.lines:
        return edits
    record = recorded or Record(name=ladder.name, path="", first_planned=now)
    # History is only appended to, each entry with the number of runs whose results could be known by then.
    entry = {"time": now, "finished_runs": len(_finished(record.runs, out))}
    criterion = ladder.criterion.to_json()
    if not record.criterion_history or record.criterion_history[-1]["criterion"] != criterion:
        record.criterion_history.append(entry | {"criterion": criterion})
    if edits.lines:
        record.edits.append(entry | {"lines": edits.lines})
    record.path, record.settings, record.code = str(ladder.path), ladder.settings, provenance.code()
    record.runs = _names(ladder, out)
    out.mkdir(parents=True, exist_ok=True)
    files.write(out / "ladder.json", record.model_dump_json(indent=1) + "\n")
    return edits


def _names(ladder: Ladder, out: Path) -> dict[str, str]:
    """{key: name} of the ladder's runs; the key is that under which the pool has the run."""
    keys = ((run.key if run.members else stored(pool_of(out), run).directory.name, run.name)
            for run in [*ladder.runs, *ladder.sweep])  # fmt: skip
    return dict(keys)


def _finished(keys: Iterable[str], out: Path) -> list[str]:
    return [key for key in keys if StoredRun(pool_of(out) / key).has_finished()]
