"""A fault is a class: a kind that only this test defines is planned, refused, fires once and is on record."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
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
    assert outside == (kind.from_outside or kind.hits_any_job)


def test_a_kind_that_does_not_apply_to_the_mode_is_refused_with_the_reason():
    faults = [{"kind": "two_deaths", "at_step": 3}, {"kind": "arbiter_killed", "at_step": 3}]
    refused = [{"kind": "sigkill", "phase": "in_transfer", "at_step": 3}, *faults]
    with pytest.raises(ConfigError) as error:
        plan.make(config(*refused), 3)
    for reason in ("in_transfer is passed in quorum mode alone", "only `trainer launch` has survivors", "an arbiter"):
        assert reason in str(error.value)
    quorum = configs.parse({"faults": [*refused], "budget": {"steps": 9}, "elastic": {"mode": "quorum"}})
    assert [fault.victims(3) for fault in plan.make(quorum, 3)[1:2]] == [(0, 1)]
    away = configs.parse({"faults": [{"kind": "flipped_shard", "at_step": 3}], "elastic": {"mode": "quorum"}})
    with pytest.raises(ConfigError, match="hold the state in memory"):
        plan.make(away, 3)


# Quorum mode


def test_what_must_be_noticed_depends_on_the_mode_and_the_phase():
    kinds = {
        "stopped": "in_update",
        "exception": "in_update",
        "sigkill": "startup",
        "skipped_collective": "before_reduce",
    }
    expected = {name: KINDS[name].in_quorum(phase).expected_incidents for name, phase in kinds.items()}
    lost = ("worker_lost",)
    assert expected == {"stopped": lost, "exception": lost, "sigkill": (), "skipped_collective": ()}
    assert KINDS["exception"].in_quorum("in_reduce").expected_incidents == (), "as a connection that fails"
    assert KINDS["stopped"].expected_incidents == ("hung",)


class Place:
    """A launcher's place for a worker, and the injectors of those that have it one after the other."""

    def __init__(self, run: Path, faults: Config, rank: int) -> None:
        self.run, self.faults, self.rank, self.is_main = run, faults, rank, False
        self.starts()

    def starts(self) -> None:
        made = injector.arm(self.faults, self.run, self.rank, 3)
        made._rank.is_main = lambda: self.is_main
        self.hook = made.wrap_hook(lambda phase, step: None)

    def dies(self, phase: str, step: int) -> bool:
        try:
            self.hook(phase, step)
        except Died:
            self.starts()
            return True
        return False


class Died(BaseException):
    pass


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Place]]:
    def die(*_: object) -> None:
        raise Died

    monkeypatch.setattr("os.kill", die)

    def start(*faults: dict[str, Any]) -> list[Place]:
        tree = {"faults": faults, "budget": {"steps": 30}, "elastic": {"mode": "quorum"}}
        return [Place(tmp_path, configs.parse(tree), rank) for rank in range(3)]

    return start


def test_a_fault_whose_rank_is_away_at_its_step_strikes_when_it_is_back(places):
    _, second, _ = places({"kind": "sigkill", "rank": 1, "at_step": 3, "phase": "before_reduce"})
    assert not second.dies("before_reduce", 1)
    assert not second.dies("before_forward", 7)
    assert second.dies("before_reduce", 7)
    assert not second.dies("before_reduce", 7)
    assert [(event.step, event.phase) for _, event in plan.fired(second.run)] == [(8, "before_reduce")]


def test_of_two_deaths_the_second_is_the_neighbours_also_where_the_first_is_the_main_members(places):
    dying = places({"kind": "two_deaths", "rank": "writer", "at_step": 3})
    dying[0].is_main = True
    assert [place.dies("before_forward", 2) for place in dying] == [True, True, False]


def test_a_fault_of_the_main_member_strikes_whoever_that_is_and_once(places):
    first, second, third = places({"kind": "sigkill", "rank": "writer", "at_step": 3, "phase": "after_reduce"})
    second.is_main = True
    assert [place.dies("after_reduce", 5) for place in (first, second)] == [False, True]
    third.is_main = True
    assert not third.dies("after_reduce", 6), "it was written down by another process"


def test_a_giver_dies_in_the_hand_over_that_a_death_leads_to(places):
    first, second, third = places({"kind": "giver_dies", "rank": 2, "at_step": 3})
    first.is_main = True
    assert not first.dies("in_transfer", 1), "nobody has died yet"
    assert third.dies("before_forward", 2)
    assert [place.dies("in_transfer", 9) for place in (third, second, first)] == [False, False, True]
    second.is_main = True
    assert not second.dies("in_transfer", 9)


@pytest.mark.parametrize(("kind", "phase"), [("death_while_joining", "joining"), ("death_in_hand_over", "in_transfer")])
def test_a_successor_dies_as_often_as_asked(places, kind: str, phase: str):
    _, second, third = places({"kind": kind, "rank": 1, "at_step": 3, "times": 3})
    assert not second.dies(phase, 0), "the first worker in that place may join"
    assert second.dies("before_forward", 2)
    assert not third.dies(phase, 2)
    assert [second.dies(phase, 4) for _ in range(3)] == [True, True, False]


def test_two_ranks_die_in_the_same_step(places):
    dying = places({"kind": "two_deaths", "rank": 2, "at_step": 3})
    assert [place.dies("before_forward", 2) for place in dying] == [True, False, True]
    assert [place.dies("before_forward", 3) for place in dying] == [False, False, False]
