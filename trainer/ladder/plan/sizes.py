"""Sizes: width, depth, parameters and FLOPs of a rung, and the published rules by which settings scale with size.

N counts parameters without look-up tables, an untied head included: as Kaplan et al. 2020, with the head that Porian et
al. 2024 (arXiv:2406.19146) found missing there. The baseline's N decides tokens and scale of a rung for all arms, so
that runs stay a single change apart. At the base rung, the smallest, the config holds as it is written; the rules
change it from there on.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from pydantic import Field

from trainer import config as configs
from trainer import costs
from trainer.config import Config, Section
from trainer.ladder.stats.records import Axis

F = TypeVar("F", bound=Callable[..., Any])


class Rules(Section):
    """[sizes]: the rules."""

    axis: Axis = "compute"
    """"compute": rungs are sizes of the model. "data": rungs are amounts of unique text, which a model of the config's
    size reads `epochs` times, or as often as it goes into `run_tokens`."""
    tokens_per_parameter: float = Field(default=0.0, ge=0)
    """D / N of every rung. About 20 is compute-optimal in Hoffmann et al. 2022 (arXiv:2203.15556), table 3."""
    epochs: float = Field(default=0.0, ge=0)
    """Axis "data": number of times that a run reads its text. Compute then grows with the text."""
    run_tokens: int = Field(default=0, ge=0)
    """Axis "data": tokens that each run is trained on, however many of them are unique. Compute is then the same at
    every rung."""
    aspect: float = Field(default=0.0, ge=0)
    """Width divided by depth, for sizes given by their parameters; 0: the config's."""
    head_width: int = Field(default=0, ge=0)
    """Channels per head at every size, so n_heads grows with width; 0: the config's. A rung's n_heads overrides it."""
    learning_rate: Literal["fixed", "mup", "power"] = "fixed"
    """"mup": optim.mup_base_width is the base rung's width; hidden rates then fall as 1 / width (Yang et al. 2022,
    arXiv:2203.03466, table 8). "power": rate × (N / N_base)^learning_rate_exponent; −0.25 is DeepSeek's C^−0.125 (Bi
    et al. 2024, arXiv:2401.02954) along a ladder of fixed D / N, where C grows as N². On the axis "data", the amount
    of unique text takes N's place here and below."""
    learning_rate_exponent: float = 0.0
    batch: Literal["fixed", "power"] = "fixed"
    """"power": data.micro_batches × (D / D_base)^batch_exponent, rounded; 0.47 is the critical batch of Zhang et al.
    2024 (arXiv:2410.21676), which grows with tokens and hardly with N."""
    batch_exponent: float = 0.0
    weight_decay: Literal["fixed", "inverse_steps"] = "fixed"
    """"inverse_steps": rate × decay × steps stays as at the base rung, the hidden matrices' rate: AdamW averages over
    the same share of the run (Wang & Aitchison 2024, arXiv:2405.13698)."""
    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """optim.warmup_steps as a share of the steps: a fixed warmup is too long for the small rungs (Porian et al.
    2024); 0 leaves it as the config says."""

    def problems(self) -> list[str]:
        """Name settings that contradict each other or have no effect, and those that are missing."""
        problems = [
            f'sizes.{name}_exponent = {exponent:g} beside sizes.{name} = "{rule}".\n'
            f'  The exponent is that of "power", and "power" needs one. Give both or none.'
            for name in ("learning_rate", "batch")
            if ((rule := getattr(self, name)) == "power") != ((exponent := getattr(self, f"{name}_exponent")) != 0)
        ]
        if self.axis == "compute":
            needed, unused = ("tokens_per_parameter",), ("epochs", "run_tokens")
        else:
            needed, unused = ("epochs", "run_tokens"), ("tokens_per_parameter", "aspect", "head_width")
        if sum(bool(getattr(self, name)) for name in needed) != 1:
            problems.append(
                f'sizes.axis = "{self.axis}" needs {" or ".join(needed)}{", not both" if len(needed) > 1 else ""}.\n'
                "  They say how long a run trains. Give a number above 0."
            )
        problems += [
            f'sizes.{name} has no effect with sizes.axis = "{self.axis}".\n  Remove it.'
            for name in unused
            if getattr(self, name)
        ]
        if self.axis == "data" and self.learning_rate == "mup":
            problems.append(
                'sizes.learning_rate = "mup" has no effect with sizes.axis = "data": all runs have one width.\n'
                '  Use "fixed", or "power" in the amount of unique text.'
            )
        if 0 < self.epochs < 1:
            problems.append(
                f"sizes.epochs = {self.epochs:g} reads a part of the text only, and the rest would count as unique.\n"
                "  Give 1 or more."
            )
        return problems


