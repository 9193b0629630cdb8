"""toprope: a miniature fault-tolerant distributed pretraining framework.

A run is a pure function of its config: faults, restarts, world size and sharding change when the
result arrives, never the result itself.

    import trainer

    run = trainer.train("smoke", "runs/smoke")
    run.losses(), run.evaluations(), run.incidents(), run.events()
    trainer.open_run("runs/gpt_tiny").summary()
    trainer.open_ladder("demo").run().report().verdicts()
    trainer.judge("results.csv").verdicts()

docs/api.md has the rest.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.api import Ladder, Report, Run, judge, open_ladder, open_run, train
    from trainer.config import Config

__all__ = ["Config", "Ladder", "Report", "Run", "judge", "open_ladder", "open_run", "train"]


def __getattr__(name: str) -> Any:
    """Load what is asked for: `import trainer` itself stays as quick as an empty package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("trainer.config" if name == "Config" else "trainer.api"), name)
