"""Files that others read while they are written again, and what the system or a damaged file says to that."""

import errno
import fcntl
import itertools
import json
import os
import stat
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.logs import Run
from trainer import cli, errors, files
from trainer.checkpoint import files as checkpoint
from trainer.config import Config
from trainer.data import cache, sources
from trainer.data.tokenizer import Tokenizer
from trainer.errors import TopropeError
from trainer.fleet import run_store
from trainer.log import events, rundir, summary
from trainer.sentinel.hang import HangFiles

TEXTS = [letter * (1 + 5000 * number) for number, letter in enumerate("abcdef")]


def test_several_writers_and_readers_at_once_see_one_whole_text_or_another(tmp_path: Path):
    path = tmp_path / "file.json"
    files.write(path, TEXTS[0])

    def write(number: int) -> None:
        files.write(path, TEXTS[number % len(TEXTS)])

    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(write, number) for number in range(100)]
        while not all(writer.done() for writer in writers):
            assert path.read_text() in TEXTS
    assert [writer.exception() for writer in writers] == [None] * 100
    assert list(tmp_path.iterdir()) == [path]


def test_remains_of_a_death_are_removed_by_the_next_write(tmp_path: Path):
    (tmp_path / ".file.0123abcd.partial").write_text("half of something longer")
    files.write(tmp_path / "file", "whole")
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {"file": "whole"}


