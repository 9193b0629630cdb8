"""The launcher of `python -m trainer launch`: an arbiter and n workers, of which any may die without ending the others.

    launcher ── starts ──▶ arbiter (parallel/arbiter.py)      started again from its own log if it dies
             └─ starts ──▶ worker 0 … n-1, spares             one that dies is started again, as a newcomer

It holds the run directory, passes signals on, and leaves with the job's exit status. On another node, `join` starts
workers for the arbiter of this one.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from trainer import signals
from trainer.config import Config, check_world
from trainer.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_PREEMPTED,
    EXIT_QUARANTINED,
    EXIT_USAGE,
    ConfigError,
    WorldError,
)  # fmt: skip
from trainer.launch import forkserver
from trainer.log import events, rundir
from trainer.parallel import arbiter, elastic
from trainer.parallel.arbiter import Connection
from trainer.parallel.membership import LOST_SECONDS
from trainer.parallel.protocol import FAILED, FINISHED, End, Gone, Kill, Launcher, Message, Over, Progress, decode
from trainer.show import terminal

POLL_SECONDS = 0.02
IDLE_SECONDS = 0.5
"""Seconds between the launcher's looks round if nothing wakes it: the arbiter, a signal, or the end of a worker."""
STARTS = 3
"""A worker that dies so often in a row before it takes part is not started again. Nor is one in quarantine."""
RESTARTS_WITHOUT_PROGRESS = 3
"""So many restarts for each worker, without a step that is new, end the job: the error is repeated."""
RESTARTS_OF_ALL = 100
"""Most restarts of a job in which a death restarts all workers; an error that would only be repeated ends it before."""
ARBITER_STARTS = 5
"""The same of the arbiter."""
LEAVE_SECONDS = 30.0
"""Time for workers to leave once the job is over or a stop was asked for; then they are killed."""
EXIT_STATUS = {FINISHED: EXIT_FINISHED, "preempted": EXIT_PREEMPTED, FAILED: EXIT_FAILED}


@dataclass(frozen=True)
class Plan:
    """Workers to be started on this node, and their job."""

    config: Config
    command: Sequence[str]
    """Arguments of `-m trainer` for a worker."""
    run: Path
    workers: int
    spares: int = 0
    listen: str = "127.0.0.1:0"
    """Address where the arbiter listens."""
    join: str = ""
    """Address of another node's arbiter; empty: this launcher has its own."""
    module: str = "trainer"
    """Module that a worker runs."""

    @property
    def group_size(self) -> int:
        """Processes that are one member: those that share one copy of a model."""
        return self.config.parallel.shard_ranks if self.config.parallel.strategy == "hybrid" else 1

    @property
    def members(self) -> int:
        return self.workers // self.group_size


@dataclass
class Slot:
    """The place of a worker: whoever dies has a successor in it."""

    number: int
    process: Any = None
    name: str = ""
    starts_in_a_row: int = 0
    """Processes that ended before they took part."""
    took_part: bool = False
    is_given_up: bool = False
    status: int | None = None
    """Exit status of a worker that left in order."""


def launch(plan: Plan) -> int:
    """Run the job, or this node's share of it, and return its exit status. Raises TopropeErrors before any work."""
    check(plan)
    if plan.join:
        knock(plan)
    # Before there is a thread: workers are forked from a process that has imported torch.
    server = forkserver.fork(forkserver.PRELOADED) if is_cpu_only(plan.config) else None
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are about peers that leave
    failures_file = elastic.make_failures_file()
    with contextlib.ExitStack() as stack:
        stack.callback(failures_file.unlink, missing_ok=True)
        stack.callback(failures_file.with_suffix(".final").unlink, missing_ok=True)
        if plan.join:
            host = _Elsewhere(plan)
        else:
            stack.enter_context(rundir.claim(plan.run, plan.config))
            host = _Here(plan)
            stack.callback(host.close)
        job = Job(plan, host, server)
        stack.callback(job.close)
        return job.run()


