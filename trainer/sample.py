"""Text from a trained run, drawn token by token from the model of its newest intact checkpoint."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer import checkpoint
from trainer import model as models
from trainer.data import Tokenizer
from trainer.errors import CheckpointError, UsageError
from trainer.log import rundir


def generate(run: Path, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> Iterator[str]:
    """Yield the prompt, then text piece by piece, until `tokens` are drawn or the document ends.

    An empty prompt starts a new document. Raises CheckpointError if the run has no intact checkpoint, UsageError for a
    prompt or temperature that means nothing.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # the command line passes on bytes that are no UTF-8 as lone surrogates
        raise UsageError(
            f"--prompt is no text: its character {error.start + 1} stands for bytes that are not UTF-8.\n"
            "  Models are trained on UTF-8. Convert the prompt, e.g. with iconv."
        ) from None
    if not 0 <= temperature < math.inf:
        raise UsageError(f"--temperature = {temperature} is no size.\n  It must be 0 or a finite number above.")
    model, context = restore(run), rundir.config_of(run).model.context
    tokenizer = Tokenizer.load(rundir.tokenizer_path(run), rundir.read(run).get("tokenizer_sha256"))
    ids = [tokenizer.end_of_document, *tokenizer.encode_batch([prompt])[0].tolist()]
    generator = torch.Generator().manual_seed(seed)
    yield prompt
    drawn: list[int] = []
    shown = ""
    for _ in range(tokens):
        # The model reads at most `context` tokens; older ones are dropped.
        window = torch.tensor([ids[-context:]])
        with torch.no_grad():
            logits_V = model(window)[0, -1, : tokenizer.vocab_size]
        token = draw(logits_V, temperature, top_k, generator)
        if token == tokenizer.end_of_document:
            return
        ids.append(token)
        drawn.append(token)
        text = tokenizer.decode(drawn)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may span tokens: wait until it is whole
            yield text[len(shown) :]
            shown = text


def draw(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Return one token id: the likeliest at temperature 0, else drawn from the `top_k` likeliest (0: from all)."""
    if temperature == 0:
        return int(logits_V.argmax())  # dividing by it would give infinities
    is_out_V = logits_V < logits_V.topk(min(top_k or logits_V.numel(), logits_V.numel())).values[-1]
    # In double and with 0 as the largest, since a tiny temperature would give 0/0 or inf − inf in float32.
    weights_V = (logits_V.double() - logits_V.max()) / temperature
    probabilities_V = weights_V.masked_fill(is_out_V, -torch.inf).softmax(-1).float()
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def restore(run: Path) -> nn.Module:
    """Load the model of a run's newest intact checkpoint, on the CPU, in evaluation mode.

    Damaged checkpoints are named on stderr. Raises CheckpointError if none is intact.
    """
    config = rundir.config_of(run)
    model = models.construct(config.model, rundir.fact(run, "vocab_size"))
    damaged: list[str] = []
    found = checkpoint.newest_intact(run, report=damaged.append)
    if found is None:
        reason = "\n".join(damaged) if damaged else "none was saved yet"
        raise CheckpointError(f"{run} has no intact checkpoint: {reason}.")
    for message in damaged:
        print(message, file=sys.stderr)
    checkpoint.load(found, {f"model.{name}": p.data for name, p in model.named_parameters()})
    return model.eval()
