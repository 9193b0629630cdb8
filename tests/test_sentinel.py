"""Silent corruption: it is noticed in its step, the rank is named, and the run ends with the bits of the reference."""

import json
import random
import socket
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.faulty_runs import FaultyRun, fault
from tests.support import ROOT, SMOKE, settings, summarise_run, trainer, write_corpus
from trainer import config as configs
from trainer.data.batches import Batches, windows
from trainer.errors import EXIT_FAILED, EXIT_QUARANTINED, ConfigError, CorruptionError, QuarantineError
from trainer.exact import Grids
from trainer.faults import plan
from trainer.log.events import Corrupted
from trainer.parallel.world import AllRanks, World
from trainer.sentinel import bits
from trainer.sentinel.audit import Audit, Audits, Seen, blame
from trainer.sentinel.corruption import Sentinel
from trainer.sentinel.finding import Finding
from trainer.sentinel.quarantine import Quarantine
from trainer.sentinel.tokens import TokenCheck, block_hashes
from trainer.sentinel.update import UpdateAudit
from trainer.step import TrainState

# Steps 1 to 3 of the reference are computed twice, since they overflow their grids: a flip in the first pass is thrown
# away with it.
ON = settings(sentinel__audit="1", sentinel__state_hash_every_steps=1)
PATIENT = settings(sentinel__quarantine_within=0)
MACHINE: Any = torch.device("cpu")


