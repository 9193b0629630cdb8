"""What a run was computed with is part of what it is: something else is found before its first new step."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests.support import SMOKE, settings
from trainer import provenance
from trainer.errors import RunDirectoryError
from trainer.log import events, rundir

RUN = Path("runs/mine")
RECORDED = {
    "device": "cpu",
    "CPU capability": "AVX512",
    "CPU threads": "2",
    "torch": "2.13.0+cpu of commit cf30153c4c13",
}


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
    with pytest.raises(RunDirectoryError) as refused:
        provenance.compare(RUN, RECORDED, [now, now], accept=False)
    assert f"\n    {line}\n" in str(refused.value)
    assert "--accept-other-bits, or give a new --run" in str(refused.value)
    assert provenance.compare(RUN, RECORDED, [now, now], accept=True) == [line]


@pytest.mark.parametrize("recorded", [RECORDED, {}, None])
def test_ranks_that_compute_alike_go_on_and_one_that_does_not_is_named(recorded: dict[str, str] | None):
    assert provenance.compare(RUN, recorded, [RECORDED, RECORDED], accept=False) == []
    with pytest.raises(RunDirectoryError, match=r'CPU threads: "2" → "4" \(rank 1\)'):
        provenance.compare(RUN, recorded, [RECORDED, RECORDED | {"CPU threads": "4"}, RECORDED], accept=False)


def resume(run: Path, *options: str, check: bool = True) -> Any:
    """Train the run to step 4 in a process of its own: kernels are chosen once in a process."""
    options = (*settings(budget__steps=4, checkpoint__every_steps=2, numerics__threads=2), *options)
    return support.run([sys.executable, "-m", "trainer", "train", str(SMOKE), "--run", str(run), *options], check, 100)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has come to step 2 of 4."""
    run = tmp_path_factory.mktemp("provenance") / "run"
    resume(run)
    (run / "checkpoints" / "step-00000004").rename(run / "gone")
    return run


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("ATEN_CPU_CAPABILITY", "default", '→ "DEFAULT"'),
        ("OMP_THREAD_LIMIT", "1", 'CPU threads: "2" → "1"'),
    ],
)
def test_another_way_to_compute_is_refused_before_any_work_then_accepted_and_logged(
    half: Path, tmp_path: Path, monkeypatch, variable: str, value: str, line: str
):
    run = shutil.copytree(half, tmp_path / "run")
    before = events.next_attempt(run)
    monkeypatch.setenv(variable, value)
    refused = resume(run, check=False)
    assert refused.returncode == 2 and line in refused.stderr, refused.stderr
    assert events.next_attempt(run) == before, "there was work"
    resume(run, "--accept-other-bits")
    started = events.select(events.read(run), events.AttemptStarted)[-1][1]
    assert started.from_step == 2 and line in started.other_bits[0]
    assert rundir.read(run)["computes_with"] == started.computes_with
    assert any(line in warned.message for _, warned in events.select(events.read(run), events.Warned))
    resume(run)  # it is what the run is computed with now


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
