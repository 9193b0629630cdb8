"""Promises about advice on shapes: what is counted, what is measured once, and what proposals keep equal."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from trainer import config as configs
from trainer import costs, files
from trainer.advise import advise, calls, matrix_products, proposals, share_of_best, steps
from trainer.advise.calls import Call
from trainer.advise.rates import Rates
from trainer.advise.terminal import terminal
from trainer.errors import NumericsError
from trainer.phases import Phase

CONFIG = Path("configs/smoke.toml")
SMALL = ["model.vocab_size=512", "model.width=48", "model.n_heads=3", "data.micro_batch_sequences=4"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def made_up(call: Call, device: torch.device) -> float:
    """Return the seconds of a call on a machine that is always the same."""
    return 1e-6 + call.flops / 1e11 + call.bytes / 1e10


@pytest.fixture(scope="module")
def tree(cache: Path) -> dict[str, Any]:
    """Advice on a small config, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOPROPE_CACHE", str(cache))
        patch.setattr(Call, "seconds", made_up)
        return advise(CONFIG, SMALL, lambda text: None)


def test_each_call_of_a_step_can_be_made_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calls, "MIN_SECONDS", 0.0)
    step = steps.take(configs.load(CONFIG, SMALL), CPU).step
    alone = {seen.call.operator: seen.call.seconds(CPU) for seen in step.calls.values()}
    assert {operator for operator, seconds in alone.items() if not seconds} == set()
    assert len(alone) > 30


def test_the_matrix_products_of_a_micro_batch_do_the_flops_that_the_config_counts(tree: dict[str, Any]):
    config = configs.load(CONFIG, SMALL)
    tokens = config.data.micro_batch_sequences * config.model.context
    attention = 3 * config.model.n_layers * 4 * config.model.context * config.model.width
    found = sum(2 * row["batch"] * row["m"] * row["n"] * row["k"] * row["calls"] for row in tree["matrix_products"])
    assert found == (costs.flops_per_token(config.model, 512) - attention) * tokens
    assert 0 < tree["share_of_best"] <= 1


def test_a_step_of_as_many_micro_batches_as_asked_for_is_taken():
    config = configs.load(CONFIG, SMALL)
    made = {number: steps.take(config, CPU, number) for number in (1, 3)}
    assert {number: (taken.micro_batches, taken.step.micro_batches) for number, taken in made.items()} == {
        1: (1, 1), 3: (3, 3)
    }  # fmt: skip
    products = [
        sum(seen.counts["micro_batch"] for seen in taken.step.calls.values() if seen.call.product)
        for taken in made.values()
    ]
    assert products[1] == 3 * products[0] > 0


@pytest.mark.parametrize(
    "timed", [lambda config: steps.take(config, CPU, 2), lambda config: steps.in_turn([config], [2], CPU, 1)]
)
def test_a_step_that_is_always_computed_again_is_not_timed(timed: Any, monkeypatch: pytest.MonkeyPatch):
    class Twice:
        def __init__(self, config: configs.Config, device: torch.device, hook: Any) -> None:
            self._hook = hook

        def take_step(self) -> None:
            for _ in range(4):
                self._hook(Phase.BEFORE_FORWARD, 0)

    monkeypatch.setattr(steps, "Sweep", Twice)
    with pytest.raises(NumericsError, match="each of 12 steps was computed again"):
        timed(configs.load(CONFIG, SMALL))


def test_the_time_of_a_call_includes_what_the_device_still_does_after_it_and_nothing_from_before(
    monkeypatch: pytest.MonkeyPatch,
):
    now = 0.0

    def wait() -> None:
        nonlocal now
        now += 2.0

    monkeypatch.setattr("time.perf_counter", lambda: now)
    with calls.Recorder(wait) as recorder:
        torch.ones(2)
    [seen] = recorder.seen.values()
    assert seen.seconds == {"step": 2.0} and now == 4.0


@pytest.mark.parametrize("more", [[], ['numerics.precision="bf16"'], ['model.mlp="swiglu"', "model.biases=true"]])
def test_a_pass_without_data_makes_the_matrix_products_of_a_real_one(more: list[str]):
    config = configs.load(CONFIG, [*SMALL, *more])

    def products(step: steps.Step) -> Counter[Any]:
        found: Counter[Any] = Counter()
        for seen in step.calls.values():
            if seen.call.product:
                found[seen.call.operator, seen.call.product] += seen.counts["micro_batch"]
        return found

    real = products(steps.take(config, CPU).step)
    assert {key: count / steps.MICRO_BATCHES for key, count in real.items()} == products(steps.trace(config, CPU))


def test_what_a_step_takes_is_told_by_operator_and_held_against_the_measured_step(tree: dict[str, Any]):
    step = tree["step"]
    assert step["ratio"] == step["predicted"] / step["measured"]
    assert bool(step["off"]) == (not step["near"])
    assert {row["operator"] for row in tree["operators"]} >= {"aten.mm.default", "aten._fused_adamw_.default"}
    alone = sum(row["predicted"] + row["calls"] * tree["machine"]["seconds_per_call"] for row in tree["operators"])
    assert alone == pytest.approx(step["predicted"])


