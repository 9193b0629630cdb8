"""Silent corruption: finds a rank that computed, received or keeps wrong bits, before the step is applied.

Sums are exact, so whatever is computed twice gives the same bits, and every check is an equality: no thresholds, no
false alarms. Three checks, all within one step:

- Audits (audit.py). A keyed choice of micro-batches is computed by a second rank too.
- Reduction (reduction.py). What every rank has added up (replicate only), and what it received, is held against the
  micro-batches that went into it, row by row.
- State (seal.py). Each rank hashes weights, moments and grids after the update and again before the next, if both steps
  are checked; else from the start of a checked step. Replicas compare, but not those of hybrid.

Whatever disagrees is computed once more. What agrees then was transient: who changed was wrong. What disagrees again
stays, and ends the run. A state that changed is copied from a replica, or the job restarts from its checkpoint
(response.py). A rank that is wrong twice is quarantined (quarantine.py). Tokens are held against the store whenever
they are read (tokens.py).

Where members may change (quorum mode), the checks are those of the members of the epoch. A checked step that was
interrupted is computed from nothing, because nobody has the hashes of what the lost member computed.

Not seen: what all ranks compute wrong alike (operators, compilers), and what one rank alone always does; a micro-batch
that is not audited; a gradient that is damaged between the reduction and the update; where the state has no replica to
compare (fsdp, hybrid, one rank), an update that is not audited, or a change between two checked steps.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.config import Config
from trainer.data import Batches
from trainer.errors import CorruptionError, NumericsError
from trainer.log.events import Writer
from trainer.parallel.quorum import QuorumMembers
from trainer.parallel.sharding import Rounder, RounderOf
from trainer.parallel.world import Members, StepMembers, World
from trainer.phases import Hook, Phase
from trainer.sentinel.audit import Audits, Pick, Seen, blame
from trainer.sentinel.finding import Finding
from trainer.sentinel.quarantine import Quarantine, QuorumQuarantine
from trainer.sentinel.reduction import ReductionCheck
from trainer.sentinel.response import Response
from trainer.sentinel.seal import Seal, first_unequal, suspects
from trainer.sentinel.tokens import TokenCheck, block_hashes
from trainer.sentinel.update import UpdateAudit
from trainer.step import StepContext, TrainState

T = TypeVar("T")
TRIALS = 2


class Observed(NamedTuple):
    """One computation of a step, as all ranks reported it: the same on all of them."""

    states: list[tuple[int, int]]
    """By rank: hash of the weights now, and as sealed."""
    wrong: dict[str, tuple[int, ...]]
    """Ranks whose gradient is wrong, and whose received sum is ("reduction")."""
    audits: list[Seen]


class Sentinel:
    """Stands between the loop and what computes a step. Where the config is silent, it touches nothing."""

    def __init__(self, config: Config) -> None:
        self._config, self._act = config, config.sentinel.act
        share = Fraction(config.sentinel.audit)
        self._every = config.sentinel.state_hash_every_steps
        self._on = bool(share or self._every)
        self._audits = Audits(config.seed, share, config.data.micro_batches)
        self._update_audit = UpdateAudit(config.seed, share if self._act != "report" else Fraction(0))
        self._checking = False  # True in a step whose reduction and state are checked
        self._updated = False  # True from a checked update until the replicas are compared, where members may change
        self._committing: tuple[int, Tensor | None] = -1, None  # step under way, and its grids before it
        self._wrong: dict[str, str] = {}  # first wrong parameter of this rank, by what is wrong

    # Called by `job` and `member`, in this order.

    def watch(self, rounder_of: RounderOf) -> RounderOf:
        """Rounders that also show the sentinel each gradient before and after it is rounded."""
        if not self._on:
            return rounder_of

        def watched(name: str) -> Rounder:
            number, rounder = len(self._audits.names), rounder_of(name)
            self._audits.names.append(name)

            def look(gradient: Tensor) -> Tensor:
                self._audits.look(number, gradient)
                rounded = rounder(gradient)
                if self._checking and self._state.grids is not None:
                    self._reduction.add(name, rounded)
                return rounded

            return look

        return watched

    def check_tokens(self, batches: Batches, tokens: np.ndarray, world: World) -> None:
        """Have every window that `batches` reads held against rank 0's look at the store, which it has verified."""
        if not self._on:
            return
        hashes = world.from_main(lambda: block_hashes(tokens))
        check = TokenCheck(tokens, self._config.model.context, hashes)
        batches.check = functools.partial(self._checked_tokens, batches, check)

    def wrap_hook(self, hook: Hook) -> Hook:
        """A hook that calls `hook`, and with it all faults on purpose, before it checks."""
        if not self._on:
            return hook
        acts: dict[str, Callable[[int], None]] = {
            Phase.BEFORE_FORWARD: lambda _: self._audits.next_micro_batch(), Phase.BEFORE_REDUCE: self._before_reduce,
            Phase.AFTER_REDUCE: self._after_reduce, Phase.BEFORE_UPDATE: self._before_update,
            Phase.AFTER_UPDATE: self._after_update, Phase.WAITING_FOR_SAVE: self.check_before_save,
        }  # fmt: skip

        def both(phase: str, step: int) -> None:
            hook(phase, step)
            if phase in acts:
                acts[phase](step)

        return both

    def wrap_members(self, members: Members, state: TrainState, batches: Batches, log: Writer) -> Members:
        if not self._on:
            return members
        within = self._config.sentinel.quarantine_within
        is_quorum = isinstance(members, QuorumMembers)
        self._quarantine = QuorumQuarantine(within, members) if is_quorum else Quarantine(within, members)
        self._members, self._state = members, state
        self._context = StepContext(self._config, members, batches)  # without hooks: an audit is no phase of the step
        self._reduction = ReductionCheck(state.sharding, members.world.device)
        self._seal = Seal(state)
        self._response = Response(self._act, self._quarantine, state, log)
        return self

    # In place of the members.

    @property
    def world(self) -> World:
        return self._members.world

    def meet(self, state: TrainState) -> bool:
        # Whoever joins may get this rank's state. In quorum mode grids may be another step's by now.
        if self._seal.of(state.step):
            now, sealed = self._seal.compare("model.", "optim.")
            if now != sealed:
                self._met_with_wrong_state(state.step)
        return self._members.meet(state)

    def applied(self, step: int, change: bool) -> None:
        try:
            self._members.applied(step, change)
        finally:
            if self._updated:
                self._updated = False
                self._compare_updated(step)  # also before a newcomer gets it

    def once(self, name: str, act: Callable[[], None]) -> None:
        self._members.once(name, act)

    def outlive(self, error: BaseException) -> bool:
        if not self._members.outlive(error):
            return False
        self._checking = self._updated = False
        self._reduction.clear()
        step, magnitude = self._committing
        if step == self._state.step and self._state.grids is not None and magnitude is not None:
            self._state.grids.restore(magnitude)  # the step is computed again, and may have widened it
        return True

    def commit(self, step: int, compute: Callable[[StepMembers], T]) -> T:
        """Have a step computed until its checks agree. Raises CorruptionError if they do not the second time."""
        picked = self._audits.pick(step, self.world.size)
        self._checking = self._every > 0 and (step + 1) % self._every == 0
        self._audits.rest()
        grids = self._state.grids
        magnitude = None if grids is None else grids.magnitude.clone()
        self._committing = step, magnitude
        if not picked and not self._checking:
            return self._members.commit(step, compute)
        self._quarantine.count_checked_step(step)
        if self._checking and not self._seal.of(step):
            self._seal.renew()
        earlier: Observed | None = None
        findings: list[Finding] = []
        for trial in range(TRIALS):
            compute_once = functools.partial(self._compute, compute, picked, trial)
            try:
                result, observed = self._members.commit(step, compute_once)
            except NumericsError:
                # Wrong weights may give a loss that is not finite however often it is computed.
                if not self._checking or trial or self._act != "repair" or not self._heals_weights(step + 1):
                    raise
                if grids is not None and magnitude is not None:
                    grids.restore(magnitude)
                continue
            disagreeing = self._judge(observed)
            if earlier is not None:
                # Whoever gave other bits the first time was wrong then.
                findings = [blame(finding, earlier.audits, observed.audits) for finding in findings or disagreeing]
                if not disagreeing:
                    # A rank that audits itself repeats what it always does: two equal results prove nothing then.
                    self._response.settle(step + 1, findings, "repaired" if self.world.size > 1 else "recomputed")
            if not disagreeing or self._act == "report":
                self._response.record(step + 1, disagreeing, "reported")
                return result
            findings = findings or disagreeing
            if self._act == "stop" or trial == TRIALS - 1:
                break
            if disagreeing[0].what == "state":
                self._heal(step + 1, disagreeing[0])
            if grids is not None and magnitude is not None:
                grids.restore(magnitude)  # the first computation may have widened it
            earlier = observed
        why = "Not all agrees when computed again either. " if self._act == "repair" else ""
        self._response.stop(step + 1, findings, why)

    def _compute(
        self, compute: Callable[[StepMembers], T], picked: Sequence[Pick], trial: int, members: StepMembers
    ) -> tuple[T, Observed]:
        """Compute the step once, its audits first, and learn from all ranks what they saw."""
        members = members.anew()  # partial sums of an epoch before come without hashes
        own, size, audits = members.world.rank, members.world.size, self._audits
        self._wrong = {}
        audits.begin(members, picked, trial, self._state.sharding.needs_lockstep)
        checking, self._checking = self._checking, False
        audits.compute(members, self._state, self._context)
        self._checking = checking
        result = compute(members)
        audits.end_pass()
        # By rank: hash of the weights now, and as sealed; 1 if its gradient is wrong, 1 if its received sum is; then
        # two hashes for each audit, the owner's and the auditor's, 0 where the rank is neither.
        table = torch.zeros(size, 4 + 2 * len(audits.planned), dtype=torch.int64, device=members.world.device)
        if self._checking:
            table[own, 0], table[own, 1] = self._seal.compare("model.")
        table[own, 2], table[own, 3] = int("gradient" in self._wrong), int("reduction" in self._wrong)
        for number, (by_owner, by_auditor) in enumerate(audits.hashes(own)):
            table[own, 4 + 2 * number], table[own, 5 + 2 * number] = by_owner, by_auditor
        members.world.sum(table)
        rows = table.tolist()
        return result, Observed(
            [(row[0], row[1]) for row in rows],
            {what: tuple(r for r in range(size) if rows[r][c]) for c, what in ((2, "gradient"), (3, "reduction"))},
            [Seen(a, rows[a.owner][4 + 2 * n], rows[a.auditor][5 + 2 * n]) for n, a in enumerate(audits.planned)],
        )

    def _judge(self, observed: Observed) -> list[Finding]:
        """The disagreements of one computation. Of several kinds only the one that may cause the others."""
        found: list[Finding] = []
        changed = self._suspects(observed.states)
        if changed is not None:
            found = [Finding("state", changed)]
        for what, ranks in observed.wrong.items():
            if ranks and not found:
                found = [Finding(what, ranks)]
        if not found:
            unequal = [seen.audit for seen in observed.audits if seen.by_owner != seen.by_auditor]
            found = [Finding("micro_batch", (a.owner, a.auditor), a.micro_batch) for a in unequal]
        return self._with_parameters(found) if found else []

    def _suspects(self, hashes: Sequence[tuple[int, int]]) -> tuple[int, ...] | None:
        return suspects(hashes, are_replicas=not self._state.sharding.needs_lockstep)

    def _with_parameters(self, findings: list[Finding]) -> list[Finding]:
        """The findings with the first parameter of each that differs. Collective."""
        wrong = self._wrong | ({} if self._seal.first_wrong is None else {"state": self._seal.first_wrong})
        sinks = self._audits.by_parameter()
        seen = self.world.agree(lambda: (wrong, sinks, self._seal.hashes))
        unequal = first_unequal([sealed for _, _, sealed in seen])
        named = []
        for finding in findings:
            if finding.micro_batch is None:
                parameters = [seen[rank][0].get(finding.what) for rank in finding.ranks]
                if finding.what == "state" and not self._state.sharding.needs_lockstep:
                    parameters.append(unequal)
            else:
                owner, auditor = finding.ranks
                pairs = zip(
                    seen[owner][1][finding.micro_batch, False], seen[auditor][1][finding.micro_batch, True], strict=True
                )
                parameters = [name for name, (a, b) in zip(self._audits.names, pairs, strict=True) if a != b]
            named.append(replace(finding, parameter=next(filter(None, parameters), None)))
        return named

    # Phases of the step.

    def _before_reduce(self, step: int) -> None:
        """Hold what this rank has added up against the micro-batches that it has added."""
        self._audits.end_pass()
        self._wrong.pop("gradient", None)  # of a pass that is thrown away
        self._wrong.pop("reduction", None)
        # Sums of gradients that are on no grid are not exact. A sharded gradient is reduced already.
        if self._checking and self._state.grids is not None and not self._state.sharding.needs_lockstep:
            self._note("gradient", self._reduction.added_up_wrong())

    def _after_reduce(self, step: int) -> None:
        """Hold what this rank has received against the micro-batches of all ranks."""
        if self._checking and self._state.grids is not None:
            self._note("reduction", self._reduction.received_wrong(self.world))

    def _note(self, what: str, parameter: str | None) -> None:
        if parameter is not None:
            self._wrong.setdefault(what, parameter)

    def _checked_tokens(
        self, batches: Batches, check: TokenCheck, sample_ids: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """The windows with these ids, right: `rows`, or what is read again. This rank alone knows and logs it."""
        step = self._state.step + 1
        if not (wrong := check.wrong(sample_ids, rows)):
            return rows
        again = batches.read(sample_ids)
        stays = bool(check.wrong(sample_ids, again))
        # Where the store is intact, it is this rank's reading that is wrong, however often.
        what, ranks = ("store", ()) if check.changed(wrong) else ("tokens", (self.world.rank,))
        finding = Finding(what, ranks, parameter=f"sample {wrong[0]}")
        if self._act == "report":
            self._response.log_own(step, finding, "reported")
            return rows
        if self._act == "repair" and not stays:
            self._response.log_own(step, finding, "repaired")
            return again
        restarts = self._act == "repair"
        self._response.log_own(step, finding, "restarted" if restarts else "stopped")
        raise CorruptionError(
            f"step {step}: {finding.told(self._quarantine.numbers)}. Nothing is computed from it.\n"
            "  The next start verifies the store, and builds it again if it is damaged.",
            restart=restarts,
        )

    # The state.

    def _before_update(self, step: int) -> None:
        if self._checking:  # the weights were looked at when the gradients had been computed
            if self._state.grids is not None:
                self._seal.renew_part("grids.")  # the step may have widened them: only replicas can tell
            self._verify_state(step, step + 1, "optim.", "grids.")
        if self._state.sharding.needs_lockstep or self.world.size == 1:  # no replica is held against this one
            self._update_audit.begin(self._state)

    def _after_update(self, step: int) -> None:
        if self._update_audit.under_way:
            self._audit_update(step)
        checked, self._checking = self._checking, False
        if self._every and (step + 1) % self._every == 0:
            self._seal.renew()
        if checked and not self._state.sharding.needs_lockstep:
            # A wrong update shows in the replicas, before anything is computed from it. Where members may change, they
            # must first count the step: some of them may not learn of this comparison.
            self._updated = isinstance(self._members, QuorumMembers)
            if not self._updated:
                self._compare_updated(step)

    def _compare_updated(self, step: int) -> None:
        now = self._seal.whole()
        self._compare_replicas(step, now, now)

    def _audit_update(self, step: int) -> None:
        def repeat(needed: bool) -> bool:
            return any(self.world.agree(lambda: needed))

        wrong = self._update_audit.end(self._state, repeat)
        results = self.world.agree(lambda: wrong)
        findings = [Finding("update", (rank,), parameter=name) for rank, name in enumerate(results) if name != ""]
        if findings and (self._act == "stop" or None in results):
            self._response.stop(step, findings)
        if findings:
            self._response.settle(step, findings, "repaired")

    def check_before_save(self, step: int) -> None:
        """Compare the whole state, where it is checked at all. Collective."""
        if self._every:
            self._verify_state(step, step, "")

    def _verify_state(self, completed: int, step: int, *prefixes: str) -> None:
        """Compare a part of the state with its seal, if it has one, and with the other replicas'. Collective."""
        self._seal.first_wrong = None
        if self._seal.of(completed):
            self._compare_replicas(step, *self._seal.compare(*prefixes))
        else:
            now = self._seal.now(*prefixes)
            self._compare_replicas(step, now, now)

    def _heals_weights(self, step: int) -> bool:
        """True if the weights were wrong, and are now those of a replica. Collective, on all ranks alike."""
        self._audits.end_pass()
        self._checking = True
        self._reduction.clear()  # the search for the first value that is not finite has passed gradients
        changed = self._suspects(self._exchanged(*self._seal.compare("model.")))
        if changed is None:
            return False
        (finding,) = self._with_parameters([Finding("state", changed)])
        self._heal(step, finding)
        self._response.settle(step, [finding], "repaired")
        return True

    def _compare_replicas(self, step: int, now: int, sealed: int) -> None:
        """Compare (hash now, as sealed) of all ranks, and act where they differ. Collective."""
        changed = self._suspects(self._exchanged(now, sealed))
        if changed is None:
            return
        (finding,) = self._with_parameters([Finding("state", changed)])
        if self._act == "stop":
            self._response.stop(step, [finding])
        if self._act == "report":
            self._response.record(step, [finding], "reported")
        else:
            self._heal(step, finding)
            self._response.settle(step, [finding], "repaired")

    def _exchanged(self, now: int, sealed: int) -> list[tuple[int, int]]:
        """(hash now, as sealed) of each rank. Collective."""
        table = torch.zeros(self.world.size, 2, dtype=torch.int64, device=self.world.device)
        table[self.world.rank, 0], table[self.world.rank, 1] = now, sealed
        self.world.sum(table)
        return [(now, sealed) for now, sealed in table.tolist()]

    def _heal(self, step: int, finding: Finding) -> None:
        self._response.heal(step, finding)
        self._seal.renew()

    def _met_with_wrong_state(self, step: int) -> None:
        """Do what `act` says where this rank's state has changed before the members meet."""
        finding = Finding("state", (self.world.rank,), parameter=self._seal.first_wrong)
        action = {"report": "reported", "stop": "stopped", "repair": "restarted"}[self._act]
        self._response.log_own(step, finding, action)
        if self._act == "report":
            self._seal.renew()  # it is told once
            return
        restarts = self._act == "repair"
        then = (
            "The worker is started again, and takes the state of another one."
            if restarts
            else "A run must not train on wrong bits. Test or replace that machine; the same command then resumes."
        )
        fact = f"step {step}: {finding.told(self._quarantine.numbers)}. The members meet again, and none may get it."
        raise CorruptionError(f"{fact}\n  {then}", restart=restarts)
