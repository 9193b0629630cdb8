"""The run directory: claimed by one job for one config, and described by its config.json.

RUN/config.json       resolved config, fingerprint, digest of the data, parent, versions, git commit
RUN/tokenizer.json    tokenizer of the run's token ids
RUN/lock              held by rank 0 of the job that is training
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import secrets
import subprocess
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trainer import files
from trainer.config import Config, differences, fingerprint, mathematics, parse, same_but_for_places
from trainer.errors import ConfigError, RunDirectoryError, of_system

FORMAT = 1
DYING_SECONDS = 3.0
SHARING_SECONDS = 10.0
"""Until what one node wrote is seen by the others: network file systems take a while."""
LEFT_BY_A_START = frozenset({"lock", "live", "stacks", "events", "quorum", "slurm", "islands", "config.json.partial"})
"""Names that a start, or `submit`, leaves in the directory before config.json is written: watchdogs come first."""
_KINDS = {"fingerprint": str, "data_sha256": str, "mathematics": dict, "config": dict}
"""Keys of config.json that every format has."""
LIBRARIES = ("torch", "numpy", "tokenizers", "datasets", "wandb")


def config_path(run: Path) -> Path:
    return run / "config.json"


def tokenizer_path(run: Path) -> Path:
    return run / "tokenizer.json"


def of_cluster(run: Path, cluster: int) -> Path:
    """The run directory of a cluster of islands that lives apart: the first one is the run itself."""
    return run / "islands" / f"cluster-{cluster}" if cluster else run


def is_run(path: Path) -> bool:
    """True if there is a config.json in this directory: that makes it a run, whatever its name."""
    return files.exists(config_path(path))


def claim(run: Path, config: Config) -> AbstractContextManager[object]:
    """Create `run` or adopt it for this config, and lock it until the returned context ends.

    The lock ends with this process too, however it dies. Raises RunDirectoryError if the directory belongs to another
    config, holds other files, is in use or cannot be written; then nothing in it has been changed.
    """
    try:
        return _claim(run, config)
    except OSError as error:
        rule, remedy = "Checkpoints and events go there.", "Give a --run that can be written."
        raise RunDirectoryError(of_system(error, f"{run} cannot be written", rule, remedy)) from None


def check(run: Path, config: Config) -> None:
    """Raise RunDirectoryError if the directory belongs to another config or holds other files. Changes nothing."""
    if run.exists() and not run.is_dir():
        raise RunDirectoryError(f"{run} is a file.\n  --run takes a directory: a new one, or a run's own.")
    if is_run(run):
        before = read(run)
        now = mathematics(config, before.get("parent"))
        is_own = before["fingerprint"] == fingerprint(config, before.get("parent"))
        # Whether a text that has moved is the same is known only when it has been read: `record` compares.
        if not is_own and not same_but_for_places(before["mathematics"], now):
            changes = "\n".join(f"    {line}" for line in differences(before["mathematics"], now))
            raise RunDirectoryError(
                f"{run} belongs to a run with other settings:\n{changes}\n"
                "  A run is a function of its config, so it cannot resume with another one. "
                "Undo the change, or give a new --run."
            )
    elif run.exists() and any(map(_is_foreign, run.iterdir())):
        raise RunDirectoryError(
            f"{run} holds files but no config.json, so it is no run.\n"
            "  A run is started in a new or empty directory, or resumed in its own. Give another --run."
        )


def check_out(out: Path, report: str) -> None:
    """Raise RunDirectoryError if a directory for a report holds anything but an earlier one, a file of that name."""
    if out.is_dir() and any(out.iterdir()) and not (out / report).exists():
        raise RunDirectoryError(f"{out} holds files but no {report}.\n  Give a new or empty --out.")


def _claim(run: Path, config: Config) -> AbstractContextManager[object]:
    check(run, config)
    try:
        run.mkdir(parents=True, exist_ok=True)
        # No soft lock: it is a mere file, which would keep the run locked after a SIGKILL.
        lock = FileLock(run / "lock", fallback_to_soft=False)
        lock.acquire(timeout=DYING_SECONDS)  # its owner may be ending: workers that have just lost their agent
    except Timeout:
        owner = owner_of(run) or "another job"
        raise RunDirectoryError(
            f"{run} is in use by {owner}.\n"
            "  Two jobs would write over each other. Wait for it, end it, or give another --run."
        ) from None
    with contextlib.suppress(OSError), open(run / "lock", "w", encoding="utf-8", opener=files.no_follow) as file:
        file.write(f"process {os.getpid()} on {platform.node()}\n")  # on a full disk, it holds without a name in it
    return lock


def owner_of(run: Path) -> str:
    """The process that has claimed a run; "" if nobody has, or it could not write its name."""
    try:
        return (run / "lock").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def check_shared(run: Path, owner: str) -> None:
    """Raise RunDirectoryError if this rank sees another directory than that of rank 0, which `owner` has claimed."""
    deadline = time.monotonic() + SHARING_SECONDS
    while owner and owner_of(run) != owner:
        if time.monotonic() > deadline:
            raise RunDirectoryError(
                f"{run} on {platform.node()} is not the directory that rank 0 has claimed ({owner}).\n"
                "  All ranks write parts of a checkpoint there. Give a --run on a file system that all nodes share."
            )
        time.sleep(0.1)


def versions() -> dict[str, str | None]:
    """Versions of Python and of libraries."""
    return {"python": platform.python_version()} | {library: _version(library) for library in LIBRARIES}


@functools.cache
def _version(library: str) -> str | None:
    """Version of a library; None where it is not installed, since some runs do without."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def recording(run: Path) -> AbstractContextManager[object]:
    """Hold off others that would write config.json of this run now: workers that prepare each for itself."""
    (run / "quorum").mkdir(parents=True, exist_ok=True)  # its launcher has made it for the arbiter's log
    return FileLock(run / "quorum" / "record.lock", fallback_to_soft=False)


