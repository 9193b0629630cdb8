"""Checkpoints as files: names, manifest, commit, verification, retention. No torch here, so `inspect` starts fast.

A checkpoint is written into a hidden directory that no other process uses, made durable, described by a manifest, and
committed by one rename. Without a committed name it does not exist for any reader. One exception: if a checkpoint
replaces one of the same step, the old one is renamed to `.step-N.replaced` and counts until the new one has been read
back, so that there is always one of the two.
"""

import contextlib
import json
import os
import pickle
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import CheckpointError, NewerFormatError, NoCheckpointError, meaning, of_system
from trainer.files import is_dir, json_sha256, names, read_object, sha256, sync, write

FORMAT = 1
MANIFEST = "manifest.json"
_COMMITTED = re.compile(r"(?:step-([0-9]+)|\.step-([0-9]+)\.replaced)")
_LEFTOVER = re.compile(r"\.step-[0-9]+\.[0-9a-f]+\.(?:partial|pruned)")

ByteProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint with a committed name; not necessarily intact."""

    path: Path
    step: int

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())


def directory(run: Path) -> Path:
    return run / "checkpoints"


def final_path(run: Path, step: int) -> Path:
    return directory(run) / f"step-{step:08d}"


def committed(run: Path) -> list[Saved]:
    """Return a run's committed checkpoints, newest first. Raises CheckpointError if they cannot be listed."""
    found = []
    for path in _entries(directory(run)):
        match = _COMMITTED.fullmatch(path.name)
        if match and path.is_dir():
            found.append(Saved(path, int(match[1] or match[2])))
    return sorted(found, key=lambda saved: (-saved.step, _is_hidden(saved.path)))


def newest_first(*places: Path) -> list[Saved]:
    """Return the committed checkpoints of several places; of one step, those of the first place first."""
    return sorted((saved for place in places for saved in committed(place)), key=lambda saved: -saved.step)


def open_saved(path: Path) -> Saved:
    """Return the checkpoint in this directory, which "." or a link may name. Raises NoCheckpointError if it is none."""
    if not _COMMITTED.fullmatch(path.name):
        path = Path(os.path.realpath(path))
    match = _COMMITTED.fullmatch(path.name)
    if not (match and is_dir(path)):
        raise NoCheckpointError(
            f"{path} is no checkpoint.\n"
            "  They are directories: RUN/checkpoints/step-00000040. `python -m trainer inspect RUN` lists a run's."
        )
    return Saved(path, int(match[1] or match[2]))


def newest_intact(run: Path, report: Callable[[str], None] = lambda message: None) -> Saved | None:
    """Return the newest checkpoint that passes `verify`; damaged ones are reported and skipped.

    Raises NewerFormatError on meeting one that a newer toprope wrote.
    """
    for saved in committed(run):
        refuse_newer(saved)  # before verify, which would call it damaged
        problems = verify(saved)
        if not problems:
            return saved
        report(f"{saved.path.name} is damaged and passed over: {'; '.join(problems)}")
    return None


def verify(
    saved: Saved, progress: ByteProgress = lambda done, total: None, names: Collection[str] | None = None
) -> list[str]:
    """Return a checkpoint's problems, a line each; empty if it is intact. Nothing in it is executed.

    With `names`, only these files' contents are read. The step and the list of files are always checked. A file that
    the manifest does not list is no problem: no reader opens it (`unlisted` tells it).
    """
    try:
        manifest = read_manifest(saved)
    except CheckpointError as error:
        return [one_line(error)]
    problems = []
    # A directory copied under another name passes every checksum, so the step is compared as well.
    if manifest["step"] != saved.step:
        problems.append(f"{MANIFEST} is that of step {manifest['step']}")
    files: dict[str, dict[str, Any]] = manifest["files"]
    chosen = sorted(files if names is None else files.keys() & set(names))
    total, before = sum(files[name]["bytes"] for name in chosen), 0  # bytes, for the progress
    for name in chosen:
        start = before
        problem = _damage(saved, name, files[name], lambda done, start=start: progress(start + done, total))
        before += files[name]["bytes"]
        progress(before, total)
        if problem:
            problems.append(problem)
    return problems


