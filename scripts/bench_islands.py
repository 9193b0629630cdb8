"""Islands over a slow link, and islands that die, beside synchronous training: bytes, time, goodput.

    python -m scripts.bench_islands [ROW …] [--minutes 15] [--trial DIR] | --list

measures the rows that runs/bench-islands/COMMIT/ does not have yet (the last commit of the package), saves each as soon
as it is measured, and writes BENCHMARKS.md. It begins no row when the minutes are over: the same command goes on. Let
nothing else run meanwhile.

`--list` names the rows, how long each takes, and which are measured; none takes three minutes.

`link-…`: two hosts (network namespaces), a rank on each, one link between them of 10 or 100
Mbit/s with 50 ms of delay: by netem where the kernel has it, else a queue that delays by up to so much. Needs root, or
a system that lets users make namespaces. `goodput-…`: two clusters of islands, two workers in quorum mode, and two
under torchrun, of which one is killed in the middle of every minute.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts import bench_quorum
from scripts.bench_quorum import Commit, Quorum, Restart, Row
from scripts.bench_survival import ENDLESS, ENVIRONMENT, EVERY, ROOT, TINY
from trainer.launch import namespaces
from trainer.launch.agent import Agent
from trainer.launch.cluster import Cluster
from trainer.launch.namespaces import Hosts
from trainer.launch.processes import stat
from trainer.log import events, rundir

RATES = ("10mbit", "100mbit")
DELAY_MILLISECONDS = 50.0
INNER_STEPS = 30
ROUNDS = 2
ISLANDS = ["islands.count=2", f"islands.inner_steps={INNER_STEPS}"]
STREAMED = ["islands.fragments=3", "islands.overlap_steps=5", "islands.mixing=0.5"]
SYNCHRONOUS = "synchronous"
ARMS: dict[str, list[str]] = {
    SYNCHRONOUS: [],
    f"2 islands, H = {INNER_STEPS}": ISLANDS,
    "int4": [*ISLANDS, 'islands.quantise="int4"'],
    "int4, 3 fragments, overlap 5": [*ISLANDS, 'islands.quantise="int4"', *STREAMED],
}
NAMES = dict(zip(ARMS, ("synchronous", "islands", "int4", "streamed"), strict=True))
"""Name of each arm in the names of rows."""
SYNCHRONOUS_STEPS = 2, 7
"""First and last step between which it is measured: each takes seconds on the slower link."""
PATIENCE_SECONDS = 300.0
CLUSTERS, KILL_EVERY_SECONDS, GOODPUT_SECONDS = 2, 60.0, 120.0
START_SECONDS, LINK_SECONDS = 20.0, {"10mbit": 70.0, "100mbit": 40.0}
"""Most seconds of a job's start, and of its steps over a link, on a quiet machine: for `--list`."""


# Slow links.


def over_link(overrides: list[str], rate: str) -> dict[str, float]:
    """Train on two hosts; return bytes and seconds per 1,000 tokens."""
    if reason := namespaces.shaping():
        raise SystemExit(f"bench_islands: {reason}")
    first, last = (INNER_STEPS, (1 + ROUNDS) * INNER_STEPS) if overrides else SYNCHRONOUS_STEPS
    settings = [*ENDLESS, "checkpoint.every_steps=0", *overrides]
    with tempfile.TemporaryDirectory() as place, Hosts(2) as hosts, hosts.slow(0, DELAY_MILLISECONDS, rate):
        run = Path(place) / "run"
        cluster = Cluster(
            TINY, run, settings, ranks=1, nodes=2, restarts=0, directory=Path(place) / "job", hosts=hosts,
            environment=ENVIRONMENT,
        )  # fmt: skip
        with cluster:
            cluster.start()
            begun_at, begun_bytes = _done(cluster, run, first), hosts.sent_bytes(0)
            ended_at, ended_bytes = _done(cluster, run, last), hosts.sent_bytes(0)
        tokens = sum(e.tokens for _, e in events.select(events.read(run), events.StepDone) if first < e.step <= last)
    return {
        "bytes": (ended_bytes - begun_bytes) * 1000 / tokens,
        "seconds": (ended_at - begun_at) * 1000 / tokens,
    }


