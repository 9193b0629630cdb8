"""The figures of scripts/bench about forecasts: closed forms, published systems, and storms simulated and trained."""

import hashlib
import itertools
import json
import math
import random
import shutil
import signal
import statistics
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts import bench_quorum
from scripts.bench_survival import EVERY
from trainer import files
from trainer.forecast import run as forecasts
from trainer.forecast.calibrate import calibrate
from trainer.forecast.scenario import DAY, Scenario, daly_goodput, daly_interval, load, parse
from trainer.forecast.simulator import replay, simulate
from trainer.log import goodput
from trainer.log.events import MembersChanged, StepDone
from trainer.log.history import History
from trainer.show import figure as pictures

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "forecast"
RUNS = ROOT / "runs" / "bench-forecast"
SECONDS = 180.0
"""Length of a storm."""
CALM_SECONDS, PRACTICE_SECONDS = 40.0, 100.0
"""Lengths of the two runs that are calibrated with, per policy and number of ranks."""
PRACTICE_MTBF = 15.0


def closed_forms() -> dict[str, Any]:
    """The largest distance from Daly's expected goodput over a grid: one exponential cause, blocking saves."""
    distances = []
    for per_day, stall, recovery in itertools.product((2, 8, 24, 96, 288), (1, 20, 60), (60, 300, 600)):
        made = parse(
            {
                "days": 2000 / per_day, "step_seconds": 0.1, "cluster": {"devices": 4096},
                "failure": [{"name": "node", "per_day": float(per_day), "detect_seconds": 20.0}],
                "policy": {"kind": "restart", "save_stall_seconds": float(stall), "restart_seconds": recovery - 20.0},
            }, Path("grid.toml"),
        )  # fmt: skip
        mttf = DAY / per_day
        expected = daly_goodput(daly_interval(stall, mttf), stall, recovery, mttf)
        found = np.mean([simulate(made, seed).goodput for seed in range(4)])
        distances.append(float(abs(found - expected)))
    return {"cases": len(distances), "largest": max(distances), "median": statistics.median(distances)}


def published() -> list[dict[str, Any]]:
    """Each published system, held against its figures, and the time that a replicate takes."""
    rows = []
    for path in sorted(CONFIGS.glob("*.toml")):
        if "published" not in tomllib.loads(path.read_text(encoding="utf-8")):  # a range of sizes
            continue
        started = time.perf_counter()
        scenario = load(path)
        tree = forecasts.forecast(scenario)
        seconds = (time.perf_counter() - started) / scenario.replicates
        rows.append({"name": path.stem, "seconds": seconds, **tree["published"]})
    return rows


def forecast() -> dict[str, Any]:
    return {"closed_forms": closed_forms(), "published": published()}


# Storms


@dataclass(frozen=True)
class Storm:
    """A job that is killed now and then: `mtbf` seconds apart on average."""

    policy: str
    ranks: int
    mtbf: float
    seconds: float = SECONDS
    seed: str = "storm"

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.ranks}-{self.mtbf:.0f}-{self.seed}"

    def schedule(self, step_seconds: float) -> list[tuple[int, int]]:
        """Draw (steps completed, place among the members) of kills, with exponential gaps.

        A kill is bound to a step and not to a time, so that it loses the same steps in the simulation as in the run.
        """
        drawn, moment, kills = random.Random(self.name), 0.0, list[tuple[int, int]]()
        while (moment := moment + drawn.expovariate(1 / self.mtbf)) < self.seconds:
            after = kills[-1][0] if kills else 0
            kills.append((max(after + 1, round(moment / step_seconds)), drawn.randrange(self.ranks)))
        return kills


STORMS = [
    Storm(policy, ranks, mtbf) for policy in ("restart", "quorum") for ranks, mtbf in ((2, 30.0), (2, 15.0), (3, 15.0))
]


def storms() -> dict[str, Any]:
    """Calibrate with a calm run and a practice storm; then train and simulate the same schedules of kills.

    Runs are kept in runs/bench-forecast/CODE: one that is there is not trained again.
    """
    measured = dict[str, dict[str, Any]]()
    for policy, ranks in sorted({(storm.policy, storm.ranks) for storm in STORMS}):
        calm = Storm(policy, ranks, math.inf, CALM_SECONDS, "calm")
        practice = Storm(policy, ranks, PRACTICE_MTBF, PRACTICE_SECONDS, "practice")
        calm_run = _train(calm, math.inf)
        step_seconds = calibrate([calm_run])["step_seconds"]
        found = calibrate([calm_run, _train(practice, step_seconds)])
        measured[f"{policy}-{ranks}"] = found | {"working_share": _working_share(calm_run)}
    rows = []
    for storm in STORMS:
        found = measured[f"{storm.policy}-{storm.ranks}"]
        run = _train(storm, found["step_seconds"])
        rows.append({"policy": storm.policy, "ranks": storm.ranks, "mtbf": storm.mtbf, **_compare(storm, run, found)})
        print(json.dumps(rows[-1]), flush=True)
    return {"storms": rows, "calibrated": measured, "seconds": SECONDS, "every": EVERY}


