"""Goodput against the number of devices, one line per policy; where each stops working, and what to improve first."""

import itertools
import math
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from trainer import tomlfile
from trainer.config import Section
from trainer.errors import ConfigError
from trainer.forecast import scenario as scenarios
from trainer.forecast.run import mean_interval
from trainer.forecast.scenario import DAY, Cluster, Failure, Islands, Policy, Quorum, Scenario, Storage, with_values
from trainer.forecast.simulator import simulate

THRESHOLDS = (0.9, 0.5)


class Line(Section):
    name: str
    policy: Policy


class ScaleFile(Section):
    question: str = ""
    seed: int = Field(default=0, ge=0)
    replicates: int = Field(default=4, ge=2)
    days: float = Field(gt=0)
    """Longest run that is simulated."""
    failures: int = Field(default=1000, ge=100)
    """A run ends earlier, once it has had about so many failures."""
    step_seconds: float = Field(gt=0)
    devices: list[int] = Field(min_length=2)
    spare_share: float = Field(default=0.0, ge=0, le=1)
    """Spare nodes as a share of the job's."""
    cluster: Cluster
    failure: list[Failure] = Field(min_length=1)
    storage: Storage | None = None
    line: list[Line] = Field(min_length=1, max_length=8)  # the picture has so many marks


def load(path: Path) -> ScaleFile:
    """Read a scale file. Raises ConfigError with all problems, those of the scenarios that it stands for too."""
    tree = tomlfile.read_extended(path)
    try:
        read = ScaleFile.model_validate(tree)
    except ValidationError as error:
        found = tomlfile.mistakes(error, tree)
        raise ConfigError(
            [f"{path}: {tomlfile.explain(mistake, ScaleFile, 'scale file')}" for mistake in found]
        ) from None
    problems = []
    for line in read.line:
        try:
            scenario_at(read, line, max(read.devices), path)
            scenario_at(read, line, min(read.devices), path)
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)
    return read


def scenario_at(file: ScaleFile, line: Line, devices: int, path: Path = Path("scale")) -> Scenario:
    """Return the scenario of one policy at one size, short enough to have about `failures` failures."""
    cluster = file.cluster.model_dump() | {"devices": devices}
    nodes = math.ceil(devices / file.cluster.devices_per_node)
    cluster["spare_nodes"] = math.ceil(file.spare_share * nodes)
    scenario = scenarios.parse(
        {
            "seed": file.seed, "replicates": file.replicates, "days": file.days, "step_seconds": file.step_seconds,
            "cluster": cluster, "failure": [failure.model_dump() for failure in file.failure],
            "storage": file.storage and file.storage.model_dump(), "policy": line.policy.model_dump(),
        },
        path,
    )  # fmt: skip
    return scenario.model_copy(update={"days": min(file.days, file.failures * scenario.mttf_seconds / DAY)})


def scale(file: ScaleFile) -> dict[str, Any]:
    """Return the tree: for each line its goodput by size, the sizes where it crosses thresholds, what to improve."""
    lines = []
    for line in file.line:
        points = []
        for devices in sorted(file.devices):
            scenario = scenario_at(file, line, devices)
            value = _goodput(scenario)
            points.append(
                {
                    "devices": devices,
                    "goodput": value,
                    "mttf_seconds": scenario.mttf_seconds,
                    "improve": _improvements(scenario, value["value"] or 0.0),
                    "findings": scenarios.findings(scenario),
                }
            )
        falls = {str(bar): _crossing(points, bar) for bar in THRESHOLDS}
        lines.append({"name": line.name, "kind": line.policy.kind, "points": points, "falls_below": falls})
    return {"question": file.question, "lines": lines, "thresholds": list(THRESHOLDS)}


def _goodput(scenario: Scenario) -> dict[str, float | None]:
    return mean_interval([simulate(scenario, seed).goodput for seed in range(scenario.replicates)])


def _improvements(scenario: Scenario, now: float) -> dict[str, float]:
    """Return how much goodput each improvement by a factor of two adds, largest first."""
    policy, changes = scenario.policy, dict[str, dict[str, float]]()
    changes["detection"] = {
        f"failure.{failure.name}.detect_seconds": failure.detect_seconds / 2 for failure in scenario.failure
    }
    changes["restart"] = {"policy.restart_seconds": policy.restart_seconds / 2}
    if isinstance(policy, Quorum | Islands):
        changes["restart"]["policy.regroup_seconds"] = policy.regroup_seconds / 2
    changes["checkpoint"] = {
        "policy.save_stall_seconds": policy.save_stall_seconds / 2,
        "policy.save_write_seconds": policy.save_write_seconds / 2,
    }
    if scenario.storage is not None:
        changes["checkpoint"]["storage.bytes_per_second"] = 2 * scenario.storage.bytes_per_second
    rates = {
        f"failure.{failure.name}.{key}": value / 2
        for failure in scenario.failure
        for key in ("per_node_day", "per_day")
        if (value := getattr(failure, key)) is not None
    }
    changes["failure rate"] = rates
    if any(failure.repair_hours for failure in scenario.failure):
        spare = scenario.cluster.spare_nodes
        changes["spares"] = {"cluster.spare_nodes": min(max(1, 2 * spare), scenario.cluster.nodes)}
    if policy.kind == "islands" and 2 * policy.clusters <= scenario.cluster.nodes:
        # The same share of them may be late.
        changes["clusters"] = {"policy.clusters": 2 * policy.clusters, "policy.may_miss": 2 * policy.may_miss}
    gains = {
        name: (_goodput(with_values(scenario, values))["value"] or 0.0) - now
        for name, values in changes.items()
    }  # fmt: skip
    return dict(sorted(gains.items(), key=lambda item: -item[1]))


def _crossing(points: list[dict[str, Any]], bar: float) -> float | None:
    """Number of devices at which goodput falls below the bar, interpolated in the logarithm; None if it does not."""
    for before, after in itertools.pairwise(points):
        high, low = before["goodput"]["value"], after["goodput"]["value"]
        if high >= bar > low:
            share = (high - bar) / (high - low)
            return before["devices"] * (after["devices"] / before["devices"]) ** share
    return points[0]["devices"] if points and points[0]["goodput"]["value"] < bar else None
