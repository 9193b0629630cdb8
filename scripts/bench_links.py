"""A link of two dies or slows down: seconds lost and restarts, over plain TCP and over Multipath TCP.

    python -m scripts.bench_links [--trial FILE]

Two hosts (network namespaces) of one rank each, with two links between them. Takes about five minutes; let nothing else
run meanwhile. Rounds that are measured are kept in runs/bench-links/COMMIT/ (the last commit of the package), so that a
bench that was ended goes on there.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts import bench_quorum
from scripts.bench_survival import ENDLESS, ENVIRONMENT, TINY
from trainer import files
from trainer.launch import namespaces, transport
from trainer.launch.cluster import Cluster
from trainer.launch.namespaces import Hosts
from trainer.log import events
from trainer.log.events import AttemptStarted, StepDone

TRANSPORTS = ("tcp", "mptcp")
ROUNDS = 2
RATE, MILLISECONDS = "100mbit", 2.0  # of both links, as long as nothing is wrong
SLOW_RATE, SLOW_MILLISECONDS = "20mbit", 20.0
DOWN_SECONDS = 20.0
STEP_TIMEOUT_SECONDS = 10.0
SETTLED, USUAL_STEPS, SLOW_STEPS, STEPS_AFTER = 3, 12, 4, 40
PATIENCE_SECONDS = 120.0
POLL_SECONDS = 0.05


class Job:
    """A job on two hosts, watched by its event log."""

    def __init__(self, cluster: Cluster, run: Path) -> None:
        self._cluster, self._run = cluster, run

    def steps(self) -> list[tuple[float, StepDone]]:
        read = events.read(self._run) if (self._run / "config.json").exists() else []
        return [(entry.time, event) for entry, event in events.select(read, StepDone)]

    def attempts(self) -> int:
        started = events.select(events.read(self._run), AttemptStarted)
        return len({entry.attempt for entry, _ in started})

    def reached(self) -> int:
        return max((event.step for _, event in self.steps()), default=0)

    def wait_for(self, step: int) -> float:
        """Wait until a step is in the log; return the time at which it was written."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and self._cluster.running:
            if found := [at for at, event in self.steps() if event.step >= step]:
                return min(found)
            time.sleep(POLL_SECONDS)
        raise TimeoutError(f"step {step} was not reached:\n{self._cluster.output[-3000:]}")

    def tokens_per_second(self, steps: int) -> float:
        """Measured over so many steps from now on, beginning with the next one that ends."""
        first = self.reached() + 1
        began, ended = self.wait_for(first), self.wait_for(first + steps)
        tokens = sum(event.tokens for _, event in self.steps() if first < event.step <= first + steps)
        return tokens / (ended - began)


def measure(name: str, directory: Path) -> dict[str, float]:
    """Train over a transport, through a slow link and a dead one."""
    run = directory / "run"
    settings = [*ENDLESS, "checkpoint.every_steps=20", f"elastic.step_timeout_seconds={STEP_TIMEOUT_SECONDS}"]
    with (
        Hosts(2, links=2) as hosts,
        hosts.slow(1, MILLISECONDS, RATE, link=0),
        hosts.slow(1, MILLISECONDS, RATE, link=1),
    ):
        if name == "mptcp":
            hosts.allow_multipath()
        cluster = Cluster(
            TINY, run, settings, ranks=1, nodes=2, restarts=5, directory=directory / "job", hosts=hosts,
            environment=ENVIRONMENT | {transport.TRANSPORT: name},
        )  # fmt: skip
        job = Job(cluster, run)
        with cluster:
            cluster.start()
            job.wait_for(SETTLED)
            usual = job.tokens_per_second(USUAL_STEPS)
            with hosts.slow(1, SLOW_MILLISECONDS, SLOW_RATE):
                slow = job.tokens_per_second(SLOW_STEPS)
            job.wait_for(job.reached() + SETTLED)
            attempts = job.attempts()
            struck_at, reached = time.time(), job.reached()
            with hosts.down(1):
                time.sleep(DOWN_SECONDS)
            done_at = job.wait_for(reached + STEPS_AFTER)
            done = [(at, event.tokens) for at, event in job.steps() if event.step > reached]
            seconds_at_usual_speed = STEPS_AFTER * done[0][1] / usual
            return {
                "usual_tokens_per_second": usual,
                "slow_tokens_per_second": slow,
                "stall_seconds": done[0][0] - struck_at,
                "lost_seconds": done_at - struck_at - seconds_at_usual_speed,
                "restarts": job.attempts() - attempts,
            }


def figure(kept: Path | None = None) -> dict[str, Any]:
    """Measure both transports in turn, ROUNDS times; rounds that the file `kept` has are not measured again."""
    if reason := namespaces.shaping() or transport.missing() or namespaces.multipath():
        raise SystemExit(f"bench_links: {reason}")
    kept = kept or bench_quorum.place("bench-links") / "rounds.json"
    found: dict[str, list[dict[str, float]]] = json.loads(kept.read_text()) if kept.exists() else {}
    for number in range(ROUNDS):
        for name in TRANSPORTS:
            rounds = found.setdefault(name, [])
            if len(rounds) > number:
                continue
            with tempfile.TemporaryDirectory() as directory:
                rounds.append(measure(name, Path(directory)))
            print(name, rounds[-1], flush=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            files.write(kept, json.dumps(found))
    return {"transports": found}


def table(figure: dict[str, Any]) -> list[str]:
    rounds = len(figure["transports"]["tcp"])

    def row(title: str, key: str, form: str) -> str:
        cells = []
        for name in TRANSPORTS:
            values = [measured[key] for measured in figure["transports"][name]]
            spread = f" ({format(min(values), form)}–{format(max(values), form)})" if min(values) < max(values) else ""
            cells.append(f"{format(statistics.median(values), form)}{spread}")
        return f"| {title} | {' | '.join(cells)} |"

    return [
        "", "## A link of two dies or slows down", "",
        f"`configs/gpt_tiny.toml` on two hosts of one rank each, two links of {_mbit(RATE)} between them, {rounds}",
        f"rounds. The first link is then of {_mbit(SLOW_RATE)}, and later down for {DOWN_SECONDS:g} s; a rank that",
        f"waits for {STEP_TIMEOUT_SECONDS:g} s counts as hung. Seconds lost: from the link's death until {STEPS_AFTER}",
        "new steps are done, beyond what they take at the usual speed.",
        "", "| | plain TCP | MPTCP |", "|---|---|---|",
        row("tokens/s, both links up", "usual_tokens_per_second", ",.0f"),
        row("tokens/s, the first link slow", "slow_tokens_per_second", ",.0f"),
        row("the first link dies: seconds until the next new step", "stall_seconds", ".1f"),
        row("seconds lost", "lost_seconds", ".1f"),
        row("restarts", "restarts", ".0f"),
    ]  # fmt: skip


def _mbit(rate: str) -> str:
    return f"{rate.removesuffix('mbit')} Mbit/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trial", type=Path, metavar="FILE", help="keep the rounds in this file, print the table, and record nothing"
    )
    trial = parser.parse_args().trial
    found = figure(trial)
    if trial is not None:
        print("\n".join(table(found)))
        return
    from scripts.bench_tables import record

    record("links", found)


if __name__ == "__main__":
    main()
