"""The ladder's own run in W&B, in one group with its runs: the report's tables and pictures.

It follows the rules of a run: online only if a key is known, disabled if the ladder's runs are. It lives in a process
of its own that is ended when it takes too long, because a report does not wait for a network.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.ladder.plan.ladder import Ladder
from trainer.ladder.report.drawing import final
from trainer.ladder.report.estimates import Tree
from trainer.ladder.report.page import Picture
from trainer.show import units
from trainer.show.wandb import helper_command, open_run, wandb_mode

TIMEOUT_SECONDS = 60.0
"""Maximum time that W&B may take for the whole message."""


def send(
    ladder: Ladder, tree: Tree, drawn: Sequence[Picture], out: Path, on_problem: Callable[[str], None]
) -> None:  # fmt: skip
    """Show the report in W&B. A failure is reported to `on_problem` and changes nothing else."""
    if not ladder.runs:
        return
    config = ladder.runs[0].config
    mode = wandb_mode(config)
    if mode == "disabled":
        return
    first = tree.get("course", {}).get("first_planned")
    message = {
        "init": {
            # Every report of this ladder goes into the same run.
            "id": hashlib.sha256(f"{ladder.name} {first}".encode()).hexdigest()[:16],
            "name": f"ladder {ladder.name}", "mode": mode, "dir": str(out.resolve()), "project": config.wandb.project,
            "entity": config.wandb.entity or None, "group": config.wandb.group, "tags": ["ladder"],
            "job_type": "report",
            "config": {key: tree[key] for key in ("name", "question", "metric", "unit", "criterion", "target", "arms")},
        },
        "summary": summary(tree), "tables": tables(tree),
        "pictures": {picture.name: str(out.resolve() / f"{picture.name}.png") for picture in drawn},
    }  # fmt: skip
    (out / "wandb").mkdir(exist_ok=True)  # if it cannot write there, W&B moves to /tmp silently
    if problem := _deliver(message):
        on_problem(f"W&B has no summary of this ladder: {problem}. The report is in {out}.")


def summary(tree: Tree) -> dict[str, Any]:
    """Return the values that W&B lists for the run."""
    values = {"flops": tree["flops"] + tree["sweep_flops"], **{f"runs/{k}": n for k, n in tree["counts"].items()}}
    for verdict in _verdicts(tree):
        values[f"{verdict['arm']}/decision"] = verdict["decision"]
        for key in ("value", "low", "high"):
            values[f"{verdict['arm']}/multiplier_{key}"] = verdict["multiplier"][key]
    return {key: value for key, value in values.items() if value is not None}


def _verdicts(tree: Tree) -> list[Tree]:
    return [verdict for arm in tree["arms"] if (verdict := final(tree, arm["name"])) is not None]


def tables(tree: Tree) -> dict[str, dict[str, list[Any]]]:
    """Return {name: {columns, data}}."""
    ends = ("value", "low", "high")
    rungs = [{"arm": verdict["arm"]} | rung for verdict in tree["verdicts"] for rung in verdict["rungs"]]
    rungs = [rung | {end: rung["multiplier"][end] for end in ends} for rung in rungs]
    predicted = [row | {end: row["predicted"][end] for end in ends} for row in tree["predictions"] if row["predicted"]]
    decided = [
        row | {
            "at the target": units.interval(row["multiplier"], units.ratio),
            "in time": units.interval(row.get("wall_clock"), units.ratio),
        }
        for row in _verdicts(tree)
    ]  # fmt: skip
    return {
        "verdicts": _table(decided, ["arm", "decision", "at the target", "trend", "in time", "why"]),
        "multipliers": _table(
            rungs, ["arm", "rung", "flops", "pairs", "value", "low", "high", "loss_difference"],
            value="multiplier", loss_difference="loss difference",
        ),
        "predictions": _table(
            predicted, ["rung", "arm", "value", "low", "high", "observed", "error"], value="predicted"
        ),
        "runs": _table(tree["runs"], ["arm", "rung", "seed", "status", "flops", "parameters", "tokens", "loss"]),
    }  # fmt: skip


def _table(rows: Sequence[Tree], keys: Sequence[str], **names: str) -> dict[str, list[Any]]:
    """A table of these keys' values; `names` are the columns' that are not called as their keys."""
    return {"columns": [names.get(key, key) for key in keys], "data": [[row[key] for key in keys] for row in rows]}


def _deliver(message: dict[str, Any]) -> str:
    """Send the message by a process of its own and return what went wrong, "" if nothing did."""
    command, environ = helper_command("from trainer.ladder.report.summary_run import relay; relay()")
    try:
        done = subprocess.run(
            command, input=json.dumps(message), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environ,
            start_new_session=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it was not done after {TIMEOUT_SECONDS:g} s and was ended"
    except OSError as error:
        return str(error)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return "" if done.returncode == 0 else (lines[-1].strip()[:500] if lines else "its process ended without a message")


def relay() -> None:
    """Run in that process: one message from standard input to W&B."""
    message = json.load(sys.stdin)
    run = open_run(message["init"], TIMEOUT_SECONDS)
    import wandb

    shown: dict[str, Any] = {
        name: wandb.Table(columns=table["columns"], data=table["data"])
        for name, table in message["tables"].items()
        if table["data"]
    }
    shown |= {name: wandb.Image(path) for name, path in message["pictures"].items()}
    run.log(shown)
    run.summary.update(message["summary"])
    run.finish(0)
