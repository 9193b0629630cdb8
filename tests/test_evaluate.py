"""Held-out loss and bits per byte against figures computed on paper."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.data import EvalWindows
from trainer.evaluate import evaluate
from trainer.model import Losses
from trainer.parallel.world import World

BITS = torch.tensor([1.0, 2.0, 3.0, 3.0])  # tokens of probability 1/2, 1/4, 1/8, 1/8, whatever came before
BYTES = np.array([1, 2, 3, 0])  # the last one ends a document: it must be predicted, but stands for no text


class Unigram(nn.Module):
    def forward(self, inputs: Tensor, targets: Tensor) -> Losses:
        assert not self.training and not torch.is_grad_enabled()
        nats = BITS[targets].mean() * math.log(2)
        return Losses(nats + 1, nats)  # what is trained on may hold penalties; they are no loss of the held-out text


def test_loss_is_per_token_and_bits_are_per_byte_over_the_whole_set():
    """Three windows of two targets in batches of two: 1, 2 | 3, 0, then 1, 1 alone. A mean of means would be 2.125."""
    windows = EvalWindows(np.array([0, 1, 2, 3, 0, 1, 1]), context=2, sequences=2, max_tokens=100)
    model = Unigram()
    score = evaluate(model, windows, BYTES, World(0, 1, torch.device("cpu")), nullcontext)
    bits, text_bytes = 2 + 3 + 3 + 1 + 2 + 2, 2 + 3 + 0 + 1 + 2 + 2
    assert score.loss == pytest.approx(bits / 6 * math.log(2), rel=1e-6)
    assert score.bits_per_byte == pytest.approx(bits / text_bytes, rel=1e-6)
    assert score.tokens == 6
    assert model.training, "still in training mode"


@pytest.mark.parametrize(
    ("tokens", "bits_per_byte"),
    [
        ([3, 3, 3, 3, 3], None),  # a set of characters that the tokenizer does not know, or of ends of documents alone
        ([0, 3, 3], None),  # the first token is never predicted, so its bytes do not count
        ([3, 3, 3, 3, 0], 10.0),  # text in one batch of two is enough
    ],
)
def test_bits_per_byte_are_unknown_where_the_scored_tokens_stand_for_no_text(
    tokens: list[int], bits_per_byte: float | None
):
    windows = EvalWindows(np.array(tokens), context=2, sequences=1, max_tokens=100)
    score = evaluate(Unigram(), windows, BYTES, World(0, 1, torch.device("cpu")), nullcontext)
    assert score.loss > 0
    assert score.bits_per_byte == (None if bits_per_byte is None else pytest.approx(bits_per_byte, rel=1e-6))
