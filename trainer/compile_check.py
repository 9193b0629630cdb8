"""The start-up check of `numerics.compile`: compiled blocks must give the gradients that eager ones give.

A compiler that is wrong about a gradient says nothing, and the loss still falls: torch 2.11 loses the gradient of an
autograd.Function that saves its own output.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer import model as models
from trainer import step
from trainer.config import Config
from trainer.data import MicroBatch
from trainer.errors import ConfigError

LIMITS = {"fp32": 1e-3, "bf16": 0.1}
"""Largest relative difference of a parameter's gradient that counts as rounding; a lost gradient differs by 1."""
QUIET = 1e-3
"""A gradient whose norm is below this share of the largest one's is held against that share: it may be all rounding."""
SPREAD = 0.02
"""Standard deviation of what is added to the initial weights: with a head of zeros no gradient would reach a block."""


class Difference(NamedTuple):
    parameter: str
    error: float
    """Norm of compiled minus eager gradient, over the eager one's."""


def check(config: Config, vocab_size: int, device: torch.device, batch: MicroBatch) -> None:
    """Compare both gradients of one micro-batch, in a model of its own.

    Raises ConfigError if they differ by more than rounding. Kernels compiled here are not compiled again for training.
    """
    # Random masks differ between compiled and eager kernels, rightly.
    calm = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})})
    model = models.build(calm, vocab_size, device)
    if config.model.class_:
        model.eval()
    _spread(model)
    _, *tokens = step.place(batch, device)
    worst = largest_difference(model, tokens, lambda: step.autocast(config, device))
    limit = LIMITS[config.numerics.precision]
    if not worst.error <= limit:
        raise ConfigError(
            [
                f"numerics.compile = true gives wrong gradients with torch {torch.__version__}: that of "
                f"{worst.parameter} differs from the eager one by {worst.error:.2g} of its size; rounding explains "
                f"{limit:g}.\n"
                "  Set numerics.compile = false, or install another torch. This start has trained nothing."
            ]
        )


def largest_difference(
    model: nn.Module, tokens: list[Tensor], autocast: Callable[[], AbstractContextManager]
) -> Difference:
    """Return the parameter whose gradient differs most between compiled and eager blocks.

    Gradients that are not finite when eager tell nothing and are left out.
    """
    compiled = _gradients(model, tokens, autocast)
    with torch.compiler.set_stance("force_eager"):
        eager = _gradients(model, tokens, autocast)
    sizes = {name: gradient.norm().item() for name, gradient in eager.items() if bool(gradient.isfinite().all())}
    largest, zero = max(sizes.values(), default=0.0), torch.zeros(())
    differences = [
        # Without a path from the loss a compiled gradient is not there at all.
        Difference(name, (compiled.get(name, zero) - eager[name]).norm().item() / max(size, QUIET * largest))
        for name, size in sizes.items()
        if largest
    ]
    # A NaN is larger than any number.
    return max(differences, key=lambda found: (found.error != found.error, found.error), default=Difference("", 0.0))


def _gradients(
    model: nn.Module, tokens: list[Tensor], autocast: Callable[[], AbstractContextManager]
) -> dict[str, Tensor]:
    """Gradient of every parameter that has one, on the CPU: a GPU has no room for two sets beside the weights."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with autocast():
        objective, _ = model(*tokens)
    found = torch.autograd.grad(objective, list(parameters.values()), allow_unused=True)
    return {name: gradient.cpu() for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def _spread(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += SPREAD * torch.randn(parameter.shape, generator=generator).to(parameter.device)
