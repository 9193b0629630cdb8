"""Promises about ensembles: averaged probabilities, scored as one run is scored."""

import json
import math
import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trainer
from tests.support import trainer as command
from tests.support import write_corpus
from tests.test_branch import config
from trainer import checkpoint, ensemble, evaluate
from trainer.config import Config
from trainer.data import EvalWindows
from trainer.ensemble import Member, Mixture
from trainer.errors import CheckpointError, UsageError
from trainer.log import events, rundir, summary
from trainer.parallel.world import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs: three draws of initial weights, two islands, other tokens, other text, other windows."""
    home = tmp_path_factory.mktemp("ensemble")
    text, other = write_corpus(home / "corpus"), write_corpus(home / "other corpus", 41)
    made: dict[str, dict[str, Any]] = {f"draw {draw}": {"model__init_draw": draw} for draw in range(3)}
    made |= {"tokens": {"data__tokenizer": "chars"}, "text": {"data__source": other}, "windows": {"model__context": 8}}
    made["islands"] = {"islands__count": 2, "islands__inner_steps": 3}
    for name, settings in made.items():
        trainer.train(config(**{"data__source": text} | settings), home / name)
    return {name: home / name for name in made}


def test_members_score_as_in_their_logs_and_the_ensemble_is_better_than_their_mean(runs: dict[str, Path]):
    draws = [runs[f"draw {draw}"] for draw in range(3)]
    tree = ensemble.describe(draws)
    for run, found in zip(draws, tree["runs"], strict=True):
        logged = {name: rows[-1][1:] for name, rows in summary.summarise(run)["eval"].items()}
        assert {name: [row["loss"], row["bits_per_byte"]] for name, row in found["eval"].items()} == logged
        assert found["weights_sha256"] == summary.summarise(run)["weights_sha256"]
    for name, mixed in tree["ensemble"].items():
        mean = math.fsum(found["eval"][name]["loss"] for found in tree["runs"]) / 3
        assert mixed["loss"] < mean, "log is concave"
    flops = [found["training_flops"] for found in tree["runs"]]
    assert tree["training_flops"] == sum(flops) and min(flops) == max(flops) > 0


def test_the_order_of_runs_makes_no_difference_to_any_bit_and_weights_follow_their_runs(runs: dict[str, Path]):
    first, second, third = (runs[f"draw {draw}"] for draw in range(3))
    one = ensemble.describe([first, second, third], [3, 1, 1])
    assert ensemble.describe([third, first, second], [1, 3, 1])["ensemble"] == one["ensemble"]
    assert ensemble.describe([first, second, third], [6, 2, 2])["ensemble"] == one["ensemble"], "weights are relative"
    assert ensemble.describe([first, second, third], [1, 3, 1])["ensemble"] != one["ensemble"]
    nearly_one = ensemble.describe([first, second], [1e12, 1])
    (name,) = nearly_one["ensemble"]
    assert nearly_one["ensemble"][name]["loss"] == pytest.approx(nearly_one["runs"][0]["eval"][name]["loss"], abs=1e-5)


def test_every_world_size_gives_the_bits_of_one_process(runs: dict[str, Path]):
    members = ensemble.load([runs["draw 0"], runs["draw 1"]])
    windows, token_bytes = ensemble.windows_of(members[0])
    (name,) = windows
    expected = ensemble.score(members, windows, token_bytes, ALONE)[name]

    class Ranks(World):
        """One of three ranks after another; the sum is that of all."""

        slots: list[Tensor] = []  # noqa: RUF012

        def sum(self, tensor: Tensor) -> None:
            self.slots.append(tensor.clone())
            tensor.copy_(torch.stack(self.slots).sum(0))

    found = [ensemble.score(members, windows, token_bytes, Ranks(rank, 3, ALONE.device))[name] for rank in range(3)]
    assert found[-1] == expected


class Fixed(torch.nn.Module):
    """A model that always gives the same probabilities."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.logits_V = torch.tensor(probabilities).log()

    def forward(self, inputs_BT: Tensor) -> Tensor:
        return self.logits_V.expand(*inputs_BT.shape, -1)


