"""The live table: redrawn in place on a terminal, below permanent lines; elsewhere the permanent lines alone."""

import contextlib
import functools
import sys
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, TextIO

from trainer.show import terminal

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

BAR_WIDTH = 24
_wrapped = functools.partial(textwrap.fill, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


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
        """Print a permanent line above the table. A long one is broken between words; a hash can be copied whole."""
        if self.is_terminal:
            if isinstance(line, str):
                line = _wrapped(line, self.width)
            self._attempt(self._console.print, line, style=style or None, markup=False, emoji=False, soft_wrap=True)
        else:
            self._attempt(print, line, file=self.file, flush=True)

    @property
    def width(self) -> int:
        return self._console.width

    @functools.cached_property
    def _console(self) -> Any:
        from rich.console import Console

        console = Console(file=self.file, force_terminal=True, highlight=False)
        # A process that was killed while it was drawing has left its last line there, and the cursor hidden.
        if not console.is_dumb_terminal:
            self._attempt(self.file.write, terminal.CLEAR)
        return console

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


def bar(share: float, style: str, width: int = BAR_WIDTH) -> "Text":
    """A line of `width` columns, of which this share is coloured."""
    from rich.text import Text

    done = round(width * share)
    return Text.assemble(("━" * done, style), ("━" * (width - done), "bright_black"))