def test_a_living_writers_file_is_not_taken_for_a_leftover(tmp_path: Path):
    living = tmp_path / ".file.0123abcd.partial"
    with living.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        files.write(tmp_path / "file", "whole")
        assert living.exists()
    (tmp_path / ".file2.0123abcd.partial").touch()
    files.write(tmp_path / "file", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file2.0123abcd.partial", "file"]


def test_a_link_in_the_place_of_a_file_to_write_is_not_followed(tmp_path: Path):
    dear, run = tmp_path / "thesis.txt", tmp_path / "run"
    dear.write_text("dear to somebody")
    for name in ("file", "file.partial", ".file.0123abcd.partial", "lock", "events/attempt-0000-rank-00000.jsonl",
                 *(f"live/attempt-0000-{name}" for name in ("rank-00000.partial", "rank-00000.stacks",
                                                            "rank-00000.forced", "requests"))):  # fmt: skip
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).symlink_to(dear)
    files.write(run / "file", "whole")
    assert (run / "file").read_text() == "whole" and not (run / "file").is_symlink()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "lock").symlink_to(dear)
    with pytest.raises(TopropeError, match="new cannot be written: Too many levels of symbolic links"):
        rundir.claim(tmp_path / "new", Config())
    log, seen = events.EventLog.open(run, 0, 0), []
    log.subscribe(seen.append)
    log.append(events.Warned(message="x"))
    watched = HangFiles(run, 0, 1, 0)
    watched.open()
    watched.request()
    watched.dump_trace(b"trace")
    watched.dump_stacks("stacks")
    assert dear.read_text() == "dear to somebody"


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "nested too deeply": (lambda path: path.write_text("[" * 100_000), "nested too deeply"),
    "an object nested too deeply": (lambda path: path.write_text('{"a":' * 100_000), "nested too deeply"),
    "another type": (lambda path: path.write_text("null"), "no object"),
    "a number": (lambda path: path.write_text("5"), "no object"),
    "not UTF-8": (lambda path: path.write_bytes(b'{"a": "\xff"}'), "not UTF-8"),
    "empty": (lambda path: path.write_text(""), "empty"),
    "a directory": (lambda path: path.mkdir(), "Is a directory"),
    "a pipe": (os.mkfifo, "regular file"),
    "a link in a circle": (lambda path: path.symlink_to(path), "circle"),
    "other keys": (lambda path: path.write_text("{}"), "holds no|damaged|no usable"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_json_that_is_none_is_told_with_file_and_remedy(tmp_path: Path, kind: str):
    make, reason = BROKEN[kind]
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(TopropeError, match=reason) as refused:
        rundir.read(tmp_path)
    assert str(path) in str(refused.value) and "\n  " in str(refused.value)
    if kind not in ("a directory", "a pipe", "a link in a circle"):
        with pytest.raises(TopropeError, match=r"no usable tokenizer.*\n  "):
            Tokenizer.load(path)


NO_EVENTS = [
    "null", "5", '"x"', "[" * 100_000, "{}", '{"event": []}', '{"event": "of_tomorrow"}',
    '{"event": "warning", "attempt": "x", "rank": 0, "time": 0, "message": ""}',
    '{"event": "warning", "attempt": 0, "rank": 0, "time": 0, "message": "", "new_key": ""}',
    '{"event": "warning", "attempt": 0, "rank": 0, "time": 0}',
    '{"event": "warning", "attempt": 0, "rank": 0, "time": 0, "message": 5}',
    '{"event": "warning", "attempt": 0.5, "rank": 0, "time": 0, "message": ""}',
]  # fmt: skip


@pytest.mark.parametrize("line", NO_EVENTS, ids=lambda line: line[-40:])
def test_a_line_that_is_no_event_is_told_with_file_line_and_remedy(run: Run, line: str):
    run.train(2)
    path = events.events_directory(run.path) / "attempt-0000-rank-00000.jsonl"
    number = path.read_text().count("\n") + 1
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(TopropeError, match=rf"{path.name}:{number} is no event.*\n  "):
        events.read(run.path)


def test_a_directory_in_the_place_of_a_log_is_told_with_its_name(run: Run):
    (events.events_directory(run.path) / "attempt-0009-rank-00000.jsonl").mkdir(parents=True)
    with pytest.raises(TopropeError, match=r"attempt-0009-rank-00000.jsonl cannot be read: Is a directory.*\n  "):
        events.read(run.path)


@pytest.mark.parametrize("config", [{}, {"elastic": {}}, {"elastic": 5}, {"elastic": {"step_timeout_seconds": "x"}}])
def test_a_config_with_keys_of_another_version_can_be_inspected(run: Run, config: dict[str, object]):
    run.train(2)
    contents = rundir.read(run.path) | {"config": config}
    files.write(rundir.config_path(run.path), json.dumps(contents))
    assert summary.summarise(run.path)["step"] == 2


@pytest.mark.parametrize(
    ("number", "meaning"),
    [(errno.EACCES, "keeps this user out"), (errno.ENOSYS, "locks"),
     (errno.EOPNOTSUPP, "locks"), (errno.EROFS, "read-only"),
     (errno.EDQUOT, "quota"), (errno.EIO, "disk")],
)  # fmt: skip
def test_a_refusal_of_the_system_is_reported_with_its_meaning_and_the_remedy(tmp_path, monkeypatch, number, meaning):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(TopropeError) as refused:
        rundir.claim(tmp_path / "run", Config())
    if number != errno.EACCES:  # of flock: held by another, on some file systems
        assert os.strerror(number) in str(refused.value) and meaning in str(refused.value)
        assert "Give a --run that can be written." in str(refused.value)
    assert meaning in errors.of_system(OSError(number, "x"), "f", "", "")
    files.write(tmp_path / "file", "whole")  # needs no lock
    assert (tmp_path / "file").read_text() == "whole"


LOCKS: dict[str, Callable[[Path], object]] = {
    "run": lambda path: rundir.claim(path, Config()),
    "cache": lambda path: cache.built_once(path, "store", Path.mkdir, cache.no_progress),
    "store of runs": lambda path: run_store.hold(path / "lock"),
}
"""Everything that locks a file in a folder."""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
@pytest.mark.parametrize("lock", LOCKS)
def test_a_file_system_without_locks_is_told_and_no_mere_file_stands_in_for_a_lock(tmp_path, monkeypatch, lock, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(TopropeError, match=r"cannot be (written|locked): .*\n  Its file system .*locks"):
        LOCKS[lock](tmp_path)


@pytest.mark.parametrize("lock", LOCKS)
def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path, lock):
    (tmp_path / ("store.lock" if lock == "cache" else "lock")).symlink_to(tmp_path / "made")
    with pytest.raises(TopropeError, match=r"Too many levels of symbolic links.*\n  It is a link where none"):
        LOCKS[lock](tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_file_system_that_makes_no_folder_durable_is_told(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TopropeError, match=r"Invalid argument.*\n  .*making the names in a folder durable.*cache_dir"):
        cache.built_once(tmp_path / "cache", "store", lambda path: None, cache.no_progress)
    with pytest.raises(OSError, match="Invalid argument") as refused:
        checkpoint.stage(tmp_path, 1)
    assert "making the names in a folder durable" in checkpoint.one_line(refused.value)


def test_what_is_no_file_is_neither_read_nor_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    before = {path: path.lstat().st_mode for path in tmp_path.iterdir()}
    for path, act in itertools.product(before, (files.read, lambda path: files.write(path, "x"))):
        with pytest.raises(OSError, match="regular file"):
            act(path)
    assert {path: path.lstat().st_mode for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/no-such-device", "/", "."])
def test_what_belongs_to_the_machine_is_not_replaced_whatever_it_is_linked_to(path: str):
    there = sorted(Path("/dev").iterdir())
    with pytest.raises(OSError, match=r"regular file|directory"):
        files.write(Path(path), "x")
    assert sorted(Path("/dev").iterdir()) == there


def test_names_that_no_file_can_have_are_refused_and_no_crash(monkeypatch, capsys, run: Run, tmp_path: Path):
    run.train(2)
    long = tmp_path / ("x" * 300)
    with pytest.raises(TopropeError, match="cannot be written: File name too long"):
        rundir.claim(long, Config())
    with pytest.raises(TopropeError, match="cannot be written: File name too long"):
        cache.built_once(long, "store", lambda path: None, cache.no_progress)
    for arguments in (
        ["inspect", long],
        ["verify", long],
        ["verify", "step-" + "1" * 300],
        ["plot", run.path, "--output", long],
    ):
        monkeypatch.setattr(sys, "argv", ["trainer", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code in (1, 2) and "\n  " in capsys.readouterr().err, arguments


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody whom a folder keeps out")
def test_a_folder_that_cannot_be_entered_is_refused_and_no_crash(tmp_path: Path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    os.seteuid(12345)
    try:
        for refused in (
            lambda: rundir.claim(closed / "runs" / "x", Config()),
            lambda: rundir.read(closed / "run"),
            lambda: cache.built_once(closed / "cache", "store", lambda path: None, cache.no_progress),
            lambda: Tokenizer.load(closed / "tokenizer.json"),
        ):
            with pytest.raises(TopropeError, match=r"Permission denied.*\n  .*keeps this user out"):
                refused()
    finally:
        os.seteuid(0)


def test_where_no_home_is_known_the_message_names_the_setting(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("TOPROPE_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without an entry in /etc/passwd
    assert files.home() is None
    with pytest.raises(TopropeError, match=r"home directory is not known.\n  .*data.cache_dir"):
        cache.cache_root("")
    for path in ("~/corpus.txt", "~nobody-known/corpus.txt"):
        with pytest.raises(TopropeError, match=r"home directory is not known.\n  "):
            sources.source_files(path)
        with pytest.raises(TopropeError, match=r"home directory is not known.\n  "):
            Tokenizer.load(Path(path))
