"""Documents: what is read, what is dropped, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pyarrow.parquet
import pytest

from trainer.config import Config, Data, parse
from trainer.data.corpus import Document, Tally, open_corpus, open_eval_corpus, split
from trainer.data.sources import repo_root, source_files
from trainer.errors import ConfigError, CorpusError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def read(data: Data) -> list[str]:
    return [document.text for document in open_corpus(data).documents()]


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_glob_reads_jsonl_parquet_and_text_in_order_of_their_names(tmp_path, settings):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n')
    write_parquet(tmp_path / "b.parquet", text=["three", None, "four"], n=[1, 2, 3])
    (tmp_path / "c [1].txt").write_text("five\r\nand six", newline="")
    (tmp_path / "d.jsonl").write_text('{"text": "seven"}\n')
    assert read(settings(tmp_path / "*.*")) == ["one", "two", "three", "four", "five\r\nand six", "seven"]


def test_a_null_is_an_empty_document_in_every_format(tmp_path, settings, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": ""}\n')
    write_parquet(tmp_path / "b.parquet", text=["b", None, ""])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "c"}, {"text": None}, {"text": ""}])
    hub = Data(source="hub:owner/name", revision=COMMIT)
    for data, text in ((settings(tmp_path / "a.jsonl"), "a"), (settings(tmp_path / "b.parquet"), "b"), (hub, "c")):
        tally = Tally()
        assert [document.text for document in open_corpus(data).documents(tally)] == [text]
        assert (tally.documents, tally.empty) == (1, 2)


def test_a_name_with_glob_characters_is_the_file_of_that_name(tmp_path, settings):
    (tmp_path / "a[1]*.txt").write_text("itself")
    (tmp_path / "a1x.txt").write_text("another")
    assert read(settings(tmp_path / "a[1]*.txt")) == ["itself"]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("document", ["a b\nc\n\nd\n"]), ("paragraph", ["a b\nc", "d\n"]), ("line", ["a b", "c", "d"])],
)
def test_a_text_file_is_one_document_or_its_paragraphs_or_its_lines(tmp_path, settings, unit, expected):
    (tmp_path / "t.txt").write_text("a b\nc\n\nd\n")
    assert read(settings(tmp_path / "t.txt", unit=unit)) == expected


def test_text_may_be_in_another_column(tmp_path, settings):
    (tmp_path / "a.jsonl").write_text('{"body": "one", "text": 3}\n')
    assert read(settings(tmp_path / "a.jsonl", text_column="body")) == ["one"]


def test_exact_duplicates_and_empty_documents_are_dropped_and_counted(tmp_path, settings):
    (tmp_path / "a.txt").write_text("same\n\nsame \nsame\nother\nsame\n \n")
    tally = Tally()
    documents = open_corpus(settings(tmp_path / "a.txt", unit="line")).documents(tally)
    assert [document.text for document in documents] == ["same", "same ", "other"]
    assert tally == Tally(documents=3, duplicates=2, empty=2, bytes=14)


def test_reading_stops_at_max_megabytes_between_two_characters(tmp_path, settings):
    (tmp_path / "a.txt").write_text("aé" * 10, encoding="utf-8")
    (tmp_path / "b.txt").write_text("never read")
    tally = Tally()
    texts = [d.text for d in open_corpus(settings(tmp_path / "*.txt", max_megabytes=9e-6)).documents(tally)]
    assert texts == ["aé" * 3]
    assert tally.bytes == 9


NETWORK_PROBE = """
import os, socket, sys
attempts = []
def refuse(*args, **_kwargs):
    attempts.append(args)  # `datasets` swallows what its requests raise
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refuse
from trainer.config import Data
from trainer.data.corpus import open_corpus
texts = [d.text for d in open_corpus(Data(source=sys.argv[1])).documents()]
assert texts == ["a", "b", "c"], texts
assert not attempts, attempts
os._exit(0)  # a thread of pyarrow may still hold the file, which Python's own end answers with abort (arrow#34314)
"""


def test_nothing_local_reaches_the_network(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    write_parquet(tmp_path / "c.parquet", text=["c"])
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # as it is for users
    arguments = [sys.executable, "-c", NETWORK_PROBE, str(tmp_path / "*.*")]
    done = subprocess.run(arguments, env=online, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_standard_library_is_read_without_its_tests():
    names = [file.name for file in source_files("python-stdlib")]
    assert "json/decoder.py" in names
    assert names == sorted(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(Path(name).parts)]


def test_the_repository_is_its_own_source_without_caches_runs_and_hidden_folders():
    names = [file.name for file in source_files("repo")]
    assert "config.py" in {Path(name).name for name in names}
    assert {Path(name).suffix for name in names} <= {".py", ".md", ".toml"}
    assert not [n for n in names if any(p.startswith(".") or p in ("runs", "__pycache__") for p in Path(n).parts)]
    assert (repo_root() / names[0]).is_file()


# Every mistake a user can make, with what the error must name.
NO_TEXT = "is no text"


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("missing.txt", None, "does not exist"),
        ("nothing-*.txt", None, "matches no file"),
        ("nul.txt", b"text\0text", NO_TEXT),
        ("latin1.txt", "é".encode("latin1") + b" text", NO_TEXT),
        ("torn.txt", "é".encode()[:1], NO_TEXT),
        ("packed.txt", b"\x1f\x8b\x08\x00\x00\x00", NO_TEXT),
        ("nul.jsonl", b'{"text": "a\0"}', NO_TEXT),
        ("half.parquet", b"PAR1 and then nothing", "no whole parquet file"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "broken.jsonl:2 is broken"),
        ("torn.jsonl", b'{"text": "a"}\n{"text": "b', "torn.jsonl:2 is broken"),
        ("bare.jsonl", b'"a"\n"b"\n', "bare.jsonl:1 is no JSON object"),
        ("columns.jsonl", b'{"body": "a", "id": 1}\n', "it has 'body', 'id'"),
        ("numbers.jsonl", b'{"text": 1}\n', "numbers.jsonl:1: column 'text' holds int values, not text"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_by_name(tmp_path, settings, name, content, named):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        read(settings(tmp_path / name))
    assert named in str(caught.value)
    assert name in str(caught.value)
    assert "\n  " in str(caught.value), "fact, rule and remedy"


@pytest.mark.parametrize("row", ['{"n": 1}', '{"text": ["a"]}', '{"text": 1.5}', '{"text": {"text": "a"}}', "{", "[]"])
def test_a_row_without_a_string_is_refused_with_its_line_wherever_it_stands(tmp_path, settings, row):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' * 50 + row + "\n")
    with pytest.raises(CorpusError, match=r"a\.jsonl:101[: ]"):
        read(settings(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ("1", "1.5"),
        ("null", '"a string"'),
        ("[1]", '{"nested": [[]]}'),
        ('"2024-01-01"', "9" * 5000),
    ],
)
def test_only_the_text_column_of_a_row_counts(tmp_path, settings, first, later):
    rows = [f'{{"text": "2024-01-0{n}", "other": {other}}}' for n, other in enumerate([first, first, later], start=1)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, '{"late": 1, "text": "10"}']))
    assert read(settings(tmp_path / "a.jsonl")) == ["2024-01-01", "2024-01-02", "2024-01-03", "10"]


def test_a_parquet_file_of_any_shape_gives_its_strings_and_nothing_else_of_it_is_read(tmp_path, settings):
    texts = [f"document {n}" for n in range(300)]
    kinds = {"a": pyarrow.string(), "b": pyarrow.large_string(), "c": pyarrow.dictionary(pyarrow.int32(), "string")}
    for name, kind in kinds.items():
        own = [f"{name} {text}" for text in texts]
        table = pyarrow.table({"text": pyarrow.array(own).cast(kind), "n": list(range(300))})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
        pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / f"{name}-empty.parquet")
    assert read(settings(tmp_path / "*.parquet")) == [f"{name} {text}" for name in kinds for text in texts]


@pytest.mark.parametrize("values", [[1, 2], [b"bytes"], [["list"]], [None]])
def test_a_parquet_column_that_holds_no_strings_is_refused_as_that(tmp_path, settings, values):
    write_parquet(tmp_path / "a.parquet", text=values)
    with pytest.raises(CorpusError, match=r"a\.parquet: column 'text' holds .* values, not text"):
        read(settings(tmp_path / "a.parquet"))


@pytest.mark.parametrize("ends", ["one\r\ntwo\rthree\n", "\r\r\n", "a\u2028b\x85c\x0cd\n\r"])
def test_line_ends_are_kept_alike_in_text_jsonl_and_parquet(tmp_path, settings, ends):
    (tmp_path / "a.txt").write_bytes(b"1" + ends.encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "2" + ends}))
    write_parquet(tmp_path / "c.parquet", text=["3" + ends])
    assert read(settings(tmp_path / "*")) == ["1" + ends, "2" + ends, "3" + ends]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("paragraph", ["a\r\nb", "\r\nc\rd", "e"]), ("line", ["a", "b", "c\rd", "e"])],
)
def test_units_end_at_windows_line_ends_too(tmp_path, settings, unit, expected):
    (tmp_path / "t.txt").write_bytes(b"a\r\nb\r\n\r\n\r\nc\rd\n\ne")
    assert read(settings(tmp_path / "t.txt", unit=unit)) == expected


def test_a_byte_order_mark_is_no_text_but_the_same_character_inside_is(tmp_path, settings):
    (tmp_path / "a.txt").write_bytes("\ufeffa\ufeff".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "\ufeffb"}'.encode())
    assert read(settings(tmp_path / "*")) == ["a\ufeff", "\ufeffb"]


@pytest.mark.parametrize("name", [b"a::b.txt", b"zip::x.jsonl", b"\xff\xfe.txt", b"a%20{b}\n.parquet"])
def test_a_file_may_have_any_name(tmp_path, settings, name):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    rows = {".txt": b"text", ".jsonl": b'{"text": "text"}'}
    write_parquet(tmp_path / "made", text=["text"]).rename(path)
    if path.suffix in rows:
        path.write_bytes(rows[path.suffix])
    assert read(settings(tmp_path / "*")) == ["text"]
    path.write_bytes(b"\0")
    with pytest.raises(CorpusError) as caught:
        read(settings(tmp_path / "*"))
    str(caught.value).encode()  # a name that no terminal can show is shown all the same


def test_local_files_need_no_hub_cache(tmp_path, settings, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_args, **_options: pytest.fail("the hub's library was used"))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    write_parquet(tmp_path / "c.parquet", text=["c"])
    assert read(settings(tmp_path / "*")) == ["a", "b", "c"]


def test_half_a_parquet_file_is_refused_wherever_it_was_cut(tmp_path, settings):
    whole = write_parquet(tmp_path / "whole.parquet", text=[f"document {n}" for n in range(100)]).read_bytes()
    for size in (1, 8, len(whole) // 2, len(whole) - 1):
        (tmp_path / "half.parquet").write_bytes(whole[:size])
        with pytest.raises(CorpusError, match=r"half\.parquet is no whole parquet file"):
            read(settings(tmp_path / "half.parquet"))


def test_a_directory_is_refused_with_the_glob_to_write(tmp_path, settings):
    with pytest.raises(CorpusError, match=r"is a directory(.|\n)*/\*\.txt"):
        read(settings(tmp_path))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_dataset_is_read_at_its_commit_and_without_remote_code(tmp_path, monkeypatch, streaming):
    path = write_parquet(tmp_path / "a.parquet", text=["one", "two"], n=[1, 2])
    calls: list[dict[str, Any]] = []
    from datasets import load_dataset as real  # seconds, which only this worker of the tests pays

    def local(path_: str, **options: Any) -> Any:
        calls.append({"path": path_, **options})
        return real("parquet", data_files=[str(path)], split="train", streaming=options["streaming"])

    monkeypatch.setattr("datasets.load_dataset", local)
    data = Data(source="hub:owner/name", revision=COMMIT, subset="en", hub_split="part", streaming=streaming)
    assert read(data) == ["one", "two"]
    assert calls == [{"path": "owner/name", "name": "en", "revision": COMMIT, "split": "part", "streaming": streaming}]


def test_a_hub_dataset_that_is_a_script_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text("raise SystemExit('remote code ran')\n")
    from datasets import load_dataset as real  # seconds, which only this worker of the tests pays

    monkeypatch.setattr("datasets.load_dataset", lambda _name, **_options: real(str(folder), split="train"))
    with pytest.raises(CorpusError, match=r"owner/name is a loading script(.|\n)*never run"):
        read(Data(source="hub:owner/name", revision=COMMIT))


def test_a_folder_never_stands_in_for_a_hub_dataset(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match="owner/name is also a folder"):
        read(Data(source="hub:owner/name", revision=COMMIT))


def test_a_hub_dataset_that_cannot_be_reached_is_an_error_that_names_it(monkeypatch):
    def fail(_name: str, **_options: Any) -> NoReturn:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(CorpusError, match=f"owner/name .commit {COMMIT}(.|\n)*no route to host"):
        read(Data(source="hub:owner/name", revision=COMMIT))


def test_a_hub_dataset_must_be_pinned():
    with pytest.raises(ConfigError, match=r"data\.revision"):
        parse({"data": {"source": "hub:owner/name", "revision": "main"}})
    with pytest.raises(CorpusError, match="does not pin a commit"):
        open_eval_corpus("other", "hub:owner/name", Config().data)
    hub = open_eval_corpus("other", f"hub:owner/name@{COMMIT}:test", Config().data).hub
    assert hub is not None
    assert (hub.name, hub.revision, hub.split) == ("owner/name", COMMIT, "test")


@pytest.mark.parametrize("source", ["a.jsonl", "A.PARQUET", "data/*", "data/*.*", "data/part-?.json[l]", "hub:o/n@c"])
def test_the_text_column_and_unit_have_an_effect_if_any_source_can_use_them(source):
    other = {"eval": {"sets": ["val", "other"], "sources": {"other": source}}}
    assert parse({"data": {"source": "python-stdlib", "text_column": "body"}, **other}).data.text_column == "body"
    parse({"data": {"source": source.replace("hub:o/n@c", "x.jsonl"), "text_column": "body"}})
    parse({"data": {"source": "x.jsonl", "unit": "line"}, "eval": {"sets": ["o"], "sources": {"o": "notes.txt"}}})


@pytest.mark.parametrize("source", ["python-stdlib", "repo", "a.txt", "data/*.txt", "my.jsonl/a*.md"])
def test_the_text_column_has_no_effect_if_no_source_has_columns(source):
    with pytest.raises(ConfigError, match=r"data\.text_column has no effect"):
        parse({"data": {"source": source, "text_column": "body"}})


def test_the_split_by_hash_gives_a_document_to_one_side_whatever_surrounds_it(tmp_path, settings):
    lines = [json.dumps({"text": f"line {n}"}) for n in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(reversed(lines[100:])))
    sides = [
        {d.text: split(d, "hash", 0.25) for d in open_corpus(settings(tmp_path / name)).documents()}
        for name in ("a.jsonl", "b.jsonl")
    ]
    assert sides[1].items() <= sides[0].items()
    assert all(bool(train) != bool(heldout) for train, heldout in sides[0].values())
    assert 60 <= sum(bool(heldout) for _, heldout in sides[0].values()) <= 140


def test_the_tail_split_cuts_between_characters_and_loses_none():
    document = Document("aé€😀" * 5, b"", "x")
    train, heldout = split(document, "tail", 0.1)
    assert (train, heldout) == (document.text[:18], document.text[18:])
