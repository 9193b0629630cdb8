"""Promises about islands: virtual clusters that train apart, whoever computes them. Equality at 1 to 4 ranks is in
test_equality."""

import contextlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import trainer
from tests.support import (
    SMOKE,
    committed_samples,
    outcome,
    settings,
    summarise_run,
    torchrun,
    with_faults,
    write_corpus,
)
from tests.support import trainer as command
from trainer import checkpoint, costs, job, optim, step
from trainer import config as configs
from trainer.checkpoint import loading
from trainer.data import prepare
from trainer.errors import EXIT_FAILED, EXIT_PREEMPTED, ConfigError, RunDirectoryError
from trainer.faults import plan as faultplan
from trainer.faults.fault import IN_ISLANDS, comes_at
from trainer.islands import deltas
from trainer.islands.clusters import Clusters, owner_of
from trainer.islands.exchange import Exchange
from trainer.islands.members import IslandBatches
from trainer.islands.schedule import Schedule
from trainer.islands.state import check_alike, config_of
from trainer.log import events, rundir
from trainer.parallel.sharding import Sharding
from trainer.parallel.world import AllRanks, StepMembers, World
from trainer.step import StepContext, TrainState

ALONE = World(0, 1, torch.device("cpu"))
SMALL: dict[str, Any] = {
    "budget.steps": 10, "checkpoint.every_steps": 2, "data.micro_batches": 4, "data.micro_batch_sequences": 1,
    "eval.every_steps": 5, "eval.max_tokens": 512, "islands.count": 4, "islands.inner_steps": 4, "model.context": 12,
    "model.n_layers": 1,
}  # fmt: skip
STREAMED = {
    "islands.fragments": 2, "islands.overlap_steps": 2, "islands.mixing": 0.5, "islands.quantise": "int4",
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("islands") / "corpus")


def config(corpus: str, **changes: Any) -> configs.Config:
    """A small config; "__" stands for "."."""
    changed = SMALL | {"data.source": corpus} | {key.replace("__", "."): value for key, value in changes.items()}
    return configs.load(SMOKE, [f"{key}={json.dumps(value)}" for key, value in changed.items()])


# When what is exchanged.


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 8), st.integers(1, 40))
def test_each_fragment_is_sent_once_a_round_and_all_that_is_sent_arrives_once_before_the_end(h, fragments, overlap, n):
    fragments, overlap = min(fragments, h), min(overlap, h - 1)
    schedule = Schedule(h, fragments, overlap, n)
    sent = [(f, at) for at in range(1, n + 1) for f in schedule.sent(at)]
    for fragment in range(fragments):
        times = [at for f, at in sent if f == fragment and schedule.ends_round(f, at)]
        assert [b - a for a, b in itertools.pairwise(times)] == [h] * (len(times) - 1)
        assert (fragment, n) in sent, "the last step ends a round"
    if overlap:
        arrived = [f for at in range(1, n + 1) for f in schedule.arriving(at)]
        assert arrived == [f for f, at in sent if at < n]
        on_time = {at + overlap: schedule.sent(at) for at in range(1, n - overlap)}
        assert all(schedule.arriving(at) == expected for at, expected in on_time.items())
    else:
        assert [schedule.arriving(at) for at in range(1, n + 1)] == [[]] * n


