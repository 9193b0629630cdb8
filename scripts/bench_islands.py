"""Islands over a slow link: bytes and time, beside synchronous training on the same link.

    python -m scripts.bench_islands [--trial]

Two hosts (network namespaces), a rank on each, one link between them of 10 or 100 Mbit/s with 50 ms of delay: by netem
where the kernel has it, else a queue that delays by up to so much. Needs root, or a system that lets users make
namespaces. Takes about five minutes; let nothing else run meanwhile.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.bench_survival import ENDLESS, ENVIRONMENT, TINY
from trainer.launch import namespaces
from trainer.launch.cluster import Cluster
from trainer.launch.namespaces import Hosts
from trainer.log import events

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
SYNCHRONOUS_STEPS = 2, 7
"""First and last step between which it is measured: each takes seconds on the slower link."""
PATIENCE_SECONDS = 300.0


def measure(overrides: list[str], rate: str, first: int, last: int, directory: Path) -> dict[str, float]:
    """Train on two hosts; return bytes and seconds per 1,000 tokens from the end of step `first` to that of `last`."""
    run = directory / "run"
    settings = [*ENDLESS, "checkpoint.every_steps=0", *overrides]
    with Hosts(2) as hosts, hosts.slow(0, DELAY_MILLISECONDS, rate):
        cluster = Cluster(
            TINY, run, settings, ranks=1, nodes=2, restarts=0, directory=directory / "job", hosts=hosts,
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


def figure() -> dict[str, Any]:
    """Measure all arms on all links."""
    if reason := namespaces.shaping():
        raise SystemExit(f"bench_islands: {reason}")
    found: dict[str, Any] = {}
    for rate in RATES:
        for arm, overrides in ARMS.items():
            first, last = (INNER_STEPS, (1 + ROUNDS) * INNER_STEPS) if overrides else SYNCHRONOUS_STEPS
            with tempfile.TemporaryDirectory() as directory:
                found.setdefault(rate, {})[arm] = measure(overrides, rate, first, last, Path(directory))
            print(rate, arm, found[rate][arm], flush=True)
    return {"links": found}


def table(figure: dict[str, Any]) -> list[str]:
    lines = [
        "", "## Islands over a slow link", "",
        f"`configs/gpt_tiny.toml` on two hosts of one rank each, up to {DELAY_MILLISECONDS:g} ms of delay. Sent by",
        "one of them, and time, per 1,000 tokens; in brackets how many times less than synchronous training on the",
        "same link.",
        "", "| link | | kB | seconds |", "|---|---|---|---|",
    ]  # fmt: skip
    for rate, arms in figure["links"].items():
        usual = arms[SYNCHRONOUS]
        for arm, found in arms.items():
            less = ["" if arm == SYNCHRONOUS else f" ({usual[key] / found[key]:.1f}×)" for key in ("bytes", "seconds")]
            shown = f"{found['bytes'] / 1000:,.1f}{less[0]} | {found['seconds']:.3f}{less[1]}"
            lines.append(f"| {rate.removesuffix('mbit')} Mbit/s | {arm} | {shown} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial", action="store_true", help="print the table, and record nothing")
    is_trial, found = parser.parse_args().trial, figure()
    if is_trial:
        print("\n".join(table(found)))
        return
    from scripts.bench_tables import record

    record("islands", found)


if __name__ == "__main__":
    main()
