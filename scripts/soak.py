"""The long campaign: small runs under random kills, each of which must end with the bits of the calm run.

Run number n of seed s is drawn from a generator seeded with "s-n": two runs of the campaign differ in when a kill from
outside hits, and in nothing else. Each run is one to three jobs, of random world size and strategy; all but the last
are asked to stop at a random step. Kills come from inside, at a named point, or from outside, at a wall time. Only
kills that really fired are counted. Every finished run is a line of DIR/runs.jsonl, so a campaign that is ended goes
on where it stopped; the summary is DIR/summary.json.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.bench_tables import record
from tests.support import SMOKE, Job, fired, outcome, settings, trainer, write_corpus, write_plan
from trainer.errors import EXIT_FINISHED, EXIT_PREEMPTED
from trainer.faults.checker import strays

STEPS, EVERY, EVAL_EVERY = 24, 6, 12
ENDINGS = ("kill", "kill", "kill", "segv", "abort")
IN_STEP = (
    "before_forward", "in_forward", "before_backward", "in_backward", "before_reduce", "after_reduce", "before_update",
    "in_update", "after_update",
)  # fmt: skip
OF_SAVE = ("in_save_shard", "before_commit", "after_commit")
MAIN_ONLY = ("before_commit", "after_commit")
SECONDS_A_JOB = 150


def draw(seed: str) -> list[dict[str, Any]]:
    """The jobs of one run: {ranks, strategy, faults, outside: [{after, action, rank}], until}."""
    rng = random.Random(seed)
    cuts = [*sorted(rng.sample(range(4, STEPS - 2), rng.choice((0, 0, 1, 1, 2)))), STEPS]
    jobs, begin = [], 0
    for until in cuts:
        ranks = rng.choices((1, 2, 3, 4), (1, 3, 2, 1))[0]
        strategy = rng.choice(("replicate", "fsdp", "hybrid") if ranks % 2 == 0 else ("replicate", "fsdp"))
        inside = sorted((_inside(rng, ranks, begin, until) for _ in range(rng.randint(1, 3))), key=_moment)
        outside = [_outside(rng, ranks) for _ in range(rng.choice((0, 0, 1, 1)))]
        if until < STEPS:
            inside.append(
                {"point": "before_forward", "step": until, "action": "term", "rank": rng.randrange(ranks), "nth": 0}
            )
        jobs.append({"ranks": ranks, "strategy": strategy, "faults": inside, "outside": outside, "until": until})
        begin = until + 1
    return jobs


def _inside(rng: random.Random, ranks: int, begin: int, until: int) -> dict[str, Any]:
    kind = rng.choices(("step", "save", "eval", "load", "start", "end"), (10, 5, 1, 1, 1, 1))[0]
    saves = [step for step in range(1, STEPS + 1) if begin < step < until and step % EVERY == 0]
    saves += [STEPS] if until == STEPS else []
    fault: dict[str, Any] = {"action": rng.choice((*ENDINGS, "exit", "exception")), "rank": rng.randrange(ranks)}
    if kind == "save" and saves:
        point = rng.choice(OF_SAVE)
        fault["action"] = rng.choice(ENDINGS)  # an exception in a save is a failed save and kills nobody
        fault |= {"point": point, "step": rng.choice(saves)} | ({"rank": 0} if point in MAIN_ONLY else {})
    elif kind == "eval" and any(step % EVAL_EVERY == 0 for step in range(begin + 1, until + (until == STEPS))):
        fault |= {"point": "in_eval", "step": None, "nth": rng.randrange(3)}
    elif kind == "load":
        fault |= {"point": "in_load", "step": None}
    elif kind == "start":
        fault |= {"point": "START", "step": None}
    elif kind == "end" and until == STEPS:
        fault |= {"point": "before_end", "step": STEPS}
    else:
        fault |= {"point": rng.choice(IN_STEP), "step": rng.randrange(begin, max(begin + 1, until - 1)), "nth": 0}
        fault["pause"] = rng.choice((0, 0, 0.1))
    return fault


def _moment(fault: dict[str, Any]) -> int:
    """For reading: the order in which faults are likely to come."""
    return -1 if fault["point"] == "START" else fault["step"] or 0


def _outside(rng: random.Random, ranks: int) -> dict[str, Any]:
    """A kill some seconds after workers were started: importing, connecting, loading, training or saving."""
    return {"after": round(rng.uniform(0.2, 5.0), 2), "action": rng.choice(ENDINGS), "rank": rng.randrange(ranks)}


class Nemesis(threading.Thread):
    """Kills workers of a job from outside, one after each start of them."""

    def __init__(self, job: Job, kills: list[dict[str, Any]]) -> None:
        super().__init__(daemon=True)
        self._job, self._kills, self.fired = job, kills, list[dict[str, Any]]()

    def run(self) -> None:
        known: set[int] = set()
        for kill in self._kills:
            while not (fresh := set(self._job.workers().values()) - known):
                if self._job.process.poll() is not None:
                    return
                time.sleep(0.05)
            time.sleep(kill["after"])
            living = [pid for _, pid in sorted(self._job.workers().items())]
            known |= fresh | set(living)
            if not living:
                continue
            victim = living[kill["rank"] % len(living)]
            with contextlib.suppress(ProcessLookupError):
                os.kill(
                    victim, getattr(signal, {"kill": "SIGKILL", "segv": "SIGSEGV", "abort": "SIGABRT"}[kill["action"]])
                )
                self.fired.append(kill)


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

    def calm(self) -> dict[str, Any]:
        run = self.directory / "calm"
        trainer("train", SMOKE, "--run", run, *self._settings)
        return outcome(run)

    def done(self) -> list[dict[str, Any]]:
        lines = self._lines.read_text().splitlines() if self._lines.exists() else []
        return [record for record in map(json.loads, lines) if record["seed"] == self.seed]

    def one(self, number: int, calm: dict[str, Any]) -> dict[str, Any]:
        """Do run `number`, print its line and keep its record. A run that ended well is removed."""
        directory, started = self.directory / f"run-{self.seed}-{number}", time.monotonic()
        shutil.rmtree(directory, ignore_errors=True)
        jobs = draw(f"{self.seed}-{number}")
        record: dict[str, Any] = {"seed": self.seed, "number": number, "drawn": jobs, "kills": [], "problems": []}
        for place, job in enumerate(jobs):
            if not record["problems"]:
                self._job(directory, job, place == len(jobs) - 1, record)
        if not record["problems"]:
            record["problems"] = _differences(directory / "run", calm)
        record["seconds"] = round(time.monotonic() - started, 1)
        with self._writing, self._lines.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
        print(_line(record), flush=True)
        if not record["problems"]:
            shutil.rmtree(directory)
        return record

    def _job(self, directory: Path, drawn: dict[str, Any], is_last: bool, record: dict[str, Any]) -> None:
        plan = write_plan(directory / "jobs", drawn["faults"])
        restarts = len(drawn["faults"]) + len(drawn["outside"]) + 1
        options = ["--standalone", f"--nproc-per-node={drawn['ranks']}", f"--max-restarts={restarts}"]
        chosen = [*self._settings, *settings(parallel__strategy=drawn["strategy"])]
        with Job(plan, SMOKE, directory / "run", chosen, [*options, "--monitor-interval=0.1"]) as job:
            nemesis = Nemesis(job, drawn["outside"])
            nemesis.start()
            try:
                status = job.wait(SECONDS_A_JOB)
            except AssertionError as error:
                record["problems"].append(str(error))
                return
            nemesis.join(10)
            record["kills"] += [
                {"action": drawn["faults"][index]["action"], "point": mark["point"], "rank": mark["rank"]}
                for index, mark in sorted(fired(plan).items())
                if drawn["faults"][index]["action"] != "term"
            ]
            record["kills"] += [{"action": k["action"], "point": "wall time", "rank": k["rank"]} for k in nemesis.fired]
            # The notice may come when nothing is left to do: then the job has finished.
            wanted = (EXIT_FINISHED,) if is_last else (EXIT_PREEMPTED, EXIT_FINISHED)
            if status not in wanted:
                record["problems"].append(f"exit status {status}, wanted {wanted}\n{job.output[-6000:]}")
            record["problems"] += job.leftovers()


def _differences(run: Path, calm: dict[str, Any]) -> list[str]:
    seen = outcome(run)
    wrong = [f"{key} differs from the calm run: {str(seen[key])[:200]}" for key in calm if seen[key] != calm[key]]
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
    it = Campaign(directory, seed)
    records = it.done()
    calm = it.calm()
    numbers = iter(number for number in range(10**6) if number not in {record["number"] for record in records})
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if sum(len(record["kills"]) for record in records) >= wanted_kills:
                    return
                number = next(numbers)
            record = it.one(number, calm)
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
    parser.add_argument("--kills", type=int, default=200, help="go on until so many have fired")
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
        sys.exit(f"{len(summary['failed'])} runs did not end as the calm one; they are kept in {out}")


if __name__ == "__main__":
    main()
