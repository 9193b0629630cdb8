"""The nodes of a run: which one is slow, which one fails, and which shards lie on two of them."""

from typing import Any

import pytest

from tests.logs import Run, hung, killed, lost
from tests.test_inspect import page
from trainer.log import nodes
from trainer.log.events import LOST_A_PEER, Event, RankPace
from trainer.log.summary import summarise
from trainer.parallel import elastic
from trainer.phases import Phase
from trainer.sentinel import pace

THREE = ("n1", "n2", "n3")


def paced(run: Run, **milliseconds: float) -> None:
    """A rank of each node writes its pace."""
    for rank, (node, value) in enumerate(milliseconds.items()):
        run.write(RankPace(step=20, node=node, seconds_per_micro_batch=value / 1000), rank=rank)


def test_the_node_that_takes_longer_than_the_others_is_called_slow(run: Run):
    run.start(nodes=THREE)
    paced(run, n1=50.0, n2=50.0, n3=50.0)  # at first
    paced(run, n1=10.0, n2=18.0, n3=10.5)
    found = {node.name: node for node in nodes.nodes_of(run.history)}
    assert [node.name for node in found.values() if node.is_slow] == ["n2"]
    assert found["n2"].times_others == pytest.approx(18 / 10.25)
    text = page(run)
    assert "18.0 ms" in text and "slow: 1.8 times the others" in text and text.count("slow") == 1


def test_a_pace_that_was_not_measured_is_unknown_and_no_node_is_called_slow(run: Run):
    run.start(nodes=THREE)
    paced(run, n1=10.0)
    assert [(node.times_others, node.is_slow) for node in nodes.nodes_of(run.history)] == [(None, False)] * 3
    assert "not measured" in page(run)


def die(run: Run, rank: int, reason: str = LOST_A_PEER) -> None:
    """A rank on one node is killed; the others lose their peer, or write another reason."""
    for other in range(3):
        if other != rank:
            run.end("failed", 1, reason=reason, rank=other)


@pytest.mark.parametrize(
    ("evidence", "ranks_that_write", "failures"),
    [
        (killed(1), LOST_A_PEER, {"n2": 1}),
        (lost({"rank": 1, "pid": 101, "exitcode": 1, "signal": None}), LOST_A_PEER, {"n2": 1}),
        (lost({"rank": 0, "pid": 100, "exitcode": 1, "signal": None}), LOST_A_PEER, {}),  # its cause is not known
        (lost({"rank": 0, "pid": 100, "exitcode": 1, "signal": None}), "NumericsError: all alike", {}),
    ],
)
def test_a_failure_is_counted_for_the_node_that_caused_it(run: Run, evidence: Event, ranks_that_write: str, failures):
    run.start(nodes=THREE)
    run.steps(1, 1)
    die(run, 1, ranks_that_write)
    run.start(nodes=THREE, after=1.0)
    run.write(evidence)
    run.steps(1, 2)
    assert {node.name: node.failures for node in nodes.nodes_of(run.history) if node.failures} == failures


def test_a_node_that_is_gone_after_others_lost_a_peer_has_failed(run: Run):
    run.start(nodes=THREE)
    run.steps(1, 1)
    die(run, 2)
    run.start(nodes=("n1", "n2"), after=1.0)
    run.write(lost({"rank": 0, "pid": 100, "exitcode": 1, "signal": None}))
    run.steps(1, 2)
    found = {node.name: node for node in nodes.nodes_of(run.history)}
    assert {name: node.failures for name, node in found.items()} == {"n1": 0, "n2": 0, "n3": 1}
    assert (found["n2"].ranks, found["n3"].ranks) == ((1,), ())
    assert "on 2 ranks instead of 3 without n3" in page(run) and "none now" in page(run)


def test_a_job_that_moves_to_other_nodes_counts_for_none_of_them(run: Run):
    run.start(nodes=("n1", "n2"))
    run.steps(1, 1)
    run.start(nodes=("n3", "n2"), after=1.0)  # killed without notice
    run.steps(1, 1)
    run.end("failed", 1, reason=LOST_A_PEER)
    run.start(nodes=("n4", "n5"), after=1.0)
    run.steps(1, 1)
    found = {node.name: node.failures for node in nodes.nodes_of(run.history)}
    assert found == {"n1": 0, "n2": 0, "n3": 0, "n4": 0, "n5": 0}


