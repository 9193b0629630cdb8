"""Wrong numbers: values that are not finite, flipped bits, an operator that is sometimes wrong.

What is done to tensors is in tensors.py, which needs torch.
"""

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

from trainer.config import Config, FaultEntry
from trainer.errors import EXIT_QUARANTINED
from trainer.faults.fault import Fault, Setting
from trainer.faults.plan import PlannedFault
from trainer.faults.rank import RankContext
from trainer.phases import Phase

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trainer.faults.wrong_operators import WrongOperator as WrongMode


class NumbersFault(Fault):
    """Corrupts a number of what `tensors` gives, or of the tensor that the rank computes at the fault's phase."""

    group = "numbers"
    phases = (Phase.BEFORE_FORWARD,)
    names_rank = False

    def tensors(self, rank: RankContext) -> "list[Tensor]":
        """The tensors of this rank in which a number is corrupted."""
        raise NotImplementedError

    def corrupt(self, planned: PlannedFault, rank: RankContext, chosen: "list[Tensor]") -> None:
        """Corrupt these tensors in place."""
        from trainer.faults import tensors

        chosen, chance = [tensors.local(tensor) for tensor in chosen], rank.chance(planned)
        if "bits" in planned.settings:
            tensors.flip(chosen, planned.settings["bits"], chance)
        else:
            tensors.spoil(chosen, planned.settings["value"], chance)

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        self.corrupt(planned, rank, self.tensors(rank))

    def change(self, planned: PlannedFault, rank: RankContext, tensor: "Tensor") -> "Tensor":
        from trainer.faults import tensors

        changed = tensors.contiguous_copy(tensor)
        self.corrupt(planned, rank, [changed])
        return changed


class VisibleFault(NumbersFault):
    """A wrong number that shows: a sum that is not finite, or a gradient beyond its grid."""

    recovered = "the step is computed again"
    settings: ClassVar = {"value": Setting("nan", "what is written", choices=("nan", "inf"))}
    expected_incidents = ("not_finite",)


class SilentFault(NumbersFault):
    """A wrong number that nothing but a sentinel notices."""

    detected = "by a sentinel alone: ranks or recomputations disagree on bits"
    recovered = "computed again, or copied from a replica; else the run stops before it applies the step"
    settings: ClassVar = {"bits": Setting(1, "how many bits are flipped", 1)}
    exits = (0, 1, EXIT_QUARANTINED)
    silent = True

    def watched(self, world_size: int) -> Fault:
        kind = copy.copy(self)
        vars(kind).update(silent=False, expected_incidents=("corrupted",))
        return kind


class NanLoss(VisibleFault):
    imitates = "an overflow in the loss"
    made = "the loss of one micro-batch is not finite"
    detected = "the step's sums are not finite"

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        from trainer.faults import tensors

        tensors.scale_next_output(rank.state.model, float(planned.settings["value"]))


class NanGradient(VisibleFault):
    imitates = "an overflow in a kernel"
    made = "one entry of a gradient is not finite"
    detected = "the gradient norm is not finite"
    phases = (Phase.IN_BACKWARD,)


class NanWeights(VisibleFault):
    imitates = "memory that is overwritten"
    made = "one weight of one rank is not finite"
    detected = "the loss is not finite, also when computed again"
    recovered = "copied from a replica by a sentinel; without one the run stops and says where, and resumes on command"
    exits = (0, 1)
    may_cause = ("corrupted",)

    def tensors(self, rank: RankContext) -> "list[Tensor]":
        from trainer.model import blocks_of

        # A matrix of a block, because every token passes through it.
        return [p for block in blocks_of(rank.state.model) for p in block.parameters() if p.ndim == 2]


class Spike(VisibleFault):
    imitates = "a gradient far beyond all others"
    made = "a gradient is multiplied by 2^40"
    detected = "it overflows its grid, and does not come again"
    phases = (Phase.IN_BACKWARD,)
    settings: ClassVar = {}
    expected_incidents = ()

    def change(self, planned: PlannedFault, rank: RankContext, tensor: "Tensor") -> "Tensor":
        return tensor * 2.0**40


class FlipGradient(SilentFault):
    imitates = "silent corruption in a device's arithmetic"
    made = "bits of the rank's gradient are flipped before the reduction"
    phases = (Phase.BEFORE_REDUCE,)

    def tensors(self, rank: RankContext) -> "list[Tensor]":
        return [gradient for _, gradient, _ in rank.state.sharding.gradients()]


class FlipReduced(FlipGradient):
    imitates = "silent corruption on the way"
    made = "bits of the rank's copy of the summed gradient are flipped"
    phases = (Phase.AFTER_REDUCE,)


class FlipWeights(SilentFault):
    imitates = "silent corruption in memory"
    made = "bits of the rank's weights are flipped"

    def tensors(self, rank: RankContext) -> "list[Tensor]":
        return list(rank.state.sharding.parameters.values())


class FlipMoments(SilentFault):
    imitates = "silent corruption in memory"
    made = "bits of the rank's optimizer moments are flipped"
    phases = (Phase.BEFORE_UPDATE,)

    def tensors(self, rank: RankContext) -> "list[Tensor]":
        states = [moments for optimizer in rank.state.optimizers for moments in optimizer.state.values()]
        return [tensor for state in states for name, tensor in state.items() if name != "step"]


class FlipActivations(SilentFault):
    imitates = "silent corruption in a device's arithmetic"
    made = "bits of an activation are flipped"
    phases = (Phase.IN_FORWARD,)


