"""The figures of scripts/bench about forecasts: closed forms, published systems, and storms simulated and trained."""

import itertools
import json
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench_survival import EVERY, cluster
from trainer.forecast import run as forecasts
from trainer.forecast.calibrate import calibrate
from trainer.forecast.scenario import DAY, Scenario, daly_goodput, daly_interval, load, parse
from trainer.forecast.simulator import replay, simulate
from trainer.launch.cluster import Cluster
from trainer.log import goodput
from trainer.log.history import History

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "forecast"
SECONDS = 180.0
"""Length of a storm."""
CALM_SECONDS, PRACTICE_SECONDS = 60.0, 120.0
"""Lengths of the two runs that are calibrated with, per number of ranks."""
PRACTICE_MTBF = 20.0
STORMS = ((2, 60.0), (2, 30.0), (2, 15.0), (3, 60.0), (3, 30.0), (3, 15.0))
"""(ranks, mean seconds between kills), each with a seed of its own."""
COMPARED = {"down": ("down", "hung"), "startup": ("startup",), "lost_steps": ("lost_steps",)}
"""{part of the simulation: parts of a run}. Saves stall the loop too briefly to be compared."""


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
        started = time.perf_counter()
        scenario = load(path)
        tree = forecasts.forecast(scenario)
        seconds = (time.perf_counter() - started) / scenario.replicates
        rows.append({"name": path.stem, "seconds": seconds, **tree["published"]})
    return rows


def forecast() -> dict[str, Any]:
    return {"closed_forms": closed_forms(), "published": published()}


# Storms


def storms() -> dict[str, Any]:
    """Calibrate with a calm run and a practice storm; then train and simulate the same schedules of kills."""
    rows, measured = [], {}
    with tempfile.TemporaryDirectory() as directory:
        for ranks in sorted({ranks for ranks, _ in STORMS}):
            calm, practice = Path(directory) / f"calm-{ranks}", Path(directory) / f"practice-{ranks}"
            _train(calm, ranks, CALM_SECONDS, [])
            _train(practice, ranks, PRACTICE_SECONDS, _schedule(ranks, PRACTICE_MTBF, PRACTICE_SECONDS, "practice"))
            measured[ranks] = calibrate([calm, practice]) | {"working_share": _working_share(calm)}
        for number, (ranks, mtbf) in enumerate(STORMS):
            run = Path(directory) / f"storm-{number}"
            schedule = _schedule(ranks, mtbf, SECONDS, f"storm-{number}")
            kills, before = _train(run, ranks, SECONDS, schedule)
            # A worker that was killed before it wrote is in no log, and no part of the measured time.
            moments = [moment - before for moment in kills if moment > before]
            row = _compare(run, moments, measured[ranks])
            rows.append({"ranks": ranks, "mtbf": mtbf, "kills": len(moments), **row})
            print(json.dumps(rows[-1]), flush=True)
    return {"storms": rows, "calibrated": measured, "seconds": SECONDS, "every": EVERY}


def _schedule(ranks: int, mtbf: float, seconds: float, seed: str) -> list[tuple[float, int]]:
    """Draw (seconds since the start of the job, rank) of kills, with exponential gaps."""
    drawn, moment, kills = random.Random(f"{seed}-{ranks}"), 0.0, []
    while (moment := moment + drawn.expovariate(1 / mtbf)) < seconds:
        kills.append((moment, drawn.randrange(ranks)))
    return kills


def _train(run: Path, ranks: int, seconds: float, schedule: list[tuple[float, int]]) -> tuple[list[float], float]:
    """Train for so long and kill as scheduled. Returns the times of the kills, and how long the job took to begin.

    Both are in seconds since its command; it begins when the log's first process does. A kill that finds no worker
    strikes the next one that is there.
    """
    with tempfile.TemporaryDirectory() as directory, cluster(directory, run, ranks=ranks) as job:
        started = time.time()
        job.start()
        kills = []
        for moment, rank in schedule:
            time.sleep(max(0.0, started + moment - time.time()))
            if _kill(job, rank, started + seconds):
                kills.append(time.time() - started)
        time.sleep(max(0.0, started + seconds - time.time()))
        job.nodes[0].signal(signal.SIGTERM)
        job.wait(60)
    first = next(attempt.start for attempt in History.read(run).attempts if attempt.start)
    return kills, first[0].time - sum(first[1].startup_seconds.values()) - started


def _kill(job: Cluster, rank: int, until: float) -> bool:
    while time.time() < until:
        pid = job.workers().get(rank)
        if pid is not None and job.send(pid, signal.SIGKILL):
            return True
        time.sleep(0.02)
    return False


def _working_share(calm: Path) -> float:
    """Share of the loop's time that is spent in steps; the rest is logging, and whatever else lies between events."""
    parts = goodput.account(History.read(calm))["parts"]
    return parts["productive"] / (parts["productive"] + parts["other"])


def _compare(run: Path, kills: list[float], measured: dict[str, Any]) -> dict[str, Any]:
    account = goodput.account(History.read(run))
    wall = account["wall_seconds"] - account["parts"]["shutdown"]
    simulated = replay(_scenario(measured, wall), [(moment, "kill") for moment in kills])
    return {
        "wall": wall,
        "goodput": account["productive_seconds"] / wall,
        "simulated": simulated.goodput * measured["working_share"],
        "parts": {
            part: [sum(account["parts"][name] for name in names), simulated.parts[part]]
            for part, names in COMPARED.items()
        },
    }


def _scenario(measured: dict[str, Any], wall: float) -> Scenario:
    tree = {
        "days": wall / DAY, "step_seconds": measured["step_seconds"],
        "cluster": {"devices": measured["devices"], "devices_per_node": 1},
        "failure": [{"name": "kill", "per_day": 1.0, "detect_seconds": measured["detect_seconds"]}],
        "policy": {
            "kind": "restart", "restart_seconds": measured["restart_seconds"],
            "save_stall_seconds": measured["save_stall_seconds"], "save_write_seconds": measured["save_write_seconds"],
            "checkpoint_every_seconds": EVERY * measured["step_seconds"] / measured["working_share"],
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
        f"Storms of {figure['seconds']:.0f} s, trained and simulated with the same schedule of kills (`scripts/bench "
        "forecast_storms`); the simulator was calibrated with other runs. Last three columns: seconds measured, "
        "simulated.",
        "",
        "| ranks | mean time between kills | kills | goodput measured | simulated | points apart | down | startup | "
        "lost steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in figure["storms"]:
        parts = " | ".join(f"{ours:.1f}, {simulated:.1f}" for ours, simulated in row["parts"].values())
        lines.append(
            f"| {row['ranks']} | {row['mtbf']:.0f} s | {row['kills']} | {row['goodput']:.3f} | "
            f"{row['simulated']:.3f} | {100 * abs(row['goodput'] - row['simulated']):.1f} | {parts} |"
        )
    return lines
