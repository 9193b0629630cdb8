"""TOML files: read as a tree or as a strict model, overridden by `--set`, and values written back."""

import copy
import difflib
import json
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trainer import files
from trainer.errors import ConfigError, of_system

READY = "`python -m trainer init DIR` writes a config, a ladder and a campaign to start from."
M = TypeVar("M", bound=BaseModel)


def read(path: Path) -> dict[str, Any]:
    """Read a file of settings as a tree. Raises ConfigError; for a missing file it names the nearest one."""
    try:
        tree = tomllib.loads(files.read(path).decode())
        copy.deepcopy(tree)  # keys like a.b.c make tables deeper than anybody can walk through
        return tree
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f"Did you mean {path.parent / near[0]}?" if near else READY
        raise ConfigError([f"{path} does not exist.\n  {hint}"]) from None
    except IsADirectoryError:
        inside = ", ".join(sorted(p.name for p in path.glob("*.toml"))) or f"none here. {READY}"
        raise ConfigError([f"{path} is a directory.\n  Name one TOML file ({inside})."]) from None
    except OSError as error:
        raise ConfigError([of_system(error, f"{path} cannot be read", "", "Name a TOML file.")]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is no text: {error}.\n  TOML is written in UTF-8."]) from None
    except (ValueError, RecursionError) as error:  # beside tomllib's own: numbers of thousands of digits, deep nesting
        rule = "A setting is a line KEY = VALUE below its [section]; configs/ has examples."
        raise ConfigError([f"{path} is not valid TOML: {error}.\n  {rule}"]) from None


def read_as(path: Path, model: type[M], what: str) -> M:
    """Read a file as a strict model; `what` names its sort. Raises ConfigError with all problems at once."""
    tree = read(path)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = [f"{path}: {explain(mistake, model, what)}" for mistake in mistakes(error, tree)]
    raise ConfigError(problems)


def read_extended(
    path: Path, anchored: Callable[[dict[str, Any], Path], dict[str, Any]] = lambda tree, _folder: tree
) -> dict[str, Any]:
    """Read a file and, below it, the one that its `extends` names. Raises ConfigError.

    `anchored(tree, folder)` turns the paths in a file's tree, which start from its folder, into absolute ones.
    """
    tree = anchored(read(path), path.parent)
    base_name = tree.pop("extends", None)
    if base_name is None:
        return tree
    if not isinstance(base_name, str):
        raise ConfigError([f'{path}: extends = {base_name!r} is no path.\n  Write extends = "other.toml".'])
    base_path = path.parent / base_name
    base = anchored(read(base_path), base_path.parent)
    if "extends" in base:
        raise ConfigError(
            [
                f"{path} extends {base_name}, which extends {base['extends']}.\n"
                "  One level is allowed, so that a config can be read at a glance. "
                f"Extend {base['extends']} directly and repeat what {base_name} sets."
            ]
        )
    return _merge(base, tree)


def override(tree: dict[str, Any], setting: str, model: type[BaseModel]) -> list[str]:
    """Put `setting`, KEY=VALUE as in `--set`, into a tree of `model`. Returns the problem, if there is one."""
    key, equals, value = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        return [f"--set {setting!r} has no value.\n  Write --set key=value, e.g. --set optim.learning_rate=3e-4."]
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = _bare_text(key, value.strip(), model)
    if parsed is None:
        quoted = f"'{key}=\"{value.strip()}\"'"
        return [
            f"--set {setting}: the right side is not TOML.\n  Text needs quotes that the shell keeps: --set {quoted}."
        ]
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            return [f"--set {setting}: {section} is a value, not a section.\n  Set it whole: --set {section}=…"]
    node[name] = parsed
    return []


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _bare_text(key: str, value: str, model: type[BaseModel]) -> str | None:
    """Return `value` if the setting takes nothing but text: a shell removes the quotes of strategy="fsdp"."""
    if not value or value[0] in "\"'":  # an empty shell variable, or a quote that is never closed
        return None
    annotation: Any = model
    for name in key.split("."):
        fields = getattr(annotation, "model_fields", {})
        field = next((field for key, field in fields.items() if (field.alias or key) == name), None)
        if field is None and fields:
            return value  # an unknown setting: the model refuses it, and names the nearest
        annotation = (
            field.annotation if field else next(iter(typing.get_args(annotation)[1:]), None)
        )  # of dict[str, str]: str
    return value if annotation is str or typing.get_origin(annotation) is typing.Literal else None


def tuples(value: Any) -> Any:
    """Return a tree with tuples in place of TOML's arrays: strict models take no lists for them."""
    if isinstance(value, Mapping):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list | tuple) else value


