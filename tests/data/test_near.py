"""Near-duplicates: sketches that estimate similarity, and what a run reports and drops."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer
from trainer import config as configs
from trainer.config import Data, Eval
from trainer.data import Prepared, near, prepare, tokenizer_for
from trainer.errors import ConfigError, CorpusError

WORDS = [f"{consonant}{vowel}{end}" for consonant in "bcdfghjklm" for vowel in "aeiou" for end in "nrst"]


def text(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def changed(original: str, places: int, seed: int = 0) -> str:
    """The text with as many of its words replaced."""
    words, draw = original.split(), random.Random(seed)
    for place in draw.sample(range(len(words)), places):
        words[place] = draw.choice(["other", "new", "strange"])
    return " ".join(words)


def shingles(document: str) -> set[tuple[str, ...]]:
    words = document.split()
    return set(zip(*(words[n:] for n in range(near.SHINGLE_WORDS)), strict=False))


def jaccard(one: str, other: str) -> float:
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def sketches(*documents: str) -> np.ndarray:
    return np.concatenate([batch.values for batch in near.sketch(documents)])


# Sketches


def test_equal_entries_of_two_sketches_estimate_the_similarity():
    errors, variances = [], []
    for seed in range(200):
        one = text(seed, 200)
        other = changed(one, seed % 25, seed)
        first, second = sketches(one, other)
        true = jaccard(one, other)
        errors.append((first == second).mean() - true)
        variances.append(true * (1 - true) / near.HASHES)
    assert np.mean(errors) == pytest.approx(0.0, abs=4 * np.sqrt(np.mean(variances) / 200))
    assert np.std(errors) == pytest.approx(np.sqrt(np.mean(variances)), rel=0.25)


def test_case_punctuation_and_white_space_do_not_count_and_letters_of_any_script_do():
    plain = text(1)
    first, second = sketches(plain, plain.upper().replace(" ", ",\n  "))
    assert np.array_equal(first, second)
    greek, other = sketches("ὁ βίος βραχύς " * 10, "ἡ δὲ τέχνη μακρή " * 10)
    assert (greek == other).mean() < 0.1


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_a_sketch_is_a_function_of_its_document_alone(lengths: list[int], block: int):
    documents = [text(seed, words) for seed, words in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(near, "_BATCH_BYTES", 100 * block)
        patched.setattr(near, "_BLOCK", 7 * block)
        batches = list(near.sketch(documents))
    numbers = [number for batch in batches for number in batch.numbers.tolist()]
    assert numbers == [n for n, words in enumerate(lengths) if words >= near.FEWEST_WORDS]
    values = [row for batch in batches for row in batch.values]
    for number, row in zip(numbers, values, strict=True):
        assert np.array_equal(row, sketches(documents[number])[0])


def test_a_document_that_is_sketched_in_pieces_loses_only_the_shingles_across_the_cuts(
    monkeypatch: pytest.MonkeyPatch,
):
    document = text(1, 3_000)
    whole = sketches(document)
    monkeypatch.setattr(near, "_PIECE_BYTES", 4_000)
    pieces = sketches(text(2), document, text(3))
    assert len(pieces) == 3
    assert (pieces[1] == whole[0]).mean() > 0.95


def test_near_duplicates_are_found_and_texts_that_share_half_are_not():
    originals = [text(seed, 100) for seed in range(200)]
    index = near.Index(originals)
    alike = [changed(original, 1, seed) for seed, original in enumerate(originals)]
    half = [" ".join(one.split()[:75] + two.split()[:25]) for one, two in zip(originals, alike[1:], strict=False)]
    assert min(map(jaccard, originals, alike)) > 0.87 and max(map(jaccard, originals, half)) < 0.62
    (batch,) = near.sketch(alike)
    found = {number: numbers.tolist() for number, numbers in index.look_up(batch)}
    assert sum(found.get(n) == [n] for n in range(200)) >= 196
    (batch,) = near.sketch(half)
    assert len(list(index.look_up(batch))) <= 1


def test_the_first_of_several_near_duplicates_is_no_repetition():
    seen = near.Repetitions()
    originals = [text(seed, 100) for seed in range(50)]
    for documents in (originals, [changed(one, 1) for one in originals], [text(seed, 100) for seed in range(90, 99)]):
        for batch in near.sketch(documents):
            offset = {id(originals): 0}.get(id(documents), 50 if len(documents) == 50 else 100)
            seen.add(near.Sketches(batch.numbers + offset, batch.values))
    found = seen.find().tolist()
    assert set(found) <= set(range(50, 100)) and len(found) >= 48


def test_nothing_is_found_where_there_is_nothing():
    assert near.Repetitions().find().tolist() == []
    (batch,) = near.sketch([text(1)])
    assert list(near.Index([]).look_up(batch)) == []
    assert list(near.Index(["too short"]).look_up(batch)) == []
    assert [len(batch.numbers) for batch in near.sketch(["", " ", "too short"])] == [0]


# Runs


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Sixty documents; the set "mine" has a near-duplicate of number 7, and a text of its own."""
    for place in ("corpus", "mine"):
        (tmp_path / place).mkdir()
    for number in range(60):
        (tmp_path / "corpus" / f"{number:02}.txt").write_text(text(number))
    (tmp_path / "mine" / "a.txt").write_text(changed(text(7), 1))
    (tmp_path / "mine" / "b.txt").write_text(text(1_000))
    return tmp_path