def serve(plan: Plan) -> int:
    """Run the arbiter alone, for workers that join from other nodes; return the job's exit status.

    Started again with the same address, it goes on with the job that its log tells of.
    """
    check(plan)
    with contextlib.ExitStack() as stack:
        stack.enter_context(rundir.claim(plan.run, plan.config))
        host, port = parse_address(plan.listen)
        listener = arbiter.listen(host, port)
        attempt, token = _attempt_to_go_on(plan.run), token_of(plan.run)
        publish_address(plan.run, listener, token)
        log = arbiter.log_path(plan.run, attempt)
        server = arbiter.Server(log, listener, token, **_settings(plan, attempt))
        stack.callback(server.close)
        asked: list[int] = []
        for number in signals.heeded():
            signal.signal(number, lambda number, _: asked.append(number))
        over = server.serve(until=lambda: bool(asked))
        return EXIT_STATUS.get(over, EXIT_PREEMPTED)


def restarts_all(config: Config) -> bool:
    """True where a rank holds what no other one has: without it nobody can go on."""
    return config.parallel.strategy == "fsdp" or config.islands.count > 0


def _why(config: Config) -> str:
    return "[islands]" if config.islands.count else f'parallel.strategy = "{config.parallel.strategy}"'


def become_torchrun(plan: Plan) -> NoReturn:
    """Say that a death will restart all workers, and run torchrun on this node in the place of this process.

    Raises TopropeErrors before any work.
    """
    if plan.spares or plan.join or plan.listen != Plan.listen:
        check(plan)
    check_world(plan.config, plan.workers)
    rundir.check(plan.run, plan.config)
    checkpoints = plan.config.checkpoint
    state = f"from a copy in memory, made every {checkpoints.memory_every_steps} steps"
    if not checkpoints.memory_every_steps:
        state = "from the newest checkpoint on disk; with checkpoint.memory_every_steps from a newer copy in memory"
    terminal_line(
        f"{_why(plan.config)}: each worker holds what no other one has, so a death restarts all {plan.workers}, "
        f"{state}." + (" --islands N starts clusters that live apart." if plan.config.islands.count else "")
    )
    command = ["--standalone", f"--nproc-per-node={plan.workers}", f"--max-restarts={RESTARTS_OF_ALL}"]
    torchrun = [sys.executable, "-m", "trainer.launch.torchrun", *command]
    os.execv(sys.executable, [*torchrun, "-m", plan.module, *plan.command])


def check(plan: Plan) -> None:
    """Raise ConfigError for a config that cannot go on when a worker dies, and what else is wrong before any work."""
    problems = []
    if restarts_all(plan.config):
        problems.append(
            f"{_why(plan.config)} needs every rank for every step: a death restarts all, so there is no arbiter, no "
            "worker joins, and none waits as a spare.\n"
            "  Leave out --spares, --listen, --join and --arbiter-only; on several nodes start torchrun. Or "
            + ("leave [islands] out." if plan.config.islands.count else 'set parallel.strategy = "replicate".')
        )
    if plan.config.checkpoint.memory_every_steps and not restarts_all(plan.config):
        problems.append(
            "checkpoint.memory_every_steps has no effect here: the state is in the memory of every worker already.\n"
            "  Leave it out."
        )
    if not plan.config.numerics.exact:
        problems.append(
            "numerics.exact = false makes sums depend on who adds what, so a death would change the result.\n"
            "  Start it by torchrun, or set numerics.exact = true."
        )
    if problems:
        raise ConfigError(problems)
    check_world(plan.config, plan.workers)
    if plan.spares % plan.group_size:
        raise ConfigError(
            [
                f"--spares {plan.spares}: parallel.shard_ranks = {plan.group_size} processes take a place together.\n"
                f"  Give a multiple of {plan.group_size}."
            ]
        )
    parse_address(plan.join or plan.listen)
    if not plan.join:
        rundir.check(plan.run, plan.config)
    else:
        token_of_others(plan.run)


