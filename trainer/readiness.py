"""May this config start? The evidence there is, line by line, and go or no-go by a stated rule.

Evidence is collected and never invented: a report that is missing or too old, or a campaign of another commit, leaves
its line *unknown*. A line that fails or is unknown stops the launch, unless the plan has a decision for it.
"""

import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trainer import config as configs
from trainer import files, tomlfile
from trainer.config import Config, Section
from trainer.errors import ConfigError, TopropeError
from trainer.forecast import run as forecasts
from trainer.forecast import scenario as scenarios
from trainer.ladder.stats.decision import final_verdict
from trainer.log import rundir

Answer = Literal["pass", "fail", "unknown"]
TOPICS = ("changes", "loss", "chaos", "drill", "goodput", "data", "operators", "shapes", "disk", "time")
PAGE, TREE = "ready.html", "ready.json"
SIZE = (
    "model.n_layers", "model.n_heads", "model.n_kv_heads", "model.head_width", "model.width", "budget.",
    "optim.warmup_steps",
)  # fmt: skip
"""Settings that say how large a run is, and not how it is made: a ladder varies them, and derisks the others."""
GIGABYTE = 1e9


class LossPlan(Section):
    ladder: str
    """Folder of a ladder's report, whose curve predicts the loss."""
    at_most: float = Field(gt=0)
    """The run is worth making if the upper end of the predicted interval is at most this, in the ladder's unit."""


class GoodputPlan(Section):
    scenario: str
    at_least: float = Field(gt=0, lt=1)


class Drill(Section):
    config: str = ""
    """Config of the drill; empty: the config that is to start."""
    set: dict[str, Any] = Field(default_factory=dict)
    ranks: int = Field(default=2, ge=2)
    """Ranks of the run whose last one is killed; one rank resumes it."""
    at_step: int = Field(ge=1)
    """Step of the kill, after two saves: the first is complete when the second begins."""
    timeout_seconds: float = Field(default=300.0, gt=0)


class Needs(Section):
    disk_gigabytes: float | None = Field(default=None, gt=0)
    hours: float | None = Field(default=None, gt=0)
    tokens_per_second: float | None = Field(default=None, gt=0)
    """Measured on the target machine."""
    matmul_share: float = Field(default=0.7, gt=0, le=1)
    """Matrix products run at this share of the best rate at their size, at least."""
    max_epochs: float = Field(default=4.0, gt=0)
    """Up to four, text that is read again is nearly as good as new (Muennighoff et al. 2023, arXiv:2305.16264)."""


class Issue(Section):
    line: str = ""
    """Topic of the line that it is about, or a changed setting; empty: an issue that no line shows."""
    title: str
    decision: Literal["accept", "mitigate", "wait", ""] = ""
    """"accept" and "mitigate" let the run start, "wait" does not; empty is no decision."""
    why: str = ""
    who: str = ""
    by: str = ""


class Plan(Section):
    question: str = ""
    baseline: str
    """Config that is known to be stable."""
    ladders: list[str] = Field(default_factory=list)
    """Folders of ladder reports."""
    campaigns: list[str] = Field(default_factory=list)
    """Folders of chaos campaigns."""
    burnin: str = ""
    """Folder of the report that `burnin` wrote on the target machine, for this config."""
    advice: str = ""
    """Folder of the report that `advise` wrote on the target machine, for this config."""
    max_age_days: float = Field(default=30.0, gt=0)
    loss: LossPlan | None = None
    goodput: GoodputPlan | None = None
    drill: Drill | None = None
    needs: Needs = Needs()
    issue: list[Issue] = Field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """One question, its answer, and what it rests on."""

    topic: str
    what: str
    answer: Answer
    evidence: str
    link: str | None = None
    """File that holds the evidence."""
    time: float | None = None
    """Unix time of the evidence."""
    decision: str = ""
    """From the plan: it lets a line pass that is not answered with pass."""


