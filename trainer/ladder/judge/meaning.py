"""The meaning of a table's columns: which is the loss, which the compute, and what is wrong with their values."""

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.errors import ConfigError
from trainer.ladder.judge import numbers
from trainer.ladder.judge.numbers import Numbers
from trainer.ladder.judge.table import Row, Table
from trainer.ladder.plan.arms import near
from trainer.ladder.stats.records import BASELINE
from trainer.show.units import amount, scientific

ROLES: Mapping[str, tuple[str, ...]] = {
    "arm": ("arm", "variant", "method", "recipe", "treatment", "condition"),
    "rung": ("rung", "size", "scale", "model_size"),
    "params": ("params", "parameters", "n_params", "num_params", "n_parameters", "param_count", "model_params", "n"),
    "tokens": ("tokens", "n_tokens", "num_tokens", "train_tokens", "training_tokens", "tokens_seen", "d"),
    "flops": ("flops", "compute", "train_flops", "training_flops", "total_flops", "c"),
    "seed": ("seed", "replicate", "repeat"),
    "loss": ("val_loss", "validation_loss", "valid_loss", "eval_loss", "heldout_loss", "test_loss", "loss",
             "final_loss"),
    "seconds": ("seconds", "train_seconds", "training_seconds"),
    "unique_tokens": ("unique_tokens",),
    "downstream": ("downstream", "accuracy", "acc", "task_accuracy", "exact_match", "f1"),
}  # fmt: skip
"""The meanings that a column may have, and the names by which it is recognised."""
ONE_BELOW = "If columns are arms, write their runs below one another: a row for each run, and a column arm."
METRICS = ("bits_per_byte", "bpb", "perplexity", "ppl", "accuracy", "acc", "error_rate", "error")
"""Names by which the metric is recognised if no column is a loss."""
MORE_IS_BETTER = ("accuracy", "acc", "score", "f1", "exact_match", "auc")
NO_SHARE = {"bits", "bpb", "nats", "loss", "perplexity", "ppl"}
"""Words of a metric that lies between 0 and 1 and is yet no share."""
BASELINES = ("baseline", "base", "reference", "control", "default")
SAME_COMPUTE = 1.3
"""A run belongs to the baseline's rung of the nearest compute if the ratio of the two is no larger."""
FEWEST_TOKENS = 1e-3
"""A run with fewer tokens than this for each parameter has one of the two in another unit."""
UNIT_RATIO = 100.0
"""A row whose C / 6·N·D is so many times off the other rows' has another unit."""
NATS_PER_BIT = math.log(2)
MOST_EPOCHS = (
    4.0  # up to here repeated data are worth nearly as much as new (Muennighoff et al. 2023, arXiv:2305.16264)
)
FEW = 5
"""Places that are listed by name; of more, the number is given."""


@dataclass(frozen=True)
class TableRun:
    """One row with its meaning."""

    place: str
    arm: str
    rung: str
    """"" if the table has no column for it."""
    seed: int | None
    params: float | None
    tokens: float | None
    flops: float
    loss: float
    """NaN if the run diverged."""
    seconds: float | None
    metric: float | None = None
    """The value of the column that is predicted through the loss."""


