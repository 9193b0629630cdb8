"""Scores of several runs and of their ensemble, on a terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainer.show import units


def render(tree: dict[str, Any]) -> RenderableType:
    """Return a table of what `ensemble --json` prints: a row for each run, then the ensemble."""
    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for name in ("run", "weight", *(f"{name} (nats, bits/byte)" for name in tree["ensemble"])):
        table.add_column(name, justify="left" if name == "run" else "right", overflow="fold")
    for run in tree["runs"]:
        table.add_row(Text(run["run"]), f"{run['weight']:.3g}", *(_score(found) for found in run["eval"].values()))
    table.add_row(Text("ensemble", "bold"), "1", *(_score(found) for found in tree["ensemble"].values()), style="bold")
    cost = f"trained with {units.scientific(tree['training_flops'])} FLOPs together"
    return Group(table, Text(), Text(f"{cost}; a token takes {len(tree['runs'])} forward passes", "dim"))


def _score(found: dict[str, Any]) -> str:
    return f"{units.loss(found['loss'])}  {units.loss(found['bits_per_byte'])}"
