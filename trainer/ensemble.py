"""Several finished runs as one: the mean of their probabilities, scored on held-out text as one run is scored.

The mixture is a module that returns losses like any other, so `evaluate` sums and deals out its batches: the score has
the same bits at every world size. Members are mixed in the order of their weights' digests, so the order in which runs
are named makes no difference either.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer import data, evaluate, job, sample
from trainer import step as steps
from trainer.config import Config
from trainer.data import EvalWindows
from trainer.errors import CheckpointError, UsageError
from trainer.evaluate import Score
from trainer.log import rundir, summary
from trainer.model import Losses
from trainer.parallel.world import World


@dataclass(frozen=True)
class Member:
    """A run with its model, as its newest checkpoint has it."""

    run: Path
    weight: float
    """Share of its probabilities; the shares sum to 1."""
    config: Config
    model: nn.Module
    sha256: str
    """Digest of its weights."""
    step: int
    training_flops: float


class Mixture(nn.Module):
    """Models whose probabilities are averaged: p = Σ weight · p_member, for each token."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__()
        # Sums depend on their order, and so does this one: it is that of the digests.
        self._members = sorted(members, key=lambda member: (member.sha256, member.weight))

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Losses:
        """Return the mean loss over all targets, in float64."""
        logs = []
        for member in self._members:
            with steps.autocast(member.config, inputs_BT.device):
                logits_BTV = member.model(inputs_BT)
            log_BT = logits_BTV.double().log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0]
            logs.append(log_BT + math.log(member.weight))
        loss = -torch.logsumexp(torch.stack(logs), 0).mean()
        return Losses(loss, loss)


def load(runs: Sequence[Path], weights: Sequence[float] = ()) -> list[Member]:
    """Load the weights that each run ended with; `weights` are relative, and equal where none are given.

    Raises UsageError if the runs cannot be scored as one, RunDirectoryError if one cannot be read, CheckpointError if
    its newest intact checkpoint does not hold those weights.
    """
    if len(runs) < 2:
        raise UsageError("An ensemble needs two runs or more.\n  Name several; `inspect` shows the score of one.")
    shares = [1.0] * len(runs) if not weights else [*weights]
    if len(shares) != len(runs) or not all(0 < share < math.inf for share in shares):
        raise UsageError(
            f"--weights has {', '.join(f'{share:g}' for share in shares)} for {len(runs)} runs.\n"
            "  Give one number above 0 for each run: 3,1 counts the first three times as much."
        )
    configs = [rundir.config_of(run) for run in runs]
    _check_alike(runs, configs)
    job.set_numerics(configs[0], torch.device("cpu"))
    total = math.fsum(shares)
    members = []
    for run, config, share in zip(runs, configs, shares, strict=True):
        about = summary.summarise(run)
        if about["weights_sha256"] is None:
            remedy = "An ensemble is made of finished runs. Let it finish, or leave it out."
            raise UsageError(f"{run} has not finished.\n  {remedy}")
        model = sample.restore(run)
        sha256 = steps.sha256_of(dict(model.named_parameters()))
        if sha256 != about["weights_sha256"]:
            raise CheckpointError(
                f"{run}: its newest intact checkpoint holds other weights than its log ended with.\n"
                "  They would be scored as those of its last step. Resume it, or leave it out."
            )
        flops = float(about["tokens"] * rundir.fact(run, "flops_per_token"))
        members.append(Member(run, share / total, config, model, sha256, about["step"], flops))
    return members


def _check_alike(runs: Sequence[Path], configs: Sequence[Config]) -> None:
    """Raise UsageError if a run differs from the first in what makes scores comparable."""
    rules = {
        "tokenizer_sha256": ("another tokenizer", "Probabilities of other tokens cannot be averaged."),
        "data_sha256": ("another training text", "What one holds out, another may have learnt."),
        "vocab_size": ("another vocabulary", "Probabilities of other tokens cannot be averaged."),
    }
    first = rundir.read(runs[0])
    for run, config in zip(runs[1:], configs[1:], strict=True):
        facts = rundir.read(run)
        found = [texts for key, texts in rules.items() if facts.get(key) != first.get(key)]
        if config.model.context != configs[0].model.context:
            found.append(("another model.context", "Held-out text is scored in windows of that many tokens."))
        if config.numerics != configs[0].numerics:
            found.append(("other [numerics]", "One process has one number of threads and one precision."))
        if _held_out(config) != _held_out(configs[0]):
            found.append(("other held-out sets", "All members are scored on the same text."))
        if found:
            what, rule = found[0]
            raise UsageError(f"{run} has {what} than {runs[0]}.\n  {rule} Leave it out.")


def _held_out(config: Config) -> tuple[Any, ...]:
    return (config.eval.sets, config.eval.max_tokens, config.eval.sources)


def score(
    members: Sequence[Member], windows: Mapping[str, EvalWindows], token_bytes: np.ndarray, world: World
) -> dict[str, Score]:
    """Score the mixture on each held-out set. Collective."""
    return {
        name: evaluate.evaluate(Mixture(members), held_out, token_bytes, world, nullcontext)
        for name, held_out in windows.items()
    }


def windows_of(member: Member) -> tuple[dict[str, EvalWindows], np.ndarray]:
    """Return (held-out sets as windows, bytes of each token) of a run.

    Raises UsageError if its text is no longer what it was trained on, and what `data.prepare` raises.
    """
    run, config = member.run, member.config
    prepared = data.prepare(config.data, config.eval, config.model.context)
    if prepared.sha256 != rundir.read(run).get("data_sha256"):
        raise UsageError(
            f"{config.data.source} holds another text than {run} was trained on.\n"
            "  Its tokens and held-out text would be others. Restore the text."
        )
    sequences, limit = config.data.micro_batch_sequences, config.eval.max_tokens
    found = {
        name: EvalWindows(part.tokens, context=config.model.context, sequences=sequences, max_tokens=limit)
        for name, part in prepared.eval_sets.items()
    }
    return found, prepared.tokenizer.token_bytes


def describe(runs: Sequence[Path], weights: Sequence[float] = ()) -> dict[str, Any]:
    """Load and score: the object that `ensemble --json` prints.

    Raises as `load` and `windows_of` do.
    """
    members, world = load(runs, weights), World(0, 1, torch.device("cpu"))
    first = min(members, key=lambda member: member.sha256)  # whichever run is named first
    windows, token_bytes = windows_of(first)
    mixed = score(members, windows, token_bytes, world)
    described = []
    for member in members:
        autocast = functools.partial(steps.autocast, member.config, world.device)
        alone = {
            name: _plain(evaluate.evaluate(member.model, held_out, token_bytes, world, autocast))
            for name, held_out in windows.items()
        }
        described.append({
            "run": str(member.run), "weight": member.weight, "weights_sha256": member.sha256, "step": member.step,
            "training_flops": member.training_flops, "eval": alone,
        })  # fmt: skip
    return {
        "runs": described,
        "ensemble": {name: _plain(found) | {"digest": windows[name].digest} for name, found in mixed.items()},
        "training_flops": math.fsum(member.training_flops for member in members),
    }


def _plain(found: Score) -> dict[str, Any]:
    return {"loss": found.loss, "bits_per_byte": found.bits_per_byte, "tokens": found.tokens}