class FlipReceived(SilentFault):
    imitates = "silent corruption in a network card or a switch"
    made = "bits of the rank's contribution are flipped while it is sent: all ranks receive the same wrong sum"
    phases = (Phase.BEFORE_REDUCE,)
    needs_peers = True

    def refuses(self, entry: FaultEntry, phase: str, config: Config, world_size: int) -> str:
        if config.parallel.strategy == "replicate" and world_size > 1:
            return ""
        return 'its gradients are in no all-reduce.\n  Set parallel.strategy = "replicate" and use 2 ranks or more.'

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        def damaged(call: Callable[..., Any]) -> None:
            self.corrupt(planned, rank, [cast(functools.partial[Any], call).args[0]])
            call()

        rank.instead_of_all_reduce(damaged)


class FlipUpdate(FlipWeights):
    imitates = "silent corruption in a device's arithmetic"
    made = "bits of the rank's updated weights are flipped when the optimizer writes them"
    phases = (Phase.IN_UPDATE,)


class FlipTokens(SilentFault):
    imitates = "silent corruption between the token store and the rank"
    made = "one token of the rank's next micro-batch is read as another"
    settings: ClassVar = {}

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        batches, chance = rank.batches, rank.chance(planned)
        read = batches.read

        def once(sample_ids: "np.ndarray") -> "np.ndarray":
            batches.read = read
            rows = read(sample_ids)
            rows[chance.randrange(rows.shape[0]), chance.randrange(rows.shape[1])] ^= 1  # the vocabulary has this one
            return rows

        batches.read = once


class WrongArithmetic(SilentFault):
    """Operators of the rank are wrong for some steps."""

    def mode(self, planned: PlannedFault, rank: RankContext) -> contextlib.AbstractContextManager[Any]:
        """Return a context that makes them wrong while it is entered."""
        raise NotImplementedError

    def watched(self, world_size: int) -> Fault:
        return super().watched(world_size) if world_size > 1 else self  # alone it agrees with itself

    def refuses(self, entry: FaultEntry, phase: str, config: Config, world_size: int) -> str:
        if not config.numerics.compile:
            return ""
        return "numerics.compile fuses the operators that it replaces.\n  Set numerics.compile = false, or leave it."

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        # It ends with its last step, or with the attempt if that comes before.
        wrong = rank.undo.enter_context(contextlib.ExitStack())
        wrong.enter_context(self.mode(planned, rank))

        def end(phase: str, step: int) -> None:
            if phase == Phase.AFTER_UPDATE and step >= planned.last_step:
                wrong.close()

        rank.followers.append(end)


class OperatorFault(WrongArithmetic):
    """One operator of torch is wrong: a function of its arguments, so a replay meets it again (`hunt`)."""

    settings: ClassVar = {"steps": Setting(5, "for so many steps", 1)}
    operator: ClassVar[str]
    """Class in wrong_operators.py."""

    def wrong_operator(self, planned: PlannedFault) -> "WrongMode":
        """Return the mode under which the operator is wrong."""
        from trainer.faults import wrong_operators

        return getattr(wrong_operators, self.operator)()

    def mode(self, planned: PlannedFault, rank: RankContext) -> contextlib.AbstractContextManager[Any]:
        return self.wrong_operator(planned)


class WrongOperator(OperatorFault):
    imitates = "a rarely taken path of torch.sum that is wrong"
    made = "sums over a dimension are wrong where a rare condition on the data holds"
    settings: ClassVar = {
        **OperatorFault.settings,
        "path": Setting(
            "rare", "which path: rare (loses an addend) or strided (adds what lies behind)", choices=("rare", "strided")
        ),
    }

    def wrong_operator(self, planned: PlannedFault) -> "WrongMode":
        from trainer.faults import wrong_operators as wrong

        return {"rare": wrong.RareSum, "strided": wrong.StridedSum}[planned.settings["path"]]()


class WrongSoftmax(OperatorFault):
    imitates = "a kernel whose tail is wrong for one shape"
    made = "softmax over the vocabulary leaves its last vector out of the sum"
    operator = "WrongSoftmax"


class WrongIndexAdd(OperatorFault):
    imitates = "threads that overwrite each other's sums"
    made = "rows added by index keep only the last of those with the same index"
    operator = "WrongIndexAdd"


class WrongMatmul(OperatorFault):
    imitates = "a core whose multiply-add is wrong"
    made = "matrix products of one rank leave out an element of the inner axis in their first row"
    operator = "WrongMatmul"


class WrongCast(OperatorFault):
    imitates = "a conversion that cuts off instead of rounding"
    made = "casts from float32 drop low bits"
    operator = "WrongCast"


class AlwaysWrong(WrongArithmetic):
    imitates = "a device with a broken unit: wrong every time, and in the same way"
    made = "the same bit is wrong in the result of every matrix product of the rank"
    settings: ClassVar = {"steps": Setting(5, "for so many steps", 1)}

    def mode(self, planned: PlannedFault, rank: RankContext) -> contextlib.AbstractContextManager[Any]:
        from trainer.faults import tensors

        return tensors.WrongProducts(rank.chance(planned), every=1)


class SometimesWrong(WrongArithmetic):
    imitates = "a device that is wrong now and then, when it is hot or its voltage is low"
    made = "any bit is wrong in one of `every` matrix products of the rank"
    settings: ClassVar = {
        "every": Setting(500, "the number of matrix products of which one is wrong", 2),
        "steps": Setting(12, "for so many steps", 1),
    }

    def watched(self, world_size: int) -> Fault:
        return SilentFault.watched(self, world_size)  # the second time it is right

    def mode(self, planned: PlannedFault, rank: RankContext) -> contextlib.AbstractContextManager[Any]:
        from trainer.faults import tensors

        return tensors.WrongProducts(rank.chance(planned), planned.settings["every"])
