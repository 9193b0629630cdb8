"""Response to a finding: it is logged, a state is copied from a replica, a rank leaves, the run stops."""

from collections.abc import Iterable, Sequence
from typing import NoReturn

from trainer.errors import CorruptionError
from trainer.log.events import Corrupted, Writer
from trainer.sentinel.finding import Finding
from trainer.sentinel.quarantine import Quarantine
from trainer.step import TrainState


class Response:
    """The acts of `sentinel.act`. Where a method takes findings of all ranks, all of them call it with the same."""

    def __init__(self, act: str, quarantine: Quarantine, state: TrainState, log: Writer) -> None:
        self._act, self._quarantine, self._state, self._log = act, quarantine, state, log

    def record(self, step: int, findings: Iterable[Finding], action: str, node: str | None = None) -> None:
        """Log what all ranks know alike."""
        for found in findings if self._quarantine.world.is_main else ():
            self.log_own(step, found, action, node)

    def log_own(self, step: int, found: Finding, action: str, node: str | None = None) -> None:
        """Log what this rank knows."""
        numbers = self._quarantine.numbers
        culprit = numbers[found.ranks[0]] if len(found.ranks) == 1 else None
        self._log.append(
            Corrupted(
                step=step, what=found.what, culprit=culprit, micro_batch=found.micro_batch,
                parameter=found.parameter, action=action, found=found.told(numbers), node=node,
            )
        )  # fmt: skip

    def heal(self, step: int, finding: Finding) -> None:
        """Copy the state from a rank that is right. Raises CorruptionError if there is none. Collective."""
        world = self._quarantine.world
        sources = [rank for rank in range(world.size) if rank not in finding.ranks]
        if not finding.ranks or not sources or self._state.sharding.needs_lockstep:
            self.record(step, [finding], "restarted")
            raise CorruptionError(
                f"step {step}: {self._told([finding])}, and no replica is known to be right. It is not applied and not "
                "saved.\n  The newest checkpoint is older. torchrun and launch start again from it; without them, give "
                "the same command.",
                restart=True,
            )
        for tensor in self._state.tensors().values():
            # Not in place: a collective that was left behind may still write.
            copied = tensor.clone()
            world.broadcast(copied, sources[0])
            tensor.copy_(copied)
        self._state.restored(self._state.step)

    def settle(self, step: int, findings: Sequence[Finding], action: str) -> None:
        """Log what was repaired. A rank that was wrong before leaves instead. Collective."""
        again = self._quarantine.second_time(step, [finding.ranks for finding in findings])
        if again is not None and self._quarantine.on:
            rank, first = again
            self._expel(step, findings, rank, f"for the second time (before in step {first})")
        self.record(step, findings, action)

    def stop(self, step: int, findings: Sequence[Finding], why: str = "") -> NoReturn:
        """Raise CorruptionError, or have the one rank that is wrong leave, if that is asked for. Collective."""
        wrong = {frozenset(finding.ranks) for finding in findings}
        if self._act == "repair" and self._quarantine.on and self._quarantine.world.size > 1 and len(wrong) == 1:
            (ranks,) = wrong
            if len(ranks) == 1:
                self._expel(step, findings, next(iter(ranks)), "also when computed again")
        self.record(step, findings, "stopped")
        raise CorruptionError(
            f"step {step}: {self._told(findings)}. {why}It is not applied and not saved.\n"
            "  A run must not train on wrong bits. Test or replace that machine; the same command then resumes."
        )

    def _expel(self, step: int, findings: Sequence[Finding], rank: int, why: str) -> NoReturn:
        node = self._quarantine.node_of(rank)
        found = [finding for finding in findings if set(finding.ranks) == {rank}]
        others = [finding for finding in findings if finding not in found]
        self.record(step, others, "stopped" if self._quarantine.ends_job else "repaired")
        self.record(step, found, self._quarantine.action, node)
        self._quarantine.end(rank, node, f"step {step}: {self._told(found[:1])}, {why}")

    def _told(self, findings: Sequence[Finding]) -> str:
        return "; ".join(finding.told(self._quarantine.numbers) for finding in findings)
