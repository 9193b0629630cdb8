"""A run in TensorBoard: RUN/tensorboard, written by the helper that shows the run in W&B."""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.errors import ConfigError


def check(config: Config) -> None:
    """Raise ConfigError if the config asks for TensorBoard and its package is not there."""
    if config.tensorboard.on and importlib.util.find_spec("tensorboard") is None:
        remedy = "Install it, pip install 'toprope[tensorboard]', or set tensorboard.on = false."
        raise ConfigError([f"tensorboard.on = true, but the package tensorboard is not installed.\n  {remedy}"])


class TensorboardRun:
    """One attempt of a run, with as much of a W&B run's interface as is used. Numbers alone are shown.

    Each attempt is a run of its own in TensorBoard, so that steps that were replayed do not cross out earlier ones.
    """

    step = 0
    """Rows need no numbers here."""

    def __init__(self, run: Path, attempt: int) -> None:
        # Not torch.utils.tensorboard, which writes the same files: importing torch takes a helper seconds.
        writer = importlib.import_module("tensorboard.summary").Writer
        self._writer: Any = writer(str(run / "tensorboard" / f"attempt-{attempt:04d}"))
        self._last = 0
        self.summary: dict[str, Any] = {}

    def log(self, row: Mapping[str, Any], step: int, commit: bool) -> None:
        """Draw the numbers of a row over its own step; a row without one stands where the last one does."""
        self._last = row.get("step", self._last)
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, self._last)
        self._writer.flush()

    def alert(self, **_: Any) -> None:
        """Do nothing: the curve run/incidents shows that there was one."""

    def mark_preempting(self) -> None:
        """Do nothing: only a service can know that a run will go on."""

    def finish(self, exit_status: int) -> None:
        self._writer.close()
