"""What happened in a run, told from its event log alone: the contract of `inspect --json`, and a page for a person.

How the log is read:

- A step appears once per attempt that computed it. `train`, `eval`, `learning_rate` and `grad_norm` show the last
  attempt's value; so do steps that an earlier attempt reached and the present one has not come back to. By the
  promise of exact sums all values of a step are equal; `replayed_differently` lists the steps where they were not.
- An attempt's `ended` is what its ranks wrote: "finished" as soon as rank 0 did (the weights are final then), else
  "failed" if any rank failed, else "preempted". If none wrote an end it is null while a process of the attempt lives,
  "died" once all are gone or a later attempt has started, and "unknown" where nobody can tell: its processes
  belong to another host.
- `status` is "finished" if any attempt finished (starting a finished run again changes nothing), else the last
  attempt's end. An attempt without one is "running" while it lives, "failed" when it died. On another host silence
  decides: a live rank leaves a hung collective after elastic.step_timeout_seconds, so twice that is "failed".
- `faults` is filled in by faults/attribution.py.
- `incidents` (incidents.py): what went wrong and what it cost; `goodput` (goodput.py): where the wall time went.

A value nobody measured is None, never 0.
"""

import dataclasses
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import RunDirectoryError
from trainer.log import events, goodput, rundir
from trainer.log.events import AttemptEnded, AttemptStarted, Entry, EvalDone, FaultFired, StepDone, Warned
from trainer.log.incidents import first_line, incidents_of

if TYPE_CHECKING:
    from rich.console import RenderableType