@pytest.mark.parametrize(("islands", "clusters"), [(4, 1), (4, 2), (4, 3), (4, 4), (5, 3), (1, 1)])
def test_every_island_has_one_owner_and_none_has_more_than_needed(islands, clusters):
    owners = [owner_of(k, islands, clusters) for k in range(islands)]
    assert owners == sorted(owners)
    assert set(owners) <= set(range(clusters))
    assert max(map(owners.count, owners)) == -(-islands // clusters)


# What travels.


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("count", [1, 2, 15])
def test_every_integer_survives_being_packed_and_takes_its_bits(bits, most, count):
    every = torch.arange(-most, most + 1).float()
    for start in range(len(every)):
        integers = every.roll(start)[:count]
        packed = deltas.pack(integers, bits)
        assert packed.dtype == torch.uint8
        assert packed.numel() == deltas.packed_bytes(count, bits) == -(-count * bits // 8)
        assert deltas.unpack(packed, bits, count).equal(integers)


@given(st.sampled_from(["none", "int8", "int4"]), st.integers(1, 40), st.integers(0, 10**6))
def test_rounded_changes_have_one_sum_in_every_order_and_are_wrong_by_half_a_scale_at_most(kind, islands, seed):
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10.0 ** torch.randint(-30, 3, (3, 1), generator=generator)
    changes = [torch.randn(3, 5, generator=generator) * magnitudes for _ in range(islands)]
    largest = torch.stack([deltas.largest(change) for change in changes]).amax(0)
    scale = deltas.scale_of(largest, kind, islands)
    integers = [deltas.rounded(change, scale, kind, islands) for change in changes]
    for change, rounded in zip(changes, integers, strict=True):
        assert rounded.equal(rounded.round())
        assert rounded.abs().max() <= deltas.levels(kind, islands)
        # Half a scale, and what the division by the scale has rounded.
        wrong_by = 0.5 + deltas.levels(kind, islands) * 2.0**-24 + 1e-6
        assert ((change.double() - rounded.double() * scale).abs() <= wrong_by * scale).all()
    exact = torch.stack([rounded.double() for rounded in integers]).sum(0)
    for order in (integers, integers[::-1], sorted(integers, key=lambda part: float(part.abs().sum()))):
        total = torch.zeros(3, 5)
        for part in order:
            total += part
        assert total.double().equal(exact)


# The outer step, against torch's SGD.


def exchange_of(
    settings: dict[str, Any], steps: int, start: Tensor
) -> tuple[Exchange, list[TrainState], dict[int, dict[str, Tensor]]]:
    """The exchange of two islands with one matrix, which plain SGD moves by what their gradients say."""
    config = configs.parse({"islands": {"count": 2, **settings}, "budget": {"steps": steps}}, check_rules=False)

    def state() -> tuple[nn.Module, Sharding]:
        model = nn.Linear(4, 3, bias=False)
        model.weight.data.copy_(start)
        return model, Sharding(model, ALONE)

    own = {}
    for k in range(2):
        model, sharding = state()
        own[k] = TrainState(0, model, sharding, [torch.optim.SGD(model.parameters(), lr=1.0)], None)
    packed = settings.get("quantise", "none") != "none"
    residuals = {k: {"weight": torch.zeros(3, 4)} if packed else {} for k in own}
    return Exchange(config, Clusters.of(ALONE, 1), state()[1], own, residuals), list(own.values()), residuals


def weight_of(state: TrainState) -> Tensor:
    return state.sharding.parameters["weight"].data


def move(islands: list[TrainState], generator: torch.Generator) -> None:
    for island in islands:
        gradient = island.sharding.parameters["weight"].grad
        assert gradient is not None
        gradient.copy_(torch.randn(3, 4, generator=generator))


def test_outer_weights_follow_torchs_nesterov_sgd_on_the_mean_change():
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(3, 4, generator=generator)
    exchange, islands, _ = exchange_of({"inner_steps": 3, "outer_learning_rate": 0.5, "outer_momentum": 0.8}, 9, start)
    oracle = nn.Parameter(start.double())
    sgd = torch.optim.SGD([oracle], lr=0.5, momentum=0.8, nesterov=True)
    for number in range(1, 10):
        move(islands, generator)
        before = [weight_of(island).double() for island in islands]
        gradients = [island.sharding.parameters["weight"].grad for island in islands]
        moved = [b - g.double() for b, g in zip(before, gradients, strict=True) if g is not None]
        exchange.step()
        if number % 3 == 0:
            oracle.grad = oracle.data - (moved[0] + moved[1]) / 2
            sgd.step()
            for island in islands:
                assert torch.allclose(weight_of(island).double(), oracle.data, rtol=0, atol=1e-5)
            assert weight_of(islands[0]).equal(weight_of(islands[1]))
        else:
            assert not weight_of(islands[0]).equal(weight_of(islands[1]))


def test_a_round_that_the_end_cuts_short_ends_in_the_mean_of_the_islands():
    generator = torch.Generator().manual_seed(2)
    exchange, islands, _ = exchange_of({"inner_steps": 3}, 4, torch.zeros(3, 4))
    for _ in range(3):
        move(islands, generator)
        exchange.step()
    shared = weight_of(islands[0]).clone()
    move(islands, generator)
    gradients = [island.sharding.parameters["weight"].grad for island in islands]
    assert gradients[0] is not None and gradients[1] is not None
    mean = shared - (gradients[0] + gradients[1]) / 2
    exchange.step()
    assert torch.allclose(weight_of(islands[0]), mean, rtol=0, atol=1e-5)


def test_changes_arrive_after_the_overlap_and_are_mixed_with_what_was_learnt_meanwhile():
    generator = torch.Generator().manual_seed(3)
    plain = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}
    exchange, islands, _ = exchange_of(
        {"inner_steps": 3, "overlap_steps": 2, "mixing": 0.25, **plain}, 20, torch.zeros(3, 4)
    )
    for _ in range(3):
        move(islands, generator)
        exchange.step()
    sent = [weight_of(island).clone() for island in islands]
    travelling = exchange.tensors()["outer.weight.travelling"]
    assert torch.allclose(travelling, -(sent[0] + sent[1]) / 2, atol=1e-5)
    move(islands, generator)
    exchange.step()
    before = [weight_of(island).clone() for island in islands]
    move(islands, generator)
    exchange.step()
    for island, old in zip(islands, before, strict=True):
        gradient = island.sharding.parameters["weight"].grad
        assert gradient is not None
        expected = 0.25 * (old - gradient) + 0.75 * (sent[0] + sent[1]) / 2
        assert torch.allclose(weight_of(island), expected, rtol=0, atol=1e-5)


def test_a_branch_applies_no_exchange_that_was_never_sent():
    """It begins after step 3, which would have sent what arrives after step 5."""
    exchange, islands, _ = exchange_of({"inner_steps": 3, "overlap_steps": 2}, 20, torch.zeros(3, 4))
    exchange.completed = 3
    exchange.begin()
    for learnt in (-1.0, -2.0, -3.0):
        for island in islands:
            gradient = island.sharding.parameters["weight"].grad
            assert gradient is not None
            gradient.fill_(1.0)
        exchange.step()
        assert all(weight_of(island).eq(learnt).all() for island in islands)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_rounding_leaves_out_is_sent_later(kind):
    """Islands move alike for 30 rounds: each sum of what was sent is short of the truth by no more than one round."""
    plain = {"inner_steps": 1, "outer_learning_rate": 1.0, "outer_momentum": 0.0, "quantise": kind}
    exchange, islands, residuals = exchange_of(plain, 30, torch.zeros(3, 4))
    gradient = torch.tensor([[1.0, 0.3, 0.01, -0.001]] * 3)
    for _ in range(30):
        for island in islands:
            grad = island.sharding.parameters["weight"].grad
            assert grad is not None
            grad.copy_(gradient)
        exchange.step()
    missing = -30 * gradient - weight_of(islands[0])
    assert torch.allclose(missing, -residuals[0]["weight"], atol=1e-4)
    assert missing.abs().max() < 1.0 / deltas.levels(kind, 2)


STREAM = {"inner_steps": 6, "fragments": 2, "overlap_steps": 2}


@pytest.mark.parametrize("settings", [STREAM, {"inner_steps": 4}], ids=["streamed", "plain"])
def test_faults_are_planned_at_the_steps_in_which_an_exchange_passes_their_phases(settings: dict[str, Any]):
    start = torch.zeros(3, 4)
    exchange, islands, _ = exchange_of(settings, 11, start)
    passed = set[tuple[str, int]]()
    exchange.hook = lambda phase, step: passed.add((phase, step))
    for number in range(11):
        move(islands, torch.Generator().manual_seed(number))
        exchange.step()
    config = configs.parse({"islands": {"count": 2, **settings}, "budget": {"steps": 11}}, check_rules=False)
    foreseen = {(str(phase), step) for phase in IN_ISLANDS for step in range(1, 12) if comes_at(phase, step, config)}
    # The one matrix is in a fragment of its own; the other one is empty, and sends nothing.
    of_the_empty_one = {("in_send", 3), ("in_send", 9), ("in_outer_update", 5)} if settings is STREAM else set()
    assert passed == foreseen - of_the_empty_one and of_the_empty_one <= foreseen


@pytest.mark.parametrize(
    ("changes", "step", "said"),
    [
        ({}, 3, "faults[0] (sigkill): in_send is not reached at step 3.\n  Give one of the steps 4, 8, 10."),
        ({"islands.count": 0}, 4, "faults[0] (sigkill): in_send is passed with islands alone.\n  Set islands.count"),
    ],
)
def test_a_fault_in_an_exchange_that_never_comes_is_refused(changes: dict[str, Any], step: int, said: str):
    fault = {"kind": "sigkill", "rank": 0, "at_step": step, "phase": "in_send"}
    tree = {"islands": {"count": 2, "inner_steps": 4} if not changes else {}, "budget": {"steps": 10}}
    with pytest.raises(ConfigError, match=re.escape(said)):
        faultplan.make(configs.parse({**tree, "faults": [fault]}, check_rules=False), 2)


# An island's step is that of a run of its own.


def test_islands_that_meet_only_at_the_end_are_runs_of_their_own(corpus, tmp_path):
    """Their losses to the bit; the outer step at the end but for its rounding."""
    shared = config(corpus, budget__steps=4, islands__count=2, optim__clip_norm=0.5, model__dropout=0.1)
    found = trainer.train(shared, tmp_path / "run")
    rows = rundir.fact(found.path, "vocab_size")
    prepared = prepare(shared.data, shared.eval, shared.model.context)
    begin = job.build(shared, rows, ALONE).tensors()
    weights, losses = list[dict[str, Tensor]](), list[list[float]]()
    for k in range(2):
        own = config_of(shared, k)
        state = job.build(own, rows, ALONE)
        for name, parameter in state.sharding.parameters.items():
            parameter.data.copy_(begin[f"model.{name}"])
        members = AllRanks(ALONE, 2)
        context = StepContext(own, members, IslandBatches(job.batches_of(shared, prepared), k, 2))
        losses.append([take_step(state, context) for _ in range(4)])
        weights.append({name: p.data for name, p in state.sharding.parameters.items()})
    assert [row["loss"] for row in found.losses()] == [(a + b) / 2 for a, b in zip(*losses, strict=True)]
    ended = loading.read(checkpoint.committed(found.path)[0])
    for name, first in weights[0].items():
        mean = (first + weights[1][name]) / 2
        # 0.7 · 1.9 of the mean change: the outer step of a first round.
        expected = begin[f"model.{name}"] + 0.7 * 1.9 * (mean - begin[f"model.{name}"])
        assert torch.allclose(ended[f"model.{name}"], expected, rtol=0, atol=1e-5), name
        assert ended[f"islands.model.{name}"].shape == (2, *first.shape)


def take_step(state: TrainState, context: StepContext) -> float:
    config = context.config
    result = step.compute_gradients(state, context, StepMembers(ALONE, range(config.data.micro_batches)))
    step.clip_gradients(state, result.norm, config.optim.clip_norm)
    optim.set_learning_rates(state.optimizers, state.step, config.optim, config.budget.steps)
    step.apply(state)
    return result.loss


def test_one_island_that_takes_the_mean_every_step_is_close_to_a_run_without_islands(corpus, tmp_path):
    """Not to the bit: w - (w - w') rounds."""
    mean = {"islands__outer_learning_rate": 1.0, "islands__outer_momentum": 0.0}
    one = trainer.train(config(corpus, islands__count=1, islands__inner_steps=1, **mean), tmp_path / "one")
    plain = trainer.train(without_islands(corpus), tmp_path / "plain")
    for a, b in zip(one.losses(), plain.losses(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert committed_samples(one.path) == committed_samples(plain.path)
    assert [a["loss"] for a in one.evaluations()] == pytest.approx([b["loss"] for b in plain.evaluations()], abs=1e-5)


def without_islands(corpus: str, **changes: Any) -> configs.Config:
    off = {"islands__count": 0, "islands__inner_steps": 30}
    return config(corpus, **off, **changes)


def test_a_run_without_islands_has_the_fingerprint_that_it_had_before_there_were_any():
    assert not [key for key in configs.mathematics(configs.load(SMOKE)) if key.startswith("islands.")]


@pytest.mark.parametrize("changes", [{}, {"islands__quantise": "int8"}, {"islands__outer_momentum": 0.0}], ids=str)
def test_a_dry_run_tells_the_memory_of_the_state_that_is_built(corpus, changes):
    few = config(corpus, **changes)
    told, state = costs.memory_per_rank(few, 320, 1), job.build_any(few, 320, ALONE, lambda rounders: rounders)
    held = sum(t.numel() * 4 for name, t in state.tensors().items() if "grids" not in name)
    assert held == told["master_weights"] + told["optimizer"] + told["residuals"]
    assert costs.memory_per_rank(few, 320, 4)["master_weights"] * 5 == told["master_weights"] * 2


# What is told of it.


def test_inspect_sums_what_travelled_and_each_exchange_is_logged(corpus, tmp_path):
    """Steps 2, 4, 6, 8 send one fragment each, which is applied two steps later; the last step sends both."""
    run = trainer.train(config(corpus, **streamed()), tmp_path / "run")
    logged = [event for event in run.events() if event["event"] == "changes_applied"]
    assert [(e["fragment"], e["sent_after"], e["step"]) for e in logged] == [
        (0, 2, 4), (1, 4, 6), (0, 6, 8), (1, 8, 10), (0, 10, 10), (1, 10, 10)
    ]  # fmt: skip
    told = run.summary()["islands"]
    assert (told["exchanges"], told["bytes"]) == (6, 0), "all islands are in one process"
    assert trainer.train(without_islands(corpus), tmp_path / "plain").summary()["islands"] is None


# Faults.


@pytest.fixture(scope="module")
def calm(corpus, tmp_path_factory) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("calm") / "run"
    trainer.train(config(corpus, **streamed()), run)
    return outcome(run)


def streamed() -> dict[str, Any]:
    return {key.replace(".", "__"): value for key, value in STREAMED.items()}


def arguments(corpus: str) -> list[str]:
    return settings(**{key.replace(".", "__"): value for key, value in (SMALL | STREAMED).items()},
                    data__source=corpus)  # fmt: skip


def test_four_ranks_of_which_one_dies_while_a_change_travels_go_on_as_one_to_the_same_bits(corpus, calm, tmp_path):
    """Step 7 lies in a round, two steps after a fragment was sent."""
    kill = with_faults([{"kind": "sigkill", "rank": 2, "at_step": 7, "phase": "before_update"}])
    run = ["train", SMOKE, "--run", tmp_path / "run", *arguments(corpus)]
    assert torchrun(4, *run, *kill, check=False).returncode == EXIT_FAILED
    assert command(*run).returncode == 0
    assert outcome(tmp_path / "run") == calm
    starts = [entry.event for entry in events.read(tmp_path / "run") if isinstance(entry.event, events.AttemptStarted)]
    assert starts[-1].from_step >= 4
    sent = [entry.event for entry in events.read(tmp_path / "run") if isinstance(entry.event, events.ChangesApplied)]
    parameters = summarise_run(tmp_path / "run")["parameters"]
    by_four = {event.fragment: event.bytes for event in sent if event.bytes}
    assert parameters / 2 <= sum(by_four.values()) <= parameters / 2 + 1, "int4 takes half a byte of each"


def test_ranks_that_torchrun_starts_again_end_with_the_same_bits(corpus, calm, tmp_path):
    kill = with_faults([{"kind": "sigkill", "rank": 1, "at_step": 6, "phase": "in_update"}])
    torchrun(2, "train", SMOKE, "--run", tmp_path / "run", *arguments(corpus), *kill, restarts=2)
    assert outcome(tmp_path / "run") == calm


def test_a_stop_signal_is_heeded_where_the_clusters_meet_and_the_run_goes_on_to_the_same_bits(corpus, calm, tmp_path):
    """Rank 1 is asked in step 5; they meet after step 6."""
    ask = with_faults([{"kind": "sigterm", "rank": 1, "at_step": 5, "phase": "before_update"}])
    run = ["train", SMOKE, "--run", tmp_path / "run", *arguments(corpus)]
    assert torchrun(2, *run, *ask, check=False).returncode == EXIT_PREEMPTED
    ends = [entry.event for entry in events.read(tmp_path / "run") if isinstance(entry.event, events.AttemptEnded)]
    assert [(end.status, end.step) for end in ends] == [("preempted", 6)] * 2
    assert command(*run).returncode == 0
    assert outcome(tmp_path / "run") == calm


def test_an_island_whose_gradient_is_not_finite_ends_the_job_by_name_on_all_ranks(corpus, tmp_path):
    """In a step after which the ranks do not meet: those that are well learn it in the next one."""
    fault = {"kind": "nan_sample", "rank": 1, "at_step": 3, "where": "output"}
    command = ["train", SMOKE, "--run", tmp_path / "run", *arguments(corpus), *with_faults([fault])]
    ended = torchrun(2, *command, module="tests.worker", check=False)
    assert ended.returncode == EXIT_FAILED
    assert "island 2: step 3: loss or gradient is not finite, also when computed again" in ended.stderr
    assert "Its micro-batch i is micro-batch 2 + 4·i of the whole step" in ended.stderr
    entries = events.read(tmp_path / "run")
    ends = [entry.event for entry in entries if isinstance(entry.event, events.AttemptEnded)]
    assert ends and all(end.reason.startswith("NumericsError: island 2: step 3") for end in ends), (
        "none has lost a peer"
    )


# Other runs' states.


def test_islands_begin_from_the_weights_of_a_run_without_them_and_such_a_run_from_theirs(corpus, tmp_path):
    """The next step's loss is the same in runs that have the same weights."""
    keep = {"checkpoint__keep_last": 5}
    plain = trainer.train(without_islands(corpus, **keep), tmp_path / "plain")
    rounds = config(corpus, islands__inner_steps=3, **keep)
    islands = trainer.train(rounds, tmp_path / "islands", parent=f"{plain.path}@4")
    again = trainer.train(without_islands(corpus, **keep), tmp_path / "again", parent=f"{islands.path}@6")
    losses = ({row["step"]: row["loss"] for row in run.losses()} for run in (plain, islands, again))
    of_plain, of_islands, of_again = losses
    assert of_islands[5] == pytest.approx(of_plain[5], abs=1e-6)
    assert of_again[7] == pytest.approx(of_islands[7], abs=1e-6)
    assert of_islands[6] != pytest.approx(of_plain[6], abs=1e-6)


def test_the_state_of_another_number_of_islands_is_refused_with_the_remedy(corpus, tmp_path):
    four = trainer.train(config(corpus), tmp_path / "run")
    two = config(corpus, islands__count=2, budget__steps=12)
    with pytest.raises(ConfigError, match=r"holds the state of 4 islands[^§]*Set islands.count = 4, or leave"):
        trainer.train(two, tmp_path / "other", parent=four.path)
    with pytest.raises(RunDirectoryError, match=r"islands.count: 4 → 2"):
        trainer.train(two, four.path)


# Bad input.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"islands.count": 3}, "islands.count = 3 does not divide data.micro_batches = 4"),
        ({"parallel.island_ranks": 2}, "parallel.island_ranks = 2 leaves ranks without work: an island has 1"),
        ({"islands.inner_steps": 11}, "islands.inner_steps = 11 is longer than budget.steps = 10"),
        ({"islands.overlap_steps": 4}, "islands.overlap_steps = 4 is not below islands.inner_steps = 4"),
        ({"islands.fragments": 5}, "islands.fragments = 5 exceeds islands.inner_steps = 4"),
        ({"numerics.exact": False}, "[islands] needs numerics.exact = true"),
        ({"parallel.strategy": "fsdp"}, 'cannot run with parallel.strategy = "fsdp"'),
        ({"sentinel.audit": "1/4"}, "[sentinel] does not know islands"),
        ({"islands.quantise": "int2"}, 'islands.quantise = "int2"'),
        ({"islands.count": 0}, "islands.inner_steps has no effect here: it needs islands.count"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_contradict_each_other_are_refused_by_name(changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as refused:
        configs.load(SMOKE, [f"{key}={json.dumps(value)}" for key, value in (SMALL | changes).items()])
    assert len(refused.value.problems) == 1
    assert said in refused.value.problems[0]


@dataclass(frozen=True)
class TwoRanks(World):
    """As rank 0 sees it; rank 1 was started with a setting of its own."""

    other: Mapping[str, Any] = field(default_factory=dict)

    def agree(self, compute: Any, waiting: Any = None) -> list[Any]:
        mine = compute()
        assert mine.keys() >= self.other.keys()
        return [mine, mine | self.other]


@pytest.mark.parametrize(
    ("setting", "old"),
    [
        ("islands.inner_steps", 29),
        ("eval.every_steps", 20),
        ("checkpoint.every_steps", 21),
        ("checkpoint.memory_every_steps", 7),
    ],
)
def test_a_cluster_that_would_compute_another_run_or_meet_after_other_steps_is_refused_by_what_differs(
    setting: str, old: int
):
    config = configs.load(SMOKE, ["islands.count=2", "islands.inner_steps=29", f"{setting}={old}"])
    with pytest.raises(ConfigError, match=rf"rank 1 was started with another config.*{setting}: {old} → 60"):
        check_alike(config, TwoRanks(0, 2, ALONE.device, other={setting: 60}))


@pytest.mark.parametrize(
    ("ranks_each", "ranks", "said"),
    [
        (1, 3, "islands.count = 2 leaves 1 of 3 ranks without an island"),
        (2, 3, "parallel.island_ranks = 2 does not divide the world of 3 ranks"),
        (2, 6, "islands.count = 2 leaves 2 of 6 ranks without an island, with parallel.island_ranks = 2"),
        (2, 4, ""),
        (1, 2, ""),
    ],
)
def test_ranks_that_do_not_fit_the_islands_are_refused(ranks_each: int, ranks: int, said: str):
    config = configs.load(SMOKE, ["islands.count=2", f"parallel.island_ranks={ranks_each}"])
    with pytest.raises(ConfigError, match=re.escape(said)) if said else contextlib.nullcontext():
        configs.check_world(config, ranks)
