"""Parameter groups, optimizers, and schedules as pure functions of the step.

Bitwise promise: an element's update does not depend on the shard or buffer it lies in. torch's fused AdamW breaks this
on CPUs: its vector body computes in float32, its scalar tail (the last size mod 16 elements) in double, and a shard has
its tail at other elements than the whole tensor. Row shards of matrices with a multiple of 16 elements per row have no
tail; only those are fused. All others take the foreach path, which is elementwise throughout.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer import config
from trainer.model import TABLES, Role, role_of_parameters
from trainer.own_optimizer import OwnOptimizer

DECAYED = ("hidden", "head")
"""First parts of the names of groups that weight decay applies to: matrices."""
VECTOR_ELEMENTS = 16  # float32 per AVX-512 register; a multiple of every narrower vector


class _WithoutCompiler(Optimizer):
    """Calls torch's optimizers without their decorators, which import the compiler: over a second of every start."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(Optimizer.add_param_group)(self, param_group)


class AdamW(_WithoutCompiler, torch.optim.AdamW):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)


class Muon(_WithoutCompiler, torch.optim.Muon):
    pass


def build(model: nn.Module, optim: config.Optim, width: int) -> list[Optimizer]:
    """Return [AdamW], [AdamW, Muon] with the hidden matrices in Muon, or the user's own. May follow `fully_shard`.

    Weight decay is decoupled (Loshchilov & Hutter 2019) and applies to matrices, not to embeddings, norms, biases and
    gates; a tied table counts as an embedding. Each group carries "name" and "peak_learning_rate".
    With mup_base_width, AdamW's rate for hidden matrices and an untied head is divided by width / base: Yang et al.
    2022 (Tensor Programs V, arXiv:2203.03466), table 8. `width` is that of the model.
    Doubt: a tied head gets no multiplier, so it is not full µP.
    """
    parameters = dict(model.named_parameters())
    if optim.class_:
        return [OwnOptimizer(optim, own_groups(model, optim, width))]
    muon: list[Tensor] = []
    # Groups by name, in the order of the model's parameters: the same on all ranks, whatever the sharding.
    groups: dict[str, dict[str, Any]] = {}
    for name, group in group_of_parameters(model).items():
        if group == "hidden" and optim.optimizer == "muon" and parameters[name].ndim == 2:
            muon.append(parameters[name])
        else:
            settings = _adamw_group(group, parameters[name].shape, width, optim)
            groups.setdefault(settings["name"], settings | {"params": []})["params"].append(parameters[name])
    adamw = AdamW(
        list(groups.values()), lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=0.0
    )
    return [adamw, _muon(muon, optim)] if muon else [adamw]


def own_groups(model: nn.Module, optim: config.Optim, width: int) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer of the user's own, in the order of the model's parameters."""
    parameters, groups = dict(model.named_parameters()), dict[str, dict[str, Any]]()
    for name, group in group_of_parameters(model).items():
        settings = _adamw_group(group, parameters[name].shape, width, optim)
        chosen = {key: settings[key] for key in ("weight_decay", "peak_learning_rate", "lr")} | {"name": group}
        groups.setdefault(group, chosen | {"params": []})["params"].append(parameters[name])
    return list(groups.values())


def group_of_parameters(model: nn.Module) -> dict[str, str]:
    """Return each parameter's name and group: "embedding", "head", "hidden" (other matrices) or "vector"."""

    def group(role: Role | None, parameter: Tensor) -> str:
        if role in TABLES:
            return "embedding"
        if parameter.ndim < 2:
            return "vector"
        return "head" if role is Role.HEAD else "hidden"

    roles = role_of_parameters(model)
    return {name: group(roles[name], parameter) for name, parameter in model.named_parameters()}


def _adamw_group(group: str, shape: Sequence[int], width: int, optim: config.Optim) -> dict[str, Any]:
    is_matrix = group in DECAYED
    scale = optim.mup_base_width / width if is_matrix and optim.mup_base_width else 1.0
    fused = is_fused(shape)
    return {
        "name": f"{group}/{'fused' if fused else 'foreach'}",
        "weight_decay": optim.weight_decay if is_matrix else 0.0,
        "peak_learning_rate": optim.learning_rate * scale,
        "lr": optim.learning_rate * scale,
        "fused": fused,
        "foreach": not fused,
    }


