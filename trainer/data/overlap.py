"""Near-duplicates of a run's text: between its training text and each held-out set, and within the training text.

    CACHE/near-<key>/report.json    counts and examples
                     near.npz       digests of training documents: "contaminated" (with a near-duplicate in a held-out
                                    set) and "repeated" (with an earlier one in the training text)

The key hashes everything that decides the result: the content of all the text, the split, and the rules of near.py.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainer import files
from trainer.config import Data
from trainer.data import near
from trainer.data.cache import ProgressCallback, built_once
from trainer.data.corpus import Corpus, Document, Tally
from trainer.data.near import Index, Repetitions
from trainer.data.tokens import Route, reported

EXAMPLES = 3
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class HeldOut:
    """A held-out set: its documents, and the part of each that is scored."""

    corpus: Corpus
    text: Callable[[Document], str]


@dataclass(frozen=True)
class Overlap:
    """Overlap that was found, as near-<key> in the cache has it."""

    directory: Path

    @cached_property
    def report(self) -> dict[str, Any]:
        """{"sets": {name: {documents, compared, found, examples}}, "train": {documents, compared, contaminated,
        repeated}}; `repeated` is None where it was not asked for."""
        return files.read_object(self.directory / "report.json")

    def dropped(self, data: Data) -> set[bytes]:
        """Return the digests of the training documents that these settings drop, as `digest_of` makes them."""
        with np.load(self.directory / "near.npz") as found:
            contaminated = found["contaminated"].tolist() if data.decontaminate == "drop" else []
            return {*contaminated, *found["repeated"].tolist()}

    def messages(self, data: Data) -> list[str]:
        """Return a sentence about each held-out set, and about what is dropped."""
        said = []
        for name, found in self.report["sets"].items():
            share = f" ({found['found'] / found['compared']:.2%})" if found["compared"] else ""
            line = (
                f"eval set {name!r}: {found['found']} of {found['compared']} documents{share} have a near-duplicate in "
                "the training text"
            )
            for example in found["examples"][:1]:
                line += f", e.g. {example['heldout']} in {example['train']}: {example['text']!r}"
            said.append(f"{line}.")
        dropped, train = len(self.dropped(data)), self.report["train"]
        if dropped:
            said.append(f"{dropped} of {train['documents']} training documents are dropped as near-duplicates.")
        return said


def digest_of(document: Document) -> bytes:
    # NumPy drops trailing zero bytes from an S16 when it becomes Python bytes.
    return document.digest[:16].rstrip(b"\0")


def compare(
    root: Path, corpus: Corpus, shaped_by: Mapping[str, Any], route: Route, sets: Mapping[str, HeldOut],
    repetitions: bool, progress: ProgressCallback,
) -> Overlap:  # fmt: skip
    """Return the near-duplicates of the training text that `route` makes of `corpus`, from the cache if they are there.

    `shaped_by` decides the route. With `repetitions`, also those within the training text.
    """
    key = files.json_sha256({
        "corpus": corpus.shaped_by(root, progress), "route": shaped_by, "version": near.VERSION,
        "sets": {name: heldout.corpus.shaped_by(root, progress) for name, heldout in sets.items()},
        "repetitions": repetitions,
    })  # fmt: skip

    def build(directory: Path) -> None:
        found, report = _Comparison(sets, progress).run(corpus, route, repetitions)
        contaminated, repeated = (np.array(found[name], dtype="S16") for name in ("contaminated", "repeated"))
        np.savez(directory / "near.npz", contaminated=contaminated, repeated=repeated)
        (directory / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")

    return Overlap(built_once(root, f"near-{key[:16]}", build, progress))


class _Comparison:
    """One pass over the held-out sets, which are kept as an index, and one over the training text."""

    def __init__(self, sets: Mapping[str, HeldOut], progress: ProgressCallback) -> None:
        self._progress = progress
        self._heldout: list[tuple[str, str, str]] = []  # (set, origin, beginning) of each document
        self._exact: dict[bytes, list[int]] = {}
        """Numbers of held-out documents by digest, where they are whole: short ones can only be equal."""
        self._index = Index(self._heldout_texts(sets))
        self._found = np.zeros(len(self._heldout), dtype=bool)
        self._examples: dict[str, list[dict[str, str]]] = {name: [] for name in sets}

    def _heldout_texts(self, sets: Mapping[str, HeldOut]) -> Iterator[str]:
        for name, heldout in sets.items():
            for document in heldout.corpus.documents():
                if text := heldout.text(document):
                    if text == document.text:
                        self._exact.setdefault(digest_of(document), []).append(len(self._heldout))
                    self._heldout.append((name, document.origin, text[:_SHOWN_CHARACTERS]))
                    yield text

    def run(self, corpus: Corpus, route: Route, repetitions: bool) -> tuple[dict[str, list[bytes]], dict[str, Any]]:
        """Return ({"contaminated": digests, "repeated": digests} of training documents, report)."""
        digests: list[bytes] = []
        origins: dict[int, str] = {}
        contaminated: set[int] = set()
        compared = 0
        seen = Repetitions()

        def training_texts() -> Iterator[str]:
            for document in reported(corpus, Tally(), "comparing", self._progress):
                if text := route(document)["train"]:
                    number = len(digests)
                    digests.append(digest_of(document))
                    origins[number] = document.origin
                    if text == document.text and digests[-1] in self._exact:
                        contaminated.add(number)
                        self._note(self._exact[digests[-1]], document.origin)
                    yield text

        for sketches in near.sketch(training_texts()):
            compared += len(sketches.numbers)
            for number, alike in self._index.look_up(sketches):
                contaminated.add(number)
                self._note(alike.tolist(), origins[number])
            origins.clear()  # the next batch has other documents
            if repetitions:
                seen.add(sketches)
        repeated = seen.find().tolist()
        found = {"contaminated": [digests[n] for n in sorted(contaminated)], "repeated": [digests[n] for n in repeated]}
        train = {
            "documents": len(digests), "compared": compared, "contaminated": len(contaminated),
            "repeated": len(repeated) if repetitions else None,
        }  # fmt: skip
        return found, {"sets": self._report(), "train": train}

    def _note(self, heldout: list[int], origin: str) -> None:
        for number in heldout:
            name, where, text = self._heldout[number]
            if not self._found[number] and len(self._examples[name]) < EXAMPLES:
                self._examples[name].append({"heldout": where, "train": origin, "text": text})
            self._found[number] = True

    def _report(self) -> dict[str, Any]:
        long_enough = {int(number) for number in self._index.numbers}
        report = {}
        for name, examples in self._examples.items():
            numbers = [number for number, (of, _, _) in enumerate(self._heldout) if of == name]
            report[name] = {
                "documents": len(numbers),
                "compared": sum(number in long_enough or bool(self._found[number]) for number in numbers),
                "found": int(self._found[numbers].sum()),
                "examples": examples,
            }
        return report
