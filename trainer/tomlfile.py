"""TOML files: read as a tree or as a strict model, and values written back."""

import difflib
import json
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trainer.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


def read(path: Path) -> dict[str, Any]:
    """A file of settings as a tree. Raises ConfigError, naming the nearest file where there is none of that name."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else " configs/ and configs/chaos/ hold ready ones."
        raise ConfigError([f"{path} does not exist.{hint}"]) from None
    except IsADirectoryError:
        inside = ", ".join(sorted(p.name for p in path.glob("*.toml"))) or "none here; configs/ has ready ones"
        raise ConfigError([f"{path} is a directory.\n  Name one TOML file ({inside})."]) from None
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}.\n  Make it readable."]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is no text: {error}.\n  TOML is written in UTF-8."]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path} is not valid TOML: {error}."]) from None


def read_as(path: Path, model: type[M], what: str) -> M:
    """A file as a strict model; `what` is what such a file is called. Raises ConfigError with all problems at once."""
    tree = read(path)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = [f"{path}: {explain(mistake, model, what)}" for mistake in mistakes(error, tree)]
    raise ConfigError(problems)


def text(value: Any) -> str:
    """A value as TOML, in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{text(str(key))} = {text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(text, value)) + "]"
    if isinstance(value, float):
        return repr(value)  # TOML writes nan and inf as Python does, and JSON does not
    return json.dumps(value, ensure_ascii=False)  # TOML has no surrogates


def lines(table: Mapping[str, Any]) -> list[str]:
    """key = value for each of a table's."""
    return [f"{key} = {text(value)}" for key, value in table.items()]


@dataclass(frozen=True)
class Mistake:
    """What is wrong at one place of a tree of settings."""

    place: tuple[str | int, ...]
    type: str
    """Pydantic's."""
    input: Any
    rules: tuple[str, ...]
    """Of these, one would have to hold."""

    @property
    def where(self) -> str:
        """ "faults[0].rank" """
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.place).removeprefix(".")

    def __str__(self) -> str:
        rules = " or ".join([self.rules[0], *(rule.removeprefix("input should be ") for rule in self.rules[1:])])
        return f"{self.where} = {json.dumps(self.input, default=str)}: {rules}."


def mistakes(error: ValidationError, tree: Mapping[str, Any]) -> list[Mistake]:
    """One for each place, however many readings of it have failed there."""
    found: dict[tuple[str | int, ...], Mistake] = {}
    for detail in error.errors():
        place, rule = _place(detail, tree), detail["msg"][0].lower() + detail["msg"][1:]
        before = found[place].rules if place in found else ()
        found[place] = Mistake(place, detail["type"], detail["input"], (*before, rule))
    inner = {place[:length] for place in found for length in range(len(place))}
    return [mistake for place, mistake in found.items() if place not in inner]


def _place(detail: Any, tree: Any) -> tuple[str | int, ...]:
    """Where an error is, without the names of the readings that pydantic tried."""
    place: list[str | int] = []
    for part in detail["loc"]:
        if part in tree if isinstance(tree, Mapping) else isinstance(tree, list | tuple) and isinstance(part, int):
            place.append(part)
            tree = tree[part]
    return (*place, detail["loc"][-1]) if detail["type"] == "missing" else tuple(place)


def explain(mistake: Mistake, model: type[BaseModel], what: str) -> str:
    """As fact, rule and remedy; `what` is what a file of this model is called."""
    if mistake.type == "extra_forbidden":
        known = _settings(model, mistake.place[:-1])
        near = difflib.get_close_matches(str(mistake.place[-1]), known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
        return f"{mistake.where} is no setting of a {what}.\n  {hint}"
    if mistake.type == "missing":
        return f"{mistake.where} is missing.\n  A {what} needs it."
    return str(mistake)


def _settings(model: type[BaseModel], places: Sequence[Any]) -> list[str]:
    """The settings of the table at this place."""
    for place in places:
        field = model.model_fields.get(str(place))
        model = next(_models(field.annotation), model) if field is not None else model
    return list(model.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation names, e.g. in list[Model] or Model | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)
