"""Fixtures and surroundings of all tests: one thread, no network, no real W&B account, one cache per session."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.faulty_runs import FaultyRun
    from tests.logs import Run

# Before anything imports torch, and for the worker processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of them would compile the package, for itself alone
sys.dont_write_bytecode = False
os.environ["HF_HUB_OFFLINE"] = "1"
for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]  # a developer's WANDB_MODE=online would overrule the configs under test
os.environ["NETRC"] = os.devnull  # and a developer's account is not for test runs

# A signal that is ignored at the start stays ignored, in all that tests start: so it is where the tests run under nohup
# or as a background job of a script.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

LONGEST_FIRST = (
    "survival", "equality", "nemesis", "slurm", "fuzz_cli", "mutations", "ladder_run", "rendezvous", "faults_worker",
    "chaos_quorum", "elastic", "own_model", "network", "signals", "chaos", "sentinel", "first_day", "transport",
    "wandb", "chaos_command", "packaging", "hunt", "quorum", "ladder_verdict", "readme", "provenance", "memory_copies",
    "ladder_code", "forecast", "judge", "examples", "quorum_launch", "start", "gpu_script", "islands_apart", "cli",
    "exact_triton", "sentinel_quorum", "own_optimizer", "forkserver", "hang", "torchrun", "advise",
)  # fmt: skip
"""Files that take long, so that none of them is begun when all others are done; those that wait among those that
compute."""

hypothesis.settings.register_profile("default", deadline=None)  # the machine is shared: time is no failure
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    """Share one cache among xdist's workers, so that each tokenizer and token store is built once per session.

    The cache does not outlive the session: stores that an older version built would hide new errors.
    """
    if hasattr(config, "workerinput"):
        return  # a worker: it has inherited the controller's environment
    cache = tempfile.mkdtemp(prefix="toprope-tests-")
    os.environ["TOPROPE_CACHE"] = cache
    os.environ["HF_HOME"] = str(Path(cache) / "huggingface")
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.backends.cuda.is_built():
            pytest.skip(f"torch {torch.__version__} is built without CUDA")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device is available")


@pytest.fixture
def run(tmp_path: Path) -> "Run":
    """A pretended run, recorded and not started."""
    from tests.logs import Run

    run = Run(tmp_path / "run")
    run.record()
    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny baseline for ladders, and its corpus."""
    from tests.support import write_corpus
    from tests.test_ladder_file import TINY

    directory = tmp_path_factory.mktemp("ladders")
    (directory / "tiny.toml").write_text(TINY.format(corpus=write_corpus(directory / "corpus")))
    return directory


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs, away from the repository."""
    from tests.support import ROOT, shared_directory
    from trainer.data.cache import built_once, no_progress

    def build(site: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            source, made = Path(scratch, "source"), Path(scratch, "made")
            made.mkdir()
            for name in ("trainer", "configs"):
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
            for name in ("pyproject.toml", "README.md", "LICENSE"):
                shutil.copy(ROOT / name, source)
            code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
            subprocess.run([sys.executable, "-c", code, str(made)], cwd=source, check=True, capture_output=True)
            (wheel,) = made.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)

    return built_once(shared_directory(tmp_path_factory), "wheel", build, no_progress)


@pytest.fixture(scope="session")
def reference_run(tmp_path_factory: pytest.TempPathFactory) -> "FaultyRun":
    """The run without faults that the runs of `trial` must equal."""
    from tests.faulty_runs import make_reference

    return make_reference(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def trial(reference_run: "FaultyRun", tmp_path: Path) -> "FaultyRun":
    """A run that may have faults."""
    from dataclasses import replace

    return replace(reference_run, directory=tmp_path, faults=[])


@pytest.fixture
def one_rank_group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
