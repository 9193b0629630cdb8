"""The page that `inspect` prints for a person, drawn with rich from the values of `trainer.log.summary`."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainer.log.incidents import first_line
from trainer.show.live import bar
from trainer.show.units import clock, known, loss, megabytes, tokens_per_second

STATUS_COLOURS = {"finished": "green", "running": "cyan", "preempted": "yellow", "failed": "red"}
CHECKPOINT_STATES = {True: "[green]intact[/]", False: "[red]damaged[/]", None: "not checked"}
PART_COLOURS = {
    "productive": "green", "redone": "magenta", "lost_steps": "red", "evaluation": "blue", "save_stall": "yellow",
    "startup": "cyan", "hung": "bright_red", "down": "bright_magenta", "preempted": "bright_yellow",
    "shutdown": "bright_blue", "other": "bright_black",
}  # fmt: skip
LEFT_ALIGNED = ("attempt", "ended", "checkpoint", "state", "time", "incident", "node", "")
BAR_WIDTH = 60


def render(summary: Mapping[str, Any]) -> RenderableType:
    """Return the page as one rich renderable. A part without anything to show is left out."""
    parts: list[RenderableType] = [_figures(summary)]
    parts.append(_table(("attempt", "ranks", "steps", "ended", "time"), map(_attempt_row, summary["attempts"])))
    if summary["checkpoints"]:
        saves = (
            (f"step {save['step']}", megabytes(save.get("bytes")), CHECKPOINT_STATES[save.get("intact")])
            for save in summary["checkpoints"]
        )
        parts.append(_table(("checkpoint", "size", "state"), saves))
    if len(summary["nodes"]) > 1:
        parts.append(_table(("node", "ranks", "a micro-batch", "failures", ""), map(_node_row, summary["nodes"])))
    if summary["goodput"]["wall_seconds"]:
        parts.append(_goodput(summary["goodput"]))
    if summary["incidents"]:
        parts.append(incidents(summary["incidents"]))
    counted = Counter(warning["message"] for warning in summary["warnings"])
    lines = [message if times == 1 else f"{message} ({times} times)" for message, times in counted.items()]
    if different := summary["replayed_differently"]:
        lines.append(f"{len(different)} replayed steps gave another result than before, the first at {different[0]}")
    warnings = [Text(_short(f"warning: {line}"), style="yellow") for line in lines]
    body = [Padding(part, (1, 0, 0, 2), expand=False) for part in parts]
    return Group(_headline(summary), *body, *([Text()] if warnings else []), *warnings)


def incidents(found: Iterable[Mapping[str, Any]]) -> Table:
    """Return the table of a run's incidents, or of a simulated one's: attempt, and what happened."""
    # Text, since whatever a run wrote must not be read as markup.
    rows = ((str(incident["attempt"]), Text(_short(incident["text"]))) for incident in found)
    return _table(("attempt", "incident"), rows)


def _headline(summary: Mapping[str, Any]) -> Text:
    status, step, steps = summary["status"], summary["step"], summary["steps"]
    done = step / steps if steps and step is not None else 0
    place = f"  step {known(step)}/{known(steps)}" + (f" ({done:.0%})" if steps and step is not None else "")
    return Text.assemble((f"● {status}  ", f"bold {STATUS_COLOURS[status]}"), bar(done, STATUS_COLOURS[status]), place)


def _figures(summary: Mapping[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    if summary["train"]:
        (_, first), (_, last) = summary["train"][0], summary["train"][-1]
        grid.add_row("train", f"{first:.4f} → {last:.4f} nats")
    for name, rows in summary["eval"].items():
        (_, first, first_bits), (_, last, last_bits) = rows[0], rows[-1]
        bits = f"{loss(first_bits)} → {loss(last_bits)} bits per byte"
        grid.add_row(name, f"{first:.4f} → {last:.4f} nats   {bits}")
    if code := _code_length(summary["code_length"]):
        grid.add_row("code length", code)
    grid.add_row("tokens", f"{known(summary['tokens'], ',')} at {tokens_per_second(summary['tokens_per_second'])}")
    where = f"{known(summary['strategy'])} on {known(summary['device'])}"
    grid.add_row("model", f"{known(summary['parameters'], ',')} parameters, {where}")
    flushed = "unknown" if summary["flushed"] is None else f"{summary['flushed']:.1e}"
    replayed, different = summary["replayed"], len(summary["replayed_differently"])
    equal = f", {different} differed" if different else ", all equal" if replayed else ""
    grid.add_row("exact sums", f"{known(summary['redone'])} redone   {flushed} flushed   {replayed} replayed{equal}")
    if islands := summary["islands"]:
        sent = f"{megabytes(islands['bytes'])} given by the first cluster to all others"
        late = "".join(f"   {seconds:.1f} s for cluster {number}" for number, seconds in islands["awaited"].items())
        waited = f"{islands['waited_seconds']:.1f} s waited{late}"
        grid.add_row("islands", f"{islands['exchanges']} exchanges   {sent}   {waited}")
    if sentinel := summary["sentinel"]:
        found = ", ".join(f"{count} {action}" for action, count in sentinel["found"].items()) or "nothing found"
        every = sentinel["state_hash_every_steps"]
        hashes = f"state and reduction every {every} steps" if every else "no state hashes"
        grid.add_row("sentinel", f"audits {sentinel['audit']}   {hashes}   {found}")
    if parent := summary["parent"]:
        grid.add_row("began from", Text(f"{parent['run']} at step {parent['step']}"))
    if summary["teachers"]:
        grid.add_row("taught by", Text(", ".join(teacher["run"] for teacher in summary["teachers"])))
    for name in ("fingerprint", "weights_sha256", "state_sha256"):
        if summary[name] is not None:
            # Cut where the terminal ends, never over two lines: `--json` has it whole.
            grid.add_row(name, Text(summary[name], no_wrap=True, overflow="ellipsis"))
    return grid


def _code_length(code: Mapping[str, Any]) -> str:
    """Bits per byte of the first epoch's text so far, beside what compressors make of it; empty if unknown."""
    if code["bits_per_byte"] is None:
        return ""
    epoch = "the first epoch" if code["complete"] else f"{code['steps']} of {code['first_epoch_steps']} steps"
    dropout = ", dropout on" if code["with_dropout"] else ""
    line = f"{code['bits_per_byte']:.4f} bits per byte over {epoch}, {code['bytes']:,} bytes{dropout}"
    beside = ", ".join(f"{name} {loss(bits)}" for name, bits in code.get("compressors", {}).items())
    return f"{line}\n{beside}" if beside else line


