"""What every test stands on: one thread, no network, no real cache or W&B account, and one token store per session."""

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest

REPO_ROOT = Path(__file__).resolve().parent.parent

# Before anything imports torch, and for the worker processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]  # a developer's WANDB_MODE=online would overrule the configs under test
os.environ["NETRC"] = os.devnull  # and a developer's account is not for test runs

hypothesis.settings.register_profile("default", deadline=None)  # the machine is shared: time is no failure
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    """Share one cache among xdist's workers, so that each tokenizer and token store is built once per session.

    Not one that outlives the session: what an older version of the code built would hide what this one does.
    """
    if hasattr(config, "workerinput"):
        return  # a worker: it has inherited the controller's environment
    cache = tempfile.mkdtemp(prefix="toprope-tests-")
    os.environ["TOPROPE_CACHE"] = cache
    os.environ["HF_HOME"] = str(Path(cache) / "huggingface")
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := _why_no_gpu()):
        pytest.skip(reason)


def _why_no_gpu() -> str | None:
    import torch

    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device is available"


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO_ROOT
