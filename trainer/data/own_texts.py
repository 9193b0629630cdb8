"""Texts of a function of the user's own: `data.source = "my_corpus.py:documents"`. docs/extending.md has the contract.

It is run again at every start, on every rank, to see that its text is still the same; tokens are made of it once.
"""

from collections.abc import Callable, Iterator
from typing import Any

from trainer import own_import
from trainer.errors import ConfigError, CorpusError
from trainer.own_code import Place

_END = object()


def texts(source: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each document of the function that `source` names. Raises CorpusError naming the document.

    A text without a name gets the function's, and its number.
    """
    try:
        place, function = own_import.load(source, "data.source")
    except ConfigError as error:
        raise CorpusError("\n".join(error.problems)) from error
    if not callable(function):
        fact = f"{place.where} is no function but a {type(function).__name__}"
        raise CorpusError(f"{fact}.\n  It is called without arguments, at every start, and yields the documents.")
    documents = _attempt(place, lambda: iter(_refuse_single(place, function())))
    number = 0
    while (item := _attempt(place, lambda: next(documents, _END))) is not _END:
        number += 1
        yield _document(item, f"{place.path.name}:{place.name}, document {number}")


def _attempt(place: Place, act: Callable[[], Any]) -> Any:
    try:
        return act()
    except CorpusError:
        raise
    except Exception as error:
        raise CorpusError("\n".join(own_import.failure(place, "cannot yield its documents", error).problems)) from error


def _refuse_single(place: Place, result: Any) -> Any:
    if isinstance(result, str | bytes):
        raise CorpusError(
            f"{place.where} returned one {type(result).__name__}.\n  It yields documents, or returns a list of them."
        )
    return result


def _document(item: Any, where: str) -> tuple[str, str]:
    name, text = item if isinstance(item, tuple) and len(item) == 2 else (where, item)
    if isinstance(name, str) and isinstance(text, str):
        return name, text
    held = f"({', '.join(type(part).__name__ for part in item)})" if isinstance(item, tuple) else type(item).__name__
    hint = " Decode the bytes." if isinstance(text, bytes) else ""
    raise CorpusError(f"{where} is of type {held}.\n  A document is text (str), or (name, text).{hint}")
