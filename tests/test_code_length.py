"""Promises about the length of the code that a run's first epoch makes of its text."""

import bz2
import gzip
import json
import lzma
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainer
from tests.logs import Run, started, step
from tests.support import SMOKE, write_corpus
from tests.support import trainer as command
from trainer import config as configs
from trainer.data import Batches, first_epoch, prepare
from trainer.errors import RunDirectoryError, UsageError
from trainer.log import code_length, events
from trainer.log.summary import summarise

CONTEXT, STEPS = 32, 36


def small(corpus: str, **changes: Any) -> configs.Config:
    settings = {
        "budget.steps": STEPS, "checkpoint.every_steps": 0, "data.source": corpus, "data.micro_batch_sequences": 2,
        "data.micro_batches": 5, "eval.max_tokens": 128, "model.n_layers": 1, **changes,
    }  # fmt: skip
    return configs.load(SMOKE, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def batches_of(config: configs.Config) -> Batches:
    data, prepared = config.data, prepare(config.data, config.eval, CONTEXT)
    m, b = data.micro_batches, data.micro_batch_sequences
    return Batches(prepared.train.tokens, seed=config.seed, context=CONTEXT, micro_batches=m, sequences=b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[configs.Config, Path]:
    """A run that goes beyond its first epoch."""
    home = tmp_path_factory.mktemp("code")
    config = small(write_corpus(home / "corpus"))
    return config, trainer.train(config, home / "run").path


def test_the_length_is_that_of_the_losses_over_each_text_that_is_read_for_the_first_time(finished):
    config, run = finished
    batches, tokens_per_step = batches_of(config), 10 * CONTEXT
    last = batches.n_windows // 10
    assert 0 < last < STEPS, "the run must go beyond its first epoch"
    code = summarise(run)["code_length"]
    losses = [loss for _, loss in summarise(run)["train"]]
    # The tokenizer is "bytes": every token is a byte, but for the one that ends a document.
    read = np.concatenate([batch.targets.ravel() for n in range(last) for batch in batches.for_step(n)])
    assert (code["steps"], code["first_epoch_steps"], code["complete"]) == (last, last, True)
    assert (code["tokens"], code["bytes"]) == (last * tokens_per_step, (read < 256).sum())
    assert code["bits"] == pytest.approx(sum(losses[:last]) * tokens_per_step / math.log(2), rel=1e-12)
    assert code["bits_per_byte"] == code["so_far"][-1][1] == code["bits"] / code["bytes"]
    assert (code["with_dropout"], code["why_unknown"]) == (False, None)
    assert events.select(events.read(run), events.StepDone)[-1][1].text_bytes is None, "not of the first epoch"


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_the_text_of_the_first_epoch_is_the_training_text_once(tmp_path: Path, tokenizer: str):
    named = {"data.tokenizer": tokenizer} | ({"data.vocab_size": 300} if tokenizer == "bpe" else {})
    config = small(write_corpus(tmp_path / "corpus"), **named, **{"data.micro_batches": 1})
    prepared, batches = prepare(config.data, config.eval, CONTEXT), batches_of(config)
    pieces, last = prepared.tokenizer.pieces, first_epoch.steps(batches)
    read = list(first_epoch.text(batches, last, pieces))
    by_window: dict[int, bytes] = {}
    for n in range(last):
        (batch,) = batches.for_step(n)
        assert first_epoch.text_bytes(batches, n, prepared.tokenizer.token_bytes) == len(read[n])
        by_window |= {
            int(sample): b"".join(pieces[token] for token in row)
            for sample, row in zip(batch.sample_ids, batch.targets, strict=True)
        }
    assert batches.n_windows - len(by_window) < 2, "all windows but those that fill no step"
    text = "".join(path.read_text() for path in sorted((tmp_path / "corpus").iterdir()))
    # A window may lie across two documents; windows in a row are the text without its first token.
    for sample in sorted(by_window)[:50]:
        start, end = sample * CONTEXT + 1, (sample + 1) * CONTEXT + 1
        parts = np.split(prepared.train.tokens[start:end], np.flatnonzero(
            prepared.train.tokens[start:end] == prepared.tokenizer.end_of_document))  # fmt: skip
        shown = [prepared.tokenizer.decode(part) for part in parts]
        assert "".join(shown).encode() == by_window[sample]
        assert all(part in text for part in shown)


def test_compressors_read_the_bytes_that_the_model_read_in_the_same_order(finished):
    config, run = finished
    code = summarise(run)["code_length"]
    text = bytes(
        token for n in range(code["steps"]) for batch in batches_of(config).for_step(n)
        for token in batch.targets.ravel().tolist() if token < 256
    )  # fmt: skip
    sizes = {"gzip": gzip.compress(text, 9), "bzip2": bz2.compress(text, 9), "xz": lzma.compress(text, preset=9)}
    found = code_length.compressors(run, code)
    assert {name: found[name] for name in sizes} == {name: 8 * len(z) / len(text) for name, z in sizes.items()}
    assert set(found) == {*sizes, "zstd"}


def test_inspect_shows_the_length_beside_the_compressors(finished):
    _, run = finished
    code = json.loads(command("inspect", run, "--json", "--compress").stdout)["code_length"]
    assert code["compressors"]["gzip"] > 0
    page = " ".join(command("inspect", run, "--compress").stdout.split())
    assert f"{code['bits_per_byte']:.4f} bits per byte over the first epoch, {code['bytes']:,} bytes" in page
    assert f"gzip {code['compressors']['gzip']:.4f}" in page


def test_other_text_at_the_same_place_is_not_compressed(finished, tmp_path: Path):
    config, run = finished
    corpus = Path(config.data.source).parent
    code, kept = summarise(run)["code_length"], (corpus / "00.txt").read_text()
    (corpus / "00.txt").write_text("other text " * 40)
    try:
        with pytest.raises(RunDirectoryError, match="another text than"):
            code_length.compressors(run, code)
    finally:
        (corpus / "00.txt").write_text(kept)


# Logs


def calm(last: int) -> Iterator[events.StepDone]:
    return (step(n, text_bytes=2_000 + n) for n in range(1, last + 1))


def code_of(run: Run) -> dict[str, Any]:
    return summarise(run.path)["code_length"]


def log(run: Run, first: int, last: int) -> None:
    for event in list(calm(last))[first - 1 :]:
        run.write(event)


def test_a_replayed_step_counts_once_and_a_restart_changes_no_bit(run: Run, tmp_path: Path):
    other = Run(tmp_path / "calm")
    other.record()
    other.start(record=False)
    other.write(started(first_epoch_steps=50))
    log(other, 1, 40)
    for from_step, last in ((0, 17), (10, 13), (0, 25), (25, 40)):
        run.start(from_step, record=False)
        run.write(started(from_step, first_epoch_steps=50))
        log(run, from_step + 1, last)
    assert code_of(run) == code_of(other)
    assert (code_of(run)["steps"], code_of(run)["complete"]) == (40, False)
    assert code_of(run)["bytes"] == sum(2_000 + n for n in range(1, 41))
    # A reader that follows the log while it grows, as W&B's does, has the same.
    following = code_length.CodeLength()
    for entry in run.entries:
        following.observe(entry.event)
    assert following.sums[-1].bits == code_of(run)["bits"]


@pytest.mark.parametrize(
    ("start", "first", "why"),
    [
        ({}, 1, "older toprope"),
        ({"first_epoch_steps": 0}, 1, "more than an epoch"),
        ({"first_epoch_steps": 50}, 11, "does not have step 1:"),
    ],
)
def test_a_length_that_is_not_known_says_why_and_is_compared_with_nothing(
    run: Run, start: dict[str, Any], first: int, why: str
):
    run.start(record=False)
    run.write(started(first - 1, **start))
    log(run, first, 20)
    code = code_of(run)
    assert (code["bits"], code["bits_per_byte"], code["so_far"]) == (None, None, [])
    assert why in code["why_unknown"]
    with pytest.raises(UsageError, match="has no code length"):
        code_length.compressors(run.path, code)
