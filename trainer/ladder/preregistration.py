"""OUT/ladder.json: the plan of a ladder, its date, and later edits of its file. Written before the first run.

It decides nothing; the runs are read from the pool. It shows whether a criterion was written down before the runs had
finished, or changed afterwards.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import config as configs
from trainer import files
from trainer.errors import RunDirectoryError
from trainer.fleet.run_store import StoredRun
from trainer.ladder import speed
from trainer.ladder.plan.ladder import Ladder
from trainer.ladder.speed import Speed
from trainer.log import rundir

FORMAT = 1


@dataclass(frozen=True)
class Edits:
    """Differences between a ladder file and the plan that was recorded."""

    first_planned: float
    """Unix time."""
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
        return f"The ladder file was edited since it was planned:\n{listed}\n{self.kept} finished runs are kept{lost}."


def path(out: Path) -> Path:
    return out / "ladder.json"


def read(out: Path) -> dict[str, Any] | None:
    """Return the recorded plan; None if there is none. Raises RunDirectoryError if the file cannot be read as one."""
    try:
        tree = files.read_object(path(out))
        if tree["format"] > FORMAT:
            raise RunDirectoryError(f"{path(out)} was written by a newer toprope.\n  Use that, or give another --out.")
        return tree
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{path(out)} is no record of a ladder ({type(error).__name__}: {error}).\n"
            "  Move it away, or give another --out."
        ) from None


def compare(ladder: Ladder, out: Path, pool: Path) -> Edits:
    """Compare the ladder with the plan recorded in OUT. Raises RunDirectoryError if OUT is another ladder's."""
    before = read(out)
    if before is None and rundir.config_path(out).exists():
        raise RunDirectoryError(f"{out} is a training run's directory.\n  Give another --out.")
    if before is None:
        return Edits(time.time())
    if before["name"] != ladder.name:
        raise RunDirectoryError(
            f"{out} belongs to ladder {before['name']!r}, and this one is {ladder.name!r}.\n  Give another --out."
        )
    finished = _finished(before["runs"], pool)
    wanted = {run.key for run in [*ladder.runs, *ladder.sweep]}
    kept = sum(key in wanted for key in finished)
    lines = configs.differences(before["settings"], ladder.settings)
    return Edits(before["first_planned"], lines, kept, len(finished) - kept)


def write(ladder: Ladder, out: Path, pool: Path) -> Edits:
    """Record the plan and its edits; return the edits."""
    recorded, edits, now = read(out), compare(ladder, out, pool), time.time()
    if recorded is not None and not edits.lines:
        return edits
    before: dict[str, Any] = {"runs": {}, "criterion_history": [], "edits": []} | (recorded or {})
    criterion = ladder.criterion.to_json()
    finished = len(_finished(before["runs"], pool))
    # History is only appended to, each entry with the number of runs whose results could be known by then.
    history, edited = list(before["criterion_history"]), list(before["edits"])
    if not history or history[-1]["criterion"] != criterion:
        history.append({"time": now, "criterion": criterion, "finished_runs": finished})
    if edits.lines:
        edited.append({"time": now, "lines": edits.lines, "finished_runs": finished})
    tree = {
        "format": FORMAT,
        "name": ladder.name,
        "path": str(ladder.path),
        "first_planned": edits.first_planned,
        "criterion_history": history,
        "edits": edited,
        "settings": ladder.settings,
        "runs": {run.key: run.name for run in [*ladder.runs, *ladder.sweep]},
    }
    out.mkdir(parents=True, exist_ok=True)
    files.write(path(out), json.dumps(tree, indent=1) + "\n")
    return edits


def _finished(keys: Iterable[str], pool: Path) -> list[str]:
    return [key for key in keys if StoredRun(pool / key).has_finished()]


def keep_speed(out: Path, measured: Speed) -> None:
    """Write OUT/speed.json: the duration of a few steps, from which time left is estimated before there are runs."""
    out.mkdir(parents=True, exist_ok=True)
    files.write(out / "speed.json", json.dumps(measured.to_json()) + "\n")


def speed_of(out: Path) -> Speed:
    """Read OUT/speed.json; UNKNOWN if there is none, or if it cannot be read."""
    try:
        return Speed.from_json(files.read_object(out / "speed.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return speed.UNKNOWN
