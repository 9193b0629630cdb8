"""Figures of scripts/bench about silent corruption: what a sentinel finds of flipped bits, and what other rules find.

Three ranks, as threads of one process, train a tiny model. Each trial goes back to one state, flips one bit on one
rank, takes some steps, and is compared with the same steps without the flip. Trials are appended to a file and never
repeated, so an interrupted bench goes on where it was.
"""

import contextlib
import json
import math
import random
import statistics
import textwrap
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from trainer import config as configs
from trainer import costs, job, loop
from trainer.data import prepare
from trainer.errors import CorruptionError, NumericsError
from trainer.faults import tensors
from trainer.log import events
from trainer.log.events import Corrupted, NotFinite, StepDone
from trainer.model import blocks_of
from trainer.parallel import world
from trainer.parallel.world import AllRanks
from trainer.phases import Hook, Phase
from trainer.sentinel.bits import bits_hash, combined
from trainer.sentinel.corruption import Sentinel
from trainer.step import StepContext

ROOT = Path(__file__).resolve().parent.parent
TRIALS = ROOT / "runs" / "bench-sentinel" / "trials.jsonl"
CLEAN = ROOT / "runs" / "bench-sentinel" / "clean"
RANKS, BITS = 3, 32
FLIPS = 7 * BITS  # of each kind: every bit equally often
SETTINGS = {"off": ("0", 0), "1": ("1", 1), "1/8": ("1/8", 1), "1/32": ("1/32", 1), "1/8, every 8": ("1/8", 8)}
"""By name: share of the micro-batches that is audited, and the steps between two checks of the state."""
AFTER = 3  # steps after a flip in which it may be noticed, beside those until the next check of the state
WINDOW, SIGMAS = 128, 6.0  # of the rules on loss and gradient norm
ENDLESS = 60  # steps after which a rank that stays wrong counts as unnoticed
KINDS = (
    "flip_tokens", "flip_activations", "flip_gradient", "flip_received", "flip_reduced", "flip_weights", "flip_moments",
    "flip_update", "sometimes_wrong", "always_wrong",
)  # fmt: skip
LASTING = {"always_wrong": 1, "sometimes_wrong": 120}  # matrix products of which one is wrong


