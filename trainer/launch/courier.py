"""Clusters that live apart on hosts that share no directory: launchers copy the files by which clusters speak.

    host 0                                      host 1
    cluster 0 ⇄ RUN ⇄ launcher --listen ◀─TCP─▶ launcher --join ⇄ RUN of its own ⇄ cluster 1

A cluster sees files alone (islands/post.py), on whatever host. Each file is written once, so it does no harm to copy
it late, twice or in another order, and a connection that breaks is opened again. The side that listens has cluster 0,
gives out the others, passes on what each host has written, and copies its checkpoints to all: so what a takeover needs
lies on each host. It takes over the clusters of a host that stays away.

Frames are those of multiprocessing.connection: a length of 64 bits, and nobody is heard who does not know the token of
the job. Each frame has a line of JSON with the digest of what follows.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock, Timeout

from trainer import files
from trainer.checkpoint import files as checkpoint
from trainer.errors import WorldError
from trainer.islands import letters
from trainer.log import rundir

PIECE_BYTES = 2**20
"""Bytes of a checkpoint sent at once. Messages are sent between two pieces: clusters wait for them."""
LOOK_SECONDS, AGAIN_SECONDS, GREETING_SECONDS = 0.05, 1.0, 20.0
FLUSH_SECONDS = 20.0
"""At the end of the job, until the other hosts have what they need of this one."""
LOST_SECONDS = 15
_FILE = r"(?!\.\.?(?:/|$))[\w.\-]+"
_MESSAGE = re.compile(rf"(?:{letters.START}|step-([0-9]{{8}}))/[0-9]{{2,}}-[0-9]+")
_OF_JOB = (letters.FORGOTTEN, letters.OVER)
_PIECE = re.compile(rf"(step-[0-9]{{8}})/{_FILE}(?:/{_FILE})*")
_STEP = re.compile(r"step-([0-9]{8})")

Link: TypeAlias = "Connection[Any, Any]"


def connect(host: str, port: int) -> socket.socket:
    return _watched(socket.create_connection((host, port), GREETING_SECONDS))


def _watched(sock: socket.socket) -> socket.socket:
    """Let a connection whose other end is gone break by itself."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, name):  # not all of them outside Linux
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_SECONDS * 1000)
    return sock


def greet(sock: socket.socket, token: str, is_server: bool) -> Link:
    """Return the connection once both sides have shown that they know the token. Raises AuthenticationError, EOFError
    or OSError."""
    watch = threading.Timer(GREETING_SECONDS, lambda: _shut(sock))  # who says nothing is not waited for
    watch.start()
    try:
        link = Connection(os.dup(sock.fileno()))
        both = [deliver_challenge, answer_challenge]
        for challenge in both if is_server else reversed(both):
            challenge(link, token.encode())
        return link
    finally:
        watch.cancel()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def send(link: Link, header: Mapping[str, Any], content: bytes = b"") -> None:
    line = json.dumps({**header, "sha256": hashlib.sha256(content).hexdigest()}).encode()
    link.send_bytes(line + b"\n" + content)


def receive(link: Link) -> tuple[dict[str, Any], bytes]:
    """Raises EOFError or OSError if the connection is gone, ValueError for what has another digest than it says."""
    line, _, content = link.recv_bytes().partition(b"\n")
    header = json.loads(line)
    if header.pop("sha256") != hashlib.sha256(content).hexdigest():
        raise ValueError("a frame has another digest than it says")
    return header, content


