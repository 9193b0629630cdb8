"""The files of a corpus, in an order that does not depend on the file system."""

import glob
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer import builtin, files
from trainer.data.identity import shown
from trainer.errors import CorpusError

# Python's tests hold bad encodings and broken syntax on purpose, and are twice as large as the library itself.
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
REPO_SKIPPED = {"__pycache__", "runs", "wandb", "build", "dist", "node_modules"}
REPO_SUFFIXES = {".py", ".md", ".toml"}


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str
    """Name in messages: relative to the source's root, or the path itself."""


def source_files(source: str) -> tuple[SourceFile, ...]:
    """Return the files of a local source ("python-stdlib", "repo", path, glob), sorted by name. Raises CorpusError."""
    if source == "python-stdlib":
        return _below(Path(sysconfig.get_path("stdlib")), lambda folder: folder.name in STDLIB_SKIPPED, {".py"})
    if source == "repo":
        return _below(repo_root(), _is_generated, REPO_SUFFIXES)
    return tuple(SourceFile(Path(name), shown(name)) for name in _matching(source))


def repo_root() -> Path:
    """Return this repository, or the installed package if there is no repository around it."""
    return builtin.ROOT if builtin.IN_CHECKOUT else builtin.PACKAGE


def _below(root: Path, is_skipped: Callable[[Path], bool], suffixes: set[str]) -> tuple[SourceFile, ...]:
    found: list[SourceFile] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not is_skipped(Path(folder, name))]
        inner = Path(folder).relative_to(root)
        # Every rank does this for a thousand files as it starts, so paths are made of those alone that are taken.
        for name in names:
            is_wanted = os.path.splitext(name)[1] in suffixes and not name.startswith(".")  # noqa: PTH122
            # Debian ships the standard library with a link that may be broken.
            if is_wanted and os.path.isfile(os.path.join(folder, name)):  # noqa: PTH113, PTH118
                found.append(SourceFile(Path(folder, name), (inner / name).as_posix()))
    return tuple(sorted(found, key=lambda file: file.name))


def _is_generated(folder: Path) -> bool:
    name = folder.name
    is_built = name in REPO_SKIPPED or name.endswith(".egg-info") or (folder / "pyvenv.cfg").exists()
    return is_built or name.startswith(".")


def _matching(pattern: str) -> list[str]:
    """Return the files that a path or glob names. An existing path is taken literally, even with glob characters."""
    try:
        expanded = Path(pattern).expanduser()
    except RuntimeError:
        raise CorpusError(
            f"{pattern} has no place: the home directory is not known.\n  Write the whole path, or set $HOME."
        ) from None
    if files.is_dir(expanded):
        raise CorpusError(
            f"{pattern} is a directory.\n"
            f"  A corpus is a file or a glob, so that it says what is read. Write e.g. {pattern.rstrip('/')}/*.txt."
        )
    if files.is_file(expanded):
        return [str(expanded)]
    if not glob.has_magic(pattern):
        raise CorpusError(
            f"{pattern} does not exist (from {Path.cwd()}).\n"
            '  A source is "python-stdlib", "repo", a path, a glob, or "hub:OWNER/NAME". Check the spelling.'
        )
    names = sorted(name for name in glob.glob(str(expanded), recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not names:
        raise CorpusError(
            f"{pattern} matches no file (from {Path.cwd()}).\n"
            "  A corpus needs at least one. Check the pattern; ** matches any depth of folders."
        )
    return names
