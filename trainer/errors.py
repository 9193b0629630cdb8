"""The exception tree: every error a user can cause states fact, rule and remedy.

The command line prints `str(error)` and leaves with `error.exit_status`; a traceback means a bug of ours.
"""

import errno
import os
from collections.abc import Sequence

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: try the same command again
EXIT_QUARANTINED = 76  # a node must be taken out of the job before the same command is given again


_MEANING = {
    errno.EACCES: "Its mode, or that of a folder above it, keeps this user out.",
    errno.EPERM: "The system keeps this user from doing it.",
    errno.ENAMETOOLONG: "No file system takes a name of that length.",
    errno.ENOSPC: "The disk is full.",
    errno.EDQUOT: "The quota of this user or project is used up.",
    errno.EROFS: "Its file system is mounted read-only.",
    errno.EIO: "The disk or its connection fails.",
    errno.ESTALE: "The file server no longer knows it.",
    errno.ELOOP: "It is a link where none is followed, or links lead in a circle.",
    errno.EMFILE: "This process may open no more files (ulimit -n).",
    errno.ENOSYS: "Its file system may lack what toprope needs: locks, or making the names in a folder durable.",
    errno.ENOLCK: "Its file system gives no locks.",
    errno.ENXIO: "A pipe or a device can be neither read twice nor replaced.",
}
for _same in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
    _MEANING[_same] = _MEANING[errno.ENOSYS]


def of_system(error: OSError, fact: str, rule: str, remedy: str) -> str:
    """Return the message for what the operating system refuses: `fact` ("X cannot be written"), its reason, remedy."""
    where = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
    return f"{fact}: {error.strerror or error}{where}.\n  {' '.join(filter(None, (meaning(error), rule, remedy)))}"


def meaning(error: OSError) -> str:
    """Return a sentence that explains what the operating system says; empty where its own words are plain."""
    return _MEANING.get(error.errno or 0, "")


class TopropeError(Exception):
    """Base of all errors meant for the user's eyes."""

    exit_status = EXIT_FAILED
    restart = False
    """True if the job may start again at once: the error need not be repeated."""


class UsageError(TopropeError):
    """An error that the user can repair before any work starts."""

    exit_status = EXIT_USAGE


class ConfigError(UsageError):
    """One or more settings are wrong; all of them are reported at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[Sequence[str]]]:
        """Pickle by `problems`: an error of one rank is raised on all."""
        return type(self), (self.problems,)


class CorpusError(UsageError):
    """The text cannot be read, is empty, or its splits are not what training needs."""


class TokenizerError(UsageError):
    """A tokenizer cannot be loaded or does not fit the store or the model."""


class RunDirectoryError(UsageError):
    """The run directory is unwritable, is not a run, or belongs to another run."""


class WorldError(UsageError):
    """The ranks, devices or mesh do not fit the config."""


class FitError(UsageError):
    """The runs do not determine what is asked of them: too few rungs, or a loss that does not fall with compute."""


class CheckpointError(TopropeError):
    """A checkpoint cannot be written, or none that exists is intact."""


class NoCheckpointError(CheckpointError, UsageError):
    """The given path is no checkpoint."""


class NewerFormatError(CheckpointError, UsageError):
    """A checkpoint was written by a newer toprope: nothing is wrong with it, but this one cannot read it."""


class OutOfMemoryError(TopropeError):
    """The device has no memory left for what a step needs."""

    def __init__(self, message: str, restart: bool = False) -> None:
        super().__init__(message)
        self.restart = restart
        """True if there was enough before: something else may have taken it."""


class CorruptionError(TopropeError):
    """Ranks disagree on bits that must be equal: one of them computes, receives or keeps wrong ones."""

    def __init__(self, message: str, restart: bool = False) -> None:
        super().__init__(message)
        self.restart = restart
        """True if the job may start again at once: the wrong bits were in memory only."""


class QuarantineError(CorruptionError):
    """A rank of this node was wrong twice: the job must go on without the node."""

    exit_status = EXIT_QUARANTINED


class NumericsError(TopropeError):
    """Loss or gradient is not finite and stays so when computed again."""
