"""The Python API, as `import trainer` offers it: train a config, run a ladder, judge a table, and read all as records.

Records are lists of flat dicts: `pandas.DataFrame(run.losses())` makes a table of them. Reading needs no torch.
"""

import copy
import dataclasses
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import builtin, signals, torch_versions
from trainer import config as configs
from trainer.config import Config
from trainer.errors import UsageError
from trainer.log import events, rundir, summary

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run directory, read anew by every call: a run that is still training grows between two of them."""

    path: Path

    @property
    def config(self) -> Config:
        """The config that the run was last started with."""
        return rundir.config_of(self.path)

    @property
    def status(self) -> str:
        """ "running", "finished", "preempted" or "failed"."""
        return self.summary()["status"]

    def summary(self) -> dict[str, Any]:
        """Everything that `inspect --json` prints, except checkpoints and faults. Raises RunDirectoryError."""
        return summary.summarise(self.path)

    def events(self) -> list[Record]:
        """The whole log, in order: {event, attempt, rank, time, and the event's own fields}. Times are Unix seconds.

        Steps that were replayed appear once for each attempt. Raises RunDirectoryError if the log is damaged.
        """
        return [
            {"event": entry.event.kind, "attempt": entry.attempt, "rank": entry.rank, "time": entry.time}
            | dataclasses.asdict(entry.event)
            for entry in events.read(self.path)
        ]

    def losses(self) -> list[Record]:
        """{step, loss, learning_rate, grad_norm} of every step, once each. Losses are nats per token."""
        tree = self.summary()
        names = {"loss": "train", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}
        series = {name: dict(tree[key]) for name, key in names.items()}
        return [{"step": step} | {name: values[step] for name, values in series.items()} for step in series["loss"]]

    def evaluations(self) -> list[Record]:
        """{set, step, loss, bits_per_byte} of every evaluation. `bits_per_byte` is None where it is unknown."""
        return [
            {"set": name, "step": step, "loss": loss, "bits_per_byte": bits}
            for name, rows in self.summary()["eval"].items()
            for step, loss, bits in rows
        ]

    def incidents(self) -> list[Record]:
        """Return what went wrong or stopped the run, with its cost: the fields of trainer.log.incidents.Incident."""
        return self.summary()["incidents"]


@dataclass(frozen=True)
class Report:
    """Findings from runs about the arms of a ladder or a table."""

    tree: Record
    """All of it: report.json."""

    def verdicts(self) -> list[Record]:
        """{arm, decision, why, multiplier, low, high, target_flops} of every arm but the baseline.

        `decision` is "promote", "reject", "inconclusive", or "noise floor" for an arm without a change. `multiplier` is
        what the arm is worth in the baseline's compute at the target, with its interval; None where it is unknown.
        """
        from trainer.ladder.report.drawing import final

        judged = ((arm["name"], final(self.tree, arm["name"])) for arm in self.tree["arms"])
        return [
            {"arm": arm, "decision": found["decision"], "why": found["why"], "target_flops": found["target_flops"]}
            | {"multiplier": found["multiplier"]["value"]}
            | {"low": found["multiplier"]["low"], "high": found["multiplier"]["high"]}
            for arm, found in judged
            if found is not None
        ]


@dataclass(frozen=True)
class Ladder:
    """A ladder file and its folder of results."""

    path: Path
    out: Path

    def run(self, up_to: str | None = None) -> "Ladder":
        """Make the runs that are missing, up to the rung `up_to`, in processes of this machine; return the ladder.

        Ctrl-C or SIGTERM asks them to save and leaves; the same call continues. Raises what `ladder run` refuses.
        """
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("Ladder.run was called in another thread.\n  Call it in the main thread, or in a process.")
        from trainer.ladder import run

        run.run(self._load(), self.out, up_to=up_to)
        return self

    def runs(self) -> list[Record]:
        """{name, rung, arm, seed, status, …} of every run: what `ladder status --json` prints under "runs"."""
        from trainer.ladder import run, terminal

        ladder = self._load()
        return terminal.status_json(ladder, run.read_status(ladder, self.out))["runs"]

    def report(self) -> Report:
        """Read the runs, write OUT/report.html, report.json and pictures, and return what they show."""
        from trainer.ladder import report

        return Report(report.make(self._load(), self.out))

    def _load(self) -> Any:
        from trainer.ladder import preregistration
        from trainer.ladder.plan import load

        return preregistration.with_additions(load.load(self.path), self.out)


def open_ladder(path: str | Path, out: str | Path | None = None) -> Ladder:
    """Open a ladder: a file, or the name of a built-in one ("demo"). Its results go to `out`, by default
    runs/ladders/NAME, and its runs to `pool` beside it.

    Raises ConfigError naming every problem of the file. (`trainer.ladder` is the package that it is made of.)
    """
    from trainer.ladder import run
    from trainer.ladder.plan import load

    found = builtin.find(Path(path), "ladders")
    load.load(found)
    return Ladder(found, run.default_out(found) if out is None else Path(out))


def judge(
    table: str | Path, *, columns: Mapping[str, str] | None = None, baseline: str | None = None,
    criterion: str | Path | None = None, target_flops: float | None = None, more_is_better: bool | None = None,
    out: str | Path | None = None,
) -> Report:  # fmt: skip
    """Judge runs that were made elsewhere, as `python -m trainer judge TABLE` does; docs/judge.md has the columns.

    `columns` maps roles to columns, {"loss": "val_nll"}. With `out`, page, JSON and pictures are written there. Raises
    ConfigError naming all that is wrong with the table.
    """
    from trainer.ladder import judge as judging
    from trainer.ladder import report

    if out is not None:
        rundir.check_out(Path(out), "report.json")
    tree = judging.judge(
        str(table), columns=columns, baseline=baseline, target_flops=target_flops, more_is_better=more_is_better,
        criterion=judging.read_criterion(Path(criterion)) if criterion else None,
    )  # fmt: skip
    if out is not None:
        report.write(tree, Path(out))
    return Report(tree)


def open_run(path: str | Path) -> Run:
    """Open a run directory for reading. Raises RunDirectoryError if it is none."""
    rundir.read(Path(path))
    return Run(Path(path))


def train(
    config: Config | Mapping[str, Any] | str | Path,
    run: str | Path,
    *,
    accept_other_bits: bool = False,
    parent: str | Path = "",
) -> Run:
    """Train a config to its end, or resume it where it stopped, in this process; return the run.

    `config` is a Config, a mapping of its sections ({"budget": {"steps": 10}}), a file, or the name of a built-in
    config ("smoke"). SIGTERM or Ctrl-C saves and returns: then `status` is "preempted", and the same call resumes.
    `parent` is a run, or RUN@STEP, whose state a new run begins from (`train --from`). Under torchrun, call it on all
    ranks. Raises the TopropeErrors of `python -m trainer train`; UsageError outside the
    main thread, where Python takes no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("trainer.train was called in another thread.\n  Call it in the main thread, or in a process.")
    if isinstance(config, str | Path):
        config = configs.load(builtin.find(Path(config)))
    elif not isinstance(config, Config):
        config = configs.parse(configs.anchored(copy.deepcopy(dict(config)), Path()))
    torch_versions.check()
    from trainer import job  # late: it imports torch

    before = {number: signal.getsignal(number) for number in signals.ASKING}
    try:
        job.train(config, Path(run), time.time(), accept_other_bits=accept_other_bits, parent=str(parent))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return open_run(run)
