"""A model or an optimizer of the user's own is tried before training: may any rank, in any process, compute with it?

Of a model one micro-batch is computed twice, in training and in evaluation, and what every module gave is compared. An
optimizer takes a few steps twice, in one go and resumed, on whole parameters and on shards.
"""

import contextlib
import functools
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from trainer import config as configs
from trainer import model as models
from trainer import optim, own_code, own_import, step
from trainer.config import Config
from trainer.data.cache import cache_root
from trainer.errors import ConfigError
from trainer.own_code import Place
from trainer.own_optimizer import STATE_TYPES, OwnOptimizer
from trainer.parallel import world

Trace = list[tuple[str, str]]
"""(name, digest) of parameters and buffers, of the modules' outputs in the order of computing, of gradients."""


def trace(config: Config, vocab_size: int, device: torch.device) -> Trace:
    """Compute one micro-batch twice and return what it gave. Raises ConfigError naming the first difference."""
    place = own_code.find(config.model.class_)
    where = place.where
    model = models.construct(config.model, vocab_size, recompute=config.parallel.activation_checkpointing)
    _check_parameters(config, model, where)
    try:
        models.initialise(model, config.model, config.seed)
    except ConfigError:
        raise
    except Exception as error:
        raise own_import.failure(place, "cannot be given its initial values", error) from error
    model.to(device)
    state = [(f"the initial {kind} {name}", _digest(tensor)) for kind, name, tensor in _state(model)]
    random_BT = torch.randint(
        vocab_size,
        (config.data.micro_batch_sequences, config.model.context + 1),
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    tokens = random_BT[:, :-1].contiguous(), random_BT[:, 1:].contiguous()
    first, second = (_train(config, model, tokens, where) for _ in range(2))
    _refuse_difference(place, first, second, "Computing one micro-batch twice gives two results")
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
    _refuse_difference(place, scored, again, "Evaluating one micro-batch twice gives two results")
    return state + first + scored


def attempt(setting: str, config: Config, vocab_size: int, device: torch.device, ranks: int) -> Trace:
    """Try what `setting` names in this process. Raises ConfigError."""
    if setting == "model.class":
        return trace(config, vocab_size, device)
    shards = config.parallel.shard_ranks if config.parallel.strategy == "hybrid" else ranks
    return trace_optimizer(config, vocab_size, device, shards)


def elsewhere(setting: str, config: Config, vocab_size: int, found: Trace) -> list[Trace]:
    """Try it in a second process; return what that gave. Empty if some process before gave `found`: the cache says so.

    Only on CPUs: a second process on a GPU would need its own share of the memory.
    """
    known = cache_root(config.data.cache_dir) / "tried" / digest(found)
    if known.exists() or world.pick_device(config.parallel).type != "cpu":
        return []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.toml"
        path.write_text(configs.as_toml(config), encoding="utf-8")
        # Another order of sets: Python draws it for each process, unless it is told to.
        environ = os.environ | {"PYTHONHASHSEED": str(1 + zlib.crc32(digest(found).encode()) % 10**6)}
        command = [sys.executable, "-m", "trainer.own_check", setting, str(path), str(vocab_size)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        place = own_code.find(config.model.class_ if setting == "model.class" else config.optim.class_, setting)
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        _refuse(place, f"A second process cannot compute with it ({last})")
    other: Trace = [(name, value) for name, value in json.loads(done.stdout.splitlines()[-1])]
    if other == found:
        with contextlib.suppress(OSError):  # a read-only cache only costs time
            known.parent.mkdir(parents=True, exist_ok=True)
            known.touch()
    return [other]


def compare(place: Place, traces: Sequence[Trace], ranks: int) -> None:
    """Raise ConfigError if processes gave different numbers: those of the ranks, or a second beside a single rank."""
    for rank, other in enumerate(traces):
        who = f"Rank 0 and rank {rank}" if rank < ranks else "This process and a second one"
        _refuse_difference(place, traces[0], other, f"{who} compute different numbers")


def digest(found: Trace) -> str:
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def refuse_process(place: Place) -> NoReturn:
    """Raise ConfigError for a resumed run whose first process computed other numbers."""
    _refuse(
        place,
        "This process computes other numbers with it than the process that began the run (if a library that it imports "
        "is another one now, accept that with --accept-other-bits)",
    )


def _refuse_difference(place: Place, first: Trace, second: Trace, fact: str) -> None:
    for (name, digest), (other_name, other) in zip(first, second, strict=False):
        if (name, digest) != (other_name, other):
            _refuse(place, f"{fact}: the first that differs is {name}")
    if len(first) != len(second):
        _refuse(place, f"{fact}: what they hold or run is not the same")


def _refuse(place: Place, fact: str) -> NoReturn:
    rule = {
        "model": "Any rank may compute any micro-batch, so the model must be a function of its parameters and tokens.",
        "optimizer": "Every rank updates its copy, and a resume goes on from a checkpoint, so the optimizer must be a "
        "function of parameters, gradients, rates and the state that it keeps for each parameter.",
    }[place.kind]
    hint = "Look for random numbers, the order of sets, the clock, and state that is kept elsewhere."
    raise ConfigError([f"{place.where}: {fact}.\n  {rule} {hint}"])


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


STEPS = 3
ROWS = 96
"""Rows of a parameter that an optimizer is tried on: enough for several shards."""


def trace_optimizer(config: Config, vocab_size: int, device: torch.device, shards: int) -> Trace:
    """Take a few steps with an optimizer of one's own, and return what they gave. Raises ConfigError.

    `shards` is the number of ranks that hold one copy of the weights.
    """
    place = own_code.find(config.optim.class_, "optim.class")
    values = _sample_parameters(config, vocab_size, device)
    before = _random_states()
    whole = _Trial(config, vocab_size, values, place)
    traces = [whole.trace(), *whole.take(range(STEPS))]
    _check_state(place, whole.optimizer.inner)
    for source, state in _random_states().items():
        if state != before[source]:
            fact = f"{place.where} reads global random state, that of {source}, which is another one on every rank"
            raise ConfigError([f"{fact}.\n  Remove it: an update is a function of gradients and state."])
    if len({tuple(name for name, _ in found) for found in traces}) > 1:
        fact = f"{place.where} keeps other state after its first step than later"
        raise ConfigError([f"{fact}.\n  Checkpoints hold the same at every step. Make all of it in the first."])
    again = _Trial(config, vocab_size, values, place).take(range(STEPS))
    _refuse_difference(place, traces[-1], again[-1], "The same steps from the same state give two results")
    stopped = _Trial(config, vocab_size, values, place)
    stopped.take(range(STEPS - 1))
    _refuse_difference(
        place, traces[-1], stopped.resumed().take([STEPS - 1])[-1],
        "A step after a resume gives another result than without",
    )  # fmt: skip
    faster = _Trial(config, vocab_size, values, place, rate=2.0).take(range(STEPS))
    weights = [found for found in traces[-1] if found[0].startswith("parameter")]
    if weights == [found for found in faster[-1] if found[0].startswith("parameter")]:
        fact = f"{place.where} makes the same update at twice the learning rate"
        raise ConfigError(
            [f'{fact}.\n  The schedule sets group["lr"] before each step. Use it, and change the parameters in place.']
        )
    if config.parallel.strategy != "replicate":
        _check_shards(config, vocab_size, values, place, max(2, shards), whole)
    return traces[-1]


class _Trial:
    """An optimizer of the user's own with parameters and gradients to try it on."""

    def __init__(
        self, config: Config, vocab_size: int, values: Mapping[str, Tensor], place: Place, *,
        rate: float = 1.0, part: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        """`part` is (number, count) of the chunk of rows that it holds."""
        self._again = functools.partial(_Trial, config, vocab_size, place=place, rate=rate, part=part)
        self._values, self._place, self._rate, self._part = values, place, rate, part
        chunks = {name: value.chunk(part[1]) for name, value in values.items()}
        self.parameters = {
            name: nn.Parameter(held[part[0]].detach().clone()) for name, held in chunks.items() if part[0] < len(held)
        }
        meta = models.construct(config.model, vocab_size, "meta")
        names: dict[Tensor, str] = {parameter: name for name, parameter in meta.named_parameters()}
        groups = []
        for group in optim.own_groups(meta, config.optim, config.model.width):
            held = [self.parameters[name] for p in group["params"] if (name := names[p]) in self.parameters]
            groups += [group | {"params": held}] if held else []
        self.optimizer = OwnOptimizer(config.optim, groups)
        self._do(self.optimizer.make_sample)
        _check_state(place, self.optimizer.inner)

    def take(self, steps: Sequence[int]) -> list[Trace]:
        """Take these steps; return a trace after each."""
        return [self._step(number) for number in steps]

    def _step(self, number: int) -> Trace:
        for name, parameter in self.parameters.items():
            seed = int(own_code.digest_of([name, number]), 16) >> 1
            drawn = torch.randn(self._values[name].shape, generator=torch.Generator().manual_seed(seed))
            parameter.grad = (drawn * 1e-2).chunk(self._part[1])[self._part[0]].to(parameter.device)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] * self._rate * (number + 1) / STEPS
        self._do(self.optimizer.step)
        return self.trace()

    def _do(self, act: Callable[[], None]) -> None:
        try:
            act()
        except ConfigError:
            raise
        except Exception as error:
            raise own_import.failure(self._place, "cannot take a step", error) from error

    def trace(self) -> Trace:
        state = self.optimizer.state
        return [(f"parameter {name}", _digest(p)) for name, p in self.parameters.items()] + [
            (f"{key.removeprefix('own.')} of {name}", _digest(tensor))
            for name, p in self.parameters.items()
            for key, tensor in sorted(state[p].items())
        ]

    def resumed(self) -> "_Trial":
        """Return a new optimizer that goes on from this one's parameters and state, as from a checkpoint."""
        other = self._again(self._values)
        saved, read = self.optimizer.state, other.optimizer.state
        for name, parameter in other.parameters.items():
            parameter.data.copy_(self.parameters[name].data)
            for key, tensor in read[parameter].items():
                tensor.copy_(saved[self.parameters[name]][key])
        other.optimizer.loaded()
        return other


def _sample_parameters(config: Config, vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """Return values for one parameter of each group and shape, of not too many rows."""
    meta = models.construct(config.model, vocab_size, "meta")
    groups, chosen = optim.group_of_parameters(meta), dict[tuple[str, torch.Size], str]()
    for name, parameter in meta.named_parameters():
        chosen.setdefault((groups[name], parameter.shape), name)
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn((min(shape[0], ROWS), *shape[1:]), generator=generator).to(device)
        for (_, shape), name in chosen.items()
    }


def _check_state(place: Place, inner: Optimizer) -> None:
    """Raise ConfigError unless a checkpoint can hold what the optimizer keeps."""
    held = [parameter for group in inner.param_groups for parameter in group["params"]]
    rule = f"A checkpoint holds numbers and tensors of {', '.join(str(t).removeprefix('torch.') for t in STATE_TYPES)}."
    problems = [
        f"{place.where} keeps state that belongs to no parameter: {key!r:.60}.\n  Keep it in self.state[p]."
        for key in inner.state
        if not any(key is parameter for parameter in held)
    ]
    for key, value in {k: v for p in held for k, v in inner.state.get(p, {}).items()}.items():
        is_number = isinstance(value, bool | int | float) or value is None
        if not isinstance(key, str) or not (is_number or isinstance(value, Tensor)):
            problems.append(f"{place.where} keeps {key!r}, a {type(value).__name__}.\n  {rule}")
        elif isinstance(value, Tensor) and value.dtype not in STATE_TYPES:
            problems.append(f"{place.where} keeps {key!r} as {value.dtype}.\n  {rule}")
    if problems:
        raise ConfigError(problems)


def _check_shards(
    config: Config, vocab_size: int, values: Mapping[str, Tensor], place: Place, shards: int, whole: _Trial
) -> None:
    """Raise ConfigError if updating rows by themselves is not the same as updating the whole parameter."""
    parts = [_Trial(config, vocab_size, values, place, part=(number, shards)) for number in range(shards)]
    rule = (
        f'With parallel.strategy = "{config.parallel.strategy}" a rank holds some rows of each parameter, so an update '
        'must not depend on other rows. Set parallel.strategy = "replicate", where the optimizer sees whole parameters.'
    )
    try:
        for part in parts:
            part.take(range(STEPS))
    except ConfigError as error:
        raise ConfigError([f"{problem}\n  {rule}" for problem in error.problems]) from error
    for name, parameter in whole.parameters.items():
        pieces = [part.parameters[name].data for part in parts if name in part.parameters]
        if _digest(torch.cat(pieces)) != _digest(parameter):
            raise ConfigError(
                [f"{place.where} updates {name} in another way where its rows are on {shards} ranks.\n  {rule}"]
            )
        for key, tensor in whole.optimizer.state[parameter].items():
            if tensor.ndim and tensor.shape != parameter.shape:
                fact = f"{place.where} keeps {key.removeprefix('own.')!r} of shape {tuple(tensor.shape)}"
                raise ConfigError([f"{fact} for {name}, whose shape is {tuple(parameter.shape)}.\n  {rule}"])


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
        raise own_import.failure(own_code.find(config.model.class_), "cannot go backward", error) from error
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
            raise own_import.failure(place, "cannot compute a micro-batch", error) from error
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


def main(setting: str, path: str, vocab_size: str) -> None:
    """Try what `setting` of a config names, on the CPU, and print the trace as the last line."""
    config = configs.load(Path(path))
    torch.set_num_threads(config.numerics.threads)
    print(json.dumps(attempt(setting, config, int(vocab_size), torch.device("cpu"), 1)))


if __name__ == "__main__":
    main(*sys.argv[1:])
