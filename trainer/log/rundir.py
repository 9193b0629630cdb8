"""The run directory: claiming it for one job and one config, and what it remembers about itself.

RUN/config.json       resolved config, fingerprint, digest of the data, versions, git commit
RUN/tokenizer.json    what the run's token ids mean
RUN/lock              held by rank 0 of the job that is training
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
from pathlib import Path
from typing import IO, Any

from trainer import files
from trainer.config import Config, differences, fingerprint, mathematics, parse
from trainer.errors import ConfigError, RunDirectoryError

FORMAT = 1
STARTS_LEAVE = frozenset({"lock", "live", "stacks", "events", "config.json.partial"})
"""What may lie in the directory of a run that was never prepared to the end: its watchdogs were there before."""
LIBRARIES = ("torch", "numpy", "tokenizers", "datasets", "wandb")


def config_path(run: Path) -> Path:
    return run / "config.json"


def tokenizer_path(run: Path) -> Path:
    return run / "tokenizer.json"


def claim(run: Path, config: Config) -> IO[str]:
    """Make `run` ours: create or adopt it, refuse another run's, and lock it while the returned file is open.

    Raises RunDirectoryError, having changed nothing in a directory that is not ours.
    """
    if run.exists() and not run.is_dir():
        raise RunDirectoryError(f"{run} is a file.\n  --run takes a directory: a new one, or a run's own.")
    if config_path(run).exists():
        _check_same_run(run, read(run), config)
    elif run.exists() and any(entry.name not in STARTS_LEAVE for entry in run.iterdir()):
        raise RunDirectoryError(
            f"{run} holds files but no config.json, so it is no run.\n"
            "  A run is started in a new or empty directory, or resumed in its own. Give another --run."
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(
            f"{run} cannot be written: {error.strerror}.\n  Checkpoints and events go there. Give a writable --run."
        ) from None
    return _hold(run, lock)


def record(run: Path, config: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """Write config.json: `facts` (data_sha256, vocab_size, …) beside config and versions. Returns all of it.

    Raises RunDirectoryError if the run was trained on other data before.
    """
    before = read(run) if config_path(run).exists() else {}
    old, new = before.get("data_sha256"), facts["data_sha256"]
    if old not in (None, new):
        raise RunDirectoryError(
            f"{run} was trained on data {old[:16]}…, and {config.data.source!r} now holds {new[:16]}….\n"
            "  A run is a function of its data too. Restore the files, or start a new --run."
        )
    contents = {
        "format": FORMAT,
        "run_id": before.get("run_id") or secrets.token_hex(8),
        "fingerprint": fingerprint(config),
        **facts,
        "mathematics": mathematics(config),
        "config": config.model_dump(mode="json"),
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in LIBRARIES},
        "git_commit": _git_commit(),
    }
    files.write(config_path(run), json.dumps(contents, indent=1, sort_keys=True) + "\n")
    return contents


def read(run: Path) -> dict[str, Any]:
    """What config.json says. Raises RunDirectoryError if `run` is no run."""
    try:
        contents = json.loads(config_path(run).read_text(encoding="utf-8"))
        if contents["format"] > FORMAT:
            raise RunDirectoryError(
                f"{run} was written by a newer toprope (format {contents['format']}, this one reads {FORMAT}).\n"
                "  Use that version, or a new --run."
            )
        return contents
    except (FileNotFoundError, NotADirectoryError):
        raise RunDirectoryError(
            f"{run} is no run: it has no config.json.\n  Name the directory of a run, e.g. runs/smoke."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{config_path(run)} is damaged ({error}).\n  Restore it, or give a new --run."
        ) from None


def config_of(run: Path) -> Config:
    """The config a run was last started with."""
    try:
        return parse(read(run)["config"])
    except ConfigError as error:
        raise RunDirectoryError(f"{config_path(run)} holds a config that this toprope refuses:\n{error}") from None


def _check_same_run(run: Path, before: dict[str, Any], config: Config) -> None:
    if before["fingerprint"] == fingerprint(config):
        return
    changes = "\n".join(f"    {line}" for line in differences(before["mathematics"], mathematics(config)))
    raise RunDirectoryError(
        f"{run} belongs to a run with other settings:\n{changes}\n"
        "  A run is a function of its config, so it cannot go on under another one. "
        "Undo the change, or give a new --run."
    )


def _hold(run: Path, lock: IO[str]) -> IO[str]:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when we die, however we die
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "another job"
        lock.close()
        raise RunDirectoryError(
            f"{run} is in use by {owner}.\n"
            "  Two jobs would write over each other. Wait for it, end it, or give another --run."
        ) from None
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
        lock.truncate(0)
        os.write(lock.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
    return lock


def _git_commit() -> str | None:
    """Commit of the source tree this runs from, with "+" if it was changed since; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5
        )
        status = subprocess.run(
            ["git", "-C", root, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True, timeout=5,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")
