"""Times of operators on this machine: measured when first asked for, and kept in the cache folder.

A file for each machine: device, torch, threads and whatever else chooses kernels name it. It holds a grid of matrix
products, the bandwidth of a copy, what a call costs beyond its operator, and every call that was timed.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch

from trainer import builtin, files, provenance
from trainer import config as configs
from trainer.advise import calls
from trainer.advise.calls import Call
from trainer.config import Config
from trainer.data.cache import cache_root

ROWS, COLUMNS, DEPTHS = (64, 512, 4096), (64, 256, 1024), (64, 256, 1024)
"""m, n and k of the grid."""
COPIED = 2**24
"""float32 numbers of the copy: more than caches hold."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Rates:
    """Times of calls, by their keys, and what is derived from them."""

    def __init__(self, path: Path, device: torch.device, kept: dict[str, Any]) -> None:
        self.path, self.device = path, device
        self._calls: dict[str, float] = kept.get("calls", {})
        self._grid: dict[str, list[list[float]]] = kept.get("grid", {})  # by precision: [flops, seconds]
        self.copy_bytes_per_second: float = kept.get("copy_bytes_per_second", 0.0)
        self.overhead: float | None = kept.get("seconds_per_call")
        """Seconds of a call beyond its operator: Python, modules and autograd."""

    @classmethod
    def open(cls, config: Config, device: torch.device) -> Self:
        """Open what is known of this machine, if anything. Raises CorpusError if there is no cache folder."""
        machine = {name: value for name, value in provenance.computes_with(config, device).items() if name != "code"}
        digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
        path = cache_root(config.data.cache_dir) / "rates" / f"{digest}.json"
        return cls(path, device, _read(path))

    def save(self) -> None:
        """Keep what was measured, beside what another process has kept meanwhile. Raises OSError."""
        kept = _read(self.path)
        self._calls = {**kept.get("calls", {}), **self._calls}
        self._grid = {**kept.get("grid", {}), **self._grid}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tree = {"calls": self._calls, "grid": self._grid, "copy_bytes_per_second": self.copy_bytes_per_second,
                "seconds_per_call": self.overhead}  # fmt: skip
        files.write(self.path, json.dumps(tree))

    def prepare(self, precision: str, log: Callable[[str], None]) -> None:
        """Measure what is measured once: the grid in this precision, the copy, and what calls cost."""
        if not self.copy_bytes_per_second:
            copied = calls.copy(COPIED)
            self.copy_bytes_per_second = copied.bytes / (copied.seconds(self.device) or float("inf"))
        if precision not in self._grid:
            log(f"{len(ROWS) * len(COLUMNS) * len(DEPTHS)} matrix products in {precision}, once for this machine")
            shapes = [calls.product(m, n, k, DTYPES[precision]) for m in ROWS for n in COLUMNS for k in DEPTHS]
            timed = [(call, call.seconds(self.device)) for call in shapes]
            self._grid[precision] = [[call.flops, seconds] for call, seconds in timed if seconds]
        if self.overhead is None:
            log("what calls cost beyond their operators, once for this machine")
            self.overhead = self._measure_overhead()
        self.save()

    def _measure_overhead(self) -> float:
        """Time a small model's step and its operators alone: what is left, divided by the number of calls."""
        from trainer.advise.steps import take

        threads = torch.get_num_threads()
        small = configs.load(builtin.find(Path("smoke")), [f"numerics.threads={threads}"])
        taken = take(small, self.device)
        self.overhead = 0.0
        step = taken.step.timed(self)
        number = step.calls_made(taken.micro_batches)
        return max(0.0, (taken.seconds - step.seconds(taken.micro_batches)) / number)

    def seconds(self, key: str, call: Call) -> float:
        """Time of a call: measured alone, or where it cannot be made alone, its traffic at the rate of a copy."""
        if key not in self._calls:
            seconds = call.seconds(self.device)
            self._calls[key] = call.bytes / self.copy_bytes_per_second if seconds is None else seconds
        return self._calls[key]

    def best(self, precision: str, flops: float = float("inf")) -> float:
        """Highest rate of the grid's matrix products, in FLOPs a second, among those of at most twice so many FLOPs."""
        grid = self._grid.get(precision, [])
        return max((size / seconds for size, seconds in grid if size <= 2 * flops), default=0.0)


def _read(path: Path) -> dict[str, Any]:
    try:
        return files.read_object(path)
    except (OSError, ValueError):  # none yet, or one that was cut
        return {}