def is_fused(shape: Sequence[int]) -> bool:
    """True if any run of whole rows fills whole vectors. `shape` is the full one, so every world size agrees."""
    return len(shape) >= 2 and math.prod(shape[1:]) % VECTOR_ELEMENTS == 0


def _muon(parameters: list[Tensor], optim: config.Optim) -> Muon:
    """Muon for hidden matrices: Jordan et al. 2024 (kellerjordan.github.io/posts/muon).

    "original" multiplies the rate by sqrt(max(1, rows / columns)), the scaling that muon_learning_rate = 0.02 was tuned
    with and that needs no µP; "match_rms_adamw" would serve a rate shared with AdamW, and ours is separate.
    Decay is rate × weight_decay, with Muon's own rate. Doubt: the fused qkv is orthogonalised as one matrix.
    """
    rate = optim.muon_learning_rate
    decay, momentum = optim.weight_decay, optim.muon_momentum
    muon = Muon(parameters, lr=rate, weight_decay=decay, momentum=momentum, nesterov=True, adjust_lr_fn="original")
    muon.param_groups[0] |= {"name": "hidden/muon", "peak_learning_rate": rate}
    return muon


def learning_rate_factor(step: int, optim: config.Optim, steps: int) -> float:
    """Learning rate of update `step` (from 0) as a fraction of the peak.

    Warmup rises linearly from 1/warmup_steps and reaches 1 at update warmup_steps − 1; the decay ends in
    final_fraction at update steps − 1. cosine: Loshchilov & Hutter 2017. wsd: Hu et al. 2024 (MiniCPM), with a
    linear decay over the last decay_fraction of the steps, at least one (Hägele et al. 2024).
    """
    if not 0 <= step < steps:
        raise ValueError(f"step = {step} is outside a schedule of {steps} steps.\n  Steps count from 0 to steps - 1.")
    # The first update already has a rate above zero, so no step is wasted.
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    peak, last = max(optim.warmup_steps - 1, 0), steps - 1
    if optim.schedule == "wsd":
        peak = max(peak, last - max(1, round(optim.decay_fraction * steps)))
    if optim.schedule == "constant" or step <= peak:
        return 1.0
    done = (step - peak) / (last - peak)
    left = (1 + math.cos(math.pi * done)) / 2 if optim.schedule == "cosine" else 1 - done
    return optim.final_fraction + (1 - optim.final_fraction) * left


def set_learning_rates(optimizers: Sequence[Optimizer], step: int, optim: config.Optim, steps: int) -> float:
    """Set every group's rate for update `step`; return the rate of AdamW's groups without µP scaling."""
    factor = learning_rate_factor(step, optim, steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] * factor
            if optim.weight_decay_schedule != "rate" and group["name"].startswith(DECAYED):
                group["weight_decay"] = optim.weight_decay * weight_decay_factor(factor, optim)
    return optim.learning_rate * factor


def weight_decay_factor(rate: float, optim: config.Optim) -> float:
    """Coefficient of weight decay as a fraction of optim.weight_decay; `rate` is the learning rate's fraction.

    The update multiplies it by the learning rate, which is above 0 where the schedule is "constant" (config_rules.py).
    """
    if optim.weight_decay_schedule == "constant":
        return 1 / rate
    return rate if optim.weight_decay_schedule == "corrected" else 1.0


def materialise_state(optimizers: Sequence[Optimizer]) -> None:
    """Create the zero state that each optimizer would create in its first step.

    A checkpoint written before that step would otherwise hold no moments, and one loaded before it would drop them.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, OwnOptimizer):
            optimizer.make_sample()
            continue
        moments = ("momentum_buffer",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if state:  # moments that were loaded stay
                    continue
                if isinstance(optimizer, AdamW):
                    # torch keeps the step count on the device only for fused updates.
                    state["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
                for name in moments:
                    state[name] = torch.zeros_like(parameter, requires_grad=False)