def summarise(run: Path, checkpoints: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The state of a run directory as plain JSON values: what `inspect --json` prints.

    `checkpoints` is passed through: [{step, intact, bytes}]. Raises RunDirectoryError if `run` is no run, has no
    events, or its log is damaged. Losses are nats per token, times Unix seconds.
    """
    identity = rundir.read(run)
    entries = [entry for entry in events.read(run) if not isinstance(entry.event, FaultFired)]
    if not entries:
        raise RunDirectoryError(
            f"{run} has no events.\n"
            "  A run writes its first when training begins. Start it with `python -m trainer train CONFIG "
            f"--run {run}`, or wait for it."
        )
    attempts = [_attempt(number, group) for number, group in _by_attempt(entries).items()]
    for earlier in attempts[:-1]:
        earlier["ended"] = earlier["ended"] or "died"
    status = _status(attempts, entries, 2 * identity["config"]["elastic"]["step_timeout_seconds"])
    steps = [entry for entry in entries if isinstance(entry.event, StepDone) and entry.rank == 0]
    ends = [entry.event for entry in entries if isinstance(entry.event, AttemptEnded)]
    start = next((e.event for e in reversed(entries) if isinstance(e.event, AttemptStarted)), None)
    running = status == "running"
    incidents = incidents_of(entries, running)
    step = next((a["to_step"] for a in reversed(attempts) if a["to_step"] is not None), None)
    return {
        "status": status,
        "step": step,
        "steps": start.steps if start else None,
        "tokens": step * start.tokens_per_step if start and step is not None else None,
        "weights_sha256": _hash(ends, "weights_sha256") if status == "finished" else None,
        "state_sha256": _hash(ends, "state_sha256")
        if status == attempts[-1]["ended"] or status == "finished"
        else None,
        "attempts": attempts,
        "checkpoints": list(checkpoints),
        "train": _series(steps, "loss"),
        "eval": _evals(entries),
        "faults": [],
        "incidents": [dataclasses.asdict(incident) for incident in incidents],
        "goodput": goodput.account(entries, now=time.time() if running else None),
        "tokens_per_second": _rate(steps),
        "learning_rate": _series(steps, "learning_rate"),
        "grad_norm": _series(steps, "grad_norm"),
        **_exactness(steps),
        "fingerprint": start.fingerprint if start else identity["fingerprint"],
        "parameters": start.parameters if start else None,
        "device": start.device if start else None,
        "strategy": start.strategy if start else None,
        "started": entries[0].time,
        "ended": None if running else max(entry.time for entry in entries),
        "warnings": _warnings(entries, ends) + _gaps(entries),
    }


def _by_attempt(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.attempt, []).append(entry)
    return groups


def _attempt(number: int, entries: list[Entry]) -> dict[str, Any]:
    start = next((entry.event for entry in entries if isinstance(entry.event, AttemptStarted)), None)
    reached = [e.event.step for e in entries if isinstance(e.event, StepDone | AttemptEnded)]
    ends = {e.rank: e.event for e in entries if isinstance(e.event, AttemptEnded)}
    ended = _worst(ends)
    return {
        "attempt": number,
        "world_size": start.world_size if start else None,
        "from_step": start.from_step if start else None,
        "to_step": max(reached, default=start.from_step if start else None),
        "ended": ended,
        "seconds": entries[-1].time - entries[0].time,
        "started": entries[0].time,
        "reason": next((end.reason for end in ends.values() if end.status == ended and end.reason), None),
        "startup_seconds": start.startup_seconds if start else None,
    }


def _worst(ends: dict[int, AttemptEnded]) -> str | None:
    """What the attempt came to, from what each rank wrote; rank 0 alone can say that it finished."""
    written = {end.status for end in ends.values()}
    if 0 in ends and ends[0].status == "finished":
        return "finished"
    return next((status for status in ("failed", "preempted") if status in written), None)


def _status(attempts: list[dict[str, Any]], entries: list[Entry], silence_seconds: float) -> str:
    """The run's status; fills in how the last attempt ended where its ranks left no word."""
    if any(attempt["ended"] == "finished" for attempt in attempts):
        attempts[-1]["ended"] = attempts[-1]["ended"] or _fate(entries)
        return "finished"
    last = attempts[-1]
    if last["ended"] is None:
        last["ended"] = _fate(entries)
        if last["ended"] is None:
            return "running"
    if last["ended"] == "unknown":
        newest = max(entry.time for entry in entries)
        return "running" if time.time() - newest < silence_seconds else "failed"
    return "failed" if last["ended"] == "died" else last["ended"]


def _fate(entries: list[Entry]) -> str | None:
    """None if a process of the last attempt lives on this host, "died" if all are gone, "unknown" if none is here."""
    last = [entry for entry in entries if entry.attempt == entries[-1].attempt]
    ranks = [(entry.event, entry.time) for entry in last if isinstance(entry.event, AttemptStarted)]
    here = [(start.pid, since) for start, since in ranks if start.host == socket.gethostname()]
    if any(_alive(pid, since) for pid, since in here):
        return None
    return "died" if here or not ranks else "unknown"


def _alive(pid: int, since: float) -> bool:
    """Whether `pid` runs here and is the process that ran at Unix time `since`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's; alive
    try:  # Linux only; elsewhere the signal must do
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        booted = int(Path("/proc/stat").read_text().partition("btime ")[2].split()[0])
    except (OSError, IndexError):
        return True
    # A restarted container has the same host name and hands out the same small process ids.
    began = booted + int(fields[18]) / os.sysconf("SC_CLK_TCK")
    return state != "Z" and began < since + 2.0  # btime is in whole seconds


def _hash(ends: list[AttemptEnded], name: str) -> str | None:
    return next((value for end in reversed(ends) if (value := getattr(end, name)) is not None), None)


def _series(steps: list[Entry], name: str) -> list[list[float]]:
    """[[step, value]], the last attempt's value of each step."""
    values: dict[int, Any] = {e.event.step: getattr(e.event, name) for e in steps if isinstance(e.event, StepDone)}
    return [[step, values[step]] for step in sorted(values)]


def _evals(entries: list[Entry]) -> dict[str, list[list[float]]]:
    sets: dict[str, dict[int, list[float]]] = {}
    for event in (entry.event for entry in entries):
        if isinstance(event, EvalDone):
            sets.setdefault(event.set, {})[event.step] = [event.step, event.loss, event.bits_per_byte]
    return {name: [rows[step] for step in sorted(rows)] for name, rows in sets.items()}


def _rate(steps: list[Entry]) -> float | None:
    """Tokens over the seconds inside steps, all attempts; what lies between steps is not counted."""
    done = [entry.event for entry in steps if isinstance(entry.event, StepDone)]
    seconds = sum(event.seconds for event in done)
    return sum(event.tokens for event in done) / seconds if seconds > 0 else None


def _exactness(steps: list[Entry]) -> dict[str, Any]:
    """redone and flushed over the run's steps, each counted once; how replays compared with what they replayed."""
    last: dict[int, StepDone] = {}
    replayed, different = 0, set[int]()
    for event in (entry.event for entry in steps):
        assert isinstance(event, StepDone)
        before = last.get(event.step)
        if before is not None:
            replayed += 1
            # As text, since a NaN must equal itself.
            if repr(_result(before)) != repr(_result(event)):
                different.add(event.step)
        last[event.step] = event
    flushed = [event.flushed for event in last.values() if event.flushed is not None]
    return {
        "redone": sum(event.redone for event in last.values()) if last else None,
        "flushed": math.fsum(flushed) / len(flushed) if flushed else None,
        "replayed": replayed,
        "replayed_differently": sorted(different),
    }


def _result(event: StepDone) -> tuple[float, float, str]:
    return event.loss, event.grad_norm, event.samples


def _warnings(entries: list[Entry], ends: list[AttemptEnded]) -> list[dict[str, Any]]:
    """[{attempt, rank, message}]; attempt and rank are null for what only the whole log shows to be wrong."""
    said = [
        {"attempt": entry.attempt, "rank": entry.rank, "message": entry.event.message}
        for entry in entries
        if isinstance(entry.event, Warned)
    ]
    for what in ("weights_sha256", "state_sha256"):
        by_step: dict[int, set[str]] = {}
        for end in ends:
            if (value := getattr(end, what)) is not None:
                by_step.setdefault(end.step, set()).add(value)
        for step, values in by_step.items():
            if len(values) > 1:
                message = f"{what} at step {step} has {len(values)} values in the log; one of them is corrupt"
                said.append({"attempt": None, "rank": None, "message": message})
    return said


def _gaps(entries: list[Entry]) -> list[dict[str, Any]]:
    """Steps that the run stands on and that no attempt has computed: a log is missing, or a checkpoint is not ours."""
    steps = goodput.committed(entries)
    missing = sorted(set(range(1, max(steps, default=0) + 1)) - set(steps))
    if not missing:
        return []
    message = f"{len(missing)} steps are missing in the log, the first is {missing[0]}; their samples cannot be checked"
    return [{"attempt": None, "rank": None, "message": message}]


def render(summary: dict[str, Any]) -> "RenderableType":
    """A page for a person: one rich renderable for `rich.print`."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    tables = [_figures(summary), _attempts_table(summary)]
    if summary["checkpoints"]:
        tables.append(_checkpoints_table(summary))
    if summary["goodput"]["wall_seconds"]:
        tables.append(_goodput_table(summary["goodput"]))
    if summary["incidents"]:
        tables.append(_incidents_table(summary["incidents"]))
    warnings = [Text(f"warning: {line}", style="yellow") for line in _warning_lines(summary)]
    body = [Padding(item, (1, 0, 0, 2), expand=False) for item in tables]
    return Group(_headline(summary), *body, *([Text()] if warnings else []), *warnings)


def _headline(summary: dict[str, Any]) -> Any:
    from rich.text import Text

    colours = {"finished": "green", "running": "cyan", "preempted": "yellow", "failed": "red"}
    status, step, steps = summary["status"], summary["step"], summary["steps"]
    share = f" ({step / steps:.0%})" if steps and step is not None else ""
    width = round(24 * step / steps) if steps and step is not None else 0
    return Text.assemble(
        (f"● {status}", f"bold {colours[status]}"),
        "  ",
        ("━" * width, colours[status]),
        ("━" * (24 - width), "bright_black"),
        f"  step {_known(step)}/{_known(steps)}{share}",
    )


def _figures(summary: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    if summary["train"]:
        (_, first), (_, last) = summary["train"][0], summary["train"][-1]
        grid.add_row("train", f"{first:.4f} → {last:.4f} nats")
    for name, rows in summary["eval"].items():
        (_, first, first_bits), (_, last, last_bits) = rows[0], rows[-1]
        grid.add_row(name, f"{first:.4f} → {last:.4f} nats   {first_bits:.4f} → {last_bits:.4f} bits per byte")
    tokens = "?" if summary["tokens"] is None else f"{summary['tokens']:,}"
    grid.add_row("tokens", f"{tokens} at {tokens_per_second(summary['tokens_per_second'])}")
    parameters = "?" if summary["parameters"] is None else f"{summary['parameters']:,}"
    grid.add_row("model", f"{parameters} parameters, {_known(summary['strategy'])} on {_known(summary['device'])}")
    grid.add_row("exact sums", _exactness_text(summary))
    for name in ("fingerprint", "weights_sha256", "state_sha256"):
        if summary[name] is not None:
            grid.add_row(name, Text(summary[name]))
    return grid


def _exactness_text(summary: dict[str, Any]) -> str:
    flushed = "unknown" if summary["flushed"] is None else f"{summary['flushed']:.1e}"
    replayed, different = summary["replayed"], len(summary["replayed_differently"])
    equal = f", {different} differed" if different else ", all equal" if replayed else ""
    return f"{_known(summary['redone'])} redone   {flushed} flushed   {replayed} replayed{equal}"


def _attempts_table(summary: dict[str, Any]) -> Any:
    table = _table("attempt", "ranks", "steps", "ended", "time")
    for attempt in summary["attempts"]:
        steps = f"{_known(attempt['from_step'])} → {_known(attempt['to_step'])}"
        ended = attempt["ended"] or "running"
        reason = f": {first_line(attempt['reason'])}" if attempt["reason"] and ended != "finished" else ""
        number, ranks = str(attempt["attempt"]), _known(attempt["world_size"])
        table.add_row(number, ranks, steps, _plain(ended + reason), clock(attempt["seconds"]))
    return table


PART_COLOURS = {
    "productive": "green", "redone": "magenta", "lost_steps": "red", "evaluation": "blue", "save_stall": "yellow",
    "startup": "cyan", "hung": "bright_red", "down": "bright_magenta", "preempted": "bright_yellow",
    "shutdown": "bright_blue", "other": "bright_black",
}  # fmt: skip


def _goodput_table(account: dict[str, Any]) -> Any:
    """A bar of the wall time, and a line for each part of it that took any."""
    from rich.console import Group
    from rich.text import Text

    wall, parts = account["wall_seconds"], account["parts"]
    title = Text.assemble(("goodput ", "dim"), (f"{account['ratio']:.1%}", "bold"), f" of {clock(wall)}")
    table = _table("time", "seconds", "share", "")
    for name, seconds in parts.items():
        if seconds > 0:
            causes = account["startup"].items() if name == "startup" else ()
            detail = ", ".join(f"{cause} {part:.1f}" for cause, part in causes)
            label = Text.assemble(("■ ", PART_COLOURS[name]), name.replace("_", " "))
            table.add_row(label, f"{seconds:,.1f}", f"{seconds / wall:.1%}", detail)
    return Group(title, _bar(parts, wall, width=60), Text(), table)


def _bar(parts: dict[str, float], wall: float, width: int) -> Any:
    from rich.text import Text

    bar, passed, drawn = Text(), 0.0, 0
    for name, seconds in parts.items():
        passed += seconds
        upto = round(width * passed / wall)
        bar.append("━" * (upto - drawn), PART_COLOURS[name])
        drawn = upto
    return bar


def _incidents_table(incidents: list[dict[str, Any]]) -> Any:
    table = _table("attempt", "incident")
    for incident in incidents:
        table.add_row(str(incident["attempt"]), _plain(incident["text"]))
    return table


def _checkpoints_table(summary: dict[str, Any]) -> Any:
    table = _table("checkpoint", "size", "state")
    states = {True: "[green]intact[/]", False: "[red]damaged[/]", None: "not checked"}
    for checkpoint in summary["checkpoints"]:
        size = "?" if checkpoint.get("bytes") is None else megabytes(checkpoint["bytes"])
        table.add_row(f"step {checkpoint['step']}", size, states[checkpoint.get("intact")])
    return table


def _table(*columns: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for name in columns:
        left = name in ("attempt", "ended", "checkpoint", "state", "time", "incident", "")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    return table


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _warning_lines(summary: dict[str, Any]) -> list[str]:
    """Each message once, with how often it came."""
    lines = [
        f"{message} ({times} times)" if times > 1 else message
        for message, times in Counter(warning["message"] for warning in summary["warnings"]).items()
    ]
    if different := summary["replayed_differently"]:
        lines.append(f"{len(different)} replayed steps gave another result than before, the first at {different[0]}")
    return lines


def _known(value: Any) -> str:
    return "?" if value is None else str(value)


def tokens_per_second(rate: float | None) -> str:
    return "? tok/s" if rate is None else f"{rate:,.0f} tok/s"


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def clock(seconds: float | None) -> str:
    """h:mm:ss, or "?" for unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
