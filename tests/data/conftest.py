"""Small corpora on disk, and settings that keep their stores in a temporary cache."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.config import Data

WORDS = ["the", "rope", "holds", "what", "the", "climber", "lets", "go", "and", "nothing", "is", "lost"]


def story(number: int) -> str:
    """A document that no other number gives."""
    return f"Story {number}.\n" + " ".join(WORDS[(number + i * i) % len(WORDS)] for i in range(20 + number % 7)) + "\n"


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A jsonl corpus of 60 different documents."""
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story(n)}) + "\n" for n in range(60)))
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Data]:
    """Data settings with a cache of the test's own; 20 % held out, bytes as tokens unless said otherwise."""

    def make(source: Path | str, **others: object) -> Data:
        defaults = {"tokenizer": "bytes", "heldout_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
        return Data.model_validate({"source": str(source), **defaults, **others})

    return make
