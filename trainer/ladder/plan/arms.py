"""Arms of a ladder file: single changes and combinations of them, and the proof that a pair differs in nothing else."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer import config as configs
from trainer.config import Config
from trainer.ladder.plan import sizes
from trainer.ladder.plan.ladder import AA, PlannedArm, PlannedRun
from trainer.ladder.plan.schema import Arm, LadderFile


def plan(file: LadderFile, config: Config, problems: list[str]) -> dict[str, PlannedArm]:
    """Arms that can be planned by name, the A/A arm first; what is wrong with others is added to `problems`."""
    return _Arms(file, config, problems).plan()


class _Arms:
    def __init__(self, file: LadderFile, config: Config, problems: list[str]) -> None:
        self._file, self._config, self.problems = file, config, problems

    def plan(self) -> dict[str, PlannedArm]:
        arms = {}
        if self._file.aa:
            draw = {"model.init_draw": self._config.model.init_draw + 1}
            arms[AA] = PlannedArm(AA, "What does noise alone seem to be worth?", draw)
        for arm in self._file.arms:
            if not arm.combines and (settings := self._settings_of(arm)):
                arms[arm.name] = PlannedArm(arm.name, arm.question, settings)
        for arm in self._file.arms:
            if arm.combines and (settings := self._combined(arm, arms)):
                arms[arm.name] = PlannedArm(arm.name, arm.question, settings, tuple(arm.combines))
        self._check_alike(list(arms.values()))
        order = [AA, *(arm.name for arm in self._file.arms)]
        return {name: arms[name] for name in order if name in arms}

    def _settings_of(self, arm: Arm) -> dict[str, Any]:
        settings = configs.flatten(arm.set)
        if len(settings) != 1:
            what = f"changes {len(settings)} settings: {', '.join(settings)}" if settings else "changes nothing"
            self.problems.append(
                f"arm {arm.name!r} {what}.\n"
                "  An arm is a single change, or nobody knows which one made the difference. Set one setting; make "
                "several arms and one that `combines` them."
            )
            return {}
        (key,) = settings
        known = [*configs.flatten(Config().model_dump(include=set(configs.MATHEMATICS))), *_rules()]
        if key not in known:
            self.problems.append(
                f"arm {arm.name!r} sets {key}, which decides no weights.{near(key, known)}"
                "  An arm changes what is trained, or a rule as sizes.NAME; what is for all runs goes to [set]."
            )
            return {}
        if key in sizes.SET_BY_RUNGS:
            self.problems.append(
                f"arm {arm.name!r} sets {key}, which rungs and seeds decide.\n  Change another setting."
            )
            return {}
        problems = _held_out(settings, self._file)
        self.problems += [f"arm {arm.name!r}: {problem}" for problem in problems]
        return {} if problems else settings

    def _combined(self, arm: Arm, arms: Mapping[str, PlannedArm]) -> dict[str, Any]:
        where = f"arm {arm.name!r}"
        if arm.set:
            self.problems.append(
                f"{where} has both set and combines.\n  Make the change an arm of its own, and combine it."
            )
        single = {name: one for name, one in arms.items() if not one.combines and not one.is_aa}
        unknown = [name for name in arm.combines if name not in single]
        for name in unknown:
            self.problems.append(f"{where} combines {name!r}, which is no arm of a single change.{near(name, single)}")
        keys = Counter(key for name in arm.combines if name in single for key in single[name].settings)
        twice = [key for key, times in keys.items() if times > 1]
        if twice or len(arm.combines) < 2:
            what = f"changes {', '.join(twice)} twice" if twice else "combines one arm only"
            self.problems.append(f"{where} {what}.\n  Combine two arms or more that change different settings.")
        if unknown or twice or len(arm.combines) < 2:
            return {}
        return {key: value for name in arm.combines for key, value in single[name].settings.items()}

    def _check_alike(self, arms: Sequence[PlannedArm]) -> None:
        for number, arm in enumerate(arms):
            for other in arms[:number]:
                if arm.settings == other.settings:
                    self.problems.append(f"arms {other.name!r} and {arm.name!r} make the same change.\n  Keep one.")


def prove(arm: PlannedArm, base: PlannedRun, run: PlannedRun) -> list[str]:
    """What is wrong with a pair: it must differ in what the arm declares, and else only in what `follows`."""
    rules, settings = split(arm.settings)
    lines = {line.partition(":")[0]: line for line in difference(base.config, run.config)}
    by_rule = {key for rule in rules for key in sizes.DERIVES[rule]}
    unchanged = sorted(set(settings) - lines.keys())
    undeclared = sorted(lines.keys() - set(settings) - by_rule - follows(base, run))
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


def follows(base: PlannedRun, run: PlannedRun) -> set[str]:
    """What differs because an arm has another batch, and so other steps for the same tokens."""
    if base.config.budget == run.config.budget:
        return set()
    differing = {line.partition(":")[0] for line in difference(base.config, run.config)}
    return differing & {"budget.steps", "optim.warmup_steps"}


def _held_out(settings: Mapping[str, Any], file: LadderFile) -> list[str]:
    """What makes the metric of an arm's run another than the baseline's."""
    tokens = [key for key in settings if key in ("data.tokenizer", "data.vocab_size")]
    batch = ("data.micro_batches", "data.micro_batch_sequences")
    text = [key for key in settings if key.startswith("data.") and key not in (*tokens, *batch)]
    problems = []
    if tokens and file.unit == "nats_per_token":
        problems.append(
            f"{tokens[0]} makes other tokens, and nats per token of two tokenizers cannot be compared.\n"
            '  Set unit = "bits_per_byte".'
        )
    if text and file.metric == "val":
        problems.append(
            f"{text[0]} may change which text is held out, and so what is scored.\n"
            '  Give a metric that is not cut from the training text: "repo", or a set of eval.sources.'
        )
    return problems


def difference(one: Config, other: Config) -> list[str]:
    """A line per setting that two configs disagree on; W&B's and faults do not count."""
    left, right = (
        configs.flatten(config.model_dump(mode="json", exclude={"wandb", "faults"})) for config in (one, other)
    )
    return configs.differences(left, right)


def split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(rules, settings)"""
    rules = {key.removeprefix("sizes."): value for key, value in settings.items() if key.startswith("sizes.")}
    return rules, {key: value for key, value in settings.items() if not key.startswith("sizes.")}


def _rules() -> list[str]:
    return [f"sizes.{name}" for name in sizes.DERIVES]


def near(name: str, known: Iterable[str]) -> str:
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    there = f" There are {', '.join(known)}." if len(known) < 12 else ""
    return f"{f' Did you mean {nearest[0]}?' if nearest else there}\n"
