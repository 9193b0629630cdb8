"""GPUs of this machine, and the memory that is free on each, as nvidia-smi tells it.

CUDA itself is not asked: that would take some hundred megabytes of each GPU in a process that computes nothing.
"""

import os
import subprocess
from dataclasses import dataclass

MIB = 2**20
ASKED = "index,uuid,memory.total,memory.free"
SECONDS = 20.0  # a driver that is just loaded takes a few


@dataclass(frozen=True)
class Gpu:
    name: str
    """As in CUDA_VISIBLE_DEVICES: a number, or the first characters of a UUID."""
    free: int | None
    """Bytes; None if unknown."""


def visible(count: int) -> list[Gpu]:
    """Return the `count` GPUs that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",")[:count] if given else [str(number) for number in range(count)]
    listed = _listed()
    # CUDA numbers the fastest GPU 0, unless told otherwise; nvidia-smi goes by their places on the bus.
    one_order = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({total for _, _, total, _ in listed}) == 1

    def free(name: str) -> int | None:
        by_number = name.isdecimal()
        found = [free for index, uuid, _, free in listed if (index == name if by_number else uuid.startswith(name))]
        if by_number and found and not one_order:
            return min(free for *_, free in listed)
        return found[0] if len(found) == 1 else None

    return [Gpu(name, free(name)) for name in (name.strip() for name in names)]


def _listed() -> list[tuple[str, str, int, int]]:
    """Return (number, UUID, bytes in total, bytes free) of each GPU; empty if nvidia-smi does not tell."""
    command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
        rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
        return [(index, uuid, int(total) * MIB, int(free) * MIB) for index, uuid, total, free in rows]
    except (OSError, subprocess.SubprocessError, ValueError):  # not installed, no driver, "[N/A]" in a field
        return []
