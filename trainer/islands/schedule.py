"""When which part of the weights is exchanged: a function of the config and the step alone."""

from dataclasses import dataclass

from trainer.config import Config


@dataclass(frozen=True)
class Schedule:
    """Steps are counted as completed: the first update makes step 1. Fragments count from 0."""

    inner_steps: int
    fragments: int
    overlap_steps: int
    steps: int
    """Steps of the run."""

    @staticmethod
    def of(config: Config) -> "Schedule":
        islands = config.islands
        return Schedule(islands.inner_steps, islands.fragments, islands.overlap_steps, config.budget.steps)

    def sent(self, step: int) -> list[int]:
        """The fragments whose changes are sent after `step`: each once in `inner_steps`, and all after the last step.

        They are spread evenly; the last fragment is sent when `inner_steps` divides the step. A fragment's first round
        may be shorter than the others.
        """
        return [f for f in range(self.fragments) if step == self.steps or self.ends_round(f, step)]

    def ends_round(self, fragment: int, step: int) -> bool:
        """True if a fragment's round ends with `step`; False where it is cut short by the end of the run."""
        h = self.inner_steps
        return step % h == (fragment + 1) * h // self.fragments % h

    def arriving(self, step: int) -> list[int]:
        """The fragments that were sent before `step` and are applied after it, in the order in which they were sent.

        After the last step these are all that still travel: nothing that an island has learnt is lost.
        """
        if not self.overlap_steps:
            return []
        first = step - self.overlap_steps
        last = step - 1 if step == self.steps else first
        return [f for sent_at in range(max(first, 1), last + 1) for f in self.sent(sent_at)]