def _train(storm: Storm, step_seconds: float) -> Path:
    """Train for so long and kill as scheduled, unless the run is there. kills.json gets the steps of the kills."""
    place = RUNS / _code() / storm.name
    if (place / "kills.json").exists():
        return place / "run"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    make = bench_quorum.Quorum if storm.policy == "quorum" else bench_quorum.Restart
    schedule = storm.schedule(step_seconds) if math.isfinite(storm.mtbf) else []
    with make(place, storm.ranks) as job:
        until, kills = time.time() + storm.seconds, list[int]()
        while time.time() < until:
            commits = job.read()
            if schedule and commits and commits[-1].step >= schedule[0][0]:
                members = [pid for _, pid in sorted(job.members().items())]
                if members and job.send(members[schedule[0][1] % len(members)], signal.SIGKILL):
                    kills.append(schedule.pop(0)[0])
            time.sleep(0.01)
    (place / "kills.json").write_text(json.dumps(kills))
    return place / "run"


def _code() -> str:
    """Digest of the package: runs of other code are no part of the figure."""
    sources = sorted((ROOT / "trainer").rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def _working_share(calm: Path) -> float:
    """Share of the loop's time that is spent in steps; the rest is logging, and whatever else lies between events."""
    parts = goodput.account(History.read(calm))["parts"]
    return parts["productive"] / (parts["productive"] + parts["other"])


def _compare(storm: Storm, run: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """Goodput is that of `inspect`, without the time by which steps took longer for want of members."""
    history = History.read(run)
    account = goodput.account(history)
    wall, ours, slower = account["wall_seconds"], account["parts"], _slower(history)
    step_seconds, share = measured["step_seconds"], measured["working_share"]
    kills = json.loads((run.parent / "kills.json").read_text())
    scenario = _scenario(storm, measured, wall, account["startup"])
    simulated = replay(scenario, _moments(scenario, [step * step_seconds / share for step in kills]))
    changes = [entry.event for entry in history.entries if isinstance(entry.event, MembersChanged)]
    joins = math.fsum(change.seconds for change in changes if change.joined and not change.lost)
    return {
        "kills": len(kills),
        "wall": wall,
        "goodput": (ours["productive"] - slower) / wall,
        "simulated": simulated.goodput * share,
        "lost": [
            sum(ours[name] for name in ("down", "hung", "lost_steps")) + _restarts(history) + joins,
            simulated.lost_by_cause["kill"],
        ],
        "slower": [slower, simulated.parts["reduced"] * share],
    }


def _slower(history: History) -> float:
    """Seconds that steps with fewer members took longer than those with all."""
    steps = dict[int, list[float]]()
    for attempt in history.attempts:
        size, is_whole_step = attempt.start[1].world_size if attempt.start else 0, True
        for entry in attempt.main_entries:
            if isinstance(entry.event, MembersChanged):
                size, is_whole_step = len(entry.event.members), False
            elif isinstance(entry.event, StepDone):
                if is_whole_step:
                    steps.setdefault(size, []).append(entry.event.seconds)
                is_whole_step = True
    usual = statistics.mean(steps[max(steps)])
    return math.fsum(seconds - usual for size, found in steps.items() if size < max(steps) for seconds in found)


def _restarts(history: History) -> float:
    """Seconds of start-up after the first."""
    starts = [attempt.start[1] for attempt in history.attempts[1:] if attempt.start is not None]
    return math.fsum(seconds for start in starts for seconds in start.startup_seconds.values())


def _moments(scenario: Scenario, progress: list[float]) -> list[tuple[float, str]]:
    """The times at which the simulated job has first made so much progress, in seconds of work, if it dies at each."""
    moments = list[tuple[float, str]]()
    for work in progress:
        low, high = moments[-1][0] if moments else 0.0, scenario.days * DAY
        for _ in range(40):
            middle = (low + high) / 2
            until_then = scenario.model_copy(update={"days": middle / DAY})
            low, high = (low, middle) if replay(until_then, moments).parts["productive"] >= work else (middle, high)
        moments.append((high, "kill"))
    return moments


def _scenario(storm: Storm, measured: dict[str, Any], wall: float, startup: dict[str, float]) -> Scenario:
    quorum = {
        name: measured[name] for name in ("regroup_seconds", "join_seconds", "start_seconds", "speed_without_one")
    }
    tree = {
        "days": wall / DAY, "step_seconds": measured["step_seconds"],
        "cluster": {"devices": storm.ranks, "devices_per_node": 1},
        # A quorum knows of a death from the connection that is closed, within the time that regrouping takes.
        "failure": [{"name": "kill", "per_day": 1.0, "detect_seconds": measured["detect_seconds"] or 0.0}],
        "policy": {
            "kind": storm.policy,
            "restart_seconds": measured["restart_seconds"] or math.fsum(startup.values()),
            "save_stall_seconds": measured["save_stall_seconds"], "save_write_seconds": measured["save_write_seconds"],
            "checkpoint_every_seconds": EVERY * measured["step_seconds"] / measured["working_share"],
            **(quorum if storm.policy == "quorum" else {}),
        },
    }  # fmt: skip
    return parse(tree, Path("calibrated.toml"))


# Tables


def forecast_table(figure: dict[str, Any]) -> list[str]:
    grid = figure["closed_forms"]
    lines = [
        "",
        f"Forecasts against Daly's expected goodput (`scripts/bench forecast`): {grid['cases']} cases, largest "
        f"distance {100 * grid['largest']:.2f} points, median {100 * grid['median']:.2f}.",
        "",
        "| published system | its figure | forecast: median and range of 95 % | agrees | seconds a replicate |",
        "|---|---|---|---|---|",
    ]
    for row in figure["published"]:
        for check in row["checks"]:
            ours = check["ours"]
            text = f"{check['what']} {ours['value']:.3g} ({ours['low']:.3g}–{ours['high']:.3g})"
            agrees = "yes" if check["agrees"] else f"no: {row['why']}"
            lines.append(f"| {row['name']} | {row['figure']} | {text} | {agrees} | {row['seconds']:.2f} |")
    return lines


def storms_table(figure: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"Storms of {figure['seconds']:.0f} s, trained and simulated with the same schedule of kills, each bound to a "
        "step (`scripts/bench forecast_storms`); the simulator was calibrated with other runs. Goodput is that of "
        "`inspect`, less the time by which steps took longer with fewer members. Last columns: seconds measured, "
        "simulated. The step that a death interrupts is left out of the last one as measured, and counts as work: "
        "another worker starts within two steps here, so most of what fewer members cost lies in it.",
        "",
        "| policy | ranks | mean time between kills | kills | goodput measured | simulated | points apart | lost by "
        "kills | lost by computing with fewer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in figure["storms"]:
        lost, slower = (f"{ours:.1f}, {simulated:.1f}" for ours, simulated in (row["lost"], row["slower"]))
        lines.append(
            f"| {row['policy']} | {row['ranks']} | {row['mtbf']:.0f} s | {row['kills']} | {row['goodput']:.3f} | "
            f"{row['simulated']:.3f} | {100 * abs(row['goodput'] - row['simulated']):.1f} | {lost} | {slower} |"
        )
    return lines


def picture(figure: dict[str, Any]) -> bytes:
    """Draw measured against simulated goodput, a mark for each storm, and the band of three points."""
    with pictures.style():
        drawn = pictures.new_figure(6.0, 4.6)
        axes = drawn.add_subplot()
        low = min(min(row["goodput"], row["simulated"]) for row in figure["storms"]) - 0.05
        axes.fill_between(
            [low, 1], [low - 0.03, 0.97], [low + 0.03, 1.03], color=pictures.LINE, label="within 3 points"
        )
        for number, policy in enumerate(("restart", "quorum")):
            for ranks, filled in ((2, "none"), (3, pictures.SERIES[number])):
                rows = [row for row in figure["storms"] if (row["policy"], row["ranks"]) == (policy, ranks)]
                axes.plot(
                    [row["goodput"] for row in rows], [row["simulated"] for row in rows], pictures.MARKS[number],
                    color=pictures.SERIES[number], markerfacecolor=filled, label=f"{policy}, {ranks} ranks",
                )  # fmt: skip
        axes.set(title="Storms of kills: the same schedule, trained and simulated", xlabel="goodput measured",
                 ylabel="goodput simulated", xlim=(low, 1), ylim=(low, 1))  # fmt: skip
        axes.legend(loc="upper left")
        return pictures.png(drawn)


def main() -> None:
    """Draw docs/forecast-storms.png of what BENCHMARKS.json holds."""
    figure = json.loads((ROOT / "BENCHMARKS.json").read_text(encoding="utf-8"))["forecast_storms"]
    files.write(ROOT / "docs" / "forecast-storms.png", picture(figure))


if __name__ == "__main__":
    main()
