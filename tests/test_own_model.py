"""Promises about a model of one's own: it keeps what the built-in one promises, or is refused with the reason."""

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ROOT, SMOKE, outcome, settings, torchrun, trainer, with_faults
from trainer import config as configs
from trainer import costs, model, own_check, own_code
from trainer.chaos import plan
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.ladder.plan import load as ladders

EXAMPLE = ROOT / "examples/own_model"
MODELS = {
    "recurrent": {"model.class": f"{EXAMPLE}/recurrent.py:Recurrent", "model.options.penalty": 0.001},
    "experts": {"model.class": f"{ROOT}/tests/own_models/experts.py:Mixture", "model.options.experts": 3},
}
SMALL = {"budget.steps": 2, "data.micro_batches": 5, "eval.max_tokens": 60, "model.context": 6}
"""The second step uses the optimizer's state of the first; an evaluation has five batches."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "replicate": {},
    "fsdp": {"parallel.strategy": "fsdp"},
    "fsdp, recomputed": {"parallel.strategy": "fsdp", "parallel.activation_checkpointing": True},
    "hybrid": {"parallel.strategy": "hybrid"},
}
WORLDS = {1: ("replicate", "fsdp"), 2: ("replicate", "fsdp, recomputed"), 3: ("fsdp",), 4: ("replicate", "hybrid")}
"""Layouts at each number of ranks: every one somewhere, and the uneven shares of 3 and 4 of 5 micro-batches."""
WORLDS_OF_VARIANTS = {1: ("replicate",), 2: ("replicate",), 3: ("fsdp",), 4: ("hybrid",)}
"""Layouts for changes of how a step computes, not how ranks share it: every number of ranks and every strategy."""
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"numerics.precision": "bf16"},
    "with optimizer and text of one's own": {
        "optim.class": f"{ROOT}/examples/own_optimizer/lion.py:Lion", "optim.learning_rate": 3e-4,
        "data.source": f"{ROOT}/examples/own_corpus/functions.py:documents",
    },
}  # fmt: skip


def worlds_of(variant: str) -> dict[int, tuple[str, ...]]:
    return WORLDS if variant == "fp32" else WORLDS_OF_VARIANTS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    directory, found = tmp_path_factory.mktemp("own"), {}
    for size in WORLDS:
        cases = {
            f"{name} {variant} {layout}": {
                "config": str(SMOKE),
                "set": [
                    f"{key}={json.dumps(value)}" for key, value in (SMALL | own | changes | LAYOUTS[layout]).items()
                ],
            }
            for name, own in MODELS.items()
            for variant, changes in VARIANTS.items()
            for layout in worlds_of(variant)[size]
        }
        (directory / f"cases{size}.json").write_text(json.dumps(cases))
        result = directory / f"{size}.json"
        torchrun(size, directory / f"cases{size}.json", result, module="tests.equality_worker", timeout=200)
        found[size] = json.loads(result.read_text())
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_one_to_four_ranks_replicated_sharded_and_hybrid_give_the_same_bits(trained, name: str, variant: str):
    reference = trained[1][f"{name} {variant} replicate"]
    assert reference["losses"][0] != reference["losses"][-1]
    for size, layouts in worlds_of(variant).items():
        for layout in layouts:
            assert trained[size][f"{name} {variant} {layout}"] == reference, f"{layout} on {size} ranks"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_resumes_to_the_same_bits_and_not_with_other_code(tmp_path: Path):
    shutil.copytree(ROOT / "tests/own_models", tmp_path / "own")
    (tmp_path / "mine.toml").write_text(
        f'extends = "{SMOKE}"\n[model]\nclass = "own/experts.py:Mixture"\noptions = {{ experts = 2 }}\n'
    )
    options = settings(budget__steps=6, checkpoint__every_steps=2, data__micro_batches=4)
    runs = [tmp_path / "calm", tmp_path / "broken"]
    trainer("train", tmp_path / "mine.toml", "--run", runs[0], *options)
    again = ("train", tmp_path / "mine.toml", "--run", runs[1], *options)
    assert trainer(*again, *with_faults([{"kind": "exit", "at_step": 5}]), check=False).returncode != 0
    routing = tmp_path / "own/routing.py"
    original = routing.read_text()
    routing.write_text(original.replace(".relu()", ".sigmoid()"))
    refused = trainer(*again, check=False)
    assert refused.returncode == 2
    assert "model.code routing.py Experts.forward" in refused.stderr
    routing.write_text(f"# A comment changes nothing.\n{original}")
    trainer(*again)
    assert outcome(runs[1]) == outcome(runs[0])


def own(tmp_path: Path, source: str, **changes: Any) -> Config:
    """The smoke config with a model of this source; `changes` are to settings, with "__" for "."."""
    (tmp_path / "mine.py").write_text(source)
    changed = {"model__class": f"{tmp_path}/mine.py:Mine", "model__n_layers": 1, "data__micro_batch_sequences": 2}
    return configs.load(SMOKE, settings(**(changed | changes))[1::2])


GOOD = """
import random, numpy, torch
from torch import nn
import torch.nn.functional as F

