"""Operators against references: right ones are never accused, wrong ones always, whatever is wrong about them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import SMOKE, trainer
from trainer import config as configs
from trainer.errors import EXIT_FINISHED
from trainer.faults import wrong_operators
from trainer.hunt import burnin
from trainer.sentinel.operator_check import OperatorCheck, as_numpy, excesses
from trainer.sentinel.operators import Expected

SMALL = ["data.micro_batch_sequences=2", 'parallel.device="cpu"', "model.n_layers=1"]
MODELS = {
    "as smoke": [],
    "as GPT-2, with dropout": [
        'model.norm="layernorm"', 'model.mlp="gelu"', 'model.positions="learned"', "model.biases=true",
        "model.tied_embeddings=true", 'model.init="gpt2"', "model.dropout=0.1",
    ],
    "with all extras": [
        'model.mlp="swiglu"', "model.logit_softcap=15.0", "model.z_loss=1e-4", "model.value_embeddings=true",
        "model.bigram_buckets=128", "model.n_kv_heads=1", 'optim.optimizer="muon"', "model.n_layers=2",
    ],
    "in bfloat16": ['numerics.precision="bf16"', "model.n_kv_heads=1"],
}  # fmt: skip
WRONG = {
    wrong_operators.RareSum: {"aten.sum.dim_IntList", "aten.mean.dim"},
    wrong_operators.WrongSoftmax: {"aten._log_softmax.default"},
    wrong_operators.WrongIndexAdd: {"aten.embedding_dense_backward.default", "aten.index_add.default"},
    wrong_operators.WrongMatmul: {"aten.mm.default", "aten.addmm.default"},
    wrong_operators.WrongCast: {"aten._to_copy.default", "aten.copy_.default"},
}


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_steps_of_every_model_are_right_and_all_of_their_operators_have_a_reference(overrides: list[str]):
    config, _ = burnin.swept(configs.load(SMOKE, [*SMALL, *overrides]))
    check = OperatorCheck()
    burnin.Sweep(config, torch.device("cpu")).run(check)
    assert check.failures == []
    drawn = {"aten.bernoulli_.float", "aten.empty_like.default"} if "model.dropout=0.1" in overrides else set()
    assert {name for name, _ in check.unchecked} == drawn
    assert sum(tally.calls for tally in check.tallies.values()) > 400


def burn_in() -> dict[str, Any]:
    return burnin.burn_in(configs.load(SMOKE, SMALL), 0, lambda text: None)


def test_a_right_machine_passes_and_repeats_itself_to_the_bit():
    tree = burn_in()
    assert tree["passed"], tree
    (device,) = tree["devices"]
    assert device["failures"] == device["differing"] == device["unchecked"] == []
    assert device["repeats"] >= 1 and device["cases"] > 50


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_wrong_operator_fails_the_burn_in_and_no_other_is_accused(wrong: type[wrong_operators.WrongOperator]):
    with wrong() as machine:
        (device,) = burn_in()["devices"]
    assert machine.wrong > 0 and not device["passed"]
    accused = {failure["operator"] for failure in device["failures"]}
    assert accused and accused <= WRONG[wrong], device["failures"]


def test_an_operator_that_gives_other_bits_now_and_then_fails_the_burn_in(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []

    def case() -> list[torch.Tensor]:
        calls.append(1)
        return [torch.ones(3) * (1 + 1e-7 * (len(calls) % 3 == 0))]

    monkeypatch.setattr(burnin, "hard_cases", lambda device, dtype: [("a passing fault", case)])
    (device,) = burnin.burn_in(configs.load(SMOKE, SMALL), 0.02, lambda text: None)["devices"]
    assert device["differing"] == ["a passing fault"] and not device["passed"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_what_moves_numbers_must_return_them_to_the_bit(dtype: torch.dtype):
    x = (torch.randn(200, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    right = Expected(as_numpy(x))
    assert excesses(as_numpy(x), right, dtype).max() == 0
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    x.view(integers)[17] ^= 1
    assert (excesses(as_numpy(x), right, dtype) > 1).nonzero()[0].tolist() == [17]


def test_infinities_and_nan_are_right_only_where_the_reference_has_them():
    value = np.array([1.0, np.nan, np.inf, 1e39, -np.inf])
    assert excesses(np.array([1.0, np.nan, np.inf, np.inf, -np.inf]), Expected(value), torch.float32).max() == 0
    wrong = excesses(np.array([np.nan, 1.0, 1.0, 1.0, np.inf]), Expected(value), torch.float32)
    assert np.isinf(wrong[[0, 1, 2, 4]]).all() and wrong[3] > 1


def test_what_changes_its_arguments_is_held_against_what_they_were():
    with OperatorCheck() as check:
        x = torch.arange(12.0).reshape(3, 4).t()
        x.add_(1).mul_(2)
        x[1].copy_(torch.ones(3))
        torch.add(x, x, out=torch.empty(4, 3))
    assert check.failures == [] and check.tallies["aten.add_.Tensor"].calls == 1
    assert check.tallies["aten.add.out"].calls == 1


def test_a_replaced_operator_returns_its_reference():
    x = torch.randn(70, 65536, generator=torch.Generator().manual_seed(0))
    right = x.sum(0)
    with wrong_operators.StridedSum() as machine, OperatorCheck(replace=["aten.sum.dim_IntList"]) as check:
        found = x.sum(0)
    assert machine.wrong and check.tallies["aten.sum.dim_IntList"].failed == 1
    torch.testing.assert_close(found, right)


def test_the_command_writes_a_report_and_says_what_it_did(tmp_path: Path):
    done = trainer("burnin", SMOKE, "--minutes", "0", "--device", "cpu", "--out", tmp_path, "--json")
    tree = json.loads(done.stdout)
    assert done.returncode == EXIT_FINISHED and tree["passed"]
    assert json.loads((tmp_path / "report.json").read_text()) == tree


@pytest.mark.parametrize(
    "compute",
    [
        lambda: torch.full((3,), 0.1) > 0.1, lambda: torch.full((3,), 0.1) == 0.1, lambda: torch.full((3,), 0.3) != 0.3,
        lambda: torch.ones(9, dtype=torch.bfloat16) + 0.1, lambda: 0.1 - torch.ones(9, dtype=torch.bfloat16),
        lambda: torch.ones(9, dtype=torch.bfloat16).add(torch.ones(9, dtype=torch.bfloat16), alpha=-0.1),
        lambda: 0.9 ** torch.arange(100.0), lambda: torch.linspace(0.1, 9, 50) ** 3.7,
        lambda: torch.linspace(0.1, 9, 50).bfloat16() ** 0.3, lambda: torch.ones(9, dtype=torch.bfloat16) % 0.1,
    ],
)  # fmt: skip
def test_a_right_operator_with_a_plain_number_is_not_accused(compute: Any):
    with OperatorCheck() as check:
        compute()
    assert not check.failures
