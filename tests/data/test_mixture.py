"""Promises about mixtures: several sources with weights."""

import hashlib
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import trainer
from tests.support import SMOKE
from trainer import config as configs
from trainer import data, job, tomlfile
from trainer.config import Config
from trainer.data.batches import Batches, Share, Turns
from trainer.errors import ConfigError, CorpusError

WEIGHTS = {"letters": 0.25, "digits": 0.75}
SMALL: dict[str, Any] = {
    "data.max_megabytes": 0.0, "data.tokenizer": "bytes", "data.micro_batches": 4, "data.micro_batch_sequences": 2,
    "model.context": 16, "data.heldout_fraction": 0.2, "budget.steps": 6, "eval.sets": ["val"], "eval.max_tokens": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of documents that share one; a text of letters and one of digits can be told apart by any window."""
    home = tmp_path_factory.mktemp("mixture")
    for name, first in (("letters", ord("a")), ("digits", ord("0"))):
        (home / name).mkdir()
        for number in range(40):
            drawn = hashlib.sha512(f"{name} {number}".encode()).digest() * 2
            text = "".join(chr(first + byte % 10) for byte in drawn)
            (home / name / f"{number:02}.txt").write_text(text)
    (home / "digits" / "shared.txt").write_text((home / "letters" / "03.txt").read_text())
    return home


def config(home: Path, sources: dict[str, dict[str, Any]] | None = None, **changes: Any) -> Config:
    chosen = sources or {name: {} for name in WEIGHTS}
    tables = [
        {"name": name, "source": f"{home / name}/*.txt", "weight": WEIGHTS.get(name, 0.5), "epochs": 9} | more
        for name, more in chosen.items()
    ]
    settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()} | {"data.mixture": tables}
    return configs.load(SMOKE, [f"{key}={tomlfile.text(value)}" for key, value in settings.items()])


def prepared(config: Config) -> data.Prepared:
    return data.prepare(config.data, config.eval, config.model.context)


def text_of(tokens: np.ndarray, end: int) -> str:
    return bytes(int(token) for token in tokens if token != end).decode()


weights_of_a_whole = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(weights_of_a_whole, st.integers(0, 500))
def test_no_source_is_ever_a_whole_turn_ahead_or_behind_its_weight(parts: list[int], start: int):
    shares = [Share(str(n), 0, 1, Fraction(part, sum(parts))) for n, part in enumerate(parts)]
    turns = Turns(shares)
    sources, before = turns.at(np.arange(start + 300))
    for number, share in enumerate(shares):
        counts = np.concatenate([[0], np.cumsum(sources == number)])
        wanted = [share.weight * n for n in range(len(counts))]
        assert all(math.floor(w) <= n <= math.ceil(w) for w, n in zip(wanted, counts, strict=True))
        assert before[sources == number].tolist() == list(range(counts[-1]))


@given(weights_of_a_whole, st.integers(1, 50), st.integers(1, 3))
def test_a_source_is_exhausted_at_the_position_that_reads_it_once_too_often(parts: list[int], count: int, epochs: int):
    shares = [Share(str(n), 0, count, Fraction(part, sum(parts))) for n, part in enumerate(parts)]
    turns = Turns(shares)
    for number in range(len(shares)):
        position = turns.exhausted_at(number, epochs)
        source, before = turns.at(np.array([position]))
        assert (source[0], before[0]) == (number, count * epochs)


def test_each_source_reads_all_of_its_own_windows_once_an_epoch_in_an_order_of_its_own():
    shares = [Share("a", 0, 7, Fraction(1, 4)), Share("b", 9, 20, Fraction(3, 4))]
    tokens = np.arange(40 * 8 + 1, dtype=np.uint16)

    def make(seed: int = 1) -> Batches:
        return Batches(tokens, seed=seed, context=8, micro_batches=3, sequences=4, mixture=shares)

    read = np.concatenate([batch.sample_ids for step in range(20) for batch in make().for_step(step)])
    for share in shares:
        mine = read[(read >= share.first) & (read < share.first + share.count)]
        epochs = mine[: len(mine) // share.count * share.count].reshape(-1, share.count)
        assert len(epochs) > 1 and len({tuple(epoch) for epoch in epochs}) == len(epochs)
        assert all(sorted(epoch) == list(range(share.first, share.first + share.count)) for epoch in epochs)
    assert len(set(read[: make().n_windows])) == make().n_windows, "nothing before that is read twice"
    assert len(set(read[: make().n_windows + 1])) == make().n_windows
    alone = make().micro_batch(5, 1)
    assert make().for_step(5)[1].sample_ids.tolist() == alone.sample_ids.tolist(), "a function of step and index"
    assert make(2).micro_batch(5, 1).sample_ids.tolist() != alone.sample_ids.tolist()


def test_a_mixture_has_each_document_in_one_place_and_the_text_of_each_source_apart(home: Path):
    found = prepared(config(home))
    end = found.tokenizer.end_of_document
    train, val = found.train.parts["train"], found.train.parts["heldout"]
    assert list(train.sources) == list(val.sources) == list(WEIGHTS)
    for part in (train, val):
        (_, middle), (start, last) = part.sources.values()
        assert (middle, last) == (start, len(part.tokens))
        assert text_of(part.tokens[:middle], end).isalpha() and text_of(part.tokens[middle:], end).isdigit()
    assert (train.documents + val.documents, found.train.tally.duplicates) == (80, 1), (
        "the shared one belongs to letters"
    )
    assert set(found.eval_sets) == {"val", "val/letters", "val/digits"}
    parts = [found.eval_sets[f"val/{name}"].tokens for name in WEIGHTS]
    assert np.concatenate(parts).tolist() == val.tokens.tolist()


def test_batches_have_the_weights_and_windows_of_no_two_sources(home: Path):
    settings = config(home)
    batches = job.batches_of(settings, prepared(settings))
    rows = np.concatenate([batch.inputs for step in range(6) for batch in batches.for_step(step)])
    kinds = [text_of(row, 256) for row in rows]
    assert all(kind.isalpha() or kind.isdigit() for kind in kinds)
    assert sum(kind.isalpha() for kind in kinds) == len(kinds) / 4


def test_a_run_on_a_mixture_logs_the_loss_of_each_source_and_its_weights_change_the_run(home: Path, tmp_path: Path):
    run = trainer.train(config(home), tmp_path / "run")
    assert {row["set"] for row in run.evaluations()} == {"val", "val/letters", "val/digits"}
    assert configs.as_toml(run.config) and configs.parse(run.config.model_dump()) == run.config
    (tmp_path / "config.toml").write_text(configs.as_toml(run.config))
    assert configs.load(tmp_path / "config.toml") == run.config
    other = config(home, {"letters": {"weight": 0.5}, "digits": {"weight": 0.5}})
    assert configs.fingerprint(other) != configs.fingerprint(run.config)


@pytest.mark.parametrize(
    ("sources", "changes", "hint"),
    [
        ({"letters": {}, "digits": {"weight": 0.5}}, {}, "sum to 0.75"),
        ({"letters": {"weight": 0.0}, "digits": {"weight": 1.0}}, {}, "weight is 0, so it is never read"),
        ({"letters": {"weight": 0.33333}, "digits": {"weight": 0.66667}}, {}, "finer than 1/10,000"),
        ({"letters": {"name": "digits"}, "digits": {}}, {}, "is no name of its own"),
        ({"letters": {"source": ""}, "digits": {}}, {}, "data.mixture[0] has no source"),
        ({"letters": {"source": "my.py:texts"}, "digits": {}}, {}, "is a function of your own"),
        (None, {"data__unique_tokens": 64}, "data.unique_tokens has no effect with data.mixture"),
        (None, {"data__max_megabytes": 1.0}, "data.source and data.max_megabytes have no effect"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(home: Path, sources: Any, changes: dict[str, Any], hint: str):
    with pytest.raises(ConfigError) as caught:
        config(home, sources, **changes)
    assert hint in str(caught.value)


def test_a_source_that_its_weight_exhausts_early_is_told_with_the_step(home: Path):
    settings = config(home, {"letters": {"epochs": 1}, "digits": {}}, budget__steps=500)
    found = prepared(settings)
    with pytest.raises(CorpusError, match=r"source 'letters' of the mixture is exhausted at step (\d+)") as caught:
        job.batches_of(settings, found)
    step = int(str(caught.value).split("at step ")[1].split(":")[0])
    enough = settings.model_copy(update={"budget": settings.budget.model_copy(update={"steps": step - 1})})
    assert job.batches_of(enough, found), "a step less is enough"


def test_a_source_without_a_whole_sequence_is_refused(home: Path):
    few = config(home, {"letters": {"max_megabytes": 0.00001}, "digits": {}})
    with pytest.raises(CorpusError, match="source 'letters' of the mixture has"):
        job.batches_of(few, prepared(few))
