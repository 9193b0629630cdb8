"""The streams for all that is printed: a standard output and error that never stop the work.

A reader that leaves (`… | head`), a terminal that was closed, a disk that is full, a process started without a standard
output: from then on nothing is shown, and that is all. A character that the terminal's encoding lacks is shown as "?".

Several processes share a job's terminal, and one of them draws a live line there (show.live), which it may leave behind
when it is killed. So whatever goes to standard error begins a line by clearing the one it is on.
"""

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

from trainer.errors import TopropeError

CLEAR = "\r\x1b[K\x1b[?25h"
"""Control codes that erase the line which the cursor is on, and show the cursor."""


class OutputError(TopropeError):
    """The output that a command was asked for could not be written."""


class _Sink(io.FileIO):
    """A descriptor to which writing always succeeds; `problem` remembers the first time that it did not.

    With `clears`, each line written to a terminal first clears what another process has left on it.
    """

    problem: OSError | None = None

    def __init__(self, descriptor: int, clears: bool = False) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._clears = clears
        self._at_line_start = True

    def write(self, data: Any, /) -> int:
        try:
            # Asked anew for each line: a fleet's worker turns its descriptors from the terminal to its log.
            if self._clears and self._at_line_start and has_cursor(self):
                super().write(CLEAR.encode())
            while (written := super().write(data)) is None:  # another process has made it non-blocking
                select.select([], [self], [])
        except OSError as error:
            self.problem = self.problem or error
            return len(data)
        self._at_line_start = data[written - 1 : written] == b"\n"
        return written


def take(unbuffered: bool = False) -> None:
    """Put streams that never raise in the place of this process's standard output and error. Twice is harmless.

    Streams that somebody else has replaced are left alone. With `unbuffered`, what is printed appears at once.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            descriptor = _nowhere(descriptor)
        elif isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _Sink):
            if unbuffered:
                stream.reconfigure(line_buffering=True)
            continue
        elif stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue
        else:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        taken = io.TextIOWrapper(
            io.BufferedWriter(_Sink(descriptor, clears=name == "stderr")),
            encoding=getattr(stream, "encoding", "utf-8"),
            errors="backslashreplace" if name == "stderr" else "replace",
            line_buffering=unbuffered or stream is None or stream.line_buffering or stream.write_through,
            write_through=True,
        )
        setattr(sys, name, taken)
        setattr(sys, f"__{name}__", taken)


def check() -> None:
    """Raise OutputError if standard output could not be written, unless its reader left: that is the reader's choice.

    For commands whose result is what they print. A run continues without being shown.
    """
    sys.stdout.flush()
    problem = getattr(getattr(sys.stdout.buffer, "raw", None), "problem", None)
    if problem is not None and problem.errno != errno.EPIPE:
        raise OutputError(
            f"Standard output cannot be written: {problem.strerror}.\n  What was printed is not whole. Send it to a "
            "place that can be written and has room."
        )


def stream(file: TextIO | None = None) -> TextIO:
    """`file`, or standard output, or a place for nothing if there is neither; able to show any text, with "?"."""
    chosen = file or sys.stdout or io.StringIO()
    if isinstance(chosen, io.TextIOWrapper) and chosen.errors in ("strict", "surrogateescape"):
        with contextlib.suppress(OSError, ValueError):
            chosen.reconfigure(errors="replace")
    return chosen


def is_terminal(file: TextIO | io.FileIO) -> bool:
    """True if `file` is a terminal; False if it is closed."""
    try:
        return file.isatty()
    except (OSError, ValueError):
        return False


def has_cursor(file: TextIO | io.FileIO) -> bool:
    """True if `file` is a terminal that understands control codes."""
    return is_terminal(file) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def _nowhere(descriptor: int) -> int:
    """Open /dev/null, at this descriptor if it is closed: the next file opened there would be printed into."""
    null = os.open(os.devnull, os.O_RDWR)  # it may have been opened there already
    try:
        os.fstat(descriptor)
    except OSError:
        os.dup2(null, descriptor)
        os.close(null)
        return descriptor
    os.set_inheritable(null, True)
    return null
