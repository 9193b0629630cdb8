"""Promises about arms that are code: a patch or a commit makes other runs, whose difference is the change alone."""

import difflib
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trainer
from tests.support import ROOT, SMOKE
from trainer import provenance, tomlfile
from trainer.errors import ConfigError
from trainer.fleet.backend import Local, Task
from trainer.fleet.run_store import StoredRun
from trainer.ladder.plan import code
from trainer.ladder.plan import load as ladders
from trainer.ladder.plan.ladder import Ladder
from trainer.log import rundir

LADDER = """
question = "Is the change worth it?"
baseline = "train.toml"
set = { budget.steps = 2, data.micro_batches = 2, eval.max_tokens = 512 }
seeds = [0]
aa = false
metric = "val"
unit = "nats_per_token"
sizes = { tokens_per_parameter = 1, head_width = 8, learning_rate = "fixed" }
rungs = [{ name = "s", width = 16, n_layers = 1 }, { name = "m", width = 24, n_layers = 1 }]
target = { width = 32, n_layers = 1 }
"""
MLP = "trainer/model.py"


def diff(name: str, old: str, new: str, text: str) -> str:
    """A diff of one file that replaces `old` by `new`."""
    assert old in text
    before, after = (part.splitlines(keepends=True) for part in (text, text.replace(old, new)))
    return "".join(difflib.unified_diff(before, after, f"a/{name}", f"b/{name}"))


def of_model(old: str, new: str) -> str:
    return diff(MLP, old, new, (ROOT / MLP).read_text())


SINE = of_model("_SquaredReLU.apply(h_BTF)", "h_BTF.sin()")


def plan(home: Path, *arms: dict[str, Any], own: bool = False) -> Ladder:
    """The ladder in this folder with these arms; with `own` the baseline is the example's recurrence."""
    home.mkdir(exist_ok=True)
    (home / "ideas").mkdir(exist_ok=True)
    chosen = 'model = { class = "recurrent.py:Recurrent" }\n' if own else ""
    (home / "train.toml").write_text(f'extends = "{SMOKE}"\n{chosen}')
    shutil.copy(ROOT / "examples/own_model/recurrent.py", home)
    tables = "".join(
        "\n[[arms]]\n" + "".join(f"{key} = {tomlfile.text(value)}\n" for key, value in arm.items()) for arm in arms
    )
    (home / "ladder.toml").write_text(LADDER + tables)
    return ladders.load(home / "ladder.toml")


def keys(ladder: Ladder) -> dict[str, set[str]]:
    return {arm: {run.key for run in ladder.runs if run.arm == arm} for arm in {run.arm for run in ladder.runs}}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of these tests' own, beside which nothing is written."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("TOPROPE_CACHE", str(root))
        yield root


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_patch_of_the_package_makes_runs_by_the_changed_code_and_leaves_ours_alone(tmp_path: Path):
    (tmp_path / "ideas").mkdir()
    (tmp_path / "ideas" / "sine.diff").write_text(SINE)
    before = (ROOT / MLP).read_text()
    soft = {"name": "soft", "set": {"model.logit_softcap": 30.0}}
    both = {"name": "both", "combines": ["sine", "soft"]}
    ladder = plan(tmp_path, {"name": "sine", "patch": "ideas/sine.diff"}, both, soft)
    found = keys(ladder)
    assert all(not found[one] & found[other] for one, other in itertools.combinations(found, 2))
    runs = {run.arm: run for run in ladder.runs if run.rung == "s"}
    assert runs["baseline"].tree is None and runs["sine"].tree == runs["both"].tree is not None
    assert runs["sine"].flops_per_token == runs["baseline"].flops_per_token
    assert runs["both"].config.model.logit_softcap == 30.0
    stored = StoredRun(tmp_path / "run")
    stored.directory.mkdir()
    stored.prepare(runs["sine"].config, "sine")
    assert Local(server=None)(Task(stored, "sine", 1, code.environment(runs["sine"].tree))).wait() == 0
    theirs, ours = trainer.open_run(stored.run), trainer.train(runs["baseline"].config, tmp_path / "ours")
    assert (
        rundir.read(theirs.path)["computes_with"]["code"] == code.digest(runs["sine"].tree) != provenance.code_digest()
    )
    assert theirs.losses()[-1]["loss"] != ours.losses()[-1]["loss"]
    assert theirs.losses()[0]["step"] == 1
    assert (ROOT / MLP).read_text() == before


