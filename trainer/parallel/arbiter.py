"""The arbiter's process: `protocol.Arbiter` on TCP, with its log. No torch here.

    worker, launcher ── a line of JSON per message ──▶ arbiter; the first line holds the run's token

Who does not know the token is not heard. A closed connection is a death. The log lets a restarted arbiter go on: it
listens at the same address, and the workers come back to it.

    RUN/quorum/attempt-0000.jsonl   the log
               address.json         where the arbiter listens, and the token, for workers on other nodes
"""

import contextlib
import hmac
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer import files
from trainer.errors import WorldError, of_system
from trainer.parallel import elastic
from trainer.parallel.protocol import (
    NOBODY,
    Action,
    Arbiter,
    Committed,
    End,
    Gone,
    Hello,
    Kill,
    Launcher,
    Left,
    Message,
    Met,
    Over,
    Position,
    Progress,
    Record,
    Send,
    Stuck,
    decode,
    encode,
)  # fmt: skip

DIRECTORY = "quorum"
SETTINGS, TOKEN = "TOPROPE_ARBITER", "TOPROPE_QUORUM_TOKEN"
"""Environment variables of the arbiter's process: `Settings` as JSON; the token, which a command line would show."""
MOST_BYTES = 1 << 22
"""A longer line is no message."""
MOST_BYTES_BEFORE_TOKEN = 4096
HELLO_SECONDS = 10.0
"""Time for the first line. Who only opens a connection is closed then."""
TICK_SECONDS = 0.5
KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 5), ("TCP_USER_TIMEOUT", 15_000))
"""On Linux a machine that is gone without a word counts as dead after 15 s, whether the connection is idle or has
something to send: the kernel asks it."""


def wait_readable(seconds: float, *sockets: socket.socket) -> None:
    """Wait until there is something to read, at most so long. Unlike select, it takes descriptors above 1023."""
    with selectors.DefaultSelector() as selector:
        for sock in sockets:
            selector.register(sock, selectors.EVENT_READ)
        selector.select(seconds)


class Connection:
    """One end of a connection that carries messages. Sending never blocks: what the peer does not take, waits."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE:
                if hasattr(socket, name):  # not all of them outside Linux
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.sock, self.opened = sock, time.monotonic()
        self.member: int | None = None
        self.node = ""
        self.heard = False
        """True once it has shown the token."""
        self._in, self._out = bytearray(), bytearray()

    def send(self, message: Message) -> None:
        self.send_line(encode(message))

    def send_line(self, line: Any) -> None:
        self._out += json.dumps(line, separators=(",", ":")).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(OSError):  # reading from it will tell that it is closed
            while self._out:
                del self._out[: self.sock.send(self._out)]

    @property
    def is_waiting_to_send(self) -> bool:
        return bool(self._out)

    def lines(self) -> Iterator[Any]:
        """Yield what has come. Raises EOFError if the connection is closed, ValueError for what is no JSON."""
        while True:
            try:
                received = self.sock.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                raise EOFError(str(error)) from None
            if not received:
                raise EOFError("its connection closed")
            self._in += received
            while (end := self._in.find(b"\n")) >= 0:
                line, self._in = bytes(self._in[:end]), self._in[end + 1 :]
                yield json.loads(line)
            if len(self._in) > (MOST_BYTES if self.heard else MOST_BYTES_BEFORE_TOKEN):
                raise ValueError("a line without an end")

    def shut_down(self) -> None:
        """End the connection; what was sent still arrives. Another thread that reads from it sees its end."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.sock.close()