def found(trial: FaultyRun) -> list[tuple[int, str, int | None, str]]:
    return [(event.step, event.what, event.culprit, event.action) for event in trial.events(Corrupted)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_flips_of_every_kind_are_repaired_in_their_step_and_the_rank_is_named(trial: FaultyRun):
    faults = [
        fault("flip_gradient", 4, 0),
        fault("flip_reduced", 5, 1),
        fault("flip_weights", 7, 2),
        fault("flip_moments", 9, 1),
        fault("flip_activations", 11, 2),
        fault("flip_update", 13, 0),
        fault("flip_tokens", 15, 1),
        fault("flip_received", 17, 2),
    ]
    trial.survive(3, faults, *ON, *PATIENT)
    run_summary = trial.ends_as_reference(attempts=1)
    kinds = ("gradient", "reduction", "state", "state", "micro_batch", "state", "tokens")
    expected = [(f["at_step"], kind, f["rank"], "repaired") for f, kind in zip(faults, kinds, strict=False)]
    # What is damaged on the way arrives at all ranks alike: none of them is to blame.
    assert found(trial) == [*expected, (17, "reduction", None, "repaired")]
    assert trial.detected_as(*range(8)) == ["corrupted"] * 8
    assert [incident["kind"] for incident in run_summary["incidents"]] == ["corrupted"] * 8
    parameters = [str(event.parameter) for event in trial.events(Corrupted)]
    assert "None" not in parameters and parameters[3].startswith("optim.")
    assert parameters[5].startswith("model.") and parameters[6].startswith("sample ")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sharded_run_recomputes_a_wrong_gradient_and_restarts_where_its_state_has_no_replica(trial: FaultyRun):
    faults = [
        fault("flip_gradient", 4, 1),
        fault("flip_activations", 5, 0),
        fault("flip_update", 7, 1),
        fault("flip_weights", 9, 1),
        fault("flip_moments", 15, 0),
    ]
    trial.survive(2, faults, *ON, *PATIENT, *settings(parallel__strategy="fsdp"))
    trial.ends_as_reference(attempts=3)
    actions = ["repaired", "repaired", "repaired", "restarted", "restarted"]
    assert [action for *_, action in found(trial)] == actions
    assert all(culprit in (None, f["rank"]) for (_, _, culprit, _), f in zip(found(trial), faults, strict=True))
    assert trial.detected_as(*range(5)) == ["corrupted"] * 5
    assert found(trial)[2] == (7, "update", 1, "repaired")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_stays_wrong_or_is_wrong_twice_ends_the_job_with_a_status_of_its_own_and_its_node_named(
    trial: FaultyRun,
):
    stays, comes_again = fault("always_wrong", 4, 1), fault("sometimes_wrong", 8, 2, every=100, steps=16)
    outputs = [trial.survive(3, [each], *ON, status=EXIT_QUARANTINED) for each in (stays, comes_again)]
    of_rank_1 = [row for row in found(trial) if row[2] == 1]
    assert {row[1:] for row in of_rank_1} == {("micro_batch", 1, "quarantined")} and of_rank_1[0][0] == 4
    of_rank_2 = [row for row in found(trial) if row[2] == 2]
    assert [action for *_, action in (of_rank_2[0], of_rank_2[-1])] == ["repaired", "quarantined"]
    node = socket.gethostname()
    assert "micro-batch" in outputs[0] and "also when computed again. It is not applied" in outputs[0]
    assert f"for the second time (before in step {of_rank_2[0][0]})" in outputs[1]
    assert all("QuarantineError: step" in output and f"Take node {node} out of the job" in output for output in outputs)
    trial.survive(3, [], *ON)
    run_summary = trial.ends_as_reference(attempts=3)
    assert [incident["rank"] for incident in run_summary["incidents"] if incident["ends_attempt"]] == [1, 2]
    # The node is the only one there is: it computes again, and the log says so.
    warned = [warning["message"] for warning in run_summary["warnings"]]
    assert any(f"node {node} computes again, though it is quarantined: rank 1" in message for message in warned)


def test_a_rank_is_quarantined_for_the_second_time_within_so_many_checked_steps():
    quarantine = Quarantine(3, AllRanks(World(0, 3, MACHINE), 3))
    history = {1: [(1,)], 2: [(0,), (1, 2)], 5: [(1,)], 6: [(2,)], 7: [(1,), (1,)]}
    again = {}
    for step in range(1, 8):
        for _ in range(1 + (step == 6)):  # a step that is computed again, as the members have changed, counts once
            quarantine.count_checked_step(step)
        again[step] = quarantine.second_time(step, history.get(step, []))
    assert again == {1: None, 2: None, 3: None, 4: None, 5: None, 6: None, 7: (1, 5)}


def test_what_is_found_twice_in_one_step_or_on_one_of_several_ranks_is_no_second_time():
    quarantine = Quarantine(3, AllRanks(World(0, 3, MACHINE), 3))
    quarantine.count_checked_step(1)
    assert quarantine.second_time(1, [(1,), (1,)]) is None
    assert quarantine.second_time(1, [(1,)]) is None
    quarantine.count_checked_step(2)
    assert quarantine.second_time(2, [(1, 2), ()]) is None
    assert quarantine.second_time(2, [(1, 1)]) == (1, 1)  # the owner audits itself


@pytest.mark.parametrize("group_rank", ["0", "1"])
def test_only_the_node_of_the_rank_leaves_the_job_and_the_others_start_again(
    group_rank: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GROUP_RANK", group_rank)
    world: Any = SimpleNamespace(rank=0, agree=lambda compute: [compute(), "1"])  # the culprit's is node 1
    with pytest.raises(CorruptionError) as caught:
        Quarantine(3, AllRanks(world, 3)).end(1, "n7", "step 3: rank 1 has computed a wrong gradient")
    leaves = group_rank == "1"
    assert isinstance(caught.value, QuarantineError) == leaves and caught.value.restart != leaves
    assert ("Take node n7 out of the job" if leaves else "Node n7 leaves the job") in str(caught.value)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_every_token_that_is_read_wrong_or_changed_in_the_store_is_noticed(dtype: str):
    tokens = np.random.default_rng(0).integers(0, 60_000, 80_001).astype(dtype)
    check = TokenCheck(tokens, 16, block_hashes(tokens))
    ids = np.array([0, 7, len(windows(tokens, 16)) - 1])
    rows = windows(tokens, 16)[ids]
    assert check.wrong(ids, rows) == []
    for place in np.ndindex(rows.shape):
        read = rows.copy()
        read[place] ^= 1
        assert check.wrong(ids, read) == [ids[place[0]]]
    tokens[7 * 16 + 5] ^= 4  # and so it is read
    assert 7 in check.wrong(ids, windows(tokens, 16)[ids])


@pytest.mark.parametrize(("act", "action"), [("repair", "repaired"), ("report", "reported"), ("stop", "stopped")])
def test_tokens_that_are_read_wrong_are_read_again_reported_or_stop_the_run(act: str, action: str):
    tokens = np.arange(500, dtype="<u2")
    batches = Batches(tokens, seed=0, context=8, micro_batches=2, sequences=3)
    right = batches.micro_batch(0, 1)
    log: Any = SimpleNamespace(events=[])
    log.append = log.events.append
    config = configs.parse({"sentinel": {"audit": "1", "act": act}, "model": {"context": 8}})
    sentinel, alone = Sentinel(config), World(0, 1, MACHINE)
    state: Any = SimpleNamespace(step=0, sharding=SimpleNamespace(parameters={}))
    sentinel.wrap_members(AllRanks(alone, 2), state, batches, log)
    sentinel.check_tokens(batches, tokens, alone)
    assert np.array_equal(batches.micro_batch(0, 1).inputs, right.inputs) and log.events == []
    read = batches.read

    def wrong_once(ids: np.ndarray) -> np.ndarray:
        batches.read = read
        rows = read(ids)
        rows[1, 2] ^= 1
        return rows

    batches.read = wrong_once
    if act == "stop":
        with pytest.raises(CorruptionError, match="rank 0 has read tokens that are not the store's"):
            batches.micro_batch(0, 1)
    else:
        assert np.array_equal(batches.micro_batch(0, 1).inputs, right.inputs) == (act == "repair")
    assert [(e.what, e.step, e.culprit, e.action) for e in log.events] == [("tokens", 1, 0, action)]
    if act == "repair":

        def always_wrong(ids: np.ndarray) -> np.ndarray:
            rows = read(ids)
            rows[1, 2] ^= 1
            return rows

        batches.read = always_wrong
        with pytest.raises(CorruptionError, match="rank 0 has read tokens that are not the store's"):
            batches.micro_batch(0, 1)
        assert (log.events[-1].what, log.events[-1].culprit) == ("tokens", 0)
        batches.read = read
    # A store that has changed is wrong again.
    tokens[:] += 1
    if act == "repair":
        with pytest.raises(
            CorruptionError, match="the token store has changed since its checksum was verified, first in sample"
        ) as caught:
            batches.micro_batch(0, 1)
        assert caught.value.restart
        assert (log.events[-1].what, log.events[-1].culprit) == ("store", None)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_report_only_logs_and_stop_ends_the_run(trial: FaultyRun):
    reporting = FaultyRun(trial.directory / "report", trial.settings, trial.reference)
    reporting.survive(2, [fault("flip_gradient", 4, 1)], *ON, *settings(sentinel__act="report"))
    assert found(reporting)[0] == (4, "gradient", 1, "reported")
    trial.survive(2, [fault("flip_gradient", 4, 1)], *ON, *settings(sentinel__act="stop"), status=EXIT_FAILED)
    assert found(trial) == [(4, "gradient", 1, "stopped")]
    trial.survive(2, [], *ON)
    trial.ends_as_reference()


@pytest.mark.slow
def test_one_rank_alone_never_claims_that_a_result_is_repaired(trial: FaultyRun):
    trial.survive(1, [fault("flip_activations", 4, 0)], *ON)
    assert [action for *_, action in found(trial)] == ["recomputed"]
    assert "may both be wrong" in summarise_run(trial.run)["incidents"][0]["text"]


@pytest.mark.slow
def test_a_weight_that_is_not_finite_is_copied_from_a_replica_instead_of_ending_the_run(trial: FaultyRun):
    trial.survive(3, [fault("nan_weights", 5, 1)], *ON)
    trial.ends_as_reference(attempts=1)
    assert found(trial) == [(5, "state", 1, "repaired")]


@pytest.mark.parametrize("wrong_results", [(), (1,), (2,), (1, 2)])
def test_an_update_is_computed_until_two_results_agree(wrong_results: tuple[int, ...]):
    weight = torch.nn.Parameter(torch.full((4, 16), 2.0))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    sharding: Any = SimpleNamespace(parameters={"weight": weight})
    states = []
    for wrong in ((), wrong_results):
        with torch.no_grad():
            weight.fill_(2.0)
        optimizer.state.clear()
        state = TrainState(0, torch.nn.Identity(), sharding, [optimizer], None)
        audit = UpdateAudit(0, Fraction(1))
        results = 0

        def spoil(*_: Any, wrong: tuple[int, ...] = wrong) -> None:
            nonlocal results
            results += 1
            if results in wrong:
                weight.data[1, results] += 1

        weight.grad = torch.ones_like(weight)
        optimizer.step()  # makes the moments
        state.step = 1
        handle = optimizer.register_step_post_hook(spoil)
        audit.begin(state)
        optimizer.step()
        state.step = 2
        named = audit.end(state, lambda needed: needed)
        handle.remove()
        states.append(({n: t.clone() for n, t in state.tensors().items()}, named, results))
    (right, clean, twice), (after, named, results) = states
    assert (clean, twice) == ("", 2)
    assert results == (3 if wrong_results else 2)
    if len(wrong_results) == 2:
        assert named is None
    else:
        assert named == ("model.weight" if wrong_results else "")
        assert all(torch.equal(after[name], right[name]) for name in right)


def test_parameters_with_three_axes_are_checked_too(tmp_path: Path):
    made = settings(data__source=write_corpus(tmp_path / "corpus"), data__heldout_fraction=0.2, budget__steps=4)
    experts = [
        f"model.class={json.dumps(str(ROOT / 'tests/own_models/experts.py:Mixture'))}",
        "model.options.experts=2",
    ]
    chosen = [part for setting in experts for part in ("--set", setting)]
    trainer("train", SMOKE, "--run", tmp_path / "run", *made, *chosen, *ON)
    run_summary = summarise_run(tmp_path / "run")
    assert run_summary["status"] == "finished" and run_summary["incidents"] == []


def test_one_micro_batch_on_one_rank_raises_no_false_alarm(tmp_path: Path):
    made = settings(
        data__source=write_corpus(tmp_path / "corpus"), data__micro_batches=1, data__heldout_fraction=0.2,
        budget__steps=9, checkpoint__every_steps=4,
    )  # fmt: skip
    hashes = set()
    for name, sentinel in (("off", []), ("on", ON)):
        trainer("train", SMOKE, "--run", tmp_path / name, *made, *sentinel)
        run_summary = summarise_run(tmp_path / name)
        assert run_summary["status"] == "finished" and run_summary["incidents"] == []
        assert (run_summary["sentinel"] is None) == (name == "off")
        hashes.add(run_summary["state_sha256"])
    assert len(hashes) == 1


def hash_of(how: str, tensor: torch.Tensor) -> int:
    flat = tensor.contiguous().view(torch.int32).view(-1)
    return int(bits.bits_hash(tensor) if how == "host" else bits.multiplied(flat))


@pytest.mark.parametrize("how", ["host", "device"])
def test_a_hash_changes_with_every_single_bit_at_every_place(how: str):
    weights = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    before = hash_of(how, weights)
    assert hash_of(how, weights.clone()) == before
    for place in range(weights.numel()):
        for bit in range(32):
            flipped = weights.clone()
            flipped.view(torch.int32).view(-1)[place] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
            assert hash_of(how, flipped) != before, (place, bit)


@pytest.mark.parametrize("how", ["host", "device"])
def test_a_hash_changes_where_elements_change_places_or_signs(how: str):
    weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weights[0, 1] = -weights[0, 0]  # they differ in the highest bit alone
    before = hash_of(how, weights)
    for first in range(weights.numel()):
        for second in range(first):
            changed = weights.clone()
            changed.view(-1)[[first, second]] = weights.view(-1)[[second, first]]
            assert hash_of(how, changed) != before, (first, second)
    for negated in (-weights, torch.cat([-weights[:1], weights[1:]]), weights.T.contiguous()):
        assert hash_of(how, negated) != before


def test_a_hash_of_more_than_a_chunk_knows_in_which_chunk_a_bit_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bits, "_CHUNK", 8)
    bits._odd.cache_clear()
    hashes = set()
    for place in range(40):
        integers = torch.zeros(40, dtype=torch.int32)
        integers[place] = -(2**31)
        hashes.add(int(bits.multiplied(integers)))
    bits._odd.cache_clear()
    assert len(hashes) == 40


@pytest.mark.parametrize("shape", [(1, 70_000), (3, 40_000), (700, 96), (5, 3)])
def test_sums_of_rows_in_blocks_are_those_of_the_whole(shape: tuple[int, int]):
    matrix = torch.randint(-(2**20), 2**20, shape).float() * 2.0**-30
    assert torch.equal(bits.row_sums(matrix), matrix.double() @ bits.factors(shape[1], MACHINE))
    # A view that is not contiguous, as the rows of a transposed gradient are.
    assert torch.equal(bits.row_sums(matrix.T), matrix.T.double() @ bits.factors(shape[0], MACHINE))


def test_sums_of_rounded_gradients_and_the_sum_of_their_checksums_are_equal_to_the_bit():
    shapes = {"matrix": torch.Size((6, 300)), "vector": torch.Size((300,))}
    grids = Grids(shapes, 8, 5, MACHINE)
    gradients = {name: [torch.randn(shape) * 10**number for number in range(-4, 4)] for name, shape in shapes.items()}
    rounded: dict[str, list[torch.Tensor]] = {}
    for fits in (False, True):
        grids.begin(counting=False)
        rounded = {name: [grids.rounder(name)(g) for g in parts] for name, parts in gradients.items()}
        assert grids.overflowed(lambda seen: None) != fits
        grids.widen()
    weights = bits.factors(300, MACHINE)
    for parts in rounded.values():
        whole = sum(part.double() @ weights for part in parts)
        random.shuffle(parts)
        total = torch.stack(parts).sum(0)
        assert not bits.differ(torch.as_tensor(whole), total.double() @ weights)
        total.view(torch.int32).view(-1)[17] ^= 1
        assert bits.differ(torch.as_tensor(whole), total.double() @ weights)


@pytest.mark.parametrize(
    ("before", "after", "second_auditor", "wrong"),
    [
        ((5, 7), (7, 7), 1, (0,)),
        ((7, 5), (7, 7), 1, (1,)),
        ((7, 5), (7, 7), 2, (1,)),
        ((5, 7), (5, 7), 2, (0,)),
        ((5, 7), (5, 7), 1, (0, 1)),
        ((5, 7), (5, 9), 2, (0, 1)),
    ],
    ids=[
        "the owner once", "the auditor once", "the auditor, by another's word", "the owner again, by two others",
        "two ranks that both stay", "three values",
    ],
)  # fmt: skip
def test_the_second_computation_shows_who_was_wrong(before, after, second_auditor, wrong):
    first, second = Seen(Audit(3, 0, 1), *before), Seen(Audit(3, 0, second_auditor), *after)
    assert blame(Finding("micro_batch", (0, 1), 3), [first], [second]).ranks == wrong


def test_micro_batches_are_audited_at_their_share_and_every_rank_by_every_other():
    picks = [Audits(0, Fraction(1, 4), 8).pick(step, size=4) for step in range(2000)]
    assert picks == [Audits(0, Fraction(1, 4), 8).pick(step, size=4) for step in range(2000)]
    assert 0.23 < sum(map(len, picks)) / (2 * 2000) < 0.27
    assert {(number, auditor % 3) for pick in picks for number, auditor in pick} == {
        (number, auditor) for number in range(2) for auditor in range(3)
    }


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sentinel": {"audit": "often"}}, "no share of the micro-batches"),
        ({"sentinel": {"audit": "3/2"}}, "no share of the micro-batches"),
        ({"sentinel": {"act": "stop"}}, "has no effect"),
        ({"sentinel": {"quarantine_within": 4}}, "has no effect: no check"),
        ({"sentinel": {"audit": "1", "act": "stop", "quarantine_within": 4}}, "has no effect with sentinel.act"),
        ({"sentinel": {"audit": "1/8"}, "numerics": {"exact": False}}, "needs numerics.exact = true"),
    ],
)
def test_settings_that_check_nothing_or_cannot_are_refused(tree: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        configs.parse(tree)


def test_a_sentinel_is_no_part_of_the_mathematics_and_makes_a_silent_fault_one_that_must_be_noticed(tmp_path: Path):
    faults = [fault("flip_weights", 3, 0)]
    silent, watched = (
        configs.parse({"faults": faults, "sentinel": {"audit": audit}, "numerics": {"exact": True}})
        for audit in ("0", "1/8")
    )
    assert configs.fingerprint(silent) == configs.fingerprint(watched)
    assert [plan.make(config, 2)[0].kind.silent for config in (silent, watched)] == [True, False]
