"""TOML files: read as a tree or as a strict model, and values written back."""

import difflib
import json
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
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
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} cannot be read: {error}."]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path} is not valid TOML: {error}."]) from None


def read_as(path: Path, model: type[M], what: str) -> M:
    """A file as a strict model; `what` is what such a file is called. Raises ConfigError with all problems at once."""
    tree = read(path)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = (_explain(path, model, what, detail) for detail in error.errors())
        raise ConfigError(list(dict.fromkeys(problems))) from None


def text(value: Any) -> str:
    """A value as TOML, in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(text, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def lines(table: Mapping[str, Any]) -> list[str]:
    """key = value for each of a table's."""
    return [f"{key} = {text(value)}" for key, value in table.items()]


def _explain(path: Path, model: type[BaseModel], what: str, detail: Any) -> str:
    """One pydantic error as fact, rule and remedy."""
    places = [part for part in detail["loc"] if not isinstance(part, str) or re.fullmatch(r"[a-z_]+", part)]
    where = ".".join(str(part) for part in places)
    if detail["type"] == "extra_forbidden":
        known = _settings(model, places[:-1])
        near = difflib.get_close_matches(str(places[-1]), known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
        return f"{path}: {where} is no setting of a {what}.\n  {hint}"
    if detail["type"] == "missing":
        return f"{path}: {where} is missing.\n  A {what} needs it."
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{path}: {where} = {json.dumps(detail['input'], default=str)}: {message}."


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
