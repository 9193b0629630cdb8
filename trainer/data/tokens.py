"""The token store: a corpus as flat files of token ids, memory-mapped, built once and used by every later run.

    CACHE/store-<key>/meta.json            settings that shaped it; counts, sizes and SHA-256 of every file, and its own
                      tokenizer.json
                      <part>.bin           uint16 or uint32, little-endian; every document ends in end_of_document
                      <part>.digests.npy   first 16 bytes of each document's SHA-256, sorted

The key hashes everything that shaped the store, so a changed file, setting or library makes another store.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from trainer import files
from trainer.data.cache import ProgressCallback, built_once, remove_built
from trainer.data.corpus import Corpus, Document, Tally
from trainer.data.tokenizer import Tokenizer
from trainer.errors import CorpusError, TokenizerError

FORMAT = 3
_BATCH_CHARACTERS = 1 << 20
# Any tokenizer in the GPT-2 family breaks words here, so a cut changes no token.
_SAFE_CUT = re.compile(r"(?<=\S)[ \n]")

Route = Callable[[Document], Mapping[str, str]]
"""Splits a document over the parts of the store: {part: text}; empty text goes nowhere."""


@dataclass(frozen=True)
class Part:
    """One flat file of tokens."""

    tokens: np.ndarray
    """uint16 or uint32, memory-mapped."""
    digests: np.ndarray
    """S16, sorted: first 16 bytes of the SHA-256 of each document with text in this part."""
    sha256: str
    """SHA-256 (hex) of the token file."""
    documents: int
    bytes: int
    """UTF-8 bytes of text."""


@dataclass(frozen=True)
class TokenStore:
    """An opened store. `tokens` and `sha256` are those of the training part."""

    directory: Path
    tokenizer: Tokenizer
    parts: Mapping[str, Part]
    tally: Tally
    """Counts of the whole corpus: documents kept, duplicates and empty ones dropped, bytes."""

    @property
    def tokens(self) -> np.ndarray:
        return self.parts["train"].tokens

    @property
    def sha256(self) -> str:
        return self.parts["train"].sha256


def open_or_build(
    root: Path,
    corpus: Corpus,
    shaped_by: Mapping[str, Any],
    make_tokenizer: Callable[[], Tokenizer],
    parts: tuple[str, ...],
    route: Route,
    progress: ProgressCallback,
    verify: bool = False,
) -> TokenStore:
    """Return the store of `corpus` in the cache `root`; `shaped_by` has all other settings that decide its content.

    With `verify`, the token files are checked against their checksums, and a damaged store is built again.

    Raises CorpusError if the corpus cannot be read, has no text for one of `parts`, or changes while it is read;
    TokenizerError if the store's tokenizer is not the one it was written with.
    """
    content = corpus.shaped_by(root, progress)
    shape = {
        **shaped_by,
        "corpus": content,
        "format": FORMAT,
        "tokenizers": version("tokenizers"),
    }
    key = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()

    def build(directory: Path) -> None:
        meta = _write(directory, corpus, make_tokenizer(), parts, route, progress)
        if corpus.shaped_by(root) != content:
            raise CorpusError(f"{corpus.source} changed while it was read.\n  Start again when nothing writes to it.")
        meta = {"key": key, "source": corpus.source, "shaped_by": shape, **meta}
        meta["sha256"] = _meta_sha256(meta)
        (directory / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

    name = f"store-{key[:16]}"
    store = built_once(root, name, build, progress)
    try:
        return open_store(store, verify)
    except CorpusError as error:
        if not verify:  # a store in use: only the first reader, who verifies, may replace it
            raise
        progress(f"{str(error).splitlines()[0]} It is built again.", 0, None)
        remove_built(store)  # the new one has the same name and, since the key is the same, the same tokens
        return open_store(built_once(root, name, build, progress), verify)


def open_store(directory: Path, verify: bool = False) -> TokenStore:
    """Map a store's files. Raises CorpusError if one is missing, has another size or, with `verify`, another checksum;
    TokenizerError as above."""
    meta = _read_meta(directory)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    # A replaced tokenizer.json would turn every id into other text without any other sign.
    if (tokenizer.sha256, tokenizer.vocab_size) != (meta["tokenizer_sha256"], meta["vocab_size"]):
        raise TokenizerError(
            f"{directory / 'tokenizer.json'} does not match the store it lies in "
            f"({tokenizer.vocab_size} tokens; the store was written with {meta['vocab_size']}).\n"
            f"  Its ids would mean other text. Delete {directory}; the next run builds it again."
        )
    dtype = token_dtype(meta["vocab_size"])
    parts = {name: _open_part(directory, name, entry, dtype, verify) for name, entry in meta["parts"].items()}
    return TokenStore(directory, tokenizer, parts, Tally(**meta["tally"]))


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the narrower of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shared_digests(few: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Return the digests in both arrays, which are sorted. Takes O(len(few) · log len(many))."""
    positions = np.minimum(np.searchsorted(many, few), len(many) - 1)
    return few[many[positions] == few]


