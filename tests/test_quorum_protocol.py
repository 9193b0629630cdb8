"""Quorum's protocol: every order of events that a random walk finds, and each rule by itself."""

import inspect
import random
from types import ModuleType
from typing import Any

import pytest

from tests.quorum_simulation import ViolationError, World, random_size
from trainer.parallel import protocol
from trainer.parallel.protocol import (
    FAILED,
    FINISHED,
    HOPELESS,
    NOBODY,
    PREEMPTED,
    Arbiter,
    Change,
    Ended,
    Epoch,
    Hello,
    Holding,
    Kill,
    Over,
    Position,
    Publish,
    Record,
    Refused,
    Report,
    Send,
    Stuck,
    Where,
    decode,
    decode_epoch,
    divide,
    encode,
)  # fmt: skip

IDENTITY = {"micro_batches": "8", "fingerprint": "f"}
SCHEDULES = 1500


def test_no_order_of_deaths_and_messages_loses_a_micro_batch_commits_twice_or_is_stuck():
    for seed in range(SCHEDULES):
        World(seed, random_size(seed)).run()


MUTANTS = {
    "publishes before all have reported": (
        "if self._awaited or any(self._workers[m].report is None for m in members):",
        "if self._awaited:",
    ),
    "counts the sums of one that lags a step": (
        "{m: reports[m].have for m in newest}",
        "{m: reports[m].have for m in members}",
    ),
    "keeps sums that nobody counts": ("if self.step is None or not epoch.kept.get(member):", "if False:"),
    "mixes sums of two passes": ("if any(reports[m].key for m in newest) or ", "if "),
    "takes the first state for the newest": (
        "members = newest + tuple(m for m in reports if m not in newest)",
        "members = tuple(reports)",
    ),
    "forgets after a restart whom it waits for": ("if self._awaited or any(", "if any("),
    "gives a number twice after a restart": ('arbiter.names[line["member"]] = line["name"]', "pass"),
    "ends those that wait for one that stands still": ("at.reached < search.reached", "at.reached <= search.reached"),
    "waits for a worker that does not answer": ("m for m in self.members if m not in search.answers", "m for m in ()"),
    "waits for a member that does not leave": ("silent if len(silent) < len(self.members) else ():", "():"),
    "tells nobody that an epoch ended": ("Ended(self.epoch.number)) for m in self.members", "0) for m in ()"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_walk_finds_a_protocol_that(name: str):
    mutant = mutated(*MUTANTS[name])

    def walk() -> None:
        for seed in range(SCHEDULES):
            World(seed, random_size(seed), mutant.Arbiter, mutant.Holding).run()

    with pytest.raises((ViolationError, KeyError)):
        walk()


def mutated(old: str, new: str) -> Any:
    """Return the protocol's module with one piece of its text replaced, but with the messages that others know."""
    source = inspect.getsource(protocol)
    assert source.count(old) == 1, old
    module = ModuleType(protocol.__name__)
    exec(source.replace(old, new), module.__dict__)  # our own text
    same = {name: value for name, value in vars(protocol).items() if name not in ("Arbiter", "Holding")}
    module.__dict__.update(same)
    return module


# The rules one by one


class Job:
    """An arbiter and what it has told each worker."""

    def __init__(self, workers: int, wanted: int = 0, **settings: Any) -> None:
        self.arbiter = Arbiter(wanted=wanted or workers, **settings)
        self.told: dict[int, list[Any]] = {}
        self.killed: list[str] = []
        self.lines: list[Any] = []
        for _ in range(workers):
            self.join()

    def do(self, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.told.setdefault(action.member, []).append(action.message)
            elif isinstance(action, Kill):
                self.killed.append(action.name)
            elif isinstance(action, Record):
                self.lines.append(action.line)

    def hello(self, member: int | None = None, identity: Any = IDENTITY, **more: Any) -> int | None:
        number, actions = self.arbiter.hello(
            Hello(member, f"name {len(self.arbiter.names)}", "host:1", identity, **more)
        )
        self.do(actions)
        return number

    def join(self, **more: Any) -> int:
        member = self.hello(**more)
        assert member is not None
        self.met(member)
        return member

    def met(self, member: int, *report: Any, now: float = 0.0) -> None:
        self.do(self.arbiter.met(member, Report(*report), now))

    def last(self, member: int) -> Any:
        return self.told[member][-1]

    def epoch(self, member: int = 0) -> Epoch:
        assert isinstance(self.last(member), Publish), self.told[member]
        return self.last(member).epoch


def test_the_first_epoch_waits_for_all_workers_and_restores_from_disk():
    job = Job(2, wanted=3)
    assert job.arbiter.epoch is None
    job.join()
    assert job.epoch(2) == job.epoch(0)
    assert (job.epoch().members, job.epoch().step, job.epoch().receivers) == ((0, 1, 2), None, ())
    assert job.epoch().work == {0: (0, 3, 6), 1: (1, 4, 7), 2: (2, 5)}


def test_after_a_death_only_the_micro_batches_of_the_dead_are_computed_again():
    job = Job(3)
    job.do(job.arbiter.closed(1))
    assert [job.last(0), job.last(2)] == [Ended(1), Ended(1)]
    job.met(0, 7, (0, 3, 6))
    assert job.last(2) == Ended(1)
    job.met(2, 7, (2,))
    epoch = job.epoch(2)
    assert (epoch.members, epoch.step, epoch.left) == ((0, 2), 7, {1: "its connection closed"})
    assert epoch.kept == {0: (0, 3, 6), 2: (2,)}
    assert epoch.work == {0: (5,), 2: (1, 4, 7)}


def test_a_loss_is_told_until_a_step_is_committed_after_it():
    """The member that was to record the loss may have died before it did."""
    job = Job(3)
    job.do(job.arbiter.closed(0))
    job.met(1, 7, ())
    job.met(2, 7, ())
    job.do(job.arbiter.closed(1))
    job.met(2, 7, ())
    assert job.epoch(2).left.keys() == {0, 1}
    job.do(job.arbiter.committed(8))
    job.join()
    job.met(2, 8, ())
    assert (job.epoch(2).members, job.epoch(2).left) == ((2, 3), {})


def test_a_worker_that_lags_a_step_takes_the_state_of_one_that_does_not_and_comes_after_it():
    job = Job(3)
    job.do(job.arbiter.closed(2))
    job.met(0, 7, (0, 3, 6))
    job.met(1, 8)
    epoch = job.epoch()
    assert (epoch.members, epoch.step, epoch.receivers) == ((1, 0), 8, (0,))
    assert epoch.kept == {1: (), 0: ()}
    assert epoch.work == {1: (0, 2, 4, 6), 0: (1, 3, 5, 7)}


@pytest.mark.parametrize("reports", [((7, (0,), "wider"), (7, (1,))), ((7, (0, 1)), (7, (1,)))])
def test_sums_of_two_passes_and_micro_batches_held_twice_make_all_begin_the_step_again(reports: Any):
    job = Job(3)
    job.do(job.arbiter.closed(2))
    for member, report in enumerate(reports):
        job.met(member, *report)
    assert job.epoch().kept == {0: (), 1: ()}
    assert job.epoch().work == {0: (0, 2, 4, 6), 1: (1, 3, 5, 7)}


def test_a_newcomer_waits_until_the_members_let_it_in_after_a_step_and_disturbs_nobody_by_leaving():
    job = Job(2, wanted=3)
    job.join()
    job.do(job.arbiter.closed(2))
    job.met(0, 3)
    job.met(1, 3)
    joining = job.join()
    assert [job.last(0), job.last(1)] == [Change(2), Change(2)]
    job.do(job.arbiter.closed(joining))
    joining = job.join()
    job.met(0, 4)
    job.met(1, 4)
    epoch = job.epoch(joining)
    assert (epoch.members, epoch.receivers, epoch.step) == ((0, 1, joining), (joining,), 4)


def test_the_first_worker_in_a_place_has_its_number_and_a_successor_another():
    job = Job(0, wanted=3, reserved=3)
    assert [job.hello(place=place) for place in (2, 0, 2, 1, 5)] == [2, 0, 3, 1, 4]


def test_a_spare_waits_for_a_death_and_then_takes_the_place_at_once():
    job = Job(2)
    spare = job.join(spare=True)
    assert job.arbiter.waiting == (spare,)
    job.do(job.arbiter.closed(0))
    job.met(1, 5)
    assert job.epoch(spare).members == (1, spare)


def test_when_all_have_died_the_job_starts_from_disk_with_as_many_as_at_first():
    job = Job(2)
    job.do(job.arbiter.closed(0))
    job.do(job.arbiter.closed(1))
    job.join()
    assert job.arbiter.epoch and job.arbiter.epoch.number == 1
    job.join()
    assert (job.epoch(3).number, job.epoch(3).members, job.epoch(3).step) == (2, (2, 3), None)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"fingerprint": "g"}, "its fingerprint is g, that of the job f"),
        ({"torch": "2.9"}, "its torch is 2.9, that of the job None"),
        ({"micro_batches": "x"}, "it does not say micro_batches, how many of them a step has"),
    ],
)
def test_a_worker_with_another_config_or_code_is_refused_by_name_and_the_job_goes_on(changed: Any, reason: str):
    job = Job(1)
    assert job.hello(identity=IDENTITY | changed) is None
    assert job.last(NOBODY) == Refused(reason)
    assert job.epoch().members == (0,)


