"""Promises about what a person sees on the console while a run trains."""

import io
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.logs import ended, entry, evaluated, killed, not_finite, started, step
from trainer.config import Config, parse
from trainer.log.events import (
    LOST_A_PEER,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    Entry,
    Event,
    Hung,
    StopRequested,
    Warned,
)
from trainer.show.console import Console, preparation

WEIGHTS = f"weights_sha256 {'a' * 64}"
RUN = Path("runs/a run")
CONFIG: Config = parse({"budget": {"steps": 60}, "checkpoint": {"max_failures": 3}})


def lines_of(*events: tuple[float, Event], earlier: list[Entry] | None = None, **options: Any) -> list[str]:
    """The lines printed for the events of an attempt; if there are `earlier` entries, of the second attempt."""
    out = io.StringIO()
    with Console(CONFIG, RUN, is_terminal=False, file=out, earlier=earlier or (), **options) as console:
        for seconds, event in events:
            console(entry(event, seconds, attempt=int(earlier is not None)))
    return out.getvalue().splitlines()


def test_off_a_terminal_steps_are_printed_first_last_and_every_five_seconds_between():
    lines = lines_of((0, started()), *[(n * 0.5, step(n)) for n in range(1, 61)])
    assert lines[0] == "attempt 0 · 2 ranks (fsdp) on cpu · 1,234,567 parameters · steps 0 → 60 · ready in 2.0 s"
    assert [int(line.split("/")[0].split()[1]) for line in lines[1:]] == [1, 11, 21, 31, 41, 51, 60]
    assert lines[2] == "step 11/60  loss 4.8900  grad 1.250  lr 1.00e-03  4,096 tok/s  left 0:24"


def test_off_a_terminal_evals_checkpoints_and_warnings_are_always_printed():
    lines = lines_of(
        (0, step(1)),
        (0, evaluated(1)),
        (0, evaluated(2, bits_per_byte=None)),
        (0, CheckpointSaved(step=1, bytes=1_500_000, seconds=0.25, stall_seconds=0.1)),
        (0, Warned(message="the disk is slow [really]")),
    )
    assert lines[1:] == [
        "eval  1/60  val 2.5000 nats 1.7000 bpb",
        "eval  2/60  val 2.5000 nats ? bpb",
        "save  1/60  checkpoint  1.5 MB in 0.25 s",
        "warning: the disk is slow [really]",
    ]


KILLED = killed(pid=1)
KILLED_AT_47 = [entry(started(), 0), *[entry(step(n), n) for n in range(1, 48)]]


@pytest.mark.parametrize("killed_first", [False, True])
def test_a_restart_is_one_line_with_what_where_lost_steps_and_seconds(killed_first: bool):
    start = [(50.0, started(40)), (50.0, KILLED)]
    lines = lines_of(*(start[::-1] if killed_first else start), (51, step(41)), earlier=KILLED_AT_47)
    assert len(lines) == 3
    assert (
        "restart  rank 1 was killed (SIGKILL) after step 47; resumed from step 40, 7 steps to replay; "
        "3.0 s without training"
    ) in lines


def test_a_restart_that_no_launcher_explains_is_printed_at_the_next_progress():
    lines = lines_of((50, started(40)), (51, step(41)), earlier=KILLED_AT_47)
    assert lines[1].startswith("restart  ended without a message after step 47; resumed from step 40, 7 steps")
    assert lines[2].startswith("step 41/60")


def test_a_first_start_prints_no_restart():
    assert len(lines_of((0, started()), (1, step(1)))) == 2
    assert "resumed" not in "".join(lines_of((0, started(40)), (0, KILLED), (1, step(41))))


def test_a_preempted_run_names_the_signal_and_later_how_it_resumed():
    stop, end = StopRequested(signal="SIGTERM", step=47), ended("preempted", 47, None)
    before = [*KILLED_AT_47, entry(stop, 48), entry(end, 49)]
    assert lines_of((48, stop), (49, end)) == [
        "stop  SIGTERM asked to stop: leaving at step 47",
        "preempted step 47/60  SIGTERM",
        "next  the same command resumes 'runs/a run'",
    ]
    assert lines_of((60, started(47)), (61, step(48)), earlier=before)[1] == (
        "resume  preempted (SIGTERM) after step 47; resumed from step 47, no steps to replay; 11.0 s without training"
    )


def test_a_failed_save_is_loud_and_says_what_follows():
    reason = "[Errno 28] No space left on device\n  somewhere"
    assert lines_of(
        (0, CheckpointFailed(step=40, reason=reason, in_a_row=1)),
        (9, CheckpointFailed(step=50, reason="EIO", in_a_row=3)),
    ) == [
        "SAVE FAILED  the save of step 40 failed ([Errno 28] No space left on device); "
        "training continues, 2 more in a row would stop it",
        "SAVE FAILED  the save of step 50 failed (EIO), 3 in a row; the run stops",
    ]