def unlisted(saved: Saved) -> list[str]:
    """Return the names in a checkpoint's directory that its manifest does not list: a desktop's or a copier's files."""
    try:
        return sorted({path.name for path in _entries(saved.path)} - {MANIFEST} - read_manifest(saved)["files"].keys())
    except CheckpointError:
        return []


def read_manifest(saved: Saved) -> dict[str, Any]:
    """Return the body of a checkpoint's manifest. Raises CheckpointError (one line) if it is missing or damaged.

    Raises NewerFormatError if it is whole, but in a format that only a newer toprope reads.
    """
    try:
        manifest = read_object(saved.path / MANIFEST)
        body = manifest["body"]
        if json_sha256(body) != manifest["sha256"]:  # before the format: a flipped bit there is damage
            raise CheckpointError(f"{MANIFEST} does not match its own checksum")
        if body["format"] > FORMAT:
            raise NewerFormatError(
                f"{saved.path} was written by a newer toprope (format {body['format']}, this one reads {FORMAT}).\n"
                "  Resuming from an older one would overwrite its progress. Use that version, or a new --run."
            )
        if not _well_formed(body):
            raise CheckpointError(f"{MANIFEST} is not what a manifest looks like")
        return body
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged ({type(error).__name__})") from None


def refuse_newer(saved: Saved) -> None:
    """Raise NewerFormatError if a newer toprope wrote this checkpoint. Damage is left to `verify`."""
    try:
        read_manifest(saved)
    except NewerFormatError:
        raise
    except CheckpointError:
        pass


def stage(run: Path, step: int) -> Path:
    """Make a hidden directory to write the checkpoint of `step` into. Raises OSError.

    A run directory that has vanished (a disk that went away) is not made again: it would lie on another disk.
    """
    directory(run).mkdir(exist_ok=True)
    staging = directory(run) / f".step-{step:08d}.{secrets.token_hex(4)}.partial"
    staging.mkdir()
    sync(run)
    return staging


def clean(run: Path, progress: ByteProgress = lambda done, total: None) -> None:
    """Remove what saves of dead attempts left. The caller must hold the run's lock."""
    for path in _entries(directory(run)):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif _COMMITTED.fullmatch(path.name) and _is_hidden(path):
            successor = final_path(run, open_saved(path).step)
            # If its successor is damaged or missing, the replaced one may be the last that is intact.
            if successor.is_dir() and not verify(open_saved(successor), progress):
                _remove(path)


def write_manifest(staging: Path, body: Mapping[str, Any]) -> int:
    """Write `body` (step, identity, files) as a checkpoint's manifest. Returns its bytes. Raises OSError."""
    body = {"format": FORMAT, **body, "written": time.time()}
    content = json.dumps({"sha256": json_sha256(body), "body": body}, indent=1).encode()
    write(staging / MANIFEST, content)
    return len(content)


def commit(staging: Path, final: Path) -> None:
    """Give a complete checkpoint its name, durably. One of the same step is renamed out of the way. Raises OSError."""
    sync(staging)  # the names of its files, before it gets its own
    if final.exists():
        aside = _aside(final)
        if aside.exists():  # of an earlier replacement that was never read back
            _remove(aside)
        final.rename(aside)
    staging.rename(final)  # the commit: before it nothing, after it the whole checkpoint
    sync(final.parent)


def forget_replaced(final: Path) -> None:
    """Remove the checkpoint that `final` has replaced, once `final` has been read back."""
    if _aside(final).exists():
        _remove(_aside(final))


def discard(path: Path) -> None:
    """Remove a checkpoint or a staging directory; errors are ignored."""
    with contextlib.suppress(OSError):
        _remove(path)


