"""The files of a corpus, in an order that does not depend on the file system."""

import glob
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
        return _below(Path(sysconfig.get_path("stdlib")), _stdlib_paths())
    if source == "repo":
        root = repo_root()
        return _below(root, _repo_paths(root))
    return tuple(SourceFile(Path(name), shown(name)) for name in _matching(source))


def repo_root() -> Path:
    """Return this repository, or the installed package if there is no repository around it."""
    package = Path(__file__).resolve().parents[1]
    return package.parent if (package.parent / "pyproject.toml").is_file() else package


def _below(root: Path, paths: Iterator[Path]) -> tuple[SourceFile, ...]:
    # Debian ships the standard library with a link that may be broken.
    files = [SourceFile(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    return tuple(sorted(files, key=lambda file: file.name))


def _stdlib_paths() -> Iterator[Path]:
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in STDLIB_SKIPPED]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _repo_paths(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _is_skipped(Path(folder, name))]
        yield from (Path(folder, name) for name in names if _is_repo_text(name))


def _is_skipped(folder: Path) -> bool:
    name = folder.name
    generated = name in REPO_SKIPPED or name.endswith(".egg-info") or (folder / "pyvenv.cfg").exists()
    return generated or name.startswith(".")


def _is_repo_text(name: str) -> bool:
    return Path(name).suffix in REPO_SUFFIXES and not name.startswith(".")


def _matching(pattern: str) -> list[str]:
    """Return the files that a path or glob names. An existing path is taken literally, even with glob characters."""
    try:
        expanded = Path(pattern).expanduser()
    except RuntimeError:
        raise CorpusError(
            f"{pattern} has no place: the home directory is not known.\n  Write the whole path, or set $HOME."
        ) from None
    if expanded.is_dir():
        raise CorpusError(
            f"{pattern} is a directory.\n"
            f"  A corpus is a file or a glob, so that it says what is read. Write e.g. {pattern.rstrip('/')}/*.txt."
        )
    if expanded.is_file():
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