class Side:
    """One end of a connection: what this host has and the other one lacks is sent, what comes is written."""

    def __init__(
        self, sock: socket.socket, link: Link, run: Path, post: Path, there: Iterable[str], saved: Iterable[str],
        is_first: bool,
    ) -> None:  # fmt: skip
        """`there` are the messages that the other host has, `saved` its checkpoints. `is_first`: this host has cluster
        0.
        """
        self._sock, self._link, self._run, self._post, self._is_first = sock, link, run, post, is_first
        self._there = set(there)
        self._told: dict[str, Any] = {}
        """Last values sent of what may change, by name."""
        self._pieces: Iterator[tuple[dict[str, Any], bytes]] = iter(())
        self._is_copying = False
        """A checkpoint is on its way."""
        self._sent = set(saved)
        self._is_broken = threading.Event()
        self.ready = threading.Event()
        """The other host's checkpoints of before are here."""

    def serve(self, until: Callable[[], bool]) -> None:
        """Copy in both directions until the connection breaks, or `until` is true and there is nothing left to send."""
        reading = threading.Thread(target=self._read, daemon=True)
        reading.start()
        try:
            while not self._is_broken.is_set():
                asked = until()  # before the look: what was there by then is sent
                if self._send_due():
                    continue
                if asked:  # the other side reads to the end, then closes: what is on its way to us breaks nothing
                    self._sock.shutdown(socket.SHUT_WR)
                    reading.join(FLUSH_SECONDS)
                    break
                self._is_broken.wait(LOOK_SECONDS)
        except (OSError, EOFError):
            pass
        finally:
            self.close()
            reading.join(5.0)

    def close(self) -> None:
        self._is_broken.set()
        _shut(self._sock)

    # Sending

    def _send_due(self) -> bool:
        """Send all messages that are due, and a piece of a checkpoint. False if there was nothing."""
        # What a message may be about was there before it, so it goes first.
        due = [name for name in messages(self._post) if name not in self._there]
        has_sent = self._is_first and self._send_of_run()
        for name in due:
            with contextlib.suppress(FileNotFoundError):  # nobody needs it any more
                send(self._link, {"message": name}, (self._post / name).read_bytes())
            self._there.add(name)
        if self._is_first:
            # Messages of steps before a checkpoint are needed until that one is there.
            names = _OF_JOB if self._told.get("kept") is not None and not self._is_copying else (letters.OVER,)
            has_sent = self._send_changed(names) or has_sent
        return has_sent or bool(due)

    def _send_changed(self, names: Sequence[str]) -> bool:
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = (self._post / name).read_bytes()
        changed = {name: content for name, content in found.items() if self._told.get(name) != content}
        for name, content in changed.items():
            send(self._link, {"of job": name}, content)
        self._told |= changed
        return bool(changed)

    def _send_of_run(self) -> bool:
        """Send config.json, and the next piece of a checkpoint that is not there."""
        config, has_sent = rundir.config_path(self._run), False
        if "config" not in self._told and config.exists():
            self._told["config"] = True
            send(self._link, {"config": True}, config.read_bytes())
            has_sent = True
        piece = next(self._pieces, None)
        if piece is None:
            self._is_copying = False
            kept = [saved.path.name for saved in checkpoint.committed(self._run) if _STEP.fullmatch(saved.path.name)]
            if new := [name for name in kept if name not in self._sent]:
                self._pieces = _pieces(checkpoint.directory(self._run) / new[0])
                self._sent.add(new[0])
                self._is_copying = True
                return True
            if self._told.get("kept") != kept:
                self._told["kept"] = kept
                send(self._link, {"kept": kept})
                return True
            return has_sent
        send(self._link, *piece)
        return True

    # Receiving

    def _read(self) -> None:
        try:
            while True:
                self._take(*receive(self._link))
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            self.close()

    def _take(self, header: Mapping[str, Any], content: bytes) -> None:
        match header:
            case {"message": str(name)} if found := _MESSAGE.fullmatch(name):
                self._there.add(name)
                if not found[1] or int(found[1]) > letters.forgotten(self._post):
                    _write_once(self._post / name, content)
            case {"of job": letters.FORGOTTEN} if not self._is_first:
                letters.forget(self._post, int(content))
            case {"of job": letters.OVER} if not self._is_first:
                files.write(self._post / letters.OVER, content)
            case {"config": True} if not self._is_first:
                if not rundir.is_run(self._run):
                    self._run.mkdir(parents=True, exist_ok=True)
                    files.write(rundir.config_path(self._run), content)
            case {"piece": str(name), "of": str(token)} if not self._is_first and _PIECE.fullmatch(name):
                self._append(name, re.sub("[^0-9a-f]", "", token), content)
            case {"whole": str(name), "of": str(token)} if not self._is_first and _STEP.fullmatch(name):
                self._commit(name, re.sub("[^0-9a-f]", "", token))
            case {"kept": list(names)} if not self._is_first:
                self._prune([int(found[1]) for name in names if (found := _STEP.fullmatch(str(name)))])
                self.ready.set()
            case _:
                raise ValueError(f"not expected of the other side: {sorted(header)}")

    def _staging(self, step: str, token: str) -> Path:
        return checkpoint.directory(self._run) / f".{step}.{token}.partial"

    def _append(self, name: str, token: str, content: bytes) -> None:
        step, _, below = name.partition("/")
        path = self._staging(step, token) / below
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(content)

    def _commit(self, step: str, token: str) -> None:
        staged, final = self._staging(step, token), checkpoint.directory(self._run) / step
        if final.exists() or not staged.exists():
            shutil.rmtree(staged, ignore_errors=True)
        else:
            staged.rename(final)

    def _prune(self, kept: Sequence[int]) -> None:
        """Remove checkpoints that are older than all that the first host keeps, and what copying has left."""
        for saved in checkpoint.committed(self._run):
            if kept and saved.step < min(kept):
                shutil.rmtree(saved.path, ignore_errors=True)
        for path in checkpoint.directory(self._run).glob(".step-*.partial"):
            shutil.rmtree(path, ignore_errors=True)


