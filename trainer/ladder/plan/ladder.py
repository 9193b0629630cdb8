"""A planned ladder: rungs, arms and runs, all checked."""

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from trainer import config as configs
from trainer import provenance
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.ladder.plan import code as codearms
from trainer.ladder.plan.schema import LadderFile
from trainer.ladder.plan.sizes import Shape
from trainer.ladder.stats.records import Axis, Criterion

AA = "A/A"
"""Name of the arm that changes only the draw of the initial weights."""
ENSEMBLE = "ensemble"
"""Key of the number of runs, among the settings of an arm that is an ensemble."""
DISTIL = "distil"
"""Key of the number of teachers, among the settings of an arm whose run is taught by runs of the ladder."""
TARGET = "target"
FIT_RUNGS = 3
"""A curve of three parameters needs as many rungs."""


def key_of(fingerprint: str, scored_on: configs.Eval, tree: Path | None, teachers: Iterable[str] = ()) -> str:
    """Key of a run: digest of its fingerprint, of what it is scored on, and of the code in `tree` (None: this code).

    `teachers` are keys of those that teach it: what they learn is decided by what these stand for.
    """
    # What is held out is no part of the mathematics, but it decides the loss that is read from the run.
    scored = json.dumps(configs.flatten(scored_on.model_dump(mode="json")), sort_keys=True)
    code = codearms.digest(tree)
    computed_by = "" if code == provenance.CODE_BEFORE_RECORDS else f" {code}"
    taught_by = "".join(f" {DISTIL} {teacher}" for teacher in teachers)
    return hashlib.sha256(f"{fingerprint} {scored}{computed_by}{taught_by}".encode()).hexdigest()[:16]


def key_of_several(kind: str, members: Iterable[str]) -> str:
    """Key of what is made of several runs, by the keys of these."""
    return hashlib.sha256(f"{kind} {' '.join(members)}".encode()).hexdigest()[:16]


class HasAmounts(Protocol):
    """A run or a rung, by what a ladder's rungs may be amounts of."""

    @property
    def flops(self) -> float: ...
    @property
    def unique_tokens(self) -> int: ...


@dataclass(frozen=True)
class PlannedArm:
    name: str
    question: str
    settings: dict[str, Any]
    """Changed settings: {"model.qk_norm": false}; rules as "sizes.NAME"; of an arm of code also "code.patch"."""
    combines: tuple[str, ...] = ()
    tree: Path | None = None
    """Folder with the changed package, for an arm that changes it."""

    @property
    def is_aa(self) -> bool:
        return set(self.settings) == {"model.init_draw"}


@dataclass(frozen=True)
class PlannedRung:
    """A size, with the figures of the baseline's run."""

    name: str
    shape: Shape
    parameters: int
    """N."""
    tokens: int
    """D."""
    flops: float
    """C, the training FLOPs of a run."""
    seeds: tuple[int, ...]
    unique_tokens: int = 0
    """U, on the axis "data"; else 0."""

    def to_json(self) -> dict[str, Any]:
        tree: dict[str, Any] = {"name": self.name} | asdict(self.shape)
        figures = {"parameters": self.parameters, "tokens": self.tokens, "flops": self.flops}
        text = {"unique_tokens": self.unique_tokens} if self.unique_tokens else {}
        return tree | figures | text | {"seeds": list(self.seeds)}

    @classmethod
    def of(cls, run: "PlannedRun", seeds: Iterable[int]) -> "PlannedRung":
        """Return the rung of this run of the baseline."""
        model = run.config.model
        shape = Shape(model.width, model.n_layers, model.n_heads)
        unique = run.config.data.unique_tokens
        return cls(run.rung, shape, run.parameters, run.tokens, run.flops, tuple(seeds), unique)


