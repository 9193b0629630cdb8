"""Starting real processes from tests: the command line, and torchrun with real gloo ranks."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from trainer import checkpoint
from trainer.faults import attribution
from trainer.launch.agent import LAUNCH, Agent, warm_server
from trainer.launch.forkserver import Child
from trainer.log import events

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.toml"
SMOKE_SHA256 = "fbcbd2b139200b08877ce643a466dcc5d7fbdb121ef6a48514a96a6763ab0938"
"""The weights that configs/smoke.toml ends with, on any number of ranks and under any fault."""
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def settings(**overrides: Any) -> list[str]:
    """{"budget.steps": 5} as --set arguments; keys use "__" for "."."""
    pairs = ((key.replace("__", "."), value) for key, value in overrides.items())
    return [part for key, value in pairs for part in ("--set", f"{key}={json.dumps(value)}")]


def trainer(*arguments: str | Path, check: bool = True, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    """`python -m trainer …` to its end."""
    return run([sys.executable, "-m", "trainer", *map(str, arguments)], check, timeout)


def torchrun(
    ranks: int,
    *arguments: str | Path,
    check: bool = True,
    timeout: float = 100,
    module: str = "trainer",
    restarts: int = 0,
) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc-per-node RANKS -m MODULE …` to its end."""
    options = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "-m", module]
    return run([*LAUNCH, *options, *map(str, arguments)], check, timeout)


ONE_PROCESS = """
import json, runpy, shlex, subprocess, sys, time

for line in json.load(sys.stdin):
    started, words, status = time.monotonic(), shlex.split(line), 0
    print(f"$ {line}", flush=True)
    try:
        if words[:3] == ["python", "-m", "trainer"]:
            sys.argv = words[2:]
            runpy.run_module("trainer", run_name="__main__", alter_sys=True)
        elif words[0] == "python" and words[1].endswith(".py"):
            runpy.run_path(words[1], run_name="__main__")
        else:
            status = subprocess.run(line, shell=True).returncode
    except SystemExit as end:
        status = end.code or 0
    print(f"= exit {status} after {time.monotonic() - started:.1f} s", flush=True)
"""
"""Runs commands as a shell would, but in one process: torch is imported once."""


def in_one_process(commands: Sequence[str], site: Path, directory: Path) -> dict[str, str]:
    """Run commands in `directory` with the package in `site`; return what each of them printed.

    Raises AssertionError if one of them fails.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {
        "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1",
        "PATH": path, "TOPROPE_CACHE": str(directory / "cache"), "COLUMNS": "200",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS], input=json.dumps(commands), cwd=directory, env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    statuses = re.findall(r"^= exit (\S+) after", done.stdout, re.MULTILINE)
    if statuses != ["0"] * len(commands):
        raise AssertionError(f"{done.stdout}\n{done.stderr}")
    return dict(zip(commands, re.split(r"^\$ .*$", done.stdout, flags=re.MULTILINE)[1:], strict=True))


def many_runs(plans: Sequence[Sequence[str]], directory: Path) -> None:
    """Train smoke with each list of overrides, all in one process: run N in DIRECTORY/N."""
    command = [sys.executable, "-m", "tests.many_runs", str(SMOKE), json.dumps(plans), str(directory)]
    run(command, check=True, timeout=110)


def start(
    command: list[str], output: Path | None = None, errors: Path | None = None, *, warm: bool = True,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[bytes] | Child:  # fmt: skip
    """Start a command. If `warm`, a `python -m` is forked from a process that has imported torch already."""
    environment = os.environ | ENVIRONMENT | dict(variables)
    if warm and command[:2] == [sys.executable, "-m"] and (server := warm_server()) is not None:
        child = server.start(command[2], command[3:], environment, directory=ROOT, output=output, errors=errors)
        if child is not None:
            return child
    with contextlib.ExitStack() as files:
        out, err = (files.enter_context(path.open("w")) if path else None for path in (output, errors))
        err = subprocess.STDOUT if out and not err else err
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT, env=environment, start_new_session=True
        )


def run(command: list[str], check: bool, timeout: float, *, warm: bool = True) -> subprocess.CompletedProcess[str]:
    """A command to its end; `warm` as for `start`."""
    with tempfile.TemporaryDirectory() as scratch:
        output, errors = Path(scratch, "output"), Path(scratch, "errors")
        process = start(command, output, errors, warm=warm)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        done = subprocess.CompletedProcess(command, status, output.read_text(), errors.read_text())
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def inspect(run_directory: Path) -> dict[str, Any]:
    return json.loads(trainer("inspect", run_directory, "--json").stdout)


def shared_directory(factory: pytest.TempPathFactory) -> Path:
    """A directory for all of pytest's workers in this session."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def with_faults(faults: Iterable[dict[str, Any]]) -> list[str]:
    """[[faults]] tables as a --set argument."""
    tables = ["{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in f.items()) + "}" for f in faults]
    return ["--set", f"faults=[{', '.join(tables)}]"]