def text(value: Any) -> str:
    """Return a value as TOML, in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{text(str(key))} = {text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(text, value)) + "]"
    if isinstance(value, float):
        return repr(value)  # TOML writes nan and inf as Python does, and JSON does not
    return json.dumps(value, ensure_ascii=False)  # TOML has no surrogates


def lines(table: Mapping[str, Any]) -> list[str]:
    """Return a line "key = value" for each key of a table."""
    return [f"{key} = {text(value)}" for key, value in table.items()]


@dataclass(frozen=True)
class Mistake:
    """A wrong value at one place of a tree of settings."""

    place: tuple[str | int, ...]
    type: str
    """Pydantic's name for the sort of error."""
    input: Any
    rules: tuple[str, ...]
    """Alternatives: one of them would have to hold."""

    @property
    def where(self) -> str:
        """The place as people write it: faults[0].rank."""
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.place).removeprefix(".")

    @property
    def rule(self) -> str:
        return " or ".join([self.rules[0], *(rule.removeprefix("input should be ") for rule in self.rules[1:])])

    def __str__(self) -> str:
        rule = self.rule[0].upper() + self.rule[1:]
        return f"{self.where} = {json.dumps(self.input, default=str)} does not fit.\n  {rule}."


def mistakes(error: ValidationError, tree: Mapping[str, Any]) -> list[Mistake]:
    """Return one mistake for each place, however many alternatives pydantic tried and failed there."""
    found: dict[tuple[str | int, ...], Mistake] = {}
    for detail in error.errors():
        place, rule = _place(detail, tree), detail["msg"][0].lower() + detail["msg"][1:]
        before = found[place].rules if place in found else ()
        found[place] = Mistake(place, detail["type"], detail["input"], (*before, rule))
    # A table is also wrong if something in it is: only the innermost places are reported.
    outer = {place[:length] for place in found for length in range(len(place))}
    return [mistake for place, mistake in found.items() if place not in outer]


def _place(detail: Any, tree: Any) -> tuple[str | int, ...]:
    """Return where an error is, without the names of alternatives that pydantic puts between the keys."""
    place: list[str | int] = []
    # A part of pydantic's path counts only if the tree has it there; others name an alternative of a union.
    for part in detail["loc"]:
        if part in tree if isinstance(tree, Mapping) else isinstance(tree, list | tuple) and isinstance(part, int):
            place.append(part)
            tree = tree[part]
    return (*place, detail["loc"][-1]) if detail["type"] == "missing" else tuple(place)


def explain(mistake: Mistake, model: type[BaseModel], what: str) -> str:
    """Return a mistake as fact, rule and remedy; `what` names the sort of file that `model` describes."""
    if mistake.type == "extra_forbidden":
        known = _settings(model, mistake.place[:-1])
        near = difflib.get_close_matches(str(mistake.place[-1]), known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
        return f"{mistake.where} is no setting of a {what}.\n  {hint}"
    if mistake.type == "missing":
        return f"{mistake.where} is missing.\n  A {what} needs it."
    return str(mistake)


def _settings(model: type[BaseModel], places: Sequence[Any]) -> list[str]:
    """Return the settings of the table at this place."""
    for place in places:
        field = model.model_fields.get(str(place))
        model = next(_models(field.annotation), model) if field is not None else model
    return list(model.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in an annotation such as list[Model] or Model | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)