class Server:
    """Runs the machine. One thread; `serve` returns when the job is over and everybody has left."""

    def __init__(self, log: Path, listener: socket.socket, token: str, workers: int, **settings: Any) -> None:
        """`workers` meet before the first step. `settings` are those of protocol.Arbiter."""
        self._listener, self._token, self._workers = listener, token, workers
        self._launchers: dict[Connection, int] = {}
        self._by_member: dict[int, Connection] = {}
        self._selector = selectors.DefaultSelector()
        lines = read_log(log)
        settings |= {"wanted": workers, "reserved": workers}
        self.machine = Arbiter.restarted(lines, time.monotonic(), **settings) if lines else Arbiter(**settings)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = open(log, "ab", buffering=0, opener=files.no_follow)  # noqa: SIM115
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._told = self._progress()

    def serve(self, until: Callable[[], bool] = lambda: False) -> str:
        """Serve until `until` is true, or the job is over and all have left; return how it ended."""
        ticked = 0.0
        while not until():
            for key, events in self._selector.select(TICK_SECONDS):
                if key.fileobj is self._listener:
                    self._accept()
                elif events & selectors.EVENT_READ:
                    self._read(key.data)
                else:
                    key.data.flush()
                    self._listen(key.data)
            if time.monotonic() - ticked > TICK_SECONDS:
                ticked = time.monotonic()
                self._do(self.machine.tick(ticked))
                self._close_the_silent(ticked)
                self._tell_progress()
            if self.machine.over and not self._by_member and not self._launchers:
                break
        return self.machine.over

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, Connection):
                key.data.close()
        self._selector.close()
        self._listener.close()
        self._log.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            self._selector.register(sock, selectors.EVENT_READ, Connection(sock))

    def _listen(self, connection: Connection) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.is_waiting_to_send else 0)
        with contextlib.suppress(KeyError, ValueError):  # it was closed meanwhile
            self._selector.modify(connection.sock, wanted, connection)

    def _read(self, connection: Connection) -> None:
        try:
            for line in connection.lines():
                if not connection.heard:
                    self._check_token(connection, line)
                else:
                    self._hear(connection, decode(line))
        except EOFError as gone:
            self._closed(connection, str(gone))
        except (ValueError, RecursionError):  # not one of ours
            self._closed(connection, "it sent what is no message")

    def _check_token(self, connection: Connection, line: Any) -> None:
        given = line.get("token") if isinstance(line, dict) else None
        if not isinstance(given, str) or not hmac.compare_digest(given.encode(), self._token.encode()):
            raise ValueError("a wrong token")
        connection.heard = True

    def _hear(self, connection: Connection, message: Message) -> None:
        now, machine, member = time.monotonic(), self.machine, connection.member
        match message:
            case Hello() if member is None:
                connection.member, actions = machine.hello(message)
                if connection.member is not None:
                    self._by_member[connection.member] = connection
                self._do(actions, connection)
                if connection.member is None:
                    self._closed(connection, "refused")
            case Launcher(node, workers):
                connection.node = node
                self._launchers[connection] = workers
                self._do(self._want())
                connection.send(self._progress())
                if machine.over:
                    connection.send(Over(machine.over))
            case Gone(name, why) if connection in self._launchers:
                self._do(machine.gone(name, why, now))
            case End(status, reason) if connection in self._launchers:
                self._do(machine.end(status, reason))
            case Met(report) if member is not None:
                self._do(machine.met(member, report, now))
            case Committed(step) if member is not None:
                self._do(machine.committed(step))
            case Left(status, reason) if member is not None:
                self._do(machine.left(member, status, reason, now))
            case Stuck() if member is not None:
                self._do(machine.stuck(member, message, now))
            case Position() if member is not None:
                self._do(machine.position(member, message, now))
            case _:
                raise ValueError("not to an arbiter")
        # Steps are told now and then: with each of them the launcher would wake, on cores that are full.
        if self._progress().members != self._told.members:
            self._tell_progress()

    def _tell_progress(self) -> None:
        if (progress := self._progress()) != self._told:
            self._told = progress
            self._tell_launchers(progress)

    def _progress(self) -> Progress:
        machine = self.machine
        return Progress(machine.highest_step, {machine.names[member]: member for member in machine.members})

    def _want(self) -> list[Action]:
        """Before the first step all workers that were asked for meet; later there are as many as launchers have."""
        have = sum(self._launchers.values())
        return self.machine.want(have if self.machine.epoch is not None else max(have, self._workers))

    def _closed(self, connection: Connection, why: str) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.sock)
        connection.close()
        member = connection.member
        if member is not None and self._by_member.get(member) is connection:
            del self._by_member[member]
            self._do(self.machine.closed(member, why, time.monotonic()))
        if self._launchers.pop(connection, None) is not None and self._launchers:
            self._do(self._want())

    def _close_the_silent(self, now: float) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, Connection) and not key.data.heard and now > key.data.opened + HELLO_SECONDS:
                self._closed(key.data, "it said nothing")

    def _do(self, actions: list[Action], talking: Connection | None = None) -> None:
        for action in actions:
            match action:
                case Record(line):
                    self._log.write(json.dumps(line).encode() + b"\n")
                    if line.get("what") == "over":
                        self._tell_launchers(Over(self.machine.over))
                case Send(member, message):
                    connection = talking if member == NOBODY else self._by_member.get(member)
                    if connection is not None:
                        connection.send(message)
                        self._listen(connection)
                case Kill():
                    member = next(m for m, name in self.machine.names.items() if name == action.name)
                    connection = self._by_member.pop(member, None)
                    if connection is not None:
                        self._closed(connection, action.why)
                    self._tell_launchers(action)

    def _tell_launchers(self, message: Message) -> None:
        for connection in list(self._launchers):
            connection.send(message)
            self._listen(connection)


def read_log(path: Path) -> list[Mapping[str, Any]]:
    """Lines of the log that an arbiter before this one has left. A last line that was cut short is removed."""
    try:
        *whole, torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
    return [json.loads(line) for line in whole]


def log_path(run: Path, attempt: int) -> Path:
    return run / DIRECTORY / f"attempt-{attempt:04d}.jsonl"


def address_path(run: Path) -> Path:
    return run / DIRECTORY / "address.json"


def listen(host: str, port: int) -> socket.socket:
    """Listen for workers. Raises WorldError if the address cannot be had."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=256
        )
    except OSError as error:
        fact, rule = f"the arbiter cannot listen at {host}:{port}", "One arbiter serves one run."
        raise WorldError(of_system(error, fact, rule, "Name another address, or end what holds this one.")) from None


def main() -> None:
    """Run the arbiter's process: on the listening socket that its launcher has opened, until the job is over."""
    settings = json.loads(os.environ[SETTINGS])
    elastic.end_with_parent()
    listener = socket.socket(fileno=settings.pop("descriptor"))
    log = Path(settings.pop("log"))
    with contextlib.closing(Server(log, listener, os.environ[TOKEN], **settings)) as server:
        server.serve()


if __name__ == "__main__":
    main()
