"""A ladder on a terminal: what is planned, how it goes, how it stands. The same as plain JSON."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TextIO

from trainer.ladder.plan.ladder import Ladder, PlannedRun, PlannedRung
from trainer.ladder.preregistration import Edits
from trainer.ladder.run import Done, View
from trainer.ladder.speed import Speed
from trainer.ladder.stats.records import BASELINE
from trainer.show.units import clock, scientific

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

PLAIN_SECONDS = 15.0
STOPPING = "   stopping: runs save and leave; a second signal ends them at once"
STYLES = {"finished": "green", "running": "cyan", "stopped": "yellow", "waiting": "dim", "missing": "bold red"}
SIGNS = {"finished": "✓", "running": "▸", "stopped": "‖", "waiting": "·", "missing": "✗"}
MEANINGS = "✓ finished   ▸ running   ‖ stopped   · waiting   ✗ missing"


# The plan


def plan_json(ladder: Ladder, view: View, known: Speed, source: str, edits: Edits) -> dict[str, Any]:
    """What will run, and what it takes; hours are None where nothing is known."""
    hours = {run.key: _hours(known.seconds(run)) for run in view.runs}
    return {
        "name": ladder.name,
        "question": ladder.question,
        "metric": ladder.metric,
        "unit": ladder.unit,
        "criterion": ladder.criterion.to_json(),
        "target_flops": ladder.target_flops,
        "slots": view.slots,
        "rungs": [_rung_json(rung) for rung in ladder.all_rungs],
        "arms": [
            {"name": arm.name, "question": arm.question, "set": arm.settings, "combines": list(arm.combines)}
            for arm in ladder.arms
        ],
        "runs": [
            {
                "arm": run.arm, "rung": run.rung, "seed": run.seed, "rate": run.rate, "key": run.key,
                "parameters": run.parameters, "tokens": run.tokens, "steps": run.config.budget.steps,
                "flops": run.flops, "hours": hours[run.key], "status": view.state(run).status,
            }
            for run in view.runs
        ],
        "flops": view.flops,
        "hours": _hours(_total(view, known)),
        "hours_left": _hours(_left(view, known)),
        "measured": source,
        "notices": ladder.notices,
        "edits": edits.lines,
        "kept": edits.kept,
    }  # fmt: skip


def _rung_json(rung: PlannedRung) -> dict[str, Any]:
    shape = {"width": rung.shape.width, "n_layers": rung.shape.n_layers, "n_heads": rung.shape.n_heads}
    figures = {"parameters": rung.parameters, "tokens": rung.tokens, "flops": rung.flops, "seeds": list(rung.seeds)}
    return {"name": rung.name} | shape | figures


def _hours(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 3600


def _total(view: View, known: Speed) -> float | None:
    """Of all runs, in the slots; None where nothing was measured."""
    distinct = {run.key: run for run in view.runs}
    seconds = [known.seconds(run) for run in distinct.values()]
    told = [one for one in seconds if one is not None]
    return sum(told) / view.slots if len(told) == len(seconds) else None


def _left(view: View, known: Speed) -> float | None:
    left = {run.key: run for run in view.runs if view.state(run).status != "finished"}
    seconds = [known.seconds(run, view.state(run).step) for run in left.values()]
    told = [one for one in seconds if one is not None]
    return sum(told) / view.slots if len(told) == len(seconds) else None


def plan(ladder: Ladder, view: View, known: Speed, source: str, edits: Edits) -> "RenderableType":
    """A table of sizes, a line for each arm, totals, and what a person should know before."""
    from rich.console import Group
    from rich.text import Text

    lines: list[Any] = [Text.assemble(("ladder ", "dim"), (ladder.name, "bold"), f"  {ladder.question}"), Text()]
    lines += [_sizes(ladder, view, known), Text(), _arms(ladder), Text()]
    total, left = _total(view, known), _left(view, known)
    distinct = {run.key: run for run in view.runs}
    finished = view.count("finished")
    lines.append(
        Text(
            f"{len(distinct)} runs, {finished} of them finished; {scientific(view.flops)} FLOPs; {_words(total)} in "
            f"{view.slots} slots, {_words(left)} of it left"
        )
    )
    lines.append(Text(f"time measured on {source}", "dim"))
    lines.append(Text(_target_line(ladder), "dim"))
    lines += [Text(f"notice: {notice}", "yellow") for notice in ladder.notices]
    lines += [Text(str(edits), "yellow")] if edits.lines else []
    return Group(*lines)


def _sizes(ladder: Ladder, view: View, known: Speed) -> Any:
    table = empty_table("rung", "size", "parameters", "tokens", "steps", "FLOPs", "runs", "each")
    for rung in ladder.all_rungs:
        runs = [run for run in view.runs if run.rung == rung.name]
        base = next((run for run in runs if run.arm == BASELINE), None)
        table.add_row(
            rung.name, f"{rung.shape.width} × {rung.shape.n_layers}", _count(rung.parameters), _count(rung.tokens),
            f"{base.config.budget.steps:,}" if base else "–", scientific(rung.flops),
            str(len({run.key for run in runs})) if runs else "–", _words(known.seconds(base)) if base else "–",
        )  # fmt: skip
    return table


def _arms(ladder: Ladder) -> Any:
    table = empty_table("arm", "changes", "question")
    for arm in ladder.arms:
        changes = ", ".join(f"{key} = {_value(value)}" for key, value in arm.settings.items())
        table.add_row(arm.name, changes, arm.question)
    return table


def _target_line(ladder: Ladder) -> str:
    rule, target = ladder.criterion, scientific(ladder.target_flops)
    return (
        f"promoted is what is surely worth {rule.min_gain:g}× compute at {target} FLOPs and takes at most "
        f"{rule.max_slowdown:g}× the time, at level {rule.level:g}; metric: {ladder.metric}, {ladder.unit}"
    )


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _words(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _count(number: float) -> str:
    """ "34.8k", "2.29M" """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def empty_table(*columns: str) -> Any:
    """Columns of names are on the left, of numbers on the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for name in columns:
        left = name in ("rung", "arm", "changes", "question", "verdict", "trend")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    return table


