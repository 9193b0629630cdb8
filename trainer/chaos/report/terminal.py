"""A campaign on a terminal: its progress, then the matrix of faults and invariants."""

import statistics
import string
import time
from collections.abc import Callable, Sequence
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
from trainer.show.units import SIGNS, clock, known, plural

STYLES = {
    "pass": "green", "fail": "bold red", "undetected": "magenta", "unknown": "yellow", "skipped": "dim",
    NOT_ASKED: "dim",
}  # fmt: skip
_NOT_RUN = ("skipped", NOT_ASKED)


def terminal(report: Report) -> RenderableType:
    """The matrix, a legend, totals, and a line for each run that did not pass. Fits 80 columns, needs no colour."""
    parts: list[Any] = [Text.assemble(("campaign ", "dim"), (report.campaign, "bold")), Text()]
    if report.results:
        # Each invariant's column is as wide as its one sign, so letters head them, and a legend explains the letters.
        letters = dict(zip(string.ascii_letters, matrix.invariants(report.results), strict=False))
        names = [Text.assemble((letter, "bold"), f" {name}") for letter, name in letters.items()]
        signs = "   ".join(f"{SIGNS[sign]} {meaning}" for sign, meaning in matrix.MEANINGS.items())
        parts += [_table(report.results, letters), Text(), Columns(names, padding=(0, 3)), Text(signs, "dim"), Text()]
    totals = Text(f"{plural(len(report.results), 'run')}: ", "bold")
    totals.append_text(Text(", ").join(_counts(report.results)) or Text("none"))
    totals.append(f" in {clock(report.seconds)}")
    totals.append("; interrupted before the rest" if report.interrupted else "", "bold red")
    reference, equality = "no reference run", "equality is unknown"
    if report.reference.get("weights_sha256"):
        steps, weights = known(report.reference.get("steps")), report.reference["weights_sha256"]
        reference = f"reference run: {steps} steps, weights_sha256 {weights}"
        equality = "" if report.reference.get("exact") else f"its sums are not exact, so {equality}"
    elif "result" in report.reference:  # a job that is no toprope run
        steps, result = report.reference.get("steps"), report.reference["result"]
        reference, equality = f"reference run: {clock(report.reference.get('seconds'))}", ""
        reference += f", {steps} steps" if steps is not None else ""
        reference += f", result {result}" if result is not None else ", no result to compare"
    line = ("; " if "run:" in reference else ": ").join(filter(None, (reference, equality)))
    return Group(*parts, totals, Text(line, "dim", overflow="fold"), *_reasons(report.results))


def _word(outcome: str) -> str:
    return "FAIL" if outcome == "fail" else outcome


def _counts(results: Sequence[Result]) -> list[Text]:
    return [Text(f"{n} {_word(name)}", STYLES[name]) for name, n in matrix.counts(results).items()]


def _table(results: Sequence[Result], letters: dict[str, str]) -> Any:
    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("fault", overflow="fold", ratio=1)
    for name in ("ranks", "outcome", "detect", "recover"):
        table.add_column(name, justify="right" if name in ("detect", "recover") else "left", no_wrap=True)
    table.add_column("".join(letters), no_wrap=True)  # no blanks: in 80 columns they would cut the faults' names
    for group, members in matrix.groups(results).items():
        table.add_row(Text(group, "bold"))
        for result in members:
            label = Text(matrix.label(result, members), "dim" if result.outcome in _NOT_RUN else "")
            signs = [answer.answer for answer in matrix.answers(result, [*letters.values()])]
            # "2×1 fsdp" is two nodes of one rank each.
            nodes = f"{result.nodes}×{result.ranks // result.nodes}" if result.nodes > 1 else str(result.ranks)
            table.add_row(
                Padding(label, (0, 0, 0, 2)),
                Text(f"{nodes} {result.strategy}", "dim"),
                Text(_word(result.outcome), STYLES[result.outcome]),
                matrix.seconds(matrix.worst(result, "detect_seconds")),
                matrix.seconds(matrix.worst(result, "recover_seconds")),
                Text("").join(Text(SIGNS[sign], STYLES[sign]) for sign in signs),
            )
    return table


def _reasons(results: Sequence[Result]) -> list[Table]:
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
        lines.add_row(Text(_word(outcome), STYLES[outcome]), reason)
    return [lines] if names else []


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
        first, self._done, before = self._done is None, list(results), len(self._done or [])
        if running != self._running:
            self._running, self._running_since = running, self._clock()
        if first and results:
            self.print(Text(f"{len(results)} of {self._total} runs had been done before", "dim"))
        for number in range(len(results) if first else before, len(results)):
            result, place = results[number], f"{number + 1:>{len(str(self._total))}}/{self._total}  "
            style, word = STYLES[result.outcome], f"{_word(result.outcome):<10} "
            measured = {verb: matrix.worst(result, f"{verb}_seconds") for verb in ("detect", "recover")}
            figures = [f"{verb} {matrix.seconds(value)} s" for verb, value in measured.items() if value is not None]
            figures += [clock(result.seconds)] if result.outcome not in _NOT_RUN else []
            about = f"{matrix.world(result)}  {'  '.join(figures)}".rstrip()
            self.print(Text.assemble((place, "dim"), (word, style), f"{result.name}  ", (about, "dim")))
            if result.outcome != "pass" and result.why:
                self.print(Text(f"{'':{len(place)}}{result.why}", style))

    def _progress_line(self) -> Text:
        now, done = self._clock(), self._done or []
        took = [result.seconds for result in done if result.outcome not in _NOT_RUN]
        left = statistics.median(took) * max(0, self._total - len(done)) if took else None
        counts = ", ".join(count.plain for count in _counts(done))
        parts = [f"{len(done)}/{self._total}", counts, clock(now - self._began), f"left {clock(left)}"]
        running = f"{self._running} ({clock(now - self._running_since)})" if self._running else "…"
        line = Text.assemble(("▸ ", "cyan"), (running, "bold"), "  ", "   ".join(part for part in parts if part))
        line.no_wrap, line.overflow = True, "ellipsis"
        return line
