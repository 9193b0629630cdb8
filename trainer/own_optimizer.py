"""An optimizer of the user's own: a `torch.optim.Optimizer`, made by name. docs/extending.md states the contract.

It sees this rank's rows of every parameter as plain tensors. Under sharding its update must not depend on which rows
lie together; own_check.py tries that before training.
"""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainer import config, own_import
from trainer.errors import ConfigError

STATE_TYPES = (torch.float32, torch.float64, torch.int64)


def construct(settings: config.Optim, groups: list[dict[str, Any]]) -> Optimizer:
    """Make the optimizer that `optim.class` names. Raises ConfigError if that cannot be done."""
    place, found = own_import.load(settings.class_, "optim.class")
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        rule = "optim.class names a class that derives from it."
        raise ConfigError([f"{place.where} is no torch.optim.Optimizer.\n  {rule}"])
    options = {"lr": settings.learning_rate, **settings.options}
    try:
        inspect.signature(found).bind(groups, **options)
    except TypeError as error:
        shown = ", ".join(f"{name}=…" for name in options)
        fact = f"{place.where} does not take what an optimizer is made from: {error}."
        rule = f"It is called with groups of parameters, the rate and [optim.options]: (groups, {shown})."
        raise ConfigError([f"{fact}\n  {rule}"]) from None
    try:
        return found(groups, **options)
    except Exception as error:
        raise own_import.failure(place, "cannot be constructed", error) from error


class OwnOptimizer(Optimizer):
    """Stands between the training loop and the user's optimizer, whose state it names, saves and shards.

    A checkpoint holds the same names at every step, but such an optimizer makes its state in its first step. So until
    then the state is a sample, made on a copy (`make_sample`), which the first step throws away.
    """

    def __init__(self, settings: config.Optim, groups: list[dict[str, Any]]) -> None:
        """`groups` hold plain parameters or DTensors; more keys of a group are passed on."""
        # Not Optimizer's own constructor: groups and state are those of the user's class.
        self._settings = settings
        self._rows = {p: nn.Parameter(rows(p.detach())) for group in groups for p in group["params"]}
        self._groups = [group | {"params": [self._rows[p] for p in group["params"]]} for group in groups]
        self._inner = construct(settings, [dict(group) for group in self._groups])
        self.param_groups = self._inner.param_groups
        self._steps = {p: torch.zeros((), dtype=torch.int64, device=p.device) for p in self._rows}
        """Number of steps that a parameter's state has seen. At 0 it is a sample, also in a checkpoint."""
        self._numbers: dict[tuple[nn.Parameter, str], Tensor] = {}
        """Numbers of the state that are no tensors, as what a checkpoint can hold."""

    @property
    def inner(self) -> Optimizer:
        """The user's optimizer; its state is keyed by this rank's rows."""
        return self._inner

    @property
    def state(self) -> dict[Any, dict[str, Tensor]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """{parameter: {"own.NAME": tensor}}: what the user's optimizer keeps; sharded as the parameter is."""
        return {
            p: {f"own.{key}": self._outward(p, key, value) for key, value in self._kept(p).items() if value is not None}
            | {"own_steps": self._steps[p]}
            for p in self._rows
        }

    def _kept(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        return self._inner.state.get(self._rows[parameter], {})

    def _outward(self, parameter: nn.Parameter, key: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            zero = torch.zeros((), dtype=torch.float64, device=self._rows[parameter].device)
            return self._numbers.setdefault((parameter, key), zero).fill_(value)
        if isinstance(parameter, DTensor) and value.shape == self._rows[parameter].shape:
            return DTensor.from_local(
                value, parameter.device_mesh, parameter.placements, run_check=False,
                shape=parameter.shape, stride=parameter.stride(),
            )  # fmt: skip
        return value

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the parameters from their gradients."""
        for parameter, own in self._rows.items():
            if not self._steps[parameter]:
                self._inner.state.pop(own, None)
            assert parameter.grad is not None
            own.data, own.grad = rows(parameter.data), rows(parameter.grad)
        self._inner.step()
        for parameter, own in self._rows.items():
            held = rows(parameter.data)
            if own.data_ptr() != held.data_ptr():  # it has put another tensor in the place of ours
                held.copy_(own)
            self._steps[parameter] += 1

    def make_sample(self) -> None:
        """Make a state of the right names and shapes, with a step on a copy of the parameters."""
        copies = {own: nn.Parameter(own.detach().clone()) for own in self._rows.values()}
        groups = [group | {"params": [copies[own] for own in group["params"]]} for group in self._groups]
        trial = construct(self._settings, groups)
        for copy in copies.values():
            copy.grad = torch.ones_like(copy)
        with torch.no_grad():
            trial.step()
        for own, copy in copies.items():
            if copy in trial.state:
                self._inner.state[own] = trial.state[copy]

    def loaded(self, missing: Collection[Tensor] = ()) -> None:
        """Take over what was loaded into `state`, except for parameters in `missing`, whose state begins anew."""
        for (parameter, key), tensor in self._numbers.items():
            kept = self._inner.state[self._rows[parameter]]
            kept[key] = type(kept[key])(tensor.item())
        for parameter in self._rows:
            if any(parameter is other for other in missing):
                self._steps[parameter].zero_()

    def register_step_post_hook(self, hook: Any) -> Any:
        return self._inner.register_step_post_hook(hook)


def rows(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