def messages(post: Path) -> list[str]:
    """The messages of a job that are here, by name."""
    last, found = letters.forgotten(post), list[str]()
    for directory in post.iterdir():
        number = _STEP.fullmatch(directory.name)
        if directory.name == letters.START or (number and int(number[1]) > last):
            with contextlib.suppress(FileNotFoundError):
                found += [f"{directory.name}/{path.name}" for path in directory.iterdir()]
    return sorted(name for name in found if _MESSAGE.fullmatch(name))


def _pieces(saved: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """A checkpoint in pieces, and the word that it is whole. One that is removed meanwhile ends without that."""
    token = secrets.token_hex(4)
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(path for path in saved.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                name = f"{saved.name}/{path.relative_to(saved).as_posix()}"
                yield {"piece": name, "of": token}, file.read(PIECE_BYTES)
                while more := file.read(PIECE_BYTES):
                    yield {"piece": name, "of": token}, more
        yield {"whole": saved.name, "of": token}, b""


def _write_once(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    partial.write_bytes(content)
    with contextlib.suppress(FileExistsError):
        os.link(partial, path)
    partial.unlink()


# The two kinds of launchers


class Listening:
    """The launcher that the others join. It keeps the locks of their clusters as long as they are connected."""

    def __init__(self, listener: socket.socket, token: str, run: Path, post: Path, clusters: int) -> None:
        self._listener, self._token, self._run, self._post, self._clusters = listener, token, run, post, clusters
        self._is_over = threading.Event()
        self._sides: dict[Side, str] = {}
        """Connections, with the other host's own mark."""

    def begin(self) -> None:
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Give the others what they lack, and leave."""
        self._is_over.set()
        until = time.monotonic() + FLUSH_SECONDS
        while time.monotonic() < until and self._sides:
            time.sleep(LOOK_SECONDS)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._meet, args=(sock,), daemon=True).start()

    def _meet(self, sock: socket.socket) -> None:
        """Serve one other launcher until it is gone."""
        with (
            contextlib.ExitStack() as stack,
            contextlib.suppress(OSError, EOFError, ValueError, KeyError, AuthenticationError),
        ):
            stack.callback(sock.close)
            link = greet(_watched(sock), self._token, is_server=True)
            stack.callback(link.close)
            hello, _ = receive(link)
            for side, mark in list(self._sides.items()):
                if mark == hello["mark"]:  # it has noticed before us that the connection is broken
                    side.close()
            numbers, refused = [], self._refusal(hello)
            patience = GREETING_SECONDS if hello["keeps"] else 0.0
            for number in hello["keeps"] or range(1, self._clusters) if not refused else ():
                if len(numbers) < hello["wanted"] and (lock := lock_of(self._run, int(number), patience)):
                    stack.callback(lock.release)
                    numbers.append(number)
            if not numbers and not refused:
                refused = "all clusters have launchers.\n  Start it again when one has none, or raise --islands there."
            answer = {"post": self._post.name, "numbers": numbers, "refused": refused, "has": messages(self._post)}
            send(link, answer)
            if refused:
                return
            side = Side(sock, link, self._run, self._post, hello["has"], hello["saved"], is_first=True)
            self._sides[side] = hello["mark"]
            stack.callback(self._sides.pop, side)
            side.serve(self._is_over.is_set)

    def _refusal(self, hello: Mapping[str, Any]) -> str:
        if hello["clusters"] != self._clusters:
            return f"its job has --islands {self._clusters}, not {hello['clusters']}.\n  Give the same number."
        if hello["post"] not in ("", self._post.name):
            return "it has begun a new job.\n  Give the same command again."
        own = run_id(self._run)
        if hello["run_id"] and hello["run_id"] != own:
            return (
                f"the run directory here is of run {hello['run_id']}, that there of {own or 'none'}.\n"
                "  Give a new --run here, or the run there."
            )
        return ""


def run_id(run: Path) -> str:
    return str(rundir.read(run).get("run_id", "")) if rundir.is_run(run) else ""


def lock_of(run: Path, cluster: int, patience: float = 0.0) -> FileLock | None:
    """The lock of a cluster, held; None if another launcher still holds it after `patience` seconds."""
    lock = FileLock(run / "islands" / f"cluster-{cluster}.lock", fallback_to_soft=False, thread_local=False)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        return None
    return lock


class Joined:
    """A launcher that has joined another one, which has given it some clusters."""

    def __init__(
        self, address: tuple[str, int], token: str, run: Path, clusters: int, wanted: int, patience: float
    ) -> None:
        """Meet the other launcher. Raises WorldError if it is not there within `patience` seconds, or refuses."""
        self._address, self._token, self._run, self._patience = address, token, run, patience
        self._clusters, self._wanted = clusters, wanted
        self.problem = ""
        """Reason why this launcher cannot go on; empty if it can."""
        self._is_over = threading.Event()
        self._mark = secrets.token_hex(8)
        self.numbers: list[int] = []
        self.post = ""
        self._side: Side | None = None
        self._serving: threading.Thread | None = None
        until = time.monotonic() + patience
        while (met := self._meet()) is None:
            if time.monotonic() > until:
                raise WorldError(
                    f"nobody answers at {address[0]}:{address[1]}.\n  Start the launcher with --listen first."
                )
            time.sleep(AGAIN_SECONDS)
        self._met: tuple[Any, ...] | None = met

    def _meet(self) -> tuple[socket.socket, Link, list[str]] | None:
        """Connect; None if that fails for now. Raises WorldError if this launcher is refused."""
        host, port = self._address
        with contextlib.ExitStack() as stack:
            try:
                sock = stack.enter_context(connect(host, port))
                link = stack.enter_context(greet(sock, self._token, is_server=False))
                send(link, self._greeting())
                answer, _ = receive(link)
            except AuthenticationError:
                raise WorldError(
                    f"{host}:{port} does not know this token.\n  Name the run directory of that launcher by --run, or "
                    "set TOPROPE_QUORUM_TOKEN to the token in RUN/quorum/address.json there."
                ) from None
            except (OSError, EOFError, ValueError):
                return None
            if answer["refused"]:
                raise WorldError(f"{host}:{port} refuses this launcher: {answer['refused']}")
            if taken := sorted({*self.numbers} - {*answer["numbers"]}):
                raise WorldError(
                    f"cluster {', '.join(map(str, taken))} has been taken over while {host}:{port} was out of reach.\n"
                    "  Give the same command again for those that have no launcher."
                )
            stack.pop_all()
        self.numbers, self.post = list(answer["numbers"]), str(answer["post"])
        return sock, link, list(answer["has"])

    def _greeting(self) -> dict[str, Any]:
        here = self._run / "islands" / self.post
        return {
            "clusters": self._clusters, "wanted": self._wanted, "keeps": self.numbers, "post": self.post,
            "mark": self._mark, "run_id": run_id(self._run), "has": messages(here) if self.post else [],
            "saved": [saved.path.name for saved in checkpoint.committed(self._run)],
        }  # fmt: skip

    def begin(self) -> None:
        """Copy from now on; return once the state of before is here."""
        self._serving = threading.Thread(target=self._serve, daemon=True)
        self._serving.start()
        while not self.problem and not (self._side is not None and self._side.ready.wait(LOOK_SECONDS)):
            time.sleep(LOOK_SECONDS)

    def _serve(self) -> None:
        place = self._run / "islands" / self.post
        while not self._is_over.is_set():
            assert self._met is not None
            sock, link, has = self._met
            self._side = Side(sock, link, self._run, place, has, (), is_first=False)
            self._side.serve(self._is_over.is_set)
            link.close()
            sock.close()
            if (place / letters.OVER).exists():
                return
            self._met, until = None, time.monotonic() + self._patience
            while self._met is None and not self._is_over.wait(AGAIN_SECONDS):
                try:
                    self._met = self._meet()
                except WorldError as error:
                    self.problem = str(error)
                    return
                if self._met is None and time.monotonic() > until:
                    self.problem = f"the launcher at {self._address[0]}:{self._address[1]} has been away for too long"
                    return

    def close(self) -> None:
        """Give the other one what it lacks, and leave."""
        self._is_over.set()
        if self._serving is not None:
            self._serving.join(2 * FLUSH_SECONDS)
