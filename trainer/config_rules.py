"""Rules that no single setting can check: contradictions, settings without effect, and what a wrong tree means."""

import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from trainer import own_code, tomlfile
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config import Config

HF = "hf:"
"""Before the name of a folder of transformers, in init_from."""
FLOAT32_BITS = 24  # of the significand
MIN_BITS_KEPT = 4
MOST_PARTS = 10_000
"""Longest cycle in which the sources of a mixture take turns."""
TABLES = ("jsonl", "parquet")
HUB_TOKENIZER = re.compile(r"hub:([\w.-]+/)?[\w.-]+@[0-9a-f]{40}")
A_FAULT = 'Write [[faults]], and below it its settings: kind = "sigkill", rank = 1, at_step = 9.'


def contradictions(config: "Config") -> list[str]:
    """Return a problem for each rule between settings that `config` breaks."""
    m, o, data, held_out = config.model, config.optim, config.data, config.eval
    strategy = config.parallel.strategy
    is_gpt = not m.class_  # a class of one's own need not have heads
    heads_fit = m.head_width > 0 or m.width % m.n_heads == 0
    bits_kept = FLOAT32_BITS - (data.micro_batches - 1).bit_length() - config.numerics.headroom_bits
    is_pinned = len(data.revision) == 40 and set(data.revision) <= set("0123456789abcdef")
    rules = [
        (
            is_gpt and not heads_fit,
            f"model.n_heads = {m.n_heads} does not divide model.width = {m.width}.\n"
            "  Every head takes an equal part of the width. Change one so that it divides.",
        ),
        (
            is_gpt and heads_fit and m.positions == "rope" and m.head_channels % 2,
            f'model.positions = "rope" rotates pairs, but a head is {m.head_channels} wide.\n'
            f"  {'model.head_width' if m.head_width else 'model.width / model.n_heads'} must be even.",
        ),
        (
            is_gpt and heads_fit and m.rotated_share < 1 and (m.rotated_channels % 2 or m.rotated_channels == 0),
            f"model.rotated_share = {m.rotated_share} of a head's {m.head_channels} channels is {m.rotated_channels}.\n"
            "  Rotations turn pairs. Choose a share that gives an even number of channels, 2 or more.",
        ),
        (
            is_gpt and m.n_kv_heads and m.n_heads % m.n_kv_heads,
            f"model.n_kv_heads = {m.n_kv_heads} does not divide model.n_heads = {m.n_heads}.\n"
            "  Each key/value head serves an equal group of query heads.",
        ),
        (
            o.optimizer == "muon" and strategy != "replicate",
            f'optim.optimizer = "muon" cannot run with parallel.strategy = "{strategy}".\n'
            '  Muon orthogonalises whole matrices and shards hold rows. Use strategy "replicate", or "adamw".',
        ),
        (
            config.numerics.exact and bits_kept < MIN_BITS_KEPT,
            f"data.micro_batches = {data.micro_batches} leave {bits_kept} bits of each gradient entry, with "
            f"numerics.headroom_bits = {config.numerics.headroom_bits}.\n"
            f"  Exact sums keep {FLOAT32_BITS} − log2(micro_batches) − headroom_bits bits, and {MIN_BITS_KEPT} are "
            "needed. Raise data.micro_batch_sequences instead.",
        ),
        (
            o.warmup_steps > config.budget.steps,
            f"optim.warmup_steps = {o.warmup_steps} is longer than budget.steps = {config.budget.steps}.\n"
            "  The rate would never reach its peak. Shorten the warmup.",
        ),
        (
            o.schedule != "constant" and o.warmup_steps == config.budget.steps > 1,
            f'optim.warmup_steps = {o.warmup_steps} leaves optim.schedule = "{o.schedule}" no step to decay in.\n'
            '  A decay ends at the last step. Shorten the warmup by a step or more, or use schedule "constant".',
        ),
        (
            o.weight_decay_schedule == "constant" and o.schedule != "constant" and not o.final_fraction,
            'optim.weight_decay_schedule = "constant" needs a rate above 0 in every step; optim.final_fraction is 0.\n'
            '  Decay is applied with the update. Set optim.final_fraction above 0, or use "rate".',
        ),
        (
            0 < data.unique_tokens < m.context,
            f"data.unique_tokens = {data.unique_tokens} is less than one sequence: model.context = {m.context}.\n"
            "  Whole sequences are read. Give a multiple of model.context, or 0 for all of the text.",
        ),
        (
            data.source.startswith("hub:") and not is_pinned,
            f"data.revision = {data.revision!r} does not pin {data.source}.\n"
            "  A branch moves, and the run with it. Give the dataset's commit: 40 hex digits.",
        ),
        (
            data.tokenizer.startswith("hub:") and not HUB_TOKENIZER.fullmatch(data.tokenizer),
            f"data.tokenizer = {data.tokenizer!r} does not pin a commit.\n"
            "  A branch moves, and the token ids with it. Write hub:OWNER/NAME@COMMIT (40 hex digits).",
        ),
        *(
            (
                name not in ("val", "repo") and name not in held_out.sources,
                f'eval.sets names {name!r}, which is neither "val" nor "repo" nor in eval.sources.\n'
                f"  Add it: --set 'eval.sources.{name}=\"PATH\"'.",
            )
            for name in held_out.sets
        ),
        *(
            (
                name in held_out.sources,
                f"eval.sources.{name} would hide the built-in set of that name.\n  Give it another name.",
            )
            for name in ("repo", "val")
        ),
        (
            len(set(held_out.sets)) < len(held_out.sets),
            f"eval.sets = {list(held_out.sets)} names a set twice.\n  Name each set once.",
        ),
    ]
    broken = [problem for is_broken, problem in rules if is_broken]
    return [
        *broken,
        *_mixture_problems(config), *_of_own_code(config), *_sentinel_problems(config), *_init_problems(config),
        *_islands_problems(config), *_distil_problems(config),
    ]  # fmt: skip


