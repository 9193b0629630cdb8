"""Tables of runs that were made elsewhere: CSV, TSV, JSON, parquet, or runs in W&B, as rows of named values.

Nothing is checked here but the form of the file; judge.py gives the columns their meaning.
"""

import codecs
import csv
import io
import json
import re
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import files
from trainer.config import flatten
from trainer.errors import ConfigError, of_system

WANDB = "wandb:"
Values = dict[str, Any]


@dataclass(frozen=True)
class Row:
    place: str
    """Place in the source, as people find it: "line 7", "run fast-0"."""
    values: Values


@dataclass(frozen=True)
class Table:
    """Rows of values by column; a value that the source does not have is absent or None."""

    source: str
    columns: list[str]
    rows: list[Row]
    problems: list[str]
    """Rows that cannot be read."""


def read(source: str) -> Table:
    """Read a table: a file by its ending, a folder of offline W&B runs, or wandb:ENTITY/PROJECT[/GROUP].

    Raises ConfigError if there is no table.
    """
    problems: list[str] = []
    try:
        if source.startswith(WANDB):
            rows = list(_online_runs(source))
        elif Path(source).is_dir():
            rows = list(_offline_runs(Path(source), problems))
        else:
            rows = list(_file_rows(Path(source), problems))
    except FileNotFoundError:
        raise ConfigError([f"{source} does not exist.\n  {FORMS}"]) from None
    except OSError as error:
        raise ConfigError([of_system(error, f"{source} cannot be read", "", FORMS)]) from None
    except (ValueError, csv.Error) as error:  # no text, or a field of more than 128 KiB
        raise ConfigError([f"{source} is no table: {error}.\n  {FORMS}"]) from None
    problems = [f"{source}, {problem}" for problem in problems]
    if not rows:
        raise ConfigError(problems or [f"{source} has no rows.\n  Give a table with one row for each run."])
    return Table(source, list(dict.fromkeys(name for row in rows for name in row.values)), rows, problems)


FORMS = (
    "A table is a .csv, .tsv, .jsonl, .json or .parquet file, a folder of offline W&B runs, or "
    "wandb:ENTITY/PROJECT[/GROUP]."
)


def _text(path: Path) -> str:
    """Text in UTF-8, or in UTF-16 with the mark that Excel writes. Raises ConfigError for any other."""
    content = path.read_bytes()
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is no text in UTF-8, from byte {error.start} on.\n  Save it as UTF-8."]) from None


SEPARATORS = ",\t;|"


def _file_rows(path: Path, problems: list[str]) -> Iterator[Row]:
    if not stat.S_ISREG(path.stat().st_mode):  # whoever opens a pipe would wait for a writer
        raise ConfigError([f"{path} is no regular file.\n  {FORMS}"])
    match path.suffix.lower():
        case ".csv" | ".tsv" | ".txt":
            return _delimited_rows(_text(path), problems)
        case ".jsonl" | ".ndjson" | ".json":
            return _json_rows(_text(path), problems)
        case ".parquet":
            return _parquet_rows(path)
    raise ConfigError([f"{path} is no table: its name ends with {path.suffix or 'nothing'}.\n  {FORMS}"])


def _delimited_rows(text: str, problems: list[str]) -> Iterator[Row]:
    lines = list(io.StringIO(text, newline=""))
    above = next((number for number in range(len(lines)) if not _is_note(lines, number)), len(lines))
    header = lines[above] if lines[above:] else ""
    separator = max(SEPARATORS, key=header.count)
    reader = csv.reader(lines[above:], delimiter=separator)
    columns = [name.strip() for name in next(reader, [])]
    line = above + 1
    if columns and columns[0].startswith("#"):
        columns[0] = columns[0].lstrip("# ")
    if len(columns) == 1 and len(columns[0].split()) > 2:
        problems.append(f"line {line}: columns are separated by spaces.\n  Separate them by commas or tabs.")
        return
    unnamed = len(columns)
    while columns and not columns[-1]:  # spreadsheets write empty columns at the end
        columns.pop()
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        problems.append(f"line {line}: {', '.join(map(repr, twice))} names several columns.\n  Give each its own name.")
    has_unnamed = "" in columns
    for fields in reader:
        place = f"line {above + reader.line_num}"
        filled = [field.strip() for field in fields if field.strip()]
        if not filled or (len(filled) == 1 and filled[0].startswith("#")):
            continue
        while len(fields) > len(columns) and not fields[-1].strip():
            fields.pop()
        if len(columns) < len(fields) <= unnamed:
            has_unnamed = True
        elif len(fields) != len(columns):
            problems.append(
                f"{place}: there are {len(fields)} fields, and line {line} names {len(columns)} columns.\n"
                "  Put a field that contains the separator in quotes."
            )
        else:
            yield Row(place, dict(zip(columns, (field.strip() for field in fields), strict=True)))
    if has_unnamed:
        problems.append(f"line {line}: a column has no name.\n  Name it; pandas writes none with index=False.")