DERIVES: Mapping[str, tuple[str, ...]] = {
    "epochs": ("budget.steps", "optim.warmup_steps"),
    "run_tokens": ("budget.steps", "optim.warmup_steps"),
    "head_width": ("model.n_heads",),
    "learning_rate": ("optim.learning_rate", "optim.mup_base_width"),
    "learning_rate_exponent": ("optim.learning_rate",),
    "batch": ("data.micro_batches",),
    "batch_exponent": ("data.micro_batches",),
    "weight_decay": ("optim.weight_decay",),
    "warmup_fraction": ("optim.warmup_steps",),
}
"""Settings that each rule decides. An arm may change one rule instead of a setting."""
SET_BY_RUNGS: Mapping[Axis, tuple[str, ...]] = {
    "compute": ("seed", "model.width", "model.n_layers", "budget.steps"),
    "data": ("seed", "data.unique_tokens", "budget.steps"),
}


class Size(Section):
    """A model size, by width and depth or by parameters; on the axis "data", an amount of unique text."""

    width: int = Field(default=0, ge=0)
    n_layers: int = Field(default=0, ge=0)
    n_heads: int = Field(default=0, ge=0)
    """0: by sizes.head_width."""
    parameters: float = Field(default=0.0, ge=0)
    """N, met as closely as whole heads and layers allow."""
    unique_tokens: int = Field(default=0, ge=0)
    """U: tokens of unique text (data.unique_tokens)."""

    def problems(self, where: str, axis: Axis = "compute") -> list[str]:
        """Say what keeps this from being one size."""
        sized = bool(self.width or self.n_layers or self.n_heads or self.parameters)
        if axis == "data":
            if self.unique_tokens and not sized:
                return []
            return [
                f"{where} has no one amount of text.\n"
                '  With sizes.axis = "data" give unique_tokens alone: the model has the baseline\'s size.'
            ]
        if self.unique_tokens:
            return [f'{where} has unique_tokens.\n  Set sizes.axis = "data", or give a size of the model.']
        by_shape = self.width and self.n_layers
        if (by_shape and not self.parameters) or (
            self.parameters and not (self.width or self.n_layers or self.n_heads)
        ):
            return []
        return [f"{where} has no one size.\n  Give width and n_layers (and n_heads, if you like), or parameters alone."]


@dataclass(frozen=True)
class Shape:
    width: int
    n_layers: int
    n_heads: int


@dataclass(frozen=True)
class Scale:
    """The baseline's N and shape at a rung and at the base rung, and the unique text there."""

    parameters: int
    shape: Shape
    base_parameters: int
    base: Shape
    unique_tokens: int = 0
    """U, on the axis "data"; else 0."""
    base_unique_tokens: int = 0

    @property
    def ratio(self) -> float:
        """Size of the rung over that of the base rung, in what the rungs are amounts of."""
        if self.unique_tokens:
            return self.unique_tokens / self.base_unique_tokens
        return self.parameters / self.base_parameters


def _cached(function: F) -> F:
    return functools.lru_cache(maxsize=1024)(function)  # pyright: ignore - it does not see that the arguments are hashable


def counts(model: configs.Model, vocab_size: int) -> tuple[int, int]:
    """Return (N, training FLOPs per token) of a model with `vocab_size` rows of embedding. Loads torch."""
    return _counts(model.model_dump_json(), vocab_size)


@_cached
def _counts(settings: str, vocab_size: int) -> tuple[int, int]:
    from trainer.model import construct

    model = configs.Model.model_validate_json(settings)
    parameters = costs.parameter_count(construct(model, vocab_size, "meta")).non_embedding
    return parameters, costs.flops_per_token(model, vocab_size)


def vocab_of(data: configs.Data, held_out: configs.Eval, rows: int) -> int:
    """Return the exact number of embedding rows; `rows` is model.vocab_size. May have to make the tokenizer."""
    return _vocab_of(data, held_out.model_dump_json(), rows)


@_cached
def _vocab_of(data: configs.Data, held_out: str, rows: int) -> int:
    from trainer.data import tokenizer_for

    tokenizer = tokenizer_for(data, configs.Eval.model_validate_json(held_out))
    return costs.padded_vocab(tokenizer.vocab_size, rows)


def unique_tokens_of(data: configs.Data, held_out: configs.Eval, context: int) -> int:
    """Return the tokens of unique text that there are, in whole sequences. May have to encode the corpus."""
    return _unique_tokens_of(data, held_out.model_dump_json(), context)


