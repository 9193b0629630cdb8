"""Promises about a run in Weights & Biases: what is shown, and that it costs training nothing."""

import contextlib
import fcntl
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from tests.logs import Run, ended, evaluated, killed, started, step
from tests.support import ROOT, wait_until
from trainer.config import Config, parse
from trainer.errors import ConfigError
from trainer.launch import processes
from trainer.log import rundir
from trainer.log.events import (
    CheckpointFailed,
    CheckpointSaved,
    EventLog,
    RankPace,
    StepDone,
    StopRequested,
    Warned,
    read,
)
from trainer.show import tensorboard, utilisation, wandb
from trainer.show.console import Console
from trainer.show.wandb import WandbHelper, wandb_mode

CONFIG: Config = parse({"budget": {"steps": 60}, "wandb": {"mode": "offline"}})
KEY = "0123456789" * 4
AUTO: Config = parse({"budget": {"steps": 60}})
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to list processes")


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory without a netrc, and no W&B settings in the environment."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("NETRC", raising=False)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return home


def shown(run: Run, config: Config = CONFIG, on_problem: Any = pytest.fail, **options: Any) -> WandbHelper:
    """W&B shows the run's next attempt."""
    return WandbHelper(run.path, config, run.attempt + 1, on_problem, **options)


def test_auto_is_online_only_with_a_key_in_the_environment_or_in_netrc_for_that_host(home: Path, tmp_path: Path):
    assert wandb_mode(AUTO, {}) == "offline"
    assert wandb_mode(AUTO, {"WANDB_API_KEY": "secret"}) == "online"
    (home / ".netrc").write_text("machine example.org login user password secret\ndefault login u password p\n")
    (home / ".netrc").chmod(0o600)
    assert wandb_mode(AUTO, {}) == "offline", "netrc's default entry is some other service's password"
    assert wandb_mode(AUTO, {"WANDB_BASE_URL": "https://example.org"}) == "online"
    other = tmp_path / "netrc"
    other.write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode(AUTO, {"NETRC": str(other)}) == "online"
    other.write_text("machine api.wandb.ai nonsense\n")
    assert wandb_mode(AUTO, {"NETRC": str(other)}) == "offline"


