"""Documents of a source, each once, in a fixed order, and the split into training and held-out text.

Memory holds one document, and 16 bytes for each one seen (to drop exact duplicates).
"""

import codecs
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from platform import python_version
from typing import Any

from trainer.config import Data
from trainer.data.sources import SourceFile, source_files
from trainer.errors import CorpusError

MEGABYTE = 10**6
_EVAL_HUB = re.compile(r"hub:(?P<name>[^@:]+)@(?P<revision>[0-9a-f]{40})(:(?P<split>[^:]+))?")


@dataclass(frozen=True)
class Document:
    text: str
    digest: bytes
    """SHA-256 of the text's UTF-8 bytes. Two documents are the same if their digests are."""
    origin: str
    """Source for messages: a file's name, or a hub dataset."""


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

    def shaped_by(self) -> dict[str, Any]:
        """Return everything that decides the documents, without reading them: files by size and time of change."""
        shape: dict[str, Any] = {"source": self.source, "unit": self.unit, "text_column": self.text_column}
        shape |= {"max_bytes": self.max_bytes, "datasets": version("datasets")}
        if self.source == "python-stdlib":
            shape["python"] = python_version()  # a patch release changes the library
        if self.hub is not None:
            shape["hub"] = [self.hub.name, self.hub.revision, self.hub.subset, self.hub.split]
        return shape | {"files": [_identity(file) for file in self.files]}

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """Yield the documents that are neither blank nor an exact copy of an earlier one, and count in `tally`.

        Raises CorpusError naming the file if it cannot be read as the format that its name says.
        """
        tally = tally if tally is not None else Tally()
        seen: set[bytes] = set()
        for origin, text in self._texts():
            data = self._cut(_utf8(text, origin), tally)
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
        # If not even one character fits, take it all the same: otherwise the limit would never be reached.
        return whole_characters or data.decode()[:1].encode()

    def _texts(self) -> Iterator[tuple[str, str]]:
        if self.hub is not None:
            yield from _texts(partial(_hub_rows, self.hub), self.text_column, partial(_explain_hub, self.hub))
        # Neighbouring text files that are one document each are read in one call; all else file by file.
        for is_whole, files in groupby(self.files, lambda file: _format(file) == "text" and self.unit == "document"):
            if is_whole:
                group = tuple(files)
                yield from _texts(partial(_whole_file_rows, group), "text", partial(_explain_group, group))
                continue
            for file in files:
                column = self.text_column if _format(file) != "text" else "text"
                yield from _texts(partial(_file_rows, file, self.unit), column, partial(_explain_file, file))


def open_corpus(data: Data) -> Corpus:
    """Return the training corpus that `data` describes. Raises CorpusError if a local source names no file."""
    hub = None
    if data.source.startswith("hub:"):
        hub = Hub(data.source.removeprefix("hub:"), data.revision, data.subset, data.hub_split, data.streaming)
    files = () if hub else source_files(data.source)
    return Corpus(data.source, files, hub, data.unit, data.text_column, round(data.max_megabytes * MEGABYTE))


def open_eval_corpus(name: str, source: str, data: Data) -> Corpus:
    """Return an evaluation set's whole corpus, read with the units and columns of `data`. Raises CorpusError.

    A hub source pins its own commit and may name its split: "hub:OWNER/NAME@COMMIT" or "hub:OWNER/NAME@COMMIT:SPLIT".
    """
    hub = _eval_hub(name, source, data) if source.startswith("hub:") else None
    # The repository is always read file by file: any two programs share single lines of code.
    unit = "document" if source == "repo" else data.unit
    return Corpus(source, () if hub else source_files(source), hub, unit, data.text_column, 0)


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


def _eval_hub(name: str, source: str, data: Data) -> Hub:
    match = _EVAL_HUB.fullmatch(source)
    if match is None:
        raise CorpusError(
            f"eval.sources.{name} = {source!r} does not pin a commit.\n"
            "  A branch moves, and the score with it. Write hub:OWNER/NAME@COMMIT (40 hex digits), or "
            "hub:OWNER/NAME@COMMIT:SPLIT."
        )
    return Hub(match["name"], match["revision"], data.subset, match["split"] or data.hub_split, data.streaming)


def _identity(file: SourceFile) -> tuple[str, int, int]:
    try:
        status = file.path.stat()
    except OSError as error:
        raise CorpusError(f"{file.name} cannot be read: {error.strerror}.\n  Check that it is there.") from None
    return file.name, status.st_size, status.st_mtime_ns


def _utf8(text: str, origin: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{origin} holds half a surrogate pair: {error.reason}.\n  A document must be valid Unicode. Repair it."
        ) from None


Row = Mapping[str, Any]
Rows = Iterable[tuple[str, Row]]
"""Pairs (origin, row)."""


def _texts(
    rows: Callable[[], Rows], column: str, explain: Callable[[Exception], CorpusError]
) -> Iterator[tuple[str, str]]:
    try:
        for origin, row in rows():
            yield origin, _text(row, column, origin)
    except CorpusError:
        raise
    except Exception as error:  # `datasets`, pyarrow and fsspec raise many types; the cause is the user's file
        raise explain(error) from error


