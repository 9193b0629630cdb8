"""OUT/ladder.json: what was planned, when, and how the file was edited since. Written before the first run.

It decides nothing: which runs there are is read from the pool. It is there so that a criterion that was changed after
runs had finished can be told from one that was written down before.
"""

import json
import time
from collections.abc import Mapping
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
    """What a ladder file is compared with what was planned before."""

    first_planned: float
    """Unix time."""
    lines: list[str] = field(default_factory=list)
    """One for each setting that was edited."""
    kept: int = 0
    """Finished runs of before that are still wanted."""
    dropped: int = 0
    """Finished runs of before that are wanted no more."""

    def __str__(self) -> str:
        if not self.lines:
            return ""
        lost = f", {self.dropped} finished runs are wanted no more" if self.dropped else ""
        listed = "\n".join(f"  {line}" for line in self.lines)
        return f"The ladder file was edited since it was planned:\n{listed}\n{self.kept} finished runs are kept{lost}."


def path(out: Path) -> Path:
    return out / "ladder.json"


def read(out: Path) -> dict[str, Any] | None:
    """What was planned; None where nothing was. Raises RunDirectoryError if it is no such record."""
    try:
        tree = json.loads(path(out).read_text(encoding="utf-8"))
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
    """How the file differs from what was planned in OUT. Raises RunDirectoryError if OUT is another ladder's."""
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
    """Record the plan, and what was edited; returns that."""
    before, edits, now = read(out), compare(ladder, out, pool), time.time()
    criterion = ladder.criterion.to_json()
    if before is not None and not edits.lines:
        return edits
    finished = len(_finished((before or {}).get("runs", {}), pool))
    history = list((before or {}).get("criterion_history", []))
    if not history or history[-1]["criterion"] != criterion:
        history.append({"time": now, "criterion": criterion, "finished_runs": finished})
    edited = list((before or {}).get("edits", []))
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


def criterion_history(out: Path) -> list[dict[str, Any]]:
    """[{time, criterion, finished_runs}], oldest first: runs of the ladder that had finished when it was written."""
    return (read(out) or {}).get("criterion_history", [])


def _finished(runs: Mapping[str, str], pool: Path) -> list[str]:
    return [key for key in runs if StoredRun(pool / key).has_finished()]


def keep_speed(out: Path, known: Speed) -> None:
    """OUT/speed.json: what a few steps took, for the time left while nothing better is known."""
    out.mkdir(parents=True, exist_ok=True)
    files.write(out / "speed.json", json.dumps(known.to_json()) + "\n")


def speed_of(out: Path) -> Speed:
    try:
        return Speed.from_json(json.loads((out / "speed.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return speed.UNKNOWN