class Meeting:
    """Place where the threads exchange values."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(RANKS)
        self._values: list[Any] = [None] * RANKS

    def exchange(self, rank: int, mine: Any) -> list[Any]:
        self._values[rank] = mine
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def end(self) -> None:
        self._barrier.abort()


@dataclass(frozen=True)
class Thread(world.World):
    """A rank that is a thread: its collectives take no time to speak of, however busy the machine is."""

    meeting: Meeting = field(default_factory=Meeting)
    before_sum: list[Callable[[torch.Tensor], None]] = field(default_factory=list)
    """Called once with the next tensor that this rank sends."""

    def sum(self, tensor: torch.Tensor) -> None:
        while self.before_sum:
            self.before_sum.pop()(tensor)
        tensor.copy_(torch.stack(self._exchange(tensor.clone())).sum(0))

    def max(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self._exchange(tensor.clone())).amax(0))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        tensor.copy_(self._exchange(tensor.clone())[source])

    def _exchange(self, mine: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, mine)


class Log:
    def __init__(self) -> None:
        self.events: list[Any] = []
        self.append = self.events.append


class Flip:
    """A fault of one trial: strikes once, on one rank, at the phase of its kind. Without a kind it never does."""

    def __init__(self, kind: str = "", rank: int = 0, bit: int = 0, key: str = "") -> None:
        self.kind, self.rank, self.bit, self.chance = kind, rank, bit, random.Random(key)
        self.done = not kind

    def flip(self, chosen: Sequence[torch.Tensor]) -> None:
        self.done = True
        tensors.flip([tensors.local(tensor) for tensor in chosen], 1, self.chance, among=[self.bit])


class Trainer:
    """The loop of one rank with one setting of the sentinel."""

    def __init__(self, ranks: Thread, audit: str, every: int) -> None:
        overrides = [
            "data.micro_batches=3", "budget.steps=100000", 'wandb.mode="disabled"', "checkpoint.every_steps=0",
            f'sentinel.audit="{audit}"', f"sentinel.state_hash_every_steps={every}",
        ]  # fmt: skip
        if (audit, every) != ("0", 0):
            overrides.append("sentinel.quarantine_within=0")  # each trial begins anew
        config = configs.load(ROOT / "configs" / "smoke.toml", overrides)
        job.set_numerics(config, ranks.device)
        self.ranks, self.every, self.log, self.flip = ranks, every, Log(), Flip()
        prepared = prepare(config.data, config.eval, config.model.context)
        self.batches = job.batches_of(config, prepared)
        log = cast(Any, self.log)
        sentinel = Sentinel(config)
        sentinel.check_tokens(self.batches, prepared.train.tokens, ranks)
        vocabulary = costs.padded_vocab(prepared.tokenizer.vocab_size, config.model.vocab_size)
        self.state = job.build(config, vocabulary, ranks, sentinel.watch)
        members = sentinel.wrap_members(AllRanks(ranks, config.data.micro_batches), self.state, self.batches, log)
        context = StepContext(config, members, self.batches, sentinel.wrap_hook(self._hook()))
        nothing = cast(Any, None)
        self.collaborators = loop.Collaborators(context, log.append, nothing, nothing)
        self._lasting, self._sentinel = contextlib.ExitStack(), sentinel

    def _hook(self) -> Hook:
        in_own = False  # an audit passes no phase

        def hook(phase: str, step: int) -> None:
            nonlocal in_own
            in_own = phase in (Phase.BEFORE_FORWARD, Phase.BEFORE_BACKWARD)
            flip, state = self.flip, self.state
            if flip.done or flip.rank != self.ranks.rank:
                return
            match flip.kind, phase:
                case ("flip_tokens", Phase.BEFORE_FORWARD):
                    flip.done = True
                    self._misread()
                case ("flip_weights", Phase.BEFORE_FORWARD):
                    flip.flip(list(state.sharding.parameters.values()))
                case ("flip_gradient", Phase.BEFORE_REDUCE) | ("flip_reduced", Phase.AFTER_REDUCE):
                    flip.flip([gradient for _, gradient, _ in state.sharding.gradients()])
                case ("flip_received", Phase.BEFORE_REDUCE):
                    self.ranks.before_sum.append(lambda tensor: flip.flip([tensor]))
                case ("flip_moments", Phase.BEFORE_UPDATE):
                    flip.flip([t for name, t in state.tensors().items() if name.startswith("optim.")])
                case (("always_wrong" | "sometimes_wrong"), Phase.BEFORE_FORWARD):
                    flip.done = True
                    self._lasting.enter_context(tensors.WrongProducts(flip.chance, LASTING[flip.kind]))

        def after_block(output: torch.Tensor) -> torch.Tensor:
            if (
                self.flip.kind != "flip_activations"
                or self.flip.done
                or self.flip.rank != self.ranks.rank
                or not in_own
            ):
                return output
            changed = tensors.contiguous_copy(output)
            self.flip.flip([changed])
            return changed

        def updated(*_: Any) -> None:
            if self.flip.kind == "flip_update" and not self.flip.done and self.flip.rank == self.ranks.rank:
                self.flip.flip(list(self.state.sharding.parameters.values()))

        tensors.after_forward(blocks_of(self.state.model)[0], after_block)
        for optimizer in self.state.optimizers:
            optimizer.register_step_post_hook(updated)
        return hook

    def _misread(self) -> None:
        read, chance, bit = self.batches.read, self.flip.chance, self.flip.bit

        def once(sample_ids: Any) -> Any:
            self.batches.read = read
            rows = read(sample_ids)
            place = chance.randrange(rows.shape[0]), chance.randrange(rows.shape[1])
            rows[place] ^= 1 << bit % (8 if rows[place] < 256 else 6)  # ids that the vocabulary has
            return rows

        self.batches.read = once

    def restore(self, saved: dict[str, torch.Tensor], step: int) -> None:
        for name, tensor in self.state.tensors().items():
            tensor.copy_(saved[name])
        self.state.restored(step)
        cast(Any, self._sentinel)._seal.forget()  # it is of another state

    def run(self, flip: Flip, steps: int, until_found: bool = False) -> dict[str, Any]:
        """Take some steps with a flip; return what was noticed, the same on all ranks."""
        self.flip = flip
        self.log.events.clear()
        first, error = self.state.step, ""
        hashes: list[int] = []
        try:
            for _ in range(steps):
                loop.take_step(self.state, self.collaborators)
                hashes.append(combined([int(bits_hash(t)) for t in self.state.tensors().values()]))
                if until_found and any(self.ranks.agree(lambda: self._found(first) is not None)):
                    break
        except (CorruptionError, NumericsError) as caught:
            error = type(caught).__name__
        finally:
            self._lasting.close()
            self.flip = Flip()
        every = self.ranks.agree(lambda: self._found(first))
        done = [event for event in self.log.events if isinstance(event, StepDone)]
        return {
            "found": next(filter(None, every), None), "error": error, "hashes": self.ranks.agree(lambda: hashes),
            "not_finite": any(isinstance(event, NotFinite) for event in self.log.events),
            "losses": [event.loss for event in done], "norms": [event.grad_norm for event in done],
        }  # fmt: skip

    def _found(self, first: int) -> dict[str, Any] | None:
        found = next((event for event in self.log.events if isinstance(event, Corrupted)), None)
        return found and {"after": found.step - 1 - first, "culprit": found.culprit, "what": found.what}


def worker() -> None:
    """Go through all trials that the file lacks."""
    meeting = Meeting()

    def work(rank: int) -> None:
        try:
            go_through(Thread(rank, RANKS, torch.device("cpu"), meeting=meeting))
        finally:
            meeting.end()  # the others must not wait for one that has failed

    with ThreadPoolExecutor(RANKS) as threads:
        for rank in [threads.submit(work, rank) for rank in range(RANKS)]:
            rank.result()


def go_through(ranks: Thread) -> None:
    trainers = {name: Trainer(ranks, *setting) for name, setting in SETTINGS.items()}
    off = trainers["off"]
    calm = off.run(Flip(), WINDOW + 32)  # past the first steps, whose losses fall
    window = {name: calm[name][-WINDOW:] for name in ("losses", "norms")}
    saved = {name: tensor.clone() for name, tensor in off.state.tensors().items()}
    done = ranks.from_main(lambda: {(row["kind"], row["setting"], row["number"]) for row in read_trials()})
    for number in range(FLIPS):
        start = WINDOW + 32 + number * 37
        missing = [key for key in keys(number) if key not in done]
        if not missing:
            continue
        off.restore(saved, start)
        clean = off.run(Flip(), AFTER + max(trainer.every for trainer in trainers.values()))
        for kind, setting, _ in missing:
            trainer = trainers[setting]
            flip = Flip("" if kind == "none" else kind, number % RANKS, number % BITS, f"{kind}-{number}")
            trainer.restore(saved, start)
            lasting = kind in LASTING
            seen = trainer.run(flip, ENDLESS if lasting else AFTER + trainer.every, until_found=lasting)
            row = {"kind": kind, "setting": setting, "number": number, "bit": flip.bit, **judge(seen, clean, window)}
            row["named"] = seen["found"] and seen["found"]["culprit"] == flip.rank
            if ranks.is_main:
                TRIALS.parent.mkdir(parents=True, exist_ok=True)
                with TRIALS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        if ranks.is_main and number % 16 == 0:
            print(f"{number} of {FLIPS}", flush=True)


def keys(number: int) -> Iterator[tuple[str, str, int]]:
    """The trials of a number. What audits cannot change is measured with one share of them."""
    yield "none", "off", number
    for kind in KINDS:
        often = ("off", "1", "1/8") if kind == "flip_activations" or kind in LASTING else ("off", "1/32")
        for setting in often:
            yield kind, setting, number
        if kind == "flip_activations":
            yield kind, "1/32", number
        elif kind not in ("flip_tokens", "sometimes_wrong") and number % 4 == 0:
            yield kind, "1/32" if kind in LASTING else "1/8, every 8", number


def judge(seen: dict[str, Any], clean: dict[str, Any], window: dict[str, list[float]]) -> dict[str, Any]:
    """Return what was noticed of a trial, and whether it left a trace in the state of any rank."""
    steps = len(clean["hashes"][0])
    trace = any(own[:steps] != right[: len(own)] for own, right in zip(seen["hashes"], clean["hashes"], strict=True))
    return {
        "after": seen["found"] and seen["found"]["after"],
        "what": seen["found"] and seen["found"]["what"],
        "culprit": seen["found"] and seen["found"]["culprit"],
        "trace": trace, "error": seen["error"],
        "nan": seen["not_finite"] or seen["error"] == NumericsError.__name__,
        "loss_rule": exceeds(window["losses"], seen["losses"]),
        "norm_rule": exceeds(window["norms"], seen["norms"]),
    }  # fmt: skip


def exceeds(before: Sequence[float], values: Sequence[float]) -> bool:
    """True if a value lies more than SIGMAS standard deviations above the mean of the WINDOW values before it."""
    series = [*before, *values]
    for place in range(len(before), len(series)):
        recent = series[place - WINDOW : place]
        if series[place] > statistics.fmean(recent) + SIGMAS * statistics.stdev(recent):
            return True
    return False


def read_trials() -> list[dict[str, Any]]:
    return [json.loads(line) for line in TRIALS.read_text().splitlines()] if TRIALS.exists() else []


def figure() -> dict[str, Any]:
    """Counts by kind and setting. A flip that leaves no trace in a run without a sentinel did no harm."""
    rows = {(row["kind"], row["setting"], row["number"]): row for row in read_trials()}
    counts: dict[str, dict[str, dict[str, Any]]] = {}
    after: dict[tuple[str, str], list[int]] = defaultdict(list)
    for (kind, setting, number), row in rows.items():
        cell = counts.setdefault(kind, {}).setdefault(setting, defaultdict(int))
        is_harmful = rows[kind, "off", number]["trace"]
        is_found = row["after"] is not None
        cell["flips"] += 1
        cell["harmful"] += is_harmful
        cell["found"] += is_harmful and is_found
        cell["harmless_found"] += not is_harmful and is_found
        cell["kept_out"] += is_harmful and is_found and not row["trace"]
        cell["named"] += is_found and bool(row["named"])
        cell["misnamed"] += is_found and row["culprit"] is not None and not row["named"]
        for name in ("nan", "loss_rule", "norm_rule"):
            cell[name] += row[name]
        cell["any_rule"] += row["nan"] or row["loss_rule"] or row["norm_rule"]
        after[kind, setting] += [row["after"]] if is_found else []
    for (kind, setting), steps in after.items():
        if steps:
            counts[kind][setting] |= {"after_median": statistics.median(steps), "after_most": max(steps)}
    return {"kinds": counts, "window": WINDOW, "sigmas": SIGMAS}


def table(figures: dict[str, Any]) -> list[str]:
    kinds = {kind: figures["kinds"][kind] for kind in KINDS if kind in figures["kinds"]}
    rules = [(kind, cells["off"]) for kind, cells in ({"none": figures["kinds"]["none"]} | kinds).items()]
    settings = [name for name in SETTINGS if name != "off"]
    head = [f"| kind | {' | '.join(f'audit {name}' for name in settings)} |", "|---|" + "---|" * len(settings)]
    return [
        "",
        "## Flipped bits: what finds them",
        *paragraph(
            f"3 ranks, a tiny model, {rules[0][1]['flips']} faults of each kind in one number each; every one of its "
            "32 bits is flipped equally often, the lowest too. *Harmful*: without a sentinel the fault leaves a trace "
            "in weights or moments. NaN: the loop's own check. 6 σ: a loss or gradient norm above the mean of the last "
            f"{figures['window']} steps by {figures['sigmas']:g} standard deviations, in the step of the flip or the "
            f"{AFTER - 1} after it; *none* shows how often a rule speaks up without a fault. In brackets the 95 % "
            "Wilson interval, in %."
        ),
        "| kind | harmful | NaN check | loss 6 σ | norm 6 σ | any of the three |",
        "|---|---|---|---|---|---|",
        *[
            f"| {kind} | {cell['harmful']} of {cell['flips']} | "
            + " | ".join(share(cell, name) for name in ("nan", "loss_rule", "norm_rule", "any_rule"))
            + " |"
            for kind, cell in rules
        ],
        *paragraph(
            "Found by the sentinel, of those that are harmful, and the steps until then (median, largest; 0 is the "
            f"step of the flip). A rank that stays wrong is watched for {ENDLESS} steps. The state is checked in every "
            "step, or in every 8th."
        ),
        *head,
        *[f"| {kind} | {' | '.join(found(cells.get(name)) for name in settings)} |" for kind, cells in kinds.items()],
        *paragraph(
            "Of the harmful ones that were found, how many ended with the weights and moments of a run without the "
            "fault; of all that were found, harmless ones too, how often the rank was named, and how often a wrong one "
            "(what is flipped on the way to all has none to name):"
        ),
        *head,
        *[f"| {kind} | {' | '.join(done(cells.get(name)) for name in settings)} |" for kind, cells in kinds.items()],
    ]


def paragraph(text: str) -> list[str]:
    return ["", *textwrap.wrap(text, 118), ""]


def share(cell: dict[str, Any], name: str, of: str = "flips") -> str:
    if not cell[of]:
        return "–"
    from scipy.stats import binomtest  # not above: its import takes seconds

    interval = binomtest(cell[name], cell[of]).proportion_ci(method="wilson")
    return f"{cell[name] / cell[of]:.0%} ({math.floor(interval.low * 100)}–{math.ceil(interval.high * 100)})"


def found(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    when = f"; {cell['after_median']:g}, {cell['after_most']}" if "after_most" in cell else ""
    return f"{cell['found']} of {cell['harmful']}: {share(cell, 'found', 'harmful')}{when}"


def done(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    every = cell["found"] + cell["harmless_found"]
    return f"{cell['kept_out']} of {cell['found']}; named {cell['named']} of {every}, wrongly {cell['misnamed']}"


def clean_settings(steps: int) -> list[str]:
    """Settings of a long run without faults, on two ranks: every check of the sentinel is on."""
    return [
        f"budget.steps={steps}", "data.micro_batches=2", "data.micro_batch_sequences=2", "checkpoint.every_steps=2000",
        "checkpoint.keep_last=2", "eval.every_steps=0", 'wandb.mode="disabled"', 'sentinel.audit="1/4"',
        "sentinel.state_hash_every_steps=1",
    ]  # fmt: skip


def clean(run: Path) -> dict[str, Any]:
    """Steps taken, checked and computed again, and what the sentinel reported, in a run without faults."""
    log = [entry.event for entry in events.read(run)]
    steps = [event for event in log if isinstance(event, StepDone)]
    alarms = [event.found for event in log if isinstance(event, Corrupted)]
    return {"steps": len(steps), "alarms": len(alarms), "redone": sum(event.redone for event in steps)}


def clean_row(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """A row of the table of figures: (figure, measured, target)."""
    from scipy.stats import binomtest

    most = binomtest(figures["alarms"], figures["steps"]).proportion_ci(method="exact").high
    title = "false alarms of a sentinel, audit 1/4, all else in every step, 2 ranks, a tiny model"
    return [
        (title, f"{figures['alarms']} in {figures['steps']:,} steps (95 %: below {most:.1e} a step)", "0 in 100,000")
    ]


def cost_table(figures: dict[str, Any]) -> list[str]:
    """Time that a sentinel adds to a step, by share of audits and steps between checks."""
    lines = [
        "",
        "## Cost of a sentinel",
        *paragraph(
            "Time added to a step of configs/modern.toml (13.8 M parameters, 8 micro-batches) and of a small model, 2 "
            "ranks. Two things are measured, each against the same loop without a sentinel, in turn: all checks of "
            "sums, state and tokens in every step, and an audit of every micro-batch. The rest is their share."
        ),
        "| parameters | audit | checks every step | every 8 | every 32 |",
        "|---|---|---|---|---|",
    ]
    for part in (figures["small"], figures["big"]):
        checks, audit = (part[name]["median"] for name in ("checks", "audit"))
        for of in (8, 32, 128):
            cells = [f"{checks / every + audit / of:.1%}" for every in (1, 8, 32)]
            lines.append(f"| {part['parameters'] / 1e6:.1f} M | 1/{of} | {' | '.join(cells)} |")
    return lines
