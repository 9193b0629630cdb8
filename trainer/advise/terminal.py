"""A report of `advise` for the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.show import units

if TYPE_CHECKING:
    from rich.console import Group

SHOWN = 10


def terminal(tree: Mapping[str, Any]) -> "Group":
    """Return the report as tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, box=None, header_style="bold", title_justify="left", title_style="bold")
        for number, name in enumerate(columns):
            made.add_column(name, justify="right" if number else "left")
        return made

    def milliseconds(seconds: float) -> str:
        return f"{1000 * seconds:,.2f}"

    def giga(rate: float | None) -> str:
        return units.known(None if rate is None else rate / 1e9, ",.0f")

    step, full = tree["step"], tree["full_step"]
    operators = table(f"a step of {step['micro_batches']} micro-batches by operator", "operator", "calls",
                      "predicted ms", "measured ms", "traffic alone ms")  # fmt: skip
    bandwidth = tree["machine"]["copy_bytes_per_second"]
    for row in tree["operators"][:SHOWN]:
        operators.add_row(row["operator"], f"{row['calls']:.0f}", milliseconds(row["predicted"]),
                          milliseconds(row["measured"]), milliseconds(row["bytes"] / bandwidth))  # fmt: skip
    products = table(
        "matrix products of a micro-batch", "batch × m × n × k", "calls", "ms", "GFLOP/s", "best at its size"
    )
    for row in tree["matrix_products"][:SHOWN]:
        shape = f"{row['batch']} × {row['m']} × {row['n']} × {row['k']}"
        products.add_row(shape, f"{row['calls']:.0f}", milliseconds(row["calls"] * row["seconds"]),
                         giga(row["flops_per_second"]), giga(row["best"]))  # fmt: skip
    proposed = table(
        "proposals at equal parameters or FLOPs", "change", "gain", "tokens/s", "parameters", "FLOPs/token"
    )
    for row in tree["proposals"][:SHOWN]:
        proposed.add_row(row["what"], *(units.ratio(row[name]) for name in
                         ("gain", "tokens_gain", "parameters_ratio", "flops_ratio")))  # fmt: skip
    off = f"; most off: {', '.join(step['off'])}" if step["off"] else ""
    lines = [
        f"predicted {milliseconds(step['predicted'])} ms, measured {milliseconds(step['measured'])} ms: "
        f"{units.ratio(step['ratio'])}{off}",
        f"a step of {full['micro_batches']} micro-batches: {units.duration(full['predicted'])} predicted, "
        f"{units.tokens_per_second(full['tokens_per_second'])}",
        f"{giga(tree['flops_per_second'])} GFLOP/s, {units.percent(tree['mfu']['value'])} of "
        f"{giga(tree['mfu']['peak'])} ({tree['mfu']['source']})",
        f"matrix products run at {units.percent(tree['share_of_best'])} of the best at their size",
    ]
    best = next(iter(tree["proposals"]), None)
    if best is not None and best["gain"] > 1:
        lines.append(f"try  {' '.join(f'--set {setting}' for setting in best['set'])}")
    return Group(*map(Text, lines), "", operators, "", products, "", proposed)
