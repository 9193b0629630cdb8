"""A campaign on a terminal: its progress, then the matrix of faults and invariants."""

import string
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainer.chaos.report import matrix
from trainer.chaos.results import Report, Result
from trainer.faults.checker import NOT_ASKED
from trainer.show.live import LiveTable
from trainer.show.units import SIGNS, clock, plural

STYLES = {"pass": "green", "fail": "bold red", "undetected": "magenta", "unknown": "yellow", "skipped": "dim"}
STYLES |= {NOT_ASKED: "dim"}
NAMES = {outcome: outcome for outcome in STYLES} | {"fail": "FAIL"}


def terminal(report: Report) -> RenderableType:
    """The matrix, a legend, totals, and a line for each run that did not pass. Fits 80 columns, needs no colour."""
    parts: list[Any] = [Text.assemble(("campaign ", "dim"), (report.campaign, "bold")), Text()]
    if report.results:
        # Each invariant's column is as wide as its one sign, so letters head them, and a legend explains the letters.
        letters = dict(zip(string.ascii_letters, matrix.invariants(report.results), strict=False))
        parts += [_table(report.results, letters), Text(), _legend(letters), Text()]
    parts.append(_totals(report))
    parts.append(Text(matrix.reference_line(report), "dim", overflow="fold"))
    parts += _reasons(report.results)
    return Group(*parts)


def _table(results: Sequence[Result], letters: dict[str, str]) -> Any:
    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("fault", overflow="fold", ratio=1)
    for name in ("ranks", "outcome", "detect", "recover"):
        table.add_column(name, justify="right" if name in ("detect", "recover") else "left", no_wrap=True)
    table.add_column("".join(letters), no_wrap=True)  # no blanks: in 80 columns they would cut the faults' names
    for group, members in matrix.groups(results).items():
        table.add_row(Text(group, "bold"))
        for result in members:
            label = Text(matrix.label(result, members), "dim" if result.outcome == "skipped" else "")
            signs = [answer.answer for answer in matrix.answers(result, [*letters.values()])]
            table.add_row(
                Padding(label, (0, 0, 0, 2)),
                Text(matrix.world_short(result), "dim"),
                Text(NAMES[result.outcome], STYLES[result.outcome]),
                matrix.seconds(matrix.worst(result, "detect_seconds")),
                matrix.seconds(matrix.worst(result, "recover_seconds")),
                Text("").join(Text(SIGNS[sign], STYLES[sign]) for sign in signs),
            )
    return table


def _legend(letters: dict[str, str]) -> Any:
    names = [Text.assemble((letter, "bold"), f" {name}") for letter, name in letters.items()]
    signs = "   ".join(f"{SIGNS[sign]} {meaning}" for sign, meaning in matrix.MEANINGS.items())
    return Group(Columns(names, padding=(0, 3)), Text(signs, "dim"))


def _totals(report: Report) -> Text:
    line = Text(f"{plural(len(report.results), 'run')}: ", "bold")
    counts = matrix.counts(report.results)
    line.append_text(Text(", ").join(Text(f"{n} {NAMES[name]}", STYLES[name]) for name, n in counts.items()))
    line.append(f"{'' if counts else 'none'} in {clock(report.seconds)}")
    if report.interrupted:
        line.append("; interrupted before the rest", "bold red")
    return line


def _reasons(results: Sequence[Result]) -> Iterator[Any]:
    """A table with a line for each reason why runs did not pass, and the names of these runs; the worst first."""
    names: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.outcome != "pass":
            # One cause often fails many runs: without the run's own name their reasons are equal.
            why = result.why.removeprefix(f"{result.name}: ")
            names.setdefault((result.outcome, why), []).append(matrix.label(result, results))
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for (outcome, why), labels in sorted(names.items(), key=lambda item: matrix.OUTCOMES.index(item[0][0])):
        reason = Text.assemble((", ".join(dict.fromkeys(labels)), "bold"), f": {why}")
        lines.add_row(Text(NAMES[outcome], STYLES[outcome]), reason)
    if names:
        yield lines


class CampaignProgress(LiveTable):
    """Shows the progress of a campaign: a line for each run that has ended; on a terminal, also the current run.

    Pass `update` to `run.run`. `total` is the number of runs.
    """

    def __init__(
        self, total: int, file: TextIO | None = None, is_terminal: bool | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        super().__init__(file, is_terminal=is_terminal, render=self._progress_line)
        self._total, self._clock = total, monotonic
        self._done: Sequence[Result] | None = None
        """None until the first update. Its results are those of earlier starts: one line says how many."""
        self._running = ""
        self._began = self._running_since = monotonic()

    def update(self, results: Sequence[Result], running: str) -> None:
        """Receive all results so far, and the name of the run that has just begun; "" at the end."""
        if self._done is None:
            lines = [Text(f"{len(results)} of {self._total} runs had been done before", "dim")] if results else []
        else:
            new = range(len(self._done), len(results))
            lines = [line for number in new for line in _result_lines(results[number], number + 1, self._total)]
        if running != self._running:
            self._running, self._running_since = running, self._clock()
        self._done = list(results)
        for line in lines:
            self.print(line)

    def _progress_line(self) -> Text:
        now, done = self._clock(), self._done or []
        left = matrix.seconds_left(done, self._total)
        counts = ", ".join(f"{n} {NAMES[name]}" for name, n in matrix.counts(done).items())
        parts = [f"{len(done)}/{self._total}", counts, clock(now - self._began), f"left {clock(left)}"]
        running = f"{self._running} ({clock(now - self._running_since)})" if self._running else "…"
        line = Text.assemble(("▸ ", "cyan"), (running, "bold"), "  ", "   ".join(part for part in parts if part))
        line.no_wrap, line.overflow = True, "ellipsis"
        return line


def _result_lines(result: Result, number: int, total: int) -> Iterator[Text]:
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
