"""Figures of scripts/bench about faults: the catalogue, storms, and mutants that the checker must catch."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from trainer.chaos import results
from trainer.chaos.report import matrix_png
from trainer.faults.checker import EQUAL

ROOT = Path(__file__).resolve().parent.parent


def campaign(name: str, repeat: int = 1) -> dict[str, Any]:
    """Run configs/chaos/NAME.toml and return its report. Resumes a campaign that was interrupted at the same commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    out = ROOT / "runs" / "bench-chaos" / f"{name}-{commit.stdout.strip()}"
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "chaos", f"configs/chaos/{name}.toml", "--out", str(out),
         "--repeat", str(repeat), "--json"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise SystemExit(f"chaos {name} left with {done.returncode}")
    return json.loads(done.stdout)


def catalogue(repeat: int = 2) -> dict[str, Any]:
    """Outcomes of each kind, how often it was attributed correctly, and seconds to detection and recovery.

    Draws docs/faults.png: the matrix with the worse of each kind's runs.
    """
    report = campaign("catalogue", repeat)
    whole = results.from_json(report)
    worse = {result.name: result for result in sorted(whole.results, key=lambda result: result.outcome != "pass")}
    shown = [worse[name] for name in dict.fromkeys(result.name for result in whole.results)]
    matrix_png(dataclasses.replace(whole, results=shown), ROOT / "docs" / "faults.png")
    return by_kind(report)


def sentinel(repeat: int = 4) -> dict[str, Any]:
    """The same of the faults that only a sentinel notices."""
    return by_kind(campaign("sentinel", repeat))


def by_kind(report: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {}
    for result in report["results"]:
        (name,) = set(result["kinds"])
        kind = kinds.setdefault(name, {"outcomes": [], "named": [], "detect": [], "recover": [], "why": ""})
        kind["outcomes"].append(result["outcome"])
        kind["why"] = kind["why"] or result["why"]
        for fault in result["measured"]:
            kind["named"] += [fault["attributed_correctly"]] if fault["attributed_correctly"] is not None else []
            for key in ("detect", "recover"):
                kind[key] += [fault[f"{key}_seconds"]] if fault[f"{key}_seconds"] is not None else []
    return {"kinds": kinds, "seconds": report["seconds"]}


def storm() -> dict[str, Any]:
    """Random schedules of the llama3 mix: how many faults fired, and how the runs ended."""
    report = campaign("storm-llama3")
    fired = Counter(fault["kind"] for result in report["results"] for fault in result["measured"])
    equal = [
        answer["answer"] == "pass"
        for result in report["results"]
        for answer in result["answers"]
        if answer["invariant"] == EQUAL
    ]
    return {
        "runs": len(report["results"]),
        "equal": sum(equal),
        "outcomes": dict(Counter(result["outcome"] for result in report["results"])),
        "seeds": sorted({result["seed"] for result in report["results"]}),
        "faults": sum(fired.values()),
        "kinds": dict(fired.most_common()),
        "seconds": report["seconds"],
    }


def mutants() -> dict[str, Any]:
    """Put back each bug of other trainers, and list the invariants of the checker that caught it."""
    from tests.mutants import MUTANTS
    from tests.test_mutations import failed, run_mutants

    with tempfile.TemporaryDirectory() as directory:
        results = run_mutants(MUTANTS, Path(directory))
    rows = [
        {"bug": name.replace("_", " "), "had_by": MUTANTS[name].had_by, "faults": ", ".join(result.kinds),
         "caught_by": ", ".join(sorted(failed(result))) or "nothing"}
        for name, result in results.items()
    ]  # fmt: skip
    return {"rows": rows}


def catalogue_table(figure: dict[str, Any]) -> list[str]:
    return [
        "", "## Faults", "",
        f"`trainer chaos configs/chaos/catalogue.toml`: every kind of fault, in {max_runs(figure)} runs each.",
        "Seconds are the median (worst) since the fault fired.",
        *kinds_table(figure),
    ]  # fmt: skip


def sentinel_table(figure: dict[str, Any]) -> list[str]:
    return [
        "", "## Silent corruption, with a sentinel", "",
        f"`trainer chaos configs/chaos/sentinel.toml`: 3 ranks, {max_runs(figure)} runs of each kind, every",
        "micro-batch audited, every step checked. With a smaller share a wrong activation or operator is noticed with",
        "that chance in each step; flips in gradients, weights and moments are noticed whatever the share is.",
        *kinds_table(figure),
    ]  # fmt: skip


def kinds_table(figure: dict[str, Any]) -> list[str]:
    named = [name for kind in figure["kinds"].values() for name in kind["named"]]
    lines = [
        f"Of {len(named)} faults that the run must report, {sum(named)} were attributed correctly: kind, step,",
        "and rank where a run can know it.",
        "",
        "| kind | outcome | attributed correctly | detected after, s | next new step after, s |",
        "|---|---|---|---|---|",
    ]
    for name, kind in figure["kinds"].items():
        outcome = ", ".join(f"{what}" + (f" ×{n}" if n > 1 else "") for what, n in Counter(kind["outcomes"]).items())
        if kind["why"]:
            outcome += f" ({kind['why'][:140]})"
        right = f"{sum(kind['named'])} of {len(kind['named'])}" if kind["named"] else ""
        lines.append(f"| {name} | {outcome} | {right} | {spread(kind['detect'])} | {spread(kind['recover'])} |")
    return lines


def max_runs(figure: dict[str, Any]) -> int:
    return max(len(kind["outcomes"]) for kind in figure["kinds"].values())


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({max(seconds):.1f})" if seconds else ""


def storm_table(figure: dict[str, Any]) -> list[str]:
    outcomes = ", ".join(f"{count} {what}" for what, count in figure["outcomes"].items())
    kinds = ", ".join(f"{name} {count}" for name, count in figure["kinds"].items())
    return [
        "",
        f"Storms of the `llama3` mix (seeds {', '.join(map(str, figure['seeds']))}): {figure['faults']} faults in "
        f"{figure['runs']} runs, {figure['equal']} of which ended with the reference run's weights and state; "
        f"by all invariants together {outcomes}. Fired: {kinds}.",
    ]


def mutants_table(figure: dict[str, Any]) -> list[str]:
    return [
        "",
        "Bugs that other trainers had, put back into a copy of the worker (`tests/mutants.py`), and what caught them:",
        "",
        "| bug | had by | faults | caught by |", "|---|---|---|---|",
        *[f"| {row['bug']} | {row['had_by']} | {row['faults']} | {row['caught_by']} |" for row in figure["rows"]],
    ]  # fmt: skip
