"""Length of the code that a run's first epoch makes of its text: the prequential code.

In the first epoch every batch is scored before it is learnt from. Whoever has the config can repeat the run, and so
decode what is sent with the probabilities that the model gave at that moment: the sum of −log2 p is a code length, with
nothing to add for the weights (Dawid 1984; Rissanen 1984; Blier & Ollivier 2018). It costs nothing: each step's loss is
the cross-entropy of its micro-batches before the update. The tokenizer, which the receiver needs too, is not counted.

What is scored is the cross-entropy without penalties (z-loss). Dropout stays on: the masks are a function of the
config, so this is a code too, but a longer one than the same model's without dropout.

The sum is made of values that are the same bits at every world size, in the order of the steps; a step that was
replayed counts once.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import RunDirectoryError, UsageError
from trainer.log import rundir
from trainer.log.events import AttemptStarted, Event, StepDone
from trainer.log.history import History


@dataclass(frozen=True)
class Sum:
    """Text of the steps from the first to one of them."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0

    @property
    def bits(self) -> float:
        return self.nats / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        """None if the tokens stand for no text."""
        return self.bits / self.text_bytes if self.text_bytes else None


@dataclass
class CodeLength:
    """Code length after each step, from the first one on without a gap."""

    first_epoch_steps: int | None = None
    """Steps that read text for the first time; None while the log does not say."""
    sums: list[Sum] = field(default_factory=list)

    @classmethod
    def of(cls, history: History) -> "CodeLength":
        """Return the code length of the steps that the run's present state stands on."""
        starts = [attempt.start[1] for attempt in history.attempts if attempt.start is not None]
        length = cls(next((s.first_epoch_steps for s in reversed(starts) if s.first_epoch_steps is not None), None))
        committed = history.committed
        length.extend(committed[step] for step in sorted(committed))
        return length

    def observe(self, event: Event) -> None:
        """Take in the next event of the rank that logs the steps."""
        if isinstance(event, AttemptStarted):
            if event.first_epoch_steps is not None:
                self.first_epoch_steps = event.first_epoch_steps
            del self.sums[event.from_step :]
        elif isinstance(event, StepDone):
            self.extend([event])

    def extend(self, steps: Iterable[StepDone]) -> None:
        limit = math.inf if self.first_epoch_steps is None else self.first_epoch_steps
        for step in steps:
            if step.text_bytes is not None and step.step == len(self.sums) + 1 <= limit:
                last = self.sums[-1] if self.sums else Sum()
                nats, tokens = last.nats + step.loss * step.tokens, last.tokens + step.tokens
                self.sums.append(Sum(nats, tokens, last.text_bytes + step.text_bytes))

    def bits_per_byte_at(self, step: int) -> float | None:
        """Return bits per byte of the text of steps 1 to `step`; None if it is not all known or all read once."""
        return self.sums[step - 1].bits_per_byte if 0 < step <= len(self.sums) else None

    def why_unknown(self, steps: int) -> str | None:
        """Return why the length of the first epoch is not known, after `steps` completed ones; None if it is."""
        if self.first_epoch_steps is None:
            return (
                "the log does not say how long the first epoch is: an older toprope wrote it, or the run has teachers, "
                "who may know the text"
            )
        if self.first_epoch_steps == 0:
            return "one step reads more than an epoch, so no whole step reads text for the first time"
        if steps and len(self.sums) < min(steps, self.first_epoch_steps):
            missing = len(self.sums) + 1
            return f"the log does not have step {missing}: the run began from another one, or a file is missing"
        return None

    def describe(self, steps: int) -> dict[str, Any]:
        """Return the length as plain JSON values. `steps` are completed."""
        why = self.why_unknown(steps)
        last = self.sums[-1] if self.sums and not why else None
        return {
            "steps": len(self.sums) if last else 0,
            "first_epoch_steps": self.first_epoch_steps,
            "complete": last is not None and len(self.sums) == self.first_epoch_steps,
            "tokens": last.tokens if last else None,
            "bytes": last.text_bytes if last else None,
            "bits": last.bits if last else None,
            "bits_per_byte": last.bits_per_byte if last else None,
            "why_unknown": why,
            "so_far": [[n, s.bits_per_byte] for n, s in enumerate(self.sums, start=1)] if last else [],
        }


def compressors(run: Path, code_length: Mapping[str, Any]) -> dict[str, float | None]:
    """Bits per byte of general compressors on the text of a run's code length, in the same order.

    `code_length` is that of the run's summary. None: the compressor is not on this machine. Takes about a second per
    megabyte. Raises UsageError if the code length is unknown, RunDirectoryError if the text is no longer the run's, and
    what `data.prepare` raises if it cannot be read.
    """
    from trainer import data  # late: `inspect` alone needs no data
    from trainer.config import Eval

    if code_length["bits"] is None:
        why = code_length["why_unknown"] or "no step has been completed"
        raise UsageError(f"{run} has no code length to compare: {why}.\n  Leave out --compress.")
    config, expected = rundir.config_of(run), rundir.read(run).get("data_sha256")
    # The held-out sets decide what is read only where training documents that are like them are dropped.
    held_out = config.eval if config.data.decontaminate == "drop" else Eval(sets=())
    prepared = data.prepare(config.data, held_out, config.model.context)
    if prepared.sha256 != expected:
        remedy = "Compressors must read what the model read. Restore the text, or leave out --compress."
        raise RunDirectoryError(f"{config.data.source} holds another text than {run} was trained on.\n  {remedy}")
    m, b, context = config.data.micro_batches, config.data.micro_batch_sequences, config.model.context
    batches = data.Batches(
        prepared.train.tokens, seed=config.seed, context=context, micro_batches=m, sequences=b,
        unique_tokens=config.data.unique_tokens,
        mixture=data.shares(config.data, prepared.train, context, code_length["steps"] * m * b),
    )  # fmt: skip
    text = data.first_epoch.text(batches, code_length["steps"], prepared.tokenizer.pieces)
    total, sizes = data.first_epoch.compressed_bytes(text)
    assert total == code_length["bytes"], (total, code_length["bytes"])
    return {name: None if size is None else 8 * size / total for name, size in sizes.items()}
