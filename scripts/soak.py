"""The long campaign: small runs under random kills, each of which must end with the bits of a run without kills.

Run number n of seed s is drawn from a generator seeded with "s-n": two runs of the campaign differ in when a kill from
outside hits, and in nothing else. Each run is one to three jobs, of random world size and strategy; all but the last
are asked to stop at a random step. Kills come from inside, at a phase of a step, or from outside, at a wall time. Only
kills that really fired are counted. Every finished run is a line of DIR/runs.jsonl, so an interrupted campaign
resumes where it stopped; the summary is DIR/summary.json.
"""

import argparse
import json
import random
import shutil
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.bench_tables import record
from tests.support import SMOKE, outcome, settings, trainer, with_faults, write_corpus
from trainer import config as configs
from trainer.errors import EXIT_FINISHED, EXIT_PREEMPTED
from trainer.faults import plan
from trainer.faults.checker import strays
from trainer.faults.fault import SAVE, STEP
from trainer.faults.nemesis import Nemesis
from trainer.launch.cluster import Cluster
from trainer.phases import Phase

STEPS, EVERY, EVAL_EVERY = 24, 6, 12
KILLS = ("sigkill", "sigkill", "sigkill", "sigsegv", "sigabrt")
SECONDS_A_JOB = 150

Table = dict[str, Any]
"""One [[faults]] table."""


def draw(seed: str) -> list[dict[str, Any]]:
    """The jobs of one run: {ranks, strategy, faults, until}."""
    rng = random.Random(seed)
    ends = [*sorted(rng.sample(range(4, STEPS - 2), rng.choice((0, 0, 1, 1, 2)))), STEPS]
    sizes = [rng.choices((1, 2, 3, 4), (1, 3, 2, 1))[0] for _ in ends]
    jobs, begin, taken = [], 0, set[tuple[Any, ...]]()
    for until, ranks in zip(ends, sizes, strict=True):
        strategy = rng.choice(("replicate", "fsdp", "hybrid") if ranks % 2 == 0 else ("replicate", "fsdp"))
        # A fault stays in the config of later jobs, so it names a rank that all of them have.
        drawn = [_inside(rng, min(sizes), begin, until) for _ in range(rng.randint(1, 3))]
        if until < STEPS:
            drawn.append({"kind": "sigterm", "at_step": until + 1, "rank": rng.randrange(min(sizes))})
        faults = []
        for fault in drawn:  # no two at the same moment
            moment = (fault.get("at_step"), fault.get("phase", Phase.BEFORE_FORWARD))
            if moment not in taken:
                taken.add(moment)
                faults.append(fault)
        faults += [_outside(rng, min(sizes)) for _ in range(rng.choice((0, 0, 1, 1)))]
        jobs.append({"ranks": ranks, "strategy": strategy, "faults": faults, "until": until})
        begin = until + 1
    return jobs


def _inside(rng: random.Random, ranks: int, begin: int, until: int) -> Table:
    """A kill between the steps `begin` and `until`: in a step, a save or an evaluation, or at the start or end."""
    where = rng.choices(("step", "save", "eval", "load", "start", "end"), (10, 5, 1, 1, 1, 1))[0]
    steps = [*range(begin + 1, until), *([STEPS] if until == STEPS else [])]
    saves = [step for step in steps if step % EVERY == 0]
    evaluations = [step for step in steps if step % EVAL_EVERY == 0]
    fault: Table = {"kind": rng.choice((*KILLS, "exit", "exception")), "rank": rng.randrange(ranks)}
    if where == "save" and saves:
        # An exception in a save is a failed save and kills no rank. Only rank 0 commits.
        phase = rng.choice(SAVE)
        fault |= {"kind": rng.choice(KILLS), "phase": phase, "at_step": rng.choice(saves)}
        return fault | ({} if phase == Phase.IN_SAVE_SHARD else {"rank": 0})
    if where == "eval" and evaluations:
        return fault | {"phase": Phase.IN_EVAL, "at_step": rng.choice(evaluations)}
    if where == "load":
        return fault | {"phase": Phase.IN_LOAD}
    if where == "start":
        return fault | {"phase": Phase.STARTUP}
    if where == "end" and until == STEPS:
        return fault | {"phase": Phase.BEFORE_END}
    return fault | {"phase": rng.choice(STEP), "at_step": rng.randrange(begin + 1, max(begin + 2, until))}


def _outside(rng: random.Random, ranks: int) -> Table:
    """A kill some seconds after a job was started: importing, connecting, loading, training or saving."""
    return {"kind": rng.choice(KILLS), "at_seconds": round(rng.uniform(0.5, 8.0), 2), "rank": rng.randrange(ranks)}


