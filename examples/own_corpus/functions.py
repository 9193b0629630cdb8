"""Documents of one's own: the functions of this Python's `email` package, one a document, without their comments."""

import ast
import email
from collections.abc import Iterator
from pathlib import Path


def documents() -> Iterator[tuple[str, str]]:
    for path in sorted(Path(email.__file__).parent.glob("*.py")):  # in an order that is the same everywhere
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.name}:{node.name}", ast.unparse(node)
