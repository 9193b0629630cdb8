"""Signals that ask to save and leave; docs/signals.md tells what each does to a run alone and under torchrun.

No torch here: the command line listens before torch is imported, which takes seconds.
"""

import signal
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
