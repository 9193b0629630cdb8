"""Sharded checkpoints: write beside training, commit, verify, find the newest intact one, load, prune.

    RUN/checkpoints/step-00000040/    manifest.json, .metadata and __0_0.distcp, __1_0.distcp, … of torch DCP

`files` knows names, manifest, verification and retention and needs no torch; `saving` writes what training holds, and
`loading` reads it back at any world size and sharding, trusting nothing. The last two load torch when first used.
"""

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
    verify,
)

if TYPE_CHECKING:
    from trainer.checkpoint.loading import load, restore
    from trainer.checkpoint.saving import Saver

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Saved",
    "Saver",
    "committed",
    "directory",
    "load",
    "newest_intact",
    "open_saved",
    "prune",
    "read_manifest",
    "refuse_newer",
    "restore",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "Saver":
        from trainer.checkpoint.saving import Saver

        return Saver
    if name in ("load", "restore"):
        from trainer.checkpoint import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
