"""Sharded checkpoints: write beside training, commit, verify, find the newest intact one, load, prune.

    RUN/checkpoints/step-00000040/    manifest.json, .metadata and __0_0.distcp, __1_0.distcp, … of torch DCP

`files` knows names, manifest, verification and retention and needs no torch; `saving` writes what training holds, and
`loading` reads it back at any world size and sharding. These two import torch, so they are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from trainer.checkpoint.files import (
    FORMAT,
    MANIFEST,
    Saved,
    committed,
    directory,
    newest_intact,
    open_saved,
    prune,
    read_manifest,
    refuse_newer,
    unlisted,
    verify,
)

if TYPE_CHECKING:
    from trainer.checkpoint.loading import load, restore
    from trainer.checkpoint.saving import Saver

_LATE = {"Saver": "saving", "load": "loading", "restore": "loading"}
__all__ = ["FORMAT", "MANIFEST", "Saved", "Saver", "committed", "directory", "load", "newest_intact", "open_saved",
           "prune", "read_manifest", "refuse_newer", "restore", "unlisted", "verify"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(f"trainer.checkpoint.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
