"""Signals that ask to save and leave; docs/signals.md tells what each does to a run alone and under torchrun.

No torch here: the command line listens before torch is imported, which takes seconds.
"""

import contextlib
import signal
import socket
from collections.abc import Callable
from typing import Any

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""A scheduler's notice, Slurm's --signal, a terminal that was closed, Ctrl-C."""


def heeded(*more: signal.Signals) -> list[signal.Signals]:
    """ASKING and `more`, without those that this process was started to ignore, as by `nohup`: they stay ignored."""
    return [number for number in (*ASKING, *more) if signal.getsignal(number) is not signal.SIG_IGN]


def reset() -> None:
    """In a fork: put back the handlers that a new process has."""
    signal.set_wakeup_fd(-1)
    for number in heeded():
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


class StopSignals:
    """Listens for the signals of `heeded`. A second Ctrl-C ends the process at once.

    A SIGINT handler that other code has set is left in place.
    """

    def __init__(self) -> None:
        self.received = ""
        """Name of the last signal received; empty before the first."""
        for number in heeded():
            if number != signal.SIGINT or signal.getsignal(number) is signal.default_int_handler:
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def requested(self) -> bool:
        """True once this process has received a stop signal."""
        return bool(self.received)


class PassedOn:
    """A launcher's stop signals: the first one is passed on to its workers, and a Ctrl-C after it kills them."""

    def __init__(self, send: Callable[[int], None]) -> None:
        """`send` gives a signal to all workers."""
        self.number = 0
        """The signal that was passed on; 0 before."""
        self._send = send
        self._received: list[int] = []
        self.woken, self._note = socket.socketpair()
        """After `listen`, `woken` can be read once a signal has come or a child has ended: a launcher may sleep."""

    def listen(self) -> None:
        for number in heeded():
            signal.signal(number, lambda number, _: self._received.append(number))
        for end in (self.woken, self._note):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._note.fileno(), warn_on_full_buffer=False)

    def close(self) -> None:
        """Wake nobody any more."""
        if signal.set_wakeup_fd(-1) == self._note.fileno():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.woken.close()
        self._note.close()

    def pass_on(self) -> None:
        """Act on what was received since the last call."""
        with contextlib.suppress(BlockingIOError):
            while self.woken.recv(4096):
                pass
        while self._received:
            number = self._received.pop(0)
            if not self.number:
                self.ask(number)
            elif number == signal.SIGINT:
                self._send(signal.SIGKILL)

    def ask(self, number: int) -> None:
        """Ask all workers to stop, unless they have been asked."""
        if not self.number:
            self.number = number
            self._send(number)
