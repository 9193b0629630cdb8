"""Files: written so that a reader sees the old content or the new, never a part; read as what they should be."""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class NotJsonError(ValueError):
    """A file is not the JSON that was expected of it; the message says why, in one line."""


def write(path: Path, content: str | bytes) -> None:
    """Replace the whole file `path`; text as UTF-8. Its content is on disk before it has its name. Raises OSError.

    Of several writers at once, the last one's content stays. A process that dies on the way leaves a hidden
    .NAME.….partial, which the next write removes. A link is replaced, not followed; a pipe or a device is neither.
    """
    if not path.name:  # "." and "/": there is no name that a new file could take
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # /dev/stdout is a link, to a regular file where a shell redirects it: that link is the machine's.
    if path.absolute().parent == Path("/dev") or (exists(path) and not (is_file(path) or is_dir(path))):
        raise OSError(errno.ENXIO, "it is no regular file", str(path))
    _remove_leftovers(path)
    while not _written(path, content.encode() if isinstance(content, str) else content):
        pass


def write_report(tree: Mapping[str, Any], out: Path) -> Path:
    """Write OUT/report.json; return its path. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    write(out / "report.json", json.dumps(tree, indent=1))
    return out / "report.json"


def sha256(path: Path, progress: Callable[[int], None] = lambda done: None) -> str:
    """Return the SHA-256 (hex) of a file's content. `progress` gets the number of bytes read so far."""
    sha, done = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(4 * 2**20):
            sha.update(chunk)
            done += len(chunk)
            progress(done)
    return sha.hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_follow(path: str | Path, flags: int) -> int:
    """Open a file that is not a link: `open(…, opener=no_follow)`. A link may lead out of the directory."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def home() -> Path | None:
    """Return the user's home; None if there is no $HOME and no entry in the password file, as in many containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def exists(path: Path) -> bool:
    """False also for a path that no file can have, or that lies below a folder that cannot be entered."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises in these cases before Python 3.14


def is_dir(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - as above


def is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - as above


def names(directory: Path, pattern: str = "*") -> list[str]:
    """Return the names in a directory that match, sorted; none if it is missing. Raises OSError if it cannot be read:
    `Path.glob` returns nothing then, and what is there would be written over."""
    try:
        return sorted(fnmatch.filter(os.listdir(directory), pattern))  # noqa: PTH208 - names are enough
    except FileNotFoundError:
        return []


def read(path: Path) -> bytes:
    """Read a regular file. Raises OSError, also for a pipe or a device: whoever opens one may wait forever."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.ENXIO, "it is no regular file", str(path))
        return file.read()


def json_sha256(tree: object) -> str:
    """Return the SHA-256 (hex) of a tree as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object. Raises NotJsonError if it holds anything else, and OSError."""
    return parse_object(read(path))


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object that `text` is. Raises NotJsonError if it is anything else."""
    try:
        tree = json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        raise NotJsonError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise NotJsonError(f"it is not UTF-8 from byte {error.start} on") from None
    except ValueError as error:
        raise NotJsonError(str(error) if text else "it is empty") from None
    if not isinstance(tree, dict):
        raise NotJsonError(f"it holds a {type(tree).__name__} and no object")
    return tree


def _written(path: Path, content: bytes) -> bool:
    """False if the new file vanished before it had its name."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        try:
            with contextlib.suppress(OSError):  # some file systems have no locks: there, leftovers stay
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        try:
            partial.replace(path)
        except FileNotFoundError:  # taken for a leftover before it was locked
            return False
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    return True


def _remove_leftovers(path: Path) -> None:
    """Remove what dead writers of `path` left: a living one holds the lock of its file."""
    leftover = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.partial")
    with contextlib.suppress(OSError):
        for name in filter(leftover.fullmatch, os.listdir(path.parent)):  # noqa: PTH208 - names are enough
            with contextlib.suppress(OSError), os.fdopen(no_follow(path.with_name(name), os.O_RDONLY)) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.with_name(name).unlink()
