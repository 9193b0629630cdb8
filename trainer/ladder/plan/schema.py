"""The tables of a ladder file, as strict models."""

from typing import Any, Literal

from pydantic import Field

from trainer.config import Section
from trainer.ladder.plan.sizes import Rules, Size
from trainer.ladder.stats.records import Criterion

Unit = Literal["nats_per_token", "bits_per_byte"]


class Rung(Size):
    name: str
    seeds: list[int] | None = Field(default=None, min_length=1)
    """None: as the ladder."""


class Target(Size):
    """The scale that is really cared about: a size, or its compute."""

    flops: float = Field(default=0.0, ge=0)
    seeds: list[int] = Field(default_factory=list)
    """The baseline is run there too, after all rungs, to check the prediction; empty: only predicted."""
    arms: list[str] = Field(default_factory=list)
    """Arms that are run there beside the baseline."""


class CriterionTable(Section):
    """results.Criterion, as a table of the file."""

    level: float = Field(default=Criterion.level, gt=0, lt=0.5)
    min_gain: float = Field(default=Criterion.min_gain, ge=1)
    max_slowdown: float = Field(default=Criterion.max_slowdown, gt=0)
    looks: int = Field(default=Criterion.looks, ge=1)


class Arm(Section):
    name: str
    question: str = ""
    set: dict[str, Any] = Field(default_factory=dict)
    """One setting that decides the weights, or one rule as sizes.NAME."""
    combines: list[str] = Field(default_factory=list)
    """Names of arms whose changes are made together."""


class Tuning(Section):
    """A sweep of the learning rate for every rung and arm; its best is what the seeds' runs take."""

    rates: list[float] = Field(default=[0.5, 1.0, 2.0], min_length=2)
    """Multipliers of what the sizes' rule gives."""
    seed: int = Field(default=1_000_003, ge=0)
    """Not one of the ladder's: the best of a sweep is also the luckiest."""


class LadderFile(Section):
    question: str
    baseline: str
    """Path of the baseline's config, relative to the ladder file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides for all runs."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    metric: str = "val"
    """A held-out set of the runs."""
    unit: Unit = "nats_per_token"
    slots: int = Field(default=0, ge=0)
    """Runs side by side; 0: as many as the machine has cores, or GPUs, for."""
    ranks: int = Field(default=1, ge=1)
    """Of each run."""
    restarts: int = Field(default=5, ge=0)
    """Of a run that died, in a row and without progress."""
    aa: bool = True
    """An arm without a change, but for the draw of the initial weights: what it seems to be worth is noise."""
    sizes: Rules
    rungs: list[Rung] = Field(min_length=1)
    target: Target
    criterion: CriterionTable = CriterionTable()
    arms: list[Arm] = Field(default_factory=list)
    tuning: Tuning | None = None
    faults: list[dict[str, Any]] = Field(default_factory=list)
    """Fault tables of a run's config, each for the runs that its `arm`, `rung` and `seed` select; all, without."""
