"""Schema of a ladder file: its tables as strict models."""

from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.config import Section
from trainer.ladder.plan.sizes import Rules, Size
from trainer.ladder.stats.records import Criterion

CODE_LENGTH = "code_length"
"""The metric that is no held-out set: the mean loss over the training text, each batch scored before it is learnt."""

Unit = Literal["nats_per_token", "bits_per_byte"]


class Rung(Size):
    name: str
    seeds: list[int] | None = Field(default=None, min_length=1)
    """None: the ladder's seeds."""


class Target(Size):
    """The scale that the verdicts are about: a size, or its compute; on the axis "data", an amount of unique text."""

    flops: float = Field(default=0.0, ge=0)
    seeds: list[int] = Field(default_factory=list)
    """Seeds of the baseline's runs at the target, which check the prediction; empty: it is only predicted."""
    arms: list[str] = Field(default_factory=list)
    """Arms that are run at the target too."""


class CriterionTable(Section):
    """The fields of stats.records.Criterion, which explains them, as a table of the file."""

    level: float = Field(default=Criterion.level, gt=0, lt=0.5)
    min_gain: float = Field(default=Criterion.min_gain, ge=1)
    max_slowdown: float = Field(default=Criterion.max_slowdown, gt=0)
    looks: Annotated[int, Field(ge=1)] | Literal["any"] = 1


class Arm(Section):
    name: str
    question: str = ""
    set: dict[str, Any] = Field(default_factory=dict)
    """One setting that changes the weights, or one rule as sizes.NAME."""
    patch: str = ""
    """Path of a diff, relative to the ladder file's directory: of files under trainer/, or of the user's own files."""
    commit: str = ""
    """Commit (7 to 40 hex digits) from which the package, or else the user's own files, are taken."""
    ensemble: int = Field(default=0, ge=0)
    """Number of runs whose averaged probabilities are scored: the baseline's, and others that draw other initial
    weights. The compute of all of them counts."""
    distil: int = Field(default=0, ge=0)
    """Number of runs whose averaged probabilities are half of the target of the arm's run: the baseline's, and others
    that draw other initial weights. The compute of all of them counts."""
    combines: list[str] = Field(default_factory=list)
    """Names of arms whose changes are made together."""


class Tuning(Section):
    """A sweep of the learning rate for every rung and arm; the runs of the seeds use its best rate."""

    rates: list[float] = Field(default=[0.5, 1.0, 2.0], min_length=2)
    """Multipliers of the learning rate that the rule in [sizes] gives."""
    seed: int = Field(default=1_000_003, ge=0)
    """Must not be one of the ladder's: the best rate of a sweep was also lucky with its seed."""


class LadderFile(Section):
    question: str
    baseline: str
    """Path of the baseline's config, relative to the ladder file's directory."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides for all runs."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    metric: str = "val"
    """Name of the held-out set whose loss is compared, or "code_length" (log/code_length.py)."""
    unit: Unit = "nats_per_token"
    downstream: str = ""
    """Name of another held-out set, such as the text of a task: what it is scored at the target is predicted through
    the metric (stats/downstream.py). It decides nothing. "": none."""
    slots: int = Field(default=0, ge=0)
    """Number of runs at the same time; 0: as many as the machine has cores, or GPUs, for."""
    ranks: int = Field(default=1, ge=1)
    """Number of ranks of each run."""
    restarts: int = Field(default=5, ge=0)
    """Number of restarts of a run that dies, in a row and without progress, before it is given up."""
    aa: bool = True
    """Add an arm that changes only the draw of the initial weights: its apparent gain is noise."""
    sizes: Rules
    rungs: list[Rung] = Field(min_length=1)
    target: Target
    criterion: CriterionTable = CriterionTable()
    arms: list[Arm] = Field(default_factory=list)
    tuning: Tuning | None = None
    faults: list[dict[str, Any]] = Field(default_factory=list)
    """Fault tables of a run's config; `arm`, `rung` and `seed` select runs, and a table without them is for all."""


class AddedRuns(Section):
    """Runs that were added to a ladder after a look at its verdicts."""

    arms: list[str]
    """Arms that get them; the baseline does too."""
    seeds: dict[str, list[int]]
    """{rung: seeds}"""
    parameters: float = 0.0
    """N of a new rung; 0: all rungs are of the file."""
    unique_tokens: int = 0
    """U of a new rung, on the axis "data"."""