def _damaged(directory: Path, why: str) -> CorpusError:
    return CorpusError(
        f"The token store {directory} is damaged: {why}.\n"
        "  A store is written once and never changed. Delete the directory; the next run builds it again."
    )


def _meta_sha256(meta: Mapping[str, Any]) -> str:
    covered = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _read_meta(directory: Path) -> dict[str, Any]:
    try:
        meta = files.read_object(directory / "meta.json")
    except (OSError, ValueError) as error:
        raise _damaged(directory, f"meta.json cannot be read ({error})") from None
    if meta.get("sha256") != _meta_sha256(meta):
        raise _damaged(directory, "meta.json has another checksum than when it was written")
    return meta


def _open_part(directory: Path, name: str, entry: Mapping[str, Any], dtype: np.dtype[Any], verify: bool) -> Part:
    path, path_of_digests = directory / f"{name}.bin", directory / f"{name}.digests.npy"
    if entry["dtype"] != dtype.str:
        raise _damaged(directory, f"{path.name} is said to hold {entry['dtype']} instead of {dtype.str}")
    try:
        size = path.stat().st_size
        if size != entry["tokens"] * dtype.itemsize:
            raise _damaged(directory, f"{path.name} has {size} bytes instead of {entry['tokens'] * dtype.itemsize}")
        for file, sha256 in ((path, entry["sha256"]), (path_of_digests, entry["digests_sha256"])):
            if verify and _sha256(file) != sha256:
                raise _damaged(directory, f"{file.name} has another checksum than when it was written")
        digests = np.load(path_of_digests, mmap_mode="r")
        if (digests.dtype.str, digests.shape) != ("|S16", (entry["documents"],)):
            raise _damaged(directory, f"{path_of_digests.name} holds {digests.dtype.str} {digests.shape}")
        tokens = np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise _damaged(directory, str(error)) from None
    return Part(tokens, digests, entry["sha256"], entry["documents"], entry["bytes"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(
    directory: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    parts: tuple[str, ...],
    route: Route,
    progress: ProgressCallback,
) -> dict[str, Any]:
    """Encode the corpus into `directory`; return the counts for meta.json."""
    tally = Tally()
    with ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        writers = {name: stack.enter_context(closing(_PartWriter(directory, name, dtype))) for name in parts}
        encoder = _Encoder(tokenizer)
        for document in reported(corpus, tally, "encoding", progress):
            for part, text in route(document).items():
                if text:
                    writers[part].count(document, text)  # before add, which may cut the text in pieces
                    encoder.add(writers[part], text)
        encoder.flush()
    tokenizer.save(directory / "tokenizer.json")
    return {
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "tally": asdict(tally),
        "parts": {name: writer.finish(corpus, tally) for name, writer in writers.items()},
    }


def reported(corpus: Corpus, tally: Tally, phase: str, progress: ProgressCallback) -> Iterator[Document]:
    """Yield the corpus's documents; report the bytes read to `progress` about once per megabyte."""
    total = corpus.max_bytes or None
    progress(phase, 0, total)
    reported_bytes = 0
    for document in corpus.documents(tally):
        yield document
        if tally.bytes - reported_bytes >= 1 << 20:
            reported_bytes = tally.bytes
            progress(phase, reported_bytes, total)
    progress(phase, tally.bytes, tally.bytes)


class _PartWriter:
    """Appends tokens to one file, and keeps its digest and counts."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any]) -> None:
        self._directory, self._name, self._dtype = directory, name, dtype
        self._hash = hashlib.sha256()
        self._digests: list[bytes] = []
        self._tokens = self._bytes = 0
        self._file = (directory / f"{name}.bin").open("wb")

    def close(self) -> None:
        self._file.close()

    def count(self, document: Document, text: str) -> None:
        self._digests.append(document.digest[:16])
        self._bytes += len(text.encode())

    def append(self, ids: np.ndarray) -> None:
        raw = ids.astype(self._dtype).tobytes()  # hashed as written, so that opening need not convert
        self._file.write(raw)
        self._hash.update(raw)
        self._tokens += len(ids)

    def finish(self, corpus: Corpus, tally: Tally) -> dict[str, Any]:
        if not self._digests:
            raise empty_part(self._name, corpus, tally)
        digests = np.sort(np.array(self._digests, dtype="S16"))
        path = self._directory / f"{self._name}.digests.npy"
        np.save(path, digests)
        return {
            "documents": len(self._digests),
            "bytes": self._bytes,
            "tokens": self._tokens,
            "dtype": self._dtype.str,
            "sha256": self._hash.hexdigest(),
            "digests_sha256": _sha256(path),
        }


def empty_part(part: str, corpus: Corpus, tally: Tally) -> CorpusError:
    """Return the error for a corpus with no document for `part` ("train", "heldout", "eval")."""
    if not tally.documents:
        return CorpusError(
            f"{corpus.source} holds no text ({tally.empty} empty documents).\n"
            "  A corpus needs at least one document that is more than white space. Name another source."
        )
    side = {"train": "training", "heldout": "held-out"}[part]
    return CorpusError(
        f"{corpus.source} leaves no document on the {side} side of the split.\n"
        "  Training and its validation need both. Change data.heldout_fraction, make more documents with "
        'data.unit = "paragraph" or "line", or cut every document with data.heldout = "tail".'
    )


class _Encoder:
    """Encodes about a megabyte at a time: enough work for all cores, and a bound on memory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[tuple[_PartWriter, str, bool]] = []
        self._characters = 0

    def add(self, writer: _PartWriter, text: str) -> None:
        start = 0
        while start < len(text):
            end = _piece_end(text, start)
            self._pending.append((writer, text[start:end], end == len(text)))
            self._characters += end - start
            if self._characters >= _BATCH_CHARACTERS:
                self.flush()
            start = end

    def flush(self) -> None:
        end = np.array([self._tokenizer.end_of_document])
        batches = self._tokenizer.encode_batch([text for _, text, _ in self._pending])
        for (writer, _, is_last), ids in zip(self._pending, batches, strict=True):
            writer.append(ids)
            if is_last:  # a document ends with its last piece
                writer.append(end)
        self._pending, self._characters = [], 0


def _piece_end(text: str, start: int) -> int:
    """Return where to cut a text that is too long to be encoded at once."""
    if len(text) - start <= _BATCH_CHARACTERS:
        return len(text)
    soft = start + _BATCH_CHARACTERS // 2
    # Text without a safe place is cut anywhere: one word of a megabyte may then get other tokens.
    cut = _SAFE_CUT.search(text, soft, start + _BATCH_CHARACTERS)
    return cut.start() if cut else start + _BATCH_CHARACTERS