@pytest.mark.parametrize(
    "written",
    [
        "machine example.org login user password caf\xe9\n".encode("latin-1"),
        b"\xff\xfem\x00a\x00c\x00h\x00",
        bytes(range(256)),
    ],
    ids=["another service's password is not UTF-8", "UTF-16", "every byte"],
)
def test_a_netrc_of_any_bytes_is_as_good_as_none(home: Path, written: bytes):
    (home / ".netrc").write_bytes(written)
    assert wandb_mode(AUTO, {}) == "offline"
    (home / "_netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode(AUTO, {}) == "online", "the other place for it was not read"


def test_an_address_that_is_none_and_a_user_without_a_home_have_no_key(monkeypatch: pytest.MonkeyPatch):
    assert wandb_mode(AUTO, {"WANDB_BASE_URL": "http://[::1"}) == "offline"
    assert wandb_mode(AUTO, {"NETRC": "~no-such-user/netrc"}) == "offline"


def test_the_environments_mode_wins_and_a_misspelt_one_is_refused():
    assert wandb_mode(CONFIG, {"WANDB_API_KEY": "secret"}) == "offline"
    assert wandb_mode(CONFIG, {"WANDB_MODE": "disabled", "WANDB_API_KEY": "secret"}) == "disabled"
    assert wandb_mode(CONFIG, {"WANDB_MODE": "dryrun"}) == "offline"
    with pytest.raises(ConfigError, match="ofline"):
        wandb_mode(CONFIG, {"WANDB_MODE": "ofline"})


def test_disabled_starts_no_process(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with shown(run) as helper:
        run.start()
        assert helper.pid is None
    assert not (run.path / "wandb").exists()


def read_offline(run_directory: Path) -> list[dict[str, Any]]:
    """All metric records of a run's offline W&B files, in the order of the files' names."""
    return [row for _, rows in sorted(offline_records(run_directory, "history").items()) for row in rows]


def figures(rows: list[dict[str, Any]], name: str) -> list[Any]:
    """The points of a chart of `name` over the step."""
    return [(row["step"], row[name]) for row in rows if name in row]


def offline_records(run_directory: Path, kind: str) -> dict[str, list[dict[str, Any]]]:
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    found: dict[str, list[dict[str, Any]]] = {}
    for path in run_directory.glob("wandb/offline-run-*/*.wandb"):
        for blob in leveldb_records(path.read_bytes()):
            record = messages.Record.FromString(blob)
            if record.WhichOneof("record_type") == kind:
                part = getattr(record, kind)
                if kind == "alert":
                    found.setdefault(path.parent.name, []).append({"title": part.title, "text": part.text})
                    continue
                items = part.item if kind == "history" else part.config.update if kind == "run" else part.update
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                if kind == "run":
                    row["id"] = part.run_id
                found.setdefault(path.parent.name, []).append(row)
    return found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """W&B's file is a LevelDB log: 32 KiB blocks of (crc, length, type) records behind seven bytes of header."""
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_metrics_are_readable_back_from_the_offline_file(run: Run):
    with shown(run):
        run.start()
        for n in range(1, 61):
            text = 1_024 if n <= 50 else None  # the first epoch has 50 steps
            run.write(step(n, redone=int(n in (3, 5)), flushed=1e-5 if n == 60 else None, text_bytes=text))
        run.write(evaluated(60))
        run.write(evaluated(60, set="greek", bits_per_byte=None))
        run.write(ended())
    rows = read_offline(run.path)
    train = [row for row in rows if "train/loss" in row]
    assert figures(rows, "train/loss") == [(n, 5.0 - n / 100) for n in range(1, 61)]
    assert [row["exact/redone"] for row in train[:6]] == [0, 0, 1, 1, 2, 2]
    last = {key: value for key, value in train[-1].items() if not key.startswith("_")}
    assert last == {
        "step": 60,
        "run/attempt": 0,
        "train/loss": 4.4,
        "train/grad_norm": 1.25,
        "train/learning_rate": 1e-3,
        "train/tokens_per_second": 4_096,
        "train/tokens": 60 * 2_048,
        "exact/redone": 2,
        "exact/flushed": 1e-5,
    }
    assert "exact/flushed" not in train[0], "unknown is not zero"
    code = figures(rows, "train/code_bits_per_byte")
    assert len(code) == 50 and code[0] == (1, pytest.approx(2 * 4.99 / math.log(2), rel=1e-12))
    (scores,) = [row for row in rows if "eval/val/loss" in row]
    assert figures(rows, "eval/greek/loss") == [(60, 2.5)]
    assert not figures(rows, "eval/greek/bits_per_byte"), "unknown is not zero"
    assert (scores["step"], scores["eval/val/loss"], scores["eval/val/bits_per_byte"]) == (60, 2.5, 1.7)
    ((about,),) = offline_records(run.path, "run").values()
    assert about["id"] == rundir.read(run.path)["run_id"]
    assert about["fingerprint"] == rundir.read(run.path)["fingerprint"]
    assert about["budget"] == {"steps": 60}
    (summaries,) = offline_records(run.path, "summary").values()
    assert any(row.get("weights_sha256") == "a" * 64 for row in summaries)
    for name in ("run/incidents", "run/restarts", "run/lost_steps", "run/seconds_without_training"):
        assert figures(rows, name) == [(0, 0)], "there were no incidents, and it shows that"
    assert offline_records(run.path, "alert") == {}


def test_a_run_shows_its_restarts_what_they_cost_and_saves_that_failed(run: Run):
    run.start()
    for n in range(1, 48):
        run.write(step(n, redone=int(n in (3, 45))), after=1.0)
    run.write(CheckpointFailed(step=20, reason="EIO", in_a_row=1))
    with shown(run):
        run.start(40, after=1.0)
        run.write(killed())
        for n in range(41, 46):
            run.write(step(n, redone=int(n == 45)), after=1.0)
        run.write(CheckpointSaved(step=44, bytes=1, seconds=0.75, stall_seconds=0.25))
        run.write(CheckpointFailed(step=45, reason="No space left on device", in_a_row=1))
    rows = read_offline(run.path)
    text = "rank 1 was killed (SIGKILL) after step 47; resumed from step 40, 7 steps to replay; 3.0 s without training"
    failed = "the save of step 45 failed (No space left on device)"
    assert figures(rows, "run/attempt") == [(40, 1), *[(n, 1) for n in range(41, 46)]]
    assert figures(rows, "run/restarts") == [(47, 1), (45, 1)]
    assert figures(rows, "run/incidents") == [(47, 2), (45, 3)]
    assert figures(rows, "run/lost_steps") == [(47, 7), (45, 7)]
    assert figures(rows, "run/seconds_without_training") == [(47, 3.0), (45, 3.0)]
    assert figures(rows, "run/incident") == [(47, f"attempt 0: {text}"), (45, f"attempt 1: {failed}")]
    assert figures(rows, "checkpoint/failures") == [(44, 1), (45, 2)]
    assert figures(rows, "checkpoint/stall_seconds") == [(44, 0.25)]
    assert figures(rows, "exact/redone")[-2:] == [(44, 1), (45, 2)], "counts continue where the run was resumed"
    ((first, second),) = offline_records(run.path, "alert").values()
    assert first == {"title": "worker lost in attempt 0", "text": text}
    assert second == {"title": "save failed in attempt 1", "text": failed}


def is_killed(run: Run) -> None:
    run.fault("sigkill")


def is_preempted(run: Run) -> None:
    run.write(StopRequested(signal="SIGTERM", step=8))
    run.end("preempted", 8)


def fails(run: Run) -> None:
    run.write(CheckpointFailed(step=8, reason="EIO", in_a_row=1), rank=1)
    run.write(CheckpointFailed(step=8, reason="EIO", in_a_row=1))
    run.end("failed", 8, reason="EIO")


def restarts_twice_before_it_is_ready(run: Run) -> None:
    run.end("failed", 8, reason="lost a peer", rank=1)
    run.start(record=False)
    run.write(started(5), rank=1)
    run.start(record=False)
    run.write(started(5), rank=1)


def test_rows_are_numbered_on_after_a_kill_a_preemption_a_failure_and_starts_that_died(run: Run):
    first = 0
    endings = [is_killed, is_preempted, fails, restarts_twice_before_it_is_ready, lambda run: run.write(ended())]
    for end in endings:
        with shown(run):
            run.start(first)
            run.write(killed())
            run.steps(first + 1, 8)
            end(run)
        first = 5
    # Folders are named by the second.
    folders = sorted([row["_step"] for row in rows] for rows in offline_records(run.path, "history").values())
    assert len(folders) == len(endings)
    assert [number for numbers in folders for number in numbers] == list(range(sum(map(len, folders))))


def test_a_run_that_fails_raises_an_alert_with_the_reason(run: Run):
    with shown(run):
        run.start()
        run.end("failed", 7, reason="EIO")
    assert offline_records(run.path, "alert").popitem()[1] == [{"title": "attempt 0 failed", "text": "EIO"}]


def alive(pid: int) -> bool:
    return processes.stat(pid)[:1] not in ([], ["Z"])


def processes_of(leader: int) -> list[int]:
    """The helper and its living descendants; wandb-core opens a session of its own."""
    pids = [int(path.name) for path in processes.PROC.glob("[0-9]*")]
    parents = {pid: processes.stat(pid)[1:2] for pid in pids if alive(pid)}
    found = [leader] if leader in parents else []
    for pid in found:
        found += [child for child, parent in parents.items() if parent == [str(pid)]]
    return found


def processes_of_wandb(helper: WandbHelper) -> list[int]:
    """The processes of a helper that has started wandb-core."""
    leader = helper.pid or 0
    assert wait_until(lambda: len(processes_of(leader)) >= 2, 20)
    return processes_of(leader)


@needs_proc
def test_no_process_of_wandb_outlives_its_run(run: Run):
    with shown(run) as helper:
        run.start()
        started_by_us = processes_of_wandb(helper)
    assert wait_until(lambda: not any(alive(pid) for pid in started_by_us), 5)


@contextlib.contextmanager
def killed_trainer(run: Run) -> Iterator[int]:
    """The process id of a helper whose trainer is SIGKILLed, having logged a start, 40 steps and a save of step 35."""
    code = f"""if True:
        import time
        from tests.test_wandb import CONFIG, EventLog, Path, WandbHelper
        from tests.logs import saved, started, step
        log = EventLog.open(Path({str(run.path)!r}), 0, 0)
        helper = WandbHelper(Path({str(run.path)!r}), CONFIG, 0, on_problem=print)
        log.append(started())
        for n in range(1, 41):
            log.append(step(n))
        log.append(saved(35))
        print(helper.pid, flush=True)
        time.sleep(600)
    """
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environ, text=True) as trainer:
        assert trainer.stdout is not None
        helper = int(trainer.stdout.readline())
        yield helper
        trainer.kill()
        assert trainer.stdout.read() == ""  # the helper does not hold our output open: this would wait for it


@needs_proc
def test_a_killed_trainer_loses_nothing_that_it_logged_and_leaves_no_process(run: Run):
    with killed_trainer(run) as helper:
        pass  # killed at once, before the helper has read anything
    assert wait_until(lambda: not processes_of(helper), 20)
    rows = read_offline(run.path)
    assert [step for step, _ in figures(rows, "train/loss")] == list(range(1, 41))
    assert figures(rows, "checkpoint/seconds") == [(35, 0.1)]


@needs_proc
def test_the_run_continues_under_one_id_after_rank_0_was_killed(run: Run):
    with killed_trainer(run) as helper:
        assert wait_until(lambda: bool(list(run.path.glob("wandb/offline-run-*"))), 20)
    run.attempt, run.now = 0, time.time()
    with shown(run):
        run.start(35)
        run.steps(36, 42)
    assert not alive(helper), "two helpers would have written one run at once"
    runs = offline_records(run.path, "run")
    assert {row["id"] for rows in runs.values() for row in rows} == {rundir.read(run.path)["run_id"]}
    assert len(runs) == 2
    rows = read_offline(run.path)
    assert figures(rows, "train/loss") == [(n, 5.0 - n / 100) for n in (*range(1, 41), *range(36, 43))]
    assert figures(rows, "run/attempt")[-1] == (42, 1)
    assert figures(rows, "run/lost_steps") == [(0, 0), (40, 5)]


@needs_proc
def test_writers_that_follow_one_another_in_an_attempt_show_each_step_once(run: Run):
    """In quorum mode the main member dies and another goes on with the log. The helper of the dead one is late."""
    first = shown(run)
    run.start()
    run.steps(1, 20)
    assert wait_until(lambda: bool(list(run.path.glob("wandb/offline-run-*"))), 20)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)
    run.now += 1
    run.attempt -= 1  # as `shown` counts
    second = shown(run, since=run.now)
    run.attempt += 1
    run.steps(21, 30)
    os.kill(first.pid, signal.SIGCONT)
    first.close()
    run.steps(31, 40)
    run.write(ended())
    second.close()
    assert figures(read_offline(run.path), "train/loss") == [(n, 5.0 - n / 100) for n in range(1, 41)]
    runs = offline_records(run.path, "run")
    assert {row["id"] for rows in runs.values() for row in rows} == {rundir.read(run.path)["run_id"]}
    assert len(runs) == 2
    numbers = [row["_step"] for row in read_offline(run.path)]
    assert numbers == sorted(set(numbers)), "rows under a number that was given before are lost in an upload"


