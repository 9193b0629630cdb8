"""Machine, torch and code are part of a run's identity: another one is found before any new step."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import grimp
import pytest

from tests import support
from tests.support import ROOT, SMOKE, settings
from trainer import provenance
from trainer.errors import RunDirectoryError
from trainer.log import events, rundir

RUN = Path("runs/mine")
RECORDED = {"code": "0123456789abcdef", "device": "cpu", "CPU capability": "AVX512", "CPU threads": "2"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"device": "cuda"}, 'device: "cpu" → "cuda"'),
        ({"CPU capability": "DEFAULT"}, 'CPU capability: "AVX512" → "DEFAULT"'),
        ({"CPU threads": "1"}, 'CPU threads: "2" → "1"'),
        ({"MKL_CBWR": "COMPATIBLE"}, 'MKL_CBWR: "(absent)" → "COMPATIBLE"'),
    ],
)
def test_a_difference_is_refused_with_old_and_new_and_can_be_accepted(change: dict[str, str], line: str):
    now = RECORDED | change
    contents = {"computes_with": RECORDED}
    with pytest.raises(RunDirectoryError) as refused:
        provenance.compare(RUN, contents, [now, now], accept=False)
    assert f"\n    {line}\n" in str(refused.value)
    assert "--accept-other-bits, or give a new --run" in str(refused.value)
    assert provenance.compare(RUN, contents, [now, now], accept=True) == [line]


@pytest.mark.parametrize("contents", [{"computes_with": RECORDED}, {}], ids=["a resume", "a first start"])
def test_ranks_that_compute_alike_go_on_and_one_that_does_not_is_named(contents: dict[str, Any]):
    assert provenance.compare(RUN, contents, [RECORDED, RECORDED], accept=False) == []
    with pytest.raises(RunDirectoryError, match=r'CPU threads: "2" → "4" \(rank 1\)'):
        provenance.compare(RUN, contents, [RECORDED, RECORDED | {"CPU threads": "4"}, RECORDED], accept=False)


def test_a_run_of_older_code_that_gives_the_same_bits_goes_on_and_one_of_any_other_code_does_not():
    now = RECORDED | {"code": provenance.CODE_BEFORE_RECORDS}
    for older in ("cb58cdba3b5e040a", provenance.CODE_BEFORE_RECORDS):
        assert provenance.compare(RUN, {"computes_with": RECORDED | {"code": older}}, [now], accept=False) == []
    with pytest.raises(RunDirectoryError):
        provenance.compare(RUN, {"computes_with": RECORDED}, [now], accept=False)


def test_runs_of_older_code_of_the_same_bits_are_resumed():
    """After an edit: if no bit changes, add the new digest to SAME_BITS; else change the value here."""
    found = provenance.code_digest(), provenance._digest_of_folder("islands")
    assert found == ("3f3b3e07ab4d257b", "ecc09f419acf64f8")


# Few and small: two threads of a rank turn in vain while others hold the cores.
SETTINGS = settings(budget__steps=4, checkpoint__every_steps=2, numerics__threads=2, data__micro_batches=2)


def resume(run: Path, *options: str) -> Any:
    """Train the run to step 4."""
    command = [sys.executable, "-m", "trainer", "train", str(SMOKE), "--run", str(run), *SETTINGS, *options]
    return support.run(command, True, 100)


IN_TURN = """
import sys
from trainer import cli
command, statuses = sys.argv[1:], []
for options in ([], ["--accept-other-bits"], []):
    sys.argv = ["trainer", *command, *options]
    try:
        cli.main()
    except SystemExit as left:
        statuses.append(left.code)
print("statuses", statuses)
"""


def resume_in_turn(run: Path, **surroundings: Any) -> str:
    """Resume in a new process, which computes in another way: refused, accepted, and then as recorded. Returns stderr.

    A new one, since variables that choose kernels are read, and code is loaded, once in a process.
    """
    command = [sys.executable, "-c", IN_TURN, "train", str(SMOKE), "--run", str(run), *SETTINGS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100, **surroundings)
    assert done.stdout.endswith("statuses [2, 0, 0]\n"), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has come to step 2 of 4."""
    run = tmp_path_factory.mktemp("provenance") / "run"
    resume(run)
    (run / "checkpoints" / "step-00000004").rename(run / "gone")
    return run