def test_a_machine_is_measured_once(tree: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOPROPE_CACHE", str(cache))
    monkeypatch.setattr(Call, "seconds", lambda call, device: pytest.fail(f"{call.operator} is measured again"))
    rates = Rates.open(configs.load(CONFIG, SMALL), CPU)
    rates.prepare("fp32", lambda text: None)
    assert rates.best("fp32") == tree["machine"]["best_flops_per_second"]
    traced = steps.trace(configs.load(CONFIG, SMALL), CPU).timed(rates)
    assert traced.seconds_per("micro_batch") > 0


def test_proposals_keep_parameters_or_flops_and_are_configs_that_load(tree: dict[str, Any]):
    assert tree["proposals"] and [row["gain"] for row in tree["proposals"]] == sorted(
        (row["gain"] for row in tree["proposals"]), reverse=True
    )
    for row in tree["proposals"]:
        config = configs.load(CONFIG, [*SMALL, *row["set"]])
        rows = costs.padded_vocab(costs.vocabulary(config)[0], config.model.vocab_size)
        assert costs.flops_per_token(config.model, rows) == row["flops_per_token"]
        assert proposals.parameters(config.model, rows) == row["parameters"]
        assert min(abs(row["parameters_ratio"] - 1), abs(row["flops_ratio"] - 1)) <= proposals.EQUAL


class OnlyCallsCount(Rates):
    """A machine on which every call takes a millisecond, whatever it computes."""

    def __init__(self) -> None:
        super().__init__(Path("nowhere"), CPU, {"seconds_per_call": 0.0})

    def seconds(self, key: str, call: Call) -> float:
        return 1e-3


def test_where_only_the_number_of_calls_counts_fewer_calls_come_first(cache: Path):
    config = configs.load(CONFIG, [*SMALL, "data.micro_batches=8"])
    rates = OnlyCallsCount()
    # A step that does nothing beside its forward and backward pass.
    traced = steps.trace(config, CPU).timed(rates)
    found = proposals.propose(CONFIG, [*SMALL, "data.micro_batches=8"], config, traced, rates, lambda text: None)
    gains = {row["what"]: row["tokens_gain"] for row in found}
    # Four times the sequences in a quarter of the micro-batches: a quarter of the calls.
    assert gains["micro-batches of 16 sequences"] == pytest.approx(4.0)
    assert gains["micro-batches of 2 sequences"] == pytest.approx(0.5)
    assert next(iter(gains)) == "micro-batches of 16 sequences"


def test_the_share_of_the_best_is_that_of_time():
    row = {"calls": 1, "seconds": 3.0, "flops_per_second": 50.0, "best": 100.0}
    fast = {"calls": 2, "seconds": 0.5, "flops_per_second": 120.0, "best": 100.0}  # noise: no more than the best
    assert share_of_best([row, fast]) == pytest.approx((1.5 + 1.0) / 4.0)
    assert share_of_best([]) is None


def test_a_product_smaller_than_any_of_the_grid_has_no_best_and_no_part_in_the_share():
    rates = Rates(Path("nowhere"), CPU, {"grid": {"fp32": [[2_000_000, 0.01]]}})
    grid_like, small = calls.product(100, 100, 50, torch.float32), calls.product(100, 100, 49, torch.float32)
    seen = {name: calls.Seen(call, {"micro_batch": 1}) for name, call in {"a": grid_like, "b": small}.items()}
    step = steps.Step(seen, 1, alone={"a": 0.01, "b": 0.01})
    rows = matrix_products(step, rates, "fp32")
    assert {row["k"]: row["best"] for row in rows} == {50: 2e8, 49: None}
    assert share_of_best(rows) == pytest.approx(0.5)
    assert share_of_best([row for row in rows if row["best"] is None]) is None


def shown(tree: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(terminal(tree))
    return console.export_text()


def test_what_is_not_known_of_matrix_products_is_shown_as_a_question_mark(tree: dict[str, Any]):
    [product, *_] = tree["matrix_products"]
    text = shown({**tree, "share_of_best": None, "matrix_products": [{**product, "best": None}]})
    assert "matrix products run at ? of the best" in text
    [row] = [line for line in text.splitlines() if f"{product['batch']} × {product['m']} ×" in line]
    assert row.split()[-1] == "?"


def test_the_report_names_the_proposal_to_try_and_is_written_as_it_is(tree: dict[str, Any], tmp_path: Path):
    assert json.loads(files.write_report(tree, tmp_path).read_text()) == tree
    best = tree["proposals"][0]
    assert f"{tree['share_of_best']:.0%}"[:-1] in shown(tree) and best["what"] in shown(tree)
    assert (f"--set {best['set'][0]}" in shown(tree)) == (best["gain"] > 1)
