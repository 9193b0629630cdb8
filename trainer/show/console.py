"""What a person sees while a run trains: a live line on a terminal, plain and rate-limited lines anywhere else.

A subscriber to the event log: it only reads, and may neither slow training nor stop it.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TextIO

from trainer.config import Config
from trainer.log.events import (
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
from trainer.log.incidents import Incident, IncidentBuilder, describe, first_line
from trainer.show.units import clock, megabytes, tokens_per_second

TERMINAL_SECONDS = 0.2  # a redraw costs about 1 ms of the training thread
PLAIN_SECONDS = 5.0


@contextlib.contextmanager
def preparation(enabled: bool = True, file: TextIO | None = None) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yields the `progress(phase, done_bytes, total_bytes)` that data preparation reports to: a line per phase.

    A phase that takes longer says at most every 5 seconds how far it is. Prints nothing where nothing is prepared.
    """
    out = file or sys.stdout
    last_phase, said_at = "", 0.0

    def progress(phase: str, done: int, total: int | None) -> None:
        nonlocal last_phase, said_at
        now = time.monotonic()
        if not enabled or (phase == last_phase and now - said_at < PLAIN_SECONDS):
            return
        last_phase, said_at = phase, now
        amount = f"  {megabytes(done)}" if done else ""
        print(f"{phase}{amount}{f' of {megabytes(total)}' if done and total else ''}", file=out, flush=True)

    yield progress