class Mine(nn.Module):
    calls = 0

    def __init__(self, settings, vocab_size, options):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, settings.width)
        self.layers = nn.ModuleList(nn.Linear(settings.width, settings.width) for _ in range(2))
        self.drop = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, vocab_size)
        self.init()

    def init(self):
        pass

    def body(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x

    def forward(self, inputs, targets):
        logits = self.head(self.norm(self.body(self.embed(inputs))))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, loss
"""


def trial(config: Config) -> own_check.Trace:
    return own_check.trace(config, 320, torch.device("cpu"))


def test_a_model_that_declares_nothing_is_found_out(tmp_path: Path):
    config = own(tmp_path, GOOD)
    assert trial(config) == trial(config)
    made: Any = model.build(config, 320, torch.device("cpu"))
    assert model.blocks_of(made) == list(made.layers)
    roles = model.role_of_parameters(made)
    assert (roles["embed.weight"], roles["head.weight"]) == (model.Role.EMBEDDING, model.Role.HEAD)
    width, vocab = config.model.width, 320
    assert costs.flops_per_token(config.model, vocab) == 3 * 2 * (2 * width * width + width * vocab)
    # Values depend on seed and name alone, not on what else there is.
    first = made.layers[0].weight.clone()
    more = own(tmp_path, GOOD.replace("self.init()", "self.more = nn.Linear(3, 3)"))
    assert model.build(more, 320, torch.device("cpu")).get_parameter("layers.0.weight").equal(first)


def test_with_dropout_the_generator_of_torch_may_be_used_in_training(tmp_path: Path):
    drops = GOOD.replace("self.norm(self.body", "self.norm(self.drop(self.body").replace("(inputs))))", "(inputs)))))")
    assert trial(own(tmp_path, drops, model__dropout=0.1))
    with pytest.raises(ConfigError, match=r"module drop reads global random state, that of torch"):
        trial(own(tmp_path, drops))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("class Mine", "class Mime", "has no Mine.\n  Did you mean Mime?"),
        ("super().__init__()\n", "super().__init__(\n", r"mine.py, line \d+: .*\n +super"),
        ("import random", "import randon", "cannot be imported: ModuleNotFoundError: .*\n +mine.py, line 2"),
        ("settings, vocab_size, options)", "width)", "does not take what a model is made from"),
        ("nn.Dropout(0.1)", "nn.Dropout(settings.rate)", "cannot be constructed: AttributeError: .*\n +mine.py, line"),
        ("(nn.Module)", "", "is no torch.nn.Module"),
        ("self.embed(inputs)", "self.embed(inputs).view(-1, 3)", "cannot compute a micro-batch.*\n +mine.py, line"),
        ("return loss, loss", "return loss", r"returned \(\)\."),
        ("return loss, loss", "return logits, loss", r"objective a tensor of shape \(2, 32, 320\)"),
        ("return loss, loss", "return loss.double(), loss", "objective a tensor of shape .* and torch.float64"),
        ("return loss, loss", "return loss.detach(), loss", "objective without a gradient"),
        ("return x", "return x.detach()", r"no gradient for embed.weight, layers.0.weight"),
        ("x = layer(x)", "x = layer(x + random.random())", "reads global random state, that of Python"),
        ("x = layer(x)", "x = layer(x + numpy.random.rand())", "reads global random state, that of numpy"),
        ("x = layer(x)", "x = layer(x + torch.rand(1))", "reads global random state, that of torch"),
        ("x = layer(x)", "Mine.calls += 1; x = layer(x + Mine.calls)", "twice gives two results.* module layers.0"),
        ("nn.LayerNorm(settings.width)", "Norm(settings.width)", "buffer norm.inner.running_mean changes"),
        ("self.init()", "self.half()", "embed.weight is torch.float16"),
        ("self.init()", "self.scale = nn.Parameter(torch.ones(()))", "scale has no axis"),
        ("self.init()", "self.embed.requires_grad_(False)", "embed.weight takes no gradient"),
        ("self.init()", 'self.head.role = "exit"', "module head has role = 'exit'"),
        ("def init(self):", "def initial_value(self, name, shape, generator):\n        return 1\n    def init(self):",
         "initial_value of parameter embed.weight returned int"),
        ("def init(self):", "def initial_value(self, name):\n        return None\n    def init(self):",
         "cannot be given its initial values: TypeError"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_keep_the_promises_is_refused_with_the_place(
    tmp_path: Path, old: str, new: str, message: str
):
    norm = """
class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.BatchNorm1d(width)
    def forward(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)
"""
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        trial(own(tmp_path, GOOD.replace(old, new) + norm))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("self.init()", "self.layers[1].weight = self.layers[0].weight", "layers.1.weight and layers.0.weight are one"),
        ("for layer in self.layers", "for layer in [*self.layers, self.layers[0]]", "block layers.0 is called 2 times"),
    ],
)
def test_what_shards_cannot_hold_is_refused_where_there_are_shards(tmp_path: Path, old: str, new: str, message: str):
    assert trial(own(tmp_path, GOOD.replace(old, new)))
    with pytest.raises(ConfigError, match=message):
        trial(own(tmp_path, GOOD.replace(old, new), parallel__strategy="fsdp"))


def test_another_process_that_computes_other_numbers_is_refused_naming_the_module(tmp_path: Path):
    config = own(tmp_path, GOOD)
    found = trial(config)
    name = "the output of module layers.0"
    other = [(key, "0" if key == name else digest) for key, digest in found]
    with pytest.raises(ConfigError, match=r"Rank 0 and rank 1 compute different numbers: .* module layers.0"):
        own_check.compare(own_code.find(config.model.class_), [found, other], 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factor", "message"),
    [
        ("hash('a') % 9973", "This process and a second one compute different numbers"),
        ("os.path.getsize(__file__)", "than the process that began the run"),
    ],
)
def test_another_process_that_computes_other_numbers_is_refused_at_the_start_or_at_a_resume(
    tmp_path: Path, factor: str, message: str
):
    source = GOOD.replace("import random", "import os, random").replace("layer(x)", f"layer(x * ({factor}))")
    own(tmp_path, source)
    command = ("train", SMOKE, "--run", tmp_path / "run", *settings(model__class=f"{tmp_path}/mine.py:Mine"))
    first = trainer(*command, *settings(budget__steps=1), check=False)
    if "began" in message:
        assert first.returncode == 0, first.stderr
        own(tmp_path, f"{source}# a comment, which is no other code\n")
        first = trainer(*command, *settings(budget__steps=1), check=False)
    assert first.returncode == 2
    assert message in first.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "strategy", "ranks"), [("experts", "fsdp", 3), ("recurrent", "hybrid", 4)])
def test_a_sharded_run_under_faults_resumes_and_ends_as_a_calm_one_on_one_rank(
    tmp_path: Path, name: str, strategy: str, ranks: int
):
    chosen = MODELS[name] | SMALL | {"budget.steps": 6, "checkpoint.every_steps": 2}
    options = settings(**{key.replace(".", "__"): value for key, value in chosen.items()})
    faults = [{"kind": "nan_gradient", "at_step": 3, "rank": 1}, {"kind": "sigkill", "at_step": 5, "rank": 2}]
    trainer("train", SMOKE, "--run", tmp_path / "calm", *options)
    placed = settings(parallel__strategy=strategy)
    command = ("train", SMOKE, "--run", tmp_path / "storm", *options, *placed, *with_faults(faults))
    torchrun(ranks, *command, restarts=5, timeout=250)
    assert outcome(tmp_path / "storm") == outcome(tmp_path / "calm")


def test_a_wrong_model_ends_train_and_dry_run_with_2_before_anything_is_written(tmp_path: Path):
    own(tmp_path, GOOD.replace("return loss, loss", "return loss"))
    for options in (["--dry-run"], ["--run", tmp_path / "run"]):
        command = ("train", SMOKE, *options, *settings(model__class=f"{tmp_path}/mine.py:Mine"))
        done = trainer(*command, check=False)
        assert (done.returncode, "A model returns" in done.stderr) == (2, True)
    assert not (tmp_path / "run/config.json").exists()


def test_content_and_not_the_place_is_what_the_fingerprint_holds(tmp_path: Path):
    prints = []
    for number, line in enumerate(("", "# a comment", "", "WIDE = 1")):
        folder = tmp_path / str(number)
        shutil.copytree(ROOT / "tests/own_models", folder)
        routing = folder / "routing.py"
        routing.write_text(f"{line}\n{routing.read_text()}")
        file = folder / "mine.toml"
        file.write_text(
            f'extends = "{SMOKE}"\nmodel = {{ class = "experts.py:Mixture", options = {{ experts = 2 }} }}\n'
        )
        prints.append(configs.fingerprint(configs.load(file)))
    assert prints[0] == prints[1] == prints[2] != prints[3]
    assert "model.class" not in configs.mathematics(Config())


def test_an_importable_class_and_a_file_give_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sizes.py").write_text("FACTOR = 2\n")
    (package / "mine.py").write_text(GOOD + "\nfrom .sizes import FACTOR\n")
    config = configs.load(SMOKE, ['model.class="my_package.mine:Mine"'])
    assert {key.split()[1] for key in configs.mathematics(config) if key.startswith("model.code")} == {
        "my_package/mine.py",
        "my_package/sizes.py",
    }
    alike = own(tmp_path, GOOD, model__n_layers=config.model.n_layers)
    assert trial(config) == trial(alike)


def test_what_runs_before_the_class_is_recorded_and_what_is_installed_beside_it_is_not(tmp_path: Path, monkeypatch):
    home = tmp_path / "site-packages"
    monkeypatch.syspath_prepend(str(home))
    (home / "their_package" / "deep").mkdir(parents=True)
    (home / "their_package" / "__init__.py").write_text("WIDTH = 3\n")
    (home / "their_package" / "deep" / "__init__.py").touch()
    (home / "their_package" / "deep" / "mine.py").write_text(GOOD + "\nimport others\nfrom .. import WIDTH\n")
    (home / "others.py").write_text("import everything\n")
    found = own_code.files(own_code.find("their_package.deep.mine:Mine"))
    assert list(found) == ["their_package/__init__.py", "their_package/deep/__init__.py", "their_package/deep/mine.py"]


def test_an_import_from_above_the_folder_of_a_file_is_not_its_own(tmp_path: Path):
    (tmp_path / "helper.py").write_text("X = 1\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.py").write_text("from ..helper import X\n\nclass Mine: ...\n")
    assert list(own_code.files(own_code.find(f"{tmp_path}/own/mine.py:Mine"))) == ["mine.py"]


def test_an_edited_helper_is_loaded_again(tmp_path: Path):
    def head_scale() -> float:
        built = model.construct(own(tmp_path, GOOD + "\nfrom scale_of_mine import K\nMine.k = K\n").model, 320)
        return built.k  # type: ignore[return-value]

    (tmp_path / "scale_of_mine.py").write_text("K = 1\n")
    assert head_scale() == 1
    (tmp_path / "scale_of_mine.py").write_text("K = 22\n")
    assert head_scale() == 22


def test_a_property_is_digested_with_its_setter_and_getter():
    getter, setter = "@property\n    def x(self):\n        return {}", "@x.setter\n    def x(self, v):\n        pass"
    text = f"class A:\n    {getter}\n    {setter}\n"
    one, two = (own_code.digests_of(ast.parse(text.format(value))) for value in (1, 2))
    assert one != two


def test_a_campaign_names_a_model_from_its_own_folder(tmp_path: Path):
    own(tmp_path, GOOD)
    text = f'question = "q"\nconfig = "{SMOKE}"\nset = {{ model.class = "mine.py:Mine" }}\n[[runs]]\nname = "calm"\n'
    (tmp_path / "campaign.toml").write_text(text)
    campaign = plan.load(tmp_path / "campaign.toml")
    assert campaign.config is not None and campaign.config.model.class_ == f"{tmp_path}/mine.py:Mine"


def test_options_without_a_class_and_a_class_that_is_none_are_refused():
    with pytest.raises(ConfigError, match=r"model\.options has no effect here: it needs model\.class"):
        configs.load(SMOKE, ["model.options.experts=2"])
    with pytest.raises(ConfigError, match=r'model\.class = "MyGPT" names no class'):
        configs.load(SMOKE, ["model.class=MyGPT"])
    with pytest.raises(ConfigError, match=r"no such module can be imported"):
        configs.load(SMOKE, ["model.class=nowhere_at_all:MyGPT"])


def test_the_example_is_at_most_80_lines_and_its_ladder_has_arms_of_code():
    files = [path for path in EXAMPLE.iterdir() if path.is_file()]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 80
    ladder = ladders.load(EXAMPLE / "ladder.toml")
    assert [arm.name for arm in ladder.arms] == ["A/A", "recurrent", "last gate open"]
    assert len({run.key for run in ladder.runs}) == len(ladder.runs)
    by_arm = {run.arm: run for run in ladder.runs if run.rung == "large"}
    assert by_arm["recurrent"].config.model.class_ == f"{EXAMPLE}/recurrent.py:Recurrent"
    assert by_arm["recurrent"].flops_per_token < by_arm["baseline"].flops_per_token
    assert configs.load(EXAMPLE / "train.toml").model.options == {"penalty": 1e-4}
