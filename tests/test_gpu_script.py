"""scripts/gpu, on the CPU with tiny sizes: it runs to its end, goes on where it was, and skips with the reason."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import gpu_parts
from tests import support
from tests.support import ROOT, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("gpu-text") / "corpus", 400)


def gpu(corpus: str, out: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.small_gpu_script", corpus, "--tiny", "--out", str(out), *arguments]
    return support.run(command, check, timeout=250)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = gpu(corpus, out, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_runs_to_its_end_on_a_cpu_and_every_part_is_made_or_skipped_with_the_reason(made: Path):
    report = json.loads((made / "report.json").read_text())
    assert list(report["parts"]) == list(gpu_parts.PARTS)
    skipped = {name for name, part in report["parts"].items() if "skipped" in part}
    assert skipped == {"compiled", "speed", "speed-64", "speed-billion", "recovery", "tests"}
    assert report["parts"]["bits"]["differ"] == []
    assert report["parts"]["runs"]["equal"] and report["parts"]["ranks"]["equal"]
    assert report["parts"]["speed-eager"]["plain"]["tokens_per_second"] > 0
    assert report["parts"]["speed-fp8-head"]["exact"]["tokens_per_second"] > 0
    table = (made / "table.md").read_text()
    assert "tiny sizes: the figures mean nothing" in table
    assert "| two runs, killed, fsdp to replicated: one hash | True | True | holds |" in table
    assert "| MFU, 1 B | – | ≥ 0.5 | unknown |" in table
    (stall,) = [line for line in table.splitlines() if "stall" in line]
    assert stall.endswith("| unknown |"), "a tiny figure is none"
    assert not (made / "scratch").exists()


@pytest.mark.slow
def test_given_again_it_makes_only_what_is_missing(made: Path, tmp_path: Path, corpus: str):
    out = Path(shutil.copytree(made, tmp_path / "out"))
    (out / "parts" / "machine.json").unlink()
    kept = (out / "parts" / "bits.json").read_text()
    again = gpu(corpus, out, "machine", "bits", "runs")
    assert [line.split(",")[0] for line in again.stdout.splitlines() if line.startswith("gpu: ")] == ["gpu: machine"]
    assert (out / "parts" / "bits.json").read_text() == kept
    assert list(json.loads((out / "report.json").read_text())["parts"]) == list(gpu_parts.PARTS)


def report(**parts: Any) -> dict[str, Any]:
    about = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.13.0", "date": "2026-01-01", "tiny": False}
    return {"about": about, "parts": parts}


def test_targets_hold_or_are_missed_and_what_was_not_measured_is_unknown():
    rate = {"tokens_per_second": 1e5, "mfu": 0.4}
    table = gpu_parts.table(
        report(
            **{
                "speed-64": {"exact": rate},
                "speed": {"speed_of_exact": {"over same kernels": 0.97, "over any kernels": 0.94}},
                "saving": {"saves": [{"stall_seconds": 0.3}]},
                "bits": {"differ": ["rounding of odd"]},
                "runs": {"error": "exit 1: …", "seconds": 3.0},
            }
        )
    )
    assert "| exact over the same deterministic kernels | 0.97 | ≥ 0.98 | **missed** |" in table
    assert "| exact over any kernels | 0.94 | ≥ 0.93 | holds |" in table
    assert "| MFU, 124 M, 64 sequences | 0.4 | ≥ 0.38 | holds |" in table
    assert "| stall of the first save, seconds | 0.3 | ≤ 0.1 | **missed** |" in table
    assert "| differences of bits | ['rounding of odd'] | none | **missed** |" in table
    assert "| several ranks: one hash | – | True | unknown |" in table
    assert "| runs | 3.0 | error: exit 1: … |" in table
    assert "speed-64, exact: 100,000 tokens/s, MFU 0.400" in table


def test_a_part_that_is_not_there_is_refused_with_those_that_are():
    done = subprocess.run(
        [ROOT / "scripts" / "gpu", "no-such-part"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2 and "there is no part 'no-such-part'; the parts are machine, bits" in done.stderr
