"""Silent corruption: finds a rank that computed, received or keeps wrong bits, before the step is applied.

Sums are exact, so whatever is computed twice gives the same bits, and every check is an equality: no thresholds, no
false alarms. Three checks, all within one step:

- Audits. A keyed choice of micro-batches is computed by a second rank too; hashes of the gradient's bits are compared.
- Reduction. Rounded gradients are multiples of their grid, so a weighted sum of their entries is exact, and that of a
  sum is the sum of theirs. What every rank has added up (replicate only), and what it received, is held against it, row
  by row.
- State. Each rank hashes weights, moments and grids after the update and again before the next, if both steps are
  checked; else from the start of a checked step. Replicas compare, but not those of hybrid.

Whatever disagrees is computed once more. What agrees then was transient: who changed was wrong. What disagrees again
stays, and ends the run. A state that changed is copied from a replica, or the job restarts from its checkpoint. A rank
that is wrong twice is quarantined (quarantine.py). Tokens are held against the store whenever they are read.

Not seen: what all ranks compute wrong alike (operators, compilers), and what one rank alone always does; a micro-batch
that is not audited; a gradient that is damaged between the reduction and the update; where the state has no replica to
compare (fsdp, hybrid, one rank), an update that is not audited, or a change between two checked steps.
"""

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.config import Config
from trainer.data import Batches
from trainer.errors import CorruptionError, NumericsError
from trainer.log.events import Corrupted, EventLog
from trainer.parallel.sharding import Rounder, RounderOf
from trainer.parallel.world import Members, StepMembers, World
from trainer.phases import Hook, Phase
from trainer.sentinel.bits import bits_hash, combined, differ, factors, row_sums
from trainer.sentinel.quarantine import Quarantine
from trainer.sentinel.tokens import TokenCheck, block_hashes
from trainer.sentinel.update import UpdateAudit
from trainer.step import StepContext, TrainState, backward

T = TypeVar("T")
TRIALS = 2


@dataclass(frozen=True)
class Finding:
    """One disagreement."""

    what: str
    """state, gradient (what a rank added up), reduction (what it received), micro_batch, update or tokens."""
    ranks: tuple[int, ...]
    """Who is wrong: all of these, or one of these if it is about a micro-batch; none if it is unknown."""
    micro_batch: int | None = None
    parameter: str | None = None

    def __str__(self) -> str:
        several = " and " if self.micro_batch is None else " or "
        who = several.join(f"rank {rank}" for rank in self.ranks) or "an unknown rank"
        wrong = {
            "state": "keeps wrong weights, moments or grids",
            "gradient": "has added up a wrong gradient",
            "reduction": "has received a wrong sum of gradients",
            "update": "has computed a wrong update",
            "tokens": "has read tokens that are not the store's",
            "micro_batch": f"has computed a wrong gradient of micro-batch {self.micro_batch}",
        }[self.what]
        return f"{who} {wrong}" + (f", first in {self.parameter}" if self.parameter else "")


@dataclass(frozen=True)
class Observed:
    """One computation of a step, as all ranks reported it: the same on all of them."""

    table: list[list[int]]
    """By rank: hash of the weights now, and as sealed; 1 if its gradient is wrong, 1 if its received sum is; then two
    hashes for each audit, the owner's and the auditor's, 0 where the rank is neither.
    """
    audits: list[tuple[int, int, int]]
    """(micro-batch, owner, auditor)."""

    def hashes(self, number: int) -> tuple[int, int]:
        """(the owner's, the auditor's) hash of audit `number`."""
        _, owner, auditor = self.audits[number]
        return self.table[owner][4 + 2 * number], self.table[auditor][5 + 2 * number]