@dataclass(frozen=True)
class PlannedRun:
    """One run of the ladder, an ordinary run of `config`."""

    arm: str
    rung: str
    seed: int
    config: Config
    parameters: int
    """N of this run."""
    flops_per_token: int
    rate: float | None = None
    """Multiplier of the learning rate in a sweep; None outside of sweeps."""
    tree: Path | None = None
    """Folder with the package that the run is started with; None: the one that plans it."""
    ensemble: int = 0
    """Above 0 this is no run but the ensemble of so many, its `members`."""
    distil: int = 0
    """Above 0 this is no run but so many teachers and the run that they teach, its `members`, that one last."""
    teachers: tuple["PlannedRun", ...] = ()
    """Runs that must have finished before this one begins: their digests complete its config."""
    member: int | None = None
    """Number of this run in its ensemble, or among the teachers."""

    @property
    def name(self) -> str:
        sweep = "" if self.rate is None else f" rate ×{self.rate:g}"
        member = "" if self.member is None else f" member {self.member}"
        return f"{self.rung} {self.arm} seed {self.seed}{sweep}{member}"

    @property
    def members(self) -> list["PlannedRun"]:
        """Runs that this is made of; none of an ordinary run.

        Those of an ensemble, or teachers, differ in the draw of initial weights: all read the same text in the same
        order. A run that is taught begins with the weights of the baseline.
        """
        model, found = self.config.model, list[PlannedRun]()
        for number in range(self.ensemble or self.distil):
            draw = model.model_copy(update={"init_draw": model.init_draw + number})
            config = self.config.model_copy(update={"model": draw})
            found.append(replace(self, config=config, ensemble=0, distil=0, member=number))
        return [*found, replace(self, distil=0, teachers=tuple(found))] if self.distil else found

    @functools.cached_property
    def key(self) -> str:
        """Digest of what decides the result, 16 hex digits: runs of two ladders with the same key are one run."""
        if self.ensemble or self.distil:
            return key_of_several(ENSEMBLE if self.ensemble else DISTIL, (member.key for member in self.members))
        return key_of(
            configs.fingerprint(self.config), self.config.eval, self.tree, [teacher.key for teacher in self.teachers]
        )

    @property
    def tokens(self) -> int:
        data, model = self.config.data, self.config.model
        return self.config.budget.steps * data.micro_batches * data.micro_batch_sequences * model.context

    @property
    def flops(self) -> float:
        if members := self.members:
            return sum(member.flops for member in members)
        # A teacher computes forward passes alone.
        return float((self.flops_per_token + sum(t.flops_per_token // 3 for t in self.teachers)) * self.tokens)

    @property
    def unique_tokens(self) -> int:
        """U; 0: all of the text."""
        return self.config.data.unique_tokens

    def at_rate(self, multiplier: float) -> "PlannedRun":
        """Return the run with every learning rate multiplied."""
        optim = self.config.optim
        # Muon has a rate of its own for hidden matrices; a sweep scales both, or it would change their ratio too.
        rates: dict[str, Any] = {"learning_rate": optim.learning_rate * multiplier}
        if optim.optimizer == "muon":
            rates["muon_learning_rate"] = optim.muon_learning_rate * multiplier
        return replace(self, config=self.config.model_copy(update={"optim": optim.model_copy(update=rates)}))

    def as_sweep(self, seed: int, multiplier: float) -> "PlannedRun":
        """Return the sweep's run that tries this rate for the same rung and arm, without faults."""
        wandb = self.config.wandb
        tags = (*wandb.tags[:-1], f"seed {seed}", f"rate ×{multiplier:g}")
        update = {"seed": seed, "faults": (), "wandb": wandb.model_copy(update={"tags": tags})}
        run = replace(
            self, seed=seed, rate=multiplier, ensemble=0, distil=0, config=self.config.model_copy(update=update)
        )
        return run.at_rate(multiplier)


@dataclass(frozen=True)
class Ladder:
    """All runs of a ladder, planned and checked."""

    name: str
    path: Path
    file: LadderFile
    criterion: Criterion
    rungs: list[PlannedRung]
    """Smallest first; without the target."""
    arms: list[PlannedArm]
    target_flops: float
    target: PlannedRung | None
    """None if only its FLOPs are given."""
    runs: list[PlannedRun]
    """All runs but a sweep's, in the order of execution: by size, then seed, the baseline before the arms."""
    notices: list[str]
    settings: dict[str, Any] = field(repr=False)
    """Contents of the file, flat: edits are found by comparing them."""
    axis: Axis = "compute"
    target_unique_tokens: int = 0
    """U at the target, on the axis "data"."""

    @property
    def target_amount(self) -> float:
        """Amount at the target of what the rungs are amounts of."""
        return float(self.target_unique_tokens) if self.axis == "data" else self.target_flops

    def amount(self, run: "HasAmounts") -> float:
        """Amount of a run or rung of what the rungs are amounts of."""
        return float(run.unique_tokens) if self.axis == "data" else run.flops

    @property
    def all_rungs(self) -> list[PlannedRung]:
        """Rungs with the target, if it has a size."""
        return [*self.rungs, *([self.target] if self.target else [])]

    def up_to(self, rung: str) -> "Ladder":
        """Return the ladder with this rung and the smaller ones alone. Raises ConfigError if there is no such rung."""
        names = [planned.name for planned in self.rungs]
        if rung not in names:
            raise ConfigError([f"{self.path}: there is no rung {rung!r}.\n  Name one of {', '.join(names)}."])
        kept = names[: names.index(rung) + 1]
        # The target's compute stays: the verdicts are about it, whichever rungs are run.
        runs = [run for run in self.runs if run.rung in kept]
        return replace(self, rungs=self.rungs[: len(kept)], target=None, runs=runs)

    @property
    def sweep(self) -> list[PlannedRun]:
        """Runs of the learning-rate sweep; empty without [tuning]."""
        tuning = self.file.tuning
        if tuning is None:
            return []
        # The sweep has one seed of its own, so any run of a rung and arm stands for all of them.
        runs = {(run.rung, run.arm): run for run in self.runs}
        return [run.as_sweep(tuning.seed, rate) for run in runs.values() for rate in tuning.rates]