def _done(cluster: Cluster, run: Path, step: int) -> float:
    """Wait until a step is in the log; return the time at which it was written."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and cluster.running:
        for entry, event in events.select(events.read(run), events.StepDone) if run.exists() else ():
            if event.step >= step:
                return entry.time
        time.sleep(0.1)
    raise TimeoutError(f"step {step} was not reached:\n{cluster.output[-3000:]}")


# Islands that die.


class Apart(bench_quorum.Launched):
    """`python -m trainer launch --islands`, as a job of bench_quorum."""

    def __init__(self, directory: Path, clusters: int) -> None:
        run = directory / "run"
        overrides = [
            *ENDLESS, f"checkpoint.every_steps={EVERY}", f"islands.count={clusters}", f"islands.inner_steps={EVERY}"
        ]  # fmt: skip
        settings = [part for setting in overrides for part in ("--set", setting)]
        command = ["-m", "trainer", "launch", str(TINY), "--islands", str(clusters), "--run", str(run), *settings]
        self._agent = Agent(
            command, directory / "log.txt", launch=[sys.executable], environment=ENVIRONMENT, directory=ROOT
        )
        self._runs = [rundir.of_cluster(run, cluster) for cluster in range(clusters)]
        self._followers = [events.Follower(run) for run in self._runs]
        self._commits: list[Commit] = []
        self._pids: dict[int, int] = {}

    def read(self) -> list[Commit]:
        """Steps are written where the clusters meet."""
        for cluster, (run, follower) in enumerate(zip(self._runs, self._followers, strict=True)):
            for entry in follower.poll() if events.events_directory(run).exists() else ():
                if isinstance(entry.event, events.AttemptStarted):
                    self._pids[cluster] = entry.event.pid
                elif isinstance(entry.event, events.StepDone) and cluster == 0:
                    self._commits.append(Commit(entry.event.step, entry.time, entry.attempt))
        return self._commits

    def members(self) -> dict[int, int]:
        self.read()
        return {cluster: pid for cluster, pid in self._pids.items() if stat(pid)[:1] not in ([], ["Z"])}

    def is_whole(self) -> bool:
        return len(self.members()) == len(self._runs)


SYSTEMS: dict[str, tuple[str, Callable[[Path], bench_quorum.Job]]] = {
    "islands": ("islands that live apart", lambda place: Apart(place, CLUSTERS)),
    "quorum": ("synchronous, quorum", lambda place: Quorum(place, CLUSTERS)),
    "restart": ("synchronous, restart", lambda place: Restart(place, CLUSTERS)),
}


# Rows.


def rows(seconds: float = GOODPUT_SECONDS) -> list[Row]:
    def harassed(make: Callable[[Path], bench_quorum.Job]) -> Callable[[], dict[str, Any]]:
        half = KILL_EVERY_SECONDS / 2  # each minute of the time then has a whole death in it
        return lambda: bench_quorum.goodput(make, KILL_EVERY_SECONDS, seconds, workers=CLUSTERS, first=half)

    links = [
        Row(f"link-{rate}-{NAMES[arm]}", lambda overrides=overrides, rate=rate: over_link(overrides, rate))
        for rate in RATES
        for arm, overrides in ARMS.items()
    ]
    return [*links, *(Row(f"goodput-{name}", harassed(make)) for name, (_, make) in SYSTEMS.items())]


def about_seconds(name: str, seconds: float = GOODPUT_SECONDS) -> float:
    """Return about how many seconds a row takes."""
    over = next((LINK_SECONDS[rate] for rate in RATES if name.startswith(f"link-{rate}-")), None)
    return START_SECONDS + (2 * bench_quorum.CALM_SECONDS + seconds if over is None else over)


def listed(out: Path) -> list[str]:
    """All rows: name, about how long each takes, and what it gave, if it is in `out`."""
    lines = []
    for row in rows():
        path = out / f"{row.name}.json"
        found = summary(row.name, json.loads(path.read_text())) if path.exists() else "not measured"
        lines.append(f"{row.name:24} about {about_seconds(row.name):3.0f} s   {found}")
    return lines


def summary(name: str, row: dict[str, Any]) -> str:
    if name.startswith("goodput"):
        return bench_quorum.summary(name, row)
    return f"{row['bytes'] / 1000:,.1f} kB and {row['seconds']:.3f} s per 1,000 tokens"


def figure() -> dict[str, Any]:
    """The figure of scripts/bench."""
    return {"rows": bench_quorum.measure_rows(rows(), [], 25.0, bench_quorum.place("bench-islands"), summary)}


def table(figure: dict[str, Any]) -> list[str]:
    found = figure["rows"]
    return [*_links_table(found), *_goodput_table(found)]


def _links_table(found: dict[str, Any]) -> list[str]:
    lines = list[str]()
    for rate in RATES:
        usual = found.get(f"link-{rate}-{NAMES[SYNCHRONOUS]}")
        for arm in ARMS:
            row = found.get(f"link-{rate}-{NAMES[arm]}")
            if row is None:
                continue
            less = ["" if arm == SYNCHRONOUS or usual is None else f" ({usual[key] / row[key]:.1f}×)"
                    for key in ("bytes", "seconds")]  # fmt: skip
            shown = f"{row['bytes'] / 1000:,.1f}{less[0]} | {row['seconds']:.3f}{less[1]}"
            lines.append(f"| {rate.removesuffix('mbit')} Mbit/s | {arm} | {shown} |")
    return lines and [
        "", "## Islands over a slow link", "",
        f"`configs/gpt_tiny.toml` on two hosts of one rank each, up to {DELAY_MILLISECONDS:g} ms of delay. Sent by",
        "one of them, and time, per 1,000 tokens; in brackets how many times less than synchronous training on the",
        "same link.",
        "", "| link | | kB | seconds |", "|---|---|---|---|", *lines,
    ]  # fmt: skip


def _goodput_table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"| {title} | {row['goodput']:.3f} | {row['rate']:.1f} of {row['calm']:.1f} | {row['kills']} |"
        for name, (title, _) in SYSTEMS.items()
        if (row := found.get(f"goodput-{name}"))
    ]
    return lines and [
        "", "## Islands that die", "",
        f"`configs/gpt_tiny.toml`, {CLUSTERS} workers of one thread on one machine, of which a random one is killed",
        f"every {KILL_EVERY_SECONDS:g} s. Useful micro-batches a second against the same job's in calm around it.",
        f"Islands meet every {EVERY} steps; islands and restart save every {EVERY} steps.", "",
        "| | goodput | micro-batches/s | kills |", "|---|---|---|---|", *lines,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="measure these rows, though they were measured before")
    parser.add_argument("--minutes", type=float, default=15.0, help="begin no further row after so long")
    parser.add_argument("--seconds", type=float, default=GOODPUT_SECONDS, help="length of a goodput run")
    parser.add_argument("--list", action="store_true", help="name the rows and leave")
    parser.add_argument("--trial", type=Path, help="rows go to this folder, and nothing is recorded")
    given = parser.parse_args()
    out = given.trial or bench_quorum.place("bench-islands")
    if given.list:
        print("\n".join(listed(out)))
        return
    found = bench_quorum.measure_rows(rows(given.seconds), given.rows, given.minutes, out, summary)
    if given.trial is not None:
        print("\n".join(table({"rows": found})))
        return
    from scripts.bench_tables import record

    record("islands", {"rows": found})


if __name__ == "__main__":
    main()
