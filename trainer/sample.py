"""Text from a trained run, drawn token by token from the model of its newest intact checkpoint."""

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer import checkpoint
from trainer import model as models
from trainer.data import Tokenizer
from trainer.errors import CheckpointError, UsageError
from trainer.log import rundir
from trainer.model import GPT, Attention, Block


@dataclass(frozen=True)
class Drawing:
    """Settings for drawing the next token."""

    temperature: float = 0.8
    """0: always the likeliest token."""
    top_k: int = 50
    """Draw from so many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest of the likeliest tokens whose probabilities sum to this (Holtzman et al. 2020)."""


def generate(run: Path, prompt: str, tokens: int, drawing: Drawing, seeds: Iterable[int]) -> Iterator[Iterator[str]]:
    """Yield a sample for each seed: an iterator of the prompt, then text piece by piece, until `tokens` are drawn or
    the document ends.

    A sample is a function of its seed, whatever was drawn before it. An empty prompt starts a new document.
    Raises CheckpointError if the run has no intact checkpoint, UsageError for a prompt or a setting that means nothing.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # the command line passes on bytes that are no UTF-8 as lone surrogates
        raise UsageError(
            f"--prompt is no text: its character {error.start + 1} stands for bytes that are not UTF-8.\n"
            "  Models are trained on UTF-8. Convert the prompt, e.g. with iconv."
        ) from None
    if not 0 <= drawing.temperature < math.inf:
        raise UsageError(f"--temperature = {drawing.temperature} is no size.\n  It must be 0 or a finite number above.")
    if not 0 < drawing.top_p <= 1:
        raise UsageError(f"--top-p = {drawing.top_p} is no probability to draw from.\n  Give a number in (0, 1].")
    model, context = restore(run), rundir.config_of(run).model.context
    tokenizer = Tokenizer.load(rundir.tokenizer_path(run), rundir.read(run).get("tokenizer_sha256"))
    start = [tokenizer.end_of_document, *tokenizer.encode_batch([prompt])[0].tolist()]
    for seed in seeds:
        reader = CachedReader(model) if isinstance(model, GPT) else Reader(model, context)
        generator = torch.Generator().manual_seed(seed)
        yield _sample(reader, tokenizer, prompt, [*start], tokens, drawing, generator)


def _sample(
    reader: "Reader", tokenizer: Tokenizer, prompt: str, ids: list[int], tokens: int, drawing: Drawing,
    generator: torch.Generator,
) -> Iterator[str]:  # fmt: skip
    yield prompt
    drawn: list[int] = []
    shown = ""
    for _ in range(tokens):
        token = draw(reader.next_logits(ids)[: tokenizer.vocab_size], drawing, generator)
        if token == tokenizer.end_of_document:
            return
        ids.append(token)
        drawn.append(token)
        text = tokenizer.decode(drawn)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may span tokens: wait until it is whole
            yield text[len(shown) :]
            shown = text


def draw(logits_V: Tensor, drawing: Drawing, generator: torch.Generator) -> int:
    """Return one token id: the likeliest at temperature 0, else one drawn."""
    if drawing.temperature == 0:
        return int(logits_V.argmax())  # dividing by it would give infinities
    is_out_V = logits_V < logits_V.topk(min(drawing.top_k or logits_V.numel(), logits_V.numel())).values[-1]
    # In double and with 0 as the largest, since a tiny temperature would give 0/0 or inf − inf in float32.
    weights_V = (logits_V.double() - logits_V.max()) / drawing.temperature
    probabilities_V = weights_V.masked_fill(is_out_V, -torch.inf).softmax(-1).float()
    if drawing.top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
        # A token is out if those before it are enough; the likeliest never is.
        enough_V = sorted_V.cumsum(0) - sorted_V >= drawing.top_p
        probabilities_V[order_V[enough_V]] = 0
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


class Reader:
    """Any model as a function from the text so far to the logits of the next token."""

    def __init__(self, model: nn.Module, context: int) -> None:
        self.model, self.context = model, context

    @torch.no_grad()
    def next_logits(self, ids: list[int]) -> Tensor:
        """Return logits_V. The model reads at most `context` tokens; older ones are dropped."""
        return self.model(torch.tensor([ids[-self.context :]]))[0, -1]


class CachedReader(Reader):
    """A GPT that reads each token once: it keeps the keys and values of those before.

    Beyond its context every token moves to another position, so from there on the window is read as a whole.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__(model, model.settings.context)
        self.gpt = model
        self._read = 0
        """Number of tokens in the cache."""
        self._kept: list[tuple[Tensor, Tensor]] = []
        """(keys, values) of each layer, as BKTC."""

    @torch.no_grad()
    def next_logits(self, ids: list[int]) -> Tensor:
        if len(ids) > self.context:
            return super().next_logits(ids)
        gpt, begin = self.gpt, self._read
        self._read = len(ids)
        inputs_BT = torch.tensor([ids[begin:]])
        x_BTD = gpt.embed(inputs_BT)
        if gpt.embed_positions is not None:
            x_BTD = x_BTD + gpt.embed_positions(torch.arange(begin, len(ids)))
        if gpt.embed_bigrams is not None:  # a bigram needs the token before
            x_BTD = x_BTD + gpt.embed_bigrams(torch.tensor([ids[max(0, begin - 1) :]]))[:, -len(ids) + begin :]
        rotation_TP2 = gpt.rotation_TP2[begin : len(ids)] if gpt.settings.positions == "rope" else None
        for layer, block in enumerate(gpt.blocks):
            assert isinstance(block, Block)
            mixed_BTD = self._attend(layer, block.attention, block.attention_norm(x_BTD), inputs_BT, rotation_TP2)
            attended_BTD = x_BTD + mixed_BTD
            x_BTD = attended_BTD + block.mlp(block.mlp_norm(x_BTD if block.is_parallel else attended_BTD))
        head_VD = gpt.embed.weight if gpt.head is None else gpt.head.weight
        logits_V = F.linear(gpt.final_norm(x_BTD[:, -1]), head_VD)[0].float()
        cap = gpt.settings.logit_softcap
        return cap * torch.tanh(logits_V / cap) if cap else logits_V

    def _attend(
        self, layer: int, attention: Attention, x_BTD: Tensor, inputs_BT: Tensor, rotation_TP2: Tensor | None
    ) -> Tensor:
        """`Attention.forward` of new tokens, which follow those in the cache."""
        heads, kv_heads = attention.heads, attention.kv_heads
        qkv_BTGC = attention.qkv(x_BTD).unflatten(2, (heads + 2 * kv_heads, attention.channels))
        qk_BTNC, v_BTKC = qkv_BTGC.split((heads + kv_heads, kv_heads), dim=2)
        if attention.embed_values is not None:
            v_BTKC = v_BTKC + attention.embed_values(inputs_BT).view_as(v_BTKC)
        if attention.qk_norm:
            qk_BTNC = attention.normalise(qk_BTNC)
        if rotation_TP2 is not None:
            qk_BTNC = models._rotate(qk_BTNC, rotation_TP2)
        q_BHTC, k_BKTC = (part.transpose(1, 2) for part in qk_BTNC.split((heads, kv_heads), dim=2))
        v_BKTC = v_BTKC.transpose(1, 2)
        if layer < len(self._kept):
            assert inputs_BT.shape[1] == 1, "one token at a time, which may look at all before it"
            keys, values = self._kept[layer]
            k_BKTC, v_BKTC = torch.cat((keys, k_BKTC), 2), torch.cat((values, v_BKTC), 2)
            self._kept[layer] = k_BKTC, v_BKTC
        else:
            self._kept.append((k_BKTC, v_BKTC))
        is_first = k_BKTC.shape[2] == inputs_BT.shape[1]
        y_BHTC = F.scaled_dot_product_attention(
            q_BHTC, k_BKTC, v_BKTC, is_causal=is_first, enable_gqa=q_BHTC.shape[1] != k_BKTC.shape[1]
        )
        return attention.out(y_BHTC.transpose(1, 2).flatten(2))


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
