"""The live table: redrawn in place on a terminal, below permanent lines; elsewhere the permanent lines alone."""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, TextIO

from trainer.show import terminal

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


class LiveTable:
    """Shows progress to a person. Use as a context manager, or call `close`.

    `file` None is standard output, `is_terminal` None asks the file. A file that cannot be written any more (a closed
    pipe or terminal) ends the printing, not the work. `render` makes the table four times a second, in a thread;
    without it, `refresh` draws it.
    """

    def __init__(
        self, file: TextIO | None = None, *, is_terminal: bool | None = None,
        render: "Callable[[], RenderableType] | None" = None,
    ) -> None:  # fmt: skip
        self.file = terminal.stream(file)
        self.is_terminal = terminal.is_terminal(self.file) if is_terminal is None else is_terminal
        self._broken, self._render = False, render
        self._live: Any = None

    def __enter__(self) -> Self:
        if self._render is not None and self.is_terminal:
            self._attempt(self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Erase the table and show the cursor again. Harmless when called twice."""
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._live.stop()

    def refresh(self, renderable: "RenderableType") -> None:
        """Redraw the table. Prints nothing if there is no terminal."""
        if self.is_terminal:
            self._attempt(self._draw, renderable)

    def print(self, line: "str | Text", style: str = "") -> None:
        """Print a permanent line above the table."""
        from rich.text import Text

        text = Text(line, style) if isinstance(line, str) else line
        if self.is_terminal:
            # soft_wrap: a hash cut over two lines cannot be copied.
            self._attempt(self._console.print, text, soft_wrap=True)
        else:
            self._attempt(print, text.plain, file=self.file, flush=True)

    @functools.cached_property
    def _console(self) -> Any:
        from rich.console import Console

        return Console(file=self.file, force_terminal=True, highlight=False)

    def _start(self) -> None:
        from rich.live import Live

        redirect = self.file in (sys.stdout, sys.stderr)  # redirected, the output of others appears above the table
        self._live = Live(
            console=self._console, get_renderable=self._render, refresh_per_second=4,
            auto_refresh=self._render is not None, transient=True, redirect_stdout=redirect, redirect_stderr=redirect,
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
        # A reader that leaves (`… | head`) must not end the work, so from then on nothing is printed.
        try:
            write(*arguments, **options)
        except (OSError, ValueError):  # ValueError: the file was closed
            self._broken = True
