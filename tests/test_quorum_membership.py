"""The arbiter and its workers over real sockets; the workers are threads of this process."""

import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import wait_until
from trainer.parallel import arbiter, membership
from trainer.parallel.arbiter import Connection, Server, listen
from trainer.parallel.elastic import Quorum
from trainer.parallel.membership import ArbiterLostError, JobOver, Membership, RefusedError
from trainer.parallel.protocol import (
    FINISHED,
    HOPELESS,
    PREEMPTED,
    End,
    Epoch,
    Kill,
    Launcher,
    Over,
    Progress,
    Report,
    decode,
    encode,
)  # fmt: skip

pytestmark = pytest.mark.timeout(60)
IDENTITY = {"micro_batches": "8", "fingerprint": "f"}


class Job:
    """An arbiter in a thread, and the workers that a test connects with it."""

    def __init__(self, log: Path, workers: int, **settings: Any) -> None:
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.log, self.workers, self.settings = log, workers, settings
        self.members: list[Membership] = []
        self.peers: list[Peer] = []
        self.pool = ThreadPoolExecutor(16)
        self.start()

    def start(self) -> None:
        self.stopping = threading.Event()
        socket_of_this_life = self.listener.dup()  # as a launcher does: the address outlives the arbiter
        self.server = Server(self.log, socket_of_this_life, "secret", self.workers, **self.settings)
        self.served = self.pool.submit(self.server.serve, self.stopping.is_set)

    def kill_arbiter(self) -> None:
        self.stopping.set()
        self.served.result()
        self.server.close()

    def quorum(self, node: str = "node") -> Quorum:
        return Quorum(
            "127.0.0.1", self.port, "secret", node, len(self.members), max(self.workers, len(self.members) + 1)
        )

    def connect(self, identity: Any = IDENTITY, **settings: Any) -> Membership:
        member = Membership.connect(self.quorum(f"node {len(self.members)}"), identity, "127.0.0.1:1", **settings)
        self.members.append(member)
        return member

    def meet(self, member: Membership, *report: Any) -> "Future[Epoch]":
        return self.pool.submit(member.meet, Report(*report))

    def begin(self, count: int, **settings: Any) -> list[Membership]:
        """Connect workers and have them meet."""
        members = [self.connect(**settings) for _ in range(count)]
        for future in [self.meet(member) for member in members]:
            future.result()
        return members

    def launcher(self, workers: int) -> "Peer":
        peer = Peer(self.port)
        peer.say({"token": "secret"}, Launcher("node", workers))
        self.peers.append(peer)
        return peer

    def close(self) -> None:
        for member in self.members:
            member.close()
        for peer in self.peers:
            peer.lines.close()
            peer.sock.close()
        self.kill_arbiter()
        self.listener.close()
        self.pool.shutdown()


