"""Made-up ladders with collected runs, on which reports are tested."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests import ladders
from tests.ladders import Arm, Design
from trainer.ladder.collect import CollectedRun
from trainer.ladder.plan.ladder import AA, TARGET, Ladder, PlannedArm, PlannedRung
from trainer.ladder.plan.schema import LadderFile
from trainer.ladder.plan.sizes import Shape
from trainer.ladder.report import build
from trainer.ladder.report.build import CollectedLadder
from trainer.ladder.stats.records import Criterion

ARMS: Mapping[str, Arm] = {
    AA: ladders.UNCHANGED,
    "rope": ladders.line(1.25, 1.25),
    "qk-norm": ladders.line(1.02, 1.1),
    "fading": ladders.line(1.3, 0.9),
}
SPEED = {"rope": 1.04, "qk-norm": 1.3, "fading": 1.0}
HISTORY: Any = {
    "first_planned": 1.75e9,
    "criterion_history": [{"time": 1.75e9, "criterion": Criterion().to_json(), "finished_runs": 0}],
    "edits": [],
}


def ladder_of(design: Design, arms: Sequence[str], unit: str = "nats_per_token", **more: Any) -> Ladder:
    """The ladder as planned, without runs: a report takes those from the collected ones."""
    rungs = [
        _rung(f"r{number}", 32 * 2**number, float(flops), tuple(range(design.seeds)))
        for number, flops in enumerate(design.flops)
    ]
    changes = {arm: {"model.init_draw": 1} if arm == AA else {"model.positions": arm} for arm in arms}
    planned = [PlannedArm(arm, f"is {arm} worth it?", changes[arm]) for arm in arms]
    question = more.pop("question", "Does it hold at scale?")
    file = LadderFile.model_construct(question=question, baseline="../smoke.toml", metric="val", unit=unit)
    values: dict[str, Any] = {
        "name": "made-up", "path": Path("configs/ladders/made-up.toml"), "file": file, "criterion": Criterion(),
        "rungs": rungs, "arms": planned, "target_flops": design.target,
        "target": _rung(TARGET, 512, design.target, ()), "runs": [], "notices": [], "settings": {},
    }  # fmt: skip
    return Ladder(**(values | more))


def _rung(name: str, width: int, flops: float, seeds: tuple[int, ...]) -> PlannedRung:
    parameters = round(math.sqrt(flops / 120))
    return PlannedRung(name, Shape(width, max(1, width // 16), 4), parameters, 20 * parameters, flops, seeds)


def runs_of(design: Design, arms: Mapping[str, Arm], seed: int = 0, target: Sequence[str] = ()) -> list[CollectedRun]:
    """Finished runs on one machine, arms slower than the baseline by SPEED. At the target: one seed of `target`."""
    random = np.random.Generator(np.random.Philox(seed))
    design = replace(design, flops=tuple(map(float, design.flops)))  # numpy's would end up in the tree
    results = ladders.draw(design, ladders.power_law(), arms, random)
    above = replace(design, flops=(design.target,), seeds=1)
    results += [
        replace(result, rung=TARGET)
        for result in ladders.draw(above, ladders.power_law(), arms, random)
        if result.arm in target
    ]
    found = []
    for number, result in enumerate(results):
        seconds = result.flops / 1e12 * SPEED.get(result.arm, 1.0) * (1 + 0.01 * math.sin(7.0 * number))
        spent = {"productive": seconds, "startup": 1.2, "evaluation": 0.4, "lost_steps": 0.0, "down": 0.0}
        found.append(
            CollectedRun(
                result.arm, result.rung, result.seed, None, f"{number:016x}", "finished", "", result.flops,
                result.parameters, result.tokens, 100, 100, loss=result.loss, digest="d" * 64, seconds=seconds,
                undisturbed_seconds=seconds,
                wall_seconds=seconds + 1.6, spent=spent, attempts=1, weights_sha256=f"{number:064x}",
                git_commit="4c1d6a0b" * 5, machine=("climber", "cpu", 1),
            )
        )  # fmt: skip
    return found


def change(found: Sequence[CollectedRun], which: Callable[[CollectedRun], bool], **values: Any) -> list[CollectedRun]:
    return [replace(run, **values) if which(run) else run for run in found]


def missing(
    found: Sequence[CollectedRun], which: Callable[[CollectedRun], bool], reason: str = "it ran out of disk"
) -> list[CollectedRun]:
    nothing = dict.fromkeys(("loss", "seconds", "undisturbed_seconds", "weights_sha256"))
    return change(found, which, status="missing", reason=reason, **nothing)


def tree(design: Design = ladders.SHORT, arms: Mapping[str, Arm] = ARMS, **more: Any) -> dict[str, Any]:
    """The report of a ladder whose runs all finished."""
    found = runs_of(design, arms, target=more.pop("target", ()))
    return build.build_report(CollectedLadder(ladder_of(design, list(arms), **more), found, record=HISTORY))


def report_of(
    found: Sequence[CollectedRun], design: Design = ladders.SHORT, arms: Sequence[str] = tuple(ARMS)
) -> dict[str, Any]:
    return build.build_report(CollectedLadder(ladder_of(design, arms), found, record=HISTORY))
