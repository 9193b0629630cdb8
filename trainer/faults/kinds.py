"""The catalogue: every kind of fault, what it imitates, how it is made, and how the run must answer it.

A kind is made by one of two hands. "rank": the process itself does it, at a named point of its step. "nemesis": a
process beside torchrun does it, when the event log has reached a step or after so many seconds. Signals from outside
that hit at a wall time are the nemesis's too, whatever their kind.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Hand = Literal["rank", "nemesis"]

# Where a rank can be told to break. Those of step.py, and those that wrappers add: startup, in_forward, in_backward,
# in_reduce, in_update, before_end.
GRADIENT = ("before_forward", "in_forward", "before_backward", "in_backward", "before_reduce", "in_reduce")
UPDATE = ("after_reduce", "before_update", "in_update", "after_update")
SAVE = ("in_save_shard", "before_commit", "after_commit")
AROUND = ("startup", "in_load", "in_eval", "before_end")
STEP = (*GRADIENT, *UPDATE)
ANYWHERE = (*STEP, *SAVE, *AROUND)
PHASES_WITHOUT_STEP = ("startup", "in_load", "before_end")

# What a kind may need of the machine or the job; `campaign` probes, and skips what it lacks with the reason.
LINUX, NAMESPACES, NODES, SHAPING = (
    "Linux",
    "network namespaces (as root, or where the system lets users make user namespaces)",
    "two nodes",
    "traffic shaping (tc netem)",
)


@dataclass(frozen=True)
class Setting:
    """One setting of a kind's own."""

    default: float | int | str
    what: str
    least: float = 0
    most: float = math.inf
    zero: bool = False
    """Whether 0 makes a fault too."""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Kind:
    name: str
    group: Literal["process", "time", "network", "storage", "numbers", "membership", "clock"]
    imitates: str
    """What it stands for in the field."""
    made: str
    detected: str
    recovered: str
    hand: Hand = "rank"
    phases: tuple[str, ...] = ()
    """Where it can be made, the usual place first. None for the nemesis."""
    settings: Mapping[str, Setting] = field(default_factory=lambda: MappingProxyType({}))
    expected_incidents: tuple[str, ...] = ()
    """Kinds of incident (incidents.py) by one of which the run must tell of it; empty: it passes without one."""
    may_cause: tuple[str, ...] = ()
    """Kinds of incident that can come of it besides, and are no false alarm."""
    on_rank: bool = True
    """Whether it hits a rank, and not a node, a link or the store."""
    names_rank: bool = True
    """Whether that incident must name the rank."""
    exits: tuple[int, ...] = (0,)
    """What the job may leave with; on any but 0 the same command is given again."""
    silent: bool = False
    """Nothing in this version notices it: an unequal end counts as undetected."""
    needs: tuple[str, ...] = ()
    detect_seconds: float = 10.0
    """From firing until the run has noticed: its processes end, or its log tells. The machine may be shared."""
    recover_seconds: float = 30.0
    """From firing until the next step that is new."""


SECONDS = {"seconds": Setting(3600.0, "how long it lasts")}
RESTART = "torchrun starts all workers again; they load the newest intact checkpoint"
DEATH = "the launcher sees the process end; peers' collectives break at once"
PREEMPTED = (0, 75)
LOST = (0, 1, 75, 130, 137, 143)  # a job that lost what it cannot do without; whoever started it starts it again


def _process(name: str, imitates: str, made: str, **more: Any) -> Kind:
    usual: dict[str, Any] = {
        "detected": DEATH,
        "recovered": RESTART,
        "phases": ANYWHERE,
        "expected_incidents": ("worker_lost",),
    }
    return Kind(name=name, group="process", imitates=imitates, made=made, **(usual | more))


def _storage(name: str, imitates: str, made: str, **more: Any) -> Kind:
    usual: dict[str, Any] = {
        "detected": "the save fails on every rank with one reason", "expected_incidents": ("save_failed",),
        "recovered": "training goes on; the next due save tries again", "phases": ("in_save_shard",),
    }  # fmt: skip
    return Kind(name=name, group="storage", imitates=imitates, made=made, **(usual | more))


def _damage(name: str, imitates: str, made: str, **more: Any) -> Kind:
    """The newest committed checkpoint is damaged and the rank killed, so that the next attempt meets the damage."""
    usual: dict[str, Any] = {
        "detected": "sizes and checksums of the manifest, before anything is loaded", "names_rank": False,
        "recovered": "passed over by all ranks; the newest intact checkpoint is loaded", "phases": GRADIENT + UPDATE,
        "expected_incidents": ("checkpoint_rejected",), "detect_seconds": 20.0,  # a restart lies between
    }  # fmt: skip
    made = f"{made}, in the newest checkpoint; then the rank kills itself"
    return Kind(name=name, group="storage", imitates=imitates, made=made, **(usual | more))


