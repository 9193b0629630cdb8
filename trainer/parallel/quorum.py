"""Quorum: a rank dies, and the step goes on. The second implementation of `Members`, beside `AllRanks`.

An epoch is a group of members that train together. It ends when one of them is lost or reports; then all that are left
meet in the next one (`Membership.meet`), with the sums that they have. `QuorumMembers` does a member's part of that:
it makes the epoch's process group, hands the state to those that need it, keeps partial sums, and knows which
micro-batches the arbiter has given to this member in the step that was interrupted.
"""

import datetime
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.errors import WorldError
from trainer.parallel.groups import Group
from trainer.parallel.partial import PartialSums
from trainer.parallel.protocol import Epoch, Report
from trainer.parallel.sharding import Sharding
from trainer.parallel.world import StepMembers, World, open_store
from trainer.phases import Hook, Phase, no_hook

T = TypeVar("T")
LOOK = datetime.timedelta(milliseconds=20)
"""Time between two looks, of a member that waits in a collective, at whether its epoch has ended."""
CHECK_SECONDS = 0.002  # how often it is looked whether an epoch has ended while its group is made
FRUITLESS_EPOCHS = 20
"""So many epochs in a row without a step and without a loss mean that the members cannot reach one another."""
SMALL = 2**16  # elements of a tensor that is reduced in a copy
PIECE = 4 * 2**20  # elements of a tensor that are sent at once
INTERRUPTIBLE = frozenset({Phase.BEFORE_FORWARD, Phase.BEFORE_REDUCE, Phase.IN_EVAL})
"""Phases in which a member may leave an epoch that has ended: its partial sums are whole there."""


class MembersChangedError(RuntimeError):
    """The epoch is over: the members that are left must meet again. No fault of this rank."""


class TransferError(RuntimeError):
    """This worker's state is not what it should be after a hand-over. It ends, and its successor builds a new one."""


class Membership(Protocol):
    """The connection to the arbiter, as `parallel.membership` makes it."""

    @property
    def member(self) -> int: ...
    @property
    def ended(self) -> bool: ...
    @property
    def change_wanted(self) -> bool: ...
    def meet(self, report: Report, waiting: Callable[[], None] = ...) -> Epoch: ...
    def committed(self, step: int) -> None: ...
    def at(self, place: str, step: int) -> None: ...
    def heartbeat(self, place: str, step: int) -> None: ...


class State(Protocol):
    """The part of `step.TrainState` that members need."""

    step: int
    sharding: Sharding
    grids: Any
    """`exact.Grids`, or None where nothing is rounded."""

    def tensors(self) -> dict[str, Tensor]: ...
    def restored(self, step: int) -> None: ...
    def state_sha256(self) -> str: ...