def words(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def most_of_share(column: str, values: Sequence[float]) -> float | None:
    """The value of all for a share; None for a metric that is none."""
    said = set(words(column).split("_"))
    if not values or said & NO_SHARE or min(values) < 0:
        return None
    if max(values) <= 1:
        return 1.0
    return 100.0 if max(values) <= 100 and said & {*MORE_IS_BETTER, "error", "percent"} else None


def choose_columns(found: Table, named: Mapping[str, str]) -> dict[str, str]:
    """The column of each role: as named, else the first that is called as ROLES has it."""
    problems = [
        f"--column {role}=…: there is no such role.{near(role, ROLES)}  Roles are {', '.join(ROLES)}."
        for role in named
        if role not in ROLES
    ]
    problems += [
        f"{found.source} has no column {name!r}.{near(name, found.columns)}  Columns are {', '.join(found.columns)}."
        for name in named.values()
        if name and name not in found.columns
    ]
    by_words = {words(name): name for name in reversed(found.columns)}
    with_units = {words(numbers.unit_of(name)[0]): name for name in reversed(found.columns)} | by_words
    chosen = {}
    for role, names in ROLES.items():
        known = with_units if role in numbers.AMOUNTS else by_words
        chosen[role] = next((known[name] for name in names if name in known), "")
        alike = [name for name in found.columns if words(name) == words(chosen[role])]
        if len(alike) > 1 and role not in named:
            listed = " and ".join(map(repr, alike))
            problems.append(f"{found.source}: {listed} are alike.\n  Name one: --column {role}={alike[0]}.")
    if not chosen["loss"]:
        losses = [name for name in found.columns if "loss" in words(name) and not _is_spread(name)]
        losses = losses or [by_words[name] for name in METRICS if name in by_words]
        if len(losses) > 1 and "loss" not in named:
            listed = ", ".join(map(repr, losses))
            problems.append(
                f"{found.source} has several losses: {listed}.\n  Name one: --column loss={losses[0]}. {ONE_BELOW}"
            )
        chosen["loss"] = losses[0] if losses else ""
    chosen |= named
    if chosen["downstream"] == chosen["loss"]:
        chosen["downstream"] = ""  # the metric itself is judged as a loss
    if not chosen["loss"]:
        problems.append(
            f"{found.source} has no column that is called a loss. Its columns are {', '.join(found.columns)}.\n"
            f"  Name the metric: --column loss=NAME. {ONE_BELOW}"
        )
    if not chosen["flops"] and not (chosen["params"] and chosen["tokens"]):
        problems.append(
            f"{found.source} has no compute: no column of FLOPs, and none of parameters and tokens. "
            f"Its columns are {', '.join(found.columns)}.\n"
            "  Name it: --column flops=NAME, or --column params=NAME --column tokens=NAME."
        )
    if problems:
        raise ConfigError([*found.problems, *problems])
    return {role: name for role, name in chosen.items() if name}


def _is_spread(name: str) -> bool:
    """True for the name of a standard deviation, or of a loss on the training data."""
    return bool(set(words(name).split("_")) & {"sd", "std", "stderr", "se", "var", "train", "training", "min", "max"})


def describe(found: Table, chosen: Mapping[str, str], named: Mapping[str, str]) -> str:
    used = ", ".join(f"{role} = {name}{'' if role in named else ' (guessed)'}" for role, name in chosen.items())
    unused = [name for name in found.columns if name not in chosen.values()]
    return f"Columns: {used}." + (f" Not used: {', '.join(unused)}." if unused else "")


# Rows


def read_runs(
    found: Table, chosen: Mapping[str, str], more: bool, notices: list[str], problems: list[str]
) -> list[TableRun]:
    """The runs of a table, without those that are missing in it; wrong values are added to `problems`."""
    wrong: dict[str, list[str]] = {}
    form = number_form(found, chosen, notices)
    if "seed" in chosen:
        found = _with_numbered_seeds(found, chosen["seed"], notices)
    problems += _alike_names(found, chosen)
    missing, repeated, derived, diverged, runs = [], [], [], [], []
    for row in found.rows:
        noted = sum(map(len, wrong.values()))
        values = {role: _number(row, role, chosen, form, wrong) for role in chosen if role not in ("arm", "rung")}
        if sum(map(len, wrong.values())) > noted:
            continue  # what else is missing in such a row follows from it
        params, tokens, flops, loss = (values.get(role) for role in ("params", "tokens", "flops", "loss"))
        if loss is None:
            missing.append(row.place)
            continue
        most = 6 * params * tokens if params and tokens else 0.0
        if flops is None and most:
            flops = most
            derived.append(row.place)
        if flops is None or most == math.inf:
            fact = (
                "neither FLOPs nor parameters and tokens are known" if flops is None else "no run has so much compute"
            )
            wrong.setdefault(fact, []).append(row.place)
            continue
        if tokens and tokens > MOST_EPOCHS * (values.get("unique_tokens") or math.inf):
            repeated.append(row.place)
            continue
        if loss <= 0 and not more:
            wrong.setdefault(f"{chosen['loss']} is not positive, as a loss is", []).append(row.place)
        if not math.isfinite(loss):
            diverged.append(row.place)
        given = {role: row.values.get(chosen.get(role, "")) for role in ("arm", "rung")}
        texts = {role: "" if value is None else str(value).strip() for role, value in given.items()}
        for role, text in texts.items():
            if role in chosen and not text:
                wrong.setdefault(f"{chosen[role]} is missing", []).append(row.place)
        seed = values.get("seed")
        runs.append(
            TableRun(
                row.place, texts["arm"] or BASELINE, texts["rung"], None if seed is None else int(seed), params, tokens,
                flops, loss, values.get("seconds"), values.get("downstream"),
            )
        )  # fmt: skip
    remedy = (
        "Correct the table, or give another column with --column ROLE=NAME (--column ROLE= for none). "
        "A missing value is empty, and the loss of a run that diverged is nan."
    )
    problems += [f"{found.source}, {_places(places)}: {fact}.\n  {remedy}" for fact, places in wrong.items()]
    for places, fact in (
        (missing, f"no {chosen['loss']}: the run is missing."),
        (derived, "compute is 6·params·tokens."),
        (repeated, f"data were repeated more than {MOST_EPOCHS:g} times, which no form here knows of: left out."),
        (diverged, f"{chosen['loss']} is not finite: the run diverged."),
    ):
        notices += [f"{_places(places)}: {fact}"] if places else []
    return runs


def number_form(found: Table, chosen: Mapping[str, str], notices: list[str]) -> Numbers:
    """Return the form of the table's numbers; add to `notices` what is not plain."""
    columns = {role: name for role, name in chosen.items() if role not in ("arm", "rung", "seed")}
    texts = {role: [row.values.get(name) for row in found.rows] for role, name in columns.items()}
    decimal = numbers.decimal_mark(value for values in texts.values() for value in values)
    if decimal == ",":
        notices.append("Numbers have decimal commas.")
    units = {role: numbers.unit_of(columns[role])[1] for role in numbers.AMOUNTS if role in columns}
    factors = {role: numbers.factor_of(unit) or 1.0 for role, unit in units.items() if unit}
    notices += [f"{columns[role]} is multiplied by {factor:g}." for role, factor in factors.items() if factor != 1]
    percentages = frozenset(
        role for role in numbers.SHARES if any(str(value).strip().endswith("%") for value in texts.get(role, ()))
    )
    return Numbers(decimal, factors, percentages)


def _with_numbered_seeds(found: Table, column: str, notices: list[str]) -> Table:
    """Number the seeds of a table whose seeds are names, or numbers of more digits than a float holds."""
    seeds = [row.values.get(column) for row in found.rows]
    texts = ["" if seed is None else str(seed).strip() for seed in seeds]
    names = sorted({text for text in texts if not numbers.is_missing(text)})
    if all(re.fullmatch(r"[-+]?(\d{1,15}(\.\d*)?|nan)", name, re.IGNORECASE) for name in names):
        return found
    if any(re.fullmatch(r"[-+]?\d*\.\d+", name) for name in names):
        return found  # a fraction, which is no name
    notices.append(f"Seeds are names, and are numbered: {', '.join(names[:FEW])}{', …' if len(names) > FEW else ''}.")
    rows = [
        replace(row, values=row.values | {column: names.index(text)}) if text in names else row
        for row, text in zip(found.rows, texts, strict=True)
    ]
    return replace(found, rows=rows)


def _alike_names(found: Table, chosen: Mapping[str, str]) -> list[str]:
    """Problems of arms or rungs whose names differ in case or spaces alone."""
    problems = []
    for role in ("arm", "rung"):
        spelled: dict[str, list[str]] = {}
        for row in found.rows if role in chosen else ():
            name = str(row.values.get(chosen[role]) or "").strip()
            others = spelled.setdefault(" ".join(name.lower().split()), [])
            others += [] if name in others else [name]
        problems += [
            f"{found.source}: {' and '.join(map(repr, names))} differ in case or spaces alone.\n"
            f"  Write each {role} in one way."
            for names in spelled.values()
            if len(names) > 1
        ]
    return problems


def _number(row: Row, role: str, chosen: Mapping[str, str], form: Numbers, wrong: dict[str, list[str]]) -> float | None:
    """The value as a number ("1.3B" too); None if it is missing, or wrong, which is then noted."""
    value = row.values.get(chosen[role])
    if numbers.is_missing(value):
        return None
    problem, number = "", math.nan
    try:
        number = form.read(value, role)
    except (ValueError, OverflowError) as error:
        problem = str(error)
    if not problem and math.isnan(number) and role != "loss":  # as pandas writes a missing value
        return None
    if role == "seed" and not problem and not number.is_integer():
        problem = "is no whole number"
    elif role not in ("seed", "downstream", "loss") and not problem and not (0 < number < math.inf):
        problem = "is not positive and finite"
    elif not problem and math.isfinite(number):
        problem = numbers.implausible(number, role)
    if problem:
        wrong.setdefault(f"{chosen[role]} = {value!r} {problem}", []).append(row.place)
        return None
    return number


def _places(places: Sequence[str]) -> str:
    """ "lines 3, 7" for ["line 3", "line 7"]; of many, the first ones and the number."""
    word = places[0].partition(" ")[0]
    names = [place.partition(" ")[2] for place in places]
    if len(names) > FEW:
        return f"{len(names)} {word}s ({', '.join(names[:FEW])}, …)"
    return f"{word}{'s' if len(names) > 1 else ''} {', '.join(names)}"


# Meaning


def with_baseline(found: Table, runs: list[TableRun], name: str | None, notices: list[str]) -> list[TableRun]:
    """Call the arm that others are compared with BASELINE, as the statistics do."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    if name is not None and name not in arms:
        raise ConfigError(
            [f"--baseline {name}: {found.source} has no such arm.{near(name, arms)}  Arms are {', '.join(arms)}."]
        )
    guess = next((arm for arm in arms if words(arm) in BASELINES), arms[0])
    chosen = name or guess
    if len(arms) > 1 and chosen != BASELINE:
        notices.append(f"The baseline is {chosen}{'' if name else ' (guessed; --baseline NAME takes another)'}.")
    # An arm that is called baseline and is not the one keeps a name of its own.
    names = {chosen: BASELINE} | ({BASELINE: f"{BASELINE} of the table"} if chosen != BASELINE else {})
    return [replace(run, arm=names.get(run.arm, run.arm)) for run in runs]


def in_nats(runs: list[TableRun], metric: str, more: bool, notices: list[str]) -> list[TableRun]:
    """Turn a metric that is no loss into one that falls towards a floor as a power of compute, as losses do."""
    finite = [run.loss for run in runs if math.isfinite(run.loss)] or [1.0]
    if set(words(metric).split("_")) & {"perplexity", "ppl"}:
        notices.append(f"{metric} is judged as its logarithm, the loss in nats per token.")
        runs = [replace(run, loss=math.log(run.loss)) for run in runs]
    elif more:
        whole = 1.0 if max(finite) <= 1 else 100.0
        if max(finite) > 100 or min(finite) < 0:
            raise ConfigError([
                f"{metric} is {min(finite):g} to {max(finite):g}, and more of it is better: it is no share.\n"
                "  Give a metric that falls towards a floor, as a loss does, or a share of right answers."
            ])  # fmt: skip
        notices.append(f"More {metric} is better: what is judged is the missing share, {whole:g} − {metric}.")
        runs = [replace(run, loss=1 - run.loss / whole if math.isfinite(run.loss) else math.nan) for run in runs]
    perfect = [run.place for run in runs if run.loss <= 0]
    if perfect:
        raise ConfigError(
            [f"{_places(perfect)}: {metric} cannot get better.\n  Give a metric that larger runs improve."]
        )
    return runs


def contradictions(found: Table, runs: Sequence[TableRun], seeded: bool, is_loss: bool) -> list[str]:
    """Problems of rows that contradict each other: given twice, or in different units.

    Losses, and only they, may be in bits and in nats.
    """
    problems: list[str] = []
    groups: dict[tuple[Any, ...], list[TableRun]] = {}
    for run in runs:
        size = (run.rung,) if run.rung else (run.params, run.tokens, run.flops)
        groups.setdefault((run.arm, *size, run.seed if seeded else run.loss), []).append(run)
    for group in groups.values():
        if len(group) > 1:
            places = _places([run.place for run in group])
            what = "are the same run" if len({run.loss for run in group}) == 1 else "are one run with different results"
            problems.append(f"{found.source}, {places}: {what}.\n  Keep one row for each arm, size and seed.")
    starved = [run.place for run in runs if run.params and run.tokens and run.tokens < FEWEST_TOKENS * run.params]
    if starved:
        problems.append(
            f"{found.source}, {_places(starved)}: there are over {1 / FEWEST_TOKENS:g} parameters for each token.\n"
            "  One of the two has another unit. Write all digits, or 124M, 2.5B."
        )
    # C / 6·N·D is near 1 for language models, and whatever it is, it is alike in all rows of one unit.
    ratios = [(run.place, run.flops / (6 * run.params * run.tokens)) for run in runs if run.params and run.tokens]
    usual = statistics.median(ratio for _, ratio in ratios) if ratios else 1.0
    odd = [(place, ratio) for place, ratio in ratios if abs(math.log(ratio / usual)) > math.log(UNIT_RATIO)]
    if odd:
        problems.append(
            f"{found.source}, {_places([place for place, _ in odd])}: FLOPs / (6·params·tokens) is {odd[0][1]:.2g}, "
            f"and in most rows {usual:.2g}.\n  One of the three has another unit there. Write all in one unit."
        )
    elif abs(math.log(usual)) > math.log(UNIT_RATIO):
        problems.append(
            f"{found.source}: FLOPs / (6·params·tokens) is {usual:.2g}, and 6 FLOPs are needed for each.\n"
            "  Give compute in FLOPs, or none (--column flops=): it is 6·params·tokens then."
        )
    return problems + (_mixed_losses(found, runs) if is_loss else [])


def crowded(found: Table, runs: Sequence[TableRun]) -> list[str]:
    """Problems of runs of one arm and seed that fall into one rung."""
    groups: dict[tuple[Any, ...], list[TableRun]] = {}
    for run in runs:
        groups.setdefault((run.arm, run.rung, run.seed), []).append(run)
    return [
        f"{found.source}, {_places([run.place for run in group])}: one arm and seed, and about the compute of rung "
        f"{group[0].rung}.\n  Name the sizes with --column rung=NAME, or keep one of the rows."
        for group in groups.values()
        if len(group) > 1
    ]


def _mixed_losses(found: Table, runs: Sequence[TableRun]) -> list[str]:
    """Rows whose loss is 1.44 times or 1/1.44 of what others of the same size have: bits among nats."""
    sizes: dict[tuple[Any, ...], list[TableRun]] = {}
    for run in runs:
        if 0 < run.loss < math.inf:
            sizes.setdefault((run.rung,) if run.rung else (run.params, run.tokens, run.flops), []).append(run)
    odd = []
    for group in sizes.values():
        middle = statistics.median_low([run.loss for run in group])
        # Within 3 %: between arms of one size no change of a recipe is worth as much as a unit.
        odd += [run.place for run in group if abs(abs(math.log(run.loss / middle)) + math.log(NATS_PER_BIT)) < 0.03]
    if not odd:
        return []
    return [
        f"{found.source}, {_places(odd)}: the loss is {1 / NATS_PER_BIT:.2f} times that of other runs of its size, or "
        "they are of it, as bits are of nats.\n  Write all losses in one unit."
    ]


def one_for_each_compute(runs: Sequence[TableRun]) -> bool:
    """True if no arm has one of the baseline's sizes, and the baseline has one size for each amount of compute.

    So are tables of the best size of each budget: every arm has its own, and only their compute compares.
    """
    sizes = {(run.params, run.tokens): run.flops for run in runs if run.arm == BASELINE}
    others = {(run.params, run.tokens) for run in runs if run.arm != BASELINE}
    amounts = sorted(sizes.values())
    steps = [math.log(more / less) for less, more in itertools.pairwise(amounts)]
    return bool(others) and others.isdisjoint(sizes) and all(step > math.log(SAME_COMPUTE) for step in steps)


def with_rungs(runs: Sequence[TableRun], apart: bool) -> list[TableRun]:
    """Give each run the name of its size: the table's, else that of the baseline's run with about its compute.

    Where parameters and tokens vary `apart`, runs of equal compute may be of different sizes: both name the rung.
    """
    if all(run.rung for run in runs):
        return list(runs)
    if apart:
        return [replace(run, rung=f"{amount(run.params)} × {amount(run.tokens)}") for run in runs]
    levels: list[float] = []
    # The baseline's sizes come first, so that an arm with a little more compute falls into its rung.
    for run in sorted(runs, key=lambda run: (run.arm != BASELINE, run.flops)):
        near_by = SAME_COMPUTE if run.arm != BASELINE else 1.02
        if not any(abs(math.log(run.flops / level)) < math.log(near_by) for level in levels):
            levels.append(run.flops)
    placed = [min(levels, key=lambda level, run=run: abs(math.log(run.flops / level))) for run in runs]
    names = {}
    for level in sorted(levels):
        params = {
            amount(run.params) for run, at in zip(runs, placed, strict=True) if at == level and run.arm == BASELINE
        }
        name = params.pop() if len(params) == 1 and "?" not in params else scientific(level)
        names[level] = name if name not in names.values() else scientific(level)
    return [replace(run, rung=names[level]) for run, level in zip(runs, placed, strict=True)]


def with_seeds(runs: Sequence[TableRun], notices: list[str]) -> list[TableRun]:
    """Number the runs of each arm and rung that have no seed; tell which arms share none with the baseline."""
    base = {(run.rung, run.seed) for run in runs if run.arm == BASELINE}
    paired = {run.arm for run in runs if run.seed is not None and (run.rung, run.seed) in base}
    unpaired = list(dict.fromkeys(run.arm for run in runs if run.arm not in paired))
    counts: Counter[tuple[str, str]] = Counter()
    numbered = []
    for run in runs:
        if run.seed is None:
            run = replace(run, seed=counts[run.arm, run.rung])
        counts[run.arm, run.rung] += 1
        numbered.append(run)
    if len({run.arm for run in runs}) == 1:
        return numbered
    if BASELINE in unpaired:
        notices.append("The table has no seeds: runs of a size are compared as independent ones.")
    elif unpaired:
        notices.append(f"No seeds are shared with the baseline by {', '.join(unpaired)}: compared as independent runs.")
    return numbered
