"""Documents of a source, each once, in a fixed order, and the split into training and held-out text.

Memory holds one document, and 16 bytes for each one seen (to drop exact duplicates).
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer import files, own_code
from trainer.config import Data
from trainer.data import own_texts
from trainer.data.cache import ProgressCallback, no_progress
from trainer.data.identity import digests
from trainer.data.reading import file_format, first_line, text_of, texts
from trainer.data.sources import SourceFile, source_files
from trainer.errors import CorpusError

_EVAL_HUB = re.compile(r"hub:(?P<name>[^@:]+)@(?P<revision>[0-9a-f]{40})(:(?P<split>[^:]+))?")


@dataclass(frozen=True)
class Document:
    text: str
    digest: bytes
    """SHA-256 of the text's UTF-8 bytes. Two documents are the same if their digests are."""
    origin: str
    """Source for messages: a file's name, or a hub dataset."""
    part: str = ""
    """Name of its source in a mixture."""


@dataclass
class Tally:
    """Counts of an iteration over a corpus, so far."""

    documents: int = 0
    duplicates: int = 0
    empty: int = 0
    bytes: int = 0
    """UTF-8 bytes of the documents kept."""


@dataclass(frozen=True)
class Hub:
    """One split of a hub dataset at one commit."""

    name: str
    revision: str
    subset: str
    split: str
    streaming: bool


@dataclass(frozen=True)
class Corpus:
    """A source that can be iterated any number of times, always with the same documents in the same order."""

    source: str
    files: tuple[SourceFile, ...]
    hub: Hub | None
    unit: str
    text_column: str
    max_bytes: int
    """Bytes of text after which reading stops (the last document is cut there); 0 reads all."""

    @property
    def is_own(self) -> bool:
        """True if a function of the user's own yields the documents."""
        return self.hub is None and own_code.is_own_source(self.source)

    def shaped_by(self, root: Path, progress: ProgressCallback = no_progress) -> dict[str, Any]:
        """Return everything that decides the documents: the content of files, never their names or times.

        `root` is the cache, which remembers the digests of files. Raises CorpusError if a file cannot be read.
        """
        shape: dict[str, Any] = {"unit": self.unit, "text_column": self.text_column, "max_bytes": self.max_bytes}
        if self.hub is not None:
            shape["hub"] = [self.hub.name, self.hub.revision, self.hub.subset, self.hub.split]
            shape["datasets"] = version("datasets")
        if self.is_own:
            shape["own"] = self._read_through(progress)
        found = digests(root, [file.path for file in self.files], progress)
        formats = [file_format(file) for file in self.files]
        return shape | {"files": [list(pair) for pair in zip(formats, found, strict=True)]}

    def _read_through(self, progress: ProgressCallback) -> str:
        sha = hashlib.sha256()
        for number, document in enumerate(self.documents()):
            sha.update(document.digest)
            if number % 1000 == 0:
                progress("running the source for its checksum", number, None)
        return sha.hexdigest()

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """Yield the documents that are neither blank nor an exact copy of an earlier one, and count in `tally`.

        Raises CorpusError naming the file if it cannot be read as the format that its name says.
        """
        tally = tally if tally is not None else Tally()
        seen: set[bytes] = set()
        for origin, text in self._texts():
            try:
                data = self._cut(text.encode(), tally)
            except UnicodeEncodeError as error:
                raise CorpusError(
                    f"{origin} holds half a surrogate pair: {error.reason}.\n"
                    "  A document must be valid Unicode. Repair it."
                ) from None
            digest = hashlib.sha256(data).digest()
            if not data.strip():
                tally.empty += 1
            elif digest[:16] in seen:  # 128 bits: no two texts of any corpus collide by chance
                tally.duplicates += 1
            else:
                seen.add(digest[:16])
                tally.documents += 1
                tally.bytes += len(data)
                yield Document(data.decode(), digest, origin)
            if self.max_bytes and tally.bytes >= self.max_bytes:  # in the loop: nothing more is even read
                return

    def _cut(self, data: bytes, tally: Tally) -> bytes:
        room = self.max_bytes - tally.bytes
        if not self.max_bytes or len(data) <= room:
            return data
        whole_characters = data[:room].decode(errors="ignore").encode()
        # If not even one character fits, take one anyway: otherwise the limit would never be reached.
        return whole_characters or data.decode()[:1].encode()

    def _texts(self) -> Iterator[tuple[str, str]]:
        if self.hub is not None:
            yield from _hub_texts(self.hub, self.text_column)
        elif self.is_own:
            yield from own_texts.texts(self.source)
        for file in self.files:
            for text in texts(file, self.unit, self.text_column):
                yield file.name, text


