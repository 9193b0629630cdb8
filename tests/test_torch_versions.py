"""Other versions of torch: too old is refused, what does not fit is left out and said, wrong gradients are found."""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import SMOKE
from trainer import compile_check, model, torch_versions
from trainer import config as configs
from trainer.data import MicroBatch
from trainer.errors import ConfigError, UsageError
from trainer.launch import torchrun


@pytest.mark.parametrize(
    ("version", "said"),
    [("2.11.0+cu130", ""), ("2.13.0+cpu", ""), ("2.14.1", ""), ("2.15.0", "newer than 2.14"), ("3.0.0a0", "newer")],
)
def test_tested_versions_run_in_silence_and_newer_ones_with_a_notice(version: str, said: str):
    notice = torch_versions.check(version)
    assert said in notice and bool(said) == bool(notice)


@pytest.mark.parametrize(("version", "fact"), [("2.10.0", "torch 2.10.0 is too old"), ("", "torch is not installed")])
def test_an_old_torch_and_none_are_refused_before_any_work(monkeypatch, tmp_path, version: str, fact: str):
    from trainer import api

    monkeypatch.setattr(torch_versions, "installed", lambda: version)
    with pytest.raises(UsageError, match=rf"{fact}(?s:.*)2\.11 to 2\.14"):
        api.train("configs/smoke.toml", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_patch_is_made_where_its_parts_fit():
    made = []
    torch_versions.patch("lost", {"textwrap:dedent": 1, "textwrap:TextWrapper.fill": 2})(made.append)(1)
    assert made == [1]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"no_such_module:x": None}, "no_such_module:x is not there"),
        ({"textwrap:dedent": 1, "textwrap:TextWrapper.gone": 1}, "textwrap:TextWrapper.gone is not there"),
        ({"textwrap:dedent": 2}, "textwrap:dedent does not take 2 arguments"),
    ],
)
def test_a_patch_is_left_out_with_one_line_where_torch_has_something_else(capsys, parts: dict[str, Any], reason: str):
    made = []
    assert torch_versions.patch("restarts are slow.", parts)(made.append)(1) is False
    assert made == []
    assert capsys.readouterr().err == f"toprope: in torch {torch_versions.installed()} {reason}: restarts are slow.\n"


PATCHES = [torchrun._patch_meeting, torchrun._patch_restarts, torchrun._patch_start, torchrun._patch_stopping,
           model._compile_without_limit]  # fmt: skip


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_every_patch_fits_this_torch(patch: Any):
    parts = inspect.getclosurevars(patch).nonlocals["parts"]
    assert parts and torch_versions.misfit(parts) == ""


# The start-up check of compiled gradients. Blocks are traced and not made into C++, which takes a minute.


@pytest.fixture
def traced(monkeypatch) -> Iterator[None]:
    torch._dynamo.reset()
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: compile_block(block, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def checked(**numerics: Any) -> None:
    tree = {
        "model": {"n_layers": 1, "n_heads": 2, "width": 32, "context": 16},
        "data": {"micro_batch_sequences": 2, "tokenizer": "bytes"},
        "numerics": {"compile": True} | numerics,
    }
    ids = torch.randint(0, 257, (2, 17), generator=torch.Generator().manual_seed(1)).numpy()
    batch = MicroBatch(np.arange(2), ids[:, :-1], ids[:, 1:])
    compile_check.check(configs.parse(tree), 320, torch.device("cpu"), batch)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_gradients_that_are_the_eager_ones_pass(traced, precision: str):
    checked(precision=precision)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("wrong_by", [0.0, 0.5, None], ids=["lost", "halved", "cut off"])
def test_training_is_refused_where_a_compiled_gradient_is_wrong(
    traced, monkeypatch, precision: str, wrong_by: float | None
):
    right = model._SquaredReLU.backward

    class Wrong(torch.autograd.Function):
        """Right when eager, wrong when compiled, as RMSNorm's was with torch 2.11."""

        forward = staticmethod(model._SquaredReLU.forward)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            found = right(ctx, grad)
            return found * (wrong_by or 0.0) if torch.compiler.is_compiling() else found

    class CutOff:
        """Without a path to the weights when compiled."""

        @staticmethod
        def apply(x: torch.Tensor) -> torch.Tensor:
            return model.F.relu(x.detach() if torch.compiler.is_compiling() else x).square()

    monkeypatch.setattr(model, "_SquaredReLU", CutOff if wrong_by is None else Wrong)
    with pytest.raises(ConfigError, match=r"compile = true gives wrong gradients(?s:.*)blocks.0.mlp.up.weight"):
        checked(precision=precision)


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
def test_a_torch_whose_compiler_loses_gradients_compiles_the_plain_formula_of_rms_norm(monkeypatch):
    graphs: list[Any] = []

    def note(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    for loses in (False, True):
        torch._dynamo.reset()
        monkeypatch.setattr(model, "LOSES_GRADIENTS", loses)
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        torch.compile(model._rms_normalise, backend=note)(x)
    assert ["autograd_function" in graph for graph in graphs] == [True, False]
    plain, own = (f(x) for f in (lambda x: x * model._rms_scale(x), model._RMSNormalise.apply))
    assert plain.equal(own)
    gradients = [torch.autograd.grad(y.square().sum() + y[0, 0], x)[0] for y in (plain, own)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_a_run_that_compiles_is_checked_before_it_becomes_a_run(monkeypatch, tmp_path):
    from trainer import api

    def refuse(*_: Any) -> None:
        raise ConfigError(["wrong gradients"])

    monkeypatch.setattr(compile_check, "check", refuse)
    config = configs.load(SMOKE, ["numerics.compile=true", 'wandb.mode="disabled"'])
    with pytest.raises(ConfigError, match="wrong gradients"):
        api.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
