"""Held-out loss in nats per token, and bits per byte, which compares across tokenizers.

The windows of a set are dealt out over the ranks. Each batch's sums have one owner and a slot of their own, so the
result has the same bits at every world size.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from trainer.data import EvalWindows
from trainer.parallel.world import World


@dataclass(frozen=True)
class Score:
    loss: float
    """Nats per token."""
    bits_per_byte: float | None
    """Bits per byte of UTF-8 text; None if the tokens that were predicted stand for no text."""
    tokens: int
    """Number of tokens that were predicted."""


def evaluate(
    model: nn.Module,
    windows: EvalWindows,
    token_bytes: np.ndarray,
    world: World,
    autocast: Callable[[], AbstractContextManager],
    heartbeat: Callable[[], None] = lambda: None,
) -> Score:
    """Score `model` on all `windows`. `token_bytes[id]` is the number of UTF-8 bytes token `id` stands for.

    Collective: every rank calls it with the same arguments. `heartbeat` is called before each batch.
    """
    sums = torch.zeros(len(windows), 3, dtype=torch.float64)  # nats, tokens, bytes of each batch
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast():
            for index in world.assign_micro_batches(len(windows)):
                heartbeat()
                # A rank without work repeats the first batch: a sharded forward needs every rank.
                inputs, targets = windows.batch(index or 0)
                _, cross_entropy = model(
                    torch.from_numpy(inputs).to(world.device), torch.from_numpy(targets).to(world.device)
                )
                if index is not None:
                    nats = cross_entropy.double().item() * targets.size
                    sums[index] = torch.tensor([nats, targets.size, token_bytes[targets].sum()], dtype=torch.float64)
    finally:
        model.train(was_training)  # training may go on after an evaluation that was interrupted
    on_device = sums.to(world.device)
    world.sum(on_device)  # exact: every slot has one owner
    nats, tokens, count = (math.fsum(column) for column in on_device.T.tolist())
    # Characters that a tokenizer does not know, and ends of documents, are predicted but stand for no bytes.
    bits_per_byte = nats / count / math.log(2) if count else None
    return Score(nats / tokens, bits_per_byte, int(tokens))