@dataclass(frozen=True)
class Mixture(Corpus):
    """Several corpora after one another, each document once: a text that two of them have belongs to the first."""

    parts: tuple[tuple[str, Corpus], ...] = ()

    def shaped_by(self, root: Path, progress: ProgressCallback = no_progress) -> dict[str, Any]:
        return {"mixture": [[name, corpus.shaped_by(root, progress)] for name, corpus in self.parts]}

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        tally = tally if tally is not None else Tally()
        seen: set[bytes] = set()
        for name, corpus in self.parts:
            own = Tally()
            for document in corpus.documents(own):
                if document.digest[:16] in seen:
                    tally.duplicates += 1
                    continue
                seen.add(document.digest[:16])
                tally.documents += 1
                tally.bytes += len(document.text.encode())
                yield replace(document, part=name)
            tally.duplicates += own.duplicates
            tally.empty += own.empty


def open_corpus(data: Data) -> Corpus:
    """Return the training corpus that `data` describes. Raises CorpusError if a local source names no file."""
    if data.mixture:
        opened = [(part, _open_pinned(f"data.mixture {part.name!r}", part.source, data)) for part in data.mixture]
        parts = tuple((part.name, replace(c, max_bytes=round(part.max_megabytes * 10**6))) for part, c in opened)
        hub = next((corpus.hub for _, corpus in parts if corpus.hub is not None), None)
        return Mixture(f"the mixture of {', '.join(name for name, _ in parts)}", (), hub, "", "", 0, parts)
    hub = None
    if data.source.startswith("hub:"):
        hub = Hub(data.source.removeprefix("hub:"), data.revision, data.subset, data.hub_split, data.streaming)
    found = () if hub or own_code.is_own_source(data.source) else source_files(data.source)
    return Corpus(data.source, found, hub, data.unit, data.text_column, round(data.max_megabytes * 10**6))


def open_eval_corpus(name: str, source: str, data: Data) -> Corpus:
    """Return an evaluation set's whole corpus, read with the units and columns of `data`. Raises CorpusError.

    A hub source pins its own commit and may name its split: "hub:OWNER/NAME@COMMIT" or "hub:OWNER/NAME@COMMIT:SPLIT".
    """
    return _open_pinned(f"eval.sources.{name}", source, data)


def _open_pinned(where: str, source: str, data: Data) -> Corpus:
    hub = None
    if source.startswith("hub:"):
        match = _EVAL_HUB.fullmatch(source)
        if match is None:
            raise CorpusError(
                f"{where} = {source!r} does not pin a commit.\n"
                "  A branch moves, and the score with it. Write hub:OWNER/NAME@COMMIT (40 hex digits), or "
                "hub:OWNER/NAME@COMMIT:SPLIT."
            )
        hub = Hub(match["name"], match["revision"], data.subset, match["split"] or data.hub_split, data.streaming)
    # The repository is always read file by file: any two programs share single lines of code.
    unit = "document" if source == "repo" else data.unit
    found = () if hub or own_code.is_own_source(source) else source_files(source)
    return Corpus(source, found, hub, unit, data.text_column, 0)


def split(document: Document, heldout: str, fraction: float) -> tuple[str, str]:
    """Return the document's (training text, held-out text); either may be empty.

    `heldout` "hash" gives the whole document to one side by its content, so a copy elsewhere lands on the same side.
    "tail" cuts every document at a code point, as nanoGPT does: the last `fraction` of its characters is held out.
    """
    if heldout == "tail":
        cut = int(len(document.text) * (1 - fraction))
        return document.text[:cut], document.text[cut:]
    is_heldout = int.from_bytes(document.digest[:8], "big") < fraction * 2**64
    return ("", document.text) if is_heldout else (document.text, "")


def _hub_texts(hub: Hub, column: str) -> Iterator[tuple[str, str]]:
    origin = f"hub:{hub.name}"
    if files.exists(Path(hub.name)):
        raise CorpusError(
            f"{origin} is also a folder here ({Path(hub.name).absolute()}).\n"
            "  It would be read instead of the pinned dataset. Start from another directory, or rename the folder."
        )
    try:
        import datasets  # late: it takes 0.7 s, which a run whose store exists need not wait for
        import datasets.config

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised; we report them once
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # no request beside those for the data
        # Code in a dataset's repository is never run: `datasets` no longer can.
        rows: Any = datasets.load_dataset(
            hub.name, name=hub.subset or None, revision=hub.revision, split=hub.split, streaming=hub.streaming
        )
        for row in rows:
            yield origin, text_of(row, column, origin)
    except CorpusError:
        raise
    except Exception as error:  # `datasets`, pyarrow and fsspec raise many types
        why = first_line(error)
        if "scripts are no longer supported" in str(error):
            fact = f"{origin} is a loading script: {why}"
            remedy = (
                "Code from a dataset is never run. Choose a dataset of parquet or jsonl files, or a commit of its "
                "refs/convert/parquet branch."
            )
        else:
            fact = f"{origin} (commit {hub.revision}, split {hub.split}) cannot be read: {type(error).__name__}: {why}"
            remedy = (
                "Check name, commit, data.subset, data.hub_split and the network; a private dataset needs HF_TOKEN."
            )
        raise CorpusError(f"{fact}\n  {remedy}") from error
