"""Walk through many schedules of quorum's protocol: `python -m scripts.quorum_schedules [COUNT] [FIRST_SEED]`.

The test suite walks through fewer (tests/test_quorum_protocol.py). Exits with 1 at the first violation, with its seed
and its events; the same seed gives the same schedule.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tests.quorum_simulation import ViolationError, World, random_size

CHUNK = 500


def walk(first: int, end: int) -> int:
    """Walk through at most CHUNK schedules, those below seed `end`; return the number of their events."""
    events = 0
    for seed in range(first, min(first + CHUNK, end)):
        world = World(seed, random_size(seed))
        try:
            events += world.run().events
        except ViolationError as violation:
            trace = "\n".join(map(str, world.trace))
            raise ViolationError(f"{trace}\nseed {seed}, {world.size}: {violation}") from None
    return events


def main() -> None:
    count, first = (int(argument) for argument in [*sys.argv[1:], *["100000", "0"][len(sys.argv) - 1 :]])
    started = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        events = sum(pool.map(walk, range(first, first + count, CHUNK), [first + count] * -(-count // CHUNK)))
    seconds = time.monotonic() - started
    print(f"{count} schedules, {events} events, {seconds:.0f} s: no violation")


if __name__ == "__main__":
    main()
