"""Findings of a sentinel: one disagreement, and the ranks that are wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

WRONG = {
    "state": "keeps wrong weights, moments or grids",
    "gradient": "has added up a wrong gradient",
    "reduction": "has received a wrong sum of gradients",
    "update": "has computed a wrong update",
    "tokens": "has read tokens that are not the store's",
    "store": "has changed since its checksum was verified",
    "micro_batch": "has computed a wrong gradient of micro-batch",
}
"""By kind of finding: what is said of the rank, or of the token store."""


@dataclass(frozen=True)
class Finding:
    """One disagreement."""

    what: str
    """A key of WRONG. A gradient is what a rank added up, a reduction what it received."""
    ranks: tuple[int, ...]
    """Ranks that are wrong: all of these, or one of these if it is about a micro-batch; none if it is unknown."""
    micro_batch: int | None = None
    parameter: str | None = None

    def told(self, numbers: Sequence[int]) -> str:
        """The finding in words. `numbers`: by rank, what the log calls it."""
        several = " and " if self.micro_batch is None else " or "
        nobody = "the token store" if self.what == "store" else "an unknown rank"
        who = several.join(f"rank {numbers[rank]}" for rank in self.ranks) or nobody
        which = "" if self.micro_batch is None else f" {self.micro_batch}"
        return f"{who} {WRONG[self.what]}{which}" + (f", first in {self.parameter}" if self.parameter else "")
