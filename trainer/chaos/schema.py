"""Campaign files: their schema, and the problems of a file that breaks it."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from trainer import tomlfile
from trainer.config import Config, Section
from trainer.errors import ConfigError

Strategy = Literal["replicate", "fsdp", "hybrid"]


class Run(Section):
    """One case, written out in the file."""

    name: str = ""
    ranks: int = Field(default=0, ge=0)
    """0: the campaign's number."""
    nodes: int = Field(default=0, ge=0)
    strategy: Strategy | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of this run alone. None may change the weights, or there would be nothing to compare with."""
    faults: list[dict[str, Any]] = Field(default_factory=list)


class Catalogue(Section):
    """Every kind of fault once, each in a run of its own, at its usual moment."""

    kinds: list[str] | Literal["all"] = "all"


class Pairs(Section):
    """Runs with two kinds of fault at once, drawn from all pairs."""

    sample: int = Field(default=10, ge=1)
    kinds: list[str] | Literal["all"] = "all"
    """"all": all kinds that need no second node."""


class Storm(Section):
    """Random schedules, one run for each seed."""

    mix: str | dict[str, float] = "process"
    seeds: list[int] = Field(default=[0], min_length=1)
    faults: int = Field(default=10, ge=1)
    """Maximum number of faults in a run."""
    mean_steps: float = Field(default=5.0, gt=0)
    """Mean number of steps between two faults. Steps, not seconds: so a schedule can be replayed exactly."""


class CampaignFile(Section):
    question: str = ""
    config: str
    """Path of the runs' config, relative to the campaign file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides for all runs, including the reference run."""
    set_outside: dict[str, Any] = Field(default_factory=dict)
    """Overrides for runs with faults from outside, which must last long enough to be hit. None may change the
    weights."""
    ranks: int = Field(default=2, ge=1)
    """Number of ranks on all nodes together."""
    nodes: int = Field(default=1, ge=1)
    strategies: list[Strategy] = Field(default=["replicate"], min_length=1)
    repeat: int = Field(default=1, ge=1)
    seed: int = 0
    """Seed of the draw of pairs."""
    timeout_seconds: float = Field(default=300.0, gt=0)
    """Limit for one start of a job."""
    restarts: int = Field(default=20, ge=0)
    """Restarts of the workers in one start of a job, beyond two for each of its faults."""
    runs: list[Run] = Field(default_factory=list)
    catalogue: Catalogue | None = None
    pairs: Pairs | None = None
    storm: Storm | None = None


NEEDED_BY_ALL = {"config", "set", "set_outside", "ranks", "nodes", "strategies"}
"""Settings without which no run can be planned."""


def read(path: Path) -> tuple[CampaignFile | None, list[str]]:
    """Return (the file, its problems).

    Faulty tables and settings are left out of the file, so that the others can be checked too; the file is None where
    that is not possible. Raises ConfigError if it is no TOML file.
    """
    tree = tomlfile.read(path)
    if "config" not in tree and tree.keys() & (Config.model_fields.keys() | {"extends"}) - {"seed"}:
        hint = "Give a campaign that names it, as configs/chaos/smoke.toml does."
        raise ConfigError([f"{path} is a run's config, not a campaign.\n  {hint}"])
    try:
        return CampaignFile.model_validate(tree), []
    except ValidationError as error:
        mistakes = tomlfile.mistakes(error, tree)
    problems = [f"{path}: {tomlfile.explain(mistake, CampaignFile, 'campaign')}" for mistake in mistakes]
    # A misspelt setting counts as the one that it resembles.
    names = [str(mistake.place[0]) for mistake in mistakes]
    wrong = {next(iter(difflib.get_close_matches(name, CampaignFile.model_fields, n=1)), name) for name in names}
    if wrong & NEEDED_BY_ALL:
        return None, problems
    return CampaignFile.model_validate(_without(tree, [mistake.place for mistake in mistakes])), problems


def _without(tree: Mapping[str, Any], places: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """Return the tree without the runs, tables and settings that hold these places."""
    left, runs = dict(tree), set[int]()
    for name, *below in places:
        if name == "runs" and below:
            runs.add(below[0])
        else:
            left.pop(name, None)
    if runs and "runs" in left:
        left["runs"] = [run for number, run in enumerate(left["runs"]) if number not in runs]
    return left
