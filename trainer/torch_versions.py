"""The versions of torch that toprope works with; its patches of torch's inside, each probed before it is made.

Nothing here imports torch: its version is read from what is installed.
"""

import functools
import importlib.metadata
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from trainer.errors import UsageError

OLDEST = (2, 11)
NEWEST_TESTED = (2, 14)


def installed() -> str:
    """Version of torch with its local part, such as "2.13.0+cpu"; empty without torch."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def release(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu". Raises ValueError for text that is no version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"{version!r} is no version.")
    return int(found[1]), int(found[2])


def check(version: str | None = None) -> str:
    """Return a notice if torch is newer than all that were tested, else an empty text.

    Raises UsageError if it is absent or too old.
    """
    version = installed() if version is None else version
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST_TESTED))
    if not version:
        raise UsageError(f"torch is not installed.\n  toprope needs torch {oldest} to {newest}: pip install torch.")
    if release(version) < OLDEST:
        raise UsageError(
            f"torch {version} is too old: toprope needs {oldest} to {newest}.\n"
            "  Older ones lack parts that it calls. Install a newer torch, in an environment of its own if need be."
        )
    if release(version) > NEWEST_TESTED:
        return (
            f"torch {version} is newer than {newest}, the newest that toprope was tested with. What depends on torch's "
            "inside is probed, and left out with a line on stderr where it does not fit."
        )
    return ""


def misfit(parts: Mapping[str, int | None]) -> str:
    """Return the first part of torch that is not as a patch needs it, as a fact; empty if all fit.

    `parts` are names like "torch.module:Class.method", each with the number of positional arguments that it is called
    with; None for what is not called.
    """
    for name, arguments in parts.items():
        try:
            found = pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            return f"{name} is not there"
        if arguments is not None:
            try:
                inspect.signature(found).bind(*range(arguments))
            except (TypeError, ValueError):
                return f"{name} does not take {arguments} arguments"
    return ""


def patch(without: str, parts: Mapping[str, int | None]) -> Callable[[Callable[..., None]], Callable[..., bool]]:
    """Decorate a function that patches torch: it does nothing where a part of torch does not fit (`misfit`).

    Then it prints one line, which ends with what is lost (`without`). The function returns True if the patch was made.
    """

    def decorate(make: Callable[..., None]) -> Callable[..., bool]:
        @functools.wraps(make)
        def probe_then_make(*arguments: Any) -> bool:
            if reason := misfit(parts):
                print(f"toprope: in torch {installed()} {reason}: {without}", file=sys.stderr, flush=True)
                return False
            make(*arguments)
            return True

        return probe_then_make

    return decorate
