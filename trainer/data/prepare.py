"""From settings to data: training tokens, tokenizer and evaluation sets, built in the cache or mapped from it."""

import functools
import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import Data, Eval
from trainer.data.batches import Share, Turns
from trainer.data.cache import ProgressCallback, cache_root, no_progress
from trainer.data.corpus import Corpus, Document, Tally, open_corpus, open_eval_corpus, split
from trainer.data.overlap import HeldOut, Overlap, compare, digest_of
from trainer.data.tokenizer import Tokenizer, from_json, read_json, train
from trainer.data.tokens import Part, Route, TokenStore, empty_part, open_or_build, reported, shared_digests
from trainer.errors import CorpusError

_BYTES_PER_TOKEN = 32
"""More than text has on average in any vocabulary, unless it repeats itself."""


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs of its data."""

    train: TokenStore
    tokenizer: Tokenizer
    eval_sets: Mapping[str, Part]
    sha256: str
    """SHA-256 (hex) over training tokens and tokenizer: two runs with the same value read the same data."""
    overlap: Overlap | None = None
    """Near-duplicates; None where the settings ask for none."""


def prepare(
    data: Data, eval: Eval, context: int, *, progress: ProgressCallback = no_progress, verify: bool = False
) -> Prepared:
    """Return training tokens, tokenizer and evaluation sets, from the cache if they have been built before.

    `context` is tokens per sequence. Any number of processes may call this at once; one builds. With `verify`,
    existing stores are checked against their checksums, and built again if damaged. Raises CorpusError if the corpus
    or a set cannot be read, is empty, or too short for one sequence, or if a set shares a document with the training
    split; TokenizerError if a given tokenizer is unusable.
    """
    root = cache_root(data.cache_dir)
    overlap = _overlap(root, data, eval, progress)
    store = _training_store(root, data, overlap, progress, verify)
    if len(store.tokens) <= context:  # a window is context + 1 tokens
        raise CorpusError(
            f"model.context = {context} is longer than the training split: {len(store.tokens)} tokens in all.\n"
            f"  A sequence takes context + 1 tokens. Give more text, or set model.context to {len(store.tokens) - 1} "
            "or less."
        )
    if data.unique_tokens // context > (len(store.tokens) - 1) // context:
        raise CorpusError(
            f"data.unique_tokens = {data.unique_tokens:,} is more than the training split has: "
            f"{_unique(store, context):,} tokens in whole sequences.\n"
            "  What is read twice is not unique. Give more text, or a smaller number."
        )
    return Prepared(
        train=store,
        tokenizer=store.tokenizer,
        eval_sets={name: _eval_set(root, name, data, eval, store, progress, verify) for name in eval.sets}
        | (_parts_of_val(store) if "val" in eval.sets else {}),
        sha256=_identity(store),
        overlap=overlap,
    )


def sha256_of_text(data: Data, eval: Eval) -> str:
    """Return what `Prepared.sha256` is for these settings, without evaluation sets. Raises as `prepare` does."""
    root = cache_root(data.cache_dir)
    return _identity(_training_store(root, data, _overlap(root, data, eval, no_progress), no_progress))


def unique_tokens_of(data: Data, eval: Eval, context: int) -> int:
    """Return the largest data.unique_tokens that these settings allow. Raises as `prepare` does."""
    root = cache_root(data.cache_dir)
    overlap = _overlap(root, data, eval, no_progress)
    return _unique(_training_store(root, data, overlap, no_progress), context)


def _unique(store: TokenStore, context: int) -> int:
    return (len(store.tokens) - 1) // context * context


def _identity(store: TokenStore) -> str:
    return hashlib.sha256(f"{store.sha256} {store.tokenizer.sha256}".encode()).hexdigest()


def check(data: Data, eval: Eval, context: int) -> list[str]:
    """Raise the CorpusError that `prepare` would raise for local text that cannot be read or leaves a part empty.

    Reads only until each part has text, and prepares in a temporary folder what may be too short for a sequence.
    Returns a sentence about each source that is not there yet or on the hub: those are left to `prepare`.
    """
    notes = _check_parts(partial(open_corpus, data), {"train", "heldout"}, lambda corpus: _splitter(corpus, data))
    needed = max(context, data.unique_tokens)
    if not notes and _is_short(open_corpus(data), needed, 1 - data.heldout_fraction):
        with tempfile.TemporaryDirectory() as scratch:
            prepare(data.model_copy(update={"cache_dir": scratch}), eval.model_copy(update={"sets": ()}), context)
    for name in eval.sets:
        if name != "val":
            with _named(name):
                found = _check_parts(partial(_eval_corpus, name, data, eval), {"eval"}, lambda corpus: _whole)
                notes += [f"eval set {name!r}: {note}" for note in found]
    return notes


def _check_parts(
    open_source: Callable[[], Corpus], missing: set[str], route_of: Callable[[Corpus], Route]
) -> list[str]:
    try:
        corpus = open_source()
    except CorpusError as error:
        return [f"{str(error).splitlines()[0]} Training would refuse it."]
    if corpus.hub is not None:
        return [f"{corpus.source} is on the hub; nothing was read of it."]
    tally, route = Tally(), route_of(corpus)
    for document in corpus.documents(tally):
        missing = missing - {part for part, text in route(document).items() if text}
        if not missing:
            return []
    raise empty_part(max(missing), corpus, tally)  # of two, "train"


def _is_short(corpus: Corpus, tokens: int, share: float) -> bool:
    """True if `share` of the text, that for training, may make fewer than `tokens` + 1 tokens. Reads only so far."""
    tally = Tally()
    return all(share * tally.bytes <= _BYTES_PER_TOKEN * (tokens + 1) for _ in corpus.documents(tally))


def tokenizer_for(data: Data, eval: Eval, *, progress: ProgressCallback = no_progress) -> Tokenizer:
    """Return the tokenizer of runs that use these, from the cache if it is there. Raises as `prepare` does."""
    root = cache_root(data.cache_dir)
    return _training_store(root, data, _overlap(root, data, eval, progress), progress).tokenizer


def _overlap(root: Path, data: Data, eval: Eval, progress: ProgressCallback) -> Overlap | None:
    """Return the near-duplicates that the settings ask for."""
    repetitions = data.deduplicate == "near"
    names = () if data.decontaminate == "off" else eval.sets
    if not names and not repetitions:
        return None
    corpus, splitter = open_corpus(data), _LazySplitter(data)
    sets = {
        name: HeldOut(corpus, lambda document: splitter(document)["heldout"])
        if name == "val"
        else HeldOut(_eval_corpus(name, data, eval), lambda document: document.text)
        for name in names
    }
    shaped_by = {"heldout": [data.heldout, data.heldout_fraction]}
    overlap = compare(root, corpus, shaped_by, splitter, sets, repetitions, progress)
    for message in overlap.messages(data):
        progress(message, 0, None)
    return overlap


class _LazySplitter:
    """The split as a route. It reads the corpus, so only where something must be built."""

    def __init__(self, data: Data) -> None:
        self._data = data

    @functools.cached_property
    def _route(self) -> Route:
        return _splitter(open_corpus(self._data), self._data)

    def __call__(self, document: Document) -> Mapping[str, str]:
        return self._route(document)


def _training_store(
    root: Path, data: Data, overlap: Overlap | None, progress: ProgressCallback, verify: bool = False
) -> TokenStore:
    corpus = open_corpus(data)
    trained = data.tokenizer in ("bpe", "chars", "bytes")  # else it is a path
    given = "" if trained else read_json(Path(data.tokenizer))
    # Everything beyond the corpus that decides the tokens: part of the store's key.
    shaped_by: dict[str, Any] = {
        "heldout": [data.heldout, data.heldout_fraction],
        "tokenizer": [data.tokenizer, data.vocab_size] if trained else hashlib.sha256(given.encode()).hexdigest(),
    }

    dropped = overlap.dropped(data) if overlap else set()
    if dropped:  # else the store is that of a run that drops nothing
        shaped_by["near"] = hashlib.sha256(b"".join(sorted(dropped))).hexdigest()
    splitter = _LazySplitter(data)

    def route(document: Document) -> Mapping[str, str]:
        sides = splitter(document)
        return {**sides, "train": ""} if digest_of(document) in dropped else sides

    def make_tokenizer() -> Tokenizer:
        if not trained:
            return from_json(given, data.tokenizer)
        return train(data.tokenizer, _training_texts(corpus, route, progress), data.vocab_size)

    parts = ("train", "heldout")
    store = open_or_build(root, corpus, shaped_by, make_tokenizer, parts, route, progress, verify)
    if data.heldout == "hash" and store.tally.documents == 1:
        held_out = f"its last {data.heldout_fraction:.0%} are held out"
        progress(f'{corpus.source} is one document: {held_out}, as with data.heldout = "tail"', 0, None)
    return store


def _splitter(corpus: Corpus, data: Data) -> Route:
    """Return the route that splits this corpus's documents into training and held-out text.

    A single document has no other beside it that could be held out whole: "hash" then means "tail". Every store of
    such a corpus was refused before this rule, so no store has another split under the same key.
    """
    is_single = len(list(itertools.islice(corpus.documents(), 2))) == 1
    return partial(_sides, data=data.model_copy(update={"heldout": "tail"}) if is_single else data)


def _training_texts(corpus: Corpus, route: Route, progress: ProgressCallback) -> Iterator[str]:
    """Yield the training side of the split, for training the tokenizer. Raises CorpusError if there is none."""
    tally, found = Tally(), False
    for document in reported(corpus, tally, "training the tokenizer", progress):
        text = route(document)["train"]
        if text:
            found = True
            yield text
    if not found:
        raise empty_part("train", corpus, tally)


def _sides(document: Document, data: Data) -> Mapping[str, str]:
    train_text, heldout_text = split(document, data.heldout, data.heldout_fraction)
    return {"train": train_text, "heldout": heldout_text}


def _eval_set(
    root: Path, name: str, data: Data, eval: Eval, store: TokenStore, progress: ProgressCallback, verify: bool
) -> Part:
    if name == "val":
        return store.parts["heldout"]

    def named_progress(phase: str, done: int, total: int | None) -> None:
        progress(f"{phase} eval set {name!r}", done, total)

    key = {"tokenizer": store.tokenizer.sha256}
    with _named(name):  # the training tokenizer, and no split: a held-out set is scored whole
        corpus = _eval_corpus(name, data, eval)
        opened = open_or_build(root, corpus, key, lambda: store.tokenizer, ("eval",), _whole, named_progress, verify)
    _refuse_overlap(name, corpus, opened.parts["eval"].digests, store)
    return opened.parts["eval"]


def _parts_of_val(store: TokenStore) -> dict[str, Part]:
    """Held-out text of each source of a mixture, as a set of its own."""
    val, found = store.parts["heldout"], {}
    for source, (first, end) in val.sources.items():
        if end - first < 2:
            raise CorpusError(
                f"source {source!r} of the mixture has {end - first} held-out tokens, and its loss needs 2 or more.\n"
                "  Give it more text, or raise data.heldout_fraction."
            )
        found[f"val/{source}"] = replace(val, tokens=val.tokens[first:end], sources={})
    return found


def shares(data: Data, store: TokenStore, context: int, sequences: int) -> list[Share]:
    """Return each source's part of a mixture; [] without one. `sequences` is the number of those that are trained on.

    Raises CorpusError if a source has no whole sequence, or is read more often than its epochs allow.
    """
    train, found = store.parts["train"], []
    for source in data.mixture:
        first, end = train.sources.get(source.name, (0, 0))
        # Windows lie at multiples of the context; those that hold a token of two sources are no one's.
        begin, after = -(-first // context), (end - 1) // context
        if after <= begin:
            raise CorpusError(
                f"source {source.name!r} of the mixture has {end - first:,} training tokens, less than one sequence of "
                f"{context}.\n  Give it more text, or leave it out."
            )
        found.append(Share(source.name, begin, after - begin, Fraction(str(source.weight))))
    turns = Turns(found) if found else None
    for number, source in enumerate(data.mixture):
        assert turns is not None
        if (position := turns.exhausted_at(number, source.epochs)) < sequences:
            step = position // (data.micro_batches * data.micro_batch_sequences) + 1
            raise CorpusError(
                f"source {source.name!r} of the mixture is exhausted at step {step}: its {found[number].count:,} "
                f"sequences are then read {source.epochs} times, and weight {source.weight:g} asks for more.\n"
                "  Raise its epochs, lower its weight, train for fewer steps, or give it more text."
            )
    return found


def _eval_corpus(name: str, data: Data, eval: Eval) -> Corpus:
    return open_eval_corpus(name, "repo" if name == "repo" else eval.sources[name], data)


def _whole(document: Document) -> Mapping[str, str]:
    return {"eval": document.text}


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put an eval set's name into the errors inside."""
    try:
        yield
    except CorpusError as error:
        raise CorpusError(f"eval set {name!r}: {error}") from error


def _refuse_overlap(name: str, corpus: Corpus, digests: np.ndarray, store: TokenStore) -> None:
    """Raise CorpusError if the set shares a document with the training split."""
    shared = set(shared_digests(digests, store.parts["train"].digests).tolist())
    if not shared:
        return
    # NumPy drops trailing zero bytes from an S16 when it becomes Python bytes.
    example = next(d for d in corpus.documents() if d.digest[:16].rstrip(b"\0") in shared)
    raise CorpusError(
        f"eval set {name!r} shares {len(shared)} of its {len(digests)} documents with the training split, "
        f"e.g. {example.origin}: {example.text[:60]!r}.\n"
        "  A score on text that was trained on says nothing. Remove these documents from one of the two, or drop "
        f"{name!r} from eval.sets."
    )
