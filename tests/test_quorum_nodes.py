"""Workers of several nodes, and who may not join them: real launchers, one arbiter of its own, all on this machine."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.logs import Run
from tests.support import SMOKE, SMOKE_SHA256, start, summarise_run
from trainer import config as configs
from trainer import job, member, provenance
from trainer.config import parse
from trainer.errors import RunDirectoryError
from trainer.launch.forkserver import Child
from trainer.log import events
from trainer.log.events import MembersChanged, StepDone
from trainer.parallel import arbiter
from trainer.parallel.protocol import NOBODY, Arbiter, Hello, Refused, Send
from trainer.parallel.world import World

CPU = torch.device("cpu")


def identity() -> dict[str, str]:
    config = configs.load(SMOKE)
    claim = SimpleNamespace(computes_with=provenance.computes_with(config, CPU))
    facts = {"fingerprint": "f", "data_sha256": "d", "tokenizer_sha256": "t"}
    return member.identity(config, cast(job.Claim, claim), facts)


@pytest.mark.parametrize("name", ["code", "torch", "CPU capability", "fingerprint", "data_sha256", "tokenizer_sha256"])
def test_a_joiner_that_differs_in_what_decides_the_bits_is_refused_by_that(name: str):
    machine = Arbiter(wanted=1)
    machine.hello(Hello(None, "a", "127.0.0.1:1", identity()))
    other = identity() | {name: "another"}
    assert machine.hello(Hello(None, "b", "127.0.0.1:1", other)) == (
        None, [Send(NOBODY, Refused(f"its {name} is another, that of the job {identity()[name]}"))],
    )  # fmt: skip


def test_a_successor_whose_config_was_edited_meanwhile_is_refused_by_the_setting(run: Run):
    """It reads the file anew, and shares the run directory, whose fingerprint it would take for its own."""
    run.record()
    config = parse({"budget": {"steps": 60}, "optim": {"learning_rate": 0.5}, "wandb": {"mode": "disabled"}})
    with pytest.raises(RunDirectoryError, match=r"optim\.learning_rate"):
        member.prepare_claim(config, run.path, World(0, 1, CPU), False, "", False)


class Proxy:
    """A wire between workers and the arbiter that a test can cut."""

    def __init__(self, port: int) -> None:
        self._port, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._wires: list[tuple[bytearray, socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                with contextlib.suppress(ConnectionRefusedError):  # the arbiter is away
                    far = socket.create_connection(("127.0.0.1", self._port))
                    said = bytearray()
                    self._wires.append((said, near, far))
                    threading.Thread(target=self._pump, args=(near, far, said), daemon=True).start()
                    threading.Thread(target=self._pump, args=(far, near, bytearray()), daemon=True).start()
                    continue
                near.close()

    def _pump(self, source: socket.socket, sink: socket.socket, said: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                said += data
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut_workers(self) -> None:
        for said, near, _ in list(self._wires):
            if b'"Hello"' in said:
                with contextlib.suppress(OSError):
                    near.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        for _, near, far in self._wires:
            near.close()
            far.close()


@dataclass(frozen=True)
class Outcome:
    run: Path
    statuses: list[int]
    refused: tuple[int, str]
    """Exit status and errors of a node with another config."""
    cut: str
    """Errors of the node whose wire was cut."""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """Two nodes of one worker each. The arbiter is killed and started again; later one worker loses its connection.

    Meanwhile the other worker stands still, so that the job cannot be over before.
    """
    place = tmp_path_factory.mktemp("nodes")
    run, log = place / "run", place / "run" / "quorum" / "attempt-0000.jsonl"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def launch(name: str, *options: str | Path, run: Path = run, **variables: str) -> "subprocess.Popen[bytes] | Child":
        command = [sys.executable, "-m", "trainer", "launch", SMOKE, "--run", run, *options]
        process = start([*map(str, command)], place / f"{name}.txt", variables=variables)
        stack.callback(process.kill)
        return process

    def told(what: str) -> list[dict[str, Any]]:
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in records if record["what"] == what]

    def reached(step: int) -> bool:
        path = events.path_of(run, 0, 0)
        return path.exists() and f'"step": {step},' in path.read_text()

    with contextlib.ExitStack() as stack:
        serve = ["--workers", "2", "--arbiter-only", "--listen", f"127.0.0.1:{port}"]
        first_arbiter = launch("arbiter", *serve)
        wait_for(lambda: arbiter.address_path(run).exists(), "no arbiter")
        proxy = stack.enter_context(contextlib.closing(Proxy(port)))
        direct = launch("direct", "--workers", "1", "--join", f"127.0.0.1:{port}")
        through = launch("through", "--workers", "1", "--join", proxy.address)
        wait_for(lambda: reached(3), "no step")
        pids = {e.event.pid for e in events.read(run) if isinstance(e.event, events.AttemptStarted)}
        (pid,) = [pid for pid in pids if not any(f":{pid}".encode() in said for said, *_ in proxy._wires)]
        os.kill(pid, signal.SIGSTOP)

        first_arbiter.kill()
        first_arbiter.wait()
        again = launch("arbiter again", *serve)
        token = json.loads(arbiter.address_path(run).read_text())["token"]
        other = ["--workers", "1", "--join", f"127.0.0.1:{port}", "--set", "optim.learning_rate=0.5"]
        refused = launch("refused", *other, run=place / "elsewhere", **{arbiter.TOKEN: token})
        refusal = refused.wait(60)
        os.kill(pid, signal.SIGCONT)
        wait_for(lambda: len(told("epoch")) > 1, "the arbiter did not go on")

        wait_for(lambda: reached(20), "no further step")
        os.kill(pid, signal.SIGSTOP)
        before = len(told("worker"))
        proxy.cut_workers()
        wait_for(lambda: len(told("worker")) > before, "no successor")
        os.kill(pid, signal.SIGCONT)
        statuses = [process.wait(60) for process in (again, direct, through)]
        texts = {path.stem: path.read_text() for path in place.glob("*.txt")}
        yield Outcome(run, statuses, (refusal, texts["refused"]), texts["through"])


@pytest.mark.slow
def test_two_nodes_end_with_the_bits_of_a_calm_run_though_arbiter_and_a_connection_were_lost(outcome: Outcome):
    assert outcome.statuses == [0, 0, 0]
    summary = summarise_run(outcome.run)
    assert summary["weights_sha256"] == SMOKE_SHA256
    assert [attempt["ended"] for attempt in summary["attempts"]] == ["finished"]
    assert [event.step for _, event in events.select(events.read(outcome.run), StepDone)] == [*range(1, 61)]


@pytest.mark.slow
def test_a_worker_that_was_taken_for_dead_says_so_and_leaves_and_its_successor_joins(outcome: Outcome):
    assert re.search(r"RefusedError: .* worker \d was taken for dead, and the others went on without it", outcome.cut)
    changes = [event for _, event in events.select(events.read(outcome.run), MembersChanged)]
    (lost,) = [member for change in changes for member in change.lost]
    assert [member for change in changes for member in change.joined] == [3]
    assert lost in ("0", "2")


@pytest.mark.slow
def test_a_node_with_another_config_is_refused_by_its_fingerprint_with_the_status_of_wrong_usage(outcome: Outcome):
    status, errors = outcome.refused
    assert status == 2
    assert "RefusedError: this worker cannot take part: its fingerprint is" in errors, errors
