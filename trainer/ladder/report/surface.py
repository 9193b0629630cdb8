"""Loss against parameters and tokens, for runs that lie on no one line of compute: a surface instead of a curve.

Two published forms are fitted to log L by the sum of Huber losses, and each is tested on the largest run, which the
fit is not shown.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.errors import FitError
from trainer.ladder.stats import planes, surfaces
from trainer.ladder.stats.records import Interval
from trainer.ladder.stats.surfaces import Surface

Array = np.ndarray
MISFIT = 3.0
"""The held-out run does not fit if it is so many times farther off than the other runs are (root of mean squares)."""


def fit(parameters: Array, tokens: Array, loss: Array, target_flops: float) -> dict[str, Any]:
    """Return each form with its error, its prediction of the largest run, and that of the target's best size."""
    largest = int(np.argmax(parameters * tokens))
    rest = np.arange(len(loss)) != largest
    found = []
    for name, formula, fitted, names in (
        ("Hoffmann et al. 2022", "E + A / N^α + B / D^β", surfaces.hoffmann, ("E", "A", "B", "alpha", "beta")),
        ("Gadre et al. 2024", "E + a·N^η + b·6^(η/2)·D^η", surfaces.gadre, ("E", "a", "b", "eta")),
    ):
        try:
            surface = fitted(parameters, tokens, loss)
            others = fitted(parameters[rest], tokens[rest], loss[rest])
            found.append({"name": name, "formula": formula, "refused": None}
                         | _estimates(surface, names, target_flops)
                         | {"held_out": _held_out(others, parameters, tokens, loss, largest)})  # fmt: skip
        except FitError as error:
            found.append({"name": name, "formula": formula, "refused": str(error)})
    return {"runs": len(loss), "forms": found}


def _estimates(surface: Surface, names: Sequence[str], target_flops: float) -> dict[str, Any]:
    """Values and intervals of a surface, and its prediction of the target's best size."""
    exponents = [surface.exponent(number) for number in range(len(surface.exponents))]
    if "eta" in names:  # loss falls as N^eta: the exponent with its sign
        exponents = [_negative(it) for it in exponents]
    values = [*surface.coefficients, *(it.value for it in exponents)]
    n, d = planes.best_size(surface, target_flops)
    point = [math.log(n), math.log(d) + surface.shift]
    best = {
        "flops": target_flops, "parameters": n, "tokens": d, "predicted": float(surface.loss_at(n, d)[0]),
    }  # fmt: skip
    moved = surface.influence(point)
    most = int(np.abs(moved).argmax())
    return {
        "values": dict(zip(names, values, strict=True)),
        "intervals": {"E": surface.floor().to_json()}
        | {name: it.to_json() for name, it in zip(names[len(surface.coefficients) :], exponents, strict=True)},
        "error": float(np.sqrt(np.mean(surface.residuals**2))), "sd": surface.sd, "bend_p": surface.bend_p(),
        "target": best | {"interval": surface.predict(point).to_json()},
        "most_influential": {
            "parameters": math.exp(surface.variables[0][most]),
            "tokens": math.exp(surface.variables[1][most] - surface.shift), "relative_change": float(moved[most]),
        },
    }  # fmt: skip


def _negative(found: Interval) -> Interval:
    value, low, high = (None if end is None else -end for end in (found.value, found.high, found.low))
    return Interval(value, low, high, found.level)


def _held_out(others: Surface, parameters: Array, tokens: Array, loss: Array, largest: int) -> dict[str, Any]:
    """The largest run beside its prediction by a surface that was fitted without it."""
    guess = others.predict([math.log(parameters[largest]), math.log(tokens[largest]) + others.shift], runs=1)
    assert guess.value is not None
    observed, error = float(loss[largest]), float(np.sqrt(np.mean(others.residuals**2)))
    off = guess.value / observed - 1
    inside = None if guess.low is None or guess.high is None else guess.low <= observed <= guess.high
    return {
        "parameters": float(parameters[largest]), "tokens": float(tokens[largest]), "predicted": guess.value,
        "interval": guess.to_json(), "observed": observed, "relative_error": off,
        "fits": abs(off) <= MISFIT * max(error, 1e-3) and inside is not False,
    }  # fmt: skip


def cautions(tree: dict[str, Any]) -> list[str]:
    """Return a sentence for each form that the largest run does not fit, and for each that bends otherwise."""
    fitted = [form for form in tree["forms"] if not form["refused"]]
    found = [
        f"The form of {form['name']}, fitted to the other runs, misses the largest by "
        f"{form['held_out']['relative_error']:+.1%}: do not trust its target."
        for form in fitted
        if not form["held_out"]["fits"]
    ]
    return found + [
        f"The runs bend in N and D as the form of {form['name']} does not (p = {form['bend_p']:.2g}): do not trust its "
        "target."
        for form in fitted
        if form["bend_p"] is not None and form["bend_p"] < surfaces.FORM_FAILS
    ]
