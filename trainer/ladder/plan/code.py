"""Arms that are code: `patch = "ideas/sine.diff"` or `commit = "abc123"`, against the package or the user's own files.

A tree is a folder with the package `trainer` in it, with the change made; the arm's runs are started with it. Trees and
changed files lie in the cache, under the digest of what they hold, and are made again where they are missing.
"""

import atexit
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import builtin, config_rules, files, own_code, provenance
from trainer import config as configs
from trainer.config import Config
from trainer.data.cache import built_once, cache_root, no_progress
from trainer.errors import ConfigError
from trainer.ladder.plan.schema import Arm

PACKAGE = builtin.PACKAGE.name
_FILES = re.compile(r"^(?:---|\+\+\+) [ab]/(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Change:
    """Code that an arm replaces."""

    tree: Path | None = None
    """Folder that holds the changed package."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """Settings that name the changed files of the user's own: {"model.class": …}."""


def read(arm: Arm, folder: Path, config: Config) -> Change:
    """Make the change of an arm of code. `folder` is the ladder file's. Raises ConfigError."""
    cache = cache_root(config.data.cache_dir) / "code"
    return _patched(folder / arm.patch, folder, config, cache) if arm.patch else _at(arm.commit, folder, config, cache)


def environment(tree: Path | None) -> dict[str, str]:
    """Return the environment that makes a process import the package of a tree."""
    if tree is None:
        return {}
    # Without PYTHONSAFEPATH, `python -m` looks into the current directory first, which may be a checkout.
    places = [str(tree), str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    checkout = {"TOPROPE_CHECKOUT": str(builtin.ROOT)} if builtin.IN_CHECKOUT else {}
    return {"PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"} | checkout


def digest(tree: Path | None) -> str:
    """Digest of the code that decides the bits, in a tree or in the package that runs; a tree's new files count."""
    return provenance.code_digest() if tree is None else _digest_of_tree(tree)


@functools.cache
def _digest_of_tree(tree: Path) -> str:
    added = {
        path.relative_to(tree / PACKAGE).as_posix(): own_code.digests_of(own_code.parse(path))
        for path in (tree / PACKAGE).rglob("*.py")
        if not (builtin.PACKAGE / path.relative_to(tree / PACKAGE)).exists()
    }
    return provenance.same_bits(own_code.digest_of(provenance.code(tree / PACKAGE) | added))


def digest_of_change(tree: Path | None, settings: Mapping[str, Any]) -> str:
    """Digest of an arm's package and of the user's own files that its settings name."""
    own = {key: own_code.digests(settings[key], key) for key in own_code.SETTINGS if key in settings}
    return own_code.digest_of([digest(tree) if tree else "", own])


def counts(tree: Path, model: configs.Model, vocab_size: int) -> tuple[int, int]:
    """(N, training FLOPs per token) of a model by the code of a tree, which this process has not imported."""
    counter = _counter(tree)
    assert counter.stdin is not None and counter.stdout is not None
    try:
        counter.stdin.write(json.dumps([model.model_dump_json(exclude_defaults=True), vocab_size]) + "\n")
        counter.stdin.flush()
        answer = json.loads(counter.stdout.readline() or '"it ended"')
    except (OSError, ValueError) as error:
        answer = str(error)
    if isinstance(answer, str):
        raise ConfigError([f"The changed package cannot make the model: {answer}.\n  Correct the patch."])
    return answer[0], answer[1]


_COUNT = """
import json, sys
from trainer import config
from trainer.ladder.plan import sizes
for line in sys.stdin:
    settings, vocab_size = json.loads(line)
    try:
        found = sizes.counts(config.Model.model_validate_json(settings), vocab_size)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    print(json.dumps(found), flush=True)
"""


@functools.cache
def _counter(tree: Path) -> "subprocess.Popen[str]":
    command, pipe = [sys.executable, "-c", _COUNT], subprocess.PIPE
    counter = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=os.environ | environment(tree)
    )
    atexit.register(counter.communicate)  # at the end of its input it ends
    return counter


def _patched(patch: Path, folder: Path, config: Config, cache: Path) -> Change:
    try:
        text = patch.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        remedy = "The path starts from the ladder's folder."
        raise ConfigError([f"patch = {str(patch)!r} cannot be read ({error}).\n  {remedy}"]) from None
    touched = set(_FILES.findall(text))
    if not touched:
        raise ConfigError([f"{patch} names no file.\n  Make it with `git diff`, or `diff -u a/FILE b/FILE`."])
    inside = {name for name in touched if name.startswith(f"{PACKAGE}/")}
    if inside and touched - inside:
        remedy = "An arm changes one of the two: the package, or files of your own."
        raise ConfigError([f"{patch} changes {PACKAGE}/ and {min(touched - inside)}.\n  {remedy}"])
    key = hashlib.sha256(text.encode()).hexdigest()

    def apply(target: Path) -> None:
        # Not the repository that the cache may lie in: git would look for the files from its root.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        environ["GIT_CEILING_DIRECTORIES"] = str(target.resolve().parent)
        command = ["git", "apply", "--whitespace=nowarn", str(patch.resolve())]
        done = subprocess.run(command, cwd=target, capture_output=True, text=True, check=False, env=environ)
        if done.returncode:
            why = (done.stderr.strip() or "git gave no reason").splitlines()[0]
            raise ConfigError([f"{patch} does not apply: {why}.\n  Make it again from the files as they are now."])

    def fill(target: Path) -> None:
        shutil.copytree(builtin.PACKAGE, target / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        apply(target)

    if not inside:
        return Change(own=_own(config, folder, cache, key, touched, apply))
    paths = {path.relative_to(builtin.PACKAGE).as_posix(): path for path in builtin.PACKAGE.rglob("*.py")}
    package = {name: files.sha256(path) for name, path in paths.items()}
    name = f"tree-{own_code.digest_of([package, key])}"
    return Change(tree=built_once(cache, name, fill, no_progress).resolve())


def _at(commit: str, folder: Path, config: Config, cache: Path) -> Change:
    """Take the package, or else files of the user's own, as they were at a commit."""
    if not re.fullmatch(r"[0-9a-f]{7,40}", commit):
        remedy = "A branch moves. Give at least 7 hex digits of a commit."
        raise ConfigError([f"commit = {commit!r} is no commit.\n  {remedy}"])
    if builtin.IN_CHECKOUT and (archive := _git(builtin.ROOT, "archive", commit, PACKAGE, "configs")) is not None:
        tree = built_once(cache, f"tree-{commit}", lambda target: _extract(archive, target), no_progress).resolve()
        if provenance.code(tree / PACKAGE) != provenance.code():
            return Change(tree=tree)

    found = _git(folder, "archive", commit, ".")
    if found is None:
        remedy = "It must be there, or in the checkout of toprope."
        raise ConfigError([f"commit = {commit!r} is not known in {folder}.\n  {remedy}"])
    return Change(own=_own(config, folder, cache, commit, set(), lambda target: _extract(found, target)))


def _git(where: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def _extract(archive: bytes, target: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(target, filter="data")


def _own(
    config: Config, folder: Path, cache: Path, key: str, touched: set[str], change: Callable[[Path], None]
) -> dict[str, str]:
    """Copy the user's own files that lie in `folder`, change them, and return the settings that name the changed ones.

    `touched` are the files that the change names; none: it may change any.
    """
    root, own = folder.resolve(), config_rules.own_names(config)
    places = {setting: own_code.find(name, setting) for setting, name in own.items()}
    places = {s: place for s, place in places.items() if not place.module and place.path.is_relative_to(root)}
    held = {file.relative_to(root): file for place in places.values() for file in own_code.files(place).values()}
    names = {name.as_posix() for name in held}
    if not names or (touched and not touched & names):
        fact = f"It changes {min(touched)}, which no run uses" if touched else "No run uses files of its folder"
        remedy = f"Name paths from the ladder's folder, or {PACKAGE}/ for the package."
        raise ConfigError([f"{fact} (files of its own: {', '.join(sorted(names)) or 'none'}).\n  {remedy}"])

    def fill(target: Path) -> None:
        for name, path in held.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
        change(target)

    contents = {name.as_posix(): files.sha256(path) for name, path in held.items()}
    copy = built_once(cache, f"own-{own_code.digest_of([key, contents])}", fill, no_progress).resolve()
    copied = {s: f"{copy / place.path.relative_to(root)}:{place.name}" for s, place in places.items()}
    return {s: name for s, name in copied.items() if own_code.digests(name, s) != own_code.digests(own[s], s)}
