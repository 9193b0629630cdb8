"""Promises about text that a function of one's own yields: read as a file is, or refused with the document."""

import json
from pathlib import Path
from typing import Any

import pytest

import trainer
from tests.support import ROOT, SMOKE, outcome, settings, torchrun
from tests.test_branch import SMALL, config
from trainer import config as configs
from trainer import data
from trainer.config import Data
from trainer.data.corpus import open_corpus
from trainer.errors import ConfigError, CorpusError, RunDirectoryError, TopropeError

GOOD = """
import random

WORDS = [f"word {n} of a text that goes on for a while, and then some more of it" for n in range(60)]

def documents():
    for n, words in enumerate(WORDS):
        yield words
"""


def source(folder: Path, text: str = GOOD) -> str:
    (folder / "mine.py").write_text(text)
    return f"{folder}/mine.py:documents"


def read(name: str, **changes: Any) -> list[tuple[str, str]]:
    return [(document.origin, document.text) for document in open_corpus(Data(source=name, **changes)).documents()]


def test_texts_are_documents_with_a_name_or_a_number(tmp_path: Path):
    named = read(source(tmp_path, 'def documents():\n    return [("a", "one"), "two", "two", " "]\n'))
    assert named == [("a", "one"), ("mine.py:documents, document 2", "two")]
    endless = source(tmp_path, "import itertools\ndef documents():\n    yield from map(str, itertools.count(10**9))\n")
    assert len(read(endless, max_megabytes=1e-3)) == 100


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def documents", "def dokuments", r"has no documents\.\n  Did you mean dokuments"),
        ("enumerate(WORDS):", "enumerate(WORDS)", r"mine\.py, line 7: .*\n +for n"),
        ("import random", "import randon", r"cannot be imported: ModuleNotFoundError: .*\n +mine\.py, line 2"),
        ("yield words", "yield words.encode()", r"document 1 is of type bytes\.\n.* Decode the bytes"),
        ("yield words", "yield None", r"document 1 is of type NoneType\.\n  A document is text"),
        ("yield words", "yield n, words", r"document 1 is of type \(int, str\)"),
        ("yield words", "yield words if n < 50 else 1 / 0", r"cannot yield its .*ZeroDivisionError: .*\n +mine.*8"),
        ("documents():", "documents(folder):", r"cannot yield its documents: TypeError: .*missing 1 required"),
        ("def documents", "documents = 3\ndef other", r"is no function but a int"),
        ("    for n", "    return 'one text'\n    for n", r"mine\.py:documents holds no text"),
        ("yield words", "yield words + str(random.random())", r"yields other text when it is run again"),
    ],
)  # fmt: skip
def test_a_function_that_yields_no_texts_is_refused_with_the_place(tmp_path: Path, old: str, new: str, message: str):
    assert old in GOOD
    made = source(tmp_path, GOOD.replace(old, new))
    with pytest.raises(TopropeError, match=message):  # noqa: PT012
        settings = configs.load(SMOKE, [f'data.source="{made}"', f'data.cache_dir="{tmp_path}/cache"'])
        data.prepare(settings.data, settings.eval, settings.model.context)


def test_a_single_text_that_is_returned_is_no_corpus_of_characters(tmp_path: Path):
    with pytest.raises(CorpusError, match=r"returned one str\.\n  It yields documents"):
        read(source(tmp_path, "def documents():\n    return 'one text'\n"))


def test_it_trains_as_a_file_with_the_same_text_does_and_the_file_may_take_its_place(tmp_path: Path):
    run = trainer.train(config(data__source=source(tmp_path)), tmp_path / "run").path
    lines = tmp_path / "words.jsonl"
    space: dict[str, Any] = {}
    exec(GOOD, space)
    lines.write_text("".join(json.dumps({"text": words}) + "\n" for words in space["WORDS"]))
    other = trainer.train(config(data__source=str(lines)), tmp_path / "other").path
    assert outcome(other) == outcome(run)
    (tmp_path / "elsewhere").mkdir()
    trainer.train(config(data__source=source(tmp_path / "elsewhere")), run)
    trainer.train(config(data__source=str(lines)), run)
    with pytest.raises(RunDirectoryError, match=r"data\.code mine\.py"):
        trainer.train(config(data__source=source(tmp_path, GOOD.replace("for a while", "forever"))), run)


def test_a_file_that_it_reads_is_part_of_its_text(tmp_path: Path):
    (tmp_path / "words.txt").write_text("\n".join(f"word {n} " * 12 for n in range(60)))
    words = f"pathlib.Path({str(tmp_path / 'words.txt')!r}).read_text()"
    reading = f"import pathlib\ndef documents():\n    return {words}.splitlines()\n"
    reads = config(data__source=source(tmp_path, reading))
    run = trainer.train(reads, tmp_path / "run").path
    (tmp_path / "words.txt").write_text("\n".join(f"word {n} " * 13 for n in range(60)))
    with pytest.raises(RunDirectoryError, match=r"was trained on data .* now holds"):
        trainer.train(reads, run)


@pytest.mark.slow
def test_ranks_that_read_other_text_are_refused_and_equal_ones_end_alike(tmp_path: Path):
    one = trainer.train(config(data__source=source(tmp_path)), tmp_path / "one").path
    options = settings(**{key.replace(".", "__"): value for key, value in SMALL.items()})
    command = ("train", SMOKE, *options, *settings(data__source=f"{tmp_path}/mine.py:documents"))
    torchrun(2, *command, "--run", tmp_path / "two")
    assert outcome(tmp_path / "two") == outcome(one)
    source(tmp_path, GOOD.replace("yield words", "yield words + __import__('os').environ['RANK']"))
    refused = torchrun(2, *command, "--run", tmp_path / "three", check=False)
    assert refused.returncode != 0
    assert "holds another text on rank 1 than on rank 0" in refused.stderr + refused.stdout


def test_a_held_out_set_may_be_a_function_too(tmp_path: Path):
    (tmp_path / "held.py").write_text('def documents():\n    yield "something else to be read " * 20\n')
    (tmp_path / "mine.toml").write_text(
        f'extends = "{SMOKE}"\neval = {{ sets = ["val", "held"], sources = {{ held = "held.py:documents" }} }}\n'
    )
    made = configs.load(tmp_path / "mine.toml")
    assert made.eval.sources["held"] == f"{tmp_path}/held.py:documents"
    (tmp_path / "held.py").write_text("def documents(:\n")
    with pytest.raises(ConfigError, match=r"held\.py, line 1"):
        configs.load(tmp_path / "mine.toml")


def test_the_example_yields_functions_by_name():
    made = configs.load(ROOT / "examples/own_corpus/train.toml")
    documents = read(made.data.source)
    assert len(documents) > 100
    assert documents[0][1].startswith("def ")
    assert "data.code functions.py documents" in configs.mathematics(made)
    assert json.loads(made.model_dump_json())["data"]["source"].endswith("own_corpus/functions.py:documents")