def _number(name: str, imitates: str, made: str, **more: Any) -> Kind:
    usual: dict[str, Any] = {"phases": GRADIENT[:1], "names_rank": False}
    return Kind(name=name, group="numbers", imitates=imitates, made=made, **(usual | more))


def _network(name: str, imitates: str, made: str, **more: Any) -> Kind:
    usual: dict[str, Any] = {
        "detected": "the watchdog: no progress within elastic.step_timeout_seconds", "hand": "nemesis",
        "recovered": "the side that holds the rendezvous goes on alone; the other joins when it can",
        "needs": (LINUX, NAMESPACES, NODES), "expected_incidents": ("hung", "worker_lost"), "names_rank": False,
        "on_rank": False, "exits": LOST, "detect_seconds": 30.0, "recover_seconds": 90.0,
    }  # fmt: skip
    return Kind(name=name, group="network", imitates=imitates, made=made, **(usual | more))


def _membership(name: str, imitates: str, made: str, **more: Any) -> Kind:
    usual: dict[str, Any] = {
        "detected": "the rendezvous: keep-alives that stop, or a node that waits to join", "hand": "nemesis",
        "recovered": "all workers start again at the new world size", "needs": (LINUX, NODES), "names_rank": False,
        "expected_incidents": ("worker_lost",), "exits": LOST, "detect_seconds": 30.0, "recover_seconds": 60.0,
        "on_rank": False,
    }  # fmt: skip
    return Kind(name=name, group="membership", imitates=imitates, made=made, **(usual | more))


FLIP = {"bits": Setting(1, "how many bits are flipped", 1)}
VALUE = {"value": Setting("nan", "what is written", choices=("nan", "inf"))}
HANG: dict[str, Any] = {
    "detected": "the watchdog: no progress within elastic.step_timeout_seconds; stacks and collective are recorded",
    "recovered": f"the process ends itself; {RESTART}",
}

