"""Promises about an optimizer of one's own: it keeps what the built-in ones promise, or is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer
from tests.support import ROOT, SMOKE, outcome, settings, torchrun
from tests.support import trainer as command
from trainer import config as configs
from trainer import costs, own_check, own_code
from trainer.config import Config
from trainer.errors import ConfigError, RunDirectoryError

LION = f"{ROOT}/examples/own_optimizer/lion.py:Lion"
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Lion": {"optim.class": LION, "optim.learning_rate": 3e-4},
    "RMSprop": {"optim.class": "torch.optim:RMSprop", "optim.options.momentum": 0.9},
}
SMALL = {"budget.steps": 4, "data.micro_batches": 5, "eval.max_tokens": 512, "model.context": 12, "model.n_layers": 1}


def config(**changes: Any) -> Config:
    """A small config with Lion; "__" stands for "."."""
    changed = SMALL | {"checkpoint.every_steps": 2, **OPTIMIZERS["Lion"]}
    changed |= {key.replace("__", "."): value for key, value in changes.items()}
    return configs.load(SMOKE, [f"{key}={json.dumps(value)}" for key, value in changed.items()])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_and_three_ranks_replicated_and_sharded_give_the_same_bits(tmp_path: Path):
    cases = {
        f"{name} {strategy}": {
            "config": str(SMOKE),
            "set": [f"{key}={json.dumps(v)}" for key, v in (SMALL | own | {"parallel.strategy": strategy}).items()],
        }
        for name, own in OPTIMIZERS.items()
        for strategy in ("replicate", "fsdp")
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    found = {}
    for size in (1, 3):
        torchrun(size, tmp_path / "cases.json", tmp_path / f"{size}.json", module="tests.equality_worker", timeout=200)
        found[size] = json.loads((tmp_path / f"{size}.json").read_text())
    for name in OPTIMIZERS:
        reference = found[1][f"{name} replicate"]
        assert reference["losses"][0] != reference["losses"][-1]
        for size in found:
            for strategy in ("replicate", "fsdp"):
                assert found[size][f"{name} {strategy}"] == reference, f"{name}, {strategy} on {size} ranks"


@pytest.mark.slow
def test_it_resumes_under_another_sharding_to_the_same_bits_and_not_with_other_code(tmp_path: Path):
    source = Path(LION.partition(":")[0]).read_text()
    (tmp_path / "mine.py").write_text(source)
    mine = config(optim__class=f"{tmp_path}/mine.py:Lion")
    runs = [trainer.train(mine, tmp_path / name).path for name in ("whole", "broken")]
    (runs[1] / "checkpoints" / "step-00000004").rename(tmp_path / "gone")
    (tmp_path / "mine.py").write_text(source.replace("lerp_(p.grad, 1 -", "lerp_(p.grad, 0.5 -"))
    with pytest.raises(RunDirectoryError, match=r"optim\.code mine\.py Lion\.step"):
        trainer.train(mine, runs[1])
    (tmp_path / "mine.py").write_text(f"# A comment changes nothing.\n{source}")
    options = {key.replace(".", "__"): v for key, v in (SMALL | OPTIMIZERS["Lion"]).items()}
    options |= {"optim__class": f"{tmp_path}/mine.py:Lion", "checkpoint__every_steps": 2}
    torchrun(2, "train", SMOKE, "--run", runs[1], *settings(**options, parallel__strategy="fsdp"))
    assert outcome(runs[1]) == outcome(runs[0])


def test_a_run_may_branch_from_another_optimizer_and_its_state_begins_then(tmp_path: Path):
    parent = trainer.train(config(optim__class="", optim__learning_rate=1e-3), tmp_path / "adamw").path
    child = trainer.train(config(budget__steps=6), tmp_path / "lion", parent=parent)
    (warning,) = child.summary()["warnings"]
    assert "does not hold optim.blocks.0.attention.out.weight.own.momentum" in warning["message"]
    on = trainer.train(config(budget__steps=6), tmp_path / "on", parent=f"{child.path}@4")
    assert on.summary()["weights_sha256"] == child.summary()["weights_sha256"]


GOOD = """
import random, time, torch

class Mine(torch.optim.Optimizer):
    calls = 0

    def __init__(self, params, lr, power=1.0):
        super().__init__(params, {"lr": lr})
        self.taken, self.power = 0, power

    @torch.no_grad()
    def step(self, closure=None):
        self.taken += 1
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["n"], state["mean"] = 0, torch.zeros_like(p)
                state["n"] += 1
                state["mean"] += p.grad
                scale = 1.0
                p -= group["lr"] * scale * state["mean"] / state["n"]
