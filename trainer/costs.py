"""Costs of a config, known without training it: parameters, FLOPs, memory.

Models are built on the meta device or with fake tensors, which hold no numbers. Torch is imported only by the functions
that build one.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

from trainer.config import Config, Model
from trainer.data.tokenizer import ByteTokenizer, Tokenizer
from trainer.errors import ConfigError, TokenizerError
from trainer.log import rundir

if TYPE_CHECKING:
    from torch import Tensor, nn

ASSUMED_CHARACTERS = 100  # of a text in one alphabet, with digits and signs; Shakespeare has 65
FLOAT32_BYTES = 4


class ParameterCount(NamedTuple):
    total: int
    non_embedding: int
    """Excludes look-up tables: tokens, positions, bigrams, values. Includes an untied head, but not a tied one."""


def parameter_count(model: "nn.Module") -> ParameterCount:
    """Number of parameters of the full model, sharded or not."""
    from trainer.model import TABLES, role_of_parameters

    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    tables = sum(sizes[name] for name, role in role_of_parameters(model).items() if role in TABLES)
    return ParameterCount(sum(sizes.values()), sum(sizes.values()) - tables)


def flops_per_token(model: Model, vocab_size: int) -> int:
    """Training FLOPs per token: 3 × the forward pass, multiply and add counted apart.

    Matrices: 2 per weight, the head included (Kaplan et al. 2020, with the correction of Porian et al. 2024).
    Attention: 4·T·H·C per layer for scores and mixing over all T positions, as if not causal (Chowdhery et al. 2022,
    PaLM, appendix B), though kernels skip the masked half. Look-ups, norms and activations are not counted.
    A model of one's own is run, and torch counts its matrix products, convolutions and attention.
    """
    if model.class_:
        return 3 * _counted_flops(model, vocab_size) // model.context
    d, f = model.width, model.mlp_width
    heads = model.n_heads * model.head_channels
    qkv = d * (heads + 2 * model.kv_heads * model.head_channels)
    mlp = (3 if model.mlp == "swiglu" else 2) * d * f
    weights = model.n_layers * (qkv + d * heads + mlp) + d * vocab_size
    return 3 * (2 * weights + model.n_layers * 4 * model.context * heads)


def teaching_flops(config: Config, vocab_size: int) -> int:
    """FLOPs per token of the forward passes of the runs that [distil] names. Raises RunDirectoryError."""
    # A teacher reads this run's sequences, however long its own were.
    read = {"context": config.model.context}
    models = [rundir.config_of(Path(run)).model.model_copy(update=read) for run in config.distil.runs]
    return sum(flops_per_token(model, vocab_size) // 3 for model in models)


def _counted_flops(settings: Model, vocab_size: int) -> int:
    """FLOPs of the forward pass over one sequence, as torch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from trainer import model, own_code, own_import

    def count(device: str) -> int:
        own = model.construct(settings, vocab_size, device)
        if device == "cpu":
            model.initialise(own, settings, 0)
        tokens_BT = torch.zeros(1, settings.context, dtype=torch.int64, device=device)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            own(tokens_BT, tokens_BT)
        return counter.get_total_flops()

    try:
        return count("meta")
    except ConfigError:
        raise
    except Exception:  # its control flow depends on numbers, which that device does not have
        try:
            return count("cpu")
        except Exception as error:
            raise own_import.failure(own_code.find(settings.class_), "cannot compute a micro-batch", error) from error


