"""Arms of a ladder file: single changes, combinations of them, and the proof that a pair differs in nothing else."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from trainer import config as configs
from trainer.config import Config
from trainer.ladder.plan import sizes
from trainer.ladder.plan.ladder import AA, PlannedArm, PlannedRun
from trainer.ladder.plan.schema import Arm, LadderFile


def plan_arms(file: LadderFile, config: Config, problems: list[str]) -> dict[str, PlannedArm]:
    """Return the arms that can be planned, by name, the A/A arm first; add what is wrong with others to `problems`."""
    # Combinations are written from single arms, which may stand below them in the file.
    singles: dict[str, PlannedArm] = {}
    for arm in file.arms:
        if not arm.combines and (settings := _single_change(arm, file, problems)):
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
            arms[arm.name] = PlannedArm(arm.name, arm.question, settings, tuple(arm.combines))
    planned = list(arms.values())
    for number, arm in enumerate(planned):
        problems += [
            f"arms {other.name!r} and {arm.name!r} make the same change.\n  Keep one."
            for other in planned[:number]
            if arm.settings == other.settings
        ]
    return arms


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
    if key not in known:
        found = [
            f" sets {key}, which decides no weights.{near(key, known)}"
            "  An arm changes what is trained, or a rule as sizes.NAME; a setting of all runs belongs in [set]."
        ]
    elif key in sizes.SET_BY_RUNGS:
        found = [f" sets {key}, which rungs and seeds decide.\n  Change another setting."]
    else:
        found = [f": {problem}" for problem in _metric_changes(key, file)]
    problems += [f"arm {arm.name!r}{text}" for text in found]
    return {} if found else settings


def _metric_changes(key: str, file: LadderFile) -> list[str]:
    """Problems of a setting that would change the metric, so that the arm could not be compared with the baseline."""
    if key in ("data.tokenizer", "data.vocab_size"):
        if file.unit != "nats_per_token":
            return []
        return [
            f"{key} makes other tokens, and nats per token of two tokenizers cannot be compared.\n"
            '  Set unit = "bits_per_byte".'
        ]
    batch = key in ("data.micro_batches", "data.micro_batch_sequences")
    if key.startswith("data.") and not batch and file.metric == "val":
        return [
            f"{key} may change which text is held out, and so what is scored.\n"
            '  Give a metric that is not cut from the training text: "repo", or a set of eval.sources.'
        ]
    return []


def _combined_changes(arm: Arm, singles: Mapping[str, PlannedArm], problems: list[str]) -> dict[str, Any]:
    """All settings of the arms that this arm combines; empty if it cannot be planned."""
    where = f"arm {arm.name!r}"
    if arm.set:
        problems.append(f"{where} has both set and combines.\n  Make the change an arm of its own, and combine it.")
    unknown = [name for name in arm.combines if name not in singles]
    for name in unknown:
        problems.append(f"{where} combines {name!r}, which is no arm of a single change.{near(name, singles)}")
    keys = Counter(key for name in arm.combines if name in singles for key in singles[name].settings)
    twice = [key for key, times in keys.items() if times > 1]
    if twice or len(arm.combines) < 2:
        fault = f"changes {', '.join(twice)} twice" if twice else "combines one arm only"
        problems.append(f"{where} {fault}.\n  Combine two arms or more that change different settings.")
    if unknown or twice or len(arm.combines) < 2:
        return {}
    return {key: value for name in arm.combines for key, value in singles[name].settings.items()}


def prove(arm: PlannedArm, base: PlannedRun, run: PlannedRun) -> list[str]:
    """Return the problems of a pair: it may differ only in what the arm declares and in `consequences`."""
    rules, settings = split_rules(arm.settings)
    lines = {line.partition(":")[0]: line for line in difference(base.config, run.config)}
    # A rule may change any setting that it decides; at some rungs it changes none.
    by_rule = {key for rule in rules for key in sizes.DERIVES[rule]}
    unchanged = sorted(set(settings) - lines.keys())
    undeclared = sorted(lines.keys() - set(settings) - by_rule - consequences(base, run))
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


def consequences(base: PlannedRun, run: PlannedRun) -> set[str]:
    """Return the settings that differ because the arm has another batch, and so other steps for the same tokens."""
    if base.config.budget == run.config.budget:
        return set()
    differing = {line.partition(":")[0] for line in difference(base.config, run.config)}
    return differing & {"budget.steps", "optim.warmup_steps"}


def difference(first: Config, second: Config) -> list[str]:
    """Return a line for each setting in which two configs differ; W&B's and faults do not count."""
    left, right = (
        configs.flatten(config.model_dump(mode="json", exclude={"wandb", "faults"})) for config in (first, second)
    )
    return configs.differences(left, right)


def split_rules(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (rules, settings): those named sizes.NAME, without the prefix, and the others."""
    rules = {key.removeprefix("sizes."): value for key, value in settings.items() if key.startswith("sizes.")}
    return rules, {key: value for key, value in settings.items() if not key.startswith("sizes.")}


def near(name: str, known: Iterable[str]) -> str:
    """Return the nearest known name as a question, else a short list of all; ends the line."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    listed = f" There are {', '.join(known)}." if len(known) < 12 else ""
    return f"{f' Did you mean {nearest[0]}?' if nearest else listed}\n"