class Peer:
    """Somebody who talks with the arbiter line by line."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.lines = self.sock.makefile("r")

    def say(self, *what: Any) -> None:
        self.sock.sendall(b"".join(json.dumps(encode(line)).encode() + b"\n" for line in what))

    def hear(self, kind: Any) -> Any:
        """The next message of a kind."""
        while not isinstance(message := decode(json.loads(self.lines.readline())), kind):
            pass
        return message


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(arbiter, "TICK_SECONDS", 0.05)
    with contextlib.ExitStack() as stack:

        def job(workers: int, **settings: Any) -> Job:
            return stack.enter_context(contextlib.closing(Job(tmp_path / "log.jsonl", workers, **settings)))

        yield job


def test_a_death_reaches_the_others_in_the_middle_of_a_collective_and_they_go_on_with_their_sums(make: Any):
    job = make(3)
    first, second, third = job.begin(3)
    assert not first.ended
    third.close()
    assert wait_until(lambda: first.ended, 5), "its main thread would still wait in the collective"
    futures = [job.meet(first, 4, (0, 3, 6)), job.meet(second, 4, (1,))]
    epochs = [future.result() for future in futures]
    assert epochs[0] == epochs[1]
    assert (epochs[0].members, epochs[0].step, epochs[0].kept) == ((0, 1), 4, {0: (0, 3, 6), 1: (1,)})
    assert epochs[0].left == {2: "its connection closed"}
    assert not first.ended


def test_a_newcomer_is_let_in_between_steps_and_its_number_is_new(make: Any):
    job = make(2, facts={"attempt": 7})
    launcher = job.launcher(2)
    first, second = job.begin(2)
    second.close()
    assert job.meet(first, 1).result().members == (0,)
    third = job.connect()
    joined = job.meet(third)
    while not first.change_wanted:
        time.sleep(0.01)
    assert not first.ended, "nobody is interrupted for a newcomer"
    first.committed(2)
    assert job.meet(first, 2).result() == joined.result()
    assert (joined.result().members, joined.result().receivers, third.facts) == ((0, 2), (2,), {"attempt": 7})
    names = {first._hello.name: 0, third._hello.name: 2}
    while launcher.hear(Progress) != Progress(2, names):
        pass


def test_a_launcher_hears_that_there_are_new_steps_and_not_of_each(make: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(membership, "COMMITTED_SECONDS", 0.3)
    job = make(1)
    launcher = job.launcher(1)
    (first,) = job.begin(1)
    heard = [launcher.hear(Progress).step]
    for step in range(1, 101):
        first.committed(step)
        time.sleep(0.005)
    while heard[-1] < 100:
        heard.append(launcher.hear(Progress).step)
    assert heard == sorted(heard) and len(heard) < 10


def test_an_arbiter_that_is_killed_goes_on_from_its_log_while_the_workers_wait(make: Any):
    job = make(2)
    first, second = job.begin(2)
    job.kill_arbiter()
    assert wait_until(lambda: first.ended, 5), "a worker without an arbiter stops"
    with job.log.open("ab") as log:
        log.write(b'{"what": "epo')  # it died in the middle of a line
    futures = [job.meet(first, 3, (0,)), job.meet(second, 3, (1,))]
    job.start()
    epochs = [future.result(20) for future in futures]
    assert (epochs[0].number, epochs[0].members, epochs[0].kept) == (2, (0, 1), {0: (0,), 1: (1,)})
    assert epochs[0] == epochs[1]


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 5000, b'{"token": "wrong"}\n["Launcher", ["n", 1]]\n', b"[" * 3000 + b"\n",
     b'{"token": "secret"}\n["Launcher", ["n", "many"]]\n', b'{"token": "secret"}\n["Met", [{"step": 9}]]\n',
     b'{"token": "secret"}\n["Publish", [{}]]\n', b'{"token": ["secret"]}\n'],
)  # fmt: skip
def test_garbage_on_the_port_is_dropped_and_harms_nobody(make: Any, garbage: bytes):
    job = make(2)
    first, second = job.begin(2)
    with socket.create_connection(("127.0.0.1", job.port), timeout=5) as stranger:
        stranger.sendall(garbage)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b"", "it hears nothing"
    assert not first.ended
    assert job.meet(first, 1).running() or not second.ended
    assert job.meet(second, 1).result().members == (0, 1)


def test_who_opens_a_connection_and_says_nothing_is_closed(make: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arbiter, "HELLO_SECONDS", 0.1)
    job = make(1)
    with socket.create_connection(("127.0.0.1", job.port), timeout=5) as stranger:
        assert stranger.recv(100) == b""


def test_a_worker_with_other_code_is_refused_by_name_and_the_others_notice_nothing(make: Any):
    job = make(1)
    (first,) = job.begin(1)
    with pytest.raises(RefusedError, match="its fingerprint is g, that of the job f"):
        job.connect(IDENTITY | {"fingerprint": "g"})
    assert not first.ended
    assert not first.change_wanted


def test_a_newcomer_that_claims_a_state_is_ended_and_refused_and_the_others_notice_nothing(make: Any):
    job = make(2)
    launcher = job.launcher(2)
    first, second = job.begin(2)
    liar = job.connect()
    with pytest.raises(RefusedError, match="worker 2 was taken for dead, and the others went on without it"):
        job.meet(liar, 99, (0, 1)).result(10)
    assert launcher.hear(Kill) == Kill(liar._hello.name, "it claims to have a state, but was no member")
    assert not first.ended and not second.ended
    assert not first.change_wanted


@pytest.mark.parametrize(("leaves", "over"), [(FINISHED, FINISHED), (PREEMPTED, PREEMPTED), (HOPELESS, "failed")])
def test_a_spare_that_waits_is_told_how_the_job_has_ended(make: Any, leaves: str, over: str):
    job = make(1)
    (first,) = job.begin(1)
    spare = job.meet(job.connect())
    launcher = job.launcher(1)
    first.leave(leaves)
    with pytest.raises(JobOver) as ended:
        spare.result(10)
    assert (ended.value.status, launcher.hear(Over)) == (over, Over(over))


def test_a_waiting_worker_can_be_called_away(make: Any):
    job = make(2)
    first = job.connect()
    with pytest.raises(KeyboardInterrupt):
        first.meet(Report(), waiting=lambda: (_ for _ in ()).throw(KeyboardInterrupt()))


def test_the_worker_that_has_not_reached_the_collective_is_ended_and_its_launcher_told(make: Any):
    job = make(2, patience_seconds=0.3)
    launcher = job.launcher(2)
    first, second = job.begin(2, limits=(0.5, 0.5))
    second.heartbeat("backward", 3)
    first.at("reduce", 3)
    found = launcher.hear(Kill)
    assert found == Kill(second._hello.name, "it has not reached the collective of the others: backward")
    assert job.meet(first, 3, (0,)).result().members == (0,)


def test_a_worker_that_never_enters_an_epoch_is_ended_and_not_those_that_wait_for_it_there(make: Any):
    job = make(2, patience_seconds=0.3)
    launcher = job.launcher(2)
    first, second = job.begin(2, limits=(0.5, 0.5))
    for member in (first, second, second):  # what it had reached in the epoch before does not count
        member.at("reduce", 3)
    stands_still, goes_on = threading.Event(), threading.Event()
    job.pool.submit(second.meet, Report(3), lambda: (stands_still.set(), goes_on.wait(20)))
    assert stands_still.wait(20)
    assert job.meet(first, 3).result().number == 2
    first.at("reduce", 3)
    found = launcher.hear(Kill)
    goes_on.set()
    assert found == Kill(second._hello.name, "it has not reached the collective of the others: waiting")


def test_a_tunnel_that_takes_connections_without_an_arbiter_behind_it_is_given_up_in_time(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(membership, "LOST_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as tunnel:

        def take_and_close() -> None:
            with contextlib.suppress(OSError):  # the end of the test
                while True:
                    tunnel.accept()[0].close()

        closing = threading.Thread(target=take_and_close)
        closing.start()
        quorum = Quorum("127.0.0.1", tunnel.getsockname()[1], "secret", "node", 0, 1)
        with pytest.raises(ArbiterLostError, match="no arbiter has answered"):
            Membership.connect(quorum, IDENTITY, "127.0.0.1:1")
        tunnel.shutdown(socket.SHUT_RDWR)
        closing.join()


def test_a_launcher_can_end_the_job(make: Any):
    job = make(2)
    waiting = job.meet(job.connect())
    job.launcher(2).say(End("failed", "a disk is full"))
    with pytest.raises(JobOver, match="failed"):
        waiting.result(10)


def test_sending_does_not_wait_for_a_peer_that_does_not_read():
    ours, theirs = socket.socketpair()
    connection = Connection(ours)
    for _ in range(2000):
        connection.send(Over("x" * 1000))
    assert connection.is_waiting_to_send
    theirs.close()
    ours.close()


def test_a_process_with_more_than_a_thousand_open_files_takes_part(make: Any, tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            stack.enter_context((tmp_path / "file").open("w"))
        first, second = make(2).begin(2)
        assert first.member != second.member
