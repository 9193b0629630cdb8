"""A worker's connection to the arbiter: it reports, waits for the next epoch, and hears at once when one ends.

One thread connects, listens and connects again. It runs while the main thread waits in a collective, since torch
releases the GIL there; so it hears of an epoch's end and can say how far it is. No torch here.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from trainer.errors import TopropeError, WorldError
from trainer.parallel import elastic
from trainer.parallel.arbiter import Connection, wait_readable
from trainer.parallel.protocol import (
    Committed,
    Epoch,
    Hello,
    Left,
    Message,
    Met,
    Position,
    Publish,
    Report,
    Seat,
    Stuck,
    Where,
    decode,
)  # fmt: skip

LOST_SECONDS = 60.0
"""A worker that has not found the arbiter for so long leaves. Until then it waits, and computes nothing."""
RETRY_SECONDS = 0.1
TICK_SECONDS = 0.2
COMMITTED_SECONDS = 1.0
"""Seconds between two reports of steps to the arbiter: it only needs to know that there are new ones."""


class JobOver(Exception):  # noqa: N818 - nothing is wrong
    """The job has ended without this worker: finished, preempted or failed."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


class RefusedError(WorldError):
    """This worker may not take part. The others go on."""


class ArbiterLostError(TopropeError):
    """There is no arbiter."""