def check(config_path: Path, plan_path: Path, out: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Collect the evidence and return the report as a tree. Raises ConfigError; the drill's runs go below `out`."""
    config = configs.load(config_path)
    plan = tomlfile.read_as(plan_path, Plan, "plan")
    known = set(TOPICS) | configs.mathematics(config).keys() | {""}
    if problems := [
        f"issue {issue.title!r}: line = {issue.line!r} is no line.\n"
        f"  Name a changed setting or one of {', '.join(TOPICS)}."
        for issue in plan.issue
        if issue.line not in known
    ]:
        raise ConfigError([f"{plan_path}: {problem}" for problem in problems])
    review = _Review(config, config_path, plan, plan_path.parent, out, log)
    review.check_drill()
    lines = [_decided(line, plan.issue) for line in review.lines()]
    open_issues = [issue for issue in plan.issue if issue.decision in ("", "wait")]
    blocking = [line for line in lines if line.answer != "pass" and not line.decision]
    go = not blocking and not open_issues
    return {
        "config": str(config_path),
        "plan": str(plan_path),
        "question": plan.question,
        "time": time.time(),
        "commit": review.commit,
        "go": go,
        "summary": _summary(config_path.stem, lines, blocking, open_issues, go),
        "lines": [asdict(line) for line in lines],
        "issues": [issue.model_dump() for issue in plan.issue],
    }


def write(tree: Mapping[str, Any], out: Path) -> None:
    """Write OUT/ready.html and OUT/ready.json. Raises OSError."""
    from trainer.show import page

    out.mkdir(parents=True, exist_ok=True)
    files.write(out / TREE, json.dumps(tree, indent=1))
    files.write(out / PAGE, page.render("ready.html", tree=tree))


def _decided(line: Line, issues: list[Issue]) -> Line:
    """Return the line with the plan's decision about it. A line that passes needs none."""
    for issue in issues:
        about = issue.line == line.topic or (line.topic == "changes" and line.what.startswith(f"{issue.line}:"))
        if issue.line and about and line.answer != "pass" and issue.decision in ("accept", "mitigate"):
            return Line(**{**asdict(line), "decision": f"{issue.decision}: {issue.why or issue.title}"})
    return line


def _summary(name: str, lines: list[Line], blocking: list[Line], issues: list[Issue], go: bool) -> str:
    counts = {answer: sum(line.answer == answer for line in lines) for answer in ("pass", "fail", "unknown")}
    decided = sum(bool(line.decision) for line in lines)
    said = (
        f"{name}: {'go' if go else 'no-go'}. Of {len(lines)} lines of evidence {counts['pass']} pass, "
        f"{counts['fail']} fail and {counts['unknown']} are unknown; {decided} of these have a decision in the plan."
    )
    if blocking:
        said += (
            " It does not start because of " + "; ".join(f"{line.topic} ({line.evidence})" for line in blocking) + "."
        )
    if issues:
        said += " Undecided or waiting: " + "; ".join(issue.title for issue in issues) + "."
    return said


class _Review:
    """Collects the lines of evidence about one config."""

    def __init__(
        self, config: Config, config_path: Path, plan: Plan, base: Path, out: Path, log: Callable[[str], None]
    ) -> None:
        self.config, self.config_path, self.plan, self.base, self.out, self.log = (
            config,
            config_path,
            plan,
            base,
            out,
            log,
        )
        self.commit = rundir.git_commit(Path(__file__).resolve().parents[1])

    def lines(self) -> Iterator[Line]:
        """Yield all lines, in the order in which a reader asks."""
        yield from self._changes()
        yield self._loss()
        yield from self._chaos()
        yield self._drill()
        yield self._goodput()
        yield self._data()
        yield self._operators()
        yield self._shapes()
        yield self._disk()
        yield self._time()

    def _read(self, folder: str, name: str = "report.json") -> tuple[Path, dict[str, Any] | None, str]:
        """Return (path, tree, reason why it is no evidence) of a report; the tree is None where there is a reason."""
        path = _plain(self.base / folder / name)
        try:
            tree = json.loads(path.read_text())
        except OSError:
            return path, None, f"{path} does not exist"
        except ValueError:
            return path, None, f"{path} is no JSON"
        age = (time.time() - path.stat().st_mtime) / 86_400
        if age > self.plan.max_age_days:
            return path, None, f"{path} is {age:.0f} days old, and max_age_days = {self.plan.max_age_days:g}"
        return path, tree, ""

    def _changes(self) -> Iterator[Line]:
        """Yield a line for each setting that differs from the baseline: the verdict of a ladder that covers it."""
        ours = configs.mathematics(self.config)
        stable = configs.mathematics(configs.load(self.base / self.plan.baseline))
        reports = [self._read(folder) for folder in self.plan.ladders]
        changed = [
            key
            for key in sorted(ours.keys() | stable.keys())
            if ours.get(key) != stable.get(key) and key != "seed" and not key.startswith(SIZE)
        ]
        for key in changed:
            what = f"{key}: {json.dumps(stable.get(key))} → {json.dumps(ours.get(key))}"
            yield self._verdict(what, key, ours.get(key), reports)
        if not changed:
            yield Line("changes", f"no setting but its size differs from {self.plan.baseline}", "pass", "compared now")

    def _verdict(self, what: str, key: str, value: Any, reports: list[Any]) -> Line:
        reasons = [reason for _, _, reason in reports if reason]
        for path, tree, _ in reports:
            for arm in (tree or {}).get("arms", ()):
                changes = configs.flatten(arm["changes"])
                if changes != {key: value} or arm.get("combines"):
                    continue
                verdict = final_verdict(tree["verdicts"], (tree.get("course") or {}).get("verdicts", []), arm["name"])
                if verdict is None:
                    continue
                answer: Answer = {"promote": "pass", "reject": "fail"}.get(verdict["decision"], "unknown")  # type: ignore[assignment]
                said = f"{verdict['decision']} by ladder {tree['name']}, arm {arm['name']}. {verdict['why']}"
                said += self._stale((tree.get("course") or {}).get("commits", []))
                return Line("changes", what, answer, said, str(path), path.stat().st_mtime)
        missing = f" ({'; '.join(reasons)})" if reasons else ""
        return Line("changes", what, "unknown", f"never derisked: no ladder here has an arm for it{missing}")

    def _stale(self, commits: list[str]) -> str:
        """Say of which commits a ladder's runs are, unless all are of this one. Its losses are what they were."""
        if not commits or commits == [self.commit]:
            return ""
        theirs = ", ".join(commit[:10] for commit in commits)
        return f" Stale: its runs are of commit {theirs}, and this is {(self.commit or 'unknown')[:10]}."

    def _loss(self) -> Line:
        what = "the predicted loss is worth the run"
        plan = self.plan.loss
        if plan is None:
            return Line("loss", what, "unknown", "the plan names no [loss] ladder and bound")
        path, tree, reason = self._read(plan.ladder)
        curve = (tree or {}).get("curve")
        if tree is None or not curve:
            return Line("loss", what, "unknown", reason or f"{path} has no fitted curve")
        flops = _flops(self.config)
        # Along the curve as reported: linear in the logarithm of compute between its points.
        value, low, high = (_along(curve["flops"], curve[name], flops) for name in ("value", "low", "high"))
        if value is None or low is None or high is None:
            return Line("loss", what, "unknown", f"{flops:.2g} FLOPs lie beyond the curve of {path}", str(path))
        said = f"{value:.4g} ({low:.4g} to {high:.4g}) at {flops:.2g} FLOPs; at most {plan.at_most:g} is wanted"
        return Line("loss", what, "pass" if high <= plan.at_most else "fail", said, str(path), path.stat().st_mtime)

    def _chaos(self) -> Iterator[Line]:
        what = "faults leave no trace in this version's runs"
        if not self.plan.campaigns:
            yield Line("chaos", what, "unknown", "the plan names no campaign")
        for folder in self.plan.campaigns:
            path, tree, reason = self._read(folder)
            if tree is None:
                yield Line("chaos", what, "unknown", reason)
                continue
            commit = _commit_of(path.parent)
            outcomes: dict[str, int] = {}
            for result in tree["results"]:
                outcomes[result["outcome"]] = outcomes.get(result["outcome"], 0) + 1
            said = f"{tree['campaign']}: " + ", ".join(f"{number} {name}" for name, number in sorted(outcomes.items()))
            answer: Answer = "fail" if "fail" in outcomes else "unknown"
            if "pass" in outcomes and set(outcomes) <= {"pass", "skipped", "not applicable"}:
                answer = "pass"
            if commit is None or commit != self.commit or commit.endswith("+"):
                # A "+" says that files were changed, and not which.
                theirs, ours = ((name or "unknown")[:10] for name in (commit, self.commit))
                answer, said = "unknown", f"{said}, but of commit {theirs}, and this is {ours}"
            yield Line("chaos", what, answer, said, str(path), path.stat().st_mtime)

    def check_drill(self) -> None:
        """Raise ConfigError if the drill's run ends before the kill, or is killed before it has a sure checkpoint."""
        if self.plan.drill is None:
            return
        path, overrides = self._drill_config(self.plan.drill)
        config, at_step = configs.load(path, overrides), self.plan.drill.at_step
        # A save is written beside the next steps; only when the next one begins is it sure to be complete.
        first, last = 2 * config.checkpoint.every_steps + 1, config.budget.steps
        if not config.checkpoint.every_steps or first > last:
            fact = f"the drill's run of {last} steps has no two checkpoints before its end."
            remedy = "Set a longer budget.steps or a smaller checkpoint.every_steps in [drill] set."
            raise ConfigError([f"{fact}\n  {remedy}"])
        if not first <= at_step <= last:
            fact = f"drill.at_step = {at_step}: no checkpoint is sure to be complete then, or the run is over."
            raise ConfigError([f"{fact}\n  Kill at a step from {first} (after two saves) to {last} (the last)."])

    def _drill_config(self, drill: Drill) -> tuple[Path, list[str]]:
        """Path of the config that the drill trains, and the settings that it changes."""
        path = _plain(self.base / drill.config) if drill.config else self.config_path
        return path, [f"{key}={tomlfile.text(value)}" for key, value in configs.flatten(drill.set).items()]

    def _drill(self) -> Line:
        """Kill a run, resume it on another number of ranks, and compare its weights with an undisturbed run's."""
        what = "a killed run resumes on another number of ranks to the same bits"
        drill = self.plan.drill
        if drill is None:
            return Line("drill", what, "unknown", "the plan has no [drill]")
        path, changes = self._drill_config(drill)
        overrides = [part for change in changes for part in ("--set", change)]
        began, place = time.time(), self.out / "drill"
        shutil.rmtree(place, ignore_errors=True)
        kill = f'faults=[{{kind = "sigkill", rank = {drill.ranks - 1}, at_step = {drill.at_step}}}]'
        python = [sys.executable, "-m"]
        ranks = [*python, "trainer.launch.torchrun", "--standalone", "--nproc-per-node", str(drill.ranks), "-m"]
        train = ["trainer", "train", str(path), *overrides]
        calm, killed = place / "calm", place / "killed"
        for name, command, wanted in (
            ("calm run", [*python, *train, "--run", str(calm)], True),
            ("killed run", [*ranks, *train, "--run", str(killed), "--set", kill], False),
            ("resumed run", [*python, *train, "--run", str(killed)], True),
        ):
            self.log(f"drill: {name}")
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=drill.timeout_seconds, check=False
                )
            except subprocess.TimeoutExpired:
                return Line(
                    "drill", what, "fail", f"the {name} took longer than {drill.timeout_seconds:g} s", str(place)
                )
            if (done.returncode == 0) != wanted:
                last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
                return Line("drill", what, "fail", f"the {name} ended with {done.returncode}: {last}", str(place))
        from trainer.log import summary
        from trainer.log.history import History

        history = History.read(killed)
        if not history.fired:
            return Line("drill", what, "unknown", f"the kill at step {drill.at_step} never fired", str(place))
        if not history.attempts[-1].from_step:
            return Line("drill", what, "unknown", "no checkpoint was there to resume from: kill later", str(place))
        hashes = [summary.summarise(run)["weights_sha256"] for run in (calm, killed)]
        same = hashes[0] is not None and hashes[0] == hashes[1]
        said = (
            f"{drill.ranks} ranks killed at step {drill.at_step}, resumed by 1: weights_sha256 "
            f"{'equal' if same else 'differ'}, {' and '.join((found or 'none')[:12] for found in hashes)}, "
            f"in {time.time() - began:.0f} s"
        )
        return Line("drill", what, "pass" if same else "fail", said, str(place), time.time())

    def _goodput(self) -> Line:
        what = "enough of the time is productive under the failures of the target"
        plan = self.plan.goodput
        if plan is None:
            return Line("goodput", what, "unknown", "the plan has no [goodput] scenario")
        path = _plain(self.base / plan.scenario)
        tree = forecasts.forecast(scenarios.load(path))
        low, value = tree["range"]["low"], tree["goodput"]["value"]
        said = (
            f"forecast {100 * value:.3g} %, at least {100 * low:.3g} % in 97.5 % of runs; "
            f"{100 * plan.at_least:g} % is wanted"
        )
        return Line("goodput", what, "pass" if low >= plan.at_least else "fail", said, str(path), time.time())

    def _operators(self) -> Line:
        what = "this machine's operators agree with references"
        if not self.plan.burnin:
            return Line("operators", what, "unknown", "the plan names no burnin report")
        path, tree, reason = self._read(self.plan.burnin)
        if tree is None:
            return Line("operators", what, "unknown", reason)
        devices = tree["devices"]
        named = (f"{device['device']} ({device['computes_with']['device model']})" for device in devices)
        said = (
            f"{' and '.join(named)}: "
            f"{sum(row['calls'] for device in devices for row in device['operators'])} calls checked, "
            f"{sum(len(device['failures']) for device in devices)} wrong; repeated "
            f"{min(device['repeats'] for device in devices)} times, "
            f"{sum(len(device['differing']) for device in devices)} cases with other bits"
        )
        others = self._differences(tree, devices[0]["computes_with"])
        answer: Answer = "pass" if tree["passed"] else "fail"
        if others and tree["passed"]:
            answer, said = "unknown", f"{said}, but not of this config and torch: {'; '.join(others)}"
        return Line("operators", what, answer, said, str(path), path.stat().st_mtime)

    def _differences(self, tree: Mapping[str, Any], computes_with: Mapping[str, str]) -> list[str]:
        """Differences of model, precision and torch between what was measured and what is to start."""
        ours = configs.flatten(self.config.model.model_dump(mode="json", by_alias=True))
        return configs.differences(tree["model"], ours) + configs.differences(
            {"numerics.precision": tree["precision"], "torch": computes_with["torch"].partition("+")[0]},
            {
                "numerics.precision": self.config.numerics.precision,
                "torch": importlib.metadata.version("torch").partition("+")[0],
            },
        )

    def _shapes(self) -> Line:
        least = self.plan.needs.matmul_share
        what = f"matrix products run at {least:.0%} of the machine's best rate at their size, or more"
        if not self.plan.advice:
            return Line("shapes", what, "unknown", "the plan names no advise report")
        path, tree, reason = self._read(self.plan.advice)
        if tree is None:
            return Line("shapes", what, "unknown", reason)
        share, best = tree["share_of_best"], next(iter(tree["proposals"]), None)
        if share is None:
            reason = f"{path} has no matrix product with a known best"
            return Line("shapes", what, "unknown", reason, str(path), path.stat().st_mtime)
        said = f"{share:.0%} of the best on {tree['computes_with']['device model']}, MFU {tree['mfu']['value']:.0%}"
        if best is not None and best["gain"] > 1:
            said += f"; {best['what']} would be {best['gain']:.2f} times as fast, as predicted"
        answer: Answer = "pass" if share >= least else "fail"
        if others := self._differences(tree, tree["computes_with"]):
            answer, said = "unknown", f"{said}, but not of this config and torch: {'; '.join(others)}"
        return Line("shapes", what, answer, said, str(path), path.stat().st_mtime)

    def _data(self) -> Line:
        """Compare the training text with the held-out sets, as training would, and count the epochs."""
        from trainer import data

        most = self.plan.needs.max_epochs
        what = f"no held-out document has a near-duplicate in the training text, and it is read {most:g} times at most"
        config, began = self.config, time.time()
        try:
            prepared = data.prepare(config.data, config.eval, config.model.context)
        except TopropeError as error:
            return Line("data", what, "fail", f"the data cannot be prepared: {str(error).splitlines()[0]}")
        epochs = _tokens(config) / len(prepared.train.tokens)
        said = f"{epochs:.3g} epochs of {len(prepared.train.tokens):,} tokens"
        if prepared.overlap is None or config.data.decontaminate == "off":
            remedy = 'data.decontaminate is "off": nothing was compared'
            return Line("data", what, "fail" if epochs > most else "unknown", f"{said}; {remedy}", time=began)
        sets = prepared.overlap.report["sets"]
        said += "; " + " ".join(prepared.overlap.messages(config.data))
        found = any(each["found"] for each in sets.values()) and config.data.decontaminate == "report"
        answer: Answer = "pass" if all(each["compared"] for each in sets.values()) else "unknown"
        return Line("data", what, "fail" if found or epochs > most else answer, said, time=began)

    def _disk(self) -> Line:
        what = "the disk holds the run's checkpoints"
        needed = self.plan.needs.disk_gigabytes
        source = "the plan"
        if needed is None:
            saves, steps = self.config.checkpoint, self.config.budget.steps
            # One more than are kept, while it is written.
            kept = saves.keep_last + 1 + (steps // saves.keep_every_steps if saves.keep_every_steps else 0)
            needed = _checkpoint_bytes(self.config) * kept / GIGABYTE
            source = f"{kept} checkpoints"
        place = next(parent for parent in (self.out.resolve(), *self.out.resolve().parents) if parent.exists())
        free = shutil.disk_usage(place).free / GIGABYTE
        said = f"{needed:.3g} GB needed ({source}), {free:.3g} GB free at {place}"
        return Line("disk", what, "pass" if free >= needed else "fail", said, time=time.time())

    def _time(self) -> Line:
        what, needs = "the run ends in the time there is", self.plan.needs
        if needs.hours is None or needs.tokens_per_second is None:
            return Line("time", what, "unknown", "the plan gives no needs.hours and needs.tokens_per_second")
        hours = _tokens(self.config) / needs.tokens_per_second / 3600
        said = f"{hours:.3g} h of steps at {needs.tokens_per_second:,.0f} tokens/s, {needs.hours:g} h there"
        return Line("time", what, "pass" if hours <= needs.hours else "fail", said)


def _plain(path: Path) -> Path:
    """Return a path without "..": it is shown."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _tokens(config: Config) -> int:
    data = config.data
    return config.budget.steps * data.micro_batches * data.micro_batch_sequences * config.model.context


def _flops(config: Config) -> float:
    from trainer import costs

    vocabulary = costs.padded_vocab(costs.vocabulary(config)[0], config.model.vocab_size)
    of_token = costs.flops_per_token(config.model, vocabulary) + costs.teaching_flops(config, vocabulary)
    return float(of_token) * _tokens(config)


def _checkpoint_bytes(config: Config) -> int:
    """Return the size of one checkpoint: weights and moments."""
    from trainer import costs

    vocabulary = costs.padded_vocab(costs.vocabulary(config)[0], config.model.vocab_size)
    memory = costs.memory_per_rank(config, vocabulary, 1)
    return memory["master_weights"] + memory["optimizer"]


def _along(flops: list[float], values: list[float | None], at: float) -> float | None:
    """Return the curve's value at this compute; None beyond its ends or where it is unknown."""
    for (left, a), (right, b) in zip(
        zip(flops, values, strict=True), list(zip(flops, values, strict=True))[1:], strict=False
    ):
        if left <= at <= right and a is not None and b is not None:
            share = math.log(at / left) / math.log(right / left)
            return a + share * (b - a)
    return None


def _commit_of(campaign: Path) -> str | None:
    """Return the commit that made a campaign's reference run, which its config.json holds."""
    try:
        return rundir.read(campaign / "reference" / "run").get("git_commit")
    except (TopropeError, OSError):
        return None