class Link:
    """An epoch's process group, and how to get out of a collective that waits in it.

    gloo cannot be told to give up: `abort` wakes nobody, and the end of the last reference waits for what is under way.
    Mostly the closed sockets of a dead peer end it, but not always. So a member that waits looks whether its epoch has
    ended, and leaves the collective behind: `left` is true then, and its tensors must not be used again.
    """

    left = False

    def __init__(
        self, group: dist.ProcessGroupGloo | None, passing: Callable[[], None] = lambda: None,
        ended: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """`passing` is called before and after each collective. Without a group the link is dropped already."""
        self._group, self._passing, self._ended = group, passing, ended

    def use(self, group: dist.ProcessGroupGloo | None) -> None:
        self._group = group

    def drop(self) -> None:
        """Let go of the group. While an operation of it is under way this waits and closes nothing: so in a thread."""
        groups, self._group = [self._group], None
        if groups[0] is not None:
            threading.Thread(target=groups.clear, name="toprope-epoch-ended", daemon=True).start()

    def together(self, start: Callable[[Any], Any]) -> None:
        """As `run`, for what all members do alike: they pass it in the same order."""
        self._passing()
        self.run(start)
        self._passing()

    def run(self, start: Callable[[Any], Any]) -> None:
        """Start an operation of the group and wait for its end. Raises MembersChangedError if it fails."""
        try:
            work = start(self._held())
            while work is not None:
                try:
                    work.wait(LOOK)
                    break
                except RuntimeError:
                    if work.is_completed():
                        work.wait()  # raises what went wrong, if something did
                        break
                if self._ended():
                    self.left = True
                    raise MembersChangedError("the epoch has ended, and its collective has not")
        except RuntimeError as error:
            raise MembersChangedError(str(error)) from None

    def apart(self, start: Callable[[Any], Any]) -> None:
        """As `run`, for sending and receiving. gloo closes a connection on which one of these was waited for with a
        limit, so a thread waits without one.
        """
        done: list[RuntimeError | None] = []

        def wait(groups: list[Any]) -> None:
            try:
                start(groups.pop()).wait()
                done.append(None)
            except RuntimeError as error:
                done.append(error)

        thread = threading.Thread(target=wait, args=([self._held()],), name="toprope-hand-over", daemon=True)
        thread.start()
        while not done:
            thread.join(CHECK_SECONDS)
            if not done and self._ended():
                self.left = True
                raise MembersChangedError("the epoch has ended, and its hand-over has not")
        if done[0] is not None:
            raise MembersChangedError(str(done[0])) from None

    def _held(self) -> dist.ProcessGroupGloo:
        group = self._group
        if group is None:
            raise MembersChangedError("the epoch has ended")
        return group


@dataclass(frozen=True)
class EpochWorld(World):
    """The members of an epoch, as one of them sees them. With groups, each of a member's processes is a rank."""

    link: Link = field(default_factory=lambda: Link(None))
    """To the other members; with groups to their processes in the same place."""
    own: Group = field(default_factory=Group)
    """The group of this process."""

    @property
    def has_main(self) -> bool:
        """True for the processes of the main member."""
        return self.rank < self.own.size

    def across(self, act: Callable[[], None]) -> None:
        """Do something with the other members. It fails on all processes of the group, or on none."""
        failed: MembersChangedError | None = None
        try:
            act()
        except MembersChangedError as error:
            failed = error
        if not self.own.decide(failed is None):
            raise failed or MembersChangedError("the epoch has ended for another process of this group")

    def sum_replicas(self, tensors: Sequence[Tensor]) -> None:
        if self.size > self.own.size and tensors:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])  # a copy: it may be left behind
            self._reduce_across(flat, dist.ReduceOp.SUM)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def _reduce_across(self, tensor: Tensor, how: Any) -> None:
        if self.size > self.own.size:
            self.across(
                lambda: self.link.together(lambda group: dist.all_reduce(tensor, how, group=group, async_op=True))
            )

    def max(self, tensor: Tensor) -> None:
        self._all_reduce(tensor, dist.ReduceOp.MAX)

    def sum(self, tensor: Tensor) -> None:
        self._all_reduce(tensor, dist.ReduceOp.SUM)

    def _all_reduce(self, tensor: Tensor, how: Any) -> None:
        if self.size > 1:
            # A collective that is left behind may still write. The gradients get another buffer then; what is small is
            # reduced in a copy.
            small = tensor.numel() <= SMALL or self.own.size > 1
            reduced = tensor.clone() if small else tensor
            if self.own.size > 1:
                dist.all_reduce(reduced, how)
            self._reduce_across(reduced, how)
            if small:
                tensor.copy_(reduced)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        assert self.own.size == 1  # the sentinel alone does it, and checks no groups
        if self.size > 1:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = source, 0
            self.link.together(lambda group: group.broadcast([tensor], options))

    def send(self, tensor: Tensor, receiver: int) -> None:
        """Not collective: the process in the same place of member number `receiver` of the epoch calls `receive`."""
        copied = tensor.to("cpu", copy=True)  # gloo sends from CPUs; the original may change if this is left behind
        self.link.apart(lambda group: group.send([copied], receiver, 0))

    def receive(self, tensor: Tensor, sender: int) -> None:
        received = torch.empty_like(tensor, device="cpu")
        self.link.apart(lambda group: group.recv([received], sender, 0))
        tensor.copy_(received)

    def _exchange(self, mine: Any) -> list[Any]:
        if self.size == 1:
            return [mine]
        own = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        self.sum(sizes)
        # One row a rank: a sum with zeros is a gather.
        rows = torch.zeros(self.size, int(sizes.max()), dtype=torch.uint8)
        rows[self.rank, : len(own)] = own
        self.sum(rows)
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)]


def join_group(epoch: Epoch, member: int, ended: Callable[[], bool], timeout_seconds: float, place: int = 0) -> Any:
    """Make the process group of an epoch: the one place where groups of a quorum are made.

    Members that are groups make one for each of their places.

    Raises MembersChangedError if the epoch ends meanwhile. torch offers no way to interrupt the making, so a thread
    does it: if a member dies then, the thread is left behind and fails by itself.
    """
    if len(epoch.members) == 1:
        return None
    made: list[Any] = []
    host, _, port = epoch.store.rpartition(":")
    timeout = datetime.timedelta(seconds=timeout_seconds)

    def make() -> None:
        try:
            store = open_store(host, int(port), timeout=datetime.timedelta(seconds=60), wait_for_workers=False)
            own = dist.PrefixStore(f"epoch {epoch.number} place {place}", store)
            made.append(dist.ProcessGroupGloo(own, epoch.members.index(member), len(epoch.members), timeout))
        except RuntimeError as error:
            made.append(error)

    thread = threading.Thread(target=make, name=f"toprope-epoch-{epoch.number}", daemon=True)
    thread.start()
    while not made:
        thread.join(CHECK_SECONDS)
        if ended() and not made:
            raise MembersChangedError("the epoch has ended while its group was made")
    if isinstance(made[0], Exception):
        raise MembersChangedError(f"the members cannot reach one another: {made[0]}")
    thread.join()  # it holds the group, too
    return made.pop()


