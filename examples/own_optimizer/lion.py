"""Lion: the sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    def __init__(self, params: Iterable[Any], lr: float, beta1: float = 0.9, beta2: float = 0.99) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:  # lr and weight_decay are those of the config and its schedule
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                update = momentum.lerp(p.grad, 1 - group["beta1"]).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                momentum.lerp_(p.grad, 1 - group["beta2"])
