"""Names of the files by which clusters that live apart speak (post.py). No torch here: launchers import it."""

import contextlib
import shutil
from pathlib import Path

from trainer import files

START = "start"
"""Directory of the messages of the start; those of step 60 are in step-00000060."""
FORGOTTEN = "forgotten"
"""File: the step up to which messages have been removed."""
OVER = "over"
"""File: the exit status of the first cluster, once it has left in order."""


def directory_of(step: int) -> str:
    return f"step-{step:08d}" if step else START


def forget(place: Path, step: int) -> None:
    """Remove the messages up to `step`. A cluster that has begun before it must begin again, from a newer state."""
    files.write(place / FORGOTTEN, str(step))
    for path in place.glob("step-*"):
        if path.name <= directory_of(step):
            shutil.rmtree(path, ignore_errors=True)


def forgotten(place: Path) -> int:
    """The step up to which messages have been removed; 0 if none have."""
    with contextlib.suppress(FileNotFoundError):
        return int((place / FORGOTTEN).read_text(encoding="utf-8"))
    return 0


def newest_step(place: Path) -> int:
    """The last step of which the clusters have spoken."""
    return max((int(path.name.removeprefix("step-")) for path in place.glob("step-*")), default=0)


def over(place: Path) -> int | None:
    """Return the status with which the job has ended; None if it goes on."""
    with contextlib.suppress(FileNotFoundError):
        return int((place / OVER).read_text(encoding="utf-8"))
    return None
