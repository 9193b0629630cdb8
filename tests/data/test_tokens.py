"""The token store and `prepare`: built once, whole or absent, and never with a document on both sides."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer import files
from trainer.config import Data, Eval
from trainer.data import Prepared, cache, check, identity, prepare, tokenizer_for, tokens
from trainer.data.tokens import _SAFE_CUT, open_store, shared_digests, token_dtype
from trainer.errors import CorpusError, TokenizerError

VAL = Eval(sets=("val",))
CONTEXT = 16
SPAWN = multiprocessing.get_context("spawn")
SHAKESPEARE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tinyshakespeare.txt"


def decoded(prepared: Prepared, array: np.ndarray) -> list[str]:
    """The documents in a token array."""
    ends = np.flatnonzero(array == prepared.tokenizer.end_of_document)
    return [
        prepared.tokenizer.decode(piece[piece != prepared.tokenizer.end_of_document])
        for piece in np.split(array, ends + 1)[:-1]
    ]


def own_sets(path: Path) -> Eval:
    """The held-out split and the eval set "mine"."""
    return Eval(sets=("val", "mine"), sources={"mine": str(path)})


class Builds:
    """Counts how often a corpus was encoded."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def __call__(self, phase: str, done: int, _total: int | None) -> None:
        if done == 0:
            self.phases.append(phase)

    @property
    def count(self) -> int:
        return self.phases.count("encoding")


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_every_document_is_on_exactly_one_side_and_comes_back_whole(stories, settings, tokenizer):
    others = {"vocab_size": 300} if tokenizer == "bpe" else {}
    prepared = prepare(settings(stories, tokenizer=tokenizer, **others), VAL, CONTEXT)
    train, val = decoded(prepared, prepared.train.tokens), decoded(prepared, prepared.eval_sets["val"].tokens)
    expected = [json.loads(line)["text"] for line in stories.read_text().splitlines()]
    assert not set(train) & set(val)
    if tokenizer != "chars":
        assert sorted(train + val) == sorted(expected)
    assert prepared.train.tally.documents == len(expected) == len(train) + len(val)
    assert [text for text in expected if text in set(train)] == train, "in the order of the corpus"


def test_duplicates_are_dropped_before_the_split(stories, settings):
    once = prepare(settings(stories), VAL, CONTEXT)
    stories.write_text(stories.read_text() * 3)
    thrice = prepare(settings(stories), VAL, CONTEXT)
    assert (thrice.train.tally.duplicates, thrice.train.tally.documents) == (120, 60)
    assert thrice.sha256 == once.sha256


def test_the_tail_split_holds_out_the_end_of_every_document(tmp_path, settings):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    (tmp_path / "b.txt").write_text("x" * 50)
    prepared = prepare(settings(tmp_path / "*.txt", heldout="tail", heldout_fraction=0.1), VAL, CONTEXT)
    assert decoded(prepared, prepared.train.tokens) == ["0123456789" * 9, "x" * 45]
    assert decoded(prepared, prepared.eval_sets["val"].tokens) == ["0123456789", "x" * 5]


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"{SHAKESPEARE} is not on this machine")
def test_shakespeare_by_characters_is_split_as_nanogpt_splits_it(settings):
    given = settings(SHAKESPEARE, tokenizer="chars", heldout="tail", heldout_fraction=0.1)
    prepared = prepare(given, VAL, CONTEXT)
    text = SHAKESPEARE.read_text()
    assert decoded(prepared, prepared.train.tokens) == [text[: int(len(text) * 0.9)]]
    assert decoded(prepared, prepared.eval_sets["val"].tokens) == [text[int(len(text) * 0.9) :]]
    assert prepared.tokenizer.vocab_size == 65 + 2


