"""Code of the user's own, imported: the object that a name such as "my_gpt.py:MyGPT" stands for, and its errors."""

import functools
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from trainer import own_code
from trainer.errors import ConfigError
from trainer.own_code import Place


def load(name: str, setting: str) -> tuple[Place, object]:
    """Return where the object that `setting` names is, and the object. Raises ConfigError if it cannot be imported."""
    place = own_code.find(name, setting)
    return place, _load(place, tuple(own_code.digests(name, setting).items()))


@functools.cache
def _load(place: Place, _digests: tuple[tuple[str, str], ...]) -> object:
    """Import the file and return the object. The digests are there so that an edited file is loaded again."""
    files = own_code.files(place)
    # Forget what came from such a folder: another file's helper.py, or one that has been edited since.
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
            if place.root.name not in own_code.INSTALLED:  # torch, say, must not be imported twice
                _loaded.add(name)
            if (other := _file_of(sys.modules[name])) not in (path, None):
                raise ConfigError([f"{path} is hidden by {other}, which has the same name.\n  Rename the file."])
    if not hasattr(module, place.name):
        raise ConfigError([f"{place.path} has no {place.name}.\n  {own_code.form(place.setting)}"])
    return getattr(module, place.name)


_loaded: set[str] = set()
"""Names of modules that came from the folder of such a file."""


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
    return ConfigError([f"{place.where} {what}: {type(error).__name__}: {text}{at}\n  Correct the {place.kind}."])