def _attempt_row(attempt: Mapping[str, Any]) -> tuple[RenderableType, ...]:
    source = " (memory)" if attempt["state_from"] == "memory" else ""
    steps = f"{known(attempt['from_step'])}{source} → {known(attempt['to_step'])}"
    ended = attempt["ended"] or "running"
    if attempt["reason"] and ended != "finished":
        ended += f": {first_line(attempt['reason'])}"
    number, ranks = str(attempt["attempt"]), known(attempt["world_size"])
    return number, ranks, steps, Text(_short(ended)), clock(attempt["seconds"])


def _node_row(node: Mapping[str, Any]) -> tuple[RenderableType, ...]:
    seconds, times = node["seconds_per_micro_batch"], node["times_others"]
    ranks = ", ".join(map(str, node["ranks"])) or "none now"
    slow = Text(f"slow: {times:.1f} times the others", "yellow") if node["is_slow"] else ""
    pace = "not measured" if seconds is None else f"{1000 * seconds:,.1f} ms"
    return Text(node["name"]), ranks, pace, str(node["failures"]), slow


def _goodput(account: Mapping[str, Any]) -> RenderableType:
    """A bar of the wall time, and a line for each part of it that took any."""
    wall = account["wall_seconds"]
    bar, rows = Text(), list[tuple[RenderableType, ...]]()
    passed = 0.0
    for name, seconds in account["parts"].items():
        # Rounded ends, not rounded lengths: the lengths then sum up to the bar's.
        begin, passed = passed, passed + seconds
        bar.append("━" * (round(BAR_WIDTH * passed / wall) - round(BAR_WIDTH * begin / wall)), PART_COLOURS[name])
        if seconds > 0:
            causes = account["startup"].items() if name == "startup" else ()
            detail = ", ".join(f"{cause} {part:.1f}" for cause, part in causes)
            label = Text.assemble(("■ ", PART_COLOURS[name]), name.replace("_", " "))
            rows.append((label, f"{seconds:,.1f}", f"{seconds / wall:.1%}", detail))
    title = Text.assemble(("goodput ", "dim"), (f"{account['ratio']:.1%}", "bold"), f" of {clock(wall)}")
    return Group(title, bar, Text(), _table(("time", "seconds", "share", ""), rows))


def _table(columns: Iterable[str], rows: Iterable[tuple[RenderableType, ...]]) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in LEFT_ALIGNED else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _short(text: str) -> str:
    """`text` with its hashes shortened: in a narrow terminal a whole one would be broken over two lines."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1…", text)