def weights_of_mixture(config: "Config") -> list[Fraction]:
    """The weights of data.mixture, exactly as they are written."""
    return [Fraction(str(source.weight)) for source in config.data.mixture]


def _mixture_problems(config: "Config") -> list[str]:
    mixture, problems = config.data.mixture, list[str]()
    if not mixture:
        return []
    names = [source.name for source in mixture]
    for number, source in enumerate(mixture):
        where = f"data.mixture[{number}]"
        if not source.name.strip() or "/" in source.name or names.count(source.name) > 1:
            problems.append(
                f"{where}.name = {source.name!r} is no name of its own.\n  Give each source one, without /."
            )
        if not source.source:
            problems.append(f"{where} has no source.\n  Name its text: a path, a glob, a hub dataset.")
        elif own_code.is_own_source(source.source):
            problems.append(f"{where}.source is a function of your own.\n  A mixture reads files and hub datasets.")
        if not source.weight:
            problems.append(f"{where}.weight is 0, so it is never read.\n  Give a weight, or leave it out.")
    weights = weights_of_mixture(config)
    if sum(weights) != 1:
        problems.append(
            f"the weights of data.mixture sum to {float(sum(weights)):.10g}.\n"
            "  They are shares of the sequences. Change them so that they sum to 1 exactly."
        )
    elif math.lcm(*(weight.denominator for weight in weights)) > MOST_PARTS:
        problems.append(
            f"the weights of data.mixture are finer than 1/{MOST_PARTS:,}.\n"
            "  Sources take turns in a cycle of that length. Write weights with four decimals or fewer."
        )
    if config.data.unique_tokens:
        problems.append(
            "data.unique_tokens has no effect with data.mixture.\n  Limit each source by its max_megabytes and epochs."
        )
    if config.data.source != type(config.data)().source or config.data.max_megabytes:
        problems.append(
            "data.source and data.max_megabytes have no effect with data.mixture.\n  Give each source its own."
        )
    return problems


def own_names(config: "Config") -> dict[str, str]:
    """Return {setting: name} of the user's own code that decides the weights."""
    source = config.data.source if own_code.is_own_source(config.data.source) else ""
    named = {"model.class": config.model.class_, "optim.class": config.optim.class_, "data.source": source}
    return {setting: name for setting, name in named.items() if name}


def _of_own_code(config: "Config") -> list[str]:
    problems: list[str] = []
    held_out = [("data.source", source) for source in config.eval.sources.values() if own_code.is_own_source(source)]
    for setting, name in [*own_names(config).items(), *held_out]:
        try:
            own_code.digests(name, setting)
        except ConfigError as error:
            problems += error.problems
    return problems


