"""Texts of local files. Nothing is repaired: the text is what the file holds, or the file is refused.

    .jsonl     each line is one JSON object; nothing beside its text column is looked at
    .parquet   the text column alone is read
    any other  UTF-8 text with its line ends as they are: one document, or its paragraphs or lines

The text column holds strings. A null there is an empty document: it is counted, and nobody trains on it.

A byte-order mark at the start of a .jsonl or text file belongs to the encoding, not to the text. Lines end in LF or
CR LF, which is no part of them.
"""

import codecs
import json
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.data.sources import SourceFile
from trainer.errors import CorpusError

_PARQUET_ROWS = 128  # read at once


def file_format(file: SourceFile) -> str:
    """Return how a file is read, by the end of its name: "json", "parquet" or "text"."""
    return {".jsonl": "json", ".parquet": "parquet"}.get(file.path.suffix.lower(), "text")


def texts(file: SourceFile, unit: str, column: str) -> Iterator[str]:
    """Yield a file's texts in order. Raises CorpusError that names the file, and the line or row where there is one."""
    try:
        match file_format(file):
            case "json":
                yield from _json_texts(file, column)
            case "parquet":
                yield from _parquet_texts(file, column)
            case _ if unit == "document":
                yield "".join(_text_lines(file))
            case _ if unit == "line":
                yield from map(_without_end, _text_lines(file))
            case _:
                yield from _paragraphs(file)
    except OSError as error:
        raise CorpusError(
            f"{file.name} cannot be read: {error.strerror or error}.\n  Check that it is there, and its permissions."
        ) from error


def text_of(row: Mapping[str, Any], column: str, origin: str) -> str:
    """Return a row's text. Raises CorpusError if it has none, or something else."""
    if column not in row:
        raise _no_column(origin, column, list(row))
    value = row[column]
    if value is None or isinstance(value, str):
        return value or ""
    raise _not_text(origin, column, f"{type(value).__name__} values")


def _not_text(origin: str, column: str, held: str) -> CorpusError:
    return CorpusError(
        f"{origin}: column {column!r} holds {held}, not text.\n"
        "  A document is text. Set data.text_column to a column of strings, or leave such rows out."
    )


def _no_column(origin: str, column: str, columns: list[str]) -> CorpusError:
    return CorpusError(
        f"{origin} has no column {column!r}; it has {', '.join(map(repr, sorted(columns))) or 'none'}.\n"
        "  data.text_column names the column that holds the text. Set it to one of these, or leave such rows out."
    )


def _text_lines(file: SourceFile) -> Iterator[str]:
    """Yield the lines with their ends. Raises CorpusError if the file is no text."""
    offset = 0
    with file.path.open("rb") as stream:
        for raw in stream:  # at LF only, as bytes: text mode would alter line ends
            line = raw.removeprefix(codecs.BOM_UTF8) if offset == 0 else raw
            if b"\0" in raw:
                raise _no_text(file, f"byte {offset + raw.index(0)} is NUL")
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                at = offset + len(raw) - len(line) + error.start
                raise _no_text(file, f"not UTF-8 near byte {at} ({error.reason})") from None
            offset += len(raw)


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r") if line.endswith("\n") else line


def _paragraphs(file: SourceFile) -> Iterator[str]:
    paragraph: list[str] = []
    for line in _text_lines(file):
        if paragraph and line in ("\n", "\r\n"):
            yield _without_end("".join(paragraph))
            paragraph = []
        else:
            paragraph.append(line)
    yield "".join(paragraph)


def _json_texts(file: SourceFile, column: str) -> Iterator[str]:
    for number, line in enumerate(_text_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file.name}:{number}"
        try:
            # Numbers are not converted: nobody reads them, and Python refuses those of thousands of digits.
            row = json.loads(line, parse_int=lambda digits: 0)
            problem = "" if isinstance(row, dict) else "no JSON object"
        except (ValueError, RecursionError) as error:
            row, problem = {}, f"broken: {error}"
        if problem:
            rule = "Each line of a .jsonl file is one JSON object. Repair or remove it."
            raise CorpusError(f"{where} is {problem}.\n  {rule}")
        yield text_of(row, column, where)


def _parquet_texts(file: SourceFile, column: str) -> Iterator[str]:
    import pyarrow  # late: it takes time which a run whose store exists need not wait for
    import pyarrow.parquet

    with file.path.open("rb") as stream:
        if not stream.read(1):
            return  # an empty file, like one without rows, holds no document
        stream.seek(0)
        try:
            # No threads: one that still holds the file when Python ends makes it abort (arrow#34314).
            table = pyarrow.parquet.ParquetFile(stream, pre_buffer=False)
        except pyarrow.ArrowException as error:
            raise CorpusError(
                f"{file.name} is no whole parquet file: {first_line(error)}\n"
                "  It may have been cut off while it was copied. Copy or write it again."
            ) from error
        _check_column(file, table.schema_arrow, column)
        row = 0
        try:
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[column], use_threads=False):
                for value in batch.column(0):
                    yield value.as_py() or ""
                    row += 1
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise CorpusError(
                f"{file.name} cannot be read beyond row {row}: {first_line(error)}\n"
                "  Every text must be whole and UTF-8. Copy or write the file again."
            ) from error


def _check_column(file: SourceFile, schema: Any, column: str) -> None:
    from pyarrow import types

    matches = schema.get_all_field_indices(column)
    if not matches:
        raise _no_column(file.name, column, list(schema.names))
    kind = schema.field(matches[0]).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)
    if len(matches) > 1 or not is_text:
        held = f"{len(matches)} columns of that name" if len(matches) > 1 else f"{kind} values"
        raise _not_text(file.name, column, held)


def _no_text(file: SourceFile, why: str) -> CorpusError:
    return CorpusError(
        f"{file.name} is no text: {why}.\n"
        "  Text files are UTF-8. Convert or unpack it, leave it out of the pattern, or name it .jsonl or .parquet "
        "if it is one."
    )


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
