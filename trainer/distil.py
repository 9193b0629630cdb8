"""Distillation: finished runs, the teachers, whose averaged probabilities are a part of a run's target.

A teacher is identified by the digest of the weights that it ended with, so a run stays a function of its config.
Every rank holds all teachers whole and asks them about its own micro-batches: what they say depends on the micro-batch
alone, in the same shapes and with the same kernels at every world size. They are computed in evaluation mode with the
run's own [numerics], and summed in the order of their digests.
"""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from trainer import sample
from trainer import step as steps
from trainer.config import Config
from trainer.errors import CheckpointError, ConfigError
from trainer.log import rundir, summary
from trainer.model import GPT, Lesson


def check(config: Config, vocab_size: int, tokenizer_sha256: str) -> None:
    """Raise ConfigError, naming every problem, if a run of [distil] cannot teach this one.

    Raises RunDirectoryError if one cannot be read.
    """
    problems: list[str] = []
    for name, digest in zip(config.distil.runs, config.distil.weights_sha256, strict=True):
        run = Path(name)
        facts, settings, found = rundir.read(run), rundir.config_of(run).model, summary.summarise(run)["weights_sha256"]
        if found is None:
            problems.append(f"distil.runs: {run} has not finished.\n  Let it finish, or leave it out.")
        elif found != digest:
            problems.append(
                f"distil.runs: {run} ended with weights {found[:16]}…, not with {digest[:16]}….\n"
                "  Name the run that is meant, or give its digest in distil.weights_sha256."
            )
        if facts.get("tokenizer_sha256") != tokenizer_sha256 or facts.get("vocab_size") != vocab_size:
            problems.append(
                f"distil.runs: {run} has another tokenizer or vocabulary.\n"
                "  Probabilities of other tokens are no target. Leave it out, or use its tokenizer.json."
            )
        if settings.class_:
            problems.append(f"distil.runs: {run} has a model.class.\n  The built-in GPT alone can teach.")
        elif settings.context < config.model.context:
            problems.append(
                f"distil.runs: {run} has model.context = {settings.context}, and this run reads {config.model.context}."
                "\n  A teacher must be able to read whole sequences. Leave it out, or lower model.context."
            )
    if problems:
        raise ConfigError(problems)


class Teachers:
    """The teachers' models. Called with the inputs of a micro-batch, they give its lesson."""

    def __init__(self, models: list[GPT], weight: float) -> None:
        self._models, self._weight = models, weight

    @torch.no_grad()
    def __call__(self, inputs_BT: Tensor) -> Lesson:
        # Probabilities are as wide as the vocabulary, so they are made only for the tokens that are asked for.
        hidden = [model.hidden(inputs_BT).flatten(0, 1) for model in self._models]

        @torch.no_grad()
        def probabilities(first: int, last: int) -> Tensor:
            of_each = (model.probabilities(x[first:last]) for model, x in zip(self._models, hidden, strict=True))
            total = next(of_each)
            for more in of_each:
                total += more
            return total.div_(len(hidden))

        return Lesson(probabilities, self._weight)


def load(config: Config, device: torch.device) -> Teachers | None:
    """Load the teachers onto `device`; None without any.

    Raises CheckpointError if a newest intact checkpoint holds other weights than the config names.
    """
    if not config.distil.runs:
        return None
    models = {}
    for name, digest in zip(config.distil.runs, config.distil.weights_sha256, strict=True):
        model = sample.restore(Path(name))
        if steps.sha256_of(dict(model.named_parameters())) != digest:
            raise CheckpointError(
                f"{name}: its newest intact checkpoint does not hold the weights {digest[:16]}… that [distil] names.\n"
                "  Resume that run, which repairs it, or leave it out."
            )
        models[digest] = cast(GPT, model.to(device).requires_grad_(False))
    return Teachers([models[digest] for digest in sorted(models)], config.distil.weight)
