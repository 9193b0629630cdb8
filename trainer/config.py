"""Every setting of a run: load, override, validate, fingerprint.

A config is TOML (one level of `extends`, then `--set` overrides) read into frozen, strict models. Unknown keys are
refused, all problems are reported at once, and a setting that would have no effect is a problem.
Zero means "off" for numbers that can be off, since TOML has no null.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer import tomlfile
from trainer.errors import ConfigError


class Section(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class Data(Section):
    source: str = "python-stdlib"
    """"python-stdlib", "repo" (this source tree), a path or glob (.jsonl, .parquet, else text), or "hub:OWNER/NAME"."""
    revision: str = ""
    """Commit of a hub dataset (40 hex digits); required, since a branch moves and a run must not."""
    subset: str = ""
    """Configuration name of a hub dataset."""
    hub_split: str = "train"
    """Split of a hub dataset that documents are read from."""
    streaming: bool = False
    """Read a hub dataset as a stream instead of downloading it first."""
    text_column: str = "text"
    """Column that holds the text in jsonl, parquet and hub datasets."""
    unit: Literal["document", "paragraph", "line"] = "document"
    """What one document of a plain text file is: the whole file, a paragraph, or a line."""
    max_megabytes: float = Field(default=0.0, ge=0)
    """Stop reading the corpus after this many megabytes of text; 0 reads all of it."""
    heldout: Literal["hash", "tail"] = "hash"
    """"hash" holds out whole documents by a hash of their content; "tail" the last part of every document."""
    heldout_fraction: float = Field(default=0.05, gt=0, lt=1)
    tokenizer: str = "bpe"
    """"bpe" (byte-level, trained on the training split), "bytes", "chars", or the path of a tokenizer.json."""
    vocab_size: int = Field(default=4096, ge=257)
    """Tokens of a trained BPE; has no meaning for other tokenizers."""
    micro_batches: int = Field(default=8, ge=1)
    """M: micro-batches in a step. The unit of work; any number of ranks up to M may share them."""
    micro_batch_sequences: int = Field(default=4, ge=1)
    """B: sequences in a micro-batch."""
    cache_dir: str = ""
    """Where tokenizers and token stores live; empty means $TOPROPE_CACHE, else ~/.cache/toprope."""


class Model(Section):
    n_layers: int = Field(default=4, ge=1)
    n_heads: int = Field(default=4, ge=1)
    n_kv_heads: int = Field(default=0, ge=0)
    """Key/value heads shared by groups of query heads; 0 means as many as n_heads."""
    width: int = Field(default=128, ge=1)
    context: int = Field(default=64, ge=1)
    """Tokens in a sequence."""
    vocab_size: int = Field(default=0, ge=0)
    """Rows of the embedding table; 0 takes the tokenizer's size, rounded up to a multiple of 64."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    positions: Literal["learned", "rope"] = "rope"
    rope_base: float = Field(default=10_000.0, gt=0)
    mlp: Literal["gelu", "swiglu", "relu2"] = "relu2"
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the MLP divided by `width`."""
    qk_norm: bool = True
    tied_embeddings: bool = False
    biases: bool = False
    logit_softcap: float = Field(default=0.0, ge=0)
    """Logits are squashed into ±this by tanh; 0 is off."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-partition penalty in the training loss; 0 is off."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    value_embeddings: bool = False
    """Token-indexed embeddings added to the values of every second layer's attention."""
    bigram_buckets: int = Field(default=0, ge=0)
    """Rows of a hashed table of (previous token, token) embeddings added to the input; 0 is off."""
    init: Literal["gpt2", "zero_proj"] = "zero_proj"
    init_draw: int = Field(default=0, ge=0)
    """Which draw of the initial weights at this seed; the order of the data stays."""


class Optim(Section):
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak rate of AdamW's parameters."""
    muon_learning_rate: float = Field(default=0.02, gt=0)
    """Peak rate of Muon's parameters: the hidden matrices."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; applies to matrices, not to norms, biases and embeddings."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 is off."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps in which a wsd schedule decays."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step as a fraction of the peak."""
    mup_base_width: int = Field(default=0, ge=0)
    """Width at which the rates were tuned; matrices with a wide input get rate × base / width. 0 is off."""


