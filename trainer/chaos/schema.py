"""Campaign files: what one may hold, and what is wrong with one."""

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
    """One case that is written out."""

    name: str = ""
    ranks: int = Field(default=0, ge=0)
    """0: as the campaign."""
    nodes: int = Field(default=0, ge=0)
    strategy: Strategy | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of this run alone; none that decides the weights, or there would be nothing to compare with."""
    faults: list[dict[str, Any]] = Field(default_factory=list)


class Catalogue(Section):
    """Every kind once, each in a run of its own, at a moment that suits it."""

    kinds: list[str] | Literal["all"] = "all"


class Pairs(Section):
    """Two kinds at once, so many pairs drawn from all of them."""

    sample: int = Field(default=10, ge=1)
    kinds: list[str] | Literal["all"] = "all"
    """"all": those that need no second node."""


class Storm(Section):
    """Random schedules, one run for each seed."""

    mix: str | dict[str, float] = "process"
    seeds: list[int] = Field(default=[0], min_length=1)
    faults: int = Field(default=10, ge=1)
    """At most so many in a run."""
    mean_steps: float = Field(default=5.0, gt=0)
    """Between two faults. In steps, and not in seconds: so a schedule can be replayed exactly."""


class CampaignFile(Section):
    question: str = ""
    config: str
    """Path of the runs' config, relative to the campaign file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides for all runs, the reference run too."""
    set_outside: dict[str, Any] = Field(default_factory=dict)
    """Overrides for runs with faults from outside, which must last long enough to be hit; none that decides the
    weights."""
    ranks: int = Field(default=2, ge=1)
    """Of all nodes together."""
    nodes: int = Field(default=1, ge=1)
    strategies: list[Strategy] = Field(default=["replicate"], min_length=1)
    repeat: int = Field(default=1, ge=1)
    seed: int = 0
    """Draws the pairs."""
    timeout_seconds: float = Field(default=300.0, gt=0)
    """For one start of a job."""
    restarts: int = Field(default=20, ge=0)
    """Of the workers in one start of a job, beyond two for each of its faults."""
    runs: list[Run] = Field(default_factory=list)
    catalogue: Catalogue | None = None
    pairs: Pairs | None = None
    storm: Storm | None = None


PLANS_REST_ON = {"config", "set", "set_outside", "ranks", "nodes", "strategies"}
"""Settings without which nothing can be said of any run."""


def read(path: Path) -> tuple[CampaignFile | None, list[str]]:
    """(the file, what is wrong with it): without its faulty tables and settings, so that all others can be judged too.

    None where they cannot. Raises ConfigError if it is no TOML file.
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
    wrong = {_meant(str(mistake.place[0])) for mistake in mistakes}
    if wrong & PLANS_REST_ON:
        return None, problems
    return CampaignFile.model_validate(_without(tree, [mistake.place for mistake in mistakes])), problems


def _meant(key: str) -> str:
    """The setting of that name, or the nearest."""
    return next(iter(difflib.get_close_matches(key, CampaignFile.model_fields, n=1)), key)


def _without(tree: Mapping[str, Any], places: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """The tree less the runs, tables and settings in which these places are."""
    left, runs = dict(tree), set[int]()
    for name, *below in places:
        if name == "runs" and below:
            runs.add(below[0])
        else:
            left.pop(name, None)
    if runs and "runs" in left:
        left["runs"] = [run for number, run in enumerate(left["runs"]) if number not in runs]
    return left
