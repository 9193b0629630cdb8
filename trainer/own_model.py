"""A model of the user's own: loaded by name and constructed. docs/extending.md states the contract.

Optional on the model or its modules: `role` ("block", "embedding", "head", …: trainer/model.py) and
`initial_value(name, shape, generator)`, which returns a parameter's first values, or None for the usual ones.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer import config, own_import
from trainer.errors import ConfigError


class OwnModel(Protocol):
    """The contract of a model's class, which is also a `torch.nn.Module`."""

    def __init__(self, settings: config.Model, vocab_size: int, options: Mapping[str, Any]) -> None:
        """Make the parameters, all float32. `options` are the config's [model.options]."""

    def __call__(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return (objective, cross-entropy in nats per token), two float32 scalars; the first has the gradient."""
        ...


def construct(settings: config.Model, vocab_size: int) -> nn.Module:
    """Make the model that `model.class` names. Raises ConfigError if that cannot be done."""
    place, found = own_import.load(settings.class_, "model.class")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError([f"{place.where} is no torch.nn.Module.\n  model.class names a class that derives from it."])
    arguments = (settings, vocab_size, dict(settings.options))
    try:
        inspect.signature(found).bind(*arguments)
    except TypeError as error:
        fact = f"{place.where} does not take what a model is made from: {error}."
        remedy = "It is called with three arguments: def __init__(self, settings, vocab_size, options)."
        raise ConfigError([f"{fact}\n  {remedy}"]) from None
    try:
        return found(*arguments)
    except Exception as error:
        raise own_import.failure(place, "cannot be constructed", error) from error


def initial_value(model: nn.Module, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
    """Return the first values that the model declares for a parameter, or None. Raises ConfigError."""
    declared = getattr(model, "initial_value", None)
    value = None if declared is None else declared(name, shape, generator)
    if value is not None and (not isinstance(value, Tensor) or value.shape != shape):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        fact = f"initial_value of parameter {name} returned {got}, and its shape is {tuple(shape)}."
        raise ConfigError([f"{fact}\n  Return a tensor of the shape it is given, or None."])
    return value
