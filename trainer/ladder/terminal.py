"""A ladder on a terminal: its plan, its progress while it runs, its status; plan and status also as JSON."""

import time
from collections.abc import Sequence
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainer.fleet.run_store import RunStatus
from trainer.ladder.plan.ladder import Ladder, PlannedRun
from trainer.ladder.preregistration import Edits
from trainer.ladder.run import LadderStatus
from trainer.ladder.stats.records import BASELINE, SCARCE, UNITS
from trainer.show.live import LiveTable
from trainer.show.units import amount, clock, duration, scientific, setting

PLAIN_SECONDS = 15.0
"""Interval of the lines of progress without a terminal."""
STOPPING = "   stopping: runs save and leave; a second signal ends them at once"
STYLES: dict[RunStatus, str] = {
    "finished": "green", "running": "cyan", "stopped": "yellow", "waiting": "dim", "missing": "bold red",
}  # fmt: skip
SIGNS: dict[RunStatus, str] = {"finished": "✓", "running": "▸", "stopped": "‖", "waiting": "·", "missing": "✗"}


def plan_json(ladder: Ladder, status: LadderStatus, source: str, edits: Edits) -> dict[str, Any]:
    """The plan of a ladder with its cost as JSON; hours are None if no speed is known."""
    return {
        "name": ladder.name,
        **_fields(ladder.file, "question", "metric", "unit"),
        **_fields(
            ladder, "target_flops", "notices", *(("axis", "target_unique_tokens") if ladder.axis == "data" else ())
        ),
        "criterion": ladder.criterion.to_json(),
        "slots": status.slots.count,
        "rungs": [rung.to_json() for rung in ladder.all_rungs],
        "arms": [
            {"name": arm.name, "question": arm.question, "set": arm.settings, "combines": list(arm.combines)}
            for arm in ladder.arms
        ],
        "runs": [_run_json(run, status) for run in status.runs],
        "flops": status.flops,
        "hours": _hours(_whole_seconds(status)),
        "hours_left": _hours(status.seconds_left),
        "measured": source,
        "edits": edits.lines,
        "kept": edits.kept,
    }


def _run_json(run: PlannedRun, status: LadderStatus) -> dict[str, Any]:
    state, fields = status.state(run), ("arm", "rung", "seed", "rate", "key", "parameters", "tokens", "flops")
    return _fields(run, *fields) | {
        "steps": run.config.budget.steps, "status": state.status, "step": state.step, "reason": state.reason or None,
        "hours": _hours(status.speed.seconds(run)),
    }  # fmt: skip


