"""Code of the user's own that a config names: where it is, and a digest of each of its functions. Nothing is run.

Names are "my_gpt.py:MyGPT" (a file) or "package.module:MyGPT" (importable). What the file imports from its own folder
belongs to it. Digests are of the syntax tree: comments, docstrings and formatting do not count.
"""

import ast
import difflib
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ConfigError, of_system

OUTSIDE = "(outside of functions)"
INSTALLED = ("site-packages", "dist-packages")
_DOORS = {
    "model.class": ("model", "class", "my_gpt.py", "MyGPT"),
    "optim.class": ("optimizer", "class", "my_opt.py", "MyOptimizer"),
    "data.source": ("source", "function", "my_corpus.py", "documents"),
}
SETTINGS = tuple(_DOORS)
"""Keys of a config that may name code."""


def form(setting: str) -> str:
    """Return a sentence that says how `setting` names code."""
    _, noun, file, name = _DOORS[setting]
    return f'Write "{file}:{name}", a file and the {noun} in it, or "package.module:{name}".'


@dataclass(frozen=True)
class Place:
    """The file of a class or function, and the folder from which it imports what is its own."""

    path: Path
    name: str
    """Name of the class or function."""
    root: Path
    module: str
    """Name to import it by; empty for a file."""
    setting: str
    """Key of the config that names it."""

    @property
    def where(self) -> str:
        return f"{self.path}:{self.name}"

    @property
    def kind(self) -> str:
        """ "model", "optimizer" or "source"."""
        return _DOORS[self.setting][0]


def is_own_source(source: str) -> bool:
    """True if a `data.source` names a function: "my_corpus.py:documents" or "package.module:documents"."""
    file, _, function = source.rpartition(":")
    is_module = file != "hub" and bool(file) and all(part.isidentifier() for part in file.split("."))
    return function.isidentifier() and (file.endswith(".py") or is_module) and not Path(source).exists()


def anchored(name: str, folder: Path) -> str:
    """Return the name with the path of its file, if it names one, taken from `folder` and made absolute."""
    file, colon, wanted = name.rpartition(":")
    return f"{(folder / file).resolve()}{colon}{wanted}" if file.endswith(".py") else name


def find(name: str, setting: str = "model.class") -> Place:
    """Return the place of what `setting` names. Raises ConfigError if no such file, module or name is there."""
    given = f"{setting} = {json.dumps(name)}"
    file, _, wanted = name.rpartition(":")
    if not file or not wanted.isidentifier():
        raise ConfigError([f"{given} names no {_DOORS[setting][1]}.\n  {form(setting)}"])
    if file.endswith(".py"):
        place = Place(Path(file).resolve(), wanted, Path(file).resolve().parent, "", setting)
    else:
        place = _importable(given, file, wanted, setting)
    bound = set(_bound(parse(place.path, setting).body))
    if wanted not in bound and "*" not in bound:
        near = difflib.get_close_matches(wanted, bound, n=1, cutoff=0.3)
        hint = f"Did you mean {near[0]}?" if near else f"It defines {', '.join(sorted(bound)) or 'nothing'}."
        raise ConfigError([f"{given}: {place.path} has no {wanted}.\n  {hint}"])
    return place


def _importable(given: str, module: str, wanted: str, setting: str) -> Place:
    try:
        spec = importlib.util.find_spec(module)
        why = "no such module can be imported" if spec is None else "it is no file of Python source"
    except Exception as error:  # the packages above it are imported, and may do anything
        spec, why = None, f"{type(error).__name__}: {error}"
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ConfigError([f"{given}: {why}.\n  {form(setting)}"])
    path = Path(spec.origin).resolve()
    levels = module.count(".") + (path.name == "__init__.py")
    return Place(path, wanted, path.parents[levels], module, setting)


