"""The ladder's own run in W&B, in one group with its runs: tables and pictures of the report.

By the same rules as a run: online only where a key is known, disabled where the ladder's runs are. It lives in a
process of its own, which is ended when it takes too long: a report does not wait for a network.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.ladder.plan.ladder import Ladder
from trainer.ladder.report.drawing import decision
from trainer.ladder.report.estimates import Tree
from trainer.ladder.report.pictures import Picture
from trainer.show import units
from trainer.show.wandb import open_run, wandb_mode

SECONDS = 60.0
"""W&B may take as long."""


def send(
    ladder: Ladder, tree: Tree, drawn: Sequence[Picture], out: Path, on_problem: Callable[[str], None]
) -> None:  # fmt: skip
    """Show the report in W&B; what goes wrong is said and changes nothing else."""
    if not ladder.runs:
        return
    config = ladder.runs[0].config
    mode = wandb_mode(config)
    if mode == "disabled":
        return
    first = tree.get("course", {}).get("first_planned")
    message = {
        "init": {
            # The same run again for every report of this ladder.
            "id": hashlib.sha256(f"{ladder.name} {first}".encode()).hexdigest()[:16],
            "name": f"ladder {ladder.name}", "mode": mode, "dir": str(out.resolve()), "project": config.wandb.project,
            "entity": config.wandb.entity or None, "group": config.wandb.group, "tags": ["ladder"],
            "job_type": "report",
            "config": {key: tree[key] for key in ("name", "question", "metric", "unit", "criterion", "target", "arms")},
        },
        "summary": summary(tree), "tables": tables(tree),
        "pictures": {one.name: str(out.resolve() / f"{one.name}.png") for one in drawn},
    }  # fmt: skip
    (out / "wandb").mkdir(exist_ok=True)  # else W&B would move to /tmp unasked
    if problem := _deliver(message):
        on_problem(f"W&B has no summary of this ladder: {problem}. The report is in {out}.")


def summary(tree: Tree) -> dict[str, Any]:
    """What W&B lists of a run."""
    told = {"flops": tree["flops"] + tree["sweep_flops"], **{f"runs/{k}": n for k, n in tree["counts"].items()}}
    for arm in tree["arms"]:
        if (one := decision(tree, arm["name"])) is not None:
            told[f"{arm['name']}/decision"] = one["decision"]
            told |= {f"{arm['name']}/multiplier_{key}": one["multiplier"][key] for key in ("value", "low", "high")}
    return {key: value for key, value in told.items() if value is not None}


def tables(tree: Tree) -> dict[str, dict[str, list[Any]]]:
    """{name: {columns, data}}"""
    verdicts = [one for arm in tree["arms"] if (one := decision(tree, arm["name"])) is not None]
    return {
        "verdicts": {
            "columns": ["arm", "decision", "at the target", "trend", "in time", "why"],
            "data": [
                [one["arm"], one["decision"], units.ratio_interval(one["multiplier"]), one["trend"],
                 units.ratio_interval(one.get("wall_clock")), one["why"]]
                for one in verdicts
            ],
        },
        "multipliers": {
            "columns": ["arm", "rung", "flops", "pairs", "multiplier", "low", "high", "loss difference"],
            "data": [
                [one["arm"], rung["rung"], rung["flops"], rung["pairs"],
                 *(rung["multiplier"][key] for key in ("value", "low", "high")), rung["loss_difference"]]
                for one in tree["verdicts"]
                for rung in one["rungs"]
            ],
        },
        "predictions": {
            "columns": ["rung", "arm", "predicted", "low", "high", "observed", "error"],
            "data": [
                [one["rung"], one["arm"], *(one["predicted"][key] for key in ("value", "low", "high")),
                 one["observed"], one["error"]]
                for one in tree["predictions"]
                if one["predicted"] is not None
            ],
        },
        "runs": {
            "columns": ["arm", "rung", "seed", "status", "flops", "parameters", "tokens", "loss"],
            "data": [
                [run[key] for key in ("arm", "rung", "seed", "status", "flops", "parameters", "tokens", "loss")]
                for run in tree["runs"]
            ],
        },
    }  # fmt: skip


def _deliver(message: dict[str, Any]) -> str:
    """What went wrong; "" if nothing did."""
    root = Path(__file__).resolve().parents[3]
    environ = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environ.get("PYTHONPATH")]))
    environ["WANDB_SILENT"] = "true"
    environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # -P: a wandb.py in the working directory is not W&B.
    command = [sys.executable, "-P", "-c", "from trainer.ladder.report.summary_run import relay; relay()"]
    try:
        done = subprocess.run(
            command, input=json.dumps(message), capture_output=True, text=True, timeout=SECONDS, env=environ,
            start_new_session=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it was not done after {SECONDS:g} s and was ended"
    except OSError as error:
        return str(error)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return "" if done.returncode == 0 else (said[-1].strip()[:500] if said else "its process ended without a word")


def relay() -> None:
    """The process: one message from standard input to W&B."""
    message = json.load(sys.stdin)
    run = open_run(message["init"], SECONDS)
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