def record(run: Path, config: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """Write config.json: `facts` (data_sha256, vocab_size, …) beside config and versions. Returns its contents.

    Raises RunDirectoryError if the run was trained on other data before.
    """
    before = read(run) if is_run(run) else {}
    # The data's digest is not part of the fingerprint: it is known only once the data are prepared.
    old, new = before.get("data_sha256"), facts["data_sha256"]
    if old not in (None, new):
        place = before["mathematics"].get("data.source")
        moved = f" (it was {place!r})" if place != config.data.source else ""
        raise RunDirectoryError(
            f"{run} was trained on data {old[:16]}…, and {config.data.source!r}{moved} now holds {new[:16]}….\n"
            "  A run is a function of its text, wherever that is. Restore it, or start a new --run."
        )
    parent = facts.get("parent")
    # A run keeps its fingerprint where its text has only moved: its checkpoints carry it.
    identity = before or {"fingerprint": fingerprint(config, parent), "mathematics": mathematics(config, parent)}
    contents = {
        "format": FORMAT,
        "run_id": before.get("run_id") or secrets.token_hex(8),
        "fingerprint": identity["fingerprint"],
        **facts,
        "mathematics": identity["mathematics"],
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "git_commit": git_commit(Path(__file__).resolve().parents[2]),
    }
    # Replaced as a whole: a run without a readable config.json could not be resumed.
    files.write(config_path(run), json.dumps(contents, indent=1, sort_keys=True) + "\n")
    return contents


def read(run: Path) -> dict[str, Any]:
    """Contents of config.json. Raises RunDirectoryError if `run` is no run, or one of a newer toprope."""
    try:
        contents = files.read_object(config_path(run))
        if contents["format"] > FORMAT:
            raise RunDirectoryError(
                f"{run} was written by a newer toprope (format {contents['format']}, this one reads {FORMAT}).\n"
                "  Use that version, or a new --run."
            )
        for name, kind in _KINDS.items():
            if not isinstance(contents.get(name), kind):
                raise files.NotJsonError(f"it holds no {name!r} of the right kind")
        return contents
    except (FileNotFoundError, NotADirectoryError):
        remedy = "Name the directory of a run, e.g. runs/smoke."
        raise RunDirectoryError(f"{run} is no run: it has no config.json.\n  {remedy}") from None
    except OSError as error:
        rule, remedy = "It says what the run is.", "Make it readable."
        raise RunDirectoryError(of_system(error, f"{config_path(run)} cannot be read", rule, remedy)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(run, error) from None


def _damaged(run: Path, why: object) -> RunDirectoryError:
    return RunDirectoryError(f"{config_path(run)} is damaged ({why}).\n  Restore it, or give a new --run.")


def fact(run: Path, name: str) -> int:
    """A number in config.json, such as vocab_size. Raises RunDirectoryError as `read`, or if there is none."""
    found = read(run).get(name)
    if not isinstance(found, int):
        raise _damaged(run, f"it holds no number {name!r}")
    return found


def step_timeout(contents: dict[str, Any]) -> float:
    """elastic.step_timeout_seconds of a config.json; today's default if another version wrote it without."""
    section = contents["config"].get("elastic")
    found = section.get("step_timeout_seconds") if isinstance(section, dict) else None
    return found if isinstance(found, int | float) else Config().elastic.step_timeout_seconds


def config_of(run: Path) -> Config:
    """The config that the run was last started with. Raises RunDirectoryError if this toprope refuses it."""
    try:
        return parse(read(run)["config"], check_rules=False)
    except ConfigError as error:
        raise RunDirectoryError(f"{config_path(run)} holds a config that this toprope refuses:\n{error}") from None


def _is_foreign(entry: Path) -> bool:
    """True for what is neither left by a start nor a hidden file, which a desktop puts into every directory."""
    return entry.name not in LEFT_BY_A_START and not (entry.name.startswith(".") and entry.is_file())


def git_commit(root: Path) -> str | None:
    """Commit of the source tree in `root`, with "+" if files were changed since; None if it is no checkout itself.

    An installed toprope lies in some environment that may lie in another repository.
    """
    if not (root / "pyproject.toml").is_file():
        return None
    # No repository above `root`, and none that the environment names: a git hook sets GIT_DIR to its own.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environ["GIT_CEILING_DIRECTORIES"] = str(root.parent)
    command = ["git", "-C", str(root), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5, env=environ)
    except (OSError, subprocess.SubprocessError):
        return None
    commit = re.search(r"^# branch\.oid (\w+)$", done.stdout, re.MULTILINE)
    return commit and commit[1] + ("+" if re.search("^[^#]", done.stdout, re.MULTILINE) else "")