def test_a_helper_of_the_attempt_before_that_never_ends_is_not_waited_for_for_ever(run: Run):
    (run.path / "wandb").mkdir()
    with (run.path / "wandb" / "helper.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        problems: list[str] = []
        with shown(run, on_problem=problems.append, close_timeout_seconds=1.0):
            run.start()
        (problem,) = problems
        assert "not done after 1 s" in problem


def test_offline_nothing_is_sent_anywhere_and_no_key_is_written(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, address)
        with shown(run):
            run.start()
        with pytest.raises(TimeoutError):
            listener.accept()
    assert read_offline(run.path)
    assert not [path for path in run.path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def train_with(run: Path, config: Config = CONFIG, steps: int = 60) -> list[str]:
    """A pretended run with a real event log; returns the warnings in it."""
    rundir.record(run, config, {"data_sha256": "d" * 64})
    log = EventLog.open(run, 0, 0)

    def warn(message: str) -> None:
        log.append(Warned(message=message))

    with Console(config, run) as screen, WandbHelper(run, config, 0, on_problem=warn) as helper:
        log.subscribe(screen)
        log.subscribe(helper)
        log.append(started())
        for n in range(1, steps + 1):
            log.append(step(n))
        log.append(ended())
    log.close()
    events = [entry.event for entry in read(run)]
    assert sum(isinstance(event, StepDone) for event in events) == steps
    return [event.message for event in events if isinstance(event, Warned)]


def test_a_wandb_that_cannot_be_imported_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise ImportError('no such thing here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    (warning,) = train_with(tmp_path)
    assert "W&B stopped: ImportError: no such thing here. Training continues" in warning
    assert f"warning: {warning}" in capsys.readouterr().out


def test_a_directory_that_wandb_cannot_use_costs_one_warning(tmp_path: Path):
    (tmp_path / "wandb").write_text("a file")
    (warning,) = train_with(tmp_path)
    assert "File exists" in warning


@needs_proc
def test_an_online_wandb_that_never_answers_is_given_up_in_time(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    problems: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        helper = shown(run, AUTO, on_problem=problems.append, close_timeout_seconds=2.0)
        assert helper.mode == "online"
        run.start()
        started_by_us = processes_of_wandb(helper)
        before = time.monotonic()
        helper.close()
        assert time.monotonic() - before < 4.0
    assert wait_until(lambda: not any(alive(pid) for pid in started_by_us), 5)
    (problem,) = problems
    assert "not done after 2 s" in problem
    helper.close()
    assert len(problems) == 1


def test_a_helper_killed_in_the_middle_costs_one_warning_while_training_continues(run: Run):
    problems: list[str] = []
    with shown(run, on_problem=problems.append) as helper, contextlib.closing(EventLog.open(run.path, 0, 0)) as log:
        log.subscribe(helper)
        log.append(started())
        assert helper.pid is not None
        os.kill(helper.pid, signal.SIGKILL)
        time.sleep(0.1)
        for n in range(1, 10):
            log.append(step(n))
        (problem,) = problems
    assert "ended without a message" in problem
    assert len(problems) == 1


def test_a_helper_that_stands_still_does_not_slow_the_trainer(run: Run):
    problems: list[str] = []
    helper = shown(run, on_problem=problems.append, close_timeout_seconds=1.0)
    assert helper.pid is not None
    os.kill(helper.pid, signal.SIGSTOP)
    before = time.monotonic()
    with contextlib.closing(EventLog.open(run.path, 0, 0)) as log:
        log.subscribe(helper)
        for n in range(1, 4_000):
            log.append(step(n))
        assert time.monotonic() - before < 4.0
        helper.close()
    (problem,) = problems
    assert "not done after 1 s" in problem


def test_the_helper_starts_no_thread_and_leaves_the_environment_alone(run: Run):
    environ, threads = dict(os.environ), threading.active_count()
    with shown(run):
        run.start()
        assert (dict(os.environ), threading.active_count()) == (environ, threads)
        assert "wandb" not in sys.modules or sys.modules["wandb"].run is None


# TensorBoard, fed by the same follower


TENSORBOARD: Config = parse({"budget": {"steps": 60}, "wandb": {"mode": "disabled"}, "tensorboard": {"on": True}})


class FakeWriter:
    """Stand-in for tensorboard.summary.Writer: keeps what it is asked to write, by the folder that it writes to."""

    written: ClassVar[dict[str, list[tuple[str, float, int]]]] = {}

    def __init__(self, folder: str) -> None:
        self.rows = self.written.setdefault(Path(folder).name, [])

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.rows.append((name, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_tensorboard_gets_the_numbers_of_every_row_over_its_step_in_a_folder_of_the_attempt(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tensorboard.importlib, "import_module", lambda name: SimpleNamespace(Writer=FakeWriter))
    run.start()
    run.write(step(1, memory_bytes=7))
    run.write(evaluated(1))
    sinks = wandb.Sinks()
    sinks.sinks.append(tensorboard.TensorboardRun(run.path, 3))
    about = {"flops_per_token": 100, "config": {"numerics": {"precision": "bf16"}}}
    about |= {"computes_with": {"device model": "NVIDIA H100 80GB HBM3"}}
    metrics = wandb._Metrics(sinks, [], None, about)
    for entry in read(run.path):
        metrics.show(entry)
    rows = FakeWriter.written["attempt-0003"]
    assert ("train/loss", 4.99, 1) in rows and ("eval/val/loss", 2.5, 1) in rows and ("run/memory_bytes", 7, 1) in rows
    ((_, share, _),) = [row for row in rows if row[0] == "train/mfu"]
    size = next(value for name, value, _ in rows if name == "run/world_size")
    assert share == pytest.approx(100 * 2048 / 0.5 / (989e12 * size))
    assert not any(name == "step" for name, _, _ in rows)


def test_the_pace_of_every_rank_has_a_curve_with_its_node(run: Run):
    run.start(nodes=("n1", "n2"))
    for rank, node in enumerate(("n1", "n2")):
        run.write(RankPace(step=20, node=node, seconds_per_micro_batch=0.5 + rank), rank=rank)
    rows: list[dict[str, Any]] = []
    shown = SimpleNamespace(step=0, log=lambda row, step, commit: rows.append(row))
    metrics = wandb._Metrics(shown, [])
    for entry in read(run.path):
        metrics.show(entry)
    assert {"step": 20, "pace/n1/rank 0": 0.5} in rows and {"step": 20, "pace/n2/rank 1": 1.5} in rows


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12), ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA L40S", "fp32", 91.6e12), ("NVIDIA L40", "bf16", None), ("NVIDIA A10G", "bf16", None),
        ("NVIDIA RTX A1000 Laptop GPU", "bf16", None),
        ("NVIDIA L4", "bf16", 121e12), ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12), ("AMD EPYC 7B13", "bf16", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_device_is_known_by_its_name_or_unknown(device: str, precision: str, peak: float | None):
    about = {"computes_with": {"device model": device}, "config": {"numerics": {"precision": precision}}}
    assert utilisation.known(about) == (None, peak)
    assert utilisation.known({}) == (None, None)


def test_tensorboard_without_its_package_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'toprope\[tensorboard\]'"):
        tensorboard.check(TENSORBOARD)
    tensorboard.check(CONFIG)


def test_tensorboard_opens_what_the_helper_writes_and_wandb_is_left_alone(run: Run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with shown(run, TENSORBOARD):
        run.start()
        for n in range(1, 4):
            run.write(step(n))
        run.write(ended())
    assert not list(run.path.glob("wandb/offline-run-*"))
    opened = accumulator.EventAccumulator(str(run.path / "tensorboard" / "attempt-0000"))
    opened.Reload()
    assert [found.step for found in opened.Tensors("train/loss")] == [1, 2, 3]
