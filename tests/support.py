"""Starting real processes from tests: the command line, and torchrun with real gloo ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.toml"
RENDEZVOUS_FAILED = "RendezvousTimeoutError"


def settings(**overrides: Any) -> list[str]:
    """{"budget.steps": 5} as --set arguments; keys use "__" for "."."""
    pairs = ((key.replace("__", "."), value) for key, value in overrides.items())
    return [part for key, value in pairs for part in ("--set", f"{key}={json.dumps(value)}")]


def trainer(*arguments: str | Path, check: bool = True, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    """`python -m trainer …` to its end."""
    return run([sys.executable, "-m", "trainer", *map(str, arguments)], check, timeout)


def torchrun(
    ranks: int, *arguments: str | Path, check: bool = True, timeout: float = 100, module: str = "trainer"
) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc-per-node RANKS -m MODULE …` to its end."""
    command = [sys.executable, "-c", "from trainer.launch import torchrun; torchrun()"]
    options = ["--standalone", "--nproc-per-node", str(ranks), "-m", module]
    return run([*command, *options, *map(str, arguments)], check, timeout)


def run(command: list[str], check: bool, timeout: float) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT, env=environment
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def inspect(run_directory: Path) -> dict[str, Any]:
    return json.loads(trainer("inspect", run_directory, "--json").stdout)


def without_words(lines: Iterable[str], *words: str) -> list[str]:
    return [line for line in lines if not any(word in line for word in words)]
