"""Promises about what a run's text is: its content, wherever it lies."""

import json
import shutil
from pathlib import Path

import pytest

import trainer
from tests.support import outcome, write_corpus
from tests.test_branch import config
from trainer.errors import RunDirectoryError
from trainer.log import rundir


def taken_back(run: Path, to: Path) -> Path:
    """A copy of the run that has not come beyond step 2."""
    shutil.copytree(run, to)
    for step in (4, 6):
        shutil.rmtree(to / "checkpoints" / f"step-{step:08d}")
    return to


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus `text` and a finished run on it."""
    home = tmp_path_factory.mktemp("identity")
    trainer.train(config(data__source=write_corpus(home / "text")), home / "run")
    return home


def test_the_same_text_at_another_place_resumes_to_the_same_bits(home: Path, tmp_path: Path):
    text = shutil.copytree(home / "text", tmp_path / "elsewhere")
    half = taken_back(home / "run", tmp_path / "half")
    trainer.train(config(data__source=f"{text}/*.txt"), half)
    assert outcome(half) == outcome(home / "run")
    before, now = rundir.read(home / "run"), rundir.read(half)
    assert now["fingerprint"] == before["fingerprint"]
    assert now["config"]["data"]["source"] == f"{text}/*.txt"


def test_one_table_of_the_same_texts_resumes_too(home: Path, tmp_path: Path):
    half, table = taken_back(home / "run", tmp_path / "half"), tmp_path / "all.jsonl"
    texts = [path.read_text() for path in sorted((home / "text").iterdir())]
    table.write_text("".join(json.dumps({"words": text}) + "\n" for text in texts))
    trainer.train(config(data__source=str(table), data__text_column="words"), half)
    assert outcome(half) == outcome(home / "run")


def test_another_text_is_refused_at_the_same_place_and_elsewhere(home: Path, tmp_path: Path):
    source, elsewhere = write_corpus(tmp_path / "text"), write_corpus(tmp_path / "elsewhere")
    run = trainer.train(config(data__source=source), tmp_path / "run").path
    for folder in ("text", "elsewhere"):
        file = tmp_path / folder / "07.txt"
        file.write_text(file.read_text().replace("document", "dokument"))
    with pytest.raises(RunDirectoryError, match=r"was trained on data .{17}, and .*text/\*\.txt' now holds"):
        trainer.train(config(data__source=source), run)
    with pytest.raises(RunDirectoryError, match=r"elsewhere/\*\.txt' \(it was .*text/\*\.txt'\) now holds"):
        trainer.train(config(data__source=elsewhere), run)


def test_other_settings_of_the_data_are_refused_before_any_of_it_is_read(home: Path):
    with pytest.raises(RunDirectoryError, match=r"data\.heldout_fraction: 0\.05 → 0\.2"):
        trainer.train(config(data__source="nowhere.txt", data__heldout_fraction=0.2), home / "run")
    with pytest.raises(RunDirectoryError, match=r'data\.tokenizer: "bytes" → "chars"'):
        trainer.train(config(data__source=f"{home}/text/*.txt", data__tokenizer="chars"), home / "run")