class Campaign:
    def __init__(self, directory: Path, seed: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.seed = directory, seed
        self._lines = directory / "runs.jsonl"
        source = write_corpus(directory / "corpus")
        self._settings = settings(
            data__source=source, data__heldout_fraction=0.2, budget__steps=STEPS, checkpoint__every_steps=EVERY,
            eval__every_steps=EVAL_EVERY, eval__max_tokens=1024, elastic__step_timeout_seconds=30.0,
        )  # fmt: skip
        self._writing = threading.Lock()

    def reference(self) -> dict[str, Any]:
        """Result of the run without kills."""
        run = self.directory / "reference"
        trainer("train", SMOKE, "--run", run, *self._settings)
        return outcome(run)

    def done(self) -> list[dict[str, Any]]:
        lines = self._lines.read_text().splitlines() if self._lines.exists() else []
        return [record for record in map(json.loads, lines) if record["seed"] == self.seed]

    def do_run(self, number: int, reference: dict[str, Any]) -> dict[str, Any]:
        """Do run `number`, print its line and keep its record. A run that ended well is removed."""
        directory, started = self.directory / f"run-{self.seed}-{number}", time.monotonic()
        shutil.rmtree(directory, ignore_errors=True)
        jobs = draw(f"{self.seed}-{number}")
        record: dict[str, Any] = {"seed": self.seed, "number": number, "drawn": jobs, "kills": [], "problems": []}
        for place in range(len(jobs)):
            if not record["problems"]:
                self._do_job(directory, jobs[: place + 1], place == len(jobs) - 1, record)
        record["kills"] = [
            {"action": event.fault, "point": event.phase or "wall time", "rank": event.victim}
            for _, event in plan.fired(directory / "run")
            if event.fault != "sigterm"
        ]
        if not record["problems"]:
            record["problems"] = _differences(directory / "run", reference)
        record["seconds"] = round(time.monotonic() - started, 1)
        with self._writing, self._lines.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
        print(_line(record), flush=True)
        if not record["problems"]:
            shutil.rmtree(directory)
        return record

    def _do_job(self, directory: Path, jobs: list[dict[str, Any]], is_last: bool, record: dict[str, Any]) -> None:
        """Do the last of `jobs`. The faults of those before it stay in the config, so that each keeps its number."""
        job, faults = jobs[-1], [fault for job in jobs for fault in job["faults"]]
        chosen = [*self._settings, *settings(parallel__strategy=job["strategy"]), *with_faults(faults)]
        planned = plan.make(configs.load(SMOKE, chosen[1::2]), job["ranks"])
        new = planned[len(faults) - len(job["faults"]) :]
        cluster = Cluster(
            SMOKE, directory / "run", chosen[1::2], ranks=job["ranks"], restarts=len(faults) + 1,
            directory=directory / f"job-{len(jobs)}", warm=True,
        )  # fmt: skip
        with cluster:
            nemesis = Nemesis(new, directory / "run", cluster, time.time())
            cluster.start()
            nemesis.start()
            status = cluster.wait(SECONDS_A_JOB)
            nemesis.stop()
            # The notice may come when nothing is left to do: then the job has finished.
            wanted = (EXIT_FINISHED,) if is_last else (EXIT_PREEMPTED, EXIT_FINISHED)
            if status not in wanted:
                record["problems"].append(f"exit status {status}, wanted {wanted}\n{cluster.output[-6000:]}")
            record["problems"] += [*nemesis.problems, *(cluster.leftovers() if status is not None else [])]


def _differences(run: Path, reference: dict[str, Any]) -> list[str]:
    result = outcome(run)
    wrong = [
        f"{key} differs from the reference run: {str(result[key])[:200]}"
        for key in reference
        if result[key] != reference[key]
    ]
    return wrong + [f"stray file {path}" for path in strays(run)]


def _line(record: dict[str, Any]) -> str:
    jobs = [f"{job['ranks']}×{job['strategy']}" for job in record["drawn"]]
    kills = [f"{kill['action']}@{kill['point']}:{kill['rank']}" for kill in record["kills"]]
    verdict = "equal" if not record["problems"] else "FAILED " + record["problems"][0]
    return (
        f"run {record['seed']}-{record['number']}  {' → '.join(jobs)}  {len(kills)} kills: {' '.join(kills)}  "
        f"{record['seconds']} s  {verdict}"
    )


def summarise(records: list[dict[str, Any]], seed: int, wanted: int) -> dict[str, Any]:
    kills = [kill for record in records for kill in record["kills"]]
    jobs = [job for record in records for job in record["drawn"]]
    return {
        "seed": seed,
        "wanted": wanted,
        "runs": len(records),
        "jobs": len(jobs),
        "kills": len(kills),
        "equal": sum(not record["problems"] for record in records),
        "failed": [f"{seed}-{record['number']}" for record in records if record["problems"]],
        "kills_by_action": dict(Counter(kill["action"] for kill in kills).most_common()),
        "kills_by_point": dict(Counter(kill["point"] for kill in kills).most_common()),
        "jobs_by_world_size": {str(k): v for k, v in sorted(Counter(job["ranks"] for job in jobs).items())},
        "jobs_by_strategy": dict(Counter(job["strategy"] for job in jobs).most_common()),
        "seconds": round(sum(record["seconds"] for record in records), 1),
    }


def campaign(directory: Path, seed: int, wanted_kills: int, at_once: int) -> dict[str, Any]:
    """Do runs until so many kills have fired, in this and earlier calls; returns and writes the summary."""
    runs = Campaign(directory, seed)
    records, reference = runs.done(), runs.reference()
    numbers = iter(number for number in range(10**6) if number not in {record["number"] for record in records})
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if sum(len(record["kills"]) for record in records) >= wanted_kills:
                    return
                number = next(numbers)
            record = runs.do_run(number, reference)
            with lock:
                records.append(record)

    with ThreadPoolExecutor(at_once) as workers:
        for ended in [workers.submit(work) for _ in range(at_once)]:
            ended.result()
    summary = summarise(records, seed, wanted_kills)
    (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200, help="continue until so many have fired")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/soak-SEED")
    parser.add_argument("--record", action="store_true", help="keep the summary in BENCHMARKS.json and BENCHMARKS.md")
    arguments = parser.parse_args()
    out = (arguments.out or Path("runs") / f"soak-{arguments.seed}").absolute()
    summary = campaign(out, arguments.seed, arguments.kills, arguments.jobs)
    print(json.dumps(summary, indent=1))
    if arguments.record:
        record("soak", summary)
    if summary["failed"]:
        sys.exit(f"{len(summary['failed'])} runs did not end as the reference run; they are kept in {out}")


if __name__ == "__main__":
    main()