def prepared(home: Path, sets: tuple[str, ...] = ("val", "mine"), **changes: Any) -> tuple[Prepared, list[str]]:
    said: list[str] = []
    data = Data(
        source=f"{home}/corpus/*.txt", tokenizer="bytes", heldout_fraction=0.2, cache_dir=str(home / "cache"), **changes
    )
    eval = Eval(sets=sets, sources={"mine": f"{home}/mine/*.txt"} if "mine" in sets else {})
    return prepare(data, eval, 16, progress=lambda phase, done, total: said.append(phase)), said


def documents(found: Prepared) -> set[str]:
    tokens = found.train.tokens
    ends = np.flatnonzero(tokens == found.tokenizer.end_of_document)
    return {found.tokenizer.decode(part) for part in np.split(tokens, ends + 1)[:-1]}


def test_a_report_names_the_document_and_changes_nothing(corpus: Path):
    plain, _ = prepared(corpus)
    assert plain.overlap is None
    found, said = prepared(corpus, decontaminate="report")
    assert found.overlap is not None
    mine = found.overlap.report["sets"]["mine"]
    assert (mine["documents"], mine["compared"], mine["found"]) == (2, 2, 1)
    (example,) = mine["examples"]
    assert (Path(example["heldout"]).name, Path(example["train"]).name) == ("a.txt", "07.txt")
    assert found.overlap.report["sets"]["val"]["found"] == 0
    assert any("1 of 2 documents (50.00%) have a near-duplicate in the training text" in line for line in said)
    assert (found.sha256, found.train.directory) == (plain.sha256, plain.train.directory)


def test_what_is_like_a_held_out_document_is_dropped_and_nothing_else(corpus: Path):
    plain, _ = prepared(corpus)
    found, said = prepared(corpus, decontaminate="drop")
    assert documents(plain) - documents(found) == {text(7)}
    assert documents(found) < documents(plain)
    assert np.array_equal(found.eval_sets["val"].tokens, plain.eval_sets["val"].tokens)
    train = found.overlap.report["train"] if found.overlap else {}
    assert f"1 of {train['documents']} training documents are dropped as near-duplicates." in said
    # Another held-out set, other training text: the digest of the data says so.
    clean, _ = prepared(corpus, sets=("val",), decontaminate="drop")
    assert clean.sha256 == plain.sha256 != found.sha256


def test_an_exact_copy_is_refused_unless_it_is_dropped(corpus: Path):
    trained_on = next(n for n in range(60) if text(n) in documents(prepared(corpus)[0]) and n != 7)
    (corpus / "mine" / "c.txt").write_text(text(trained_on))
    for mode in ("off", "report"):
        with pytest.raises(CorpusError, match="shares 1 of its 3 documents with the training split"):
            prepared(corpus, decontaminate=mode)
    found, _ = prepared(corpus, decontaminate="drop")
    assert text(trained_on) not in documents(found)


def test_a_short_copy_is_dropped_too(corpus: Path):
    (corpus / "corpus" / "short.txt").write_text("only some words")
    (corpus / "mine" / "short.txt").write_text("only some words")
    plain = documents(prepared(corpus, sets=("val",))[0])
    assert "only some words" in plain, "it is held out by its hash: choose other words"
    assert "only some words" not in documents(prepared(corpus, decontaminate="drop")[0])


