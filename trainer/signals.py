"""Signals that ask a trainer to stop.

No torch here: the command line listens before torch is imported, which takes seconds.
"""

import signal
from typing import Any


class StopSignals:
    """Listens for requests to save and leave: SIGTERM (a scheduler's notice), SIGUSR1 (Slurm's --signal) and Ctrl-C.

    A second Ctrl-C ends the process at once. A SIGINT handler that other code has set is left in place.
    """

    def __init__(self) -> None:
        self.received = ""
        """Name of the last signal received; empty before the first."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def requested(self) -> bool:
        """True once this process has received a stop signal."""
        return bool(self.received)