def test_other_ways_to_compute_are_refused_before_any_work_then_accepted_and_logged(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = shutil.copytree(half, tmp_path / "run")
    before = events.next_attempt(run)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    lines = ('→ "DEFAULT"', 'CPU threads: "2" → "1"')
    refused = resume_in_turn(run, cwd=ROOT)
    assert all(line in refused for line in lines), refused
    attempts = events.select(events.read(run), events.AttemptStarted)
    assert [entry.attempt for entry, _ in attempts[-2:]] == [before, before + 1], "the refused one did work"
    accepted, again = (event for _, event in attempts[-2:])
    assert accepted.from_step == 2 and all(line in " ".join(accepted.other_bits) for line in lines)
    assert rundir.read(run)["computes_with"] == accepted.computes_with == again.computes_with
    assert list(again.other_bits) == []
    warnings = " ".join(warned.message for _, warned in events.select(events.read(run), events.Warned))
    assert all(line in warnings for line in lines)


def test_a_run_that_an_older_toprope_made_resumes_with_a_warning_and_is_recorded(half: Path, tmp_path: Path):
    run = shutil.copytree(half, tmp_path / "run")
    contents = rundir.read(run)
    recorded = contents.pop("computes_with")
    rundir.config_path(run).write_text(json.dumps(contents))
    for path in events.events_directory(run).iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        old = [{k: v for k, v in line.items() if k not in ("computes_with", "other_bits")} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert "does not say what it was computed with" in resume(run).stdout
    assert rundir.read(run)["computes_with"] == recorded


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, to be edited."""
    return Path(shutil.copytree(ROOT / "trainer", tmp_path / "trainer", ignore=shutil.ignore_patterns("__pycache__")))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} of {old!r}"
    path.write_text(text.replace(old, new))


def test_comments_docstrings_and_formatting_are_no_other_code(package: Path):
    edit(
        package / "model.py",
        "return (grad * positive).mul_(2)",
        "return ((grad * positive)  # twice\n            .mul_(2))",
    )
    edit(package / "model.py", '"""relu(x)²:', '"""The square of relu(x):')
    (package / "exact.py").write_text(ast.unparse(ast.parse((package / "exact.py").read_text())))
    edit(package / "job.py", "PROGRESS_SECONDS = 0.5", "PROGRESS_SECONDS = 0.7")  # decides no bit
    assert provenance.code(package) == provenance.code()


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("model.py", "return positive * positive", "return 2 * positive * positive", "_SquaredReLU.forward"),
        ("model.py", "NORM_EPSILON = 1e-6", "NORM_EPSILON = 1e-5", "(outside of functions)"),
        ("exact.py", "return max(2, math.ceil(", "return max(3, math.ceil(", "Grids._coarser"),
        ("job.py", "if config.numerics.exact and config.data.micro_batches > 1:", "if config.numerics.exact:", "build"),
        ("config.py", "return round(self.mlp_ratio * self.width)", "return 4 * self.width", "Model.mlp_width"),
    ],
)
def test_a_change_that_may_change_bits_is_named_by_file_and_function(package: Path, file, old, new, named):
    edit(package / file, old, new)
    assert provenance.code_changes(provenance.code(), provenance.code(package)) == [f"code: {file}: {named}"]


def test_a_resume_with_other_code_is_refused_with_what_changed_and_can_be_accepted(half: Path, package: Path):
    run = Path(shutil.copytree(half, package.with_name("run")))
    edit(package / "model.py", "return positive * positive", "return 2 * positive * positive")
    refused = resume_in_turn(run, cwd=package.parent, env=os.environ | {"PYTHONPATH": str(package.parent)})
    assert "\n    code: model.py: _SquaredReLU.forward\n" in refused
    accepted = events.select(events.read(run), events.AttemptStarted)[-2][1]
    assert accepted.from_step == 2 and list(accepted.other_bits) == ["code: model.py: _SquaredReLU.forward"]


NOT_NUMERIC = {
    "builtin", "config", "config_rules", "errors", "files", "own_code", "own_import", "phases", "tomlfile",
    "parallel.elastic",
    # Tokens and tokenizer are identified by their own digests.
    "data", "data.cache", "data.corpus", "data.identity", "data.near", "data.overlap", "data.own_texts", "data.prepare",
    "data.reading", "data.sources", "data.tokenizer", "data.tokens",
    # torch's version is recorded by itself.
    "torch_versions",
    # Counts the bytes of what was read.
    "data.first_epoch",
}  # fmt: skip


def test_every_name_that_is_said_to_decide_bits_is_there():
    for file, chosen in provenance.NUMERIC_SOURCES.items():
        assert {*chosen} <= {name.partition(".")[0] for name in provenance.code()[file]}, file


def test_every_module_that_a_step_uses_decides_bits_or_is_known_not_to():
    graph = grimp.build_graph("trainer", exclude_type_checking_imports=True, cache_dir=None)
    chosen = {file.removesuffix(".py").replace("/", ".") for file in provenance.NUMERIC_SOURCES}
    used = {"trainer.step", "trainer.evaluate", "trainer.optim"}
    used |= {module for start in list(used) for module in graph.find_upstream_modules(start)}
    unknown = {module.removeprefix("trainer.") for module in used} - chosen - NOT_NUMERIC - {"parallel", "trainer"}
    assert not unknown, "add them to NUMERIC_SOURCES, or above with the reason"
