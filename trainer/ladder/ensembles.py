"""Scores of a ladder's ensembles, and configs of its runs that others teach.

Scores are made in one process of its own when the members have finished.

POOL/KEY/ensemble.json    what `ensemble --json` prints; KEY is that of the ensemble (plan/ladder.py)
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer import files
from trainer.config import Config
from trainer.errors import TopropeError
from trainer.ladder.plan.ladder import ENSEMBLE, PlannedRun, key_of_several
from trainer.ladder.stored import stored
from trainer.log import rundir, summary


def path_of(pool: Path, planned: PlannedRun) -> Path:
    """Return the place of an ensemble's scores."""
    key = key_of_several(ENSEMBLE, (stored(pool, member).directory.name for member in planned.members))
    return pool / key / "ensemble.json"


def read(pool: Path, planned: PlannedRun) -> dict[str, Any] | None:
    """Return an ensemble's scores; None before they are made."""
    try:
        return files.read_object(path_of(pool, planned))["ensemble"]
    except (OSError, ValueError, KeyError):
        return None


def score(pool: Path, planned: Iterable[PlannedRun]) -> None:
    """Score the ensembles whose members have all finished. Raises TopropeError with the reason if one cannot be."""
    wanted = [
        {"out": str(path_of(pool, one)), "runs": [str(stored(pool, member).run) for member in one.members]}
        for one in {one.key: one for one in planned if one.ensemble}.values()
        if read(pool, one) is None and all(stored(pool, member).has_finished() for member in one.members)
    ]
    if not wanted:
        return
    command, text = [sys.executable, "-m", "trainer.ladder.ensembles"], json.dumps(wanted)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["its process ended without a message"]
        remedy = "Its runs are kept; the next `ladder run` tries again."
        raise TopropeError(f"An ensemble could not be scored: {reason[0]}\n  {remedy}")


def with_teachers(pool: Path, planned: PlannedRun) -> Config:
    """Return the config of a run whose teachers have finished, with them in it; that of another run as it is."""
    if not planned.teachers:
        return planned.config
    runs = [stored(pool.absolute(), teacher).run for teacher in planned.teachers]
    named = {
        "runs": tuple(map(str, runs)),
        "weights_sha256": tuple(summary.summarise(run)["weights_sha256"] for run in runs),
    }
    return planned.config.model_copy(update={"distil": planned.config.distil.model_copy(update=named)})


def has_other_teachers(pool: Path, student: PlannedRun) -> bool:
    """True if the teachers were made anew, with other weights than those that this run learnt from."""
    learnt = rundir.config_of(stored(pool, student).run).distil.weights_sha256
    return set(learnt) != set(with_teachers(pool, student).distil.weights_sha256)


def main() -> None:
    """Score the ensembles that standard input names."""
    from trainer import ensemble

    for wanted in json.load(sys.stdin):
        try:
            tree = ensemble.describe([Path(run) for run in wanted["runs"]])
        except TopropeError as error:
            sys.exit(str(error).splitlines()[0])  # the fact; the remedy is that of `score`
        Path(wanted["out"]).parent.mkdir(parents=True, exist_ok=True)
        files.write(Path(wanted["out"]), json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