def weights_of(config: "Config") -> list[Path]:
    """The files of weights that `init_from` names, sorted."""
    return sorted(Path(config.init_from.removeprefix(HF)).glob("*.safetensors"))


def _init_problems(config: "Config") -> list[str]:
    if not config.init_from:
        return []
    if not config.init_from.startswith(HF):
        return [
            f'init_from = "{config.init_from}" is no place of weights.\n  Write "hf:DIR", a folder of transformers.'
        ]
    if config.model.class_:
        return ["init_from fills the built-in GPT, and model.class is another.\n  Leave one of them out."]
    if not weights_of(config):
        return [f'init_from = "{config.init_from}": there are no *.safetensors.\n  Name a folder that has them.']
    return []


def _islands_problems(config: "Config") -> list[str]:
    islands, m, steps = config.islands, config.data.micro_batches, config.budget.steps
    if not islands.count:
        return []
    h = islands.inner_steps
    rules = [
        (
            m % islands.count,
            f"islands.count = {islands.count} does not divide data.micro_batches = {m}.\n"
            "  Every island takes an equal part of a step's micro-batches. Change one so that it divides.",
        ),
        (
            config.parallel.island_ranks > m // islands.count > 0,
            f"parallel.island_ranks = {config.parallel.island_ranks} leaves ranks without work: an island has "
            f"{m // islands.count} micro-batches in a step.\n  Set parallel.island_ranks to at most that.",
        ),
        (
            h > steps,
            f"islands.inner_steps = {h} is longer than budget.steps = {steps}.\n"
            "  The islands would exchange nothing before the end. Set fewer inner steps.",
        ),
        (
            islands.overlap_steps >= h,
            f"islands.overlap_steps = {islands.overlap_steps} is not below islands.inner_steps = {h}.\n"
            "  An exchange must have arrived before the next one of the same weights. Set a smaller overlap.",
        ),
        (
            islands.fragments > h,
            f"islands.fragments = {islands.fragments} exceeds islands.inner_steps = {h}.\n"
            "  Each fragment is exchanged once in so many steps, at a step of its own. Set fewer fragments.",
        ),
        (
            not config.numerics.exact,
            "[islands] needs numerics.exact = true: who computes an island must not change it.\n"
            "  Set it, or leave [islands] out.",
        ),
        (
            config.parallel.strategy != "replicate",
            f'[islands] cannot run with parallel.strategy = "{config.parallel.strategy}".\n'
            '  A rank computes whole islands, and shards lie on several. Set parallel.strategy = "replicate".',
        ),
        (
            config.sentinel != type(config.sentinel)(),
            "[sentinel] does not know islands: it holds the ranks' weights against each other, and those of islands "
            "differ.\n  Leave one of them out.",
        ),
        (
            config.optim.class_,
            "optim.class keeps its state to itself, and an island's state must be saved with the others.\n"
            "  Use an optimizer of toprope's with [islands].",
        ),
    ]
    return [problem for is_broken, problem in rules if is_broken]


def _distil_problems(config: "Config") -> list[str]:
    distil = config.distil
    if not distil.runs and not distil.weights_sha256:
        return []
    rules = [
        (
            len(distil.runs) != len(distil.weights_sha256),
            f"[distil] names {len(distil.runs)} runs and {len(distil.weights_sha256)} digests in weights_sha256.\n"
            "  A directory may change, and the run must not. Give the weights_sha256 that `inspect` shows of each run.",
        ),
        *(
            (
                len(digest) != 64 or not set(digest) <= set("0123456789abcdef"),
                f"distil.weights_sha256 has {digest!r}, which is no digest: 64 hex digits.\n"
                "  Copy the weights_sha256 that `inspect` shows of the run.",
            )
            for digest in distil.weights_sha256
        ),
        (
            len(set(distil.weights_sha256)) < len(distil.weights_sha256),
            "distil.weights_sha256 names the same weights twice.\n  Name each teacher once.",
        ),
        (
            config.model.class_,
            "[distil] needs the built-in GPT, and model.class is another.\n"
            "  Its loss takes no probabilities for a target. Leave one of them out.",
        ),
        (
            config.islands.count,
            "[distil] does not know islands: each would need the teachers.\n  Leave one of them out.",
        ),
        (
            config.parallel.cuda_graphs,
            "parallel.cuda_graphs captures the model without the teachers of [distil].\n  Leave one of them out.",
        ),
    ]
    return [problem for is_broken, problem in rules if is_broken]


