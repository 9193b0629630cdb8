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
Transport = Literal["tcp", "mptcp"]


class Run(Section):
    """One case, written out in the file."""

    name: str = ""
    ranks: int = Field(default=0, ge=0)
    """0: the campaign's number."""
    nodes: int = Field(default=0, ge=0)
    strategy: Strategy | None = None
    spares: int | None = Field(default=None, ge=0)
    transport: Transport | None = None
    apart: bool | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of this run alone. None may change the weights, or there would be nothing to compare with."""
    faults: list[dict[str, Any]] = Field(default_factory=list)


class Catalogue(Section):
    """Every kind of fault once, each in a run of its own, at its usual moment."""

    kinds: list[str] | Literal["all"] = "all"


class Phases(Section):
    """Kinds at every phase that they have: one run for each phase, in which each rank that passes it is hit once."""

    kinds: list[str] = Field(default=["sigkill"], min_length=1)


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


class Progress(Section):
    """Signs that show from beside a job how far it has come. Without them no time to come back is measured."""

    pattern: str = ""
    """Regular expression for a line that reports a step; its first group is the step's number."""
    file: str = ""
    """File to look in instead of the job's output. Without a pattern, progress is that it grows."""
    steps: int | None = Field(default=None, ge=1)
    """Last step that a whole job reports. Storms, and the usual moments of faults, are spread over the steps."""
    within_seconds: float = Field(default=60.0, gt=0)
    """Bound from a fault to progress beyond all that was made before it."""


class JobResult(Section):
    """Result that must be equal at the end of each job: a file, a text or a number. Without it nothing is compared."""

    file: str = ""
    """The file whose SHA-256 is compared, or the one that holds the line or the number."""
    line: str = ""
    """Regular expression for a line of the output or the file: its first group, or all of it, must be the same text."""
    number: str = ""
    """Regular expression for a line; its first group is a number."""
    tolerance: float | None = Field(default=None, ge=0)
    """Largest difference of the number from the reference run's."""


class CampaignFile(Section):
    question: str = ""
    config: str = ""
    """Path of the runs' config, relative to the campaign file."""
    command: list[str] = Field(default_factory=list)
    """Instead of a config: the words of a command that starts any other job, torchrun and a script for example. Here,
    in `directory`, in `environment` and in names of files, {run} is the job's own empty folder, and {here} that of the
    campaign file."""
    directory: str = "{here}"
    """Folder in which the command is started."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for the command, beside those of the campaign's own process."""
    progress: Progress | None = None
    result: JobResult | None = None
    checkpoints: str = ""
    """Glob of the files that the job saves to resume from, for faults that damage the newest of them."""
    again_after: list[int] = Field(default_factory=list)
    """Exit statuses of the command after which its user or scheduler gives it again."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides for all runs, including the reference run."""
    set_outside: dict[str, Any] = Field(default_factory=dict)
    """Overrides for runs with faults from outside, which must last long enough to be hit. None may change the
    weights."""
    ranks: int = Field(default=2, ge=1)
    """Number of ranks on all nodes together."""
    nodes: int = Field(default=1, ge=1)
    spares: int = Field(default=0, ge=0)
    """With elastic.mode = "quorum": workers beyond `ranks` that wait to be needed."""
    transport: Transport = "tcp"
    """"mptcp": connections between the nodes of each run are of Multipath TCP, over two links."""
    apart: bool = False
    """With [islands]: clusters of parallel.island_ranks ranks live apart, under `trainer launch --islands`. Else one
    job has all ranks."""
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
    phases: Phases | None = None
    pairs: Pairs | None = None
    storm: Storm | None = None


NEEDED_BY_ALL = {"config", "command", "directory", "progress", "set", "set_outside", "ranks", "nodes", "strategies"}
"""Settings without which no run can be planned."""
OF_COMMANDS = {"directory", "environment", "progress", "result", "checkpoints", "again_after"}
OF_CONFIGS = {"set", "set_outside", "strategies", "restarts", "spares", "transport", "apart"}


def read(path: Path) -> tuple[CampaignFile | None, list[str]]:
    """Return (the file, its problems).

    Faulty tables and settings are left out of the file, so that the others can be checked too; the file is None where
    that is not possible. Raises ConfigError if it is no TOML file.
    """
    tree = tomlfile.read(path)
    if not {"config", "command"} & tree.keys() and tree.keys() & (Config.model_fields.keys() | {"extends"}) - {"seed"}:
        hint = "Give a campaign that names it, as configs/chaos/smoke.toml does."
        raise ConfigError([f"{path} is a run's config, not a campaign.\n  {hint}"])
    try:
        file, problems = CampaignFile.model_validate(tree), list[str]()
    except ValidationError as error:
        mistakes = tomlfile.mistakes(error, tree)
        problems = [f"{path}: {tomlfile.explain(mistake, CampaignFile, 'campaign')}" for mistake in mistakes]
        # A misspelt setting counts as the one that it resembles.
        names = [str(mistake.place[0]) for mistake in mistakes]
        wrong = {next(iter(difflib.get_close_matches(name, CampaignFile.model_fields, n=1)), name) for name in names}
        if wrong & NEEDED_BY_ALL:
            return None, problems
        file = CampaignFile.model_validate(_without(tree, [mistake.place for mistake in mistakes]))
    misfits = _misfits(path, file)
    return (None if misfits else file), problems + misfits


def _misfits(path: Path, file: CampaignFile) -> list[str]:
    """Settings of a valid file that do not belong together."""
    if bool(file.config) == bool(file.command):
        fact = "has both config and command" if file.config else "names neither a config nor a command"
        return [f"{path} {fact}.\n  Give config for runs of toprope, or command for any other job."]
    name, others = ("config", OF_COMMANDS) if file.config else ("command", OF_CONFIGS)
    wrong = sorted(others & file.model_fields_set)
    remedy = "progress and result are for a command." if file.config else "Options of the job belong to its command."
    return [f"{path}: {key} has no effect beside {name}.\n  Remove it. {remedy}" for key in wrong]


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
