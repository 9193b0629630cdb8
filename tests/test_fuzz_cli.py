"""Every command × what may be wrong around it: a documented exit status, a message, no traceback, nothing spoilt.

The cases are tables: a command, what was done to its surroundings, the right status. Each runs in a process forked from
one that has imported everything, in a directory of its own. For every case it holds that

- it ends within its time, with 0, 1, 2 or 75, and with the status of the table where there is one;
- if it fails, it says what is wrong and, in an indented line, what to do; no traceback in any case;
- what lies beside the places that the command is for is the same afterwards, to the byte.
"""

import itertools
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.support import ROOT, write_corpus
from tests.test_ladder_file import ARM, HEAD, RUNGS, SIZES, TINY
from trainer.launch import agent, forkserver

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cases are forked, which only Linux does here")

AT_ONCE = 3
SECONDS = 30.0  # of a machine under load
IMPORTED = (
    "multiprocessing.synchronize", "random", "numpy.random", "rich.console", "trainer.cli", "trainer.ladder.judge",
    "trainer.chaos.report", "trainer.chaos.run", "trainer.ladder.run", "trainer.ladder.report",
    "trainer.ladder.terminal", "trainer.faults.attribution", "trainer.show.inspect", "trainer.show.curves",
    "trainer.show.timeline", "matplotlib.backends.backend_agg", "pyarrow.parquet", "dateutil.rrule", "jinja2",
    "PIL.PngImagePlugin",
)  # fmt: skip
WITH_TORCH = (
    *agent.WARM, "trainer.sample", "trainer.costs", "torch._subclasses.fake_tensor", "torch.utils.flop_counter"
)  # fmt: skip
WITHOUT_TORCH = ("init", "inspect", "plot", "judge", "chaos", "submit")
"""Commands that import no torch: forked from a process without it, which is much smaller."""
CAMPAIGN = 'question = "Is it told?"\nconfig = "tiny.toml"\nranks = 1\n[[runs]]\nname = "calm"\n'
MESSAGE = re.compile(r"^\w+: .+?\n  +\S|^ *Usage: |^╭─ Error ", re.MULTILINE | re.DOTALL)
"""Fact, then an indented remedy; or the usage that typer prints for arguments that make no command."""

Change = Callable[[Path], object]
"""Makes something wrong with a path, or in a case's directory."""


@dataclass(frozen=True)
class Case:
    """A command in a directory where something may be wrong."""

    name: str
    command: Sequence[str | bytes]
    change: Change = lambda directory: None
    """Done to the case's directory beforehand."""
    status: tuple[int, ...] = (0, 1, 2, 75)
    """The right ones."""
    writes: str = ""
    """Names in the case's directory that the command is for."""
    environment: dict[str, str | None] = field(default_factory=dict)
    """Variables that differ; None removes one."""
    how: dict[str, str] = field(default_factory=dict)
    """Options of tests.fuzzed_command."""


@dataclass(frozen=True)
class Servers:
    """Fork servers with all imports that cases need, and with all but torch."""

    with_torch: forkserver.ForkServer
    without: forkserver.ForkServer

    def of(self, case: Case) -> forkserver.ForkServer:
        return self.without if case.command and case.command[0] in WITHOUT_TORCH else self.with_torch


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # where tests.fuzzed_command is found
        with_torch, without = forkserver.spawn([*IMPORTED, *WITH_TORCH]), forkserver.spawn(IMPORTED)
    assert with_torch is not None and without is not None
    yield Servers(with_torch, without)
    with_torch.close()
    without.close()