def _is_note(lines: Sequence[str], number: int) -> bool:
    """True for a line above the header: empty, a comment, or Excel's "sep=;"."""
    line = lines[number].strip()
    if not line or re.fullmatch(r"sep=.?", line, re.IGNORECASE):
        return True
    if not line.startswith("#"):
        return False
    # The header itself may begin with the mark of a comment: then numbers follow, in as many columns.
    below = next((other.strip() for other in lines[number + 1 :] if other.strip() and other.strip()[0] != "#"), "")
    separator = max(SEPARATORS, key=below.count)
    numbers_follow = any(field.strip(' "')[:1].isdigit() for field in below.split(separator))
    return not (numbers_follow and line.count(separator) == below.count(separator) > 0)


def _json_rows(text: str, problems: list[str]) -> Iterator[Row]:
    if text.lstrip().startswith("["):
        yield from _listed_rows(text, problems)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield Row(f"line {number}", flatten(files.parse_object(line)))
        except ValueError as error:
            problems.append(f"line {number}: no JSON object: {error}.\n  Write one object for each run, in one line.")


def _listed_rows(text: str, problems: list[str]) -> Iterator[Row]:
    """The rows of one list of objects, as pandas writes with orient="records"."""
    remedy = "Write a list of objects, one for each run, or one object in each line."
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(
            f"the list is no JSON: {'too deep' if isinstance(error, RecursionError) else error}.\n  {remedy}"
        )
        return
    for number, values in enumerate(entries, 1):
        if isinstance(values, dict):
            yield Row(f"entry {number}", flatten(values))
        else:
            problems.append(f"entry {number}: there is no JSON object.\n  {remedy}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # No threads: one that still holds the file when Python ends makes it abort (arrow#34314).
        table = pyarrow.parquet.ParquetFile(path, pre_buffer=False).read(use_threads=False)
    except pyarrow.ArrowException as error:
        fact = f"{path} is no whole parquet file: {str(error).splitlines()[0]}"
        raise ConfigError([f"{fact}\n  Copy or write it again."]) from None
    if len(set(table.column_names)) < len(table.column_names):
        raise ConfigError([f"{path} has two columns of one name.\n  Give each its own name."])
    for number, values in enumerate(table.to_pylist(), 1):
        yield Row(f"row {number}", flatten(values))


# W&B


def _offline_runs(folder: Path, problems: list[str]) -> Iterator[Row]:
    """The runs in a folder of offline W&B runs, each with its settings and its last metrics."""
    paths = sorted(folder.rglob("*.wandb"))
    if not paths:
        raise ConfigError([f"{folder} holds no offline W&B runs (*.wandb).\n  {FORMS}"])
    runs: dict[str, Values] = {}
    for path in paths:
        # One run may have been continued by several processes: all their files have its id.
        values = runs.setdefault(path.stem, {})
        try:
            for kind, part in _wandb_records(path):
                if kind == "run":
                    named = {"name": part.display_name, "group": part.run_group, "job_type": part.job_type}
                    values |= {key: value for key, value in named.items() if value}
                items = part.item if kind == "history" else part.config.update if kind == "run" else part.update
                for item in items:
                    values |= flatten({item.key or ".".join(item.nested_key): json.loads(item.value_json)})
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"run {path.stem}: its file cannot be read: {error}.\n  Leave out {path}.")
    for name, values in runs.items():
        yield Row(f"run {values.get('name', name)}", {key: value for key, value in values.items() if key[0] != "_"})


def _wandb_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (kind, content) of the records of a file that have settings or metrics."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    # The file is a LevelDB log: blocks of 32 KiB with (crc, length, type) before each part of a record.
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            return  # a process that was killed left its last record unfinished
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            try:
                record = messages.Record.FromString(parts)
            except DecodeError as error:
                raise ValueError(str(error)) from None
            name, parts = record.WhichOneof("record_type"), b""
            if name in ("run", "config", "history", "summary"):
                yield name, getattr(record, name)


def _online_runs(source: str) -> Iterator[Row]:
    """The finished runs of a project, or of one group in it, from W&B's server."""
    import wandb

    names = source.removeprefix(WANDB).split("/")
    if len(names) not in (2, 3) or not all(names):
        raise ConfigError([f"{source} names no project.\n  Write wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/GROUP."])
    filters = {"state": "finished"} | ({"group": names[2]} if len(names) == 3 else {})
    try:
        for run in wandb.Api().runs("/".join(names[:2]), filters=filters):
            values = {"name": run.name, "group": run.group} | flatten(dict(run.config)) | flatten(dict(run.summary))
            yield Row(f"run {run.name}", {key: value for key, value in values.items() if key[0] != "_"})
    except Exception as error:  # its own errors, those of requests, and more
        fact = f"{source} cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError([f"{fact}.\n  Log in with `wandb login`, and check the name."]) from None
