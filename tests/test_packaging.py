"""Promises about installing and running toprope on a machine that has never seen it."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import ROOT, in_one_process
from trainer import torch_versions

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNTIME = [Requirement(line) for line in PYPROJECT["project"]["dependencies"]]
DEV = [Requirement(line) for line in PYPROJECT["project"]["optional-dependencies"]["dev"]]
BUILD = [Requirement(line) for line in PYPROJECT["build-system"]["requires"]]
LOCK: dict[str, Requirement] = {
    canonicalize_name(requirement.name): requirement
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line.strip() and not line.startswith("#")
    for requirement in [Requirement(line)]
}
VERSIONS = {name: str(requirement.specifier).removeprefix("==") for name, requirement in LOCK.items()}
VERBS = [path for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix]  # .py: what they start
SCRIPTS = sorted([*VERBS, ROOT / ".ci" / "run"])

# Some builds of torch bring these, and pin them; others do not have them.
CUDA_COMPANIONS = ("nvidia-", "cuda-", "triton")
SYSTEMS = [("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"), ("darwin", "Darwin", "arm64")]
PLATFORMS = [
    {
        "python_version": python, "python_full_version": f"{python}.0", "implementation_name": "cpython",
        "os_name": "posix", "sys_platform": system, "platform_system": name, "platform_machine": machine,
    }
    for python in ("3.11", "3.12", "3.13", "3.14")
    for system, name, machine in SYSTEMS
]  # fmt: skip


def test_torch_is_pinned_to_the_same_version_wherever_it_is_installed():
    files = ["requirements.lock", "scripts/setup", "docker/Dockerfile"]
    found = {file: re.findall(r"\btorch *([=<>~!]=?=?) *([\w.+]+)", (ROOT / file).read_text()) for file in files}
    for file, pins in found.items():
        assert pins, f"{file} does not pin torch"
        assert {operator for operator, _ in pins} <= {"==", "==="}, file
    assert {version for pins in found.values() for _, version in pins} == {VERSIONS["torch"]}


def test_the_package_takes_the_versions_of_torch_that_the_code_takes_and_so_leaves_a_machines_own():
    (needed,) = (r for r in RUNTIME if r.name == "torch")
    oldest, newest = torch_versions.OLDEST, torch_versions.NEWEST_TESTED
    assert str(needed.specifier) == f"<{newest[0]}.{newest[1] + 1},>={oldest[0]}.{oldest[1]}"
    for build in ("2.11.0+cu130", "2.13.0+cpu", "2.14.1", VERSIONS["torch"]):
        assert needed.specifier.contains(build), build


def test_the_lock_pins_every_package_to_one_version_and_no_build_of_it():
    for name, requirement in LOCK.items():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), f"{name}: {requirement}"


def test_the_lock_satisfies_what_pyproject_asks_for():
    for requirement in RUNTIME + DEV + BUILD:
        name = canonicalize_name(requirement.name)
        assert name in LOCK, f"pyproject asks for {requirement}; requirements.lock has no {name}"
        assert requirement.specifier.contains(VERSIONS[name], prereleases=True), requirement


def test_the_lock_holds_all_that_its_packages_need_on_every_platform_and_nothing_else():
    needed = [_closure(RUNTIME + DEV + BUILD, platform) for platform in PLATFORMS]
    assert set[str]().union(*needed) == set(LOCK)


def test_this_environment_is_the_one_that_the_lock_describes():
    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in LOCK}
    assert installed == VERSIONS


def test_every_import_of_the_package_is_a_declared_dependency():
    declared = {canonicalize_name(requirement.name) for requirement in RUNTIME}
    homes = importlib.metadata.packages_distributions()
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        absolute = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        modules = {name.partition(".")[0] for name in plain + absolute}
        # Triton comes with builds of torch for GPUs, and only those import it.
        for module in modules - sys.stdlib_module_names - {"trainer", "triton"}:
            owners = {canonicalize_name(name) for name in homes.get(module, [])}
            assert owners & declared, f"{path.relative_to(ROOT)} imports {module}: pyproject.toml does not ask for it"


def test_modules_that_must_start_fast_load_without_torch():
    contracts = {contract["id"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}
    modules = contracts["torch-free"]["source_modules"]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_run_that_does_not_compile_starts_without_torchs_compiler(tmp_path: Path):
    """The import takes over a second of every start, and many parts of torch import it without need."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom trainer import config, job\n"
        "few = ['budget.steps=2', 'optim.warmup_steps=0', 'eval.every_steps=0', 'wandb.mode=\"disabled\"']\n"
        "status = job.train(config.load(Path('configs/smoke.toml'), few), Path(sys.argv[1]), time.time())\n"
        "sys.exit(status or 'torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True, cwd=ROOT)