@pytest.mark.parametrize("report", [(99,), (3, (1,))])
def test_a_newcomer_that_claims_a_state_is_ended_and_nobody_else_notices(report: Any):
    job = Job(2, wanted=3)
    job.join()
    heard = {member: len(told) for member, told in job.told.items()}
    liar = job.hello()
    assert liar is not None
    job.met(liar, *report)
    assert job.killed == ["name 3"]
    assert {member: len(job.told[member]) for member in heard} == heard


def test_a_member_that_claims_impossible_micro_batches_is_ended():
    job = Job(2)
    job.met(0, 3, (8,))
    job.met(1, 3, (1,))
    assert (job.killed, job.epoch(1).members) == (["name 0"], (1,))


def test_more_workers_than_micro_batches_wait_as_spares():
    job = Job(9)
    assert len(job.epoch().members) == 8
    assert job.arbiter.waiting == (8,)


def test_a_restarted_arbiter_waits_for_every_member_and_goes_on_with_a_new_epoch():
    before = Job(3)
    before.do(before.arbiter.closed(1))
    before.met(0, 2, (0,))
    before.met(2, 2, (2,))
    job = Job(0, wanted=3)
    job.arbiter = Arbiter.restarted(before.lines, wanted=3)
    assert job.arbiter.awaited == (0, 2)
    assert job.hello(1) is None, "it was taken for dead"
    assert job.join() == 3
    assert job.hello(0) == 0
    job.met(0, 3)
    assert 0 in job.told and not isinstance(job.last(0), Publish)
    assert job.hello(2) == 2
    job.met(2, 2, (2,))
    epoch = job.epoch(3)
    assert (epoch.number, epoch.members, epoch.receivers) == (3, (0, 2, 3), (2, 3))