def knock(plan: Plan, patience_seconds: float = LOST_SECONDS) -> None:
    """Return once the arbiter of another node has answered. Raises WorldError if there is none that knows the token.

    Nodes may start in any order, and an arbiter may be on its way back: it is waited for. Whoever closes the connection
    is not, so a tunnel must lead to an arbiter: that is how one refuses a wrong token.
    """
    address, token, until = parse_address(plan.join), token_of_others(plan.run), time.monotonic() + patience_seconds
    while True:
        with contextlib.suppress(OSError):
            connection = Connection(socket.create_connection(address, timeout=5.0))
            connection.heard = True
            with contextlib.closing(connection):
                connection.send_line({"token": token})
                connection.send(Launcher(platform.node(), 0))
                arbiter.wait_readable(5.0, connection.sock)
                try:
                    if any(isinstance(decode(line), Progress) for line in connection.lines()):
                        return
                except (EOFError, ValueError):
                    raise WorldError(
                        f"{plan.join} has closed the connection: it does not know this token, or is no arbiter.\n"
                        "  An arbiter hears only those with its run's token. Name the run directory that it trains in "
                        f"by --run, or set {arbiter.TOKEN} to the token in RUN/quorum/address.json there."
                    ) from None
        if time.monotonic() > until:
            raise WorldError(
                f"no arbiter has answered at {plan.join} for {patience_seconds:g} s.\n"
                "  Start the job on its node first: python -m trainer launch CONFIG --workers N --listen HOST:PORT. "
                "Check the address and firewalls."
            )
        time.sleep(0.2)


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port). Raises WorldError for what is no HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise WorldError(f"{text!r} is no address.\n  Give HOST:PORT, e.g. 10.0.0.1:29400.")
    return host.strip("[]"), int(port)


class _Elsewhere:
    """The arbiter of another node."""

    def __init__(self, plan: Plan) -> None:
        self.address = parse_address(plan.join)
        self.token = token_of_others(plan.run)

    def has_died(self) -> bool:
        return False  # nobody here knows

    def revive(self) -> None:
        raise NotImplementedError  # whoever started it does it

    def close(self) -> None:
        pass


