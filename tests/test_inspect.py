"""Promises about the page that `inspect` prints for a person."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from tests.logs import Run, ended, evaluated, killed
from trainer.log.events import Warned
from trainer.log.summary import summarise
from trainer.show.inspect import render


def page(run: Run, checkpoints: Any = (), width: int = 130) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(render(summarise(run.path, checkpoints)))
    return out.getvalue()


def test_the_page_shows_status_losses_attempts_checkpoints_and_each_warning_once(run: Run):
    run.train(1, seconds=0.5)
    for _ in range(2):
        run.write(Warned(message="[slow] disk"))
    run.train(1, seconds=0.5)
    run.steps(60, 60, seconds=0.5, loss=2.0)
    run.write(evaluated(60, 2.5, bits_per_byte=1.25))
    run.end("finished", 60)
    text = page(run, [{"step": 60, "intact": False, "bytes": 2_500_000}])
    for part in (
        "● finished",
        "step 60/60 (100%)",
        "4.9900 → 2.0000 nats",
        "1.2500 bits per byte",
        "4,096 tok/s",
        "died",
        "2.5 MB",
        "damaged",
        "1 replayed, all equal",
        "fffff",
        "warning: [slow] disk (2 times)",
    ):
        assert part in text


def test_bits_per_byte_that_are_unknown_are_a_question_mark_on_the_page(run: Run):
    run.train(60)
    run.write(evaluated(30, bits_per_byte=1.25))
    run.write(evaluated(60, bits_per_byte=None))
    run.write(evaluated(60, set="greek", bits_per_byte=None))
    text = page(run)
    assert "1.2500 → ? bits per byte" in text and "? → ? bits per byte" in text


def test_the_page_shows_what_a_kill_was_and_where_the_time_went(run: Run):
    run.train(47, seconds=0.5)
    run.start(40, after=1.0)
    run.write(killed())
    run.finish(41, 60, seconds=0.5)
    text = page(run)
    for part in ("goodput ", "■ productive", "■ lost steps", " 3.5 ", "rank 1 was killed (SIGKILL) after step 47"):
        assert part in text


@pytest.mark.parametrize("width", [60, 80, 81, 82, 120])
def test_a_hash_is_on_one_line_however_narrow_the_terminal(run: Run, width: int):
    run.train(20, seconds=0.5)
    run.write(Warned(message=f"the weights are {'c' * 64} here and {'d' * 64} there"))
    run.end("failed", 20, reason=f"the data are {'e' * 64}")
    run.start()
    run.steps(1, 60, seconds=0.5)
    run.write(ended("finished", 60, "a" * 64))
    text = page(run, width=width)
    hashes = re.findall(r"([0-9a-f])(?:\1){7,}…?", text)
    assert sorted(hashes) == list("acdeef"), "a hash goes on in the next line"  # e: as an end, and as an incident
    whole = [line.split()[-1] for line in text.splitlines() if line.strip().startswith(("weights_sha", "fingerprint"))]
    assert len(whole) == 2
    assert all(len(word) == 64 or word.endswith("…") for word in whole)
    assert (width < 82) == any(word.endswith("…") for word in whole)


def test_a_run_that_knows_nothing_yet_has_a_page_too(run: Run):
    run.attempt = 0
    run.write(Warned(message="starting"))
    assert "step ?/?" in page(run)