def _text(row: Row, column: str, origin: str) -> str:
    if not row:
        return ""
    if column not in row:
        raise CorpusError(
            f"{origin} has no column {column!r}; it has {', '.join(map(repr, sorted(row)))}.\n"
            "  data.text_column names the column that holds the text. Set it to one of these."
        )
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(
            f"{origin}: column {column!r} holds {type(value).__name__} values, not text.\n"
            "  A document is text. Set data.text_column to a column of strings."
        )
    return value


def _format(file: SourceFile) -> str:
    return {".jsonl": "json", ".parquet": "parquet"}.get(file.path.suffix.lower(), "text")


def _whole_file_rows(files: Sequence[SourceFile]) -> Rows:
    """One row per text file, all in one call: ten times as fast for many small files as a call for each."""
    for file in files:
        _check_text(file)
    rows = _load_files("text", files, sample_by="document")
    return ((file.name, row) for file, row in zip(files, rows, strict=True))


def _file_rows(file: SourceFile, unit: str) -> Rows:
    """Rows of a single file, so that an error can name it."""
    kind = _format(file)
    if kind != "parquet":
        _check_text(file)
    if _identity(file)[1] == 0:
        return [(file.name, {})]  # `datasets` fails on an empty jsonl or parquet file
    options = {"sample_by": unit} if kind == "text" else {"parse_agent_traces": False} if kind == "json" else {}
    return ((file.name, row) for row in _load_files(kind, [file], **options))


def _hub_rows(hub: Hub) -> Rows:
    if Path(hub.name).exists():
        raise CorpusError(
            f"hub:{hub.name} is also a folder here ({Path(hub.name).absolute()}).\n"
            "  It would be read instead of the pinned dataset. Start from another directory, or rename the folder."
        )
    rows = _load(hub.name, name=hub.subset or None, revision=hub.revision, split=hub.split, streaming=hub.streaming)
    return ((f"hub:{hub.name}", row) for row in rows)


def _load_files(kind: str, files: Sequence[SourceFile], **options: Any) -> Iterable[Row]:
    """Stream local files, so that `datasets` puts no copy into its cache."""
    paths = [glob.escape(str(file.path.absolute())) for file in files]  # data_files are patterns
    return _load(kind, data_files=paths, split="train", streaming=True, **options)


def _load(path: str, **options: Any) -> Iterable[Row]:
    """`datasets.load_dataset` without output and telemetry. Code in a dataset's repository is never run."""
    import datasets  # late: it takes 0.7 s, which a run whose store exists need not wait for
    import datasets.config

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised; we report them once
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else each local file costs a request to the hub
    try:
        return datasets.load_dataset(path, **options)
    except StopIteration:  # a jsonl file of white space only
        return []


def _check_text(file: SourceFile) -> None:
    """Raise CorpusError if a file is no text, before any of it reaches training."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with file.path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            if b"\0" in chunk:
                raise CorpusError(_no_text(file, f"byte {offset + chunk.index(0)} is NUL"))
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise CorpusError(_no_text(file, f"not UTF-8 near byte {offset + error.start}")) from None
            offset += len(chunk)
    if decoder.getstate()[0]:
        raise CorpusError(_no_text(file, "it ends inside a character"))


def _no_text(file: SourceFile, why: str) -> str:
    return (
        f"{file.name} is no text: {why}.\n"
        "  Text files are UTF-8. Convert or unpack it, leave it out of the pattern, or name it .jsonl or .parquet "
        "if it is one."
    )


def _explain_file(file: SourceFile, error: Exception) -> CorpusError:
    kind = _format(file)
    if isinstance(error, OSError) and error.errno is not None:
        return CorpusError(f"{file.name} cannot be read: {error.strerror}.\n  Check its permissions.")
    if kind == "parquet":
        return CorpusError(
            f"{file.name} is no whole parquet file: {_first_line(error)}\n"
            "  It may have been cut off while it was copied. Copy or write it again."
        )
    where = _first_broken_line(file) if kind == "json" else None
    if where is not None:
        return CorpusError(
            f"{file.name}:{where}\n  Each line of a .jsonl file is one JSON object. Repair or remove it."
        )
    return CorpusError(f"{file.name} cannot be read as {kind}: {_first_line(error)}\n  Repair it, or leave it out.")


def _explain_group(files: Sequence[SourceFile], error: Exception) -> CorpusError:
    if len(files) == 1:
        return _explain_file(files[0], error)
    return CorpusError(
        f"One of {len(files)} text files ({files[0].name} … {files[-1].name}) cannot be read: {_first_line(error)}\n"
        "  Check that they are at rest and readable."
    )


def _first_broken_line(file: SourceFile) -> str | None:
    with file.path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"{number} is no JSON object."
            except ValueError as error:
                return f"{number} is broken: {error}."
    return None


def _explain_hub(hub: Hub, error: Exception) -> CorpusError:
    if "scripts are no longer supported" in str(error):
        return CorpusError(
            f"hub:{hub.name} is a loading script: {_first_line(error)}\n"
            "  Code from a dataset is never run. Choose a dataset of parquet or jsonl files, or a commit of its "
            "refs/convert/parquet branch."
        )
    return CorpusError(
        f"hub:{hub.name} (commit {hub.revision}, split {hub.split}) cannot be read: "
        f"{type(error).__name__}: {_first_line(error)}\n"
        "  Check name, commit, data.subset, data.hub_split and the network; a private dataset needs HF_TOKEN."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
