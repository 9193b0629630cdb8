"""Configs that come with the package: found by name from any directory, and copied for a start of one's own.

trainer/configs is the repository's configs/ by a link, and a folder of the installed package: one rule for both.
"""

import os
from pathlib import Path

from trainer import files
from trainer.errors import ConfigError, UsageError

PACKAGE = Path(__file__).resolve().parent
ROOT = Path(os.environ.get("TOPROPE_CHECKOUT") or PACKAGE.parent)
"""The checkout, if there is one. It is named to a changed copy of the package, which lies elsewhere (plan/code.py)."""
IN_CHECKOUT = (ROOT / "pyproject.toml").is_file()
"""True in a checkout of the repository, False in an installed package."""
CONFIGS = Path(__file__).parent / "configs"
STARTER = "starter"


def names(folder: str = "") -> list[str]:
    """Names of the built-in configs in a folder of configs/ ("chaos", "ladders", …), sorted."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.toml"))


def find(name: Path, folder: str = "") -> Path:
    """Return the file that a command's argument means: a file here, or the built-in config of that name.

    A built-in name has no folder and no ending: "smoke". Raises ConfigError if it is neither.
    """
    if name.suffix or len(name.parts) != 1 or files.exists(name):
        return name
    known = names(folder)
    if name.name in known:
        return CONFIGS / folder / f"{name}.toml"
    raise ConfigError(
        [f"{name} is neither a file here nor a built-in config.\n  Write a path, or one of {', '.join(known)}."]
    )


def start(directory: Path, schema: str) -> list[Path]:
    """Copy configs/starter/ into a directory, and write a config's JSON schema beside it; return the files.

    Raises UsageError if one of them is there already; then nothing has been written.
    """
    contents = {path.name: files.read(path) for path in sorted((CONFIGS / STARTER).iterdir())}
    contents["config.schema.json"] = schema.encode()
    if there := [name for name in contents if files.exists(directory / name)]:
        raise UsageError(
            f"{directory} holds {', '.join(there)} already.\n  Nothing is overwritten. Name another directory."
        )
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        files.write(directory / name, content)
    return [directory / name for name in contents]
