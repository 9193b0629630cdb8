"""Changes of shape at equal parameters or FLOPs, with the speed that each would have on this machine.

A proposal's forward and backward pass is traced without data, and each of its calls is timed alone, as the config's own
were. What a step does beside them (rounding, reduction, update) grows with the parameters.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import config as configs
from trainer import costs, model
from trainer.advise.rates import Rates
from trainer.advise.steps import Step, trace
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.show.units import plural
from trainer.tomlfile import text

EQUAL = 0.02
"""Parameters or FLOPs a token that differ by no more are equal."""
HEAD_CHANNELS = (32, 48, 64, 96, 128)
ROW_MULTIPLES = (128, 256, 512)
MLP_MULTIPLE = 16
MLP_RATIOS = (1.5, 8.0)
"""Least and largest hidden width of an MLP, as a multiple of the model's."""


@dataclass(frozen=True)
class Candidate:
    what: str
    settings: dict[str, Any]


def propose(
    path: Path, overrides: Sequence[str], config: Config, step: Step, rates: Rates, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return proposals, the largest predicted gain first, with the settings to give as --set.

    `gain` is how much faster a FLOP is computed; `tokens_gain` how much faster a token is.
    """
    if config.model.class_:
        return []  # the shapes of a model of one's own are its own
    base = _Size.of(config)
    traced = trace(config, rates.device).timed(rates)
    # What a micro-batch does beside its forward and backward pass, and what a step does once.
    beside = step.seconds_per("micro_batch") - traced.seconds_per("micro_batch")
    once = step.seconds_per("step")
    now = config.data.micro_batches * step.seconds_per("micro_batch") + once
    found = []
    for candidate in candidates(config):
        settings = [f"{name}={text(value)}" for name, value in candidate.settings.items()]
        try:
            other = configs.load(path, [*overrides, *settings])
            size = _Size.of(other)
        except ConfigError:
            continue  # it contradicts another setting
        if not (_equal(size.parameters, base.parameters) or _equal(size.flops, base.flops)):
            continue
        larger = size.parameters / base.parameters
        micro_batch = trace(other, rates.device).timed(rates).seconds_per("micro_batch")
        seconds = other.data.micro_batches * (micro_batch + beside * larger) + once * larger
        tokens_gain = now / seconds * size.tokens / base.tokens
        found.append(
            {"what": candidate.what, "set": settings, "parameters": size.parameters, "flops_per_token": size.flops,
             "parameters_ratio": larger, "flops_ratio": size.flops / base.flops, "seconds": seconds,
             "tokens_gain": tokens_gain, "gain": tokens_gain * size.flops / base.flops}
        )  # fmt: skip
        log(f"{candidate.what}: {found[-1]['gain']:.2f}")
    return sorted(found, key=lambda row: -row["gain"])


@dataclass(frozen=True)
class _Size:
    parameters: int
    flops: int
    """A token."""
    tokens: int
    """A step."""

    @classmethod
    def of(cls, config: Config) -> "_Size":
        rows = costs.padded_vocab(costs.vocabulary(config)[0], config.model.vocab_size)
        tokens = config.data.micro_batches * config.data.micro_batch_sequences * config.model.context
        return cls(parameters(config.model, rows), costs.flops_per_token(config.model, rows), tokens)


def parameters(settings: configs.Model, rows: int) -> int:
    return costs.parameter_count(model.construct(settings, rows, "meta")).total


def _equal(a: float, b: float) -> bool:
    return abs(a / b - 1) <= EQUAL


def candidates(config: Config) -> Iterator[Candidate]:
    """Yield changes of one kind each: micro-batch, vocabulary, heads, width against MLP, depth against width."""
    data, settings = config.data, config.model
    for factor in (0.5, 2, 4):
        sequences, number = data.micro_batch_sequences * factor, data.micro_batches / factor
        if sequences == int(sequences) and number == int(number) and number >= 2:
            changed = {"data.micro_batch_sequences": int(sequences), "data.micro_batches": int(number)}
            yield Candidate(f"micro-batches of {plural(int(sequences), 'sequence')}", changed)
    rows = costs.padded_vocab(costs.vocabulary(config)[0], settings.vocab_size)
    for multiple in ROW_MULTIPLES:
        if (padded := -(-rows // multiple) * multiple) != rows:
            yield Candidate(f"a vocabulary of {padded:,} rows", {"model.vocab_size": padded})
    if settings.n_kv_heads or settings.head_width:
        return  # they tie the widths to one another
    for channels in HEAD_CHANNELS:
        heads, rest = divmod(settings.width, channels)
        if not rest and heads != settings.n_heads:
            yield Candidate(f"{plural(heads, 'head')} of {channels} channels", {"model.n_heads": heads})
    layers, width, channels = settings.n_layers, settings.width, settings.head_channels
    for other in (-2, -1, 1, 2):
        yield from _traded(settings, rows, layers, width + other * channels)
    for other in sorted({max(1, layers // 2), layers * 2 // 3, layers * 3 // 2, layers * 2} - {0, layers}):
        nearest = round(width * (layers / other) ** 0.5 / channels)
        yield from _traded(settings, rows, other, nearest * channels)


def _traded(settings: configs.Model, rows: int, layers: int, width: int) -> Iterator[Candidate]:
    """Yield a model of these layers and this width whose MLP has the width that keeps the number of parameters."""
    if width < settings.head_channels:
        return

    def count(ratio: float) -> int:
        changed = {"n_layers": layers, "width": width, "n_heads": width // settings.head_channels, "mlp_ratio": ratio}
        return parameters(settings.model_copy(update=changed), rows)

    one, two = count(1.0), count(2.0)  # linear in the ratio
    ratio = 1.0 + (parameters(settings, rows) - one) / (two - one)
    hidden = round(ratio * width / MLP_MULTIPLE) * MLP_MULTIPLE
    if MLP_RATIOS[0] <= hidden / width <= MLP_RATIOS[1]:
        changed = {"model.n_layers": layers, "model.width": width, "model.n_heads": width // settings.head_channels,
                   "model.mlp_ratio": hidden / width}  # fmt: skip
        yield Candidate(f"{layers} layers of width {width}, MLP {hidden}", changed)
