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
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np

from trainer import files
from trainer.data import identity
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
    sources: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """First token and end of each source of a mixture; empty without one."""


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
    shape = {**shaped_by, "corpus": content, "format": FORMAT, "tokenizers": version("tokenizers")}
    key = files.json_sha256(shape)

    def build(directory: Path) -> None:
        meta = _write(directory, corpus, make_tokenizer(), parts, route, progress)
        if corpus.shaped_by(root) != content:
            raise changed(corpus)
        meta = {"key": key, "source": corpus.source, "shaped_by": shape, **meta}
        meta["sha256"] = files.json_sha256(meta)
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
    try:
        meta = files.read_object(directory / "meta.json")
    except (OSError, ValueError) as error:
        raise _damaged(directory, f"meta.json cannot be read ({error})") from None
    if meta.pop("sha256", None) != files.json_sha256(meta):
        raise _damaged(directory, "meta.json has another checksum than when it was written")
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


def _open_part(directory: Path, name: str, entry: Mapping[str, Any], dtype: np.dtype[Any], verify: bool) -> Part:
    path, path_of_digests = directory / f"{name}.bin", directory / f"{name}.digests.npy"
    if entry["dtype"] != dtype.str:
        raise _damaged(directory, f"{path.name} is said to hold {entry['dtype']} instead of {dtype.str}")
    try:
        size = path.stat().st_size
        if size != entry["tokens"] * dtype.itemsize:
            raise _damaged(directory, f"{path.name} has {size} bytes instead of {entry['tokens'] * dtype.itemsize}")
        for file, sha256 in ((path, entry["sha256"]), (path_of_digests, entry["digests_sha256"])):
            # Reading a large store takes minutes, which every restart would pay: an unchanged file is read once.
            if verify and identity.digests(directory.parent, [file]) != [sha256]:
                raise _damaged(directory, f"{file.name} has another checksum than when it was written")
        digests = np.load(path_of_digests, mmap_mode="r")
        if (digests.dtype.str, digests.shape) != ("|S16", (entry["documents"],)):
            raise _damaged(directory, f"{path_of_digests.name} holds {digests.dtype.str} {digests.shape}")
        tokens = np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise _damaged(directory, str(error)) from None
    sources = {source: (first, end) for source, (first, end) in entry.get("sources", {}).items()}
    return Part(tokens, digests, entry["sha256"], entry["documents"], entry["bytes"], sources)


def _write(
    directory: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    parts: tuple[str, ...],
    route: Route,
    progress: ProgressCallback,
) -> dict[str, Any]:
    """Encode the corpus into `directory`; return the counts for meta.json."""
    tally, dtype, encoder = Tally(), token_dtype(tokenizer.vocab_size), _Encoder(tokenizer)
    with ExitStack() as stack:
        opened = {name: stack.enter_context((directory / f"{name}.bin").open("wb")) for name in parts}
        writers = {name: _PartWriter(file, dtype) for name, file in opened.items()}
        source = ""
        for document in reported(corpus, tally, "encoding", progress):
            if document.part != source:  # a mixture's sources follow one another
                source = document.part
                encoder.flush()
                for writer in writers.values():
                    writer.begin(source)
            for part, text in route(document).items():
                if text:
                    writers[part].digests.append(document.digest[:16])
                    writers[part].text_bytes += len(text.encode())
                    encoder.add(writers[part], text)
        encoder.flush()
    for name, writer in writers.items():
        if not writer.digests:
            raise empty_part(name, corpus, tally)
    tokenizer.save(directory / "tokenizer.json")
    described = {name: writer.describe(directory / f"{name}.digests.npy") for name, writer in writers.items()}
    counts = {"tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "tally": asdict(tally)}
    return counts | {"parts": described}


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


@dataclass
class _PartWriter:
    """Appends tokens to one file, and keeps its digest and counts."""

    file: IO[bytes]
    dtype: np.dtype[Any]
    hash: Any = field(default_factory=hashlib.sha256)
    digests: list[bytes] = field(default_factory=list)
    """Digests of the documents with text in this part."""
    tokens: int = 0
    text_bytes: int = 0

    starts: dict[str, int] = field(default_factory=dict)
    """First token of each source of a mixture."""

    def begin(self, source: str) -> None:
        """Note where a source of a mixture begins."""
        self.starts[source] = self.tokens

    def append(self, ids: np.ndarray) -> None:
        raw = ids.astype(self.dtype).tobytes()  # hashed as written, so that opening need not convert
        self.file.write(raw)
        self.hash.update(raw)
        self.tokens += len(ids)

    def describe(self, path_of_digests: Path) -> dict[str, Any]:
        """Write the documents' digests; return the part's entry in meta.json."""
        np.save(path_of_digests, np.sort(np.array(self.digests, dtype="S16")))
        return {
            "documents": len(self.digests), "bytes": self.text_bytes, "tokens": self.tokens, "dtype": self.dtype.str,
            "sha256": self.hash.hexdigest(), "digests_sha256": files.sha256(path_of_digests),
        } | ({"sources": self._sources()} if self.starts else {})  # fmt: skip

    def _sources(self) -> dict[str, list[int]]:
        ends = [*list(self.starts.values())[1:], self.tokens]
        return {source: [first, end] for (source, first), end in zip(self.starts.items(), ends, strict=True)}


def changed(corpus: Corpus) -> CorpusError:
    """Return the error for a corpus that is another one when it is read again."""
    if corpus.is_own:
        rule = "A source yields the same at every call. Look for random numbers, the order of sets, the clock."
        return CorpusError(f"{corpus.source} yields other text when it is run again.\n  {rule}")
    return CorpusError(f"{corpus.source} changed while it was read.\n  Start again when nothing writes to it.")


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
            end = len(text)
            if end - start > _BATCH_CHARACTERS:  # too long to be encoded at once
                # Text without a safe place is cut anywhere: one word of a megabyte may then get other tokens.
                cut = _SAFE_CUT.search(text, start + _BATCH_CHARACTERS // 2, start + _BATCH_CHARACTERS)
                end = cut.start() if cut else start + _BATCH_CHARACTERS
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
