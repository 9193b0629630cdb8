"""The live table: redrawn in place on a terminal; elsewhere plain lines, with progress at most every few seconds."""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


class LiveTable:
    """Shows progress to a person, with permanent lines above it. Use as a context manager, or call `close`.

    `file` None is standard output, `is_terminal` None asks the file, `enabled` False prints nothing at all. A file that
    cannot be written any more (a closed pipe or terminal) ends the printing, not the work. `render` makes the table
    four times a second, in a thread; without it, `refresh` draws it.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        is_terminal: bool | None = None,
        enabled: bool = True,
        render: "Callable[[], RenderableType] | None" = None,
        plain_seconds: float = 5.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.file = file or sys.stdout
        self.is_terminal = enabled and (self.file.isatty() if is_terminal is None else is_terminal)
        self._broken, self._render = not enabled, render
        self._plain_seconds, self._monotonic, self._printed = plain_seconds, monotonic, monotonic()
        self._live: Any = None

    def __enter__(self) -> Self:
        if self._render is not None and self.is_terminal:
            self._attempt(self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Erase the table and give the cursor back. Harmless when called twice."""
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._live.stop()

    def refresh(self, renderable: "RenderableType") -> None:
        """Draw the table anew. Nothing where there is no terminal."""
        if self.is_terminal:
            self._attempt(self._draw, renderable)

    def print(self, line: "str | Text", style: str = "") -> None:
        """Print a line above the table, to stay there."""
        from rich.text import Text

        text = Text(line, style) if isinstance(line, str) else line
        if self._live is not None:
            # soft_wrap: a hash cut over two lines cannot be copied.
            self._attempt(self._live.console.print, text, soft_wrap=True)
        elif self.is_terminal:
            self._attempt(self._console().print, text, soft_wrap=True)
        else:
            self._attempt(print, text.plain, file=self.file, flush=True)

    def print_progress(self, line: str, now: bool = False) -> None:
        """Print a line where there is no terminal, unless the last one is less than `plain_seconds` old."""
        if not self.is_terminal and (now or self._monotonic() - self._printed >= self._plain_seconds):
            self._printed = self._monotonic()
            self.print(line)

    def _console(self) -> Any:
        from rich.console import Console

        return Console(file=self.file, force_terminal=True, highlight=False)

    def _start(self) -> None:
        from rich.live import Live

        ours = self.file in (sys.stdout, sys.stderr)  # what others print then appears above the table
        self._live = Live(
            console=self._console(), get_renderable=self._render, refresh_per_second=4,
            auto_refresh=self._render is not None, transient=True, redirect_stdout=ours, redirect_stderr=ours,
        )  # fmt: skip
        self._live.start()

    def _draw(self, renderable: "RenderableType") -> None:
        if self._live is None or not self._live.is_started:
            self._start()
        assert self._live is not None
        self._live.update(renderable, refresh=True)

    def _attempt(self, write: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if self._broken:
            return
        # A reader that goes away (`… | head`) must not end the work: nothing more is printed.
        try:
            write(*arguments, **options)
        except (OSError, ValueError):  # ValueError: the file was closed
            self._broken = True