# How it stands


def status_json(ladder: Ladder, view: View) -> dict[str, Any]:
    return {
        "name": ladder.name,
        "counts": {status: view.count(status) for status in SIGNS},  # pyright: ignore[reportArgumentType]
        "flops": view.flops,
        "flops_done": view.flops_done,
        "seconds_left": view.seconds_left,
        "slots": view.slots,
        "runs": [
            {
                "arm": run.arm, "rung": run.rung, "seed": run.seed, "rate": run.rate, "key": run.key,
                "status": view.state(run).status, "step": view.state(run).step, "steps": run.config.budget.steps,
                "reason": view.state(run).reason or None,
            }
            for run in view.runs
        ],
    }  # fmt: skip


def standing(ladder: Ladder, view: View) -> "RenderableType":
    """The matrix rung × arm, progress, and why what is missing is so."""
    from rich.console import Group
    from rich.text import Text

    arms = list(dict.fromkeys(run.arm for run in view.runs))
    table = empty_table("rung", *arms)
    for rung in dict.fromkeys(run.rung for run in view.runs):
        cells = [[run for run in view.runs if (run.rung, run.arm) == (rung, arm)] for arm in arms]
        table.add_row(rung, *(_cell(runs, view) for runs in cells))
    parts = [Text.assemble(("ladder ", "dim"), (ladder.name, "bold")), Text(), table, Text(), _progress(view)]
    parts += [Text(MEANINGS, "dim")]
    return Group(*parts, *_missing(view))


def _cell(runs: Sequence[PlannedRun], view: View) -> "Text":
    """A sign for each run; beside what runs, how far it is."""
    from rich.text import Text

    cell = Text(justify="left")
    for run in runs:
        state = view.state(run)
        cell.append(SIGNS[state.status], STYLES[state.status])
        if state.status == "running":
            cell.append(f"{state.step / run.config.budget.steps:.0%} ", STYLES["running"])
    return cell


def _progress(view: View) -> "Text":
    from rich.text import Text

    share = view.flops_done / view.flops if view.flops else 1.0
    width = min(30, round(30 * share))
    counts = [f"{number} {status}" for status in SIGNS if (number := view.count(status))]  # pyright: ignore[reportArgumentType]
    return Text.assemble(
        ("━" * width, "green"), ("━" * (30 - width), "bright_black"),
        f" {share:.0%} of {scientific(view.flops)} FLOPs   ",
        f"left {clock(view.seconds_left)}   ", ", ".join(counts), (STOPPING if view.stopping else "", "yellow"),
    )  # fmt: skip


def _missing(view: View) -> list[Any]:
    from rich.text import Text

    return [
        Text.assemble((f"missing: {run.name}: ", "bold red"), view.state(run).reason)
        for run in view.runs
        if view.state(run).status == "missing"
    ]


class Live:
    """Tells a person how a ladder goes: on a terminal a table that is redrawn, else a line for whatever has happened.

    Use as a context manager and give `update` to the scheduler; `file` None is standard output. A reader that goes away
    ends the telling only.
    """

    def __init__(
        self,
        ladder: Ladder,
        file: TextIO | None = None,
        is_terminal: bool | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ladder, self._clock = ladder, monotonic
        self._file = file or sys.stdout
        self._terminal = self._file.isatty() if is_terminal is None else is_terminal
        self._told: dict[str, str] | None = None
        """What was last said of each run; None before the first update."""
        self._said_at = monotonic()
        self._screen: Any = None

    def __enter__(self) -> Self:
        if self._terminal:
            from rich.console import Console
            from rich.live import Live as Screen

            console = Console(file=self._file, force_terminal=True, highlight=False)
            self._screen = Screen(console=console, auto_refresh=False, transient=True)
            self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._screen is not None:
            with contextlib.suppress(OSError, ValueError):
                self._screen.stop()
            self._screen = None

    def update(self, view: View) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the file was closed
            if self._screen is not None:
                self._screen.update(standing(self._ladder, view), refresh=True)
            else:
                self._tell(view)

    def _tell(self, view: View) -> None:
        now = {run.key: view.state(run).status for run in view.runs}
        names = {run.key: run.name for run in reversed(view.runs)}
        if self._told is None:
            self._print(f"{view.count('finished')} of {len(now)} runs had finished before")
        for key, status in now.items():
            if self._told is not None and self._told.get(key) != status and status in ("finished", "missing"):
                reason = next((view.state(run).reason for run in view.runs if run.key == key), "")
                self._print(f"{status:<9} {names[key]}{f': {reason}' if reason else ''}")
                self._said_at = float("-inf") if status == "finished" else self._said_at
        self._told = dict(now)
        if self._clock() - self._said_at >= PLAIN_SECONDS:
            self._said_at = self._clock()
            self._print(_progress(view).plain.lstrip("━ "))

    def _print(self, line: str) -> None:
        print(line, file=self._file, flush=True)


def ended(ladder: Ladder, done: Done, command: str) -> "RenderableType":
    """The last table, and what to do next: `command` goes on."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [standing(ladder, done.view)]
    if done.interrupted:
        parts.append(Text(f"Stopped. Go on with: {command}", "bold yellow"))
    return Group(*parts)