def test_a_second_start_reuses_the_store_and_does_without_datasets(stories, settings):
    builds = Builds()
    first = prepare(settings(stories), VAL, CONTEXT, progress=builds)
    program = (
        "import sys; from trainer.config import Data, Eval; from trainer.data import prepare;"
        f"p = prepare(Data.model_validate_json(sys.argv[1]), Eval(sets=('val',)), {CONTEXT});"
        "assert not {'datasets', 'torch'} & set(sys.modules); print(p.sha256)"
    )
    arguments = [sys.executable, "-c", program, settings(stories).model_dump_json()]
    assert subprocess.run(arguments, capture_output=True, check=True, text=True).stdout.strip() == first.sha256
    assert tokenizer_for(settings(stories), VAL, progress=builds).sha256 == first.tokenizer.sha256
    assert builds.count == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"heldout_fraction": 0.3},
        {"heldout": "tail"},
        {"tokenizer": "chars"},
        {"max_megabytes": 0.002},
        {"unit": "line"},
    ],
)
def test_a_setting_that_shapes_the_tokens_makes_another_store(stories, settings, changed):
    builds = Builds()
    prepare(settings(stories), VAL, CONTEXT, progress=builds)
    prepare(settings(stories, **changed), VAL, CONTEXT, progress=builds)
    assert builds.count == 2


def test_a_changed_file_makes_another_store(stories, settings):
    before = prepare(settings(stories), VAL, CONTEXT)
    stories.write_text(stories.read_text().replace("rope", "cord"))
    after = prepare(settings(stories), VAL, CONTEXT)
    assert before.sha256 != after.sha256


