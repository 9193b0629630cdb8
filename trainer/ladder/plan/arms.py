"""Arms of a ladder file: single changes, combinations of them, and the proof that a pair differs in nothing else."""

import difflib
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer import config as configs
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.ladder.plan import code as codearms
from trainer.ladder.plan import sizes
from trainer.ladder.plan.ladder import AA, DISTIL, ENSEMBLE, PlannedArm, PlannedRun
from trainer.ladder.plan.schema import CODE_LENGTH, Arm, LadderFile


def plan_arms(file: LadderFile, config: Config, folder: Path, problems: list[str]) -> dict[str, PlannedArm]:
    """Return the arms that can be planned, by name, the A/A arm first; add what is wrong with others to `problems`.

    `folder` is the ladder file's.
    """
    # Combinations are written from single arms, which may stand below them in the file.
    singles: dict[str, PlannedArm] = {}
    for arm in file.arms:
        if arm.patch or arm.commit:
            if (made := _change_of_code(arm, folder, config, problems)) is not None:
                singles[arm.name] = made
        elif arm.ensemble or arm.distil:
            if settings := _of_several_runs(arm, file, problems):
                singles[arm.name] = PlannedArm(arm.name, arm.question, settings)
        elif not arm.combines and (settings := _single_change(arm, file, problems)):
            singles[arm.name] = PlannedArm(arm.name, arm.question, settings)
    arms: dict[str, PlannedArm] = {}
    if file.aa:
        draw = {"model.init_draw": config.model.init_draw + 1}
        arms[AA] = PlannedArm(
            AA, "How far apart do two equal arms seem to be, by the noise of their seeds alone?", draw
        )
    for arm in file.arms:
        if arm.name in singles:
            arms[arm.name] = singles[arm.name]
        elif arm.combines and (settings := _combined_changes(arm, singles, problems)):
            trees = [singles[name].tree for name in arm.combines if singles[name].tree is not None]
            arms[arm.name] = PlannedArm(arm.name, arm.question, settings, tuple(arm.combines), *trees[:1])
    problems += [
        f"arms {first.name!r} and {second.name!r} make the same change.\n  Keep one."
        for first, second in itertools.combinations(arms.values(), 2)
        if first.settings == second.settings
    ]
    return arms


def _change_of_code(arm: Arm, folder: Path, config: Config, problems: list[str]) -> PlannedArm | None:
    """Return an arm that is a patch or a commit; None if it cannot be planned."""
    named = [name for name in ("set", "patch", "commit", "ensemble", "distil", "combines") if getattr(arm, name)]
    if len(named) > 1:
        remedy = "An arm is a single change. Make several arms and one that `combines` them."
        problems.append(f"arm {arm.name!r} has {' and '.join(named)}.\n  {remedy}")
        return None
    try:
        change = codearms.read(arm, folder, config)
    except ConfigError as error:
        problems += [f"arm {arm.name!r}: {problem}" for problem in error.problems]
        return None
    # All changes of code have one key, so that a combination cannot have two of them.
    settings = {"code.change": arm.patch or arm.commit, **change.own}
    return PlannedArm(arm.name, arm.question, settings, tree=change.tree)


def _of_several_runs(arm: Arm, file: LadderFile, problems: list[str]) -> dict[str, Any]:
    """The change of an arm that is an ensemble, or whose runs are taught; empty if it cannot be planned."""
    named = [name for name in (ENSEMBLE, DISTIL, "set", "combines") if getattr(arm, name)]
    if len(named) > 1:
        remedy = "An arm is a single change. Make several arms and one that `combines` them."
        problems.append(f"arm {arm.name!r} has {' and '.join(named)}.\n  {remedy}")
    elif arm.ensemble == 1:
        problems.append(f"arm {arm.name!r}: an ensemble of one is the baseline.\n  Give ensemble = 2 or more.")
    elif file.metric == CODE_LENGTH:
        why = "an ensemble has none" if arm.ensemble else "teachers who know the text make no code of them"
        problems.append(
            f"arm {arm.name!r}: metric = {CODE_LENGTH!r} is made of training losses, and {why}.\n"
            "  Compare by a held-out set."
        )
    else:
        return {ENSEMBLE: arm.ensemble} if arm.ensemble else {DISTIL: arm.distil}
    return {}


