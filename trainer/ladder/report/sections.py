"""The page's sections below the pictures: each a heading with its tables, or nothing where there is nothing to tell."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from trainer.ladder.report.estimates import Tree
from trainer.ladder.stats.records import BASELINE
from trainer.show import units

NAMES, WORDS = ("rung", "arm", "status", "fault", "trend"), ("by", "why", "why not", "inside")
"""Columns of names, which are not broken, and of words; all others are of numbers."""


def of(tree: Tree) -> Iterator[str]:
    yield _criterion(tree)
    yield _predictions(tree)
    yield _fit(tree)
    yield _rungs(tree)
    yield _noise(tree)
    yield _sweeps(tree)
    yield _way(tree)
    yield _missing(tree)
    yield _runs(tree)
    yield _again(tree)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Cells are text, not HTML; "" where there are no rows."""
    sides = [" class=fixed" if name in NAMES else "" if name in WORDS else " class=n" for name in columns]
    head = "".join(f"<th{side}>{escape(name)}" for side, name in zip(sides, columns, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{side}>{escape(str(cell))}" for side, cell in zip(sides, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>" if body else ""


def _list(facts: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in facts) + "</dl>"


# The criterion


def _criterion(tree: Tree) -> str:
    rule = tree["criterion"]
    looks = "" if rule["looks"] == 1 else f", for {rule['looks']} looks"
    said = (
        f"An arm is promoted if it is surely worth {rule['min_gain']:g}× compute at the target and a step surely takes "
        f"at most {rule['max_slowdown']:g}× as long; level {rule['level']:g} over the whole ladder{looks}."
    )
    return f"<h2>The criterion</h2><p class=text>{escape(said)}</p>{_written(tree)}"


def _written(tree: Tree) -> str:
    """Before the runs, or how it was changed since."""
    history = tree.get("course", {}).get("criterion_history", [])
    if not history:
        return "<p class=soft>When it was written is not known: the ladder has no record of its plan.</p>"
    first, changes = history[0], history[1:]
    begun = f"after {units.count(first['finished_runs'], 'run')} of it had finished" * bool(first["finished_runs"])
    lines = [f"Written {begun or 'before any of its runs had finished'}: {units.date(first['time'])}."]
    lines += [
        f"Changed after {units.count(one['finished_runs'], 'run')} had finished, {units.date(one['time'])}: "
        + ", ".join(_change(before["criterion"], one["criterion"]))
        for before, one in zip(history, changes, strict=False)
    ]
    late = any(one["finished_runs"] for one in changes)
    bold = ("<b>", "</b>") if late else ("", "")
    shown = "".join(f"<li>{bold[0]}{escape(line)}{bold[1]}" for line in lines)
    return f"<ul>{shown}</ul>{''.join(map(_edit, tree['course']['edits']))}"


def _edit(edit: Tree) -> str:
    when = f"after {units.count(edit['finished_runs'], 'run')} had finished, {units.date(edit['time'])}"
    lines = "".join(f"<li><code>{escape(line)}</code>" for line in edit["lines"])
    return (
        f"<details><summary>The ladder file was edited {escape(when)}: {units.count(len(edit['lines']), 'setting')}"
        f"</summary><div class=body><ul>{lines}</ul></div></details>"
    )


def _change(before: Tree, after: Tree) -> list[str]:
    return [f"{key} {before.get(key)} → {value}" for key, value in after.items() if before.get(key) != value]


# Predictions


def _predictions(tree: Tree) -> str:
    made = {one["rung"] for one in tree["predictions"] if one["predicted"] is not None}
    shown = [one for one in tree["predictions"] if one["rung"] in made]
    rows = [
        (one["rung"], one["arm"], _by(one), units.losses(one["predicted"]), _observed(one),
         units.signed(one["error"]) if one["error"] is not None else "–",
         {True: "yes", False: "no", None: "–"}[one["inside"]])
        for one in shown
    ]  # fmt: skip
    columns = ("rung", "arm", "by", "predicted loss", "came out", "error", "inside")
    ratios = [
        (one["rung"], one["arm"], _by(one), units.worth(one["predicted"]), units.worth(one["measured"]))
        for one in tree["multiplier_predictions"]
        if one["rung"] in made
    ]
    refused = next((one for one in tree["predictions"] if one["refused"] and one["arm"] == BASELINE), None)
    why = ""
    if refused is not None:
        why = f"<p class=soft>{escape(refused['rung'])} is not predicted: {escape(refused['refused'])}</p>"
    if not rows and not why:
        return ""
    more = "<h3>Multipliers</h3>" + table(("rung", "arm", "by", "predicted", "measured"), ratios) if ratios else ""
    return f"<h2>Predictions</h2>{why}{table(columns, rows)}{more}"


def _by(one: Tree) -> str:
    by = one["by"]
    return ", ".join(by) if len(by) <= 3 else f"{by[0]} to {by[-1]}"


def _observed(one: Tree) -> str:
    return "not run" if one["observed"] is None else f"{units.loss(one['observed'])} ({one['runs']})"


# The fit


def _fit(tree: Tree) -> str:
    fit = tree["fit"]
    if fit is None:
        return ""
    curve, huber, boot = fit["curve"], fit["huber"], tree["bootstrap"]
    facts = [
        ("form", f"E + A·(C / {units.flops(curve['scale'])})<sup>−α</sup>, A = {units.loss(curve['A'])}"),
        ("E", escape(units.losses(fit["E"])) + ("" if fit["E_determined"] else ": <b>badly determined</b>")),
        ("α", escape(units.losses(fit["alpha"]))),
        ("Huber on logs", f"E {units.loss(huber['E'])}, α {units.loss(huber['alpha'])}" if huber else "–"),
        ("bootstrap", _bootstrap(boot)),
        ("goodness", escape(_goodness(fit))),
        ("noise alike at all rungs", f"p = {escape(units.chance(fit['unequal_noise_p']))}"),
    ]
    rows = [
        (one["rung"], units.flops(one["flops"]), one["seeds"], units.loss(one["loss"]),
         units.loss(one["seed_sd"]), units.signed(one["residual"]), f"{one['leverage']:.2f}")
        for one in fit["rungs"]
    ]  # fmt: skip
    columns = ("rung", "FLOPs", "seeds", "mean loss", "sd of seeds", "minus curve", "leverage")
    return f"<h2>The baseline's curve</h2>{_list(facts)}{table(columns, rows)}"


def _bootstrap(boot: Tree | None) -> str:
    if boot is None:
        return "–"
    said = f"E {units.losses(boot['E'])}, α {units.losses(boot['alpha'])}; {boot['draws']} draws of rungs and seeds"
    return escape(said + (f", {boot['refused']} of them without a curve" if boot["refused"] else ""))


def _goodness(fit: Tree) -> str:
    parts = [f"a run lies {units.loss(fit['sd'])} about the curve (sd, {fit['degrees_of_freedom']} degrees of freedom)"]
    parts += [f"seeds alone {units.loss(fit['seed_sd'])}"] if fit["seed_sd"] is not None else []
    if fit["lack_of_fit_p"] is not None:
        fails = ": the form fails" if fit["lack_of_fit_p"] < 0.05 else ""
        parts.append(f"lack of fit p = {units.chance(fit['lack_of_fit_p'])}{fails}")
    return ", ".join(parts)


# Rung by rung


def _rungs(tree: Tree) -> str:
    if not tree["verdicts"]:
        return _plain_rungs(tree)
    timed = {
        (one["arm"], rung["rung"]): rung
        for one in tree.get("course", {}).get("verdicts", [])
        for rung in one["rungs"]
    }  # fmt: skip
    rows = [
        (one["arm"], rung["rung"], rung["pairs"], units.signed(rung["loss_difference"]),
         units.worth(rung["multiplier"]), units.times(timed.get((one["arm"], rung["rung"]), {}).get("wall_clock")),
         units.times(timed.get((one["arm"], rung["rung"]), {}).get("slowdown")), units.times(rung["without"]),
         units.times(rung["pairing"]), rung["gap"])
        for one in tree["verdicts"]
        for rung in one["rungs"]
    ]  # fmt: skip
    columns = (
        "arm", "rung", "pairs", "loss − baseline's", "multiplier", "in time", "a step takes", "target without it",
        "pairing", "why not",
    )  # fmt: skip
    slopes = [
        (one["arm"], units.TRENDS[one["trend"]], _slope(one["slope"]), units.chance(one["lack_of_fit_p"]),
         units.worth(one["other_floor"]), f"{units.times(one['lower'])} to {units.times(one['upper'])}",
         units.times(one["pairing"]["ratio"]), units.signed(one["pairing"]["correlation"], 2))
        for one in tree["verdicts"]
    ]  # fmt: skip
    heads = (
        "arm", "trend", "slope in ln C", "lack of fit p", "with another floor", "bounds that decide", "pairing",
        "correlation",
    )  # fmt: skip
    worth = "Pairing: how many times more seeds would be needed had the pairs not shared seed and data order."
    return (
        f"<h2>Rung by rung</h2>{table(columns, rows)}<h3>Across rungs</h3>{table(heads, slopes)}"
        f"<p class=soft>{worth}</p>"
    )


def _slope(interval: Tree) -> str:
    if interval["value"] is None:
        return units.UNKNOWN
    ends = f" ({units.signed(interval['low'], 3)} to {units.signed(interval['high'], 3)})"
    return units.signed(interval["value"], 3) + (ends if interval["low"] is not None else "")


def _plain_rungs(tree: Tree) -> str:
    rows = [
        (one["arm"], one["rung"], one["pairs"], units.signed(one["difference"]["value"]),
         "–" if one["difference"]["low"] is None else
         f"{units.signed(one['difference']['low'])} to {units.signed(one['difference']['high'])}")
        for one in tree["differences"]
    ]  # fmt: skip
    shown = table(("arm", "rung", "pairs", "loss − baseline's", "interval"), rows)
    return f"<h2>Rung by rung</h2>{shown}" if shown else ""


def _noise(tree: Tree) -> str:
    """Each rung and arm: the mean over its seeds, and how they differ."""
    arms = [BASELINE, *(arm["name"] for arm in tree["arms"])]
    known = {(one["rung"], one["arm"]): units.spread(one) for one in tree["noise"]}
    rows = [
        f"<tr><td class=fixed>{escape(rung)}"
        + "".join(f"<td class=n>{escape(known.get((rung, arm), '–'))}" for arm in arms)
        for rung in dict.fromkeys(one["rung"] for one in tree["noise"])
    ]
    heads = "".join(f"<th class=n>{escape(arm)}" for arm in arms)
    shown = f"<div class=wide><table><tr><th>rung{heads}{''.join(rows)}</table></div>"
    about = f"Mean over seeds ± their standard deviation, as measured, in {units.UNITS[tree['unit']]}."
    return f"<h2>Losses and seed noise</h2><p class=soft>{about}</p>{shown}" if rows else ""


def _sweeps(tree: Tree) -> str:
    rows = [
        (one["rung"], one["arm"], "?" if one["rate"] is None else f"×{one['rate']:g}",
         ", ".join(f"×{rate}: {units.loss(loss)}" for rate, loss in one["losses"].items()),
         "at the edge: the optimum may lie outside" if one["at_edge"] else "" if one["complete"] else "goes on")
        for one in tree["sweeps"]
    ]  # fmt: skip
    shown = table(("rung", "arm", "rate", "by rate", "why"), rows)
    return f"<h2>Learning-rate sweeps</h2>{shown}" if shown else ""


# What happened on the way


def _way(tree: Tree) -> str:
    course = tree.get("course")
    if course is None:
        return ""
    survived = course["survived"]
    told = course["time"]
    faults = [(kind, one["made"], one["survived"]) for kind, one in survived["faults"].items()]
    said = (
        f"{units.count(survived['attempts'], 'attempt')}, {units.count(survived['restarts'], 'restart')} in "
        f"{units.count(survived['runs_restarted'], 'run')}; {units.count(survived['replayed_steps'], 'step')} "
        f"replayed; {units.took(told['lost_seconds'])} of computing lost, {units.took(told['away_seconds'])} with "
        "nobody at it."
    )
    arms = [
        (one["arm"], one["runs"], one["spikes"], one["not_finite"], one["redone"], one["diverged"], one["faults"],
         one["attempts"], one["replayed"])
        for one in course["arms"]
    ]  # fmt: skip
    columns = (
        "arm", "runs", "spikes", "not finite", "redone", "diverged", "faults made", "attempts", "replayed",
    )  # fmt: skip
    made = "<h3>Faults on purpose</h3>" + table(("fault", "made", "in runs that finished"), faults) if faults else ""
    return (
        f"<h2>Instabilities and faults</h2>{table(columns, arms)}<p class=soft>Spikes: losses far above those before "
        "them. Not finite, redone: steps computed again, for such a value or on a coarser grid; values that a fault on "
        f"purpose made are among them.</p>{made}<p>{escape(said)}</p>"
    )


def machine(tree: Tree) -> list[tuple[str, str]]:
    """Facts for the page's head."""
    course = tree.get("course")
    if course is None:
        return []
    places = [
        "runs that moved between machines" if one["device"] is None else
        f"{one['host']}, {one['device']}, {units.count(one['ranks'], 'rank')} a run"
        for one in course["machines"]
    ]  # fmt: skip
    named = [f"{place} ({one['runs']})" if len(places) > 1 else place
             for place, one in zip(places, course["machines"], strict=True)]  # fmt: skip
    commits = ", ".join(f"<code>{escape(_short(commit))}</code>" for commit in course["commits"])
    return [("machine", escape("; ".join(named)) or units.UNKNOWN), ("commit", commits or units.UNKNOWN)]


def _short(commit: str) -> str:
    """With what is said of it beside its hash."""
    return commit[:12] + commit[40:]


# Runs


def _missing(tree: Tree) -> str:
    gone = [run for run in tree["runs"] if run["status"] == "missing" or run["diverged"]]
    rows = "".join(
        f"<li><b>{escape(run['rung'])} {escape(run['arm'])} seed {run['seed']}</b>: "
        f"{escape(run['reason'] or ('its loss was not finite' if run['diverged'] else 'no reason is known'))}"
        for run in gone
    )
    return f"<h2>Missing runs</h2><ul>{rows}</ul>" if rows else ""


def _runs(tree: Tree) -> str:
    course = {one["key"]: one for one in tree.get("course", {}).get("runs", [])}
    rows = [
        (run["rung"], run["arm"], run["seed"], "diverged" if run["diverged"] else run["status"],
         "–" if run["loss"] is None else units.loss(run["loss"], 5), units.amount(run["parameters"]),
         units.amount(run["tokens"]), units.flops(run["flops"]),
         units.took(course.get(run["key"], {}).get("seconds")), course.get(run["key"], {}).get("attempts", "–"),
         (run["weights_sha256"] or "–")[:12])
        for run in tree["runs"]
    ]  # fmt: skip
    columns = (
        "rung", "arm", "seed", "status", "loss", "parameters", "tokens", "FLOPs", "training", "attempts", "weights",
    )  # fmt: skip
    total = units.count(len(rows), "run")
    return (
        f"<h2>Runs</h2><details><summary><b>{total}</b></summary><div class=body>{table(columns, rows)}</div></details>"
    )


def _again(tree: Tree) -> str:
    commits = tree.get("course", {}).get("commits", [])
    clean = len(commits) == 1 and len(commits[0]) == 40  # else it was changed, as a "+" says
    lines = [f"git checkout {commits[0]}"] if clean else []
    lines += [f"python -m trainer ladder {verb} {tree['file']}" for verb in ("plan", "run", "report")]
    return (
        "<h2>Once more</h2><p class=text>Each run is a function of its config and data: the same commit gives the same "
        f"losses, to the last bit on the same kind of machine.</p><pre><code>{escape(chr(10).join(lines))}</code></pre>"
    )