class Budget(Section):
    steps: int = Field(default=100, ge=1)


class Parallel(Section):
    strategy: Literal["replicate", "fsdp", "hybrid"] = "replicate"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    shard_ranks: int = Field(default=2, ge=2)
    """Hybrid only: ranks that share one copy of the weights; the world is a multiple of it."""
    reshard_after_forward: bool = True
    """FSDP: free gathered weights between forward and backward; less memory, one more all-gather."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations. Changes no bit of the result."""


class Numerics(Section):
    exact: bool = True
    """Round every micro-batch's gradient onto a grid, so that sums are exact in any order (trainer/exact.py)."""
    headroom_bits: int = Field(default=5, ge=1, le=10)
    """A gradient may grow by 2^this over its recent maximum before the step is redone on a coarser grid."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16" runs the model under autocast; master weights and optimizer stay float32."""
    threads: int = Field(default=1, ge=1)
    """CPU threads per rank. Some CPU kernels sum in an order that depends on it, so it is part of the fingerprint."""
    compile: bool = False
    """torch.compile each block."""


class Checkpoint(Section):
    every_steps: int = Field(default=50, ge=0)
    """Save after every so many steps; 0 saves only at the end."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Checkpoints of steps that this divides are kept for good; 0 keeps none of them."""
    max_failures: int = Field(default=3, ge=1)
    """The run stops after so many failed saves in a row; until then it trains on and tries again at the next."""


class Eval(Section):
    every_steps: int = Field(default=50, ge=0)
    """Evaluate after every so many steps and at the end; 0 evaluates only at the end."""
    max_tokens: int = Field(default=65_536, ge=1)
    """Tokens scored per set, spread evenly over it."""
    sets: tuple[str, ...] = ("val", "repo")
    """"val" (documents kept from training), "repo" (this repository's own source), or names from `eval.sources`."""
    sources: dict[str, str] = {}
    """Further held-out sets: name = path, glob, or "hub:OWNER/NAME@COMMIT[:SPLIT]"."""


class Elastic(Section):
    step_timeout_seconds: float = Field(default=300.0, gt=0)
    """A rank that makes no progress for so long is taken for hung: stacks are dumped and the process ends."""
    startup_timeout_seconds: float = Field(default=1800.0, gt=0)
    """The same from the connection to an attempt's first step: kernels may have to be compiled, a tokenizer trained.

    Data that are being read or encoded count as progress."""


