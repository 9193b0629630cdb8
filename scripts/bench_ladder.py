"""The bench of truth: how often the ladder's verdicts are right, on synthetic ladders and on published runs.

It writes the tables and the figure of trainer/ladder/README.md. Run it alone (`python -m scripts.bench_ladder
[LADDERS]`; `--only advice` for one table) or as `scripts/bench ladder`. Every row has its own seed, so rows are
independent and reproducible.
"""

import argparse
import csv
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests import ladders
from tests.ladders import LONG, SEVEN, SHORT, TEXT, Arm, Design, Law, Trouble
from trainer.ladder.stats import repetition
from trainer.ladder.stats.worth import LINE, Baselines, Worths, decisions

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "trainer" / "ladder" / "README.md"
PORIAN = ROOT.parent / "shared" / "data" / "porian_refinedweb.csv"
MARKS = "<!-- {}: written by scripts/bench_ladder.py -->"
MIN_GAIN, LEVEL = 1.02, 0.05
ARMS = {
    "A/A": ladders.UNCHANGED,
    "1.15× everywhere": ladders.CONSTANT,
    "1.3× → 1.05×": ladders.SHRINKING,
    "1.3× → 0.83×": ladders.REVERSING,
    "1.02× everywhere": ladders.BARELY,
}
BIG = {f"{gain:g}× everywhere": ladders.line(gain, gain) for gain in (1.3, 2, 4)}
FADING = {
    "5× → 1.1×, C^−0.4": ladders.fading(5, 1.1, 0.4),
    "1.3× → 1.05×, C^−0.3": ladders.fading(1.3, 1.05, 0.3),
    "2× → 1.1×, C^−0.2": ladders.fading(2, 1.1, 0.2),
    "1.3× → 1×, C^−0.5": ladders.fading(1.3, 1.0, 0.5),
}
FLOORS = {
    f"{first:g}× → {last:g}×, other floor": ladders.other_floor(first, last)
    for first, last in ((1.3, 1.0), (1.3, 1.15), (2, 1.2), (1.1, 1.3))
}
WORTHS: Mapping[str, ladders.Worth] = {
    "A/A": lambda n, d: 1.0,
    "1.15× everywhere": lambda n, d: 1.15,
    "1.02× everywhere": lambda n, d: 1.02,
    "1.15×, more with D / N": lambda n, d: 1.15 * (d / n / 20) ** 0.1,
    "1.3× → 1.05×": lambda n, d: math.exp(
        math.log(1.3) + math.log(1.05 / 1.3) * math.log(6 * n * d / 3e15) / math.log(1e21 / 3e15)
    ),
}
APART: Mapping[str, Mapping[str, Any]] = {
    "sd 0.003; 1 seed": {"sd": 0.003},
    "sd 0.003; 3 seeds": {"sd": 0.003, "seeds": 3},
    "effect of a size on one arm, sd 0.003; 1 seed": {"sd": 0.003, "own": 0.003},
}
SHAPES = {"5 rungs, 3 decades": LONG, "4 rungs, 1.5 decades": SHORT}
Cell = tuple[str, Design, Law, Mapping[str, Arm], Trouble]


def regular() -> Iterator[Cell]:
    """Ladders for which every assumption holds."""
    for shape, design in SHAPES.items():
        for sd in (0.005, 0.02):
            for rho in (0.0, 0.5):
                name = f"{shape}; sd {sd:g}; ρ {rho:g}"
                yield name, replace(design, sd=sd, correlation=rho), ladders.power_law(), ARMS, Trouble()


