"""Walk through many schedules of quorum's protocol: `python -m scripts.quorum_schedules [COUNT] [FIRST_SEED]`.

The test suite walks through fewer (tests/test_quorum_protocol.py). Exits with 1 at the first violation, with its seed
and its events; the same seed gives the same schedule.
"""

import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.quorum_simulation import ViolationError, World, random_size

CHUNK = 500


def walk(first: int, end: int) -> Counter[str]:
    """Walk through at most CHUNK schedules, those below seed `end`; return how often what has happened."""
    events = Counter[str]()
    for seed in range(first, min(first + CHUNK, end)):
        world = World(seed, random_size(seed))
        try:
            events += world.run().happened
        except ViolationError as violation:
            trace = "\n".join(str(event) for event in world.trace if not event[0].startswith("chance_to"))
            raise ViolationError(f"{trace}\nseed {seed}, {world.size}: {violation}") from None
    return events


def main() -> None:
    count, first = (int(argument) for argument in [*sys.argv[1:], *["100000", "0"][len(sys.argv) - 1 :]])
    started = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        walks = pool.map(walk, range(first, first + count, CHUNK), [first + count] * -(-count // CHUNK))
        happened = sum(walks, Counter[str]())
    seconds = time.monotonic() - started
    print(f"{count} schedules, {happened.total()} events, {seconds:.0f} s: no violation")
    print("\n".join(f"{times:>10,} × {what}" for what, times in happened.most_common()))


if __name__ == "__main__":
    main()
