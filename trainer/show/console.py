"""The display of a run that trains: a live line on a terminal, plain and rate-limited lines anywhere else.

A subscriber to the event log: it only reads, and may neither slow training nor stop it.
"""

import contextlib
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from trainer.config import Config
from trainer.log import events
from trainer.log.events import AttemptEnded, AttemptStarted, Entry, EvalDone, StepDone
from trainer.log.incidents import IncidentBuilder, describe, first_line
from trainer.show.live import BAR_WIDTH, LiveTable, bar
from trainer.show.units import clock, loss, megabytes, plural, tokens_per_second

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
        screen.print(f"{phase}{amount}{f' of {megabytes(total)}' if done and total else ''}")

    yield progress


class Console(LiveTable):
    """Prints one process's events for a person: steps at the first, at the last, and rarely between.

    `earlier` is the log of the attempts before: one line says how the last of them ended and what that cost. The last
    line names the directory `run` and the next command, unless a launcher restarts the workers when they fail.
    """

    def __init__(
        self, config: Config, run: Path, is_terminal: bool | None = None, file: TextIO | None = None,
        earlier: Iterable[Entry] = (), is_restarted: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(file, is_terminal=is_terminal)
        self._steps, self._max_failures = config.budget.steps, config.checkpoint.max_failures
        self._run, self._is_restarted = shlex.quote(str(run)), is_restarted
        self._incidents = IncidentBuilder(earlier)
        self._interval_seconds = TERMINAL_SECONDS if self.is_terminal else PLAIN_SECONDS
        self._first_step: tuple[int, float] | None = None
        self._printed_at = float("-inf")
        # Tokens, and the seconds spent inside steps: of this attempt, and up to the last line.
        self._tokens, self._seconds, self._printed = 0, 0.0, (0, 0.0)
        self._evals: dict[str, EvalDone] = {}

    def __call__(self, entry: Entry) -> None:
        for incident in self._incidents.add(entry):
            # How an earlier attempt ended is known only now, as this one resumes.
            if incident.ends_attempt:
                verb = "resume" if incident.kind == "preempted" else "restart"
                self.print(f"{verb}  {incident.text}", "bold yellow")
        if isinstance(entry.event, StepDone):
            self._show_step(entry.event, entry.time)
        else:
            self._show_other(entry)

    def _show_step(self, event: StepDone, now: float) -> None:
        self._tokens, self._seconds = self._tokens + event.tokens, self._seconds + event.seconds
        if self._first_step is None:
            self._first_step = (event.step, now)
        elif 0 <= now - self._printed_at < self._interval_seconds and event.step != self._steps:
            return  # most steps end here, within a microsecond; a negative interval means that the clock was set back
        self._printed_at = now
        first_step, first_time = self._first_step
        # By the wall clock since this attempt's first step, so evaluations and checkpoints count.
        passed = (now - first_time) / (event.step - first_step) if event.step > first_step else None
        figures = f"{self._rate(*self._printed)}  left {clock(passed and passed * (self._steps - event.step))}"
        self._printed = self._tokens, self._seconds
        if self.is_terminal:
            self.refresh(self._progress_line(event, figures))
        else:
            self.print(
                f"step {self._place(event.step)}  loss {event.loss:.4f}  grad {event.grad_norm:.3f}  "
                f"lr {event.learning_rate:.2e}  {figures}"
            )

    def _show_other(self, entry: Entry) -> None:
        match entry.event:
            case AttemptStarted() as event:
                self.print(_started(entry.attempt, event), "bold")
            case EvalDone() as event:
                self._evals[event.set] = event
                self.print(f"eval {self._place(event.step)}  {_scores([event])}", "cyan")
            case events.CheckpointSaved() as event:
                size = f"{megabytes(event.bytes)} in {event.seconds:.2f} s"
                self.print(f"save {self._place(event.step)}  checkpoint  {size}", "dim")
            case events.CheckpointFailed() as event:
                left = self._max_failures - event.in_a_row
                then = f"training continues, {left} more in a row would stop it" if left > 0 else "the run stops"
                self.print(f"SAVE FAILED  {describe(event)}; {then}", "bold red")
            case events.CheckpointRejected() as event:
                self.print(f"checkpoint  {describe(event)}", "bold red")
            case events.NotFinite(trial=trial) as event:
                stops = ": the run stops" if trial else ""
                self.print(f"not finite  {describe(event)}{stops}", "bold red" if trial else "bold yellow")
            case events.Corrupted() as event:
                self.print(f"corrupted  {describe(event)}", "bold yellow" if event.action == "repaired" else "bold red")
            case events.MembersChanged() as event:
                joined = ", ".join(f"worker {member}" for member in event.joined)
                if event.lost:
                    self.print(f"lost  {describe(event)}", "bold yellow")
                if joined:
                    self.print(
                        f"joined  {joined} after step {event.step}: {plural(len(event.members), 'worker')}", "bold"
                    )
            case events.Hung() as event:
                pending = f"; pending: {event.collective}" if event.collective else ""
                stacks = f"; stacks in {event.stacks}" if event.stacks else ""
                self.print(f"hung  {describe(event, entry.rank)}{pending}{stacks}; this process ends", "bold red")
            case events.StopRequested() as event:
                self.print(f"stop  {event.signal} asked to stop: leaving at step {event.step}", "bold yellow")
            case events.Warned() as event:
                where = f"rank {entry.rank}: " if entry.rank else ""
                self.print(f"warning: {where}{event.message}", "yellow")
            case AttemptEnded() as event:
                self.close()  # the last lines stay where the live line was
                self._show_end(event)

    def _show_end(self, event: AttemptEnded) -> None:
        lost_peer = event.status == "failed" and event.reason == events.LOST_A_PEER
        parts = [
            f"{f'{event.reason} after' if lost_peer else event.status} step {event.step}/{self._steps}",
            "" if event.status == "finished" or lost_peer else first_line(event.reason),
            _scores(self._evals.values()),
            self._rate() if self._seconds > 0 else "",
            f"weights_sha256 {event.weights_sha256}" if event.weights_sha256 else "",
        ]
        self.print("  ".join(part for part in parts if part), STATUS_STYLES.get(event.status, "bold red"))
        if event.status == "preempted":
            self.print(f"next  the same command resumes {self._run}")
        elif event.status == "finished" or not self._is_restarted:
            resumes = "" if event.status == "finished" else "; the same command resumes the run"
            self.print(f"next  python -m trainer inspect {self._run}{resumes}")

    def _progress_line(self, event: StepDone, figures: str) -> "Text":
        """One line that is never broken; the bar takes what the words leave."""
        from rich.text import Text

        place, loss = f"step {event.step}/{self._steps} ", f" loss {event.loss:.4f}"
        room = self.width - len(f"{place}{loss}  {figures}")
        done = bar(event.step / self._steps, "bar.complete", max(0, min(BAR_WIDTH, room)))
        return Text.assemble(place, done, (loss, "bold"), f"  {figures}", no_wrap=True, overflow="ellipsis")

    def _place(self, step: int) -> str:
        return f"{step:>{len(str(self._steps))}}/{self._steps}"

    def _rate(self, tokens: int = 0, seconds: float = 0.0) -> str:
        """Tokens per second inside steps, since so many tokens and seconds of this attempt."""
        passed = self._seconds - seconds
        return tokens_per_second((self._tokens - tokens) / passed if passed > 0 else None)


def _started(attempt: int, event: AttemptStarted) -> str:
    ready = f" · ready in {sum(event.startup_seconds.values()):.1f} s" if event.startup_seconds else ""
    origin = f" from {event.parent}" if event.parent else " (from memory)" if event.state_from == "memory" else ""
    return (
        f"attempt {attempt} · {plural(event.world_size, 'rank')} ({event.strategy}) on {event.device} · "
        f"{event.parameters:,} parameters · steps {event.from_step}{origin} → {event.steps}{ready}"
    )


def _scores(evals: Iterable[EvalDone]) -> str:
    return "  ".join(f"{e.set} {e.loss:.4f} nats {loss(e.bits_per_byte)} bpb" for e in evals)
