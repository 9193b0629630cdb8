"""The exception tree: every error a user can cause states fact, rule and remedy.

The command line prints `str(error)` and leaves with `error.exit_status`; a traceback means a bug of ours.
"""

from collections.abc import Sequence

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: try the same command again


class TopropeError(Exception):
    """Base of all errors meant for the user's eyes."""

    exit_status = EXIT_FAILED


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


class NumericsError(TopropeError):
    """Loss or gradient is not finite and stays so when computed again."""