def hard() -> Iterator[Cell]:
    """Ladders that break one assumption each, or that have one seed for each rung."""
    power, quiet = ladders.power_law(), replace(LONG, sd=0.003)
    for what, design, arms, trouble in (
        ("ρ 0.95", replace(LONG, correlation=0.95), BIG, Trouble()),
        ("fades to a constant, 7 rungs", SEVEN, FADING, Trouble()),
        ("fades to a constant", LONG, FADING, Trouble()),
        ("arm levels off elsewhere", LONG, FLOORS, Trouble()),
        ("effect of a rung on all arms, sd 0.003", quiet, BIG, Trouble(shared=0.003)),
        ("effect of a rung on one arm, sd 0.003", quiet, ARMS, Trouble(own=0.003)),
        ("effect of a rung on one arm, large gains", quiet, BIG, Trouble(own=0.003)),
        ("sd ∝ C^−0.15", LONG, ARMS, Trouble(exponent=-0.15)),
        ("sd doubles over the ladder", LONG, ARMS, Trouble(exponent=0.1)),
        ("t with 3 degrees of freedom", LONG, ARMS, Trouble(heavy_tails=True)),
        ("one run off by 10 sd", LONG, ARMS, Trouble(outlier=10.0)),
        ("none", LONG, ARMS, Trouble()),
    ):
        for seeds in (3, 1):
            yield f"{what}; {seeds} seed{'s' * (seeds > 1)}", replace(design, seeds=seeds), power, arms, trouble
    for what, base in (
        ("baseline of two power laws", ladders.two_powers()),
        ("baseline with a bend", ladders.bent()),
        ("E hardly shows", ladders.power_law(0.2, 2.7, 0.06)),
    ):
        yield f"{what}; 3 seeds", LONG, base, ARMS, Trouble()
    for seeds in (3, 1):
        what = f"effect of a rung on one arm, 9 seeds more at the largest; {seeds} seed{'s' * (seeds > 1)}"
        yield what, replace(quiet, seeds=seeds), power, ARMS, Trouble(own=0.003, added=9)
    # A single arm has no other to tell of its noise.
    for name in ("1.15× everywhere", "1.02× everywhere"):
        for seeds in (3, 1):
            what = f"one arm alone, {name}, effect of a rung; {seeds} seed{'s' * (seeds > 1)}"
            yield what, replace(quiet, seeds=seeds), power, {name: ARMS[name]}, Trouble(own=0.003)
    yield "effect of a rung on one arm; 4 rungs", replace(SHORT, sd=0.003), power, ARMS, Trouble(own=0.003)
    yield "t with 3 degrees of freedom; 4 rungs", SHORT, power, ARMS, Trouble(heavy_tails=True)
    yield "arm levels off elsewhere; 4 rungs", SHORT, power, FLOORS, Trouble()


def over_data() -> Iterator[Cell]:
    """Ladders over unique text, of models of one size, by a published law that is not the form of the fit."""
    four_rungs = replace(TEXT, flops=tuple(np.geomspace(5e8, 1e10, 4)))
    for what, design, trouble in (
        ("5 rungs, 2 decades; ρ 0", TEXT, Trouble()),
        ("5 rungs, 2 decades; ρ 0.5", replace(TEXT, correlation=0.5), Trouble()),
        ("5 rungs, 2 decades; sd 0.02", replace(TEXT, sd=0.02), Trouble()),
        ("4 rungs, 1.3 decades", four_rungs, Trouble()),
        ("effect of a rung on one arm, sd 0.003", replace(TEXT, sd=0.003), Trouble(own=0.003)),
        ("1 seed", replace(TEXT, seeds=1), Trouble()),
    ):
        yield what, design, ladders.of_text(4), ladders.TEXT_ARMS, trouble


def statistics(count: int = 1000) -> dict[str, Any]:
    """Simulate all rows and write the tables and the figure."""
    started = time.perf_counter()
    figure: dict[str, Any] = {"ladders": count}
    for kind, measure in PARTS.items():
        figure |= measure(count)
        print(f"{kind}: {time.perf_counter() - started:.0f} s", flush=True)
    figure["bars"] = bars(figure)
    write(figure)
    return figure