@_cached
def _unique_tokens_of(data: configs.Data, held_out: str, context: int) -> int:
    from trainer.data import unique_tokens_of

    return unique_tokens_of(data, configs.Eval.model_validate_json(held_out), context)


def shape_of(size: Size, rules: Rules, config: Config, vocab_size: int) -> Shape:
    """Return width, depth and heads of a size, by the rules; `config` is the baseline's."""
    channels = rules.head_width or max(1, config.model.head_channels)
    if size.width:
        # A width that is no multiple of the heads is refused with the config.
        return Shape(size.width, size.n_layers, size.n_heads or max(1, round(size.width / channels)))
    aspect = rules.aspect or config.model.width / config.model.n_layers

    def shape(heads: int) -> Shape:
        return Shape(heads * channels, max(1, round(heads * channels / aspect)), heads)

    def count(heads: int) -> int:
        return counts(with_shape(config, shape(heads)).model, vocab_size)[0]

    # Width is heads × channels, so N grows with the number of heads: bisect it for the nearest N.
    above = 1
    while count(above) < size.parameters:
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (middle, above) if count(middle) < size.parameters else (below, middle)
    return shape(min((heads for heads in (below, above) if heads), key=lambda n: abs(count(n) - size.parameters)))


def with_shape(config: Config, shape: Shape) -> Config:
    """Return the config at this shape, unchecked."""
    return config.model_copy(update={"model": config.model.model_copy(update=asdict(shape))})


def scaled(config: Config, rules: Rules, shape: Shape, scale: Scale, decay: float = 1.0) -> dict[str, Any]:
    """Return the settings that the rules give `config` at a rung: {"optim.weight_decay": 0.05, …}.

    `config` is the ladder's with an arm's change, `decay` the value of `inverse_steps`. Tokens equal the baseline's D
    within half a step.
    """
    # A rule that is "fixed" sets nothing: the config's own value stays.
    settings: dict[str, Any] = {f"model.{name}": value for name, value in asdict(shape).items()}
    if rules.axis == "data":  # the shape is the config's, which an arm may change
        settings = {"data.unique_tokens": scale.unique_tokens}
    if rules.batch == "power":
        settings["data.micro_batches"] = max(1, round(config.data.micro_batches * scale.ratio**rules.batch_exponent))
    if rules.learning_rate == "mup" and shape.width != scale.base.width:
        settings["optim.mup_base_width"] = scale.base.width
    if rules.learning_rate == "power":
        factor = scale.ratio**rules.learning_rate_exponent
        settings["optim.learning_rate"] = _legible(config.optim.learning_rate * factor)
    settings["budget.steps"] = steps = _steps(config, rules, scale, settings)
    # The number of steps depends on the batch, so what depends on the number of steps comes after it.
    if rules.weight_decay == "inverse_steps":
        settings["optim.weight_decay"] = _legible(config.optim.weight_decay * decay)
    if rules.warmup_fraction:
        settings["optim.warmup_steps"] = round(rules.warmup_fraction * steps)
    return settings


def _steps(config: Config, rules: Rules, scale: Scale, settings: Mapping[str, Any]) -> int:
    # The tokens are those of the baseline's N, so an arm with another batch takes another number of steps.
    micro_batches = settings.get("data.micro_batches", config.data.micro_batches)
    tokens_per_step = micro_batches * config.data.micro_batch_sequences * config.model.context
    if rules.epochs:
        # Whole epochs, rounded up: what no step reads would not be the run's text.
        sequences = scale.unique_tokens // config.model.context
        return math.ceil(rules.epochs * sequences * config.model.context / tokens_per_step)
    tokens = rules.run_tokens or rules.tokens_per_parameter * scale.parameters
    return max(1, round(tokens / tokens_per_step))


def inverse_steps(config: Config, rules: Rules, scale: Scale) -> float:
    """Return the factor of weight decay at a rung that keeps rate × decay × steps as at the base rung.

    It is computed for the baseline and used for all arms; else an arm with another rate or batch would get another
    decay too.
    """
    settings = scaled(config, rules, scale.shape, scale)
    # Rate of the hidden matrices, relative to the base rung's.
    rate = settings.get("optim.learning_rate", config.optim.learning_rate) / config.optim.learning_rate
    if rules.learning_rate == "mup":
        rate *= scale.base.width / scale.shape.width
    base = Scale(scale.base_parameters, scale.base, scale.base_parameters, scale.base,
                 scale.base_unique_tokens, scale.base_unique_tokens)  # fmt: skip
    return _steps(config, rules, base, {}) / (rate * settings["budget.steps"])


def _legible(value: float) -> float:
    return float(f"{value:.6g}")  # more digits would make configs hard to read