class Console:
    """Prints one process's events for a person. Use as a context manager, or call close(): it frees the terminal.

    `is_terminal` None asks `file` (default: standard output). Plain lines are flushed one by one; steps are printed at
    the first, at the last, and at most every 5 seconds between. A file that cannot be written any more (a closed pipe
    or terminal) ends the printing, not the run. `earlier` is the log of the attempts before: how the last of them ended
    and what that cost is told in one line.
    """

    def __init__(
        self,
        config: Config,
        is_terminal: bool | None = None,
        file: TextIO | None = None,
        earlier: Iterable[Entry] = (),
    ) -> None:
        self._file = file or sys.stdout
        self._steps = config.budget.steps
        self._max_failures = config.checkpoint.max_failures
        self._incidents = IncidentBuilder(earlier)
        terminal = self._file.isatty() if is_terminal is None else is_terminal
        self._live = _LiveLine(self._file, self._steps) if terminal else None
        self._interval = TERMINAL_SECONDS if terminal else PLAIN_SECONDS
        self._first_step_at: tuple[int, float] | None = None
        self._printed_at = float("-inf")
        self._recent = _Rate()
        self._whole = _Rate()
        self._evals: dict[str, EvalDone] = {}
        self._broken = False

    def __call__(self, entry: Entry) -> None:
        event = entry.event
        for incident in self._incidents.add(entry):
            if incident.ends_attempt:
                self._print(_restart(entry.attempt, incident), "bold yellow")
        if isinstance(event, StepDone):
            self._step(event, entry.time)
        else:
            self._other(entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Erase the live line and give the cursor back. Harmless when called twice."""
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._live.close()

    def _step(self, event: StepDone, now: float) -> None:
        self._recent.add(event)
        self._whole.add(event)
        if self._first_step_at is None:
            self._first_step_at = (event.step, now)
        elif 0 <= now - self._printed_at < self._interval and event.step != self._steps:
            return
        self._printed_at = now
        rate = tokens_per_second(self._recent.per_second)
        self._recent = _Rate()
        left = self._seconds_left(event.step, now)
        if self._live is not None:
            self._attempt_to(self._live.show, event, rate, left)
        else:
            self._print(
                f"step {_of(event.step, self._steps)}  loss {event.loss:.4f}  grad {event.grad_norm:.3f}  "
                f"lr {event.learning_rate:.2e}  {rate}  left {clock(left)}"
            )

    def _other(self, entry: Entry) -> None:
        match entry.event:
            case AttemptStarted() as event:
                self._print(_started(entry.attempt, event), "bold")
            case EvalDone() as event:
                self._evals[event.set] = event
                self._print(f"eval {_of(event.step, self._steps)}  {_scores([event])}", "cyan")
            case CheckpointSaved() as event:
                size = f"{megabytes(event.bytes)} in {event.seconds:.2f} s"
                self._print(f"save {_of(event.step, self._steps)}  checkpoint  {size}", "dim")
            case CheckpointFailed() as event:
                self._print(self._save_failed(event), "bold red")
            case CheckpointRejected() as event:
                self._print(f"checkpoint  {describe(event)}", "bold red")
            case NotFinite() as event:
                then = "" if event.trial == 0 else ": the run stops"
                self._print(f"not finite  {describe(event)}{then}", "bold yellow" if event.trial == 0 else "bold red")
            case Hung() as event:
                pending = f"; pending: {event.collective}" if event.collective else ""
                stacks = f"; stacks in {event.stacks}" if event.stacks else ""
                self._print(f"hung  {describe(event, entry.rank)}{pending}{stacks}; this process ends", "bold red")
            case StopRequested() as event:
                self._print(f"stop  {event.signal} asked to stop: leaving at step {event.step}", "bold yellow")
            case Warned() as event:
                where = f"rank {entry.rank}: " if entry.rank else ""
                self._print(f"warning: {where}{event.message}", "yellow")
            case AttemptEnded() as event:
                if self._live is not None:
                    self.close()
                good = {"finished": "bold green", "preempted": "bold yellow"}
                self._print(self._ended(event), good.get(event.status, "bold red"))

    def _save_failed(self, event: CheckpointFailed) -> str:
        left = self._max_failures - event.in_a_row
        then = f"training goes on, {left} more in a row would stop it" if left > 0 else "the run stops"
        return f"SAVE FAILED  {describe(event)}; {then}"

    def _ended(self, event: AttemptEnded) -> str:
        parts = [f"{event.status} step {event.step}/{self._steps}"]
        if event.status != "finished":
            parts.append(first_line(event.reason))
        if self._evals:
            parts.append(_scores(self._evals.values()))
        if self._whole.per_second is not None:
            parts.append(tokens_per_second(self._whole.per_second))
        if event.weights_sha256:
            parts.append(f"weights_sha256 {event.weights_sha256}")
        return "  ".join(parts)

    def _seconds_left(self, step: int, now: float) -> float | None:
        """By the wall clock since this attempt's first step, so evaluations and checkpoints count."""
        assert self._first_step_at is not None
        first_step, first_time = self._first_step_at
        return (now - first_time) / (step - first_step) * (self._steps - step) if step > first_step else None

    def _print(self, line: str, style: str = "") -> None:
        if self._live is not None:
            self._attempt_to(self._live.print, line, style)
        else:
            self._attempt_to(print, line, file=self._file, flush=True)

    def _attempt_to(self, write: Callable[..., None], *args: Any, **options: Any) -> None:
        if self._broken:
            return
        try:
            write(*args, **options)
        except (OSError, ValueError):  # ValueError: the file was closed
            self._broken = True


class _Rate:
    """Tokens over the seconds spent in steps."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0

    def add(self, event: StepDone) -> None:
        self.tokens += event.tokens
        self.seconds += event.seconds

    @property
    def per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds > 0 else None


class _LiveLine:
    """One redrawn progress line with permanent lines above it. Drawn by the caller: no thread of its own."""

    def __init__(self, file: TextIO, steps: int) -> None:
        from rich import console, progress

        self._console = console.Console(file=file, force_terminal=True, highlight=False)
        ours = file in (sys.stdout, sys.stderr)  # others' prints then appear above the line
        self._progress = progress.Progress(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.fields[figures]}"),
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=ours,
            redirect_stderr=ours,
        )
        self._task = self._progress.add_task("", total=steps, figures="starting")

    def show(self, event: StepDone, rate: str, left: float | None) -> None:
        if not self._progress.live.is_started:
            self._progress.start()
        figures = f"loss [bold]{event.loss:.4f}[/]  {rate}  left {clock(left)}"
        self._progress.update(self._task, completed=event.step, figures=figures)
        self._progress.refresh()

    def print(self, line: str, style: str) -> None:
        from rich.text import Text

        # soft_wrap: a hash cut over two lines cannot be copied.
        self._console.print(Text(line, style), soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def _started(attempt: int, event: AttemptStarted) -> str:
    ranks = f"{event.world_size} rank{'s' if event.world_size > 1 else ''}"
    ready = f"ready in {sum(event.startup_seconds.values()):.1f} s" if event.startup_seconds else ""
    steps = f"steps {event.from_step} → {event.steps}"
    where = f"{ranks} ({event.strategy}) on {event.device}"
    parts = [f"attempt {attempt}", where, f"{event.parameters:,} parameters", steps, ready]
    return " · ".join(part for part in parts if part)


def _restart(attempt: int, incident: Incident) -> str:
    """How an earlier attempt ended, told as this one goes on."""
    return f"{'resume' if incident.kind == 'preempted' else 'restart'}  attempt {attempt}: {incident.text}"


def _scores(evals: Iterable[EvalDone]) -> str:
    return "  ".join(f"{e.set} {e.loss:.4f} nats {e.bits_per_byte:.4f} bpb" for e in evals)


def _of(step: int, steps: int) -> str:
    return f"{step:>{len(str(steps))}}/{steps}"