class Sentinel:
    """Stands between the loop and what computes a step. Where the config is silent, it touches nothing."""

    def __init__(self, config: Config, world: World, log: EventLog) -> None:
        self._config, self._world, self._log = config, world, log
        self._share, self._act = Fraction(config.sentinel.audit), config.sentinel.act
        self._every = config.sentinel.state_hash_every_steps
        self._on = bool(self._share or self._every)
        self._update_audit = UpdateAudit(config.seed, self._share if self._act != "report" else Fraction(0))
        self._quarantine = Quarantine(config.sentinel.quarantine_within, world)
        self._names: list[str] = []
        self._segments: dict[str, slice] = {}  # of each parameter in `_own`: one for each row of a matrix, or one
        self._own = torch.zeros(0)  # weighted sums of this rank's micro-batches in the pass
        self._checking = False  # True in a step whose reduction and state are checked
        self._round: list[int | None] = []  # the micro-batches that this rank computes in a pass
        self._position = 0
        self._audited: set[int] = set()  # this rank's micro-batches that another one audits
        self._sink: Tensor | None = None  # where hashes of the gradients under way go, by parameter
        self._sinks: dict[tuple[int, bool], Tensor] = {}  # by (micro-batch, True if it is the audit)
        self._wrong: dict[str, str] = {}  # first wrong parameter of this rank, by what is wrong
        self._sealed: dict[str, int] = {}  # hash of each tensor of the state after the update
        self._sealed_step = -1

    # Called by `job`, in this order.

    def watch(self, rounder_of: RounderOf) -> RounderOf:
        """Rounders that also show the sentinel each gradient before and after it is rounded."""
        if not self._on:
            return rounder_of

        def watched(name: str) -> Rounder:
            number, rounder = len(self._names), rounder_of(name)
            self._names.append(name)

            def look(gradient: Tensor) -> Tensor:
                if self._sink is not None:
                    self._sink[number] = bits_hash(gradient)
                rounded = rounder(gradient)
                if self._checking and self._state.grids is not None:
                    self._own[self._segments[name]] += self._checksum(name, rounded, slice(0, rounded.shape[0]))
                return rounded

            return look

        return watched

    def wrap_hook(self, hook: Hook) -> Hook:
        """A hook that calls `hook`, and with it all faults on purpose, before it checks."""
        if not self._on:
            return hook
        acts: dict[str, Callable[[int], None]] = {
            Phase.BEFORE_FORWARD: self._before_forward, Phase.BEFORE_REDUCE: self._before_reduce,
            Phase.AFTER_REDUCE: self._after_reduce, Phase.BEFORE_UPDATE: self._before_update,
            Phase.AFTER_UPDATE: self._after_update, Phase.WAITING_FOR_SAVE: self._before_save,
        }  # fmt: skip

        def both(phase: str, step: int) -> None:
            hook(phase, step)
            if phase in acts:
                acts[phase](step)

        return both

    def check_tokens(self, batches: Batches, tokens: np.ndarray) -> None:
        """Have every window that `batches` reads held against rank 0's look at the store, which it has verified."""
        if not self._on:
            return
        hashes = self._world.from_main(lambda: block_hashes(tokens))
        check = TokenCheck(tokens, self._config.model.context, hashes)
        batches.check = functools.partial(self._checked_tokens, batches, check)

    def wrap_members(self, members: Members, state: TrainState, batches: Batches) -> Members:
        if not self._on:
            return members
        self._members, self._state = members, state
        self._context = StepContext(self._config, members, batches)  # without hooks: an audit is no phase of the step
        start = 0
        for name, parameter in state.sharding.parameters.items():
            self._segments[name] = slice(start, start := start + (parameter.shape[0] if parameter.ndim == 2 else 1))
        self._own = torch.zeros(start, dtype=torch.float64, device=self._world.device)
        return self

    # In place of the members.

    @property
    def world(self) -> World:
        return self._members.world

    def meet(self, state: TrainState) -> bool:
        return self._members.meet(state)

    def applied(self, step: int, change: bool) -> None:
        self._members.applied(step, change)

    def once(self, name: str, act: Callable[[], None]) -> None:
        self._members.once(name, act)

    def outlive(self, error: BaseException) -> bool:
        return self._members.outlive(error)

    def commit(self, step: int, compute: Callable[[StepMembers], T]) -> T:
        """Have a step computed until its checks agree. Raises CorruptionError if they do not the second time."""
        picked = self._pick(step)
        self._checking = self._every > 0 and (step + 1) % self._every == 0
        self._round = []
        if not picked and not self._checking:
            return self._members.commit(step, compute)
        self._quarantine.count_checked_step()
        if self._checking and self._sealed_step != step:
            self._seal()
        grids = self._state.grids
        magnitude = None if grids is None else grids.magnitude.clone()
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
                findings = [self._blame(finding, earlier, observed) for finding in findings or disagreeing]
                if not disagreeing:
                    # A rank that audits itself repeats what it always does: two equal results prove nothing then.
                    self._settle(step + 1, findings, "repaired" if self.world.size > 1 else "recomputed")
            if not disagreeing or self._act == "report":
                self._record(step + 1, disagreeing, "reported")
                return result
            findings = findings or disagreeing
            if self._act == "stop" or trial == TRIALS - 1:
                break
            if disagreeing[0].what == "state":
                self._heal(step + 1, disagreeing[0])
            if grids is not None and magnitude is not None:
                grids.restore(magnitude)  # the first computation may have widened it
            earlier = observed
        self._stop(step + 1, findings, "Not all agrees when computed again either. " if self._act == "repair" else "")

    def _pick(self, step: int) -> list[tuple[int, int]]:
        """[(round, number that chooses its auditors)] of the rounds of a step whose micro-batches are audited.

        In a round every rank computes one micro-batch, and audits that of another: no rank waits for one that audits.
        """
        rounds = -(-self._config.data.micro_batches // self.world.size)
        draw = random.Random(f"{self._config.seed}-{step}-audit")
        count = int(self._share * rounds + Fraction(draw.random()))
        return [(number, draw.randrange(2**16)) for number in sorted(draw.sample(range(rounds), count))]

    def _compute(
        self, compute: Callable[[StepMembers], T], picked: list[tuple[int, int]], trial: int, members: StepMembers
    ) -> tuple[T, Observed]:
        """Compute the step once, its audits first, and learn from all ranks what they saw."""
        own, size, lockstep = members.world.rank, members.world.size, self._state.sharding.needs_lockstep
        indices = members.micro_batches
        audits: list[tuple[int, int, int]] = []
        for number, chooses in picked:
            # The second time another rank is the auditor, where there are more than two.
            distance = 1 + (chooses + trial) % max(1, size - 1)
            share = indices[number * size : (number + 1) * size]
            audits += [(index, owner, (owner + distance) % size) for owner, index in enumerate(share)]
        self._sinks, self._wrong = {}, {}
        checking, self._checking = self._checking, False
        for number in range(0, len(audits), size):
            mine = next((index for index, _, auditor in audits[number : number + size] if auditor == own), None)
            if mine is not None or lockstep:
                if mine is not None:
                    self._open_sink(mine, audit=True)
                self._state.sharding.last_micro_batch(True)
                batch = self._context.batches.micro_batch(self._state.step, mine or 0)
                backward(self._state, self._context, mine, batch)
                self._sink = None
        self._checking = checking  # what the audits have added to the gradients is thrown away when the pass begins
        self._audited = {index for index, owner, _ in audits if owner == own}
        self._round = [index for index in members.own_micro_batches() if index is not None or lockstep]
        self._position = 0
        result = compute(members)
        self._sink = None
        table = torch.zeros(size, 4 + 2 * len(audits), dtype=torch.int64, device=members.world.device)
        if self._checking:
            table[own, 0], table[own, 1] = self._compare_with_seal("model.")
        table[own, 2], table[own, 3] = int("gradient" in self._wrong), int("reduction" in self._wrong)
        for number, (index, owner, auditor) in enumerate(audits):
            if own == owner:
                table[own, 4 + 2 * number] = combined(self._sinks[index, False].tolist())
            if own == auditor:
                table[own, 5 + 2 * number] = combined(self._sinks[index, True].tolist())
        members.world.sum(table)
        return result, Observed(table.tolist(), audits)

    def _judge(self, observed: Observed) -> list[Finding]:
        """The disagreements of one computation. Of several kinds only the one that may cause the others."""
        found: list[Finding] = []
        suspects = self._suspects([(row[0], row[1]) for row in observed.table])
        if suspects is not None:
            found = [Finding("state", suspects)]
        for column, what in ((2, "gradient"), (3, "reduction")):
            ranks = tuple(rank for rank, row in enumerate(observed.table) if row[column])
            if ranks and not found:
                found = [Finding(what, ranks)]
        if not found:
            numbers = [n for n in range(len(observed.audits)) if len(set(observed.hashes(n))) > 1]
            found = [Finding("micro_batch", observed.audits[n][1:], observed.audits[n][0]) for n in numbers]
        return self._with_parameters(found) if found else []

    def _suspects(self, hashes: Sequence[tuple[int, int]]) -> tuple[int, ...] | None:
        """Ranks whose state is wrong, by (hash now, as sealed) of each; none if it is unknown; None if all agree."""
        changed = tuple(rank for rank, (now, sealed) in enumerate(hashes) if now != sealed)
        values = [now for now, _ in hashes]
        usual = max(values, key=values.count)
        if changed or self._state.sharding.needs_lockstep or values.count(usual) == len(values):
            return changed or None
        majority = 2 * values.count(usual) > len(values)
        return tuple(rank for rank, value in enumerate(values) if value != usual) if majority else ()

    def _with_parameters(self, findings: list[Finding]) -> list[Finding]:
        """The findings with the first parameter of each that differs. Collective."""
        sinks = {key: sink.tolist() for key, sink in self._sinks.items()}
        seen = self.world.agree(lambda: (self._wrong, sinks, self._sealed))
        replicas = [sealed for _, _, sealed in seen]
        unequal = [name for name in replicas[0] if len({sealed.get(name) for sealed in replicas}) > 1]
        named = []
        for finding in findings:
            if finding.micro_batch is None:
                parameters = [seen[rank][0].get(finding.what) for rank in finding.ranks]
                if finding.what == "state" and not self._state.sharding.needs_lockstep:
                    parameters += unequal[:1]
            else:
                owner, auditor = finding.ranks
                pairs = zip(
                    seen[owner][1][finding.micro_batch, False], seen[auditor][1][finding.micro_batch, True], strict=True
                )
                parameters = [name for name, (a, b) in zip(self._names, pairs, strict=True) if a != b]
            named.append(replace(finding, parameter=next(filter(None, parameters), None)))
        return named

    def _blame(self, finding: Finding, before: Observed, after: Observed) -> Finding:
        """A finding of the first of two computations, with the rank that the second one shows to be wrong."""
        if finding.micro_batch is None:
            return finding
        number = [index for index, _, _ in before.audits].index(finding.micro_batch)
        (_, owner, auditor), (owner_before, auditor_before) = before.audits[number], before.hashes(number)
        owner_after, auditor_after = after.hashes(number)
        another = after.audits[number][2] != auditor
        if owner_after == auditor_after:
            wrong = [rank for rank, value in ((owner, owner_before), (auditor, auditor_before)) if value != owner_after]
        elif another and auditor_before == auditor_after:
            wrong = [owner]
        else:
            wrong = sorted({owner, auditor})
        return replace(finding, ranks=tuple(wrong))

    # Phases of the step.

    def _open_sink(self, index: int, audit: bool) -> None:
        self._sink = self._sinks[index, audit] = torch.zeros(len(self._names), dtype=torch.int64)

    def _before_forward(self, step: int) -> None:
        index = self._round[self._position] if self._position < len(self._round) else None
        self._position += 1
        self._sink = None
        if index in self._audited and index is not None:
            self._open_sink(index, audit=False)

    def _before_reduce(self, step: int) -> None:
        """Hold what this rank has added up against the micro-batches that it has added."""
        self._sink, self._position = None, 0
        self._wrong.pop("gradient", None)  # of a pass that is thrown away
        self._wrong.pop("reduction", None)
        # Sums of gradients that are on no grid are not exact. A sharded gradient is reduced already.
        if self._checking and self._state.grids is not None and not self._state.sharding.needs_lockstep:
            self._hold_against("gradient", self._own)

    def _after_reduce(self, step: int) -> None:
        """Hold what this rank has received against the micro-batches of all ranks."""
        if self._checking and self._state.grids is not None:
            self.world.sum(self._own)
            self._hold_against("reduction", self._own)
            self._own.zero_()

    def _hold_against(self, what: str, expected: Tensor) -> None:
        vectors = torch.zeros_like(expected)
        wrong = []
        for name, gradient, rows in self._state.sharding.gradients():
            segments, sums = self._segments[name], self._checksum(name, gradient, rows)
            if len(gradient.shape) != 2:
                vectors[segments] += sums
            elif differ(expected[segments][rows], sums):
                wrong.append(name)
        self._state.sharding.sum_over_shards(vectors)
        shapes = {name: parameter.shape for name, parameter in self._state.sharding.parameters.items()}
        wrong += [n for n, s in self._segments.items() if len(shapes[n]) != 2 and differ(expected[s], vectors[s])]
        if wrong:
            self._wrong.setdefault(what, wrong[0])

    def _checksum(self, name: str, gradient: Tensor, rows: slice) -> Tensor:
        """Weighted sums of these rows of a gradient, one for each row of a matrix: exact if it is on its grid."""
        shape = self._state.sharding.parameters[name].shape
        if len(shape) == 2:
            return row_sums(gradient)
        weights = factors(shape.numel(), gradient.device).view(shape)[rows]
        return (gradient.double() * weights).sum().reshape(1)

    def _checked_tokens(
        self, batches: Batches, check: TokenCheck, sample_ids: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """The windows with these ids, right: `rows`, or what is read again. This rank alone knows and logs it."""
        own, step = self._world.rank, self._state.step + 1
        if not (wrong := check.wrong(sample_ids, rows)):
            return rows
        finding = Finding("tokens", (own,), parameter=f"sample {wrong[0]}")
        if self._act == "report":
            self._log_finding(step, finding, "reported")
            return rows
        again = batches.read(sample_ids)
        if self._act == "repair" and not check.wrong(sample_ids, again):
            self._log_finding(step, finding, "repaired")
            return again
        stays = self._act == "repair"
        self._log_finding(step, finding, "restarted" if stays else "stopped")
        twice = ", also when they are read again" if stays else ""
        raise CorruptionError(
            f"step {step}: {finding}{twice}. Nothing is computed from them.\n"
            "  The next start verifies the store, and builds it again if it is damaged.",
            restart=stays,
        )

    # The state.

    def _before_update(self, step: int) -> None:
        if self._checking:  # the weights were looked at when the gradients had been computed
            if self._state.grids is not None:
                self._sealed |= self._hashes("grids.")  # the step may have widened them: only replicas can tell
            self._verify_state(step, step + 1, "optim.", "grids.")
        if self._state.sharding.needs_lockstep or self.world.size == 1:  # no replica is held against this one
            self._update_audit.begin(self._state)

    def _after_update(self, step: int) -> None:
        if self._update_audit.under_way:
            self._audit_update(step)
        checked, self._checking = self._checking, False
        if self._every and (step + 1) % self._every == 0:
            self._seal()
        if checked and not self._state.sharding.needs_lockstep:
            # An update that went wrong shows in the replicas, before anything is computed from it.
            now = combined(self._sealed.values())
            self._compare_replicas(step, now, now)

    def _audit_update(self, step: int) -> None:
        def repeat(needed: bool) -> bool:
            return any(self.world.agree(lambda: needed))

        wrong = self._update_audit.end(self._state, repeat)
        results = self.world.agree(lambda: wrong)
        findings = [Finding("update", (rank,), parameter=name) for rank, name in enumerate(results) if name != ""]
        if findings and (self._act == "stop" or None in results):
            self._stop(step, findings)
        if findings:
            self._settle(step, findings, "repaired")

    def _before_save(self, step: int) -> None:
        if self._every:
            self._verify_state(step, step, "")

    def _verify_state(self, completed: int, step: int, *prefixes: str) -> None:
        """Compare a part of the state with its seal, if it has one, and with the other replicas'. Collective."""
        self._wrong.pop("state", None)
        if self._sealed_step == completed:
            self._compare_replicas(step, *self._compare_with_seal(*prefixes))
        else:
            now = combined(self._hashes(*prefixes).values())
            self._compare_replicas(step, now, now)

    def _heals_weights(self, step: int) -> bool:
        """True if the weights were wrong, and are now those of a replica. Collective, on all ranks alike."""
        self._sink, self._checking = None, True
        self._own.zero_()  # the search for the first value that is not finite has passed gradients
        self._wrong.pop("state", None)
        table = torch.zeros(self.world.size, 2, dtype=torch.int64, device=self.world.device)
        table[self.world.rank, 0], table[self.world.rank, 1] = self._compare_with_seal("model.")
        self.world.sum(table)
        suspects = self._suspects([(now, sealed) for now, sealed in table.tolist()])
        if suspects is None:
            return False
        (finding,) = self._with_parameters([Finding("state", suspects)])
        self._heal(step, finding)
        self._settle(step, [finding], "repaired")
        return True

    def _compare_replicas(self, step: int, now: int, sealed: int) -> None:
        """Compare (hash now, as sealed) of all ranks, and act where they differ. Collective."""
        table = torch.zeros(self.world.size, 2, dtype=torch.int64, device=self.world.device)
        table[self.world.rank, 0], table[self.world.rank, 1] = now, sealed
        self.world.sum(table)
        suspects = self._suspects([(now, sealed) for now, sealed in table.tolist()])
        if suspects is None:
            return
        (finding,) = self._with_parameters([Finding("state", suspects)])
        if self._act == "stop":
            self._stop(step, [finding])
        if self._act == "report":
            self._record(step, [finding], "reported")
        else:
            self._heal(step, finding)
            self._settle(step, [finding], "repaired")

    def _compare_with_seal(self, *prefixes: str) -> tuple[int, int]:
        """(hash now, as sealed) of a part of the state."""
        now = self._hashes(*prefixes)
        wrong = next((name for name, value in now.items() if value != self._sealed[name]), None)
        if wrong is not None:
            self._wrong["state"] = wrong
        return combined(now.values()), combined(self._sealed[name] for name in now)

    def _hashes(self, *prefixes: str) -> dict[str, int]:
        tensors = {name: t for name, t in self._state.tensors().items() if name.startswith(prefixes)}
        return dict(zip(tensors, torch.stack([bits_hash(t) for t in tensors.values()]).tolist(), strict=True))

    def _seal(self) -> None:
        self._sealed, self._sealed_step = self._hashes(""), self._state.step

    def _heal(self, step: int, finding: Finding) -> None:
        """Copy the state from a rank that is right. Raises CorruptionError if there is none."""
        sources = [rank for rank in range(self.world.size) if rank not in finding.ranks]
        if not finding.ranks or not sources or self._state.sharding.needs_lockstep:
            self._record(step, [finding], "restarted")
            raise CorruptionError(
                f"step {step}: {finding}, and no replica is known to be right. It is not applied and not saved.\n"
                "  The newest checkpoint is older. torchrun starts again from it; without it, give the same command.",
                restart=True,
            )
        for tensor in self._state.tensors().values():
            self.world.broadcast(tensor, sources[0])
        self._state.restored(self._state.step)
        self._seal()

    # What is done about it.

    def _settle(self, step: int, findings: Sequence[Finding], action: str) -> None:
        """Log what was repaired. A rank that was wrong before ends the job instead."""
        again = self._quarantine.second_time(step, [finding.ranks for finding in findings])
        if again is not None and self._quarantine.on:
            rank, first = again
            self._expel(step, findings, rank, f"for the second time (before in step {first})")
        self._record(step, findings, action)

    def _expel(self, step: int, findings: Sequence[Finding], rank: int, why: str) -> NoReturn:
        node = self._quarantine.node_of(rank)
        found = [finding for finding in findings if set(finding.ranks) == {rank}]
        self._record(step, [finding for finding in findings if finding not in found], "stopped")
        self._record(step, found, "quarantined", node)
        self._quarantine.end(rank, node, f"step {step}: {found[0]}, {why}")

    def _record(self, step: int, findings: Iterable[Finding], action: str, node: str | None = None) -> None:
        """Log what all ranks know alike."""
        for found in findings if self.world.is_main else ():
            self._log_finding(step, found, action, node)

    def _log_finding(self, step: int, found: Finding, action: str, node: str | None = None) -> None:
        culprit = found.ranks[0] if len(found.ranks) == 1 else None
        self._log.append(
            Corrupted(
                step=step, what=found.what, culprit=culprit, micro_batch=found.micro_batch,
                parameter=found.parameter, action=action, found=str(found), node=node,
            )
        )  # fmt: skip

    def _stop(self, step: int, findings: Sequence[Finding], why: str = "") -> NoReturn:
        wrong = {frozenset(finding.ranks) for finding in findings}
        if self._act == "repair" and self._quarantine.on and self.world.size > 1 and len(wrong) == 1:
            (ranks,) = wrong
            if len(ranks) == 1:
                self._expel(step, findings, next(iter(ranks)), "also when computed again")
        self._record(step, findings, "stopped")
        raise CorruptionError(
            f"step {step}: {'; '.join(map(str, findings))}. {why}It is not applied and not saved.\n"
            "  A run must not train on wrong bits. Test or replace that machine; the same command then resumes."
        )