@dataclass(frozen=True)
class Change:
    """The members' coming together in an epoch, for the log."""

    epoch: Epoch
    step: int
    """Completed steps of the state that they go on from."""
    seconds: float
    """From the end of the epoch before, as this member noticed it, until the members can go on."""
    received: bool
    """True if this member has got the state from the first one."""
    ranks: int
    """Processes of all members."""


class QuorumMembers:
    """One member's part in the epochs that it is a member of."""

    def __init__(
        self,
        membership: Membership,
        device: torch.device,
        micro_batches: int,
        timeout_seconds: float,
        restore: Callable[[Any, World], None],
        changed: Callable[[Change], None] = lambda change: None,
        note: Callable[[], dict[str, Any]] = dict,
        waiting: Callable[[], None] = lambda: None,
        group: Group | None = None,
    ) -> None:
        """`restore` loads the newest checkpoint on all members where none of them has a state. Collective.

        `changed` is told of each epoch, `note` is carried to all members in the reports. `timeout_seconds` is that of
        collectives. `waiting` is called while this member waits for an epoch. `group`: the processes that are this
        member, if it is not one alone; they call everything alike.
        """
        self._own = group or Group()
        self._membership, self._device, self._count = membership, device, micro_batches
        self._timeout_seconds, self._restore, self._changed = timeout_seconds, restore, changed
        self._note, self._waiting = note, waiting
        self._partial = PartialSums()
        self._link = Link(None)
        self._world = EpochWorld(self._own.place, self._own.size, device, own=self._own)
        self._order: Sequence[int] = (0,)
        self._state: State | None = None
        """Set once it is whole: a report names its step."""
        self._is_overwritten = False
        """True while a state that was to be received is here in part."""
        self._interrupted: StepMembers | None = None
        """Members and shares of the first step of the epoch; None: dealt out in turn."""
        self._hook: Hook = no_hook
        self._stages: set[str] = set()
        """Stages that have been done after the last step."""
        self._ended_at: float | None = None
        self._lost = set[int]()
        self._fruitless = 0

    @property
    def world(self) -> EpochWorld:
        return self._world

    @property
    def order(self) -> Sequence[int]:
        """By rank: the number of the member."""
        return self._order

    @property
    def has_met(self) -> bool:
        """True once this worker has been a member with a whole state."""
        return self._state is not None

    @property
    def partial(self) -> PartialSums:
        return self._partial

    def wrap_hook(self, hook: Hook) -> Hook:
        """A hook that also reports progress, and leaves an epoch that has ended where nothing is lost by that."""
        main, self._hook = threading.get_ident(), hook

        def both(phase: str, step: int) -> None:
            if threading.get_ident() == main:  # the thread that writes checkpoints passes phases too
                self._membership.heartbeat(phase, step)
            hook(phase, step)
            # The processes of a group hear of it one by one, and find out together in their next reduction.
            if phase in INTERRUPTIBLE and self._own.size == 1 and self._membership.ended:
                raise MembersChangedError(f"the epoch has ended ({phase})")

        return both

    def meet(self, state: State) -> bool:
        """See `Members.meet`. Tries again until an epoch has begun in which nobody is lost meanwhile."""
        while True:
            try:
                return self._meet(state)
            except MembersChangedError:
                continue

    def _meet(self, state: State) -> bool:
        self._link.drop()
        if self._link.left:
            state.sharding.renew_buffers()
        step = self._state.step if self._state is not None else None
        have = self._partial.done(state.step) if step is not None else ()
        magnitudes = [] if state.grids is None else [state.grids.seen]
        self._partial.put_back([*state.sharding.reduced_in_place(), *magnitudes])
        note = {"stages": sorted(self._stages), **self._note()}
        epoch = self._membership.meet(Report(step=step, have=have, key="", note=note), self._waiting)
        started = self._ended_at or time.monotonic()  # a spare may have waited for hours
        self._count_fruitless(epoch)
        own, rank = self._membership.member, epoch.members.index(self._membership.member)
        if self._state is None:
            self._hook(Phase.JOINING, epoch.step or 0)
        if epoch.step is None and self._is_overwritten:
            # Without a checkpoint, all begin with the state that they have built.
            raise TransferError("the giver of the state has died, and only a part of it is here")
        self._world = world = self._connect(epoch, rank, state)
        self._order = epoch.members
        received = own in epoch.receivers
        if epoch.step is None:
            self._restore(state, world)
            self._stages = {"all"}
        else:
            self._hand_over(state, world, epoch)
            newest = [report for report in epoch.reports.values() if report.step == epoch.step]
            self._stages = set().union(*(report.note.get("stages", ()) for report in newest))
        self._state = state
        if not epoch.kept.get(own, ()):
            self._partial.forget()
        work = self._own.share(epoch.work.get(own, ()))
        share = StepMembers(world, range(self._count), work, self._partial)
        self._interrupted = share if epoch.step is not None else None
        self._ended_at = None
        self._changed(Change(epoch, state.step, time.monotonic() - started, received, world.size))
        return "all" not in self._stages and state.step > 0

    def _connect(self, epoch: Epoch, rank: int, state: State) -> EpochWorld:
        """Connect with the other members: `rank` is that of this member among them."""
        membership, size = self._membership, self._own.size
        self._link = link = Link(None, lambda: membership.at("collective", state.step), lambda: membership.ended)
        world = EpochWorld(
            rank * size + self._own.place, len(epoch.members) * size, self._device, link=link, own=self._own
        )
        world.across(
            lambda: link.use(
                join_group(epoch, membership.member, lambda: membership.ended, self._timeout_seconds, self._own.place)
            )
        )
        return world

    def _count_fruitless(self, epoch: Epoch) -> None:
        self._fruitless = 0 if epoch.left.keys() - self._lost else self._fruitless + 1
        self._lost |= epoch.left.keys()
        if self._fruitless > FRUITLESS_EPOCHS:
            raise WorldError(
                f"{FRUITLESS_EPOCHS} times the workers have met, and their collectives failed although none was lost.\n"
                "  They may not reach one another's ports: check firewalls and GLOO_SOCKET_IFNAME."
            )

    def _hand_over(self, state: State, world: EpochWorld, epoch: Epoch) -> None:
        """Give the state of the first member to those that need it, and check it by its hash."""
        step = epoch.step
        assert step is not None
        receivers = [epoch.members.index(member) for member in epoch.receivers]
        own = epoch.members.index(self._membership.member)
        pieces = _pieces(state.tensors())
        digest = torch.zeros(32, dtype=torch.uint8)

        def send() -> None:
            for piece in (*pieces, digest):
                for receiver in receivers:
                    world.send(piece, receiver)
                self._passed_piece(step)

        def receive() -> None:
            for piece in (*pieces, digest):
                world.receive(piece, 0)
                self._passed_piece(step)

        if receivers and own == 0:
            digest.copy_(_digest(state))
            world.across(send)
        elif own in receivers:
            self._state, self._is_overwritten = None, True  # until all of it is there
            world.across(receive)
            state.restored(step)  # first: numbers of an optimizer of one's own are taken over from the tensors
            if not torch.equal(digest, _digest(state)):
                raise TransferError("the state that a peer has sent has another hash here")
            self._is_overwritten = False

    def _passed_piece(self, step: int) -> None:
        self._membership.heartbeat(Phase.IN_TRANSFER, step)
        self._hook(Phase.IN_TRANSFER, step)

    def commit(self, step: int, compute: Callable[[StepMembers], T]) -> T:
        assert self._state is not None
        members = self._interrupted or StepMembers(self._world, range(self._count), partial=self._partial)
        grids = self._state.grids
        magnitude = None if grids is None else grids.magnitude.clone()
        try:
            return compute(members)
        except MembersChangedError:
            if grids is not None and magnitude is not None:
                grids.restore(magnitude)  # it may have been widened: the others begin again on the committed one
            raise

    def applied(self, step: int, change: bool) -> None:
        self._interrupted, self._stages, self._fruitless = None, set(), 0
        self._membership.committed(step)
        if change:
            raise MembersChangedError("a worker waits to join")

    def once(self, name: str, act: Callable[[], None]) -> None:
        if not self._stages & {name, "all"}:
            act()
            self._stages.add(name)

    def outlive(self, error: BaseException) -> bool:
        if not isinstance(error, MembersChangedError):
            return False
        self._ended_at = self._ended_at or time.monotonic()
        return True


def _pieces(tensors: dict[str, Tensor]) -> Sequence[Tensor]:
    """Views of what this process holds of all tensors, in the order of names, none too large to be sent at once."""
    own = (tensors[name].detach() for name in sorted(tensors))
    flat = ((tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1) for tensor in own)
    return [piece for tensor in flat if tensor.numel() for piece in tensor.split(PIECE)]


def _digest(state: State) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(state.state_sha256()), dtype=torch.uint8)