def _sentinel_problems(config: "Config") -> list[str]:
    sentinel = config.sentinel
    try:
        share = Fraction(sentinel.audit)
    except (ValueError, ZeroDivisionError):
        share = Fraction(-1)
    if not 0 <= share <= 1:
        return [f'sentinel.audit = {sentinel.audit!r} is no share of the micro-batches.\n  Write "1/32", or "0".']
    usual = type(sentinel)()
    if not sentinel.on:
        return [
            f"sentinel.{name} has no effect: no check of [sentinel] is on.\n"
            "  Set sentinel.audit or sentinel.state_hash_every_steps, or remove it."
            for name in ("act", "quarantine_within")
            if getattr(sentinel, name) != getattr(usual, name)
        ]
    if sentinel.act != "repair" and sentinel.quarantine_within != usual.quarantine_within:
        return [
            f"sentinel.quarantine_within has no effect with sentinel.act = {sentinel.act!r}: no rank is repaired, so "
            'none is counted.\n  Set sentinel.act = "repair", or remove it.'
        ]
    if not config.numerics.exact:
        return [
            "[sentinel] needs numerics.exact = true: without exact sums ranks may differ though none is wrong.\n"
            "  Set it, or leave [sentinel] out."
        ]
    return []


def without_effect(config: "Config") -> list[str]:
    """Return a problem for each setting that differs from its default but that another setting makes meaningless."""
    c, hub = config, config.data.source.startswith("hub:")
    sources = [config.data.source, *config.eval.sources.values(), *(part.source for part in config.data.mixture)]
    tables, plain = any(map(_may_be_tables, sources)), any(map(_may_be_text, sources))
    sums = c.numerics.exact and c.data.micro_batches > max(1, c.islands.count)
    bf16 = c.numerics.precision == "bf16"
    needs = [
        *((f"data.{name}", hub, 'data.source = "hub:…"') for name in ("revision", "subset", "hub_split", "streaming")),
        ("data.text_column", tables, "a jsonl, parquet or hub source"),
        ("data.unit", plain, "a source of plain text files"),
        ("data.decontaminate", c.eval.sets, "a held-out set in eval.sets"),
        ("data.vocab_size", c.data.tokenizer == "bpe", 'data.tokenizer = "bpe"'),
        ("model.options", c.model.class_, "model.class"),
        ("model.loss_chunk_tokens", not c.model.class_, "the built-in GPT, not model.class"),
        *(
            (f"model.{name}", bf16 and not c.model.class_, 'numerics.precision = "bf16" and the built-in GPT')
            for name in ("bf16_residual", "fp8_head")
        ),
        ("optim.options", c.optim.class_, "optim.class"),
        *(
            (f"optim.{name}", not c.optim.class_, "an optimizer of toprope's, not optim.class")
            for name in ("optimizer", "beta1", "beta2", "eps")
        ),
        ("optim.weight_decay_schedule", c.optim.weight_decay, "optim.weight_decay above 0"),
        ("model.norm_gain", c.model.norm == "rmsnorm" or c.model.qk_norm, 'model.norm = "rmsnorm" or model.qk_norm'),
        *(
            (f"model.{name}", c.model.positions == "rope", 'model.positions = "rope"')
            for name in ("rope_base", "rope_scaling", "rotated_share")
        ),
        ("model.rope_factor", c.model.rope_scaling != "none", 'model.rope_scaling "linear" or "llama3"'),
        ("model.rope_original_context", c.model.rope_scaling == "llama3", 'model.rope_scaling = "llama3"'),
        ("model.qkv_biases", not c.model.biases, "model.biases = false: with it all projections have biases"),
        ("optim.muon_learning_rate", c.optim.optimizer == "muon", 'optim.optimizer = "muon"'),
        ("optim.muon_momentum", c.optim.optimizer == "muon", 'optim.optimizer = "muon"'),
        ("optim.decay_fraction", c.optim.schedule == "wsd", 'optim.schedule = "wsd"'),
        ("optim.final_fraction", c.optim.schedule != "constant", "a schedule that decays"),
        ("parallel.island_ranks", c.islands.count, "islands.count"),
        ("elastic.takeover_seconds", c.islands.count, "islands.count"),
        ("parallel.shard_ranks", c.parallel.strategy == "hybrid", 'parallel.strategy = "hybrid"'),
        ("parallel.reshard_after_forward", c.parallel.strategy != "replicate", 'parallel.strategy "fsdp" or "hybrid"'),
        ("parallel.scatter_gradients", c.parallel.strategy != "replicate", 'parallel.strategy "fsdp" or "hybrid"'),
        ("parallel.share_gpus", c.parallel.device != "cpu", 'parallel.device "auto" or "cuda"'),
        (
            "parallel.cuda_graphs",
            not c.parallel.cuda_graphs  # else a share that cannot be read would be read here
            or (
                c.parallel.device != "cpu"
                and c.parallel.strategy == "replicate"
                and not (c.model.dropout or c.sentinel.on or c.islands.count)
            ),
            'a GPU, parallel.strategy = "replicate", model.dropout = 0, no [islands], no sentinel',
        ),
        (
            "numerics.tf32",
            c.numerics.precision == "fp32" and c.parallel.device != "cpu",
            'numerics.precision = "fp32" and a GPU',
        ),
        *(
            (f"islands.{name}", c.islands.count, "islands.count")
            for name in type(c.islands).model_fields
            if name != "count"
        ),
        ("distil.weight", c.distil.runs, "distil.runs"),
        ("numerics.headroom_bits", sums, "numerics.exact = true and several micro-batches"),
    ]
    problems = []
    for key, has_effect, condition in needs:
        section_name, name = key.split(".")
        section = getattr(c, section_name)
        if not has_effect and getattr(section, name) != type(section).model_fields[name].default:
            remedy = "Remove it, or change the other setting."
            problems.append(f"{key} has no effect here: it needs {condition}.\n  {remedy}")
    unused = sorted(set(config.eval.sources) - set(config.eval.sets))
    return problems + [
        f"eval.sources.{name} has no effect: eval.sets does not name {name!r}.\n  Add it there, or remove it."
        for name in unused
    ]


