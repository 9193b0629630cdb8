"""A fault is a class: a kind that only this test defines is planned, refused, fires once and is on record."""

import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.test_nemesis import Log, Recorded, settled
from trainer import config as configs
from trainer.config import Config, FaultEntry
from trainer.errors import ConfigError
from trainer.faults import injector, plan
from trainer.faults.fault import KINDS, LINUX, Fault, Setting
from trainer.faults.nemesis import Nemesis, Outside
from trainer.faults.plan import PlannedFault
from trainer.faults.rank import RankContext
from trainer.phases import Phase

HEARD: list[tuple[int, int]] = []


@pytest.fixture
def beep() -> Iterator[str]:
    class Beep(Fault):
        group = "time"
        imitates = made = detected = recovered = "a beep"
        phases = (Phase.AFTER_REDUCE,)
        settings: ClassVar[Mapping[str, Setting]] = {"decibels": Setting(60, "how loud", most=120)}

        def refuses(self, entry: FaultEntry, phase: str, config: Config, world_size: int) -> str:
            return "one rank has no peer.\n  Start 2." if world_size == 1 else ""

        def fire(self, planned: PlannedFault, rank: RankContext) -> None:
            HEARD.append((rank.rank, planned.settings["decibels"]))

    yield Beep.name
    del KINDS[Beep.name]
    HEARD.clear()


@pytest.fixture
def knock() -> Iterator[str]:
    class Knock(Fault):
        group = "process"
        imitates = made = detected = recovered = "a knock"
        needs = (LINUX,)

        def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
            for pid in victims.values():
                outside.cluster.send(pid, signal.SIGWINCH)

    yield Knock.name
    del KINDS[Knock.name]


def config(*faults: dict[str, Any]) -> Config:
    return configs.parse({"faults": faults, "budget": {"steps": 9}})


def test_a_new_kind_fires_inside_a_rank_once_and_is_on_record(beep: str, tmp_path: Path):
    faults = config({"kind": beep, "rank": 1, "at_step": 3})
    for _ in range(2):  # the second time the rank has started again
        hook = injector.arm(faults, tmp_path, rank=1, world_size=2).wrap_hook(lambda phase, step: None)
        for step in range(5):
            for phase in (Phase.BEFORE_FORWARD, Phase.AFTER_REDUCE, Phase.AFTER_UPDATE):
                hook(phase, step)
    assert HEARD == [(1, 60)]
    ((_, event),) = plan.fired(tmp_path)
    assert (event.index, event.fault, event.victim, event.step, event.phase) == (0, beep, 1, 3, "after_reduce")


def test_a_new_kind_fires_from_outside_once_and_is_on_record(knock: str, tmp_path: Path):
    run = tmp_path / "run"
    Log(run, attempt=0)
    cluster = Recorded(run)
    control: Any = cluster
    for _ in range(2):
        nemesis = Nemesis(plan.make(config({"kind": knock, "rank": 1, "at_step": 1}), 2), run, control, time.time())
        nemesis.start()
        assert settled(cluster, 1) == [(101, signal.SIGWINCH)]
        nemesis.stop()
    assert [(event.fault, event.victim) for _, event in plan.fired(run)] == [(knock, 1)]


def test_a_new_kind_refuses_what_it_cannot_do_and_its_settings_are_checked(beep: str):
    with pytest.raises(ConfigError) as refused:
        plan.make(config({"kind": beep, "at_step": 3, "decibels": 130}, {"kind": beep, "phase": "in_eval"}), 1)
    for message in ("one rank has no peer", "decibels = 130 is above 120", "'in_eval' is not among after_reduce"):
        assert message in str(refused.value)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_kind_of_the_catalogue_is_described_and_fires_in_one_way(kind: Fault):
    assert all((kind.imitates, kind.made, kind.detected, kind.recovered))
    inside = type(kind).fire is not Fault.fire or type(kind).change is not Fault.change
    through_disk = hasattr(kind, "operation")
    outside = type(kind).fire_from_outside is not Fault.fire_from_outside
    assert (inside or through_disk) == bool(kind.phases), "where it strikes, it fires"
    assert outside == kind.hits_any_job
