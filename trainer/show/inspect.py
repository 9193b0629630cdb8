"""The page that `inspect` prints for a person, drawn with rich from the values of `trainer.log.summary`."""

from collections import Counter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainer.log.incidents import first_line
from trainer.show.units import clock, megabytes, tokens_per_second


def render(summary: dict[str, Any]) -> RenderableType:
    """A page for a person: one rich renderable for `rich.print`."""
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
        table.add_row(number, ranks, steps, Text(ended + reason), clock(attempt["seconds"]))
    return table


PART_COLOURS = {
    "productive": "green", "redone": "magenta", "lost_steps": "red", "evaluation": "blue", "save_stall": "yellow",
    "startup": "cyan", "hung": "bright_red", "down": "bright_magenta", "preempted": "bright_yellow",
    "shutdown": "bright_blue", "other": "bright_black",
}  # fmt: skip


def _goodput_table(account: dict[str, Any]) -> Any:
    """A bar of the wall time, and a line for each part of it that took any."""
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
        table.add_row(str(incident["attempt"]), Text(incident["text"]))
    return table


def _checkpoints_table(summary: dict[str, Any]) -> Any:
    table = _table("checkpoint", "size", "state")
    states = {True: "[green]intact[/]", False: "[red]damaged[/]", None: "not checked"}
    for checkpoint in summary["checkpoints"]:
        size = "?" if checkpoint.get("bytes") is None else megabytes(checkpoint["bytes"])
        table.add_row(f"step {checkpoint['step']}", size, states[checkpoint.get("intact")])
    return table


def _table(*columns: str) -> Any:
    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for name in columns:
        left = name in ("attempt", "ended", "checkpoint", "state", "time", "incident", "")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    return table


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