def _fields(record: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


def _hours(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 3600


def _whole_seconds(status: LadderStatus) -> float | None:
    """Time of the whole ladder as if nothing had been run; None if no speed is known."""
    return status.seconds_in_slots(status.distinct)


def plan(ladder: Ladder, status: LadderStatus, source: str, edits: Edits) -> RenderableType:
    """The plan of a ladder: a table of sizes, a line for each arm, totals, notices."""
    on_data = ladder.axis == "data"
    text = ("unique text", "epochs") if on_data else ()
    sizes = empty_table("rung", "size", "parameters", *text, "tokens", "steps", "FLOPs", "runs", "each")
    for rung in ladder.all_rungs:
        runs = [run for run in status.runs if run.rung == rung.name]
        base = next((run for run in runs if run.arm == BASELINE), None)
        sizes.add_row(
            rung.name, f"{rung.shape.width} × {rung.shape.n_layers}", amount(rung.parameters),
            *((amount(rung.unique_tokens), f"{rung.tokens / rung.unique_tokens:.3g}") if on_data else ()),
            amount(rung.tokens),
            f"{base.config.budget.steps:,}" if base else "–", scientific(rung.flops),
            str(len({run.key for run in runs})) if runs else "–", duration(status.speed.seconds(base)) if base else "–",
        )  # fmt: skip
    arms = empty_table("arm", "changes", "question")
    for arm in ladder.arms:
        changes = ", ".join(f"{key} = {setting(value)}" for key, value in arm.settings.items())
        arms.add_row(arm.name, changes, arm.question)
    rule = ladder.criterion
    totals = (
        f"{len(status.distinct)} runs, {status.count('finished')} of them finished; {scientific(status.flops)} FLOPs; "
        f"{duration(_whole_seconds(status))} in {status.slots.count} slots, {duration(status.seconds_left)} of it left"
    )
    speed = "" if on_data else f", and takes at most {rule.max_slowdown:g}× the time"
    promotion = (
        f"an arm is promoted if it is surely worth {rule.min_gain:g}× {SCARCE[ladder.axis]} at "
        f"{scientific(ladder.target_amount)} {UNITS[ladder.axis]}, at level {rule.level:g}{speed}; "
        f"metric: {ladder.file.metric}, {ladder.file.unit}"
    )
    notices = [*(f"notice: {notice}" for notice in ladder.notices), *([str(edits)] if edits.lines else [])]
    return Group(
        Text.assemble(("ladder ", "dim"), (ladder.name, "bold"), f"  {ladder.file.question}"), Text(),
        sizes, Text(), arms, Text(), Text(totals), Text(f"time measured on {source}", "dim"), Text(promotion, "dim"),
        *(Text(notice, "yellow") for notice in notices),
    )  # fmt: skip


def empty_table(*columns: str) -> Any:
    """A table without rows: columns of words are aligned left, columns of numbers right."""
    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for name in columns:
        left = name in ("rung", "arm", "changes", "question", "verdict", "trend")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    return table


def status_json(ladder: Ladder, status: LadderStatus) -> dict[str, Any]:
    return {
        "name": ladder.name,
        "counts": {name: status.count(name) for name in SIGNS},
        **_fields(status, "flops", "flops_done", "seconds_left"),
        "slots": status.slots.count,
        "runs": [_run_json(run, status) for run in status.runs],
    }


def standing(ladder: Ladder, status: LadderStatus) -> RenderableType:
    """The matrix of rungs and arms with a sign for each run, progress, and the reasons of missing runs."""
    arms = list(dict.fromkeys(run.arm for run in status.runs))
    table = empty_table("rung", *arms)
    for rung in dict.fromkeys(run.rung for run in status.runs):
        groups = [[run for run in status.runs if (run.rung, run.arm) == (rung, arm)] for arm in arms]
        table.add_row(rung, *(_signs(runs, status) for runs in groups))
    return Group(
        Text.assemble(("ladder ", "dim"), (ladder.name, "bold")), Text(), table, Text(), _progress(status),
        Text("   ".join(f"{sign} {name}" for name, sign in SIGNS.items()), "dim"),
        *(Text.assemble((f"missing: {name}: ", "bold red"), reason) for name, reason in status.missing.items()),
    )  # fmt: skip


def _signs(runs: Sequence[PlannedRun], status: LadderStatus) -> Text:
    """A sign for each run; beside a running run, its share of completed steps."""
    signs = Text(justify="left")
    for run in runs:
        name = status.state(run).status
        share = f"{status.share_done(run):.0%} " if name == "running" else ""
        signs.append(SIGNS[name] + share, STYLES[name])
    return signs


def _progress(status: LadderStatus) -> Text:
    share = status.flops_done / status.flops if status.flops else 1.0
    width = min(30, round(30 * share))
    counts = [f"{number} {name}" for name in SIGNS if (number := status.count(name))]
    return Text.assemble(
        ("━" * width, "green"), ("━" * (30 - width), "bright_black"),
        f" {share:.0%} of {scientific(status.flops)} FLOPs   ",
        f"left {clock(status.seconds_left)}   ", ", ".join(counts), (STOPPING if status.stopping else "", "yellow"),
    )  # fmt: skip


class LadderProgress(LiveTable):
    """Shows the progress of a ladder: a live table on a terminal, else a line for each run that has ended.

    Pass `update` to `run.run`.
    """

    def __init__(self, ladder: Ladder, file: TextIO | None = None) -> None:
        super().__init__(file)
        self._ladder, self._printed_at = ladder, time.monotonic()
        self._printed_statuses: dict[str, str] | None = None
        """Status of each run at the last update; None before the first."""

    def update(self, status: LadderStatus) -> None:
        if self.is_terminal:
            self.refresh(standing(self._ladder, status))
        else:
            self._print_changes(status)

    def _print_changes(self, status: LadderStatus) -> None:
        before, finished = self._printed_statuses, False
        if before is None:
            self.print(f"{status.count('finished')} of {len(status.distinct)} runs had finished before")
        for run in status.distinct:
            state = status.state(run)
            if before is not None and before.get(run.key) != state.status and state.status in ("finished", "missing"):
                self.print(f"{state.status:<9} {run.name}{f': {state.reason}' if state.reason else ''}")
                finished |= state.status == "finished"
        self._printed_statuses = {run.key: status.state(run).status for run in status.distinct}
        if finished or time.monotonic() - self._printed_at >= PLAIN_SECONDS:
            self._printed_at = time.monotonic()
            self.print(_progress(status).plain.lstrip("━ "))


def ended(ladder: Ladder, status: LadderStatus, command: str) -> RenderableType:
    """The last table; if the ladder was stopped, also the `command` that continues it."""
    stopped = [Text(f"Stopped. Continue with: {command}", "bold yellow")] if status.stopping else []
    return Group(standing(ladder, status), *stopped)