def padded_vocab(tokenizer_size: int, vocab_size: int) -> int:
    """Rows of the embedding table: `vocab_size` (model.vocab_size) if set, else the next multiple of 64.

    Raises TokenizerError if the tokenizer has more tokens than rows.
    """
    if not vocab_size:
        return -(-tokenizer_size // 64) * 64
    if vocab_size < tokenizer_size:
        raise TokenizerError(
            f"model.vocab_size = {vocab_size} is smaller than the tokenizer's {tokenizer_size} tokens.\n"
            "  Every token needs a row in the embedding table. "
            f"Set model.vocab_size to {tokenizer_size} or more, or to 0 for the next multiple of 64."
        )
    return vocab_size


def memory_per_rank(config: Config, vocab_size: int, world_size: int) -> dict[str, int]:
    """Bytes on the rank that holds most, by purpose and in "total"; nothing is allocated.

    "gathered" are the full weights in use under FSDP. "activations" is what autograd keeps of one micro-batch with the
    operators of `kind_of_device`, an estimate: temporaries come on top.
    """
    from trainer import model, optim

    meta = model.construct(config.model, vocab_size, "meta")
    shards = {"replicate": 1, "fsdp": world_size, "hybrid": config.parallel.shard_ranks}[config.parallel.strategy]
    # Rows are dealt out in equal chunks, so the first rank holds the rounded-up share of every parameter.
    held = {name: FLOAT32_BYTES * -(-p.shape[0] // shards) * p[0].numel() for name, p in meta.named_parameters()}
    weights = sum(held.values())
    # Muon keeps one moment of each hidden matrix, AdamW two of everything.
    groups = optim.group_of_parameters(meta)
    muon = sum(held[name] for name, group in groups.items() if group == "hidden") * (config.optim.optimizer == "muon")
    # Full weights in use at a time: all, or those of the root and two blocks (one computes, the next gathers).
    blocks = sorted(FLOAT32_BYTES * parameter_count(block).total for block in model.blocks_of(meta))
    freed = sum(blocks[:-2]) if config.parallel.reshard_after_forward else 0
    gathered = FLOAT32_BYTES * parameter_count(meta).total - freed
    try:
        activations = _activation_bytes(config, vocab_size)
    except Exception:
        if not config.model.class_:
            raise
        activations = _activation_bytes(config, vocab_size, fake=False)  # its control flow depends on numbers
    scattered_once = shards > 1 and config.parallel.scatter_gradients == "step"
    parts = {
        "master_weights": weights,
        "gradients": weights + FLOAT32_BYTES * parameter_count(meta).total * scattered_once,
        "optimizer": 2 * weights - muon,
        "gathered": gathered if shards > 1 else 0,
        "activations": activations,
    }
    if config.distil.runs:
        parts["teachers"] = sum(FLOAT32_BYTES * rundir.fact(Path(run), "parameters") for run in config.distil.runs)
    if config.islands.count:
        parts |= _islands_bytes(config, parts, world_size)
    return parts | {"total": sum(parts.values())}


def _islands_bytes(config: Config, one: dict[str, int], world_size: int) -> dict[str, int]:
    """Bytes of the cluster with most islands: `one` for each of them, and the outer weights."""
    weights, islands = one["master_weights"], config.islands
    most = -(-islands.count // max(1, world_size // config.parallel.island_ranks))
    return {
        "master_weights": weights * (most + 1),
        "gradients": weights * (most + 1),
        "optimizer": one["optimizer"] * most + weights * (islands.outer_momentum > 0),
        "residuals": weights * most * (islands.quantise != "none"),
    }


def kind_of_device(config: Config) -> str:
    """ "cuda" or "cpu": what a run of this config computes with where each rank has a GPU, if this machine has any."""
    import torch

    if config.parallel.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.parallel.device


def _activation_bytes(config: Config, vocab_size: int, fake: bool = True) -> int:
    """Bytes that autograd keeps for the backward pass of one micro-batch, counted in a forward pass.

    With `fake` it is one without data.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from trainer import model

    kept: dict[int, int] = {}
    bf16 = config.numerics.precision == "bf16"
    # A GPU's compiled head keeps its logits as they are computed, and loss and gradient read them as float32.
    halves_logits = bf16 and config.numerics.compile and not config.model.class_ and kind_of_device(config) == "cuda"
    # torch without CUDA cannot trace on "cuda". Fused attention keeps the same on a CPU: q, k, v, output, log-sums.
    with model.traced_as(kind_of_device(config)), FakeTensorMode() if fake else contextlib.nullcontext():
        made = model.construct(config.model, vocab_size, recompute=config.parallel.activation_checkpointing)
        weights = {p.untyped_storage()._cdata for p in made.parameters()}
        tokens_BT = torch.zeros(config.data.micro_batch_sequences, config.model.context, dtype=torch.int64)

        def note(tensor: "Tensor") -> "Tensor":
            # Several views of one storage may be saved: it is counted once, and weights not at all.
            storage = tensor.untyped_storage()
            kept[storage._cdata] = 0 if storage._cdata in weights else storage.nbytes()
            if halves_logits and tensor.shape[-1:] == (vocab_size,) and tensor.dtype is torch.float32:
                kept[storage._cdata] //= 2
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16, bf16):
            made(tokens_BT, tokens_BT)
    return sum(kept.values())


def show(config: Config, ranks: int) -> None:
    """Print parameters, FLOPs per token, tokens and memory per rank of `config` on `ranks` ranks."""
    from trainer import model

    tokens, source = vocabulary(config)
    rows = padded_vocab(tokens, config.model.vocab_size)
    counts = parameter_count(model.construct(config.model, rows, "meta"))
    flops = flops_per_token(config.model, rows) + teaching_flops(config, rows)
    step_tokens = config.data.micro_batches * config.data.micro_batch_sequences * config.model.context
    total_tokens = step_tokens * config.budget.steps
    table = Table(title="dry run: nothing is trained", show_header=False, box=None, title_justify="left")
    table.add_row("parameters", f"{counts.total:,} ({counts.non_embedding:,} without embeddings)")
    table.add_row("FLOPs per token", f"{flops:,} (forward and backward)")
    table.add_row("tokens per step", f"{step_tokens:,} in {config.data.micro_batches} micro-batches")
    table.add_row("tokens in all", f"{total_tokens:,} ({total_tokens / counts.total:.1f} per parameter)")
    table.add_row("FLOPs in all", f"{flops * total_tokens:.3g}")
    for name, size in memory_per_rank(config, rows, ranks).items():
        size_and_ranks = (
            f"{size / 2**20:,.1f} MiB ({config.parallel.strategy}, {ranks} ranks, {kind_of_device(config)})"
        )
        table.add_row(f"memory per rank, {name}", size_and_ranks)
    table.add_row("vocabulary", f"{rows:,} rows for {tokens:,} tokens ({source})")
    Console().print(table)


def vocabulary(config: Config) -> tuple[int, str]:
    """Number of tokens that the run's tokenizer will have, and the source of that number: the text is not read.

    Raises TokenizerError if data.tokenizer is a file that is no tokenizer.
    """
    match config.data.tokenizer:
        case "bytes":
            return ByteTokenizer.vocab_size, "bytes"
        case "bpe":
            return config.data.vocab_size, "fewer where the text has no more pairs to merge"
        case "chars":
            return ASSUMED_CHARACTERS, "assumed: the text decides"
        case path:
            return Tokenizer.load(Path(path)).vocab_size, path