class Wandb(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """"auto": online if a key is in the environment or netrc, else offline. WANDB_MODE overrides."""
    project: str = "toprope"
    entity: str = ""
    group: str = ""
    tags: tuple[str, ...] = ()


class FaultEntry(BaseModel):
    """One fault on purpose. Which kinds there are, and what settings each has of its own: faults/kinds.py."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="allow", use_attribute_docstrings=True, allow_inf_nan=False
    )

    kind: str
    rank: int | str = "any"
    """A number, "any" (one drawn by `seed`), "all", "rank0", or "writer" (who commits checkpoints)."""
    at_step: int | None = Field(default=None, ge=1)
    """While this step is being computed, saved or evaluated: the first is 1."""
    at_seconds: float | None = Field(default=None, ge=0)
    """Or so many seconds after the job began; made from outside."""
    phase: str = ""
    """A named point of a rank's work; default the kind's usual one."""
    attempt: int | None = Field(default=None, ge=0)
    """Only in this attempt; default the first that comes by. No fault fires twice on a rank."""


A_FAULT = 'Write [[faults]], and below it its settings: kind = "sigkill", rank = 1, at_step = 9.'


class Config(Section):
    seed: int = Field(default=0, ge=0, lt=2**63)
    data: Data = Data()
    model: Model = Model()
    optim: Optim = Optim()
    budget: Budget = Budget()
    parallel: Parallel = Parallel()
    numerics: Numerics = Numerics()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    elastic: Elastic = Elastic()
    wandb: Wandb = Wandb()
    faults: tuple[FaultEntry, ...] = ()
    """Faults on purpose, as [[faults]] tables. None, unless given."""


# What decides the weights. All else may change between attempts of one run.
MATHEMATICS = ("seed", "data", "model", "optim", "budget", "numerics")
NOT_MATHEMATICS = {"data": ("cache_dir", "streaming")}
# Left out at the value that changes nothing, so that runs from before there was such a setting keep their fingerprint.
ADDED_LATER = {"model.init_draw": 0}


def load(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML config, its `extends` base, then `key=value` overrides; raise ConfigError naming every problem."""
    tree = _with_base(path)
    if isinstance(tree.get("config"), str):  # what every campaign names, and no config has
        raise ConfigError(
            [
                f"{path} is a campaign: a plan for breaking runs of {path.parent / tree['config']}.\n"
                f"  `python -m trainer chaos {path}` carries it out; `train` takes a config."
            ]
        )
    problems: list[str] = []
    for override in overrides:
        problems += _override(tree, override)
    if problems:
        raise ConfigError(problems)
    return parse(tree)


def parse(tree: Mapping[str, Any]) -> Config:
    """Validate a tree of settings. Raises ConfigError with all problems at once."""
    try:
        config = Config.model_validate(_tuples(tree))
    except ValidationError as error:
        raise ConfigError([_explain(mistake) for mistake in tomlfile.mistakes(error, tree)]) from None
    problems = _contradictions(config) + _without_effect(config)
    if problems:
        raise ConfigError(problems)
    return config


def fingerprint(config: Config) -> str:
    """SHA-256 (hex) of the settings that decide the weights, and of nothing else."""
    return hashlib.sha256(json.dumps(mathematics(config), sort_keys=True).encode()).hexdigest()


def mathematics(config: Config) -> dict[str, Any]:
    """The settings that decide the weights, flat: {"optim.learning_rate": 0.001, ...}."""
    tree = config.model_dump(mode="json", include=set(MATHEMATICS))
    for section, names in NOT_MATHEMATICS.items():
        for name in names:
            del tree[section][name]
    return {key: value for key, value in flatten(tree).items() if key not in ADDED_LATER or value != ADDED_LATER[key]}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def as_toml(config: Config) -> str:
    """A config as a file that `load` reads back as the same; settings at their defaults are left out."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    faults = tree.pop("faults", [])
    tables = {name: tree.pop(name) for name in list(tree) if isinstance(tree[name], dict)}
    lines = tomlfile.lines(tree)
    for name, table in tables.items():
        lines += ["", f"[{name}]", *tomlfile.lines(table)]
    for fault in faults:
        lines += ["", "[[faults]]", *tomlfile.lines(fault)]
    return "\n".join(lines).lstrip() + "\n"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per setting that two flat trees disagree on."""
    missing = "(absent)"
    return [
        f"{key}: {json.dumps(old.get(key, missing))} → {json.dumps(new.get(key, missing))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
    ]


def check_world(config: Config, world_size: int) -> None:
    """Refuse a world that the config cannot use. Raises ConfigError."""
    problems: list[str] = []
    m = config.data.micro_batches
    if world_size > m:
        problems.append(
            f"data.micro_batches = {m} leaves {world_size - m} of {world_size} ranks without work.\n"
            f"  A micro-batch is the smallest unit of work. Start at most {m} ranks, or set data.micro_batches to "
            f"{world_size} or more."
        )
    shard = config.parallel.shard_ranks
    if config.parallel.strategy == "hybrid" and world_size % shard:
        problems.append(
            f"parallel.shard_ranks = {shard} does not divide the world of {world_size} ranks.\n"
            f"  A hybrid mesh is replicas × shards. Start a multiple of {shard} ranks, or change parallel.shard_ranks."
        )
    if problems:
        raise ConfigError(problems)


def _with_base(path: Path) -> dict[str, Any]:
    tree = tomlfile.read(path)
    base_name = tree.pop("extends", None)
    if base_name is None:
        return tree
    if not isinstance(base_name, str):
        raise ConfigError([f'{path}: extends = {base_name!r} is no path.\n  Write extends = "other.toml".'])
    base = tomlfile.read(path.parent / base_name)
    if "extends" in base:
        raise ConfigError(
            [
                f"{path} extends {base_name}, which extends {base['extends']}.\n"
                "  One level is allowed, so that a config can be read at a glance. "
                f"Extend {base['extends']} directly and repeat what {base_name} sets."
            ]
        )
    return _merge(base, tree)


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _override(tree: dict[str, Any], text: str) -> list[str]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        return [f"--set {text!r} has no value.\n  Write --set key=value, e.g. --set optim.learning_rate=3e-4."]
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = _bare_text(key, value.strip())
    if parsed is None:
        quoted = f"'{key}=\"{value.strip()}\"'"
        return [f"--set {text}: the right side is not TOML.\n  Text needs quotes that the shell keeps: --set {quoted}."]
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            return [f"--set {text}: {section} is a value, not a section."]
    node[name] = parsed
    return []


def _bare_text(key: str, value: str) -> str | None:
    """`value` where the setting takes text and nothing else: a shell eats the quotes of strategy="fsdp"."""
    if not value or value[0] in "\"'":  # an unset variable of the shell, a quote that is never closed
        return None
    kind: Any = Config
    for name in key.split("."):
        field = getattr(kind, "model_fields", {}).get(name)
        kind = field.annotation if field else next(iter(get_args(kind)[1:]), None)  # of dict[str, str]: str
    return value if kind is str or get_origin(kind) is Literal else None


def _tuples(value: Any) -> Any:
    """TOML arrays as tuples: strict models take no lists for them."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _explain(mistake: tomlfile.Mistake) -> str:
    """As fact, rule and remedy."""
    path, given = mistake.where, json.dumps(mistake.input, default=str)
    match mistake.type:
        case "extra_forbidden":
            return f"{path} is no setting.{_nearest(path)}"
        case "missing":  # a fault's kind: all else has a default
            owner = replace(mistake, place=mistake.place[:-1]).where
            return f"{owner} has no {mistake.place[-1]}.\n  {A_FAULT}"
        case "model_type" | "tuple_type" if path.startswith("faults"):
            return f"{path} = {given} is no {'fault' if '[' in path else 'list of faults'}.\n  {A_FAULT}"
        case "model_type":
            inside = ", ".join(key for key in known_keys() if key.startswith(f"{path}."))
            return f"{path} = {given} is a value, but {path} is a section.\n  Set what is in it: {inside}."
        case "tuple_type":
            return f"{path} = {given} is no list.\n  Put it in brackets: {path} = [{given}]."
        case _:
            return str(mistake)


def known_keys() -> list[str]:
    """Every setting's full name."""
    return list(flatten(Config().model_dump()))


def _nearest(path: str) -> str:
    sections = set(Config.model_fields)
    known = known_keys() + sorted(sections)
    same_name = [key for key in known if key.split(".")[-1] == path.rsplit(".", maxsplit=1)[-1]]
    near = same_name or difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else f" The sections are {', '.join(sorted(sections))}."


def _contradictions(config: Config) -> list[str]:
    m, o, problems = config.model, config.optim, []
    if m.width % m.n_heads:
        problems.append(
            f"model.n_heads = {m.n_heads} does not divide model.width = {m.width}.\n"
            "  Every head takes an equal part of the width. Change one so that it divides."
        )
    elif m.positions == "rope" and (m.width // m.n_heads) % 2:
        problems.append(
            f'model.positions = "rope" rotates pairs, but a head is {m.width // m.n_heads} wide.\n'
            "  model.width / model.n_heads must be even."
        )
    if m.n_kv_heads and m.n_heads % m.n_kv_heads:
        problems.append(
            f"model.n_kv_heads = {m.n_kv_heads} does not divide model.n_heads = {m.n_heads}.\n"
            "  Each key/value head serves an equal group of query heads."
        )
    if o.optimizer == "muon" and config.parallel.strategy != "replicate":
        problems.append(
            f'optim.optimizer = "muon" cannot run with parallel.strategy = "{config.parallel.strategy}".\n'
            '  Muon orthogonalises whole matrices and shards hold rows. Use strategy "replicate", or "adamw".'
        )
    if o.warmup_steps > config.budget.steps:
        problems.append(
            f"optim.warmup_steps = {o.warmup_steps} is longer than budget.steps = {config.budget.steps}.\n"
            "  The rate would never reach its peak. Shorten the warmup."
        )
    if config.data.source.startswith("hub:") and not _is_commit(config.data.revision):
        problems.append(
            f"data.revision = {config.data.revision!r} does not pin {config.data.source}.\n"
            "  A branch moves, and the run with it. Give the dataset's commit: 40 hex digits."
        )
    for name in config.eval.sets:
        if name not in ("val", "repo") and name not in config.eval.sources:
            problems.append(
                f'eval.sets names {name!r}, which is neither "val" nor "repo" nor in eval.sources.\n'
                f"  Add it: --set 'eval.sources.{name}=\"PATH\"'."
            )
    for name in sorted({"val", "repo"} & config.eval.sources.keys()):
        problems.append(f"eval.sources.{name} would hide the built-in set of that name.\n  Give it another name.")
    if len(set(config.eval.sets)) < len(config.eval.sets):
        problems.append(f"eval.sets = {list(config.eval.sets)} names a set twice.")
    return problems


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and all(digit in "0123456789abcdef" for digit in revision)


def _without_effect(config: Config) -> list[str]:
    """Settings that were changed from their default but that another setting makes meaningless."""
    c, hub = config, config.data.source.startswith("hub:")
    table = hub or config.data.source.endswith((".jsonl", ".parquet"))
    sums = c.numerics.exact and c.data.micro_batches > 1
    needs = [
        ("data.revision", hub, 'data.source = "hub:…"'),
        ("data.subset", hub, 'data.source = "hub:…"'),
        ("data.hub_split", hub, 'data.source = "hub:…"'),
        ("data.streaming", hub, 'data.source = "hub:…"'),
        ("data.text_column", table, "a jsonl, parquet or hub source"),
        ("data.unit", not table, "a source of plain text files"),
        ("data.vocab_size", c.data.tokenizer == "bpe", 'data.tokenizer = "bpe"'),
        ("model.rope_base", c.model.positions == "rope", 'model.positions = "rope"'),
        ("optim.muon_learning_rate", c.optim.optimizer == "muon", 'optim.optimizer = "muon"'),
        ("optim.muon_momentum", c.optim.optimizer == "muon", 'optim.optimizer = "muon"'),
        ("optim.decay_fraction", c.optim.schedule == "wsd", 'optim.schedule = "wsd"'),
        ("optim.final_fraction", c.optim.schedule != "constant", "a schedule that decays"),
        ("parallel.shard_ranks", c.parallel.strategy == "hybrid", 'parallel.strategy = "hybrid"'),
        ("parallel.reshard_after_forward", c.parallel.strategy != "replicate", 'parallel.strategy "fsdp" or "hybrid"'),
        ("numerics.headroom_bits", sums, "numerics.exact = true and several micro-batches"),
    ]
    changed = differences(flatten(Config().model_dump()), flatten(config.model_dump()))
    changed_keys = {line.split(":", 1)[0] for line in changed}
    problems = [
        f"{key} has no effect here: it needs {condition}.\n  Remove it, or change the other setting."
        for key, has_effect, condition in needs
        if key in changed_keys and not has_effect
    ]
    unused = sorted(set(config.eval.sources) - set(config.eval.sets))
    return problems + [f"eval.sources.{name} has no effect: eval.sets does not name {name!r}." for name in unused]