def test_damage_hangs_and_values_that_are_not_finite_are_a_line_each():
    culprit = {"rank": 1, "point": "before_reduce", "step": 47, "why": "does not answer"}
    assert lines_of(
        (0, CheckpointRejected(step=40, reason="rank-0.safetensors: checksum differs")),
        (1, not_finite(48)),
        (2, not_finite(48, trial=1)),
        (3, Hung(step=47, point="in_eval", seconds=10.0, culprits=[culprit], collective="x", stacks="stacks/a")),
        (4, Hung(step=47, point="in_eval", seconds=10.0, culprits=[], collective=None, stacks="")),
    ) == [
        "checkpoint  the checkpoint of step 40 is damaged and was passed over (rank-0.safetensors: checksum differs)",
        "not finite  step 48 was not finite (loss nan, gradient norm inf), computed again",
        "not finite  step 48 was not finite (loss nan, gradient norm inf), and not when computed again: the run stops",
        "hung  rank 1 hung at before_reduce (no progress for 10.0 s; it does not answer); pending: x; "
        "stacks in stacks/a; this process ends",
        "hung  rank 0 hung at in_eval (no progress for 10.0 s); this process ends",
    ]


@pytest.mark.parametrize(
    ("events", "line"),
    [
        (
            [step(60), evaluated(60), ended()],
            f"finished step 60/60  val 2.5000 nats 1.7000 bpb  4,096 tok/s  {WEIGHTS}",
        ),
        ([started(60), ended()], f"finished step 60/60  {WEIGHTS}"),
        ([started(0), ended("preempted", 7, None)], "preempted step 7/60  SIGTERM"),
        ([ended("failed", 7, None, reason="RuntimeError: gone\n  at x")], "failed step 7/60  RuntimeError: gone"),
    ],
)
def test_the_end_says_how_a_run_ended_with_its_weights_and_leaves_out_what_is_unknown(events: list[Event], line: str):
    assert lines_of(*[(0, event) for event in events])[-2] == line


@pytest.mark.parametrize(
    ("end", "is_restarted", "last"),
    [
        (ended(), False, "next  python -m trainer inspect 'runs/a run'"),
        (ended(), True, "next  python -m trainer inspect 'runs/a run'"),
        (ended("preempted", 7, None), True, "next  the same command resumes 'runs/a run'"),
        (
            ended("failed", 7, None, reason="EIO"),
            False,
            "next  python -m trainer inspect 'runs/a run'; the same command resumes the run",
        ),
        (ended("failed", 7, None, reason="EIO"), True, "failed step 7/60  EIO"),
        (ended("failed", 7, None, reason=LOST_A_PEER), True, "lost a peer after step 7/60"),
    ],
)
def test_the_last_line_names_run_directory_and_next_command_unless_workers_start_again(
    end: Event, is_restarted: bool, last: str
):
    assert lines_of((0, end), is_restarted=is_restarted)[-1] == last


def test_every_line_is_flushed():
    class Watched(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    out = Watched()
    console = Console(CONFIG, RUN, is_terminal=False, file=out)
    console(entry(step(1), 0))
    assert out.flushed == out.getvalue() != ""


def test_an_output_whose_reader_has_left_does_not_stop_the_run():
    reading, writing = os.pipe()
    os.close(reading)
    file = os.fdopen(writing, "w")
    with Console(CONFIG, RUN, is_terminal=False, file=file) as console:
        console(entry(step(1), 0))
        console(entry(step(60), 9))
    with pytest.raises(BrokenPipeError):
        file.close()


def test_on_a_terminal_permanent_lines_stay_and_the_cursor_comes_back_even_after_an_exception():
    out = io.StringIO()

    def interrupted() -> None:
        with Console(CONFIG, RUN, is_terminal=True, file=out) as console:
            console(entry(started(), 0))
            console(entry(step(1), 1))
            console(entry(evaluated(1), 1))
            console(entry(Warned(message="[red]not markup"), 1))
            console(entry(step(30), 2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown = out.getvalue()
    assert "step 30/60" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "[red]not markup" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor stays hidden"


def test_on_a_terminal_redrawing_is_throttled_and_the_hash_is_one_uncut_word():
    out = io.StringIO()
    with Console(CONFIG, RUN, is_terminal=True, file=out) as console:
        console(entry(step(1), 0))
        drawn = len(out.getvalue())
        for n in range(2, 31):
            console(entry(step(n), 0.005 * n))
        assert len(out.getvalue()) == drawn
        console(entry(ended(), 1))
    assert "a" * 64 in out.getvalue()


def test_the_live_line_leaves_standard_output_as_it_was():
    before = sys.stdout, sys.stderr
    with Console(CONFIG, RUN, is_terminal=True, file=sys.stdout) as console:
        console(entry(step(1), 0))
        console(entry(step(2), 9))
    assert (sys.stdout, sys.stderr) == before


def test_a_quiet_step_costs_far_less_than_fifty_microseconds():
    for is_terminal in (False, True):
        with Console(CONFIG, RUN, is_terminal=is_terminal, file=io.StringIO()) as console:
            console(entry(step(1), 0))
            quiet = entry(step(2), 0.001)
            seconds = []
            for _ in range(2_000):
                before = time.perf_counter()
                console(quiet)
                seconds.append(time.perf_counter() - before)
        assert sorted(seconds)[1_000] < 20e-6  # measured: 0.3


def test_preparation_says_each_phase_once_and_nothing_when_disabled():
    out = io.StringIO()
    with preparation(file=out) as progress:
        for done in (0, 1_000_000, 2_000_000):
            progress("encoding", done, None)
        progress("training a tokenizer", 3_000_000, 6_000_000)
    with preparation(enabled=False, file=out) as progress:
        progress("encoding", 0, None)
    assert out.getvalue().splitlines() == ["encoding", "training a tokenizer  3.0 MB of 6.0 MB"]