def test_of_near_duplicates_in_the_training_text_the_first_is_kept(corpus: Path):
    (corpus / "corpus" / "70.txt").write_text(again := changed(text(3), 1))
    (corpus / "corpus" / "71.txt").write_text(changed(text(3), 1, seed=1))
    plain = documents(prepared(corpus)[0])
    assert {text(3), again} <= plain, "one is held out by its hash: choose another number"
    found, _ = prepared(corpus, deduplicate="near")
    assert found.overlap is not None
    assert documents(found) == plain - {again, changed(text(3), 1, seed=1)}
    assert found.overlap.report["train"]["repeated"] == len(plain) - len(documents(found))


def test_what_was_found_is_kept_and_found_anew_when_a_held_out_set_changes(corpus: Path):
    _, first = prepared(corpus, decontaminate="report")
    _, second = prepared(corpus, decontaminate="report")
    assert "comparing" in first and "comparing" not in second
    trained_on = next(n for n in range(60) if text(n) in documents(prepared(corpus)[0]) and n != 7)
    (corpus / "mine" / "b.txt").write_text(changed(text(trained_on), 1))
    changed_set, third = prepared(corpus, decontaminate="report")
    assert "comparing" in third and changed_set.overlap is not None
    assert changed_set.overlap.report["sets"]["mine"]["found"] == 2


def test_the_tokenizer_is_trained_on_what_is_left(corpus: Path):
    changes: Any = {
        "tokenizer": "chars",
        "heldout_fraction": 0.2,
        "source": f"{corpus}/corpus/*.txt",
        "cache_dir": str(corpus / "cache"),
    }
    rare = text(7) + " Ω"
    (corpus / "corpus" / "07.txt").write_text(rare)
    held_out = Eval(sets=("val", "mine"), sources={"mine": f"{corpus}/mine/*.txt"})
    assert "Ω" in tokenizer_for(Data(**changes), held_out).to_json().encode().decode("unicode_escape")
    dropping = tokenizer_for(Data(**changes, decontaminate="drop"), held_out)
    assert json.loads(dropping.to_json())["characters"].find("Ω") < 0


def test_a_run_keeps_what_was_found_and_warns_of_it_once(corpus: Path):
    sets = {"every_steps": 0, "max_tokens": 64, "sets": ["val", "mine"], "sources": {"mine": f"{corpus}/mine/*.txt"}}
    text_of_run = {"source": f"{corpus}/corpus/*.txt", "heldout_fraction": 0.2, "decontaminate": "report"}
    small = {"n_layers": 1, "n_heads": 1, "width": 16, "context": 16}
    tree = {"data": {"tokenizer": "bytes", **text_of_run}, "model": small, "budget": {"steps": 1}, "eval": sets}
    config = configs.parse(tree | {"wandb": {"mode": "disabled"}})
    run = trainer.train(config, corpus / "run")
    trainer.train(config, corpus / "run")  # is finished
    (warning,) = [each["message"] for each in run.summary()["warnings"]]
    assert warning.startswith("eval set 'mine': 1 of 2 documents")
    about = json.loads((run.path / "config.json").read_text())
    assert about["near_duplicates"]["sets"]["mine"]["found"] == 1


# Settings


def test_settings_that_change_nothing_keep_the_fingerprint_of_runs_before_them():
    plain = configs.parse({})
    assert "data.decontaminate" not in configs.mathematics(plain) and "data.deduplicate" not in configs.mathematics(
        plain
    )
    prints = {
        (name, value): configs.fingerprint(configs.parse({"data": {name: value}}))
        for name, value in (("decontaminate", "report"), ("decontaminate", "drop"), ("deduplicate", "near"))
    }
    assert prints.pop(("decontaminate", "report")) == configs.fingerprint(plain)
    assert len({*prints.values(), configs.fingerprint(plain)}) == 3


def test_a_comparison_with_no_held_out_set_is_refused():
    with pytest.raises(ConfigError, match=r"data\.decontaminate has no effect here: it needs a held-out set"):
        configs.parse({"data": {"decontaminate": "report"}, "eval": {"sets": []}})