class Job(Agent):
    """A job of tests.worker, with its output and temporary files in `directory`."""

    def __init__(
        self,
        directory: Path,
        config: Path,
        run: Path,
        overrides: Sequence[str],
        options: Sequence[str],
        launch: Sequence[str] = LAUNCH,
        environment: dict[str, str] | None = None,
        slow: dict[str, float] | None = None,
        warm: bool = True,
    ) -> None:
        """`slow` are seconds that every rank sleeps whenever it passes a phase (tests/worker.py)."""
        directory.mkdir(parents=True, exist_ok=True)
        worker = [] if "tests.worker" in launch else ["-m", "tests.worker"]
        super().__init__(
            [*options, *worker, "train", str(config), "--run", str(run), *overrides],
            directory / f"output-{uuid.uuid4().hex[:8]}.txt",
            launch=launch,
            environment=worker_environment(slow) | (environment or {}),
            directory=ROOT,
            warm=warm,
        )

    def wait(self, timeout: float = 300) -> int:
        """Wait for the exit status. A job that takes longer is ended, with an AssertionError."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s\n{self.output[-6000:]}") from None


def worker_environment(slow: dict[str, float] | None = None) -> dict[str, str]:
    """Environment of a tests.worker process."""
    return ENVIRONMENT | {"TOPROPE_TEST_SLOW": json.dumps(slow or {})}


def wait_until(condition: Callable[[], Any], seconds: float) -> Any:
    """The condition's first true value, or its last false one when time is up."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > deadline:
            return value
        time.sleep(0.05)


@contextlib.contextmanager
def mounted(disk: Path, options: str) -> Iterator[None]:
    """A tmpfs mounted over a directory. Skips the test where that is not allowed."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def write_corpus(directory: Path, documents: int = 40) -> str:
    """Documents of nonsense, 255 bytes each; returns a `data.source` for them."""
    directory.mkdir(exist_ok=True)
    for number in range(documents):
        words = " ".join(hashlib.sha256(f"{number} {word}".encode()).hexdigest()[:5] for word in range(40))
        (directory / f"{number:02}.txt").write_text(f"document {number}: {words}\n")
    return f"{directory}/*.txt"


def summarise_run(run: Path) -> dict[str, Any]:
    """The object that `inspect --json` prints, without the second that a process costs."""
    found = [
        {"step": saved.step, "intact": not checkpoint.verify(saved), "bytes": saved.bytes}
        for saved in reversed(checkpoint.committed(run))
    ]
    return attribution.summarise(run, found)


def committed_samples(run: Path) -> dict[int, str]:
    """{step: digest of the sample ids}, by the last attempt that computed the step."""
    done = (entry.event for entry in events.read(run))
    return {event.step: event.samples for event in done if isinstance(event, events.StepDone)}


def outcome(run: Path) -> dict[str, Any]:
    """The result of a run: it must equal the reference run's, to the bit."""
    run_summary = summarise_run(run)
    same = (
        "status", "step", "tokens", "weights_sha256", "state_sha256", "train", "eval", "grad_norm", "learning_rate",
        "replayed_differently",
    )  # fmt: skip
    return {key: run_summary[key] for key in same} | {"samples": committed_samples(run)}