"""


def trial(tmp_path: Path, source: str, **changes: Any) -> own_check.Trace:
    (tmp_path / "mine.py").write_text(source)
    made = config(optim__class=f"{tmp_path}/mine.py:Mine", **changes)
    return own_check.trace_optimizer(made, 320, torch.device("cpu"), 2)


@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_a_plain_optimizer_passes_with_numbers_in_its_state(tmp_path: Path, strategy: str):
    assert trial(tmp_path, GOOD, parallel__strategy=strategy) == trial(tmp_path, GOOD, optim__options__power=2.0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("class Mine", "class Mime", r"has no Mine\.\n  Did you mean Mime"),
        ("lr, power=1.0)", "lr, power=1.0", r"mine\.py, line \d+: .*\n +def __init__"),
        ("import random", "import randon", r"cannot be imported: ModuleNotFoundError: .*\n +mine\.py, line 2"),
        ("(torch.optim.Optimizer)", "", r"is no torch\.optim\.Optimizer"),
        ("lr, power", "rate, power", r"does not take .*\n.*called with .*\(groups, lr=…\)"),
        ('{"lr": lr}', '{"lr": lr / 0}', r"cannot be constructed: ZeroDivisionError: .*\n +mine\.py, line \d+"),
        ("p.grad\n", "p.grad.nothing\n", r"cannot take a step: AttributeError: .*\n +mine\.py, line \d+"),
        ("scale = 1.0", "scale = random.random()", "reads global random state, that of Python"),
        ("scale = 1.0", "scale = torch.rand(1)", "reads global random state, that of torch"),
        ("scale = 1.0", "scale = time.perf_counter_ns() % 997", "same steps from the same state give two results"),
        ("scale = 1.0", "scale = 1 / self.taken", "A step after a resume gives another result .* first that differs"),
        ("scale = 1.0", "scale = group['k'] = group.get('k', 0) + 1", "A step after a resume gives another result"),
        ('group["lr"] * scale', "1e-3 * scale", "the same update at twice the learning rate"),
        ("p -= ", "p = p - ", "the same update at twice the learning rate"),
        ('state["n"] += 1', 'state["n"] += 1; state["name"] = "x"', r"keeps 'name', a str\.\n.*A checkpoint holds"),
        ("zeros_like(p)", "zeros_like(p, dtype=torch.bfloat16)", r"keeps 'mean' as torch\.bfloat16"),
        ('state["n"] += 1', 'state["n"] += 1; self.state["all"] = 1', "state that belongs to no parameter: 'all'"),
        ('state["n"] += 1', 'state["n"] += 1; state[f"x{state[\'n\']}"] = 1', "other state after its first step"),
    ],
)  # fmt: skip
def test_an_optimizer_that_cannot_keep_the_promises_is_refused_with_the_place(
    tmp_path: Path, old: str, new: str, message: str
):
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        trial(tmp_path, GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("scale = 1.0", "scale = 1 / p.norm()", "in another way where its rows are on 2 ranks"),
        ("scale = 1.0", 'scale = state["top"] = p.abs().amax(-1, keepdim=True)', r"keeps 'top' of shape \(96, 1\)"),
    ],
)
def test_what_depends_on_whole_parameters_is_refused_where_there_are_shards(
    tmp_path: Path, old: str, new: str, message: str
):
    assert trial(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=rf"{message}.*\n  With parallel.strategy = .fsdp."):
        trial(tmp_path, GOOD.replace(old, new), parallel__strategy="fsdp")


def test_settings_of_the_built_in_optimizers_are_refused_beside_it_and_options_without_it():
    with pytest.raises(ConfigError, match=r"optim\.beta2 has no effect here: it needs an optimizer of toprope's"):
        config(optim__beta2=0.9)
    with pytest.raises(ConfigError, match=r"optim\.options has no effect here: it needs optim\.class"):
        configs.load(SMOKE, ["optim.options.momentum=0.9"])
    with pytest.raises(ConfigError, match=r'optim\.class = "Lion" names no class\.\n  Write "my_opt\.py:MyOptimizer"'):
        configs.load(SMOKE, ["optim.class=Lion"])


def test_a_wrong_optimizer_ends_the_dry_run_too(tmp_path: Path):
    (tmp_path / "mine.py").write_text(GOOD.replace("scale = 1.0", "scale = torch.rand(1)"))
    done = command("train", SMOKE, "--dry-run", *settings(optim__class=f"{tmp_path}/mine.py:Mine"), check=False)
    assert (done.returncode, "reads global random state" in done.stderr) == (2, True)


def test_the_example_is_small_and_its_code_is_part_of_the_fingerprint():
    made = configs.load(ROOT / "examples/own_optimizer/train.toml")
    assert made.optim.class_ == LION
    assert {"optim.code lion.py Lion.step", "optim.class"} <= configs.mathematics(made).keys()
    assert not {key for key in configs.mathematics(Config()) if key.startswith("optim.c") and key != "optim.clip_norm"}
    assert own_code.digests("torch.optim:RMSprop", "optim.class")  # torch's own record is its build
    assert costs.padded_vocab(257, 0) == 320
