"""What a config would cost, without training it: the model is built on the meta device, which holds no numbers."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from trainer import model as models
from trainer.config import Config
from trainer.data.tokenizer import ByteTokenizer, Tokenizer

ASSUMED_CHARACTERS = 100  # of a text in one alphabet, with digits and signs; Shakespeare has 65


def show(config: Config, ranks: int) -> None:
    """Print parameters, FLOPs per token, tokens and memory per rank of `config` on `ranks` ranks."""
    tokens, whence = vocabulary(config)
    rows = models.padded_vocab(tokens, config.model.vocab_size)
    table = Table(title="dry run: nothing is trained", show_header=False, box=None, title_justify="left")
    for name, value in facts(config, rows, ranks).items():
        table.add_row(name, value)
    table.add_row("vocabulary", f"{rows:,} rows for {tokens:,} tokens ({whence})")
    Console().print(table)


def vocabulary(config: Config) -> tuple[int, str]:
    """How many tokens the run's tokenizer will have, and how that is known: the text itself is not read.

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


def facts(config: Config, vocab_size: int, ranks: int) -> dict[str, str]:
    """The rows of the table, by name."""
    with torch.device("meta"):
        gpt = models.GPT(config.model, vocab_size)
    counts = models.parameter_count(gpt)
    flops = models.flops_per_token(config.model, vocab_size)
    step_tokens = config.data.micro_batches * config.data.micro_batch_sequences * config.model.context
    total_tokens = step_tokens * config.budget.steps
    memory = models.memory_per_rank(config, vocab_size, ranks)
    return {
        "parameters": f"{counts.total:,} ({counts.non_embedding:,} without embeddings)",
        "FLOPs per token": f"{flops:,} (forward and backward)",
        "tokens per step": f"{step_tokens:,} in {config.data.micro_batches} micro-batches",
        "tokens in all": f"{total_tokens:,} ({total_tokens / counts.total:.1f} per parameter)",
        "FLOPs in all": f"{flops * total_tokens:.3g}",
        **{
            f"memory per rank, {name}": f"{size / 2**20:,.1f} MiB ({config.parallel.strategy}, {ranks} ranks)"
            for name, size in memory.items()
        },
    }
