"""A campaign on a terminal: what runs now, then the matrix."""

import contextlib
import string
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self, TextIO

from trainer.chaos.report import matrix
from trainer.chaos.results import Report, Result
from trainer.show.units import SIGNS, clock

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

STYLES = {"pass": "green", "fail": "bold red", "undetected": "magenta", "unknown": "yellow", "skipped": "dim"}
NAMES = {"pass": "pass", "fail": "FAIL", "undetected": "undetected", "unknown": "unknown", "skipped": "skipped"}


def terminal(report: Report) -> "RenderableType":
    """The matrix, a legend, totals, and a line for each run that did not pass; legible at 80 columns, uncoloured."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text.assemble(("campaign ", "dim"), (report.campaign, "bold")), Text()]
    if report.results:
        letters = _letters(matrix.invariants(report.results))
        parts += [_table(report.results, letters), Text(), _legend(letters), Text()]
    parts.append(_totals(report))
    parts.append(Text(matrix.reference_line(report), "dim", overflow="fold"))
    parts += _reasons(report.results)
    return Group(*parts)


def _letters(invariants: Sequence[str]) -> dict[str, str]:
    """{letter: invariant}: a name would make a column wider than its one sign."""
    return dict(zip(string.ascii_lowercase + string.ascii_uppercase, invariants, strict=False))


def _table(results: Sequence[Result], letters: dict[str, str]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("fault", overflow="fold", ratio=1)
    for name in ("ranks", "outcome"):
        table.add_column(name, no_wrap=True)
    for name in ("detect", "recover"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("".join(letters), no_wrap=True)  # blanks between them would leave names of 10 letters
    for group, members in matrix.groups(results).items():
        table.add_row(Text(group, "bold"))
        for result in members:
            table.add_row(
                Padding(
                    Text(matrix.label(result, members), STYLES["skipped"] * (result.outcome == "skipped")), (0, 0, 0, 2)
                ),
                Text(matrix.world_short(result), "dim"),
                Text(NAMES[result.outcome], STYLES[result.outcome]),
                matrix.seconds(matrix.worst(result, "detect_seconds")),
                matrix.seconds(matrix.worst(result, "recover_seconds")),
                _signs(result, letters),
            )
    return table


def _signs(result: Result, letters: dict[str, str]) -> "Text":
    from rich.text import Text

    given = matrix.answers(result)
    signs = [given.get(name, ("skipped", ""))[0] for name in letters.values()]
    return Text("").join(Text(SIGNS[sign], STYLES[sign]) for sign in signs)


def _legend(letters: dict[str, str]) -> Any:
    from rich.columns import Columns
    from rich.console import Group
    from rich.text import Text

    names = [Text.assemble((letter, "bold"), f" {name}") for letter, name in letters.items()]
    signs = [f"{SIGNS[sign]} {matrix.MEANINGS[sign]}" for sign in ("pass", "fail", "undetected", "unknown")]
    last = f"{matrix.NOT_ASKED} not asked, not measured"
    return Group(Columns(names, padding=(0, 3)), Text(f"{'   '.join(signs)}   {last}", "dim"))


def _totals(report: Report) -> "Text":
    from rich.text import Text

    line = Text(f"{len(report.results)} run{'' if len(report.results) == 1 else 's'}: ", "bold")
    counts = matrix.counts(report.results)
    line.append_text(Text(", ").join(Text(f"{n} {NAMES[name]}", STYLES[name]) for name, n in counts.items()))
    line.append(f"{'' if counts else 'none'} in {clock(report.seconds)}")
    if report.interrupted:
        line.append("; interrupted before the rest", "bold red")
    return line


def _reasons(results: Sequence[Result]) -> Iterator[Any]:
    """Why what did not pass did not, the worst first; those with one reason together."""
    from rich.table import Table
    from rich.text import Text

    together: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.outcome != "pass":
            why = result.why.removeprefix(f"{result.name}: ")
            together.setdefault((result.outcome, why), []).append(matrix.label(result, results))
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for (outcome, why), names in sorted(together.items(), key=lambda item: matrix.OUTCOMES.index(item[0][0])):
        said = Text.assemble((", ".join(dict.fromkeys(names)), "bold"), f": {why}")
        lines.add_row(Text(NAMES[outcome], STYLES[outcome]), said)
    if together:
        yield lines


class Live:
    """Tells a person how a campaign goes: a line for each run that has ended, on a terminal also what runs now.

    Use as a context manager and give `update` to the runner. `total` counts the runs, `file` None is standard output,
    `enabled` False prints nothing at all. A reader that goes away ends the telling only.
    """

    def __init__(
        self,
        total: int,
        file: TextIO | None = None,
        enabled: bool = True,
        is_terminal: bool | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._enabled, self._clock = total, enabled, monotonic
        self._file = file or sys.stdout
        self._terminal = self._file.isatty() if is_terminal is None else is_terminal
        self._done: Sequence[Result] | None = None
        """None until the first update: what was done before that is told in one line."""
        self._running = ""
        self._began = self._since = monotonic()
        self._screen: Any = None

    def __enter__(self) -> Self:
        if self._enabled and self._terminal:
            from rich.console import Console
            from rich.live import Live as Screen

            console = Console(file=self._file, force_terminal=True, highlight=False)
            ours = self._file in (sys.stdout, sys.stderr)  # others' prints then appear above the line
            self._screen = Screen(
                console=console, get_renderable=self._now, refresh_per_second=4, transient=True,
                redirect_stdout=ours, redirect_stderr=ours,
            )  # fmt: skip
            self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._screen is not None:
            with contextlib.suppress(OSError, ValueError):
                self._screen.stop()
            self._screen = None

    def update(self, results: Sequence[Result], running: str) -> None:
        """All results so far, and the name of what has just begun; empty at the end."""
        if self._done is None:
            lines = [_before(len(results), self._total)] if results else []
        else:
            new = range(len(self._done), len(results))
            lines = [line for number in new for line in _told(results[number], number + 1, self._total)]
        if running != self._running:
            self._running, self._since = running, self._clock()
        self._done = list(results)
        for line in lines:
            self._print(line)

    def _print(self, line: "Text") -> None:
        if not self._enabled:
            return
        with contextlib.suppress(OSError, ValueError):  # ValueError: the file was closed
            if self._screen is not None:
                self._screen.console.print(line, soft_wrap=True)
            else:
                print(line.plain, file=self._file, flush=True)

    def _now(self) -> "Text":
        """The line that is redrawn."""
        from rich.text import Text

        now, done = self._clock(), self._done or []
        left = matrix.seconds_left(done, self._total)
        tally = ", ".join(f"{n} {NAMES[name]}" for name, n in matrix.counts(done).items())
        parts = [f"{len(done)}/{self._total}", tally, clock(now - self._began), f"left {clock(left)}"]
        what = f"{self._running} ({clock(now - self._since)})" if self._running else "…"
        line = Text.assemble(("▸ ", "cyan"), (what, "bold"), "  ", "   ".join(part for part in parts if part))
        line.no_wrap, line.overflow = True, "ellipsis"
        return line


def _before(number: int, total: int) -> "Text":
    from rich.text import Text

    return Text(f"{number} of {total} runs had been done before", "dim")


def _told(result: Result, number: int, total: int) -> Iterator["Text"]:
    from rich.text import Text

    figures = [
        f"{verb} {matrix.seconds(value)} s"
        for verb in ("detect", "recover")
        if (value := matrix.worst(result, f"{verb}_seconds")) is not None
    ]
    figures += [clock(result.seconds)] if result.outcome != "skipped" else []
    yield Text.assemble(
        (f"{number:>{len(str(total))}}/{total}  ", "dim"),
        (f"{NAMES[result.outcome]:<11}", STYLES[result.outcome]),
        f"{result.name}  ",
        (f"{matrix.world(result)}  {'  '.join(figures)}".rstrip(), "dim"),
    )
    if result.outcome != "pass" and result.why:
        yield Text(f"{'':{2 * len(str(total)) + 3}}{result.why}", STYLES[result.outcome])