@pytest.fixture(scope="module")
def world(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The surroundings of a case: files to start from, and a finished run."""
    world = tmp_path_factory.mktemp("fuzz") / "world"
    for folder in ("home", "tmp", "other"):
        (world / folder).mkdir(parents=True)
    write_corpus(world / "corpus", documents=12)
    (world / "tiny.toml").write_text(TINY.format(corpus="corpus/*.txt") + "[budget]\nsteps = 10\n")
    (world / "campaign.toml").write_text(CAMPAIGN)
    (world / "ladder.toml").write_text(HEAD + SIZES + RUNGS + ARM)
    (world / "table.csv").write_text("flops,loss\n1e15,3\n2e15,2.9\n")
    status, output = run(servers, world, Case("", ["train", "tiny.toml", "--run", "run"]))
    assert status == 0, output
    return world


def run(servers: Servers, directory: Path, case: Case) -> tuple[int, str]:
    """Return a command's exit status and everything that it printed."""
    environment = dict(os.environ) | {
        "HOME": "{}/home", "TMPDIR": "{}/tmp", "XDG_CACHE_HOME": "", "PYTHONPATH": str(ROOT), **case.environment
    }  # fmt: skip
    present = {name: value.replace("{}", str(directory)) for name, value in environment.items() if value is not None}
    output = directory.parent / f"{directory.name}.txt"
    arguments = [json.dumps(case.how), *map(os.fsdecode, case.command)]
    child = servers.of(case).start("tests.fuzzed_command", arguments, present, directory=directory, output=output)
    assert child is not None
    try:
        return child.wait(SECONDS), output.read_text(errors="replace")
    finally:
        child.kill()


def contents(directory: Path, leaving_out: set[str]) -> dict[str, tuple[int, ...]]:
    """Mode of everything below a directory; of what is no folder also inode, size and times, which a change changes."""
    found = {}
    for folder, folders, names in os.walk(directory):
        if folder == str(directory):
            folders[:] = [name for name in folders if name not in leaving_out]
            names = [name for name in names if name not in leaving_out]
        for path in (os.path.join(folder, name) for name in (*folders, *names)):  # noqa: PTH118 - thousands of them
            s = os.lstat(path)
            file = () if stat.S_ISDIR(s.st_mode) else (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
            found[path] = (s.st_mode, *file)
    return found


def problem(servers: Servers, world: Path, directory: Path, case: Case) -> str | None:
    """Run one case; return what is wrong with how it ended."""
    unused = () if "run" in case.command or case.change is closed else ("run",)
    shutil.copytree(world, directory, symlinks=True, ignore=shutil.ignore_patterns(*unused))
    try:
        case.change(directory)
        leaving_out = {"tmp", *case.writes.split()}
        before = contents(directory, leaving_out)
        try:
            status, output = run(servers, directory, case)
        except Exception as error:
            return f"{type(error).__name__} {error}"
        wrong = [
            f"exit status {status} instead of {case.status}" * (status not in case.status),
            "a traceback" * ("Traceback" in output),
            "no fact and remedy" * (status in (1, 2) and "DAMAGED" not in output and not MESSAGE.search(output)),
            ", ".join(f"{path} changed" for path, _ in before.items() ^ contents(directory, leaving_out).items()),
        ]
        wrong = "; ".join(filter(None, wrong))
        return f"{wrong}\n{output[-1500:]}" if wrong else None
    finally:
        for folder, folders, _ in os.walk(directory):  # top down: modes are given back before a folder is entered
            for name in folders:
                if not Path(folder, name).is_symlink():
                    Path(folder, name).chmod(0o755)
        shutil.rmtree(directory)


COMMANDS: dict[str, list[str]] = {
    "train": ["train", "{}", "--run", "out"],
    "dry run": ["train", "{}", "--dry-run"],
    "inspect": ["inspect", "{}"],
    "verify": ["verify", "{}"],
    "sample": ["sample", "{}", "--tokens", "4"],
    "ensemble": ["ensemble", "{}", "run"],
    "plot": ["plot", "{}"],
    "chaos": ["chaos", "{}", "--out", "out"],
    "ladder plan": ["ladder", "plan", "{}", "--out", "out"],
    "ladder run": ["ladder", "run", "{}", "--out", "out"],
    "ladder status": ["ladder", "status", "{}", "--out", "out"],
    "ladder report": ["ladder", "report", "{}", "--out", "out"],
    "judge": ["judge", "{}", "--out", "out"],
    "burnin": ["burnin", "{}", "--minutes", "0", "--out", "out"],
    "hunt": ["hunt", "{}", "--out", "out"],
    "advise": ["advise", "{}", "--out", "out"],
    "submit": ["submit", "{}", "--on", "slurm", "--run", "out", "--print"],
}
OF_RUNS = ("inspect", "verify", "sample", "plot", "ensemble")
FILES = {
    "train": "tiny.toml",
    "dry run": "tiny.toml",
    "chaos": "campaign.toml",
    "judge": "table.csv",
    "burnin": "tiny.toml",
    "hunt": "run",
    "advise": "tiny.toml",
    "submit": "tiny.toml",
} | dict.fromkeys(OF_RUNS, "run")
"""File or run that each command takes; others take ladder.toml."""


SLOW = ("ladder plan", "ladder run")
"""They begin to import torch in processes of their own before they look at their files: seconds for each case."""
FEW = ("missing", "a pipe", "a closed file", "below a file", "a closed folder")
"""The few wrong paths that are tried with them too."""


ONE_IN = 3
"""One of several commands that read or write by the same functions meets all that may be wrong there. Each
of the others meets one in three: enough to show that it uses these functions."""


def left_out(name: str, what: str, whole: Sequence[str], wrong: Iterable[str]) -> bool:
    """True if a command shall not meet this: it is not one of the `whole` ones, and others meet it."""
    return name not in whole and ([*COMMANDS].index(name) + [*wrong].index(what)) % ONE_IN != 0


def command(name: str, argument: str | bytes) -> list[str | bytes]:
    return [argument if part == "{}" else part for part in COMMANDS[name]]


def nothing(directory: Path) -> None:
    pass


def holding(name: str, content: bytes) -> Change:
    return lambda directory: ((directory / name).write_bytes(content), os.mkfifo(directory / "pipe"))


def closed(directory: Path) -> None:
    """A run that nobody may enter or read."""
    shutil.copytree(directory / "run", directory / "closed")
    (directory / "closed").chmod(0)


def closed_file(directory: Path) -> None:
    (directory / "file").write_text("seed = 1")
    (directory / "file").chmod(0)


# Paths that are not what a command needs, and what makes them.
PATHS: dict[str, tuple[str | bytes, Change]] = {
    "missing": ("none", nothing),
    "a dangling link": ("link", lambda d: (d / "link").symlink_to("none")),
    "a link to itself": ("link", lambda d: (d / "link").symlink_to("link")),
    "a pipe": ("pipe", lambda d: os.mkfifo(d / "pipe")),
    "a device": ("/dev/null", nothing),
    "too long": ("x" * 300, nothing),
    "very long": ("x/" * 3000, nothing),
    "no UTF-8": (b"\xff\xfe", nothing),
    "below a file": ("tiny.toml/x", nothing),
    "a user's home": ("~nobody-known/x", nothing),
    "an empty folder": ("other", nothing),
    "another sort of file": ("corpus/00.txt", nothing),
    "a closed folder": ("closed", closed),
    "below a closed folder": ("closed/config.json", closed),
    "a closed file": ("file", closed_file),
    "a system file": ("/proc/self/mem", nothing),
}


READERS = ("dry run", "inspect", "judge")


def broken_paths() -> Iterator[Case]:
    for name, (what, (path, change)) in itertools.product(COMMANDS, PATHS.items()):
        if what not in FEW if name in SLOW else left_out(name, what, READERS, PATHS):
            continue
        yield Case(f"{name}: {what}", command(name, path), change, (2,))


# Places that cannot be written; each is OUT of the commands below. All of them are in the case's directory: root, whom
# the system lets replace even /dev/null, may run this.
PLACES: dict[str, tuple[str, Change]] = {
    "a file": ("file", lambda d: (d / "file").write_text("dear")),
    "below a file": ("file/x", lambda d: (d / "file").write_text("dear")),
    "a link to itself": ("link", lambda d: (d / "link").symlink_to("link")),
    "a pipe": ("pipe", lambda d: os.mkfifo(d / "pipe")),
    "too long": ("x" * 300, nothing),
    "very long": ("x/" * 3000, nothing),
    "a closed folder": ("closed", closed),
    "below a closed folder": ("closed/x", closed),
    "below a read-only folder": ("other/x", lambda d: (d / "other").chmod(0o555)),
    "a read-only folder": ("other", lambda d: (d / "other").chmod(0o555)),
    "a folder of other files": ("corpus", nothing),
}
TO_PLACES = {
    "init": ["init", "OUT"],
    "train": ["train", "tiny.toml", "--run", "OUT"],
    "plot": ["plot", "run", "--output", "OUT"],
    "chaos": ["chaos", "campaign.toml", "--out", "OUT"],
    "ladder plan": ["ladder", "plan", "ladder.toml", "--out", "OUT"],
    "ladder run": ["ladder", "run", "ladder.toml", "--out", "OUT"],
    "ladder report": ["ladder", "report", "ladder.toml", "--out", "OUT"],
    "judge": ["judge", "table.csv", "--out", "OUT"],
    "burnin": ["burnin", "tiny.toml", "--minutes", "0", "--out", "OUT"],
    "hunt": ["hunt", "run", "--step", "2", "--symptoms", "none", "--out", "OUT"],
    "advise": ["advise", "tiny.toml", "--out", "OUT"],
    "submit": ["submit", "tiny.toml", "--on", "slurm", "--run", "OUT"],  # in a good place it fails for want of a Slurm
}


WRITERS = ("train", "plot", "chaos")


def broken_places() -> Iterator[Case]:
    for name, (what, (place, change)) in itertools.product(TO_PLACES, PLACES.items()):
        if what not in FEW if name in SLOW else name in COMMANDS and left_out(name, what, WRITERS, PLACES):
            continue
        command = [place if part == "OUT" else part for part in TO_PLACES[name]]
        if name == "plot" and what in ("a file", "a link to itself"):  # which the user has named to be written
            yield Case(f"{name} to {what}", command, change, (0,), f"{place} timeline.svg")
        elif name == "init" and what == "a folder of other files":  # as `init .` beside one's text: none is overwritten
            yield Case(f"{name} to {what}", command, change, (0,), place)
        else:
            yield Case(f"{name} to {what}", command, change, (1, 2))


# What may stand in a file of settings.
CONTENTS: dict[str, bytes] = {
    "half": b"[model]\nn_layers = 1\n[optim",
    "binary": bytes(range(256)),
    "NUL": b"seed = 1\0",
    "latin-1": 'question = "für wen?"'.encode("latin-1"),
    "UTF-16": "seed = 1".encode("utf-16"),
    "a byte-order mark": b"\xef\xbb\xbfseed = 1",
    "JSON": b'{"seed": 1}',
    "deep": b"seed = " + b"[" * 100_000,
    "deep and whole": b"seed = " + b"[" * 3000 + b"]" * 3000,
    "a deep table": b"a." * 3000 + b"b = 1",
    "a number of many digits": b"seed = " + b"9" * 5000,
    "twice": b"seed = 1\nseed = 2",
    "a list for a table": b"model = [1]\noptim = 3\nruns = 4\nrungs = 5\narms = {}\nfaults = [1]\nset = 1",
    "a date": b"seed = 2024-01-01\nquestion = 10:00:00\nbaseline = 2024-01-01T00:00:00Z\n",
    "of itself": b'extends = "wrong.toml"\nconfig = "wrong.toml"\nbaseline = "wrong.toml"\nquestion = "?"',
    "of none": b'extends = "none.toml"\nquestion = "?"\nconfig = "none.toml"\nbaseline = "none.toml"',
    "of a folder": b'extends = "other"\nquestion = "?"\nconfig = "other"\nbaseline = "other"',
    "of a pipe": b'extends = "pipe"\nquestion = "?"\nconfig = "pipe"\nbaseline = "pipe"',
    "of a name too long": b'extends = "' + b"x" * 300 + b'"\nquestion = "?"\n',
    "infinite": b"[optim]\nlearning_rate = inf\n[budget]\nsteps = inf",
    "negative": b"seed = -1\nranks = -1\nseeds = [-1]\n[budget]\nsteps = -3\n[model]\nwidth = -8",
    "huge": b"seed = 999999999999999999999\n[budget]\nsteps = 999999999999999999999",
}


# What may stand in a table of runs.
TABLES: dict[str, tuple[str, bytes]] = {
    "nothing": ("t.csv", b""), "blanks": ("t.csv", b" \n\n"), "a header": ("t.csv", b"flops,loss\n"),
    "binary": ("t.csv", bytes(range(256))), "NUL": ("t.csv", b"flops,loss\n\0,1\n"),
    "UTF-16": ("t.csv", "flops,loss\n1,2\n".encode("utf-16")), "no header": ("t.csv", b"1e15,3\n2e15,2.9\n"),
    "an open quote": ("t.csv", b'flops,loss\n"1,2\n3,4\n'), "a long field": ("t.csv", b"flops,loss\n" + b"1" * 200_000),
    "a short row": ("t.csv", b"flops,loss\n1e15\n"), "infinite": ("t.csv", b"flops,loss\ninf,1\n"),
    "too much": ("t.csv", b"params,tokens,loss\n1e300,1e300,2\n"), "lists": ("t.jsonl", b'{"flops": [1]}\n'),
    "a table in a table": ("t.jsonl", b'{"flops": {"a": 1}, "loss": 2}\n'), "deep": ("t.jsonl", b"[" * 100_000),
    "many digits": ("t.jsonl", b'{"flops": %s, "loss": 1}' % (b"9" * 9000)), "a list": ("t.jsonl", b"[1]"),
    "half a pair": ("t.jsonl", b'{"\\ud800": 1}\n'), "no parquet": ("t.parquet", b"PAR1" + bytes(100) + b"PAR1"),
    "empty parquet": ("t.parquet", b""), "a W&B file": ("other/a.wandb", b":W&B" + bytes(range(256)) * 9),
}  # fmt: skip


def broken_tables() -> Iterator[Case]:
    for what, (name, content) in TABLES.items():
        path = name.partition("/")[0]
        yield Case(f"judge: {what}", command("judge", path), holding(name, content), (2,))


def broken_settings() -> Iterator[Case]:
    for name, (what, content) in itertools.product(("dry run", "chaos", "ladder status"), CONTENTS.items()):
        if left_out(name, what, READERS, CONTENTS):
            continue
        yield Case(f"{name}: {what}", command(name, "wrong.toml"), holding("wrong.toml", content), (2,))


# What may stand in a file of text: its name, its content, and the right status of a dry run of 10 steps.
TEXTS: dict[str, tuple[str, bytes, int]] = {
    "nothing": ("a.txt", b"", 2),
    "blanks": ("a.txt", b" \n\n \t", 2),
    "one line": ("a.txt", b"one line", 2),
    "NUL": ("a.txt", b"a\n\0\n" * 50, 2),
    "latin-1": ("a.txt", "für\n".encode("latin-1") * 50, 2),
    "UTF-16": ("a.txt", "one\ntwo\n".encode("utf-16"), 2),
    "a byte-order mark": ("a.txt", b"\xef\xbb\xbf" + b"".join(b"line %d\n" % n for n in range(99)), 0),
    "no row": ("a.jsonl", b"\n\n", 2),
    "half a row": ("a.jsonl", b'{"text": "x"}\n{"te', 2),
    "null": ("a.jsonl", b'{"text": null}\n', 2),
    "a number": ("a.jsonl", b'{"text": 5}\n', 2),
    "no column": ("a.jsonl", b'{"body": "x"}\n', 2),
    "a list": ("a.jsonl", b"[1]\n", 2),
    "half a pair": ("a.jsonl", b'{"text": "\\ud800"}\n', 2),
    "deep": ("a.jsonl", b"[" * 100_000, 2),
    "many digits": ("a.jsonl", b"".join(b'{"text": "t%d", "n": %s}\n' % (n, b"9" * 9000) for n in range(99)), 0),
    "no parquet": ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", 2),
    "empty parquet": ("a.parquet", b"", 2),
    "text as parquet": ("a.parquet", b"one\n" * 50, 2),
}


def broken_texts() -> Iterator[Case]:
    for (what, (name, content, status)), kind in itertools.product(TEXTS.items(), ("dry run", "train")):
        options = ["--set", f"data.source={name}", *(["--set", "data.unit=line"] if name == "a.txt" else [])]
        line = [*command(kind, "tiny.toml"), *options]
        yield Case(f"{kind}: {what}", line, holding(name, content), (status,), "out")
    for what, (path, change) in PATHS.items():
        options = ["--set", "data.source=" + json.dumps(os.fsdecode(path), ensure_ascii=False)]
        status = (0,) if what == "another sort of file" else (2,)  # one document, which trains
        yield Case(f"text: {what}", [*command("train", "tiny.toml"), *options], change, status, "out")
        options[1] = options[1].replace("data.source", "data.tokenizer")
        yield Case(f"tokenizer: {what}", [*command("train", "tiny.toml"), *options], change, (2,), "out")


SETTINGS = [
    "", "=", "seed", "seed=", "=3", "seed=x", "seed=1e400", "seed=" + "9" * 5000, "seed=" + "[" * 5000, "seed.x=1",
    "model=1", "model.x.y=1", ".=1", "..seed=1", "a" * 5000 + "=1", "data.source='\0'", "data.source=\"\"",
    "data.cache_dir=\"~nobody-known\"", "data.cache_dir='\0'", "data.cache_dir=tiny.toml", "eval.sets=['x']",
    "eval.sources.x='none'", "budget.steps=0", "model.width=99999999", "parallel.device='tpu'", "wandb.mode='x'",
    "data.max_megabytes=nan", "data.heldout_fraction=1.0", "optim.learning_rate=nan", "faults=[{}]",
    "faults=[{kind='x'}]", "data.source='hub:x/y'", "data.micro_batches=99999999999", "data.micro_batches=65536",
]  # fmt: skip
LEFT_TO_TRAIN = (
    "data.source=\"\"", "data.cache_dir=\"~nobody-known\"", "data.cache_dir=tiny.toml", "faults=[{kind='x'}]",
)  # fmt: skip
"""Settings that the dry run skips: files that may come later, the cache, and faults, whose ranks it does not know."""


def broken_settings_of_the_command_line() -> Iterator[Case]:
    for setting, name in itertools.product(SETTINGS, ("dry run", "train")):
        if name == "train" and setting not in LEFT_TO_TRAIN:
            continue  # which loads its settings as the dry run does
        status = (0, 2) if name == "dry run" and setting in LEFT_TO_TRAIN else (2,)
        yield Case(
            f"{name} {setting[:60]!r}", [*command(name, "tiny.toml"), "--set", setting], status=status, writes="out"
        )


ARGUMENTS = [
    [], ["x"], ["--x"], ["train"], ["train", "a", "b"], ["train", "tiny.toml", "--set"], ["train", "--ranks", "x"],
    ["train", "tiny.toml", "--from"],
    ["train", "tiny.toml", "--run", "new", "--from", "nowhere"],
    ["ensemble", "run"], ["ensemble", "run", "run", "--weights", "1"], ["ensemble", "run", "run", "--weights", "1,x"],
    ["ensemble", "run", "run", "--weights", "1,-1"], ["sample", "run", "--tokens", "0"],
    ["sample", "run", "--temperature", "x"],
    ["sample", "run", "--temperature", "-1"], ["sample", "run", "--top-k", "-1"], ["sample", "run", "--seed", "9" * 30],
    ["sample", "run", "--prompt", b"\xff"], ["chaos", "campaign.toml", "--repeat", "0"], ["ladder"], ["ladder", "x"],
    ["init"], ["schema", "x"], ["train", "no-built-in"],
    ["launch"], ["launch", "tiny.toml"], ["launch", "tiny.toml", "--workers", "0"],
    ["launch", "tiny.toml", "--workers", "99"], ["launch", "tiny.toml", "--workers", "2", "--listen", "nowhere"],
    ["launch", "tiny.toml", "--workers", "2", "--join", "127.0.0.1:1"],
    ["launch", "tiny.toml", "--workers", "2", "--join", "127.0.0.1:1", "--arbiter-only"],
    ["launch", "tiny.toml", "--workers", "2", "--set", "numerics.exact=false"],
    ["launch", "tiny.toml", "--islands", "0"], ["launch", "tiny.toml", "--islands", "2"],
    ["launch", "tiny.toml", "--islands", "2", "--spares", "1"],
    ["chaos", "campaign.toml", "--only", "none", "--out", "out"],
    ["ladder", "run", "ladder.toml", "--up-to", "none", "--out", "out"], ["verify"], ["inspect", "--json"],
    ["train", "tiny.toml", "--dry-run", "--ranks", "0"], ["train", "tiny.toml", "--dry-run", "--ranks", "99"],
]  # fmt: skip


def broken_arguments() -> Iterator[Case]:
    for arguments in ARGUMENTS:
        yield Case(" ".join(map(str, arguments)), arguments, status=(2,))


ENVIRONMENTS: dict[str, tuple[dict[str, str | None], Change, dict[str, str]]] = {
    "no home": ({"HOME": None}, nothing, {}),
    "an empty home": ({"HOME": ""}, nothing, {}),
    "no such home": ({"HOME": "{}/nowhere/x"}, nothing, {}),
    "a file for a home": ({"HOME": "{}/tiny.toml"}, nothing, {}),
    "a read-only home": ({}, lambda d: (d / "home").chmod(0o555), {}),
    "a closed home": ({}, lambda d: (d / "home").chmod(0), {}),
    "no temporary folder": ({"TMPDIR": "{}/nowhere/x"}, nothing, {}),
    "a closed temporary folder": ({}, lambda d: (d / "tmp").chmod(0), {}),
    "no PATH": ({"PATH": None}, nothing, {}),
    "locale C": ({"LC_ALL": "C"}, nothing, {"encoding": "ascii"}),
    "a locale of old": ({"LC_ALL": "de_DE.ISO-8859-1"}, nothing, {"encoding": "latin-1"}),
    "no such locale": ({"LC_ALL": "xx_YY.none", "LANG": "xx"}, nothing, {}),
    "no columns": ({"COLUMNS": "0"}, nothing, {}),
    "one column": ({"COLUMNS": "1"}, nothing, {}),
    "columns that are no number": ({"COLUMNS": "x"}, nothing, {}),
    "no terminal known": ({"TERM": "no-such"}, nothing, {}),
    "colours": ({"FORCE_COLOR": "1"}, nothing, {}),
    "a notebook's pictures": ({"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, nothing, {}),
    "no folder for matplotlib": ({"MPLCONFIGDIR": "{}/nowhere/x"}, nothing, {}),
    "a full disk for output": ({}, nothing, {"output": "full"}),
    "output closed": ({}, nothing, {"output": "closed"}),
    "no such W&B mode": ({"WANDB_MODE": "x"}, nothing, {}),
    "a netrc of another encoding": ({"NETRC": "netrc"}, lambda d: (d / "netrc").write_bytes(b"machine \xff"), {}),
    "ranks without torchrun": ({"RANK": "1", "WORLD_SIZE": "2"}, nothing, {}),
    "a rank that is no number": ({"RANK": "x", "WORLD_SIZE": "y", "LOCAL_RANK": "z"}, nothing, {}),
    "threads that are no number": ({"OMP_NUM_THREADS": "x"}, nothing, {}),
    "no such time zone": ({"TZ": "no/such"}, nothing, {}),
    "a closed cache": ({"TOPROPE_CACHE": "other"}, lambda d: (d / "other").chmod(0), {}),
    "a file for a cache": ({"TOPROPE_CACHE": "tiny.toml"}, nothing, {}),
    "a cache below a file": ({"TOPROPE_CACHE": "tiny.toml/x"}, nothing, {}),
    "a cache of nobody": ({"TOPROPE_CACHE": "~nobody-known/x"}, nothing, {}),
    "an empty cache": ({"TOPROPE_CACHE": ""}, nothing, {}),
    "a cache that is a link to itself": ({"TOPROPE_CACHE": "l"}, lambda d: (d / "l").symlink_to("l"), {}),
}  # fmt: skip
REFUSED_BY_TRAIN = (
    "no such W&B mode", "a closed cache", "a file for a cache", "a cache below a file",
    "a cache of nobody", "a cache that is a link to itself",
)  # fmt: skip


MET_BY_PLOT = (
    "a read-only home", "a closed temporary folder", "a notebook's pictures", "no folder for matplotlib",
    "a full disk for output", "output closed",
)  # fmt: skip


MET_BY_TRAIN_ALONE = (
    "no such W&B mode", "a netrc of another encoding", "ranks without torchrun", "a rank that is no number",
    "threads that are no number", *(what for what in ENVIRONMENTS if "cache" in what),
)  # fmt: skip


def strange_environments() -> Iterator[Case]:
    for (what, (environment, change, how)), name in itertools.product(ENVIRONMENTS.items(), FILES):
        if name in ("chaos", "dry run", "verify", "burnin", "hunt", "advise") or (
            name == "plot" and what not in MET_BY_PLOT
        ):
            continue
        if what in MET_BY_TRAIN_ALONE and name != "train":
            continue
        if left_out(name, what, ("train", "plot", "inspect"), ENVIRONMENTS):
            continue
        status: tuple[int, ...] = (0,)
        if how.get("output") in ("full", "closed") and name in (*OF_RUNS, "judge", "submit"):
            status = (1,)
        elif name == "train":
            status = (2,) if what in REFUSED_BY_TRAIN else (0, 2)
        yield Case(f"{name}: {what}", command(name, FILES[name]), change, status, "out run home", environment, how)


# Damage to a file of a finished run.
def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def elsewhere(path: Path) -> None:
    """A link to the same content outside the run, which is not the run's to write."""
    target = next(parent for parent in path.parents if parent.name == "run").parent / "other" / path.name
    path.rename(target)
    path.symlink_to(target)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Change] = {
    "gone": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": flip,
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "a folder": folder,
    "a pipe": to_pipe,
    "a link": elsewhere,
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "closed": lambda path: path.chmod(0),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "deep objects": lambda path: path.write_bytes(b'{"a":' * 100_000),
    "null": lambda path: path.write_bytes(b"null\n"),
    "no keys": lambda path: path.write_bytes(b"{}\n"),
    "lists": lambda path: path.write_bytes(path.read_bytes().replace(b": {", b": [{").replace(b"}", b"}]")),
    "other types": lambda path: path.write_bytes(re.sub(rb": \d+", b': "x"', path.read_bytes())),
}  # fmt: skip
CHECKPOINT = "checkpoints/step-00000010/"
OF_JSON = ("deep", "deep objects", "null", "no keys", "lists", "other types")
DAMAGED: dict[str, dict[str, tuple[int, ...]]] = {
    "config.json": {"inspect": (0, 2), "verify": (0, 2), "sample": (0, 2), "plot": (0, 2), "train": (0, 2)},
    "tokenizer.json": {"sample": (0, 2), "inspect": (0,), "train": (0, 2)},
    "events/attempt-0000-rank-00000.jsonl": {"inspect": (0, 2), "sample": (0,), "plot": (0, 2), "train": (0, 2)},
    CHECKPOINT + "manifest.json": {"verify": (0, 1), "inspect": (0,), "sample": (0,), "train": (0,)},
    CHECKPOINT + ".metadata": {"verify": (1,), "inspect": (0,), "sample": (0,)},
    CHECKPOINT + "__0_0.distcp": {"verify": (1,), "sample": (0,), "train": (0,)},
}  # fmt: skip
"""The right statuses, where a command looks at the file. The checkpoint before the damaged one is intact.

The first command meets all damages of a file, training those of MET_BY_TRAIN, and the others some (ONE_IN)."""


MET_BY_TRAIN = ("gone", "flipped", "a folder", "a pipe", "a link", "closed", "deep", "other types")


def damage_file(name: str, change: Change, directory: Path) -> None:
    change(directory / "run" / name)


def damage() -> Iterator[Case]:
    for (file, statuses), (what, change) in itertools.product(DAMAGED.items(), DAMAGES.items()):
        if what in OF_JSON and "json" not in file:
            continue
        for name, status in statuses.items():
            if what not in MET_BY_TRAIN if name == "train" else left_out(name, what, [*statuses][:1], DAMAGES):
                continue
            line = ["train", "tiny.toml", "--run", "run"] if name == "train" else command(name, "run")
            damaged = partial(damage_file, file, change)
            yield Case(f"{name}: {file} {what}", line, damaged, status, "run" if name in ("train", "plot") else "")


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    group.__name__.replace("_", " "): group
    for group in (broken_paths, broken_places, broken_tables, broken_settings, broken_settings_of_the_command_line,
                  broken_texts, broken_arguments, strange_environments, damage)
}  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("group", GROUPS)
def test_every_command_ends_with_a_documented_status_and_a_message(servers, world, group):
    cases = list(GROUPS[group]())
    assert len({case.name for case in cases}) == len(cases)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        directories = [world.parent / f"{group.replace(' ', '-')}-{number}" for number in range(len(cases))]
        problems = list(pool.map(lambda case, directory: problem(servers, world, directory, case), cases, directories))
    found = [f"── {case.name}: {wrong}" for case, wrong in zip(cases, problems, strict=True) if wrong]
    assert not found, f"{len(found)} of {len(cases)}\n" + "\n".join(found)