def test_a_member_that_does_not_come_back_to_a_restarted_arbiter_is_dead_after_a_while():
    before = Job(2)
    job = Job(0, wanted=2)
    job.arbiter = Arbiter.restarted(before.lines, now=100.0, wanted=2)
    assert job.hello(0) == 0
    job.met(0, 2)
    job.do(job.arbiter.tick(129.0))
    assert not isinstance(job.last(0), Publish)
    job.do(job.arbiter.tick(131.0))
    assert job.epoch().left == {1: "it did not come back to the restarted arbiter"}


@pytest.mark.parametrize(("status", "over"), [(FINISHED, FINISHED), (PREEMPTED, PREEMPTED), (HOPELESS, FAILED)])
def test_how_a_member_leaves_is_how_the_job_ends(status: str, over: str):
    job = Job(2)
    spare = job.join()
    job.do(job.arbiter.left(0, status, ""))
    assert (job.arbiter.over, job.last(spare)) == (over, Over(over))
    job.met(1, 3)
    assert job.last(1) == Over(over)


def test_a_member_that_finishes_with_one_that_dies_is_told_that_the_job_is_over():
    job = Job(3)
    job.do(job.arbiter.left(0, FINISHED, ""))
    job.do(job.arbiter.closed(1))
    assert job.last(2) == Over(FINISHED)


def test_a_newcomer_that_is_asked_to_stop_ends_nothing_and_a_failed_member_ends_alone():
    job = Job(2)
    job.do(job.arbiter.left(job.join(), PREEMPTED, "SIGTERM"))
    job.do(job.arbiter.left(1, FAILED, "OSError: no"))
    job.met(0, 1, (0,))
    assert (job.arbiter.over, job.epoch().left) == ("", {1: "OSError: no"})