def _bound(statements: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that the statements of a module bind; "*" where that is not known."""
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom | ast.Import):
                yield from (alias.asname or alias.name for alias in node.names)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            yield statement.name


def parse(path: Path, setting: str = "model.class") -> ast.Module:
    """Return the syntax tree of a file. Raises ConfigError, with the line of a syntax error."""
    try:
        return ast.parse(path.read_bytes())
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.py")], n=1)
        hint = f"Did you mean {near[0]}?" if near else "In a config, the path starts from the config's folder."
        raise ConfigError([f"{path}, the file of {setting}, does not exist.\n  {hint}"]) from None
    except OSError as error:
        raise ConfigError([of_system(error, f"{path} cannot be read", form(setting), "")]) from None
    except SyntaxError as error:
        line = f"\n    {error.text.rstrip()}" if error.text else ""
        raise ConfigError([f"{path}, line {error.lineno}: {error.msg}.{line}\n  Correct the syntax."]) from None
    except ValueError as error:
        raise ConfigError([f"{path} is no Python source: {error}.\n  {form(setting)}"]) from None


def files(place: Place) -> dict[str, Path]:
    """Return the file itself and all that it imports, directly or not, from its own folder, by relative name."""
    found: dict[str, Path] = {}
    waiting = [place.path]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(place.root).as_posix()
        if name not in found:
            found[name] = path
            waiting += _imported(path, place.root)
            packages = [above / "__init__.py" for above in path.parents if place.root in above.parents]
            waiting += [file for file in packages if file.is_file()]  # they run before it
    return dict(sorted(found.items()))


def _imported(path: Path, root: Path) -> Iterator[Path]:
    own = path.relative_to(root).parts[0].removesuffix(".py")
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            modules, base = [alias.name for alias in node.names], root
        elif isinstance(node, ast.ImportFrom):
            above = f"{node.module}." if node.module else ""
            modules = [f"{above}{alias.name}" for alias in node.names]
            base = path.parents[node.level - 1] if node.level else root
        else:
            continue
        for module in modules:
            parts = module.split(".")
            is_of_others = root.name in INSTALLED and parts[0] != own
            if base == root and (parts[0] in ("trainer", "torch") or is_of_others):
                continue  # they have records of their own; what is installed beside it is not its own
            for length in range(1, len(parts) + 1):
                stem = base.joinpath(*parts[:length])
                beside = (stem.with_suffix(".py"), stem / "__init__.py")
                yield from (file for file in beside if file.is_file() and file.is_relative_to(root))


def digests(name: str, setting: str = "model.class") -> dict[str, str]:
    """Return a digest of each function of the files of `name`, and of what is outside of them. Raises ConfigError."""
    place = find(name, setting)
    return {
        f"{file} {function}": digest
        for file, path in files(place).items()
        for function, digest in digests_of(parse(path)).items()
    }


def digests_of(module: ast.Module, chosen: tuple[str, ...] = ()) -> dict[str, str]:
    """Return {name: digest} of the functions, methods and classes of a module, all or the chosen ones."""
    parts: dict[str, list[str]] = {}
    for statement in module.body:
        name = getattr(statement, "name", OUTSIDE)
        if chosen and name not in chosen:
            continue
        if isinstance(statement, ast.ClassDef):
            methods = [part for part in statement.body if isinstance(part, ast.FunctionDef)]
            statement.body = [part for part in statement.body if part not in methods]
            for method in methods:  # a property's getter and setter share a name
                parts.setdefault(f"{name}.{method.name}", []).append(_canonical(method))
        parts.setdefault(name, []).append(_canonical(statement))
    return {name: digest_of(sorted(texts)) for name, texts in parts.items()}


def _canonical(node: object) -> str:
    """Write a syntax tree without places, docstrings and what is empty, which newer versions of Python add to."""
    if isinstance(node, ast.AST):
        fields = [f"{name}={_canonical(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
        return f"{type(node).__name__}({' '.join(fields)})"
    if isinstance(node, list):
        is_text = [isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) for part in node]
        return f"[{' '.join(_canonical(part) for part, skip in zip(node, is_text, strict=True) if not skip)}]"
    return repr(node)


def digest_of(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
