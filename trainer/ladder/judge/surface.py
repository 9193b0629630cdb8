"""Loss against parameters and tokens, for runs that lie on no one line of compute: a surface instead of a curve.

Two published forms are fitted to log L by the sum of Huber losses, and each is tested on the largest run, which the
fit is not shown.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import optimize

from trainer.errors import FitError
from trainer.ladder.stats import forms

Array = np.ndarray
OFF_THE_LINE = 0.2
"""Runs are on one line of compute if ln D is a line in ln N, about which it scatters by no more than this."""
MISFIT = 3.0
"""The held-out run does not fit if it is so many times farther off than the other runs are (root of mean squares)."""
Form = Callable[[Array, Array], Any]


def is_surface(parameters: Array, tokens: Array) -> bool:
    """True if tokens and parameters vary apart, so that one curve in compute cannot hold all runs."""
    n, d = np.log(parameters), np.log(tokens)
    if len(n) < 5 or np.ptp(n) == 0:
        return False
    rest = d - np.polyval(np.polyfit(n, d, 1), n)
    return bool(np.sqrt(np.mean(rest**2)) > OFF_THE_LINE)


def fit(parameters: Array, tokens: Array, loss: Array, target_flops: float) -> dict[str, Any]:
    """Return each form with its error, its prediction of the largest run, and that of the target's best size."""
    largest = int(np.argmax(parameters * tokens))
    rest = np.arange(len(loss)) != largest
    found = []
    for name, formula, fitted in (
        ("Hoffmann et al. 2022", "E + A / N^α + B / D^β", _hoffmann),
        ("Gadre et al. 2024", "E + a·N^η + b·6^(η/2)·D^η", _gadre),
    ):
        try:
            values, predict = fitted(parameters, tokens, loss)
            _, predict_held_out = fitted(parameters[rest], tokens[rest], loss[rest])
        except FitError as error:
            found.append({"name": name, "formula": formula, "refused": str(error)})
            continue
        error = float(np.sqrt(np.mean(np.log(predict(parameters, tokens) / loss) ** 2)))
        others = float(np.sqrt(np.mean(np.log(predict_held_out(parameters, tokens)[rest] / loss[rest]) ** 2)))
        guess = float(predict_held_out(parameters, tokens)[largest])
        off = guess / float(loss[largest]) - 1
        found.append({
            "name": name, "formula": formula, "refused": None, "values": values, "error": error,
            "held_out": {
                "parameters": float(parameters[largest]), "tokens": float(tokens[largest]), "predicted": guess,
                "observed": float(loss[largest]), "relative_error": off, "fits": abs(off) <= MISFIT * max(others, 1e-3),
            },
            "target": _best_size(predict, target_flops),
        })  # fmt: skip
    return {"runs": len(loss), "forms": found}


def _hoffmann(parameters: Array, tokens: Array, loss: Array) -> tuple[dict[str, float], Form]:
    found = forms.fit_surface(parameters, tokens, loss, "huber")
    return found.to_json(), lambda n, d: found.E + found.A * n**-found.alpha + found.B * d**-found.beta


def _gadre(parameters: Array, tokens: Array, loss: Array) -> tuple[dict[str, float], Form]:
    found = forms.fit_overtrained(parameters, tokens / parameters, loss, "huber")
    return (
        found.to_json(),
        lambda n, d: found.E + found.a * n**found.eta + found.b * 6 ** (found.eta / 2) * d**found.eta,
    )


def _best_size(predict: Form, flops: float) -> dict[str, float]:
    """The size at which the form's loss is lowest for this compute, by C = 6·N·D."""

    def loss_at(log_n: float) -> float:
        n = math.exp(log_n)
        return float(predict(np.array(n), np.array(flops / (6 * n))))

    middle = math.log(flops / 6) / 2
    found = optimize.minimize_scalar(loss_at, bounds=(middle - 12, middle + 12), method="bounded")
    n = math.exp(found.x)
    return {"flops": flops, "parameters": n, "tokens": flops / (6 * n), "predicted": float(found.fun)}


def cautions(tree: dict[str, Any]) -> list[str]:
    """Return a sentence for each form that the largest run does not fit."""
    return [
        f"The form of {form['name']}, fitted to the other runs, misses the largest by "
        f"{form['held_out']['relative_error']:+.1%}: do not trust its target."
        for form in tree["forms"]
        if not form["refused"] and not form["held_out"]["fits"]
    ]
