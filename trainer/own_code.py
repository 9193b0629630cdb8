"""Code of the user's own that a config names: where it is, and a digest of each of its functions. Nothing is run.

Names are "my_gpt.py:MyGPT" (a file) or "package.module:Class" (importable). What the file imports from its own folder
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
FORM = 'Write "my_gpt.py:MyGPT", a file and the class in it, or "package.module:MyGPT".'


@dataclass(frozen=True)
class Place:
    """The file of a class, and the folder from which it imports what is its own."""

    path: Path
    class_name: str
    root: Path
    module: str
    """Name to import it by; empty for a file."""

    @property
    def where(self) -> str:
        return f"{self.path}:{self.class_name}"


def anchored(name: str, folder: Path) -> str:
    """Return the name with the path of its file, if it names one, taken from `folder` and made absolute."""
    file, colon, class_name = name.rpartition(":")
    return f"{(folder / file).resolve()}{colon}{class_name}" if file.endswith(".py") else name


def find(name: str) -> Place:
    """Return the place of a class. Raises ConfigError if there is no such file or module, or no class in it."""
    file, _, class_name = name.rpartition(":")
    if not file or not class_name.isidentifier():
        raise ConfigError([f"model.class = {json.dumps(name)} names no class.\n  {FORM}"])
    if file.endswith(".py"):
        place = Place(Path(file).resolve(), class_name, Path(file).resolve().parent, "")
    else:
        place = _importable(name, file, class_name)
    bound = set(_bound(parse(place.path).body))
    if class_name not in bound and "*" not in bound:
        near = difflib.get_close_matches(class_name, bound, n=1, cutoff=0.3)
        hint = f"Did you mean {near[0]}?" if near else f"It defines {', '.join(sorted(bound)) or 'nothing'}."
        raise ConfigError([f"model.class = {json.dumps(name)}: {place.path} has no {class_name}.\n  {hint}"])
    return place


def _importable(name: str, module: str, class_name: str) -> Place:
    try:
        spec = importlib.util.find_spec(module)
        why = "no such module can be imported" if spec is None else "it is no file of Python source"
    except Exception as error:  # the packages above it are imported, and may do anything
        spec, why = None, f"{type(error).__name__}: {error}"
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ConfigError([f"model.class = {json.dumps(name)}: {why}.\n  {FORM}"])
    path = Path(spec.origin).resolve()
    levels = module.count(".") + (path.name == "__init__.py")
    return Place(path, class_name, path.parents[levels], module)


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


def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file. Raises ConfigError, with the line of a syntax error."""
    try:
        return ast.parse(path.read_bytes())
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.py")], n=1)
        hint = f"Did you mean {near[0]}?" if near else "In a config, the path starts from the config's folder."
        raise ConfigError([f"{path}, the file of model.class, does not exist.\n  {hint}"]) from None
    except OSError as error:
        raise ConfigError([of_system(error, f"{path} cannot be read", FORM, "")]) from None
    except SyntaxError as error:
        line = f"\n    {error.text.rstrip()}" if error.text else ""
        raise ConfigError([f"{path}, line {error.lineno}: {error.msg}.{line}\n  Correct the syntax."]) from None
    except ValueError as error:
        raise ConfigError([f"{path} is no Python source: {error}.\n  {FORM}"]) from None


def files(place: Place) -> dict[str, Path]:
    """Return the file of the class and all that it imports, directly or not, from its own folder, by relative name."""
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
            is_of_others = root.name in ("site-packages", "dist-packages") and parts[0] != own
            if base == root and (parts[0] == "trainer" or is_of_others):
                continue  # toprope has its own record; what is installed beside the model is not its own
            for length in range(1, len(parts) + 1):
                stem = base.joinpath(*parts[:length])
                beside = (stem.with_suffix(".py"), stem / "__init__.py")
                yield from (file for file in beside if file.is_file() and file.is_relative_to(root))


def digests(name: str) -> dict[str, str]:
    """Return a digest of each function of the class's files, and of what is outside of them. Raises ConfigError."""
    place = find(name)
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