class Membership:
    """Use as the main thread only; `connect` makes one."""

    def __init__(
        self,
        quorum: elastic.Quorum,
        identity: Mapping[str, str],
        store: str,
        limits: tuple[float, float] = (300.0, 1800.0),
        epoch_ended: Callable[[int], None] = lambda number: None,
    ) -> None:
        """`limits`: seconds without progress after which this worker counts as stuck, and before its first step.

        `epoch_ended` is called, from a thread, with the number of an epoch that has ended.
        """
        self._epoch_ended = epoch_ended
        self._quorum, self._limits = quorum, limits
        name = f"{quorum.node}:{os.getpid()}"
        self._hello = Hello(None, name, store, dict(identity), quorum.slot >= quorum.size, quorum.slot)
        self._changed = threading.Condition()
        self._seat = Seat()
        self._connection: Connection | None = None
        self._report: Report | None = None
        self._is_lost = self._is_closing = self._is_answered = False
        self._reached, self._place, self._step, self._progress = 0, "start", 0, monotonic()
        self._has_committed = False
        self._committed: int | None = None
        """The last step that was applied in this epoch."""
        self._thread = threading.Thread(target=self._run, name="toprope-membership", daemon=True)

    @classmethod
    def connect(cls, quorum: elastic.Quorum, identity: Mapping[str, str], store: str, **settings: Any) -> "Membership":
        """Return once the arbiter has given this worker its number. Raises RefusedError, ArbiterLostError."""
        membership = cls(quorum, identity, store, **settings)
        membership._thread.start()
        with membership._changed:
            membership._changed.wait_for(
                lambda: membership._seat.member is not None or membership._seat.refused or membership._is_lost
            )
        membership._raise_if_out()
        return membership

    @property
    def member(self) -> int:
        """This worker's number; no other worker of the job ever has it."""
        assert self._seat.member is not None
        return self._seat.member

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._seat.facts

    @property
    def ended(self) -> bool:
        """True if the epoch of the last `meet` is over."""
        return self._seat.ended

    @property
    def change_wanted(self) -> bool:
        """True if somebody waits to join."""
        return self._seat.change_wanted

    def meet(self, report: Report, waiting: Callable[[], None] = lambda: None) -> Epoch:
        """Say what this worker holds, and return the next epoch that it is a member of.

        The epoch may have `ended` by then. `waiting` is called some times a second meanwhile; it may raise. Raises
        JobOver, RefusedError, ArbiterLostError.
        """
        with self._changed:
            self._seat.ended = True
            self._report, self._committed = report, None  # the report says it, and nothing may follow that was before
            self._say(Met(report))
        while True:
            with self._changed:
                self._raise_if_out()
                if self._seat.fresh and self._seat.epoch is not None:
                    self._seat.fresh, self._report = False, None
                    self._progress = monotonic()
                    return self._seat.epoch
                self._changed.wait(TICK_SECONDS)
            waiting()

    def heartbeat(self, place: str, step: int) -> None:
        """The main thread makes progress."""
        self._place, self._step, self._progress = place, step, monotonic()

    def at(self, place: str, step: int) -> None:
        """The main thread is about to enter a collective. All members call this at the same places."""
        self._reached += 1
        self.heartbeat(place, step)

    def committed(self, step: int) -> None:
        """A step was applied. The arbiter learns it from the thread: here it costs nothing."""
        self._has_committed = True
        self.heartbeat("committed", step)
        self._committed = step

    def leave(self, status: str, reason: str = "") -> None:
        """Leave in order: `status` is one of protocol.FINISHED, PREEMPTED, FAILED, HOPELESS."""
        with self._changed:
            self._say(Left(status, reason))
        self.close()

    def close(self) -> None:
        """Close the connection: without `leave` this counts as a death."""
        with self._changed:
            self._is_closing = True
            if self._connection is not None:
                self._connection.shut_down()
        self._thread.join(5.0)

    def _raise_if_out(self) -> None:
        seat = self._seat
        if seat.refused:
            raise RefusedError(
                f"this worker cannot take part: {seat.refused}.\n"
                "  All workers of a job compute with the same config, code, torch and data. Start it with those."
            )
        if seat.over:
            raise JobOver(seat.over)
        if self._is_lost:
            raise ArbiterLostError(
                f"no arbiter has answered at {self._quorum.host}:{self._quorum.port} for {LOST_SECONDS:.0f} s.\n"
                "  A worker without it cannot know who takes part. The same command resumes."
            )

    def _say(self, message: Message) -> None:
        if self._connection is not None:
            self._connection.send(message)

    # The thread

    def _run(self) -> None:
        give_up = monotonic() + LOST_SECONDS
        while not self._is_closing:
            self._is_answered = False
            connection = self._dial(give_up)
            if connection is None:
                break
            with contextlib.suppress(EOFError, ValueError, OSError):
                self._listen(connection)
            with self._changed:
                self._connection = None
                connection.close()
                self._seat.disconnected()
                self._note_end()
            if self._is_answered:
                give_up = monotonic() + LOST_SECONDS
            else:  # a tunnel takes connections though nobody is at its other end
                threading.Event().wait(RETRY_SECONDS)
        with self._changed:
            self._is_lost = True
            self._changed.notify_all()

    def _dial(self, give_up: float) -> Connection | None:
        """Connect and say who this is. None if there is no arbiter, or if nothing more is to be heard from it."""
        while not self._is_closing and not self._seat.refused and not self._seat.over and monotonic() < give_up:
            try:
                sock = socket.create_connection((self._quorum.host, self._quorum.port), timeout=5.0)
            except OSError:
                threading.Event().wait(RETRY_SECONDS)
                continue
            connection = Connection(sock)
            connection.heard = True
            with self._changed:
                connection.send_line({"token": self._quorum.token})
                connection.send(self._hello._replace(member=self._seat.member))
                if self._report is not None and not self._seat.fresh:
                    connection.send(Met(self._report))
                self._connection = connection
            return connection
        return None

    def _listen(self, connection: Connection) -> None:
        """Hear what the arbiter says until the connection is closed."""
        woke, said, told, known = monotonic(), 0.0, 0.0, None
        while not self._is_closing:
            wait_readable(TICK_SECONDS, connection.sock)
            for line in connection.lines():
                self._hear(connection, decode(line))
            now = monotonic()
            if self._committed != known and now - told > COMMITTED_SECONDS:
                with self._changed:
                    told, known = now, self._committed
                    if known is not None:
                        connection.send(Committed(known))
            if now - woke > 10 * TICK_SECONDS:  # this process did not run: that is not the main thread's time
                self._progress = now
            woke = now
            limit = self._limits[0 if self._has_committed else 1]
            if not self.ended and now - self._progress > limit and now - said > limit / 4:
                said = now
                with self._changed:
                    connection.send(Stuck(self._reached, self._place, self._step))

    def _hear(self, connection: Connection, message: Message) -> None:
        self._is_answered = True
        if isinstance(message, Where):
            idle = monotonic() - self._progress
            with self._changed:
                connection.send(Position(message.asked, self._reached, self._place, self._step, idle))
            return
        with self._changed:
            if isinstance(message, Publish):  # also if the main thread stands still and never enters it
                self._reached, self._place, self._progress = 0, "waiting", monotonic()
            self._seat.hear(message)
            self._note_end()
            self._changed.notify_all()

    def _note_end(self) -> None:
        if self._seat.ended and self._seat.epoch is not None:
            self._epoch_ended(self._seat.epoch.number)


def own_host(quorum: elastic.Quorum) -> str:
    """This machine's address, as it is seen on the way to the arbiter."""
    family = socket.AF_INET6 if ":" in quorum.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:  # nothing is sent
        sock.connect((quorum.host, quorum.port))
        return sock.getsockname()[0]