def _single_change(arm: Arm, file: LadderFile, problems: list[str]) -> dict[str, Any]:
    """The one setting of an arm; empty if the arm cannot be planned."""
    settings = configs.flatten(arm.set)
    if len(settings) != 1:
        change = f"changes {len(settings)} settings: {', '.join(settings)}" if settings else "changes nothing"
        problems.append(
            f"arm {arm.name!r} {change}.\n"
            "  An arm is a single change: of several, it is unknown which made the difference. Set one setting; make "
            "several arms and one that `combines` them."
        )
        return {}
    (key,) = settings
    known = [*configs.flatten(Config().model_dump(include=set(configs.MATHEMATICS)))]
    known += [f"sizes.{rule}" for rule in sizes.DERIVES]
    tokenizer = key in ("data.tokenizer", "data.vocab_size")
    # These leave held-out text as it is.
    same_split = key in ("data.micro_batches", "data.micro_batch_sequences", "data.unique_tokens")
    if key not in known and not key.startswith(("model.options.", "optim.options.")):
        problem = (
            f" sets {key}, which decides no weights.{near(key, known)}"
            "  An arm changes what is trained, or a rule as sizes.NAME; a setting of all runs belongs in [set]."
        )
    elif key in sizes.SET_BY_RUNGS[file.sizes.axis]:
        problem = f" sets {key}, which rungs and seeds decide.\n  Change another setting."
    elif tokenizer and file.sizes.axis == "data":
        problem = (
            f": {key} makes other tokens, and so many tokens of another kind are another amount of text.\n"
            '  Compare tokenizers on the axis "compute".'
        )
    elif key == "model.context" and file.sizes.axis == "data":
        problem = (
            f": {key} cuts the text into other sequences, of which the seed draws other text.\n"
            '  Compare contexts on the axis "compute".'
        )
    # The other two would change the metric, so that the arm could not be compared with the baseline.
    elif tokenizer and file.unit == "nats_per_token":
        problem = (
            f": {key} makes other tokens, and nats per token of two tokenizers cannot be compared.\n"
            '  Set unit = "bits_per_byte".'
        )
    elif key.startswith("data.") and not (tokenizer or same_split) and file.metric in ("val", CODE_LENGTH):
        problem = (
            f": {key} may change which text is held out, and so what is scored.\n"
            '  Give a metric that is not cut from the training text: "repo", or a set of eval.sources.'
        )
    elif key == "model.dropout" and file.metric == CODE_LENGTH:
        problem = (
            f": metric = {CODE_LENGTH!r} scores the training text with dropout on.\n"
            "  That is longer than the model's own loss. Compare by a held-out set."
        )
    else:
        return settings
    problems.append(f"arm {arm.name!r}{problem}")
    return {}


def _combined_changes(arm: Arm, singles: Mapping[str, PlannedArm], problems: list[str]) -> dict[str, Any]:
    """All settings of the arms that this arm combines; empty if it cannot be planned."""
    where = f"arm {arm.name!r}"
    if arm.set:
        problems.append(f"{where} has both set and combines.\n  Make the change an arm of its own, and combine it.")
    unknown = [name for name in arm.combines if name not in singles]
    for name in unknown:
        problems.append(f"{where} combines {name!r}, which is no arm of a single change.{near(name, singles)}")
    # Where two arms set one key, their combination would silently be only one of them.
    changes = [change for name in arm.combines if name in singles for change in singles[name].settings.items()]
    twice = [key for key, times in Counter(key for key, _ in changes).items() if times > 1]
    if twice or len(arm.combines) < 2:
        fault = f"changes {', '.join(twice)} twice" if twice else "combines one arm only"
        problems.append(f"{where} {fault}.\n  Combine two arms or more that change different settings.")
        return {}
    several = {ENSEMBLE: "an ensemble", DISTIL: "distil"}
    kinds = [words for key, words in several.items() if key in dict(changes)]
    if kinds and any(singles[name].tree for name in arm.combines if name in singles):
        problems.append(f"{where} combines {kinds[0]} with a change of the package.\n  Combine it with settings only.")
        return {}
    if len(kinds) > 1:
        problems.append(f"{where} combines {' and '.join(kinds)}.\n  Make an arm of each.")
        return {}
    return {} if unknown else dict(changes)


def prove(arm: PlannedArm, base: PlannedRun, run: PlannedRun) -> list[str]:
    """Return the problems of a pair: it may differ in what the arm declares, in what follows from it, and no more."""
    rules, settings = split_rules(arm.settings)
    lines = {line.partition(":")[0]: line for line in difference(base.config, run.config)}
    # A rule may change any setting that it decides; at some rungs it changes none.
    allowed = settings.keys() | {key for rule in rules for key in sizes.DERIVES[rule]}
    # An arm with another batch takes other steps for the same tokens.
    if base.config.budget != run.config.budget:
        allowed |= {"budget.steps", "optim.warmup_steps"}
    unchanged, undeclared = sorted(settings.keys() - lines.keys()), sorted(lines.keys() - allowed)
    problems = []
    if unchanged:
        problems.append(
            f"it sets {', '.join(unchanged)} to what the baseline has, so it changes nothing.\n"
            "  Give another value. What [sizes] decides is changed by its rule: sizes.NAME."
        )
    if undeclared:
        problems.append(
            f"its config differs in more than it declares: {'; '.join(lines[key] for key in undeclared)}.\n"
            "  A pair must be a single change apart. Change the baseline so that these stay as they are."
        )
    return problems


def difference(first: Config, second: Config) -> list[str]:
    """Return a line for each setting in which two configs differ; W&B's and faults do not count."""
    trees = (config.model_dump(mode="json", exclude={"wandb", "faults"}) for config in (first, second))
    return configs.differences(*map(configs.flatten, trees))


def split_rules(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (rules, settings): those named sizes.NAME, without the prefix, and the others that a config has."""
    rules = {key.removeprefix("sizes."): value for key, value in settings.items() if key.startswith("sizes.")}
    several = (ENSEMBLE, DISTIL)
    of_config = {k: v for k, v in settings.items() if k not in several and not k.startswith(("sizes.", "code."))}
    return rules, of_config


def near(name: str, known: Iterable[str]) -> str:
    """Return the nearest known name as a question, else a short list of all; ends the line."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    listed = f" There are {', '.join(known)}." if len(known) < 12 else ""
    return f"{f' Did you mean {nearest[0]}?' if nearest else listed}\n"
