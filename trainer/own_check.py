"""A model of the user's own is tried before training: may any rank, in any process, compute any micro-batch with it?

One micro-batch is computed twice, in training and in evaluation, and what every module gave is compared.
"""

import functools
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainer import model as models
from trainer import own_code, own_model, step
from trainer.config import Config
from trainer.errors import ConfigError

Trace = list[tuple[str, str]]
"""(name, digest) of parameters and buffers, of the modules' outputs in the order of computing, of gradients."""


def trace(config: Config, vocab_size: int, device: torch.device) -> Trace:
    """Compute one micro-batch twice and return what it gave. Raises ConfigError naming the first difference."""
    where = own_code.find(config.model.class_).where
    model = models.construct(config.model, vocab_size, recompute=config.parallel.activation_checkpointing)
    _check_parameters(config, model, where)
    try:
        models.initialise(model, config.model, config.seed)
    except ConfigError:
        raise
    except Exception as error:
        place = own_code.find(config.model.class_)
        raise own_model.failure(place, "cannot be given its initial values", error) from error
    model.to(device)
    state = [(f"the initial {kind} {name}", _digest(tensor)) for kind, name, tensor in _state(model)]
    random_BT = torch.randint(
        vocab_size,
        (config.data.micro_batch_sequences, config.model.context + 1),
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    tokens = random_BT[:, :-1].contiguous(), random_BT[:, 1:].contiguous()
    first, second = (_train(config, model, tokens, where) for _ in range(2))
    _refuse_difference(where, first, second, "Computing one micro-batch twice gives two results")
    changed = [
        name for (name, before), (_, _, tensor) in zip(state, _state(model), strict=True) if before != _digest(tensor)
    ]
    if changed:
        raise ConfigError(
            [
                f"{where}: {changed[0].removeprefix('the initial ')} changes while a micro-batch is computed.\n"
                "  Ranks compute different micro-batches, and checkpoints hold parameters only. Keep no state between "
                "micro-batches (for example LayerNorm instead of BatchNorm)."
            ]
        )
    scored, again = (_evaluate(config, model, tokens, where) for _ in range(2))
    _refuse_difference(where, scored, again, "Evaluating one micro-batch twice gives two results")
    return state + first + scored


def compare(config: Config, traces: Sequence[Trace]) -> None:
    """Raise ConfigError if the ranks' processes, which must compute alike, gave different numbers."""
    where = own_code.find(config.model.class_).where
    for rank, other in enumerate(traces):
        _refuse_difference(where, traces[0], other, f"Rank 0 and rank {rank} compute different numbers")


def digest(found: Trace) -> str:
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def refuse_process(config: Config) -> NoReturn:
    """Raise ConfigError for a resumed run whose first process computed other numbers."""
    _refuse(
        own_code.find(config.model.class_).where,
        "This process computes other numbers with one micro-batch than the process that began the run (if a library "
        "that the model imports is another one now, accept that with --accept-other-bits)",
    )


def _refuse_difference(where: str, first: Trace, second: Trace, fact: str) -> None:
    for (name, digest), (other_name, other) in zip(first, second, strict=False):
        if (name, digest) != (other_name, other):
            _refuse(where, f"{fact}: the first that differs is {name}")
    if len(first) != len(second):
        _refuse(where, f"{fact}: the modules that run are not the same")


def _refuse(where: str, fact: str) -> NoReturn:
    raise ConfigError(
        [
            f"{where}: {fact}.\n"
            "  Any rank may compute any micro-batch, so the model must be a function of its parameters and tokens. "
            "Look for random numbers, the order of sets, the clock, and state that is kept between calls."
        ]
    )


def _check_parameters(config: Config, model: nn.Module, where: str) -> None:
    parameters = dict(model.named_parameters())
    problems = [] if parameters else [f"{where} has no parameters.\n  Assign them to the module in __init__."]
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            rule = 'Parameters are float32; numerics.precision = "bf16" computes in bfloat16.'
            problems.append(f"{where}: parameter {name} is {parameter.dtype}.\n  {rule}")
        elif not parameter.ndim:
            problems.append(f"{where}: parameter {name} has no axis.\n  Shards are rows. Give it the shape (1,).")
        elif not parameter.requires_grad:
            problems.append(f"{where}: parameter {name} takes no gradient.\n  Make it a buffer, which is not trained.")
    if config.parallel.strategy != "replicate" and not problems:
        problems += _shared_beyond_units(config, model, where)
    if problems:
        raise ConfigError(problems)


def _shared_beyond_units(config: Config, model: nn.Module, where: str) -> Iterator[str]:
    """Yield a problem for each parameter that two units of sharding would both hold."""
    units = {f"{name}.": module for name, module in model.named_modules() if module in models.blocks_of(model)}
    owner: dict[nn.Parameter, tuple[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unit = max((prefix for prefix in units if name.startswith(prefix)), key=len, default="")
        first, first_unit = owner.setdefault(parameter, (name, unit))
        if unit != first_unit:
            strategy = config.parallel.strategy
            yield (
                f'{where}: {name} and {first} are one parameter, which parallel.strategy = "{strategy}" cannot hold.\n'
                "  Each block is gathered and freed by itself, so blocks share nothing with one another or with what "
                'is around them. Untie the two, or set parallel.strategy = "replicate".'
            )


def _train(config: Config, model: nn.Module, tokens: tuple[Tensor, Tensor], where: str) -> Trace:
    """Forward and backward; return the digests of outputs and gradients."""
    model.train().zero_grad()
    if config.model.dropout:
        torch.manual_seed(0)  # as before each micro-batch of a step
    found, result = _forward(config, model, tokens, where, may_draw=config.model.dropout > 0)
    objective = result[0]
    try:
        objective.backward()
    except Exception as error:
        raise own_model.failure(own_code.find(config.model.class_), "cannot go backward", error) from error
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    if without:
        named = ", ".join(without[:5]) + " and more" * (len(without) > 5)
        raise ConfigError(
            [
                f"{where}: the objective has no gradient for {named}.\n"
                "  Every parameter takes part in every micro-batch, or shards would wait for one another. Use it, or "
                "remove it; a part that this micro-batch does not need can be added times zero."
            ]
        )
    gradients = [(name, parameter.grad) for name, parameter in model.named_parameters()]
    return found + [(f"the gradient of {name}", _digest(grad)) for name, grad in gradients if grad is not None]


def _evaluate(config: Config, model: nn.Module, tokens: tuple[Tensor, Tensor], where: str) -> Trace:
    model.eval()
    with torch.no_grad():
        return _forward(config, model, tokens, where, may_draw=False, graded=False)[0]


def _forward(
    config: Config,
    model: nn.Module,
    tokens: tuple[Tensor, Tensor],
    where: str,
    *,
    may_draw: bool,
    graded: bool = True,
) -> tuple[Trace, tuple[Tensor, Tensor]]:
    found: Trace = []
    drawn: list[tuple[str, str]] = []
    calls: dict[str, int] = {}
    before = _random_states()

    def note(name: str, _module: nn.Module, _arguments: Any, output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        found.append((f"the output of {_called(name)}", ",".join(map(_digest, tensors))))
        # Inner modules come first, so the first one after whose call a state is another one is the one that drew.
        drawn.extend((_called(name), source) for source, state in _random_states().items() if state != before[source])

    with ExitStack() as hooks, step.autocast(config, tokens[0].device):
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(functools.partial(note, name)).remove)
        try:
            result = model(*tokens)
        except ConfigError:
            raise
        except Exception as error:
            place = own_code.find(config.model.class_)
            raise own_model.failure(place, "cannot compute a micro-batch", error) from error
    for name, source in drawn:
        if source != "torch" or not may_draw:
            remedy = "Remove it" + (
                ", or set model.dropout: torch's generator is then seeded for each micro-batch."
                if source == "torch" and graded
                else "; random numbers of torch are allowed in training with model.dropout above 0."
            )
            fact = f"{name} reads global random state, that of {source}, which is another one on every rank"
            raise ConfigError([f"{where}: {fact}.\n  {remedy}"])
    _check_result(result, where, graded)
    if config.parallel.strategy != "replicate":
        for name, module in model.named_modules():
            if module in models.blocks_of(model) and calls.get(name, 0) != 1:
                raise ConfigError(
                    [
                        f"{where}: block {name} is called {calls.get(name, 0)} times in a forward pass.\n"
                        "  A sharded block is gathered when it is called, so every rank calls each of them once. "
                        'Declare role = "block" on the modules that are, or set parallel.strategy = "replicate".'
                    ]
                )
    return found, result


def _check_result(result: Any, where: str, graded: bool) -> None:
    """Raise ConfigError unless the model returned two float32 scalars, the first with a gradient if `graded`."""
    contract = "A model returns (objective, cross-entropy in nats per token): two float32 tensors without axes."
    if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(part, Tensor) for part in result):
        parts = result if isinstance(result, tuple) else (result,)
        shown = ", ".join(f"{tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__ for p in parts)
        raise ConfigError([f"{where} returned {shown}.\n  {contract}"])
    for name, tensor in zip(("objective", "cross-entropy"), result, strict=True):
        if tensor.ndim or tensor.dtype != torch.float32:
            fact = f"{where} returned as {name} a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}"
            raise ConfigError([f"{fact}.\n  {contract}"])
    if graded and not result[0].requires_grad:
        fact = f"{where} returned an objective without a gradient"
        raise ConfigError([f"{fact}.\n  It must be computed from the parameters, without detach or no_grad."])


def _called(name: str) -> str:
    return f"module {name}" if name else "the model itself"


def _state(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    yield from (("parameter", name, tensor) for name, tensor in model.named_parameters())
    yield from (("buffer", name, tensor) for name, tensor in model.named_buffers())


def _random_states() -> Mapping[str, object]:
    numpy_state = np.random.get_state(legacy=False)
    states: dict[str, object] = {"Python": random.getstate(), "numpy": repr(numpy_state)}
    states["torch"] = _digest(torch.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["torch"] = (states["torch"], _digest(torch.cuda.get_rng_state()))
    return states


def _digest(tensor: Tensor) -> str:
    """SHA-256 of shape and bytes; the number is not in a tensor's repr to its last bit."""
    whole = tensor.detach().cpu().contiguous()
    content = whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""
    return hashlib.sha256(f"{tuple(whole.shape)} {whole.dtype}".encode() + content).hexdigest()[:16]