def test_probabilities_are_averaged_not_losses():
    models = {"a": Fixed(0.5, 0.5), "b": Fixed(0.9, 0.1)}
    members = [Member(Path(name), 0.5, Config(), model, name, 1, 1.0) for name, model in models.items()]
    windows = EvalWindows(np.array([0, 0, 1, 1, 1]), context=2, sequences=1, max_tokens=4)
    found = evaluate.evaluate(Mixture(members), windows, np.array([1, 1]), ALONE, nullcontext)
    assert found.loss == pytest.approx(-(math.log(0.7) + 3 * math.log(0.3)) / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("others", "weights", "hint"),
    [
        (["tokens"], [], "has another tokenizer than"), (["text"], [], "has another training text than"),
        (["windows"], [], "has another model.context than"), ([], [], "needs two runs or more"),
        (["draw 1"], [1.0], "has 1 for 2 runs"), (["draw 1"], [1.0, 0.0], "one number above 0 for each run"),
        (["draw 1"], [1.0, math.nan], "one number above 0 for each run"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_one_are_refused_before_any_work(runs, others, weights, hint):
    with pytest.raises(UsageError, match=hint):
        ensemble.load([runs[name] for name in ("draw 0", *others)], weights)


def test_islands_are_a_member_by_their_outer_weights(runs: dict[str, Path]):
    _, member = ensemble.load([runs["draw 0"], runs["islands"]])
    assert member.sha256 == summary.summarise(runs["islands"])["weights_sha256"]


def test_a_run_that_has_not_finished_is_refused(runs: dict[str, Path], tmp_path: Path):
    (log,) = events.events_directory(shutil.copytree(runs["draw 1"], tmp_path / "run")).glob("*.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"attempt_ended"' not in line))
    with pytest.raises(UsageError, match="has not finished"):
        ensemble.load([runs["draw 0"], tmp_path / "run"])


def test_a_run_whose_last_checkpoint_is_damaged_is_refused_until_it_is_resumed(runs: dict[str, Path], tmp_path: Path):
    run = shutil.copytree(runs["draw 1"], tmp_path / "run")
    os.truncate(next(checkpoint.committed(run)[0].path.glob("*.distcp")), 100)
    with pytest.raises(CheckpointError, match="holds other weights than its log ended with"):
        ensemble.load([runs["draw 0"], run])
    trainer.train(rundir.config_of(run), run)
    assert ensemble.load([runs["draw 0"], run])[1].sha256 == summary.summarise(runs["draw 1"])["weights_sha256"]


def test_a_text_that_has_changed_since_is_refused(runs: dict[str, Path], tmp_path: Path):
    member, _ = ensemble.load([runs["draw 0"], runs["draw 1"]])
    data = member.config.data.model_copy(update={"source": write_corpus(tmp_path / "corpus")})
    moved = replace(member, config=member.config.model_copy(update={"data": data}))
    found, expected = (ensemble.windows_of(each)[0] for each in (moved, member))
    assert {name: held_out.digest for name, held_out in found.items()} == {
        name: held_out.digest for name, held_out in expected.items()
    }
    document = tmp_path / "corpus" / "07.txt"
    document.write_text(document.read_text().replace("document 7", "document seven"))
    with pytest.raises(UsageError, match=r"holds another text than .* was trained on"):
        ensemble.windows_of(moved)


def test_the_command_prints_what_the_function_finds(runs: dict[str, Path]):
    names = [str(runs[f"draw {draw}"]) for draw in range(2)]
    assert json.loads(command("ensemble", *names, "--weights", "2,1", "--json").stdout) == ensemble.describe(
        [Path(name) for name in names], [2, 1]
    )
    shown = command("ensemble", *names).stdout
    assert "ensemble" in shown and "a token takes 2 forward passes" in " ".join(shown.split())