KINDS: Mapping[str, Kind] = MappingProxyType({
    kind.name: kind
    for kind in (
        _process(
            "exception", "a software bug", "an exception is raised in the training thread",
            phases=(*STEP, "in_load", "in_eval", "before_end", "startup"),
        ),
        _process("sigkill", "the kernel's or the scheduler's kill", "kill -KILL of the rank by itself"),
        _process("sigsegv", "a driver or a library that writes where it should not", "kill -SEGV"),
        _process("sigabrt", "an assertion of a library, NCCL's watchdog", "kill -ABRT"),
        _process("exit", "a library that ends the process", "os._exit(3)"),
        _process(
            "sigterm", "a scheduler's notice before it takes the machine", "kill -TERM",
            detected="a signal handler notes it; all ranks agree at the end of the step",
            recovered="all save and leave with 75; the same command goes on", expected_incidents=("preempted",),
            exits=PREEMPTED, phases=STEP, names_rank=False,
        ),
        _process(
            "memory_limit", "an allocation that fails", "RLIMIT_AS at what is in use, then an allocation",
            phases=STEP, needs=(LINUX,),
        ),
        _process(
            "memory_kill", "the kernel's out-of-memory killer",
            "memory is filled up to `megabytes`, then SIGKILL, as the kernel would",
            settings={"megabytes": Setting(256, "how much is filled", 1)}, phases=STEP,
        ),
        _process(
            "agent_killed", "the launcher dies", "kill -KILL of torchrun", hand="nemesis", phases=(),
            names_rank=False, detected="each worker sees that its parent is gone",
            recovered="the workers end; the same command goes on", expected_incidents=("worker_lost",), exits=LOST,
        ),
        _process(
            "node_killed", "a machine loses power", "kill -KILL of torchrun and all its workers at once",
            hand="nemesis", phases=(), on_rank=False, names_rank=False, exits=LOST, needs=(LINUX,),
            recover_seconds=60.0,
            settings={"node": Setting(-1, "which node; -1 is the last", -1, zero=True)},
        ),
        _process(
            "repeated_kill", "a fault in the middle of recovery",
            "kill -KILL, and again in the next starts while the checkpoint is loaded",
            settings={"times": Setting(2, "deaths in a row", 2)}, phases=STEP,
        ),
        Kind(
            name="stopped", group="time", imitates="a process in uninterruptible sleep", made="kill -STOP",
            phases=(*STEP, "in_eval"), expected_incidents=("hung",), **HANG,
        ),
        # Which of two that disagree is right, or which of them gloo ends, nobody can tell.
        Kind(
            name="skipped_collective", group="time", imitates="ranks that disagree on what to do next",
            made="the rank leaves out one all-reduce of its step, and waits in the next one",
            phases=("before_reduce",), expected_incidents=("hung", "worker_lost"), names_rank=False, **HANG,
        ),
        Kind(
            name="lock_held", group="time", imitates="a deadlock between threads",
            made="the training thread waits for a lock that a thread keeps", phases=(*STEP, "in_eval"),
            settings=SECONDS, expected_incidents=("hung",), **HANG,
        ),
        Kind(
            name="stalled_data", group="time", imitates="a file system that does not answer a read",
            made="reading a micro-batch does not return", phases=("before_forward",), settings=SECONDS,
            expected_incidents=("hung",), **HANG,
        ),
        Kind(
            name="stalled_disk", group="time", imitates="a slow or overloaded storage server",
            made="writing a shard pauses", phases=("in_save_shard",),
            settings={"seconds": Setting(3.0, "how long the pause is")},
            detected="no fault: the next save waits for it", recovered="by itself",
        ),
        Kind(
            name="slow_rank", group="time", imitates="a hot or throttled device",
            made="the rank sleeps in each of some steps", phases=("before_backward",),
            settings={"seconds": Setting(0.2, "sleep per step"), "steps": Setting(5, "for so many steps", 1)},
            detected="no fault: slow is not hung", recovered="by itself",
        ),
        Kind(
            name="straggler", group="time", imitates="a noisy neighbour on the machine",
            made="kill -STOP and -CONT in turn", hand="nemesis",
            settings={
                "seconds": Setting(3.0, "how long"), "duty": Setting(0.5, "share of the time it is stopped", most=1),
            },
            detected="no fault: slow is not hung", recovered="by itself", needs=(LINUX,),
        ),
        _network(
            "partition", "a failed switch", "the last node's link goes down",
            settings={"seconds": Setting(20.0, "how long")},
        ),
        _network(
            "one_way_loss", "a bad cable", "what the last node sends is dropped; it still receives",
            settings={"seconds": Setting(20.0, "how long")},
        ),
        _network(
            "link_flap", "a loose connector", "the last node's link goes down and up again",
            settings={"times": Setting(3, "how often", 1), "seconds": Setting(0.3, "down each time")},
            detected="TCP sends again: no fault, unless it takes too long", recovered="by itself",
            expected_incidents=(),
        ),
        _network(
            "slow_link", "a congested network", "the last node's link is delayed and limited",
            settings={"milliseconds": Setting(20.0, "delay"), "seconds": Setting(5.0, "how long")},
            needs=(LINUX, NAMESPACES, NODES, SHAPING), detected="no fault: slow is not hung",
            recovered="by itself", expected_incidents=(),
        ),
        _network(
            "store_killed", "the rendezvous host dies", "the rendezvous store is killed", needs=(LINUX, NODES),
            detected="the agents' keep-alives fail",
            recovered="the job ends, its workers asked to save and leave; the same command goes on",
            expected_incidents=("preempted", "hung", "worker_lost"),
        ),
        _network(
            "store_unreachable", "the way to the rendezvous host fails for a while",
            "connections to the rendezvous store are frozen", needs=(LINUX, NODES),
            settings={"seconds": Setting(3.0, "how long")}, detected="no fault while nobody needs it",
            recovered="by itself", expected_incidents=(),
        ),
        _network(
            "store_restarted", "the rendezvous host comes back empty",
            "the rendezvous store is killed and started again", needs=(LINUX, NODES),
            detected="the agents' keep-alives fail, or nothing needs the store",
            recovered="the job ends; the same command goes on", expected_incidents=(),
        ),
        _storage("no_space", "a full disk", "writing fails with ENOSPC", phases=("in_save_shard", "before_commit")),
        _storage("eio_write", "a dying disk", "writing fails with EIO"),
        _storage("eio_fsync", "a dying disk behind a cache", "fsync fails with EIO"),
        _storage(
            "eio_rename", "a metadata server that fails", "the commit's rename fails with EIO",
            phases=("before_commit",),
        ),
        _storage(
            "eio_read", "a disk that cannot read what it wrote", "reading back fails with EIO",
            phases=("after_commit",),
        ),
        _storage("short_write", "a file system that lies", "half of one write is dropped and reported as done"),
        _storage(
            "slow_write", "a slow disk", "every write pauses", settings={"seconds": Setting(0.2, "per write")},
            detected="no fault: the next save waits for it", recovered="by itself", expected_incidents=(),
        ),
        _storage(
            "torn_save", "power loss while saving", "kill -KILL while shards are half written",
            detected="a directory without the rename does not exist", recovered=RESTART,
            expected_incidents=("worker_lost",),
        ),
        _damage("truncated_shard", "a lost tail of a file", "a shard is cut in half"),
        _damage("flipped_shard", "a bit that rots", "one bit of a shard is flipped"),
        _damage("missing_shard", "a file that an operator deleted", "a shard is removed"),
        _damage(
            "swapped_shard", "files mixed up while copying",
            "a shard is replaced by the same one of an older checkpoint",
        ),
        _damage("damaged_manifest", "a half-written list of contents", "the manifest loses its second half"),
        _storage(
            "corrupt_tokens", "a bit that rots in the data",
            "one byte of the token store is flipped; then the rank kills itself", phases=("before_forward",),
            detected="the store's checksum, when it is opened",
            recovered="the store is built again from the documents", expected_incidents=("worker_lost",),
        ),
        _storage(
            "vanished_checkpoints", "a file system that is unmounted",
            "RUN/checkpoints is moved away, and back after some seconds",
            settings={"seconds": Setting(1.0, "how long it is gone")}, phases=("before_forward", "in_save_shard"),
            expected_incidents=(), may_cause=("save_failed",),  # one that was under way
        ),
        _number(
            "nan_loss", "an overflow in the loss", "the loss of one micro-batch is not finite", settings=VALUE,
            detected="the step's sums are not finite", recovered="the step is computed again",
            expected_incidents=("not_finite",),
        ),
        _number(
            "nan_gradient", "an overflow in a kernel", "one entry of a gradient is not finite", settings=VALUE,
            phases=("in_backward",), detected="the gradient norm is not finite",
            recovered="the step is computed again", expected_incidents=("not_finite",),
        ),
        _number(
            "nan_weights", "memory that is overwritten", "one weight of one rank is not finite", settings=VALUE,
            detected="the loss is not finite, also when computed again",
            recovered="the run stops and says where; the same command goes on from the checkpoint",
            expected_incidents=("not_finite",), exits=(0, 1),
        ),
        _number(
            "spike", "a gradient far beyond all others", "a gradient is multiplied by 2^40", phases=("in_backward",),
            detected="it overflows its grid, and does not come again", recovered="the step is computed again",
        ),
        _number(
            "flip_gradient", "silent corruption in a device's arithmetic",
            "bits of the rank's gradient are flipped before the reduction", settings=FLIP, phases=("before_reduce",),
            silent=True, exits=(0, 1), detected="not yet", recovered="not yet",
        ),
        _number(
            "flip_reduced", "silent corruption on the way",
            "bits of the rank's copy of the summed gradient are flipped", settings=FLIP, phases=("after_reduce",),
            silent=True, exits=(0, 1), detected="not yet", recovered="not yet",
        ),
        _number(
            "flip_weights", "silent corruption in memory", "bits of the rank's weights are flipped", settings=FLIP,
            silent=True, exits=(0, 1), detected="not yet", recovered="not yet",
        ),
        _number(
            "flip_moments", "silent corruption in memory", "bits of the rank's optimizer moments are flipped",
            settings=FLIP, phases=("before_update",), silent=True, exits=(0, 1), detected="not yet",
            recovered="not yet",
        ),
        _number(
            "flip_activations", "silent corruption in a device's arithmetic", "bits of an activation are flipped",
            settings=FLIP, phases=("in_forward",), silent=True, exits=(0, 1), detected="not yet",
            recovered="not yet",
        ),
        _number(
            "wrong_operator", "a rarely taken path of torch.sum that is wrong",
            "sums over a dimension lose their last element where a rare condition on the data holds",
            settings={"steps": Setting(5, "for so many steps", 1)}, silent=True, exits=(0, 1), detected="not yet",
            recovered="not yet",
        ),
        _membership(
            "node_leaves", "a node is taken out for maintenance",
            "SIGKILL of the last node's agent and workers; nobody replaces it",
        ),
        _membership("node_joins", "a repaired node comes back", "one more agent starts", expected_incidents=()),
        _membership(
            "node_flaps", "a node that joins and dies again and again", "an agent starts and is killed, in turn",
            settings={"times": Setting(2, "how often", 1), "seconds": Setting(6.0, "how long it lives")},
            recover_seconds=120.0,
        ),
        _membership(
            "slow_joiner", "a node that takes long to boot",
            "one more agent starts, and is stopped for a while as it joins",
            settings={"seconds": Setting(3.0, "how long it is stopped")}, expected_incidents=(),
        ),
        Kind(
            name="clock_jump", group="clock", imitates="a time server's correction",
            made="the rank's wall clock jumps", phases=STEP,
            settings={"seconds": Setting(3600.0, "how far; may be negative", -1e6)},
            detected="no fault: durations come from clocks that do not jump", recovered="by itself",
        ),
    )
})  # fmt: skip