class _Here:
    """The arbiter's process. Its socket is opened here, so that workers can connect while it starts again."""

    def __init__(self, plan: Plan) -> None:
        self._listener = arbiter.listen(*parse_address(plan.listen))
        host, port = self._listener.getsockname()[:2]
        # Workers of this node reach an arbiter that listens everywhere at this machine's own address.
        self.address = ("127.0.0.1" if host in ("0.0.0.0", "::") else host), port
        self.token = token_of(plan.run)
        publish_address(plan.run, self._listener, self.token)
        attempt = events.next_attempt(plan.run)
        log = arbiter.log_path(plan.run, attempt)
        log.unlink(missing_ok=True)  # left by a start after which nobody trained
        self._settings = _settings(plan, attempt) | {"descriptor": self._listener.fileno(), "log": str(log)}
        self._address_file = arbiter.address_path(plan.run)
        self.process = self._start()

    def has_died(self) -> bool:
        return self.process.poll() is not None

    def _start(self) -> "subprocess.Popen[bytes]":
        variables = {arbiter.SETTINGS: json.dumps(self._settings), arbiter.TOKEN: self.token}
        return subprocess.Popen(
            [sys.executable, "-m", arbiter.__name__], env=os.environ | variables, stdin=subprocess.DEVNULL,
            pass_fds=[self._listener.fileno()], start_new_session=True,
        )  # fmt: skip

    def revive(self) -> None:
        """Start it again."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def close(self) -> None:
        self._listener.close()
        self._address_file.unlink(missing_ok=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)
        self.process.kill()
        self.process.wait()


class GroupOfProcesses:
    """Processes that are one worker: none lives on without the others."""

    def __init__(self, processes: Sequence[Any], meeting: "tempfile.TemporaryDirectory[str]") -> None:
        self._processes, self._meeting = processes, meeting
        self._first_status: int | None = None
        """Exit status of the process that was the first to end in disorder."""
        self.failed = 0
        """Place of that process."""

    @property
    def pid(self) -> int:
        """Process id of the first process, which speaks for all."""
        return self._processes[0].pid

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def poll(self) -> int | None:
        """The exit status, once all have ended: that of the one that ended the others, if one did."""
        statuses = [process.poll() for process in self._processes]
        disorderly = [status for status in statuses if status not in (None, EXIT_FINISHED, EXIT_PREEMPTED)]
        if disorderly and self._first_status is None:
            self._first_status = next((status for status in disorderly if status < 0), disorderly[0])
            self.failed = statuses.index(self._first_status)
            self.kill()
        if None in statuses:
            return None
        self._meeting.cleanup()
        return self._first_status if self._first_status is not None else max(statuses)

    def send_signal(self, number: int) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> None:
        """Return once all have ended."""
        for process in self._processes:
            process.wait()
        self._meeting.cleanup()


class Job:
    """The workers of this node, and their job's arbiter as it is seen from here."""

    def __init__(self, plan: Plan, host: "_Here | _Elsewhere", server: forkserver.ForkServer | None) -> None:
        self._plan, self._host, self._server = plan, host, server
        self._node = f"{platform.node()}-{secrets.token_hex(3)}"
        self._slots = [Slot(number) for number in range(plan.members + plan.spares // plan.group_size)]
        self._dead: dict[str, str] = {}
        """By name: how the workers that are gone have ended; told to an arbiter that starts again."""
        self._connection: Connection | None = None
        self._lost_at: float | None = None
        """When the connection was lost; None once the arbiter has said something since."""
        self._has_begun = False
        """True once workers of this node have taken part."""
        self._highest_step = self._restarts = self._arbiter_starts = 0
        self._over, self._reason = "", ""
        self._status: int | None = None
        self._kill_at: float | None = None
        self._stop = signals.PassedOn(self._signal_all)

    def run(self) -> int:
        self._stop.listen()
        self._connect()
        for slot in self._slots:
            self._start(slot)
        while any(slot.process is not None for slot in self._slots):
            self._stop.pass_on()
            if self._stop.number and self._kill_at is None:
                self._kill_at = time.monotonic() + LEAVE_SECONDS
            self._hear()
            for slot in self._slots:
                if slot.process is not None and (status := slot.process.poll()) is not None:
                    self._ended(slot, status)
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                self._signal_all(signal.SIGKILL)
        return self._exit_status()

    def close(self) -> None:
        """End what still runs."""
        self._signal_all(signal.SIGKILL)
        self._stop.close()
        if self._connection is not None:
            self._connection.close()
        if self._server is not None:
            self._server.close()

    def _exit_status(self) -> int:
        statuses = {slot.status for slot in self._slots}
        if self._over == FAILED and self._reason:
            what = "This node has left the job" if self._plan.join else "The job has ended"
            terminal_line(f"{what}: {self._reason}")
        if self._status is not None:
            return self._status
        if EXIT_FINISHED in statuses or self._over == FINISHED:
            return EXIT_FINISHED
        if self._stop.number or EXIT_PREEMPTED in statuses:
            return EXIT_PREEMPTED
        return EXIT_STATUS.get(self._over, EXIT_FAILED)

    # Workers

    def _start(self, slot: Slot) -> None:
        slot.process, slot.took_part = None, False
        host, port = self._host.address
        quorum = elastic.Quorum(host, port, self._host.token, self._node, slot.number, self._plan.members)
        size = self._plan.group_size
        if size == 1:
            slot.process = self._start_process(quorum)
        else:
            meeting = tempfile.TemporaryDirectory(prefix="toprope-group-")
            places = (
                dataclasses.replace(quorum, group_size=size, place=place, meeting=meeting.name) for place in range(size)
            )
            slot.process = GroupOfProcesses([self._start_process(place) for place in places], meeting)
        slot.name = f"{self._node}:{slot.process.pid}"

    def _start_process(self, quorum: elastic.Quorum) -> Any:
        environment = dict(os.environ) | quorum.environment()
        process = None
        if self._server is not None:
            process = self._server.start(self._plan.module, self._plan.command, environment)
        if process is None:
            command = [sys.executable, "-u", "-m", self._plan.module, *self._plan.command]
            process = subprocess.Popen(command, env=environment, start_new_session=True)
        return process

    def _ended(self, slot: Slot, status: int) -> None:
        """A worker is gone: start its successor, or find that the job is over."""
        end = elastic.failure(slot.number, slot.process.pid, status)
        how, slot.process = elastic.how(end), None
        self._dead[slot.name] = how
        self._say(Gone(slot.name, how))
        if status in (EXIT_FINISHED, EXIT_PREEMPTED):
            slot.status = status
            self._say(End("finished" if status == EXIT_FINISHED else "preempted", ""))
            if status == EXIT_PREEMPTED:
                self._stop.ask(signal.SIGTERM)
            return
        if self._stop.number or self._over:
            return
        slot.starts_in_a_row = 0 if slot.took_part else slot.starts_in_a_row + 1
        self._restarts += 1
        if status == EXIT_QUARANTINED:
            self._give_up(slot, "it is quarantined, because it computed wrong twice", status)
        elif status == EXIT_USAGE and not self._has_begun:
            self._end(EXIT_USAGE, "")  # the worker has said why
        elif elastic.gave_up():
            self._end(EXIT_FAILED, "")
        elif self._restarts > RESTARTS_WITHOUT_PROGRESS * len(self._slots):
            self._end(EXIT_FAILED, f"{self._restarts} workers were started again without a new step; the last {how}.")
        elif status == EXIT_USAGE or slot.starts_in_a_row >= STARTS:
            self._give_up(slot, f"it {how}, {slot.starts_in_a_row} times in a row before it took part")
        else:
            _free_terminal()
            self._start(slot)

    def _give_up(self, slot: Slot, why: str, status: int = EXIT_FAILED) -> None:
        """Leave a slot empty. `status`: with which the job ends if no worker is left."""
        slot.is_given_up = True
        left = [other for other in self._slots if not other.is_given_up]
        terminal_line(
            f"worker {slot.number} of {self._node} is not started again: {why}. This node has {len(left)} left."
        )
        if not left or not self._has_begun:
            self._end(status, f"worker {slot.number} of {self._node} is not started again: {why}.")
        else:
            self._say(Launcher(self._node, self._size))

    @property
    def _size(self) -> int:
        return min(self._plan.members, sum(not slot.is_given_up for slot in self._slots))

    def _end(self, status: int, reason: str) -> None:
        """End the job; of another node's job only this node's part, since the others can go on."""
        self._status, self._over, self._reason = status, FAILED, reason
        if not self._plan.join:
            self._say(End(FAILED, reason))
        self._kill_at = time.monotonic() + 2.0

    def _signal_all(self, number: int) -> None:
        for slot in self._slots:
            if slot.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    slot.process.send_signal(number)

    # The arbiter

    def _connect(self) -> None:
        with contextlib.suppress(OSError):
            connection = Connection(socket.create_connection(self._host.address, timeout=5.0))
            connection.heard = True
            connection.send_line({"token": self._host.token})
            connection.send(Launcher(self._node, self._size))
            for name, how in self._dead.items():
                connection.send(Gone(name, how))
            for slot in self._slots:
                if slot.status is not None:
                    connection.send(End("finished" if slot.status == EXIT_FINISHED else "preempted", ""))
            self._connection = connection

    def _say(self, message: Message) -> None:
        if self._connection is not None:
            self._connection.send(message)

    def _hear(self) -> None:
        """Wait a moment for what the arbiter says, and for signals."""
        if self._connection is None:
            time.sleep(POLL_SECONDS)
            if self._plan.join and self._lost_at is not None and time.monotonic() > self._lost_at + LOST_SECONDS:
                self._lost_at = None
                self._end(EXIT_FAILED, f"no arbiter has answered at {self._plan.join} for {LOST_SECONDS:.0f} s.")
            self._connect()
            return
        try:
            if self._host.has_died() and not self._over:  # our own end of its socket keeps connections open
                raise EOFError("the arbiter has died before it heard this launcher")
            seconds = POLL_SECONDS if self._connection.is_waiting_to_send else IDLE_SECONDS
            arbiter.wait_readable(seconds, self._connection.sock, self._stop.woken)
            self._connection.flush()
            for line in self._connection.lines():
                self._take(decode(line))
        except (EOFError, ValueError):
            self._connection.close()
            self._connection = None
            self._lost_at = self._lost_at or time.monotonic()
            if (
                not self._over and not self._plan.join
            ):  # else it may come back by itself, and a tunnel to it closes often
                self._revive()

    def _revive(self) -> None:
        self._arbiter_starts += 1
        if self._arbiter_starts > ARBITER_STARTS:
            self._end(EXIT_FAILED, f"the arbiter has died {self._arbiter_starts} times without a new step.")
        else:
            self._host.revive()

    def _take(self, message: Message) -> None:
        self._lost_at = None
        match message:
            case Progress(step, members):
                if step > self._highest_step:
                    self._highest_step, self._restarts, self._arbiter_starts = step, 0, 0
                for slot in self._slots:
                    slot.took_part = slot.took_part or slot.name in members
                    self._has_begun = self._has_begun or slot.took_part
            case Kill(name, why):
                for slot in self._slots:
                    if slot.name == name and slot.process is not None:
                        terminal_line(f"worker {slot.number} of {self._node} is ended: {why}.")
                        slot.process.kill()
            case Over(status):
                self._over = self._over or status
                self._kill_at = self._kill_at or time.monotonic() + LEAVE_SECONDS
            case _:
                pass


def terminal_line(text: str) -> None:
    """Say something to the person at the terminal, not inside the live line of a worker."""
    _free_terminal()
    print(text, file=sys.stderr, flush=True)


def _free_terminal() -> None:
    if terminal.has_cursor(sys.stdout):
        print(terminal.CLEAR, end="", flush=True)


def _settings(plan: Plan, attempt: int) -> dict[str, Any]:
    return {
        "workers": plan.members,
        "facts": {"attempt": attempt},
        "patience_seconds": plan.config.elastic.step_timeout_seconds,
        "answer_seconds": min(5.0, plan.config.elastic.step_timeout_seconds),
    }


def _attempt_to_go_on(run: Path) -> int:
    """The attempt of a job whose arbiter has died, or else the next one."""
    attempt = events.next_attempt(run)
    for candidate in (attempt, attempt - 1):
        lines: list[Mapping[str, Any]] = arbiter.read_log(arbiter.log_path(run, candidate)) if candidate >= 0 else []
        if lines and all(line["what"] != "over" for line in lines):
            return candidate
    return attempt


def token_of(run: Path, make: bool = True) -> str:
    """The token of the job that is going on in `run`, or a new one."""
    path = arbiter.address_path(run)
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(path.read_text(encoding="utf-8"))["token"]
    if not make:
        raise WorldError(
            f"{path} is not there, so the job's token is unknown.\n"
            f"  Name the run directory that the first node trains in by --run, or set {arbiter.TOKEN}."
        )
    return secrets.token_hex(16)


def token_of_others(run: Path) -> str:
    """The token of the job that this node joins. Raises WorldError if it is unknown."""
    return os.environ.get(arbiter.TOKEN) or token_of(run, make=False)


def publish_address(run: Path, listener: socket.socket, token: str) -> None:
    host, port = listener.getsockname()[:2]
    path = arbiter.address_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # nobody else may read the token
    os.write(descriptor, json.dumps({"address": f"{host}:{port}", "token": token}).encode())
    os.close(descriptor)
    partial.rename(path)  # readers see all of it or nothing


def is_cpu_only(config: Config) -> bool:
    """True if no worker uses a GPU: forked workers are tested on CPUs alone."""
    if config.parallel.device == "cpu" or importlib.metadata.version("torch").endswith("+cpu"):
        return True
    import torch

    return torch.version.cuda is None and torch.version.hip is None