# Who holds up the others


def search(counts: dict[int, int | None], idle: float = 400.0) -> Job:
    """Worker 0 is stuck; the others answer how many collectives they have reached, or do not answer."""
    job = Job(len(counts))
    job.do(job.arbiter.stuck(0, Stuck(5, "reduce", 3), now=400.0))
    assert all(job.last(member) == Where(1) for member in counts)
    for member, count in counts.items():
        if count is not None:
            job.do(job.arbiter.position(member, Position(1, count, "backward", 3, idle), 400.1))
    job.do(job.arbiter.tick(404.0))
    job.do(job.arbiter.tick(406.0))
    return job


def test_a_stopped_worker_is_ended_because_it_does_not_answer_and_those_that_wait_for_it_are_not():
    assert search({0: 5, 1: None, 2: 5}).killed == ["name 1"]


def test_a_worker_that_has_not_reached_the_collective_is_ended_with_the_place_where_it_hangs():
    job = search({0: 5, 1: 5, 2: 4})
    assert job.killed == ["name 2"]
    assert job.arbiter._left == {2: "it has not reached the collective of the others: backward"}


def test_a_worker_that_is_behind_but_moves_is_slow_and_is_left_alone():
    assert search({0: 5, 1: 4}, idle=3.0).killed == []


def test_if_all_wait_in_the_same_collective_nobody_is_ended_and_it_is_tried_again():
    job = search({0: 5, 1: 5})
    assert (job.killed, job.last(0)) == ([], Ended(1))


def test_a_member_that_does_not_leave_an_ended_epoch_is_ended_after_the_limit():
    job = Job(3)
    job.do(job.arbiter.closed(0, now=10.0))
    job.met(1, 1, now=11.0)
    job.do(job.arbiter.tick(309.0))
    assert job.killed == []
    job.do(job.arbiter.tick(311.0))
    assert (job.killed, job.epoch(1).members) == (["name 2"], (1,))


# Values


@pytest.mark.parametrize("seed", range(20))
def test_every_micro_batch_is_dealt_once_and_nobody_gets_more_than_needed(seed: int):
    draw = random.Random(seed)
    count, members = draw.randint(1, 12), draw.sample(range(20), draw.randint(1, 5))
    held: dict[int, list[int]] = {member: [] for member in members}
    missing = [m for m in range(count) if draw.random() < 0.5]
    for micro_batch in set(range(count)) - set(missing):
        held[draw.choice(members)].append(micro_batch)
    kept = {member: tuple(have) for member, have in held.items()}
    work = divide(missing, kept)
    assert sorted(m for given in work.values() for m in given) == missing
    loads = {member: len(kept[member]) + len(work[member]) for member in members}
    busiest = max((loads[member] for member in members if work[member]), default=0)
    assert all(load + 1 >= busiest for load in loads.values())


def test_messages_pass_the_wire_unchanged():
    job = Job(2)
    job.do(job.arbiter.closed(1))
    job.met(0, 3, (0, 2), "", {"stage": [1]})
    epoch = job.epoch()
    assert decode_epoch(encode(epoch)) == epoch
    for message in (*job.told[0], Hello(None, "n", "h:1", IDENTITY), Position(1, 2, "x", 3, 0.5), Change(4)):
        assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "line", [None, 3, [], ["Hello"], ["Nothing", []], ["Change", ["1"]], ["Change", [True]], ["Met", [{"step": "1"}]],
             ["Met", [{"step": 1, "have": ["0"], "key": "", "note": {}}]], ["Hello", [None, 1, "s", {}, False]]],
)  # fmt: skip
def test_what_is_no_message_is_refused(line: Any):
    with pytest.raises(ValueError, match=r"no message|unpack"):
        decode(line)


def test_a_worker_throws_its_sums_away_unless_the_epoch_keeps_them():
    job = Job(2)
    job.do(job.arbiter.closed(1))
    holding = Holding(3, [0, 2])
    job.do(job.arbiter.met(0, holding.report()))
    assert (holding.enter(job.epoch(), 0), holding.have) == ((1, 3, 4, 5, 6, 7), [0, 2])
    holding.begin_again("wider")
    assert holding.report() == Report(3, (), "wider")
    holding.committed()
    assert holding.report() == Report(4)