def test_the_hooks_do_nothing_that_scripts_check_does_not():
    """So that scripts/check need not run them, and a commit is checked like everything else."""
    entries = re.findall(r"entry: (\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    check = (ROOT / "scripts/check").read_text()
    assert entries and all(
        entry in (*re.findall(r"^check \w+ (\S+)", check, re.M), "scripts/check") for entry in entries
    )


def test_all_folders_of_python_are_checked_for_types():
    assert {path.parent.name for path in ROOT.glob("[!.]*/*.py")} == set(PYPROJECT["tool"]["pyright"]["include"])


def test_every_template_of_the_pages_is_packaged():
    show = ROOT / "trainer" / "show"
    globs = PYPROJECT["tool"]["setuptools"]["package-data"]["trainer.show"]
    packaged = {path for glob in globs for path in show.glob(glob)}
    assert packaged == set((show / "templates").iterdir()) != set()


def test_a_wheel_outside_the_repository_trains_a_built_in_config_and_starts_a_folder(wheel: Path, tmp_path: Path):
    site, empty = wheel, tmp_path / "empty"
    shipped = {path.relative_to(site / "trainer/configs") for path in (site / "trainer/configs").rglob("*.toml")}
    assert shipped == {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.toml")}
    empty.mkdir()
    ours = f"import trainer; assert trainer.__file__.startswith({str(site)!r}); print(trainer.Config().eval.sets)"
    few = "--set budget.steps=2 --set optim.warmup_steps=0"
    found = (
        "from pathlib import Path; from trainer import builtin; from trainer.chaos import plan; "
        "from trainer.ladder.plan import load; ladder = load.load(builtin.find(Path('demo'), 'ladders')); "
        "campaign = plan.load(builtin.find(Path('smoke'), 'chaos')); "
        "print(len(ladder.runs), 'runs', len(campaign.cases), 'cases')"
    )
    sets, loaded, trained, made, planned, helped = in_one_process(
        [
            f'python -c "{ours}"', f'python -c "{found}"',
            f"python -m trainer train smoke {few}", "python -m trainer init mine",
            "python -m trainer train mine/train.toml --dry-run", "python -m trainer train --help",
        ],
        site, empty,
    ).values()  # fmt: skip
    assert "\n('val',)\n" in sets
    assert re.search(r"^[1-9]\d* runs [1-9]\d* cases$", loaded, re.M)
    assert "next  python -m trainer inspect runs/smoke" in trained
    assert "train.toml" in made and "parameters" in planned and "built-in one" in helped


def test_no_file_used_for_installing_names_a_package_index():
    for file in ["pyproject.toml", "requirements.lock", ".pre-commit-config.yaml", "docker/Dockerfile"]:
        assert "://" not in (ROOT / file).read_text(), file
    for script in SCRIPTS:
        assert not re.search(r"index-url|find-links", script.read_text()), script


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(script: Path):
    assert os.access(script, os.X_OK), f"chmod +x {script.relative_to(ROOT)}"
    first = script.read_text().splitlines()[0]
    if "bash" in first:
        assert first == "#!/usr/bin/env bash"
        assert "\nset -euo pipefail\n" in script.read_text()
        subprocess.run(["bash", "-n", str(script)], check=True)


class Machine:
    """scripts/setup in an empty folder, with a Python whose venv and pip only note what they were asked to do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "asked.log"
        (folder / "scripts").mkdir()
        for name in ("scripts/setup", "pyproject.toml", "requirements.lock"):
            (folder / name).write_bytes((ROOT / name).read_bytes())
        (folder / "scripts/setup").chmod(0o755)
        self.python = folder / "fake-python"
        self.python.write_text(
            f"""#!/usr/bin/env bash
            case "$1 $2" in
                "-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo venv >>asked.log ;;
                "-m pip") shift 3; echo "pip $*" >>asked.log; case "$*" in *"$PIP_BREAKS_AT"*) exit 7 ;; esac ;;
                *) exec "{sys.executable}" "$@" ;;
            esac
            """
        )
        self.python.chmod(0o755)

    def setup(self, breaks_at: str = "nowhere", **environment: str) -> tuple[int, str, list[str]]:
        """Exit status, standard error, and what venv and pip were asked to do."""
        self.log.write_text("")
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "TOPROPE_TORCH")}
        env = clean | {"PYTHON": str(self.python), "PIP_BREAKS_AT": breaks_at} | environment
        done = subprocess.run(["scripts/setup"], cwd=self.folder, env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr, self.log.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_setup_installs_torch_first_then_the_lock_then_toprope_and_nothing_when_nothing_changed(machine: Machine):
    status, _, (venv, *pips) = machine.setup()
    assert (status, venv) == (0, "venv")
    assert [line.split()[-1] for line in pips] == [f"torch=={VERSIONS['torch']}", "requirements.lock", "."]
    assert all("--no-deps" in line for line in pips[1:])
    assert "--no-build-isolation" in pips[2]
    assert machine.setup() == (0, "", [])


@pytest.mark.parametrize("breaks_at", ["torch==", "-r requirements.lock", "-e ."])
def test_setup_interrupted_anywhere_starts_over_next_time(machine: Machine, breaks_at: str):
    whole = machine.setup()[2]
    (machine.folder / "again").mkdir()
    machine = Machine(machine.folder / "again")
    assert machine.setup(breaks_at=breaks_at)[0] != 0
    assert machine.setup()[2] == whole[1:]  # all of it but the virtual environment, which is sound
    assert machine.setup()[2] == []


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml", "scripts/setup"])
def test_setup_installs_again_when_what_it_reads_changes(machine: Machine, name: str):
    machine.setup()
    with (machine.folder / name).open("a") as file:
        file.write("# changed\n")
    assert len(machine.setup()[2]) == 3


def test_setup_keeps_the_build_of_torch_that_was_asked_for_once(machine: Machine):
    machine.setup()
    cuda = f"torch==={VERSIONS['torch']} --some-option"
    assert machine.setup(TOPROPE_TORCH=cuda)[2][0].endswith(f"-c requirements.lock {cuda}")
    assert machine.setup()[2] == []
    assert machine.setup(TOPROPE_TORCH=cuda)[2] == []


def test_setup_makes_again_a_venv_whose_folder_was_moved(machine: Machine):
    machine.setup()
    moved = machine.folder.with_name("moved")
    machine.folder.rename(moved)
    machine.folder, machine.log, machine.python = moved, moved / "asked.log", moved / "fake-python"
    assert machine.setup()[2][0] == "venv"


@pytest.mark.parametrize(
    ("fake", "fact"),
    [
        ('case "$*" in *print*) echo 3.9.7 ;; *version_info*) exit 1 ;; esac', "is Python 3.9.7."),
        ("exit 127", "is not there, or does not start."),
    ],
)
def test_setup_refuses_an_unfit_python_with_fact_rule_and_remedy(machine: Machine, fake: str, fact: str):
    machine.python.write_text(f"#!/usr/bin/env bash\n{fake}\n")
    status, message, asked = machine.setup()
    assert (status, asked) == (1, [])
    first, rule, remedy = message.splitlines()
    assert first.endswith(fact) and "3.11 or newer" in rule and "PYTHON=" in remedy
    assert not (machine.folder / ".venv").exists()


def test_a_test_that_passed_only_when_run_again_is_named_at_the_end(tmp_path: Path):
    (tmp_path / "scripts").mkdir()
    stubs = {
        "scripts/setup": "",
        "scripts/check": "echo check: all ok",
        ".venv/bin/python": f'exec {sys.executable} "$@"',
    }
    for name, does in stubs.items():
        stub = tmp_path / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f"#!/usr/bin/env bash\n{does}\n")
        stub.chmod(0o755)
    (tmp_path / "scripts/test").write_bytes((ROOT / "scripts/test").read_bytes())
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "test_it.py").write_text(
        "from pathlib import Path\n"
        "def test_steady(): pass\n"
        "def test_shaky():\n    mark = Path('mark')\n    seen = mark.exists()\n    mark.touch()\n    assert seen\n"
    )
    command = ["bash", "scripts/test", "-n", "0"]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p xdist"}  # to start fast
    for number, (status, named) in enumerate(((0, "test_it.py::test_shaky"), (1, ""), (1, ""))):
        if number == 1:
            (tmp_path / "scripts/check").write_text("#!/usr/bin/env bash\necho check: failed: types; exit 1\n")
        if number == 2:
            (tmp_path / "test_it.py").write_text("def test_broken(): assert False\n")
        done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        said, _, checked = done.stdout.partition("check: ")
        assert said.partition("passed when run again alone:")[2].strip() == named
        assert checked == ("failed: types\n" if number else "all ok\n"), "the last line"


def _closure(roots: list[Requirement], platform: dict[str, str]) -> set[str]:
    """Names of all distributions that the roots need on a platform, by the metadata of what is installed here."""
    seen: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(root.name), extra) for root in roots for extra in ("", *root.extras)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.name.startswith(CUDA_COMPANIONS):
                continue
            if requirement.marker is None or requirement.marker.evaluate(platform | {"extra": extra}):
                child = canonicalize_name(requirement.name)
                todo += [(child, inner) for inner in ("", *requirement.extras)]
    return {name for name, _ in seen}