def test_a_patch_of_ones_own_files_is_made_on_a_copy_and_an_edit_of_it_makes_other_runs(tmp_path: Path):
    recurrent = (ROOT / "examples/own_model/recurrent.py").read_text()
    (tmp_path / "ideas").mkdir()
    found = []
    for openness in ("self.openness + 1", "self.openness + 2"):
        patch = diff("recurrent.py", "+ self.openness", f"+ {openness}", recurrent)
        (tmp_path / "ideas" / "open.diff").write_text(patch)
        ladder = plan(tmp_path, {"name": "open", "patch": "ideas/open.diff"}, own=True)
        found.append(keys(ladder))
        arm = next(run for run in ladder.runs if run.arm == "open")
        assert openness in Path(arm.config.model.class_.rpartition(":")[0]).read_text()
        assert arm.tree is None
    assert (tmp_path / "recurrent.py").read_text() == recurrent
    assert found[0]["baseline"] == found[1]["baseline"]
    assert not found[0]["open"] & (found[0]["baseline"] | found[1]["open"])
    assert ladder.settings["arms.open.patch"] == "ideas/open.diff"
    assert len(ladder.settings["arms.open.code"]) == 16


def test_a_commit_of_ones_own_files_is_an_arm(tmp_path: Path):
    plan(tmp_path, own=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    first = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    with pytest.raises(ConfigError, match="'as it was' is the baseline at every rung, so it changes nothing"):
        plan(tmp_path, {"name": "as it was", "commit": first[:12]}, own=True)
    newer = tmp_path / "recurrent.py"
    newer.write_text(newer.read_text().replace("self.openness)", "self.openness + 1)"))
    found = keys(ladders.load(tmp_path / "ladder.toml"))
    assert not found["as it was"] & found["baseline"]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"patch": "ideas/nowhere.diff"}, r"nowhere\.diff' cannot be read"),
        ({"patch": "ideas/empty.diff"}, r"empty\.diff names no file"),
        ({"patch": "ideas/stale.diff"}, r"stale\.diff does not apply: .*\n  Make it again"),
        ({"patch": "ideas/mixed.diff"}, r"mixed\.diff changes trainer/ and mine\.py"),
        ({"patch": "ideas/other.diff"}, r"changes mine\.py, which no run uses \(files of its own: none\)"),
        ({"patch": "ideas/comment.diff"}, r"is the baseline at every rung, so it changes nothing"),
        ({"patch": "ideas/sine.diff", "set": {"model.qk_norm": False}}, r"has set and patch\."),
        ({"commit": "main"}, r"commit = 'main' is no commit"),
        ({"commit": "0123456789ab"}, r"'0123456789ab' is not known"),
    ],
)
def test_an_arm_of_code_that_cannot_be_is_refused(tmp_path: Path, arm: dict[str, Any], message: str):
    (tmp_path / "ideas").mkdir()
    mine = "--- a/mine.py\n+++ b/mine.py\n@@ -1 +1 @@\n-a\n+b\n"
    comment = of_model('"""relu(x)²: autograd', '"""relu(x)^2: autograd')
    patches = {"empty": "nothing", "stale": SINE.replace("-            return self", "-            return they"),
               "mixed": SINE + mine, "other": mine, "comment": comment, "sine": SINE}  # fmt: skip
    for name, text in patches.items():
        (tmp_path / "ideas" / f"{name}.diff").write_text(text)
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, {"name": "idea", **arm})