def prune(run: Path, keep_last: int, keep_every_steps: int = 0, verified: Saved | None = None) -> list[str]:
    """Remove old checkpoints: keep the newest `keep_last` and those whose step `keep_every_steps` divides.

    Nothing is removed unless a newer one is known to be intact: `verified`, or else the newest that `verify` passes.
    Checkpoints after that one are damaged or were refused; the run replaces them when it gets there again. Returns
    what could not be removed, a line each.
    """
    newest = verified or newest_intact(run)
    if newest is None:
        return []
    problems, kept = [], 0
    for saved in committed(run):
        if saved.step > newest.step or _is_hidden(saved.path):  # `clean` removes hidden ones
            continue
        if kept < keep_last:
            kept += saved == newest or not verify(saved, names=())  # one with missing files is no fallback
        elif not (keep_every_steps and saved.step % keep_every_steps == 0):
            try:
                _remove(saved.path)
            except OSError as error:
                problems.append(f"{saved.path.name} cannot be removed: {one_line(error)}")
    return problems


def forget_cached(path: Path) -> None:
    """Ask the system to drop a durable file from the page cache, so that the next read is from disk. Best effort."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def one_line(error: BaseException) -> str:
    """Return an error as a reason inside another message; for an OSError, the system's words."""
    if isinstance(error, OSError) and error.strerror:
        where = f" ({Path(os.fsdecode(error.filename)).name})" if error.filename else ""
        return f"{error.strerror}{where}. {meaning(error)}".removesuffix(". ").removesuffix(".")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    is_readable = isinstance(error, CheckpointError | pickle.UnpicklingError)  # our own words
    return lines[0][:300] if is_readable else f"{type(error).__name__}: {lines[0][:300]}"


def _entries(path: Path) -> list[Path]:
    """List a directory. A missing one is empty; one that cannot be read must not look empty, so it raises."""
    try:
        return [path / name for name in names(path)]
    except OSError as error:
        rule = "The newest checkpoint may be in it."
        raise CheckpointError(of_system(error, f"{path} cannot be listed", rule, "Make it readable.")) from None


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _remove(path: Path) -> None:
    """Rename to a hidden name, then remove: no reader sees half a checkpoint. Raises OSError if renaming fails."""
    step = re.search("step-[0-9]+", path.name)
    assert step is not None
    doomed = path.with_name(f".{step[0]}.{secrets.token_hex(4)}.pruned")
    path.rename(doomed)  # if we die after this, `clean` does the rest
    shutil.rmtree(doomed, ignore_errors=True)


def _damage(saved: Saved, name: str, expected: Mapping[str, Any], progress: Callable[[int], None]) -> str | None:
    path = saved.path / name
    try:
        status = path.lstat()  # a link or a pipe is not followed: reading it might never end
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is no regular file"
        if status.st_size == 0 < expected["bytes"]:
            return f"{name} is empty"
        if status.st_size != expected["bytes"]:
            return f"{name} has {status.st_size} bytes instead of {expected['bytes']}{_origin(saved, path)}"
        if sha256(path, progress) != expected["sha256"]:
            return f"{name} does not match its checksum{_origin(saved, path)}"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def _origin(saved: Saved, path: Path) -> str:
    """Return a remark if the file belongs to another checkpoint of this run: a copy gone wrong."""
    actual = sha256(path)
    for sibling in sorted(saved.path.parent.glob("step-*")):
        with contextlib.suppress(CheckpointError):
            other = open_saved(sibling)
            if other != saved and any(file["sha256"] == actual for file in read_manifest(other)["files"].values()):
                return f": it is a file of step {other.step}"
    return ""


def _well_formed(body: Mapping[str, Any]) -> bool:
    return isinstance(body["step"], int) and all(
        "/" not in name and isinstance(file["bytes"], int) and isinstance(file["sha256"], str)
        for name, file in dict(body["files"]).items()
    )
