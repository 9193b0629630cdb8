"""Accuracy of the ladder's statistics on synthetic ladders with a known truth: the tables of trainer/ladder/README.md.

Run it alone (`python -m scripts.bench_ladder [LADDERS]`) or as `scripts/bench ladder`. Every row has its own seed, so
rows are independent and reproducible.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import ladders
from tests.ladders import LONG, SHORT, Arm, Design, Law, Simulated

README = Path(__file__).resolve().parent.parent / "trainer" / "ladder" / "README.md"
MARKS = "<!-- {}: written by scripts/bench_ladder.py -->"
ARMS = {
    "A/A": ladders.UNCHANGED,
    "1.15× everywhere": ladders.CONSTANT,
    "1.3× → 1.05×": ladders.SHRINKING,
    "1.3× → 0.83×": ladders.REVERSING,
    "1.02× everywhere": ladders.BARELY,
}
LEVELLING = {"1.3× → 1×, other floor": ladders.LEVELLING}
SHAPES = {"5 rungs, 3 decades": LONG, "4 rungs, 1.5 decades": SHORT}


def designs() -> Iterator[tuple[str, Design]]:
    for shape, design in SHAPES.items():
        for sd in (0.005, 0.02):
            for correlation in (0.0, 0.5):
                yield f"{shape}; sd {sd:g}; ρ {correlation:g}", replace(design, sd=sd, correlation=correlation)


def troubles() -> Iterator[tuple[str, Design, Law, dict[str, Arm]]]:
    """Ladders that break one assumption of the statistics."""
    for shape, design in SHAPES.items():
        for sd in (0.005, 0.02):
            noisy = replace(design, sd=sd)
            what = f"{shape}; sd {sd:g}"
            yield f"arm levels off elsewhere; {what}", noisy, ladders.power_law(), LEVELLING
            yield f"two power laws; {what}", noisy, ladders.two_powers(), ARMS
            yield f"curve with a bend; {what}", noisy, ladders.bent(), ARMS
            yield f"E hardly shows; {what}", noisy, ladders.power_law(0.2, 2.7, 0.06), ARMS
            yield f"noise grows ×2; {what}", replace(noisy, growth=2.0), ladders.power_law(), ARMS
            yield f"noise falls ×2; {what}", replace(noisy, growth=0.5), ladders.power_law(), ARMS


def statistics(count: int = 2000) -> dict[str, Any]:
    """Simulate all rows and write the tables."""
    started, regular, odd = time.perf_counter(), [], []
    for seed, (name, design) in enumerate(designs()):
        regular.append(shares(name, ladders.simulate(design, ARMS, count, seed=seed)))
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    for seed, (name, design, base, arms) in enumerate(troubles()):
        odd.append(shares(name, ladders.simulate(design, arms, count // 2, base=base, seed=100 + seed)))
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    figure = {"ladders": count, "regular": regular, "odd": odd}
    write(figure)
    return figure


def shares(name: str, done: Simulated) -> dict[str, Any]:
    """Turn counts into shares of ladders."""
    arms = {
        arm: {
            "truth": tally.truth, "known": tally.known / tally.ladders, "coverage": tally.coverage,
            "other_floor": tally.covered_by_other_floor / tally.ladders, "wrong": tally.wrong / tally.ladders,
            **{what: tally.share(what) for what in (
                "promote", "reject", "inconclusive", "none", "persists", "shrinks", "reverses", "grows",
            )},
        }
        for arm, tally in done.arms.items()
    }  # fmt: skip
    covered = {"E": done.E_covered, "alpha": done.alpha_covered, "prediction": done.prediction_covered}
    return {
        "name": name, "fits": done.fits, "refused": done.refused, "arms": arms,
        **{key: value / done.fits for key, value in covered.items()},
    }  # fmt: skip


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def regular_table(figure: dict[str, Any]) -> list[str]:
    lines = [
        "| ladder | covers the multiplier: " + " | ".join(ARMS) + " | covers E | alpha | target's loss |",
        "|---" * (len(ARMS) + 4) + "|",
    ]
    for row in figure["regular"]:
        coverage = [percent(arm["coverage"]) for arm in row["arms"].values()]
        lines.append(
            f"| {row['name']} | "
            + " | ".join([*coverage, *(percent(row[k]) for k in ("E", "alpha", "prediction"))])
            + " |"
        )
    return lines


def decision_table(figure: dict[str, Any]) -> list[str]:
    lines = [
        "| ladder | A/A promoted | 1.02× promoted · rejected | 1.15× promoted · rejected · called shrinking "
        "| 1.3× → 0.83× rejected · seen to shrink or reverse | 1.3× → 1.05× promoted · rejected |",
        "|---" * 6 + "|",
    ]
    for row in figure["regular"]:
        aa, constant, shrinking, reversing, barely = (row["arms"][name] for name in ARMS)
        columns = (
            [aa["promote"]],
            [barely["promote"], barely["reject"]],
            [constant["promote"], constant["reject"], constant["shrinks"] + constant["reverses"]],
            [reversing["reject"], reversing["shrinks"] + reversing["reverses"]],
            [shrinking["promote"], shrinking["reject"]],
        )
        lines.append(f"| {row['name']} | " + " | ".join(" · ".join(map(percent, column)) for column in columns) + " |")
    return lines


def trouble_table(figure: dict[str, Any]) -> list[str]:
    lines = ["| what is not so | largest share of wrong verdicts | of which arm | coverage | target's loss |",
             "|---" * 5 + "|"]  # fmt: skip
    for row in figure["odd"]:
        arms = row["arms"]
        worst = max(arms, key=lambda name: arms[name]["wrong"])
        coverage = [arm["coverage"] for arm in arms.values()]
        span = f"{percent(min(coverage))}–{percent(max(coverage))}" if len(coverage) > 1 else percent(coverage[0])
        columns = (row["name"], percent(arms[worst]["wrong"]), worst, span, percent(row["prediction"]))
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def write(figure: dict[str, Any]) -> None:
    """Write the tables between their marks in the README."""
    text = README.read_text(encoding="utf-8")
    for name, table in (("regular", regular_table), ("decisions", decision_table), ("troubles", trouble_table)):
        start, end = MARKS.format(name), MARKS.format(f"end of {name}")
        block = "\n".join([start, "", *table(figure), "", end])
        text = re.sub(re.escape(start) + ".*?" + re.escape(end), lambda _, block=block: block, text, flags=re.DOTALL)
    README.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "ladders", nargs="?", type=int, default=2000, help="number for each row; half for the last table"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    figure = statistics(arguments.ladders)
    if arguments.json:
        arguments.json.write_text(json.dumps(figure, indent=1) + "\n")


if __name__ == "__main__":
    main()
