"""The text of a run's first epoch, in the order in which it is read: its bytes, and what compressors make of it.

In the first epoch a step scores text that no earlier step has learnt from, so losses are lengths of a code for the text
(log/code_length.py). General compressors on the same bytes in the same order are what that is held against.
"""

import bz2
import importlib
import lzma
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.data.batches import Batches


def steps(batches: Batches) -> int:
    """Number of steps, from the first, that read no window twice. A step that straddles two epochs is not counted."""
    return batches.n_windows // (batches.micro_batches * batches.sequences)


def text_bytes(batches: Batches, step: int, token_bytes: np.ndarray) -> int:
    """Return the UTF-8 bytes that the targets of the update after `step` finished ones stand for."""
    return sum(int(token_bytes[batch.targets].sum()) for batch in batches.for_step(step))


def text(batches: Batches, last: int, pieces: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the text of each of the first `last` steps: the bytes of its targets."""
    for step in range(last):
        for batch in batches.for_step(step):
            yield b"".join([pieces[token] for token in batch.targets.ravel().tolist()])


def compressed_bytes(chunks: Iterator[bytes]) -> tuple[int, dict[str, int | None]]:
    """Return (bytes of text, bytes after each compressor at its strongest usual level); None: not on this machine.

    zstd is in Python's library from 3.14 on; before, the package zstandard is used where it is installed.
    """
    compressors: dict[str, Any] = {
        "gzip": zlib.compressobj(9, wbits=31),
        "bzip2": bz2.BZ2Compressor(9),
        "xz": lzma.LZMACompressor(preset=9),
        "zstd": _zstd(),
    }
    here = {name: compressor for name, compressor in compressors.items() if compressor is not None}
    total, sizes = 0, dict.fromkeys(here, 0)
    for chunk in chunks:
        total += len(chunk)
        for name, compressor in here.items():
            sizes[name] += len(compressor.compress(chunk))
    for name, compressor in here.items():
        sizes[name] += len(compressor.flush())
    return total, {name: sizes.get(name) for name in compressors}


def _zstd() -> Any:
    for module, make in (
        ("compression.zstd", lambda zstd: zstd.ZstdCompressor(level=19)),
        ("zstandard", lambda zstd: zstd.ZstdCompressor(level=19).compressobj()),
    ):
        try:
            return make(importlib.import_module(module))
        except ImportError:
            continue
    return None