def synthetic(count: int) -> dict[str, Any]:
    """The rows of ladders along one line of compute, for which the figure is drawn."""
    found = {"regular": simulated(regular(), count, 0), "hard": simulated(hard(), count, 100)}
    for row, (_, design, base, *_) in zip(found["regular"], regular(), strict=True):
        row["curve"] = asdict(ladders.simulate_fits(design, max(count // 5, 1), base, seed=7))
    return found


def apart(count: int) -> Iterator[dict[str, Any]]:
    """Ladders whose parameters and tokens vary apart."""
    for seed, (name, design) in enumerate(APART.items()):
        found = ladders.simulate_apart(WORTHS, count, seed=61 + seed, **design)
        yield {"name": name, "arms": {arm: asdict(it) | {"wrong": it.wrong(MIN_GAIN)} for arm, it in found.items()}}


def simulated(cells: Iterator[Cell], count: int, first_seed: int) -> list[dict[str, Any]]:
    """A row for each cell."""
    rows = []
    for seed, (name, design, base, arms, trouble) in enumerate(cells):
        done = ladders.simulate(design, arms, count, base, seed + first_seed, trouble)
        shares = {arm: asdict(found) | {"wrong": found.wrong(MIN_GAIN)} for arm, found in done.arms.items()}
        rows.append({"name": name, "false_trends": done.false_trends, "arms": shares})
    return rows


def advice(count: int) -> list[dict[str, Any]]:
    """Ladders whose advice was followed once."""
    kinds = {"rungs without effects of their own": False, "with effects, as the prior has them": True}
    return [
        {"ladders": name, **asdict(ladders.follow(count, effects, seed=31 + effects))}
        for name, effects in kinds.items()
    ]


REPEATED = {
    "4 and 16 epochs; sd 0.002": ((4.0, 16.0), 0.002),
    "4 and 16 epochs; sd 0.005": ((4.0, 16.0), 0.005),
    "1, 4 and 16 epochs; sd 0.005": ((1.0, 4.0, 16.0), 0.005),
    "8 and 16 epochs; sd 0.005": ((8.0, 16.0), 0.005),
}
TRUE_R = 15.0


def repeated(count: int) -> Iterator[dict[str, Any]]:
    """The law of repeated text, fitted to runs of one size at 4 amounts of text over a factor of 6, 3 seeds each."""
    for seed, (name, (epochs, sd)) in enumerate(REPEATED.items()):
        random = np.random.Generator(np.random.Philox(83 + seed))
        unique, read, _ = (
            each.ravel() for each in np.meshgrid(np.geomspace(1e8, 6e8, 4), epochs, range(3), indexing="ij")
        )
        law = 2.5 + 1490 * repetition.effective(unique * read, unique, TRUE_R) ** -0.35
        found = []
        for _ in range(count):
            loss = law + sd * random.standard_normal(len(law))
            found.append(repetition.fit(np.full_like(unique, 1e8), unique * read, unique, loss).R_D)
        yield {
            "name": name, "median": float(np.median([one.value for one in found])),
            "covered": float(np.mean([(one.low or 0.0) <= TRUE_R <= (one.high or math.inf) for one in found])),
            "bounded": float(np.mean([one.low is not None and one.high is not None for one in found])),
        }  # fmt: skip


def looks(count: int) -> list[dict[str, Any]]:
    """Ladders that are read after every seed."""
    found = {name: ladders.look_often(LONG, ARMS[name], count, seed=41) for name in ("A/A", "1.02× everywhere")}
    found["1.15× everywhere"] = ladders.look_often(replace(LONG, sd=0.01), ladders.CONSTANT, count, seed=42)
    return [{"rule": rule, "arms": {name: asdict(by_rule[rule]) for name, by_rule in found.items()}}
            for rule in ladders.RULES]  # fmt: skip


def bars(figure: Mapping[str, Any]) -> dict[str, Any]:
    """The worst cell of each bar."""
    rows = [*figure["regular"], *figure["hard"]]
    arms = [arm for row in rows for arm in row["arms"].values()]
    trends = [row["false_trends"] for row in rows if row["false_trends"] is not None]
    any_look = figure["looks"][-1]["arms"]
    return {
        "least coverage": min(arm["coverage"] for arm in arms), "most wrong": max(arm["wrong"] for arm in arms),
        "most false trends": max(trends),
        "wrong on published runs": sum(row["wrong"] for row in figure["public"]),
        "CPU seconds for 200 arms, 6 rungs, 3 seeds": seconds_of_many_arms(),
        "advice: told minus settled": max(
            (row["stated"] - row["settled"] for row in figure["advice"]), key=abs
        ),
        "wrong by any look": max(
            any_look["A/A"]["promote"][-1], any_look["1.02× everywhere"]["promote"][-1],
            any_look["1.02× everywhere"]["reject"][-1],
        ),
    }  # fmt: skip


def seconds_of_many_arms() -> dict[str, float]:
    """CPU seconds of what `judge TABLE` does for 200 arms at 6 rungs and 3 seeds, after its imports."""
    from trainer.ladder import report
    from trainer.ladder.judge import judge

    random = np.random.Generator(np.random.Philox(1))
    ends = np.exp(random.normal(0.03, 0.12, (200, 2)))
    arms = {f"arm {k}": ladders.line(*map(float, pair)) for k, pair in enumerate(ends)}
    results = ladders.draw(Design.spanning(6, 3.0), ladders.power_law(), arms, random)
    columns = ("arm", "parameters", "tokens", "flops", "seed", "loss")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        with path.open("w", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow(columns)
            lines.writerows([getattr(run, name) for name in columns] for run in results)
        started = time.process_time()
        tree = judge(str(path))
        judged = time.process_time()
        tree["table"]["command"] = f"python -m trainer judge {path.name}"
        report.write(tree, Path(folder))
        return {"judged": judged - started, "written": time.process_time() - judged}


# Published runs


def published() -> list[dict[str, Any]]:
    """Rolling predictions of published runs: verdicts by the first rungs, and what the later ones showed.

    Each recipe is the baseline in turn. The first five rungs or more judge each later one up to 16 times as far; the
    measured multiplier there is read from the baseline's own losses, interpolated.
    """
    if not PORIAN.exists():
        raise SystemExit(f"{PORIAN} is missing.\n  The table of published runs is made from it.")
    with PORIAN.open(encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if row["loss"]]
    recipes: dict[str, dict[float, float]] = {}
    for row in found:
        recipes.setdefault(row["arm"], {})[float(row["flops"])] = float(row["loss"])
    return [
        {"baseline": name, **_rolling(base, [runs for other, runs in recipes.items() if other != name])}
        for name, base in recipes.items()
    ]


def _rolling(base: Mapping[float, float], others: list[dict[float, float]]) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(
        ("predictions", "covered", "covered_by_line", "right", "wrong", "inconclusive"), 0
    )
    for arm in others:
        flops = np.array(sorted(arm.keys() & base.keys()))
        logs, losses = np.log(flops), np.array([[side[point] for point in flops] for side in (base, arm)])
        for last in range(5, len(flops)):
            x = logs[:last] - logs[:last].mean()
            known = losses[:, :last, None]
            worths = Worths.from_pairs(Baselines.fit(x, known[0]), known[:1], known[1:])
            for k in range(last, len(flops)):
                if flops[k] > 16.5 * flops[last - 1]:
                    break
                truth, target = _measured(logs, losses, k), float(logs[k] - logs[:last].mean())
                at = worths.at(target)
                held = [
                    bool(low[0] <= truth <= high[0])
                    for low, high in (
                        [at.bound(LEVEL / 2, side) for side in (-1, 1)],
                        [at.bound_of(LINE, LEVEL / 2, side) for side in (-1, 1)],
                    )
                ]
                decided = int(decisions(worths, target, LEVEL, math.log(MIN_GAIN))[0])
                answer = "inconclusive" if not decided else (
                    "right" if (decided > 0) == (truth >= math.log(MIN_GAIN)) else "wrong"
                )  # fmt: skip
                for key, more in zip(counts, (1, *held), strict=False):
                    counts[key] += more
                counts[answer] += 1
    return counts


def _measured(logs: np.ndarray, losses: np.ndarray, k: int) -> float:
    """ln m at rung k: the baseline's compute for the arm's loss; beyond its last rung by its last two steps."""
    base, loss = losses[0], losses[1, k]
    if loss < base[-1]:
        return float(logs[-1] + (base[-1] - loss) * (logs[-1] - logs[-3]) / (base[-3] - base[-1]) - logs[k])
    return float(np.interp(-loss, -base, logs) - logs[k])


# Tables


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def coverage_table(figure: Mapping[str, Any]) -> list[str]:
    columns = ["ladder", *(f"covers {name}" for name in ARMS), "E", "alpha", "target's loss"]
    return table(columns, [
        [row["name"], *(percent(arm["coverage"]) for arm in row["arms"].values()),
         *(percent(row["curve"][name]) for name in ("E", "alpha", "prediction"))]
        for row in figure["regular"]
    ])  # fmt: skip


def decision_table(figure: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in figure["regular"]:
        aa, constant, shrinking, reversing, barely = (row["arms"][name] for name in ARMS)
        rows.append([row["name"], *(" · ".join(map(percent, column)) for column in (
            [aa["promote"]], [barely["promote"], barely["reject"]], [constant["promote"], constant["reject"]],
            [reversing["reject"], reversing["shrinks"]], [shrinking["promote"], shrinking["reject"]],
            [row["false_trends"]],
        ))])  # fmt: skip
    return table([
        "ladder", "A/A promoted", "1.02× promoted · rejected", "1.15× promoted · rejected",
        "1.3× → 0.83× rejected · seen to shrink", "1.3× → 1.05× promoted · rejected", "any false trend",
    ], rows)  # fmt: skip


def data_table(figure: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in figure["data"]:
        arms = row["arms"]
        rows.append([row["name"], *(percent(arms[name]["coverage"]) for name in ladders.TEXT_ARMS),
                     *(percent(arms[name]["promote"]) for name in ("A/A", "1.15× the text", "16 epochs, not 4")),
                     percent(max(arm["wrong"] for arm in arms.values())),
                     "" if row["false_trends"] is None else percent(row["false_trends"])])  # fmt: skip
    columns = ["ladder", *(f"covers {name}" for name in ladders.TEXT_ARMS)]
    promoted = ("A/A", "1.15× the text", "16 epochs")
    columns += [*(f"promotes {name}" for name in promoted), "most wrong verdicts", "any false trend"]
    return table(columns, rows)


def repeated_table(figure: Mapping[str, Any]) -> list[str]:
    rows = [[row["name"], percent(row["covered"]), percent(row["bounded"]), f"{row['median']:.1f}"]
            for row in figure["repeated"]]  # fmt: skip
    return table(["runs", "covers R_D = 15", "bounds it on both sides", "median R_D"], rows)


def hard_table(figure: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in figure["hard"]:
        arms = row["arms"]
        least, most = (
            min(arms, key=lambda name: arms[name]["coverage"]),
            max(arms, key=lambda name: arms[name]["wrong"]),
        )
        rows.append([
            row["name"], f"{percent(arms[least]['coverage'])} ({least})",
            percent(min(arm["line_coverage"] for arm in arms.values())),
            f"{percent(arms[most]['wrong'])} ({most})" if arms[most]["wrong"] else "0.0",
            "" if row["false_trends"] is None else percent(row["false_trends"]),
        ])  # fmt: skip
    return table(["what is so", "least coverage", "of the line alone", "most wrong verdicts", "any false trend"], rows)


def apart_table(figure: Mapping[str, Any]) -> list[str]:
    rows = [
        [row["name"], *(" · ".join(percent(arm[key]) for key in ("coverage", "promote", "reject"))
                        for arm in row["arms"].values())]
        for row in figure["apart"]
    ]  # fmt: skip
    return table(["5 × 3 sizes", *WORTHS], rows)


def public_table(figure: Mapping[str, Any]) -> list[str]:
    keys = ("predictions", "covered", "covered_by_line", "right", "wrong", "inconclusive")
    total: dict[str, Any] = {"baseline": "all"} | {key: sum(row[key] for row in figure["public"]) for key in keys}
    return table(
        ["baseline", "predictions", "covered", "by the line alone", "verdicts right", "wrong", "inconclusive"],
        [[row["baseline"], *(str(row[key]) for key in keys)] for row in (*figure["public"], total)],
    )


def advice_table(figure: Mapping[str, Any]) -> list[str]:
    return table(
        ["ladders", "open", "with advice", "told", "settled", "decided wrongly"],
        [
            [row["ladders"], str(row["open"]), str(row["advised"]),
             *(percent(row[key]) for key in ("stated", "settled", "wrong"))]
            for row in figure["advice"]
        ],
    )  # fmt: skip


def looks_table(figure: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in figure["looks"]:
        aa, barely, constant = row["arms"].values()
        powers = [percent(constant["promote"][k - 1]) if len(constant["promote"]) >= k else "–" for k in (3, 6, 12)]
        if len(constant["promote"]) == 1:
            powers = ["–", "–", percent(constant["promote"][0])]
        rows.append([
            row["rule"], percent(aa["promote"][-1]), percent(barely["promote"][-1]), percent(barely["reject"][-1]),
            " · ".join(powers),
        ])  # fmt: skip
    return table([
        "looks", "A/A ever promoted", "1.02× ever promoted", "1.02× ever rejected",
        "1.15× promoted by 3 · 6 · 12 seeds",
    ], rows)  # fmt: skip


TABLES = {
    "advice": advice_table,
    "apart": apart_table,
    "looks": looks_table,
    "regular": coverage_table,
    "decisions": decision_table,
    "hard": hard_table,
    "data": data_table,
    "repeated": repeated_table,
    "public": public_table,
}


def write(figure: Mapping[str, Any]) -> None:
    """Write the tables between their marks in the README, and the figure beside it, as far as they were measured."""
    text = README.read_text(encoding="utf-8")
    for name, lines in TABLES.items():
        if {"decisions": "regular"}.get(name, name) not in figure:
            continue
        start, end = MARKS.format(name), MARKS.format(f"end of {name}")
        block = "\n".join([start, "", *lines(figure), "", end])
        text = re.sub(re.escape(start) + ".*?" + re.escape(end), lambda _, block=block: block, text, flags=re.DOTALL)
    README.write_text(text, encoding="utf-8")
    if "regular" in figure:
        draw(figure, ROOT / "docs" / "ladder-coverage.svg")


def draw(figure: Mapping[str, Any], path: Path) -> None:
    """Coverage by cell: each arm's share, of the interval that decides and of the line's alone."""
    from trainer.show.figure import BAD, GOOD, SOFT, new_figure

    rows = [*figure["regular"], *figure["hard"]]
    picture = new_figure(9, 0.2 * len(rows) + 1.2)
    axes = picture.subplots()
    for place, row in enumerate(rows):
        for key, colour, mark in (("line_coverage", BAD, "|"), ("coverage", GOOD, "o")):
            shares = [100 * arm[key] for arm in row["arms"].values()]
            axes.plot(shares, [place] * len(shares), mark, color=colour, markersize=4)
    axes.axvline(95, color=SOFT, linewidth=1)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(
        "how often 95 % intervals hold the true multiplier, in percent: over all forms (•), by a line alone (|)"
    )
    picture.savefig(path)


PARTS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "synthetic": synthetic,
    "data": lambda count: {"data": simulated(over_data(), count, 200)},
    "repeated": lambda count: {"repeated": list(repeated(max(count // 5, 1)))},
    # A surface takes most of a second to fit.
    "apart": lambda count: {"apart": list(apart(max(count // 25, 1)))},
    "advice": lambda count: {"advice": advice(max(count // 5, 1))},
    "looks": lambda count: {"looks": looks(count)},
    "public": lambda count: {"public": published()},
}
"""Measurements of a part of the tables, by the number of ladders."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ladders", nargs="?", type=int, default=1000, help="number for each row")
    parser.add_argument("--only", choices=PARTS, help="measure and write these tables alone")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    if arguments.only:
        part = PARTS[arguments.only](arguments.ladders)
        write(part)
        print(json.dumps(part, indent=1))
        return
    figure = statistics(arguments.ladders)
    print(json.dumps(figure["bars"], indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figure, indent=1) + "\n")


if __name__ == "__main__":
    main()