def _age(path: Path) -> None:
    """Let a file be old enough for its digest to be remembered."""
    time.sleep(max(0.0, path.stat().st_ctime - time.time() + 0.03))


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the source files whose content was read for their identity; files settle at once."""
    names: list[str] = []
    real = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path, *rest: (names.append(path.name), real(path, *rest))[1])
    monkeypatch.setattr(identity, "_SETTLED_NS", 10**7)
    return names


@pytest.mark.parametrize("how", ["in place", "by rename", "another folder"])
def test_other_content_of_the_same_size_and_time_makes_another_store(stories, settings, hashed, how):
    _age(stories)
    before, status = prepare(settings(stories), VAL, CONTEXT), stories.stat()
    content = stories.read_bytes().replace(b"rope", b"cord")
    target = stories if how == "in place" else stories.with_name("new")
    if how == "another folder":
        (stories.parent / "other").mkdir()
        target = stories.parent / "other" / stories.name
    target.write_bytes(content)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    if how == "by rename":
        target = target.rename(stories)
    assert (target.stat().st_size, target.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after = prepare(settings(target), VAL, CONTEXT)
    assert "cord" in decoded(after, after.train.tokens)[0] and before.sha256 != after.sha256
    assert hashed.count(target.name) >= 2


def test_the_same_content_under_another_name_and_time_shares_a_store(stories, settings):
    builds = Builds()
    first = prepare(settings(stories), VAL, CONTEXT, progress=builds)
    os.utime(stories, ns=(1, 1))
    again = prepare(settings(stories.rename(stories.with_name("renamed.jsonl"))), VAL, CONTEXT, progress=builds)
    assert (builds.count, again.train.directory) == (1, first.train.directory)


def test_a_file_is_read_for_its_identity_once_and_never_remembered_while_it_may_still_change(
    tmp_path, stories, hashed, monkeypatch
):
    _age(stories)
    found = identity.digests(tmp_path / "cache", [stories])
    assert found == [hashlib.sha256(stories.read_bytes()).hexdigest()]
    assert identity.digests(tmp_path / "cache", [stories]) == found and hashed == [stories.name]
    monkeypatch.setattr(identity, "_SETTLED_NS", 10**12)
    young = tmp_path / "young.txt"
    young.write_text("young")
    for _ in range(2):
        identity.digests(tmp_path / "cache", [young])
    assert hashed == [stories.name, young.name, young.name]


def test_reading_for_identity_is_reported_by_the_bytes_of_all_files(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_REPORTED_BYTES", 10)
    for name in "abcde":
        (tmp_path / name).write_text("6 byte")
    said: list[int] = []
    identity.digests(tmp_path / "cache", sorted(tmp_path.iterdir()), lambda _phase, done, _total: said.append(done))
    assert said == [12, 24, 30]


@pytest.mark.parametrize("damage", ["flipped", "torn", "of another kind", "absent"])
def test_a_damaged_memory_of_digests_only_costs_reading_again(tmp_path, stories, hashed, damage):
    _age(stories)
    memory = tmp_path / "cache" / "digests.json"
    found = identity.digests(memory.parent, [stories])
    text = memory.read_text()
    flipped = text.replace(found[0], found[0][:-1] + ("0" if found[0][-1] != "0" else "1"))
    memory.write_text({"flipped": flipped, "torn": text[:-9], "of another kind": "[]", "absent": ""}[damage])
    assert identity.digests(memory.parent, [stories]) == found
    assert len(hashed) == 2 and memory.read_text() == text


def test_settings_that_only_group_the_tokens_share_a_store(stories, settings):
    builds = Builds()
    prepare(settings(stories, micro_batches=2), VAL, CONTEXT, progress=builds)
    prepare(settings(stories, micro_batches=4, micro_batch_sequences=1), VAL, CONTEXT, progress=builds)
    assert builds.count == 1


def test_a_corpus_that_changes_while_it_is_read_is_refused(stories, settings):
    def touch(phase: str, done: int, _total: int | None) -> None:
        if (phase, done) == ("encoding", 0):
            stories.write_text(stories.read_text() + '{"text": "late"}\n')

    with pytest.raises(CorpusError, match="changed while it was read"):
        prepare(settings(stories), VAL, CONTEXT, progress=touch)
    assert not list(Path(settings(stories).cache_dir).glob("store-*/"))


def exits(target: Callable[..., None], *arguments: Any, count: int = 1) -> list[int | None]:
    """The exit statuses of processes that all do this at once."""
    workers = [SPAWN.Process(target=target, args=arguments) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [worker.exitcode for worker in workers]


def _prepare_with_others(barrier: Any, given: Data, results: Path) -> None:
    builds = Builds()
    barrier.wait(timeout=60)
    prepared = prepare(given, VAL, CONTEXT, progress=builds)
    (results / str(os.getpid())).write_text(json.dumps([builds.count, prepared.sha256]))


def test_four_processes_that_start_at_once_build_the_store_once(tmp_path, stories, settings):
    results = tmp_path / "results"
    results.mkdir()
    given = settings(stories, tokenizer="bpe", vocab_size=300)
    assert exits(_prepare_with_others, SPAWN.Barrier(4), given, results, count=4) == [0] * 4
    counts, digests = zip(*[json.loads(path.read_text()) for path in results.iterdir()], strict=True)
    assert (len(counts), sum(counts)) == (4, 1)
    assert len(set(digests)) == 1


def _die_midway(given: Data) -> None:
    def kill(phase: str, done: int, _total: int | None) -> None:
        if phase == "encoding" and done > 0:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(given, VAL, CONTEXT, progress=kill)


def test_a_builder_killed_midway_leaves_nothing_that_the_next_accepts(stories, settings):
    given = settings(stories)
    assert exits(_die_midway, given) == [-signal.SIGKILL]
    root = Path(given.cache_dir)
    assert [path.suffix for path in root.iterdir() if path.is_dir()] == [".building"]
    builds = Builds()
    prepared = prepare(given, VAL, CONTEXT, progress=builds)
    assert builds.count == 1
    assert len(decoded(prepared, prepared.train.tokens)) > 30
    assert not list(root.glob("*.building"))


def test_waiting_for_another_builder_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WAIT_NOTICE_SECONDS", 0.0)
    said: list[str] = []
    with (tmp_path / "store.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def note(phase: str, _done: int, _total: int | None) -> None:
            said.append(phase)
            fcntl.flock(held, fcntl.LOCK_UN)

        built = cache.built_once(tmp_path, "store", lambda directory: (directory / "built").touch(), note)
    assert (built / "built").exists()
    assert set(said) == {"waiting for another process that prepares the same data"}


def test_a_cache_that_cannot_be_written_is_refused_with_the_setting_to_change(tmp_path, stories, settings):
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match=r"cannot be written(.|\n)*data\.cache_dir"):
        prepare(settings(stories, cache_dir=str(tmp_path / "file" / "cache")), VAL, CONTEXT)


@pytest.mark.parametrize(
    ("name", "blamed"), [(None, True), ("cache/store.building/x", True), ("cache", True), ("elsewhere/x", False)]
)
def test_the_cache_is_blamed_for_its_own_files_alone(tmp_path, name, blamed):
    def build(_directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", name and str(tmp_path / name))

    with pytest.raises(CorpusError, match=r"No space left(.|\n)*The disk is full") as refused:
        cache.built_once(tmp_path / "cache", "store", build, cache.no_progress)
    assert ("The cache " in str(refused.value), "data.cache_dir" in str(refused.value)) == (blamed, blamed)


def test_the_cache_is_where_the_environment_says_unless_the_config_does(tmp_path, monkeypatch):
    monkeypatch.setenv("TOPROPE_CACHE", str(tmp_path))
    assert cache.cache_root("") == tmp_path
    assert cache.cache_root("other") == Path("other")
    monkeypatch.delenv("TOPROPE_CACHE")
    assert cache.cache_root("") == Path.home() / ".cache" / "toprope"


@pytest.mark.parametrize(
    ("name", "error", "named"),
    [
        ("train.bin", CorpusError, "train.bin has"),
        ("heldout.bin", CorpusError, "heldout.bin has"),
        ("train.digests.npy", CorpusError, "damaged"),
        ("meta.json", CorpusError, "meta.json cannot be read"),
        ("tokenizer.json", TokenizerError, "no usable tokenizer"),
    ],
)
def test_a_damaged_store_is_refused_by_the_file(stories, settings, name, error, named):
    directory = prepare(settings(stories), VAL, CONTEXT).train.directory
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(error, match=named):
        prepare(settings(stories), VAL, CONTEXT)
    (directory / name).unlink()
    with pytest.raises(error):
        prepare(settings(stories), VAL, CONTEXT)


@pytest.mark.parametrize("name", ["train.bin", "heldout.bin", "meta.json"])
def test_a_store_in_which_a_bit_has_flipped_is_noticed_and_built_again(stories, settings, name):
    builds = Builds()
    store = prepare(settings(stories), VAL, CONTEXT, progress=builds).train
    path, size = store.directory / name, (store.directory / name).stat().st_size
    whole = path.read_bytes()
    path.write_bytes(whole[: size // 2] + bytes([whole[size // 2] ^ 0x80]) + whole[size // 2 + 1 :])
    again = prepare(settings(stories), VAL, CONTEXT, progress=builds, verify=True)
    assert builds.count == 2 and "It is built again" in " ".join(builds.phases)
    assert (again.train.directory / name).read_bytes() == whole and again.train.sha256 == store.sha256
    prepare(settings(stories), VAL, CONTEXT, progress=builds, verify=True)
    assert builds.count == 2 and [entry.name for entry in store.directory.parent.glob("*damaged*")] == []


def test_a_store_is_hashed_once_and_again_when_a_file_of_it_may_have_changed(stories, settings, hashed):
    directory = prepare(settings(stories), VAL, CONTEXT).train.directory
    files_of_store = [name for name in ("train.bin", "heldout.bin") if (directory / name).exists()]
    _age(directory / "train.bin")
    for _ in range(3):
        prepare(settings(stories), VAL, CONTEXT, verify=True)
    assert [hashed.count(name) for name in files_of_store] == [1, 1]
    status = (directory / "train.bin").stat()
    (directory / "train.bin").write_bytes((directory / "train.bin").read_bytes()[::-1])
    os.utime(directory / "train.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    builds = Builds()
    prepare(settings(stories), VAL, CONTEXT, progress=builds, verify=True)
    assert builds.count == 1, "the same size and time hid a change"


@pytest.mark.parametrize("field", ["dtype", "tokens", "documents"])
@pytest.mark.parametrize("covered", [False, True])
def test_a_store_whose_header_was_changed_is_refused(stories, settings, field, covered):
    path = prepare(settings(stories), VAL, CONTEXT).train.directory / "meta.json"
    meta = json.loads(path.read_text())
    entry = meta["parts"]["train"]
    entry[field] = {"dtype": "<f2", "tokens": entry["tokens"] - 1, "documents": entry["documents"] + 1}[field]
    if covered:  # someone made the checksum fit: the files still do not
        del meta["sha256"]
        meta["sha256"] = files.json_sha256(meta)
    path.write_text(json.dumps(meta))
    with pytest.raises(CorpusError, match="is damaged" if covered else r"meta\.json has another checksum"):
        prepare(settings(stories), VAL, CONTEXT)


@pytest.mark.parametrize("wanted", ["<u4", ">u2", "<c8", "|O", "nonsense"])
def test_token_ids_are_of_the_type_that_the_vocabulary_gives(stories, settings, wanted):
    path = prepare(settings(stories), VAL, CONTEXT).train.directory / "meta.json"
    meta = json.loads(path.read_text())
    meta["parts"]["heldout"]["dtype"] = wanted
    del meta["sha256"]
    meta["sha256"] = files.json_sha256(meta)
    path.write_text(json.dumps(meta))
    with pytest.raises(CorpusError, match=r"heldout\.bin is said to hold"):
        prepare(settings(stories), VAL, CONTEXT)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": "one.txt", "heldout_fraction": 1e-20}, "leaves no document on the held-out"),
        ({"heldout_fraction": 1e-9}, "leaves no document on the held-out"),
        ({"source": "one.txt"}, "is longer than the training split: 15 tokens"),
        ({"source": "same-*.txt"}, "is longer than the training split: 15 tokens"),
    ],
)
def test_a_split_that_prepare_refuses_is_found_without_preparing(tmp_path, stories, settings, given, message):
    for name in ("one.txt", "same-1.txt", "same-2.txt"):
        (tmp_path / name).write_text("The only document.")
    data = settings(**{"source": stories, **{k: tmp_path / v if k == "source" else v for k, v in given.items()}})
    with pytest.raises(CorpusError, match=message) as early:
        check(data, VAL, 64)
    with pytest.raises(CorpusError) as late:
        prepare(data, VAL, 64)
    assert str(early.value) == str(late.value)
    assert check(settings(stories), VAL, CONTEXT) == []
    (note,) = check(settings("not/there/yet-*.parquet"), VAL, CONTEXT)
    assert "matches no file" in note


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "chars"])
def test_a_single_document_is_split_as_by_tail_and_that_is_said_at_every_start(tmp_path, settings, tokenizer):
    (tmp_path / "one.txt").write_text("".join(f"This is line {n} of the only document.\n" for n in range(99)))
    given = {"source": tmp_path / "one.txt", "tokenizer": tokenizer, "vocab_size": 300}
    by_tail = prepare(settings(**given, heldout="tail"), VAL, CONTEXT)
    said: list[str] = []
    for start in (1, 2):
        by_hash = prepare(settings(**given), VAL, CONTEXT, progress=lambda phase, done, total: said.append(phase))
        assert by_hash.sha256 == by_tail.sha256
        assert by_hash.eval_sets["val"].sha256 == by_tail.eval_sets["val"].sha256
        assert sum("is one document: its last 20% are held out" in phase for phase in said) == start


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b""), ("a.txt", b"\0"), ("a.jsonl", b"[]"), ("a.parquet", b"x")]
)
def test_what_prepare_refuses_about_an_eval_set_is_found_without_preparing(tmp_path, stories, settings, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=f"eval set 'mine': .*{name}.*\n  ") as early:
        check(settings(stories), own_sets(path), CONTEXT)
    with pytest.raises(CorpusError) as late:
        prepare(settings(stories), own_sets(path), CONTEXT)
    assert str(early.value) == str(late.value)
    (note,) = check(settings(stories), own_sets(tmp_path / "not" / "there" / "yet-*.txt"), CONTEXT)
    assert note.startswith("eval set 'mine': ")


def test_a_tokenizer_that_does_not_match_its_store_is_refused(stories, settings):
    store = prepare(settings(stories, tokenizer="chars"), VAL, CONTEXT).train
    path = store.directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"characters": "abc"}))
    with pytest.raises(TokenizerError, match="does not match the store"):
        open_store(store.directory)


def test_tokens_are_as_narrow_as_the_vocabulary_allows(tmp_path, settings):
    assert [token_dtype(n) for n in (257, 65_536, 65_537)] == ["<u2", "<u2", "<u4"]
    # More characters than 16 bits can number; surrogates (0xD800-0xDFFF) are no characters.
    text = "".join(map(chr, [*range(33, 0xD800), *range(0xE000, 0x16000)]))
    (tmp_path / "wide.txt").write_text(text, encoding="utf-8", newline="")
    given = settings(tmp_path / "wide.txt", tokenizer="chars", heldout="tail", heldout_fraction=0.01)
    prepared = prepare(given, VAL, CONTEXT)
    assert prepared.tokenizer.vocab_size > 65_536
    assert prepared.train.tokens.dtype == "<u4"
    assert int(prepared.train.tokens.max()) == prepared.tokenizer.end_of_document > 65_535


def test_a_given_tokenizer_is_used_and_is_part_of_the_key(tmp_path, stories, settings):
    trained = prepare(settings(stories, tokenizer="bpe", vocab_size=300), VAL, CONTEXT)
    path = tmp_path / "given.json"
    trained.tokenizer.save(path)
    again = prepare(settings(stories, tokenizer=str(path)), VAL, CONTEXT)
    assert again.sha256 == trained.sha256
    prepare(settings(stories, tokenizer="bpe", vocab_size=290), VAL, CONTEXT).tokenizer.save(path)
    assert prepare(settings(stories, tokenizer=str(path)), VAL, CONTEXT).tokenizer.vocab_size == 290


def test_a_long_document_encoded_in_pieces_has_the_same_tokens(tmp_path, settings, monkeypatch):
    (tmp_path / "a.txt").write_text(Path(tokens.__file__).read_text() + "\n\n  é ")
    given = {"tokenizer": "bpe", "vocab_size": 400, "heldout": "tail"}
    whole = prepare(settings(tmp_path / "a.txt", **given, cache_dir=str(tmp_path / "one")), VAL, CONTEXT)
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 100)
    pieces = prepare(settings(tmp_path / "a.txt", **given, cache_dir=str(tmp_path / "two")), VAL, CONTEXT)
    assert pieces.sha256 == whole.sha256
    assert _SAFE_CUT.search("a b")


# Splits that leave nothing, and evaluation sets that say nothing.


def test_an_empty_corpus_is_refused(tmp_path, settings):
    (tmp_path / "a.txt").write_text("\n \n")
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n')
    for name in ("a.txt", "b.jsonl", "c.jsonl"):
        with pytest.raises(CorpusError, match=f"{name} holds no text"):
            prepare(settings(tmp_path / name), VAL, CONTEXT)


@pytest.mark.parametrize(("fraction", "side"), [(1e-9, "held-out"), (1 - 1e-9, "training")])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "chars"])
def test_a_split_that_leaves_a_side_empty_is_refused_with_what_to_change(stories, settings, fraction, side, tokenizer):
    given = settings(stories, heldout_fraction=fraction, tokenizer=tokenizer)
    with pytest.raises(CorpusError, match=rf"no document on the {side} side(.|\n)*data\.heldout"):
        prepare(given, VAL, CONTEXT)


def test_a_sequence_longer_than_the_corpus_is_refused_with_the_longest_that_fits(stories, settings):
    length = len(prepare(settings(stories), VAL, CONTEXT).train.tokens)
    prepare(settings(stories), VAL, length - 1)
    with pytest.raises(CorpusError, match=rf"model\.context = {length} is longer(.|\n)*{length - 1} or less"):
        prepare(settings(stories), VAL, length)


def test_further_evaluation_sets_are_read_whole_with_the_same_tokenizer_and_cached(tmp_path, stories, settings):
    (tmp_path / "other.txt").write_text("something else entirely")
    evaluation = Eval(sets=("other", "val"), sources={"other": str(tmp_path / "other.txt")})
    builds = Builds()
    prepared = prepare(settings(stories), evaluation, CONTEXT, progress=builds)
    again = prepare(settings(stories), evaluation, CONTEXT, progress=builds)
    other = prepared.eval_sets["other"]
    assert list(prepared.eval_sets) == ["other", "val"]
    assert decoded(prepared, other.tokens) == ["something else entirely"]
    assert (other.documents, other.bytes) == (1, 23)
    assert other.sha256 == again.eval_sets["other"].sha256 != prepared.eval_sets["val"].sha256
    assert len(builds.phases) == 2


def test_the_repository_can_be_an_evaluation_set(tmp_path, stories, settings, monkeypatch):
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "a.py").write_text("import this\n\nimport that\n")
    monkeypatch.setattr("trainer.data.sources.repo_root", lambda: tmp_path / "house")
    prepared = prepare(settings(stories, unit="line"), Eval(sets=("repo",)), CONTEXT)
    assert decoded(prepared, prepared.eval_sets["repo"].tokens) == ["import this\n\nimport that\n"]


def test_an_evaluation_set_that_shares_a_document_with_training_is_refused(tmp_path, stories, settings):
    trained = decoded(prepared := prepare(settings(stories), VAL, CONTEXT), prepared.train.tokens)
    leak = tmp_path / "leak.jsonl"
    leak.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["new", trained[3], trained[0]]))
    with pytest.raises(CorpusError) as caught:
        prepare(settings(stories), Eval(sets=("leak",), sources={"leak": str(leak)}), CONTEXT)
    assert "eval set 'leak' shares 2 of its 3 documents with the training split" in str(caught.value)
    assert trained[3][:20].splitlines()[0] in str(caught.value)
    assert "leak.jsonl" in str(caught.value)


def test_an_evaluation_set_may_hold_documents_that_were_held_out(tmp_path, stories, settings):
    prepared = prepare(settings(stories), VAL, CONTEXT)
    heldout = decoded(prepared, prepared.eval_sets["val"].tokens)
    (tmp_path / "same.jsonl").write_text(json.dumps({"text": heldout[0]}))
    prepare(settings(stories), Eval(sets=("s",), sources={"s": str(tmp_path / "same.jsonl")}), CONTEXT)


def test_an_empty_evaluation_set_is_refused_by_its_name(tmp_path, stories, settings):
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(CorpusError, match=r"eval set 'none': .*none\.txt holds no text"):
        prepare(settings(stories), Eval(sets=("none",), sources={"none": str(tmp_path / "none.txt")}), CONTEXT)
    with pytest.raises(CorpusError, match=r"eval set 'none'(.|\n)*does not exist"):
        prepare(settings(stories), Eval(sets=("none",), sources={"none": str(tmp_path / "absent")}), CONTEXT)


def test_digests_that_end_in_zero_bytes_are_compared_like_others():
    few = np.sort(np.array([b"a" * 15 + b"\0", b"b" * 16], dtype="S16"))
    many = np.sort(np.array([b"a" * 15 + b"\0", b"a" * 15 + b"\1", b"z" * 16], dtype="S16"))
    assert shared_digests(few, many).tolist() == [b"a" * 15]


def test_a_missing_tokenizer_is_refused_before_the_corpus_is_read(stories, settings):
    with pytest.raises(TokenizerError, match="gpt2 does not exist"):
        prepare(settings(stories, tokenizer="gpt2"), VAL, CONTEXT)
