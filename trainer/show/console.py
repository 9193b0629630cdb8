"""The display of a run that trains: a live line on a terminal, plain and rate-limited lines anywhere else.

A subscriber to the event log: it only reads, and may neither slow training nor stop it.
"""

import contextlib
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self, TextIO

from trainer.config import Config
from trainer.log.events import (
    LOST_A_PEER,
    AttemptEnded,
    AttemptStarted,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    Entry,
    EvalDone,
    Hung,
    NotFinite,
    StepDone,
    StopRequested,
    Warned,
)
from trainer.log.incidents import IncidentBuilder, describe, first_line
from trainer.show.live import BAR_WIDTH, LiveTable, bar
from trainer.show.units import clock, loss, megabytes, tokens_per_second

if TYPE_CHECKING:
    from rich.text import Text

TERMINAL_SECONDS = 0.2  # a redraw costs about 1 ms of the training thread
PLAIN_SECONDS = 5.0
STATUS_STYLES = {"finished": "bold green", "preempted": "bold yellow", "failed": "bold red"}


@contextlib.contextmanager
def preparation(enabled: bool = True, file: TextIO | None = None) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield the `progress(phase, done_bytes, total_bytes)` for data preparation: it prints a line per phase.

    During a longer phase it prints its progress at most every 5 seconds. Nothing is printed if nothing is prepared.
    """
    last_phase, printed_at = "", 0.0
    screen = LiveTable(file)

    def progress(phase: str, done: int, total: int | None) -> None:
        nonlocal last_phase, printed_at
        now = time.monotonic()
        if not enabled or (phase == last_phase and now - printed_at < PLAIN_SECONDS):
            return
        last_phase, printed_at = phase, now
        amount = f"  {megabytes(done)}" if done else ""
        total_amount = f" of {megabytes(total)}" if done and total else ""
        screen.print(f"{phase}{amount}{total_amount}")

    yield progress


class Console:
    """Prints one process's events for a person. Use as a context manager, or call close(): it frees the terminal.

    `is_terminal` None asks `file` (default: standard output). Plain lines are flushed one by one; steps are printed at
    the first, at the last, and at most every 5 seconds between. A file that cannot be written any more (a closed pipe
    or terminal) ends the printing, not the run. `earlier` is the log of the attempts before: one line says how the last
    of them ended and what that cost. The last line names the directory `run` and the next command, unless a launcher
    restarts the workers when they fail.
    """

    def __init__(
        self, config: Config, run: Path, is_terminal: bool | None = None, file: TextIO | None = None,
        earlier: Iterable[Entry] = (), is_restarted: bool = False,
    ) -> None:  # fmt: skip
        self._steps, self._max_failures = config.budget.steps, config.checkpoint.max_failures
        self._run, self._is_restarted = shlex.quote(str(run)), is_restarted
        self._incidents = IncidentBuilder(earlier)
        self._screen = LiveTable(file, is_terminal=is_terminal)
        self._interval_seconds = TERMINAL_SECONDS if self._screen.is_terminal else PLAIN_SECONDS
        self._first_step: tuple[int, float] | None = None
        self._printed_at = float("-inf")
        self._since_printed, self._whole_attempt = _Rate(), _Rate()
        self._evals: dict[str, EvalDone] = {}

    def __call__(self, entry: Entry) -> None:
        for incident in self._incidents.add(entry):
            # How an earlier attempt ended is known only now, as this one resumes.
            if incident.ends_attempt:
                verb = "resume" if incident.kind == "preempted" else "restart"
                self._screen.print(f"{verb}  {incident.text}", "bold yellow")
        if isinstance(entry.event, StepDone):
            self._show_step(entry.event, entry.time)
        else:
            self._show_other(entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Erase the live line and show the cursor again. Harmless when called twice."""
        self._screen.close()

    def _show_step(self, event: StepDone, now: float) -> None:
        for rate in (self._since_printed, self._whole_attempt):
            rate.tokens, rate.seconds = rate.tokens + event.tokens, rate.seconds + event.seconds
        if self._first_step is None:
            self._first_step = (event.step, now)
        elif 0 <= now - self._printed_at < self._interval_seconds and event.step != self._steps:
            return  # most steps end here, within a microsecond; a negative interval means that the clock was set back
        self._printed_at = now
        first_step, first_time = self._first_step
        # By the wall clock since this attempt's first step, so evaluations and checkpoints count.
        passed = (now - first_time) / (event.step - first_step) if event.step > first_step else None
        left = f"left {clock(None if passed is None else passed * (self._steps - event.step))}"
        rate, self._since_printed = str(self._since_printed), _Rate()
        if self._screen.is_terminal:
            self._screen.refresh(self._progress_line(event, f"{rate}  {left}"))
        else:
            self._screen.print(
                f"step {self._place(event.step)}  loss {event.loss:.4f}  grad {event.grad_norm:.3f}  "
                f"lr {event.learning_rate:.2e}  {rate}  {left}"
            )

    def _show_other(self, entry: Entry) -> None:
        show = self._screen.print
        match entry.event:
            case AttemptStarted() as event:
                show(_started(entry.attempt, event), "bold")
            case EvalDone() as event:
                self._evals[event.set] = event
                show(f"eval {self._place(event.step)}  {_scores([event])}", "cyan")
            case CheckpointSaved() as event:
                size = f"{megabytes(event.bytes)} in {event.seconds:.2f} s"
                show(f"save {self._place(event.step)}  checkpoint  {size}", "dim")
            case CheckpointFailed() as event:
                left = self._max_failures - event.in_a_row
                then = f"training continues, {left} more in a row would stop it" if left > 0 else "the run stops"
                show(f"SAVE FAILED  {describe(event)}; {then}", "bold red")
            case CheckpointRejected() as event:
                show(f"checkpoint  {describe(event)}", "bold red")
            case NotFinite(trial=0) as event:
                show(f"not finite  {describe(event)}", "bold yellow")
            case NotFinite() as event:
                show(f"not finite  {describe(event)}: the run stops", "bold red")
            case Hung() as event:
                pending = f"; pending: {event.collective}" if event.collective else ""
                stacks = f"; stacks in {event.stacks}" if event.stacks else ""
                show(f"hung  {describe(event, entry.rank)}{pending}{stacks}; this process ends", "bold red")
            case StopRequested() as event:
                show(f"stop  {event.signal} asked to stop: leaving at step {event.step}", "bold yellow")
            case Warned() as event:
                where = f"rank {entry.rank}: " if entry.rank else ""
                show(f"warning: {where}{event.message}", "yellow")
            case AttemptEnded() as event:
                self.close()  # the last lines stay where the live line was
                show(self._ended(event), STATUS_STYLES.get(event.status, "bold red"))
                inspect = f"python -m trainer inspect {self._run}"
                if event.status == "finished":
                    show(f"next  {inspect}")
                elif event.status == "preempted":
                    show(f"next  the same command resumes {self._run}")
                elif not self._is_restarted:
                    show(f"next  {inspect}; the same command resumes the run")

    def _ended(self, event: AttemptEnded) -> str:
        lost_peer = event.status == "failed" and event.reason == LOST_A_PEER
        parts = [
            f"{f'{LOST_A_PEER} after' if lost_peer else event.status} step {event.step}/{self._steps}",
            "" if event.status == "finished" or lost_peer else first_line(event.reason),
            _scores(self._evals.values()),
            str(self._whole_attempt) if self._whole_attempt.seconds > 0 else "",
            f"weights_sha256 {event.weights_sha256}" if event.weights_sha256 else "",
        ]
        return "  ".join(part for part in parts if part)

    def _progress_line(self, event: StepDone, figures: str) -> "Text":
        """One line that is never broken; the bar takes what the words leave."""
        from rich.text import Text

        place, loss = f"step {event.step}/{self._steps} ", f" loss {event.loss:.4f}"
        room = self._screen.width - len(f"{place}{loss}  {figures}")
        done = bar(event.step / self._steps, "bar.complete", max(0, min(BAR_WIDTH, room)))
        return Text.assemble(place, done, (loss, "bold"), f"  {figures}", no_wrap=True, overflow="ellipsis")

    def _place(self, step: int) -> str:
        return f"{step:>{len(str(self._steps))}}/{self._steps}"


class _Rate:
    """Tokens over the seconds spent inside steps."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0

    def __str__(self) -> str:
        return tokens_per_second(self.tokens / self.seconds if self.seconds > 0 else None)


def _started(attempt: int, event: AttemptStarted) -> str:
    parts = [
        f"attempt {attempt}",
        f"{event.world_size} rank{'s' if event.world_size > 1 else ''} ({event.strategy}) on {event.device}",
        f"{event.parameters:,} parameters",
        f"steps {event.from_step} → {event.steps}",
    ]
    if event.startup_seconds:
        parts.append(f"ready in {sum(event.startup_seconds.values()):.1f} s")
    return " · ".join(parts)


def _scores(evals: Iterable[EvalDone]) -> str:
    return "  ".join(f"{e.set} {e.loss:.4f} nats {loss(e.bits_per_byte)} bpb" for e in evals)
