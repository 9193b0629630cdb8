"""Data: documents → tokens → micro-batches. `prepare` is the way in; see corpus, tokenizer, tokens and batches."""

from trainer.data import first_epoch
from trainer.data.batches import Batches, EvalWindows, MicroBatch, digest
from trainer.data.cache import ProgressCallback
from trainer.data.prepare import Prepared, check, prepare, sha256_of_text, shares, tokenizer_for, unique_tokens_of
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokens import TokenStore

__all__ = ["Batches", "EvalWindows", "MicroBatch", "Prepared", "ProgressCallback", "TokenStore", "Tokenizer", "check",
           "digest", "first_epoch", "prepare", "sha256_of_text", "shares", "tokenizer_for",
           "unique_tokens_of"]  # fmt: skip
