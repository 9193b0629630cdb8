"""A model of the user's own: loaded by name and constructed. docs/extending.md states the contract.

Optional on the model or its modules: `role` ("block", "embedding", "head", …: trainer/model.py) and
`initial_value(name, shape, generator)`, which returns a parameter's first values, or None for the usual ones.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer import config, own_code
from trainer.errors import ConfigError
from trainer.own_code import Place


class OwnModel(Protocol):
    """The contract of a model's class, which is also a `torch.nn.Module`."""

    def __init__(self, settings: config.Model, vocab_size: int, options: Mapping[str, Any]) -> None:
        """Make the parameters, all float32. `options` are the config's [model.options]."""

    def __call__(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return (objective, cross-entropy in nats per token), two float32 scalars; the first has the gradient."""
        ...


def construct(settings: config.Model, vocab_size: int) -> nn.Module:
    """Make the model that `model.class` names. Raises ConfigError if that cannot be done."""
    place = own_code.find(settings.class_)
    found = _load(place, tuple(own_code.digests(settings.class_).items()))
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError([f"{place.where} is no torch.nn.Module.\n  model.class names a class that derives from it."])
    arguments = (settings, vocab_size, dict(settings.options))
    try:
        inspect.signature(found).bind(*arguments)
    except TypeError as error:
        fact = f"{place.where} does not take what a model is made from: {error}."
        remedy = "It is called with three arguments: def __init__(self, settings, vocab_size, options)."
        raise ConfigError([f"{fact}\n  {remedy}"]) from None
    try:
        return found(*arguments)
    except Exception as error:
        raise failure(place, "cannot be constructed", error) from error


@functools.cache
def _load(place: Place, _digests: tuple[tuple[str, str], ...]) -> object:
    """Import the file and return the class. The digests are there so that an edited file is loaded again."""
    files = own_code.files(place)
    # Forget what came from a model's folder: another model's helper.py, or one that has been edited since.
    for name, _ in _module_names(files):
        if name in _loaded:
            sys.modules.pop(name, None)
    sys.path.insert(0, str(place.root))
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # its folder is the user's
    try:
        module = importlib.import_module(place.module) if place.module else _execute(place)
    except Exception as error:
        raise failure(place, "cannot be imported", error) from error
    finally:
        sys.dont_write_bytecode = before
        sys.path.remove(str(place.root))
        sys.path.append(str(place.root))  # for what is imported only when a function runs
    for name, path in _module_names(files):
        if name in sys.modules:
            _loaded.add(name)
            if (other := _file_of(sys.modules[name])) not in (path, None):
                raise ConfigError([f"{path} is hidden by {other}, which has the same name.\n  Rename the file."])
    if not hasattr(module, place.class_name):
        raise ConfigError([f"{place.path} has no {place.class_name}.\n  {own_code.FORM}"])
    return getattr(module, place.class_name)


_loaded: set[str] = set()
"""Names of modules that came from the folder of a model."""


def _execute(place: Place) -> ModuleType:
    name = f"own_{own_code.digest_of(str(place.path))}_{place.path.stem}"
    spec = importlib.util.spec_from_file_location(name, place.path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the compiler look there
    # From its text: a bytecode file may be of an edit within the same second.
    exec(compile(place.path.read_bytes(), str(place.path), "exec"), module.__dict__)
    return module


def _module_names(files: Mapping[str, Path]) -> list[tuple[str, Path]]:
    """Return each file with the name by which it is imported."""
    stems = {name.removesuffix(".py").removesuffix("/__init__"): path for name, path in files.items()}
    return [(stem.replace("/", "."), path) for stem, path in stems.items()]


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


def failure(place: Place, what: str, error: Exception) -> ConfigError:
    """Return an exception of the user's code as an error that names its line."""
    own = set(own_code.files(place).values())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() in own]
    at = f"\n    {Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line}" if frames else ""
    text = str(error).strip().split("\n")[0]
    return ConfigError([f"{place.where} {what}: {type(error).__name__}: {text}{at}\n  Correct the model."])


def initial_value(model: nn.Module, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
    """Return the first values that the model declares for a parameter, or None. Raises ConfigError."""
    declared = getattr(model, "initial_value", None)
    value = None if declared is None else declared(name, shape, generator)
    if value is not None and (not isinstance(value, Tensor) or value.shape != shape):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        fact = f"initial_value of parameter {name} returned {got}, and its shape is {tuple(shape)}."
        raise ConfigError([f"{fact}\n  Return a tensor of the shape it is given, or None."])
    return value
