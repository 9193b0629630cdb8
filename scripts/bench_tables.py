"""Record measured figures in BENCHMARKS.json, and write BENCHMARKS.md from it."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import (
    bench_advise,
    bench_chaos,
    bench_forecast,
    bench_gpu,
    bench_islands,
    bench_links,
    bench_meeting,
    bench_quorum,
    bench_sentinel,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "BENCHMARKS.json"
TABLES = ROOT / "BENCHMARKS.md"


def record(name: str, figure: dict[str, Any]) -> None:
    """Store a figure measured now on this machine, and rewrite the tables."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), **figure}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    TABLES.write_text(tables(results), encoding="utf-8")


def recorded(name: str) -> dict[str, Any]:
    """The figure of this name as it was recorded on this machine today; empty without one."""
    found = json.loads(RESULTS.read_text()).get(name, {}) if RESULTS.exists() else {}
    now = (machine(), time.strftime("%Y-%m-%d"))
    return found if (found.get("machine"), found.get("date")) == now else {}


def machine() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*: (.*)", text)[1]  # pyright: ignore[reportOptionalSubscript]
        wanted = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in text]
        name += f" ({', '.join(wanted)})"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    torch = importlib.metadata.version("torch")
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, torch {torch}"


@dataclass(frozen=True)
class Ratio:
    """A / B over the rounds of one run."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    rounds: int

    @classmethod
    def of(cls, ratios: list[float]) -> "Ratio":
        low, median, high = statistics.quantiles(ratios, n=4)
        return cls(median, low, high, len(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f}, {self.rounds} rounds)"


def tables(results: dict[str, Any]) -> str:
    """Text of BENCHMARKS.md. A figure without a measurement is left out."""
    machines = sorted({figure["machine"] for figure in results.values()})
    letter = {machine: chr(ord("A") + number) for number, machine in enumerate(machines)}
    lines = [
        "# Benchmarks",
        "",
        "Written by `scripts/bench` from `BENCHMARKS.json`. Each ratio comes from one run in which the two sides",
        "alternate: the median, with the quartiles of the round-by-round ratios in brackets. For a time, the brackets",
        "hold the shortest and the longest. Measured on:",
        "",
        *[f"- {letter[machine]}: {machine}" for machine in machines],
        "",
        "GPUs have a section of their own, at the end.",
        "",
        "| figure | measured | target | where, when |",
        "|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        if name in results:
            where = f"{letter[results[name]['machine']]}, {results[name]['date']}"
            lines += [f"| {title} | {text} | {target} | {where} |" for title, text, target in row(results[name])]
    if "seeds" in results:
        lines += ["", *seeds_table(results["seeds"])]
    if "soak" in results:
        lines += soak_table(results["soak"])
    for name, table in CHAOS.items():
        if name in results:
            lines += table(results[name])
    if "first_step" in results:
        lines += breakdown("From the command to the first step", results["first_step"]["breakdown"])
    if "killed" in results:
        lines += breakdown("From a SIGKILL to the next new step", results["killed"]["median"])
    if "sentinel_flips" in results:  # it has a heading of its own
        lines += bench_sentinel.table(results["sentinel_flips"])
    lines += bench_gpu.tables()
    return "\n".join(lines) + "\n"


Row = tuple[str, str, str]


def ratio_text(figure: dict[str, Any]) -> str:
    return str(Ratio(**figure["ratio"]))


def throughput_rows(title: str, target: str) -> Callable[[dict[str, Any]], list[Row]]:
    def rows(figure: dict[str, Any]) -> list[Row]:
        rates = f"{figure['ours_tokens_per_second']:,.0f} against {figure['plain_tokens_per_second']:,.0f} tokens/s"
        size = f"{figure['parameters'] / 1e6:.1f} M parameters, {figure['threads']} threads"
        return [(f"{title}, {size}", f"{ratio_text(figure)}; {rates}", target)]

    return rows


def first_step_rows(figure: dict[str, Any]) -> list[Row]:
    text = f"{figure['breakdown']['all']:.2f} s ({figure['low']:.2f}–{figure['high']:.2f}, {figure['repeats']} starts)"
    return [("command to first step, caches warm, 2 ranks", text, "≤ 5 s")]


def exact_rows(figure: dict[str, Any]) -> list[Row]:
    text = f"{ratio_text(figure)}; {figure['exact_seconds']:.2f} against {figure['plain_seconds']:.2f} s a step"
    return [("speed of exact relative to plain sums, 13.8 M parameters, 2 ranks", text, "≥ 0.97")]


def sentinel_rows(figure: dict[str, Any]) -> list[Row]:
    rows = []
    for size in ("small", "big"):
        part = figure[size]
        checks, audit = (part[name]["median"] for name in ("checks", "audit"))
        spread = "; ".join(f"{name} {Ratio(**part[name])}" for name in ("checks", "audit"))
        title = (
            f"time that a sentinel adds to a step, {part['parameters'] / 1e6:.1f} M parameters, 2 ranks, audit 1/32, "
            "all else in every step"
        )
        target = "≤ 4 %" if size == "big" else ""
        rows.append((title, f"{checks + audit / 32:.1%} of {part['step_seconds']:.3g} s (measured: {spread})", target))
    return rows


def memory_rows(figure: dict[str, Any]) -> list[Row]:
    replicated, sharded = figure["replicate"], figure["fsdp"]
    text = (
        f"{replicated['peak_mib']:,.0f} against {sharded['peak_mib']:,.0f} MiB "
        f"(the libraries alone take {replicated['libraries_mib']:,.0f})"
    )
    size = f"{replicated['parameters'] / 1e6:.0f} M parameters"
    return [(f"peak memory per rank, replicated against FSDP2, 2 ranks, {size}", text, "")]


def shakespeare_rows(figure: dict[str, Any]) -> list[Row]:
    loss, plain = figure["validation_loss"], figure["validation_loss_plain"]
    seconds = f"{figure['ours_seconds']:.1f} against {figure['plain_seconds']:.1f} s"
    wall = "shakespeare_char: wall time of the plain loop over that of the whole command"
    return [
        (
            "shakespeare_char: validation loss, nats",
            f"{loss:.4f} (plain loop of nanoGPT's recipe: {plain:.4f})",
            "≤ 1.886",
        ),
        (wall, f"{ratio_text(figure)}; {seconds}", "> 1"),
    ]


def seeds_table(figure: dict[str, Any]) -> list[str]:
    rows = figure["rows"]
    differences = [row["exact"] - row["plain"] for row in rows]
    return [
        f"Final validation loss (nats) after {figure['steps']} steps of a 0.9 M byte model, 4 micro-batches, 2 ranks.",
        f"Exact minus plain: {statistics.mean(differences):+.4f} ± {statistics.stdev(differences):.4f} (mean, sd over",
        f"seeds); between seeds, plain: sd {statistics.stdev(row['plain'] for row in rows):.4f}.",
        "",
        "| seed | exact sums | plain sums | steps redone | non-zero entries flushed |",
        "|---|---|---|---|---|",
        *[
            f"| {row['seed']} | {row['exact']:.4f} | {row['plain']:.4f} | {row['redone']} | {row['flushed']:.1e} |"
            for row in rows
        ],
    ]


def saving_rows(figure: dict[str, Any]) -> list[Row]:
    mib = figure["bytes_a_rank"] / 2**20
    ms = {key: 1e3 * figure[f"{key}_seconds"] for key in ("stall", "plain_copy", "beside", "usual")}
    bandwidth = {key: mib / figure[f"{key}_seconds"] for key in ("save_alone", "save_beside", "plain_write")}
    return [
        (
            f"save stall relative to a plain memory copy of the same {mib:.0f} MiB a rank, 13.8 M parameters, 2 ranks",
            f"{Ratio.of(figure['stall_over_copy'])}; {ms['stall']:.1f} against {ms['plain_copy']:.1f} ms",
            "≤ 2",
        ),
        (
            "step time during the background write relative to the usual",
            f"{Ratio.of(figure['step_beside_over_usual'])}; {ms['beside']:.0f} against {ms['usual']:.0f} ms",
            "≤ 1.10",
        ),
        (
            "save bandwidth a rank, hashed and committed, relative to a plain write with fsync",
            f"{Ratio.of(figure['write_over_save_alone'])}; {bandwidth['save_alone']:.0f} against "
            f"{bandwidth['plain_write']:.0f} MiB/s, {bandwidth['save_beside']:.0f} MiB/s during training",
            "",
        ),
        (f"load, verified, {figure['bytes'] / 2**20:.0f} MiB, 2 ranks", f"{figure['load_seconds']:.2f} s", ""),
    ]


def killed_rows(figure: dict[str, Any]) -> list[Row]:
    text = f"{figure['median']['all']:.2f} s ({figure['low']:.2f}–{figure['high']:.2f}, {figure['repeats']} kills)"
    title = "SIGKILL of one of two workers to the next new step, without the replayed steps"
    return [(title, text, "≤ 4 s")]


def nodes_rows(figure: dict[str, Any]) -> list[Row]:
    def text(seconds: list[float]) -> str:
        return f"{statistics.median(seconds):.1f} s ({min(seconds):.1f}–{max(seconds):.1f}, {len(seconds)} times)"

    return [
        ("a node killed, to the survivor's next new step", text(figure["loss"]), "≤ 8 s"),
        ("a node joins, to the next new step of both", text(figure["gain"]), "≤ 8 s"),
    ]


def goodput_rows(figure: dict[str, Any]) -> list[Row]:
    ours, plain = figure["ours"], figure["plain"]
    title = (
        f"goodput of {figure['seconds']} s with a kill every {figure['period']} s and a save every "
        f"{figure['every']} steps: toprope, and the same job with plain DDP, torch.save and torchrun"
    )

    def side(job: dict[str, Any]) -> str:
        return (
            f"{job['goodput']:.2f} ({job['steps']} steps of {1e3 * job['step_seconds']:.0f} ms, {job['kills']} kills)"
        )

    return [(title, f"{side(ours)}; {side(plain)}", "")]


def breakdown(title: str, parts: dict[str, float]) -> list[str]:
    return [
        "", f"{title}, seconds (median of each part):", "",
        "| " + " | ".join(parts) + " |", "|" + "---|" * len(parts),
        "| " + " | ".join(f"{value:.2f}" for value in parts.values()) + " |",
    ]  # fmt: skip


def soak_table(figure: dict[str, Any]) -> list[str]:
    """Result of scripts/soak."""

    def counts(name: str) -> str:
        return ", ".join(f"{key} {count}" for key, count in figure[name].items())

    return [
        "",
        f"Random kills (`scripts/soak --kills {figure['wanted']} --seed {figure['seed']}`): {figure['kills']} kills in "
        f"{figure['jobs']} jobs of {figure['runs']} runs; {figure['equal']} of {figure['runs']} runs ended with the "
        "reference run's weights, moments, losses and samples, and left nothing behind.",
        "",
        "| drawn | how often |",
        "|---|---|",
        f"| how | {counts('kills_by_action')} |",
        f"| where | {counts('kills_by_point')} |",
        f"| world size of the job | {counts('jobs_by_world_size')} |",
        f"| sharding of the job | {counts('jobs_by_strategy')} |",
    ]


CHAOS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "catalogue": bench_chaos.catalogue_table,
    "sentinel_faults": bench_chaos.sentinel_table,
    "sentinel": bench_sentinel.cost_table,
    "storm": bench_chaos.storm_table,
    "mutants": bench_chaos.mutants_table,
    "quorum": bench_quorum.table,
    "islands": bench_islands.table,
    "links": bench_links.table,
    "forecast": bench_forecast.forecast_table,
    "forecast_storms": bench_forecast.storms_table,
    "advise": bench_advise.table,
}


def copies_rows(figure: dict[str, Any]) -> list[Row]:
    rows = []
    for size in ("small", "big"):
        part = figure[size]
        text = f"{part['bytes'] / 2**20:.0f} MiB of state, steps of {1e3 * part['step_seconds']:.0f} ms, 2 ranks"
        for name, often in (("each", "each step"), ("one", f"every {part['steps']} steps")):
            rows.append((f"step time with a copy into memory {often}, {text}", str(Ratio.of(part[name])), ""))
        if "machines" in part:
            what = f"step time with a copy each step, into the memory of another machine too, {text} over loopback"
            rows.append((what, str(Ratio.of(part["machines"])), ""))
        ms = f"{1e3 * part['alone']:.0f} ms alone, {1e3 * part['load']:.0f} ms to load"
        rows.append((f"copy of {part['bytes'] / 2**20:.0f} MiB", ms, ""))
    return rows


ROWS: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "throughput_12m": throughput_rows("throughput relative to a plain loop, exact sums on", "≥ 0.97"),
    "throughput_0.8m": throughput_rows("throughput relative to a plain loop, exact sums on", "≥ 0.92"),
    "exact_against_plain_sums": exact_rows,
    "bf16_compile": throughput_rows("throughput of bf16 and compile relative to the plain float32 loop", "≥ 2"),
    "first_step": first_step_rows,
    "memory": memory_rows,
    "sentinel": sentinel_rows,
    "sentinel_clean": bench_sentinel.clean_row,
    "shakespeare": shakespeare_rows,
    "saving": saving_rows,
    "copies": copies_rows,
    "killed": killed_rows,
    "nodes": nodes_rows,
    "meeting": bench_meeting.rows,
    "goodput": goodput_rows,
}