def test_an_incident_names_the_node_of_the_rank_that_hung_or_died(run: Run):
    run.start(nodes=THREE)
    run.write(hung(5.0, {"rank": 1, "point": "before_reduce"}))
    run.start(nodes=THREE, after=1.0)
    run.steps(1, 1)
    run.start(nodes=THREE, after=1.0)
    run.write(killed(2, pid=112))
    run.steps(1, 2)
    texts = [incident["text"] for incident in summarise(run.path)["incidents"]]
    assert "on n2 after step 0" in texts[0] and "rank 2 was killed (SIGKILL) on n3 after step 1" in texts[1]


def test_logs_that_name_no_nodes_have_none_and_one_node_is_not_listed(run: Run):
    run.train(2)
    assert nodes.nodes_of(run.history) == [] and "a micro-batch" not in page(run)
    run.start(nodes=("n1", "n1"))
    assert summarise(run.path)["nodes"][0]["ranks"] == (0, 1) and "a micro-batch" not in page(run)


def test_a_node_that_failed_three_times_is_told_at_the_next_start_if_it_takes_part(run: Run):
    for attempt in range(4):
        run.start(nodes=THREE, after=1.0)
        if attempt:
            run.write(killed(1, pid=100 + 10 * (attempt - 1) + 1))
        run.steps(1, 1)
    (told,) = nodes.warnings(run.entries, THREE, 1)
    assert "node n2 has failed 3 times in this run" in told
    assert nodes.warnings(run.entries, ("n1", "n3"), 1) == nodes.warnings(run.entries, ("n2", "n2"), 1) == []
    assert (nodes.failing(run.path, 3), nodes.failing(run.path, 4)) == (["n2"], [])


@pytest.mark.parametrize(
    ("names", "shard_ranks", "groups"),
    [
        ("aabb", 2, []),  # as torchrun numbers two nodes of two ranks: shards inside, replicas across
        ("aaaabbbb", 2, []),
        ("ab", 2, [(0, 1)]),
        ("aaabbb", 2, [(2, 3)]),
        ("aabb", 4, [(0, 1, 2, 3)]),
        ("abab", 1, []),
    ],
)
def test_shards_stay_inside_a_node_where_its_ranks_are_a_multiple_of_them(names: str, shard_ranks: int, groups: Any):
    assert nodes.crossing(names, shard_ranks) == groups
    told = nodes.warnings([], names, shard_ranks)
    assert len(told) == len(groups[:1]) and all("waits for the network" in message for message in told)


@pytest.mark.parametrize(
    ("variables", "name"),
    [({"TOPROPE_NODE": "pod-node", "SLURMD_NODENAME": "n1"}, "pod-node"), ({"SLURMD_NODENAME": "n1"}, "n1"), ({}, "h")],
)
def test_a_node_is_named_as_its_scheduler_names_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str
):
    for variable in elastic.NODE_NAMES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(elastic.socket, "gethostname", lambda: "h")
    assert elastic.node_name() == name


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_ranks_pace_is_its_own_time_for_a_micro_batch_without_the_wait_for_others():
    clock, written = Clock(), list[Event]()

    class Log:
        def append(self, event: Event) -> None:
            written.append(event)

    measured = pace.Pace(Log(), lambda phase, step: None, clock=clock)
    for step in range(60):
        for _ in range(2):
            measured(Phase.BEFORE_FORWARD, step)
            clock.now += 0.25 if step % 20 else 5.0  # one step of twenty is an outlier
        measured(Phase.BEFORE_REDUCE, step)
        clock.now += 1.0  # the reduction waits for others
    (first, *_) = written
    assert isinstance(first, RankPace)
    assert (first.step, first.seconds_per_micro_batch) == (20, 0.25)
    assert 3 <= len(written) <= 10  # not every step, but every ten seconds


def test_a_delay_on_purpose_counts_and_a_step_that_was_not_completed_does_not():
    clock, written = Clock(), list[RankPace]()

    def hook(phase: str, step: int) -> None:
        clock.now += 0.5 * (phase == Phase.BEFORE_REDUCE)

    class Log:
        def append(self, event: Any) -> None:
            written.append(event)

    measured = pace.Pace(Log(), hook, clock=clock)
    for step in range(30):
        measured(Phase.BEFORE_FORWARD, step)
        clock.now += 7.0  # not completed: another step begins
        measured(Phase.BEFORE_FORWARD, step + 1000)
        clock.now += 0.25
        measured(Phase.BEFORE_REDUCE, step + 1000)
    assert {event.seconds_per_micro_batch for event in written} == {0.75}