def _may_be_tables(source: str) -> bool:
    """True if a source may hold rows with columns: a hub dataset, or files whose names may end as those of tables."""
    if source.startswith("hub:"):
        return True
    ending = PurePath(source).name.rpartition(".")[2].lower()
    return source not in ("python-stdlib", "repo") and (ending in TABLES or any(c in ending for c in "*?["))


def _may_be_text(source: str) -> bool:
    if own_code.is_own_source(source):
        return False
    return not source.startswith("hub:") and PurePath(source).suffix.lower().removeprefix(".") not in TABLES


def explain(mistake: tomlfile.Mistake, known: Sequence[str]) -> str:
    """Return a wrong place of the tree as fact, rule and remedy. `known` has every setting's full name."""
    path, given = mistake.where, json.dumps(mistake.input, default=str)
    match mistake.type:
        case "extra_forbidden":
            return f"{path} is no setting.\n  {_nearest(path, known)}"
        case "missing":  # a fault's kind: everything else has a default
            owner = replace(mistake, place=mistake.place[:-1]).where
            return f"{owner} has no {mistake.place[-1]}.\n  {A_FAULT}"
        case "model_type" | "tuple_type" if path.startswith("faults"):
            return f"{path} = {given} is no {'fault' if '[' in path else 'list of faults'}.\n  {A_FAULT}"
        case "model_type":
            inside = ", ".join(key for key in known if key.startswith(f"{path}."))
            return f"{path} = {given} is a value, but {path} is a section.\n  Set what is in it: {inside}."
        case "tuple_type":
            return f"{path} = {given} is no list.\n  Put it in brackets: {path} = [{given}]."
        case _:
            return str(mistake)


def _nearest(path: str, known: Sequence[str]) -> str:
    sections = sorted({key.split(".")[0] for key in known})
    # The right name in the wrong section first, then what is spelled alike.
    same_name = [key for key in [*known, *sections] if key.split(".")[-1] == path.rsplit(".", maxsplit=1)[-1]]
    near = same_name or difflib.get_close_matches(path, [*known, *sections], n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else f"The sections are {', '.join(sections)}."
