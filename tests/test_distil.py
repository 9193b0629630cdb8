"""Promises about distillation: a run whose target is a mixture of the text and of finished runs' probabilities."""

from pathlib import Path
from typing import Any

import pytest
import torch

import trainer
from tests.support import SMOKE, outcome, settings, torchrun, with_faults, write_corpus
from tests.test_branch import SMALL, config
from trainer import config as configs
from trainer import costs, distil, sample
from trainer import model as models
from trainer.errors import CheckpointError, ConfigError
from trainer.log import rundir, summary
from trainer.model import Lesson

VOCABULARY = 320
ALONE = torch.device("cpu")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs: two draws of initial weights, other tokens, shorter sequences."""
    home = tmp_path_factory.mktemp("teachers")
    text = write_corpus(home / "corpus")
    made: dict[str, dict[str, Any]] = {f"draw {draw}": {"model__init_draw": draw} for draw in (1, 2)}
    made |= {"tokens": {"data__tokenizer": "chars"}, "short": {"model__context": 8}}
    for name, changes in made.items():
        trainer.train(config(**{"data__source": text} | changes), home / name)
    return {name: home / name for name in made} | {"corpus": Path(text)}


def digest_of(teachers: dict[str, Path], name: str) -> str:
    return summary.summarise(teachers[name])["weights_sha256"]


def taught_by(teachers: dict[str, Path], *names: str) -> dict[str, Any]:
    """Settings of a student of these runs."""
    return {
        "data.source": str(teachers["corpus"]), "distil.runs": [str(teachers[name]) for name in names],
        "distil.weights_sha256": [digest_of(teachers, name) for name in names],
    }  # fmt: skip


def student(teachers: dict[str, Path], *names: str, **changes: Any) -> configs.Config:
    named = {key.replace(".", "__"): value for key, value in taught_by(teachers, *names).items()}
    return config(**named | changes)


def test_the_target_is_the_stated_mixture_and_the_loss_that_is_logged_that_of_the_text():
    """By hand: Σ_v target_v · −log p_v, the target being (1 − w)·[the text's token] + w·q."""
    settings_of = config(model__z_loss=0.001).model
    model = models.construct(settings_of, VOCABULARY)
    models.initialise(model, settings_of.model_copy(update={"init": "gpt2"}), 3)
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (torch.randint(0, VOCABULARY, (3, 12), generator=generator) for _ in range(2))
    q_NV = torch.rand(36, VOCABULARY, generator=generator).softmax(-1)
    lesson = Lesson(lambda first, last: q_NV[first:last], 0.25)
    with torch.no_grad():
        found, logits, plain = model(inputs, targets, lesson), model(inputs).flatten(0, 1), model(inputs, targets)
    target = 0.25 * q_NV
    target[torch.arange(36), targets.flatten()] += 0.75
    expected = -(target * logits.log_softmax(-1)).sum(-1).mean() + 0.001 * logits.logsumexp(-1).square().mean()
    assert float(found.objective) == pytest.approx(float(expected), rel=1e-5)
    assert float(found.cross_entropy) == pytest.approx(float(plain.cross_entropy), rel=1e-5)


def test_by_chunks_no_more_than_a_chunk_of_probabilities_is_made_at_a_time():
    chunked = config(model__loss_chunk_tokens=5).model
    whole, parts = (models.construct(one, VOCABULARY) for one in (config().model, chunked))
    asked: list[tuple[int, int]] = []
    q_NV = torch.rand(24, VOCABULARY, generator=torch.Generator().manual_seed(1)).softmax(-1)

    def probabilities(first: int, last: int) -> torch.Tensor:
        asked.append((first, last))
        return q_NV[first:last]

    inputs = torch.arange(24).reshape(2, 12)
    gradients = []
    for model in (whole, parts):
        models.initialise(model, chunked.model_copy(update={"init": "gpt2"}), 3)
        model(inputs, inputs + 1, Lesson(probabilities, 0.5)).objective.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert asked[0] == (0, 24) and max(last - first for first, last in asked[1:]) == 5
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_teachers_are_averaged_and_their_order_makes_no_difference(teachers: dict[str, Path]):
    names = ("draw 1", "draw 2")
    inputs = torch.arange(24).reshape(2, 12)
    one, other = (distil.load(student(teachers, *order), ALONE) for order in (names, names[::-1]))
    assert one is not None and other is not None
    found = one(inputs).probabilities(0, 24)
    assert found.equal(other(inputs).probabilities(0, 24))
    alone = [sample.restore(teachers[name]) for name in names]
    with torch.no_grad():
        expected = torch.stack([model(inputs).softmax(-1) for model in alone]).mean(0).flatten(0, 1)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(one(inputs).probabilities(3, 7), found[3:7], atol=1e-6)
    fingerprints = {configs.fingerprint(student(teachers, *order)) for order in (names, names[::-1])}
    assert len(fingerprints) == 1, "and none for the run"


def test_a_teachers_place_is_not_in_the_fingerprint_and_its_weights_are(teachers: dict[str, Path], tmp_path: Path):
    here = student(teachers, "draw 1")
    moved = here.model_copy(update={"distil": here.distil.model_copy(update={"runs": (str(tmp_path / "copy"),)})})
    plain = config(data__source=str(teachers["corpus"]))
    assert configs.fingerprint(here) == configs.fingerprint(moved)
    others = [student(teachers, "draw 2"), student(teachers, "draw 1", distil__weight=0.75), plain]
    assert len({configs.fingerprint(one) for one in (here, *others)}) == 4
    assert not any(key.startswith("distil") for key in configs.mathematics(plain)), "older runs keep theirs"


def test_a_student_differs_from_the_run_of_the_text_alone_and_its_teachers_passes_are_counted(
    teachers: dict[str, Path], tmp_path: Path
):
    run = trainer.train(student(teachers, "draw 1", "draw 2"), tmp_path / "student").path
    plain = trainer.train(config(data__source=str(teachers["corpus"])), tmp_path / "plain").path
    found, other = summary.summarise(run), summary.summarise(plain)
    assert found["weights_sha256"] != other["weights_sha256"]
    assert found["train"][0] == pytest.approx(other["train"][0], rel=1e-6), (
        "the first loss is that of the text, at the same initial weights"
    )
    expected = [
        {"run": str(teachers[name]), "weights_sha256": digest_of(teachers, name)} for name in ("draw 1", "draw 2")
    ]
    assert (found["teachers"], other["teachers"]) == (expected, [])
    own = rundir.fact(plain, "flops_per_token")
    assert rundir.fact(run, "flops_per_token") == own + 2 * (own // 3)
    assert found["code_length"]["bits"] is None and "teachers" in found["code_length"]["why_unknown"]
    memory = costs.memory_per_rank(student(teachers, "draw 1", "draw 2"), VOCABULARY, 1)
    assert memory["teachers"] == 2 * 4 * rundir.fact(plain, "parameters")


def test_a_teacher_is_counted_at_the_length_of_the_sequences_that_it_reads(teachers: dict[str, Path]):
    shorter = student(teachers, "draw 1", model__context=4)
    assert costs.teaching_flops(shorter, VOCABULARY) == costs.flops_per_token(shorter.model, VOCABULARY) // 3


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_killed_on_two_ranks_and_resumed_on_one_it_ends_with_the_bits_of_a_calm_one(
    teachers: dict[str, Path], tmp_path: Path
):
    calm = trainer.train(student(teachers, "draw 1", "draw 2"), tmp_path / "calm").path
    named = {**SMALL, **taught_by(teachers, "draw 1", "draw 2")}
    options = settings(**{key.replace(".", "__"): value for key, value in named.items()})
    start = ("train", SMOKE, "--run", tmp_path / "run", *options)
    shards = settings(parallel__strategy="fsdp")
    dies = with_faults([{"kind": "exit", "at_step": 5, "rank": 1}])
    assert torchrun(2, *start, *shards, *dies, check=False).returncode != 0
    trainer.train(student(teachers, "draw 1", "draw 2"), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(calm)


@pytest.mark.parametrize(
    ("name", "hint"), [("tokens", "has another tokenizer or vocabulary"), ("short", "has model.context = 8")]
)
def test_runs_that_cannot_teach_are_refused_before_any_work(teachers, tmp_path: Path, name: str, hint: str):
    with pytest.raises(ConfigError, match=hint):
        trainer.train(student(teachers, "draw 1", name), tmp_path / "run")
    assert not rundir.is_run(tmp_path / "run")


def test_a_teacher_with_other_weights_than_named_is_refused(teachers: dict[str, Path], tmp_path: Path):
    wrong = student(teachers, "draw 1", distil__weights_sha256=["0" * 64])
    with pytest.raises(ConfigError, match="ended with weights"):
        trainer.train(wrong, tmp_path / "run")
    with pytest.raises(CheckpointError, match="does not hold the weights 0000"):
        distil.load(wrong, ALONE)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"distil__weights_sha256": []}, "names 1 runs and 0 digests"),
        ({"distil__weights_sha256": ["abc"]}, "is no digest: 64 hex digits"),
        ({"distil__runs": [], "distil__weights_sha256": [], "distil__weight": 0.2}, "distil.weight has no effect"),
        ({"islands__count": 2, "islands__inner_steps": 3}, "does not know islands"),
        ({"parallel__cuda_graphs": True}, "captures the model without the teachers"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], hint: str):
    named: dict[str, Any] = {"distil__runs": ["runs/a"], "distil__weights_sha256": ["ab" * 32]}
    with pytest.raises(ConfigError, match=hint):
        config(**named | changes)


def test_teachers_in_a_file_are_found_from_its_folder(tmp_path: Path):
    path = tmp_path / "student.toml"
    path.write_text(f'[distil]\nruns = ["../teacher"]\nweights_sha256 = ["{"ab" * 32}"]\n')
    (run,) = configs.load(path).distil.runs
    assert Path(run).resolve() == (tmp_path.parent / "teacher").resolve()
