"""The README is true: its commands run as written (only shorter), and the files that it names exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from scripts import bench_tables, readme_picture
from tests.support import ROOT, settings, summarise_run, torchrun, trainer
from trainer.chaos import plan
from trainer.ladder.plan import load

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORTER = settings(
    budget__steps=4, optim__warmup_steps=1, checkpoint__every_steps=2, data__max_megabytes=1.0, wandb__mode="disabled"
)


def commands() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(torchrun .*-m trainer|python -m trainer) ", line)]


@pytest.mark.timeout(300)
def test_every_command_of_the_readme_runs_and_all_worlds_print_one_hash(tmp_path: Path):
    hashes: dict[str, set[str]] = {}
    found = commands()
    assert len(found) == 19, found
    for command in found:
        for ranks in (1, 2, 3, 4) if "$n" in command else (None,):
            words = shlex.split(command.replace("$n", str(ranks)).replace("runs/", f"{tmp_path}/"))
            arguments = words[words.index("trainer") + 1 :]
            if arguments[0] == "chaos":  # minutes to half an hour: tests/test_chaos.py runs the first
                assert plan.load(ROOT / arguments[1]).cases
                continue
            if arguments[0] == "ladder":  # minutes: tests/test_ladder_run.py runs smaller ones
                assert load.load(ROOT / arguments[2]).runs
                continue
            if arguments[0] in (
                "forecast",
                "ready",
            ):  # tests/test_forecast.py, tests/test_readiness.py run smaller ones
                assert (ROOT / arguments[2 if arguments[0] == "forecast" else 3]).is_file()
                continue
            if words[0] == "python":  # to train is to go on from a run above
                trainer(*arguments, *([*SHORTER, *settings(budget__steps=6)] if arguments[0] == "train" else []))
                continue
            config = Path(arguments[1])
            run = Path(arguments[arguments.index("--run") + 1]) if "--run" in arguments else tmp_path / config.stem
            named = [] if "--run" in arguments else ["--run", run]
            torchrun(int(words[words.index("--nproc-per-node") + 1]), *arguments, *named, *SHORTER)
            hashes.setdefault(config.stem, set()).add(summarise_run(run)["weights_sha256"])
    assert {name: len(different) for name, different in hashes.items()} == {"gpt_tiny": 1, "smoke": 1}


def test_the_house_list_names_every_room():
    house = README.partition("\ntrainer/\n")[2].partition("```")[0]
    rooms = [path for path in (ROOT / "trainer").iterdir() if not path.name.startswith("_")]
    named = {room: room.name if room.suffix else f"{room.name}/" for room in rooms if room.suffix in (".py", "")}
    assert [name for name in named.values() if not re.search(rf"(^|[\s,]){re.escape(name)}[\s,:]", house)] == []


def test_the_tables_of_the_benchmarks_are_made_of_their_figures():
    figures = json.loads((ROOT / "BENCHMARKS.json").read_text())
    assert bench_tables.tables(figures) == (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("other", [{}, {"machine": "another"}, {"date": "2020-01-01"}])
def test_an_interrupted_figure_goes_on_on_its_own_machine_and_day_alone(other, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(bench_tables, "RESULTS", tmp_path / "BENCHMARKS.json")
    monkeypatch.setattr(bench_tables, "TABLES", tmp_path / "BENCHMARKS.md")
    monkeypatch.setattr(bench_tables, "tables", str)
    bench_tables.record("advise", {"modern": 1} | other)
    assert ("modern" in bench_tables.recorded("advise")) == (not other)


def test_the_first_picture_its_caption_and_the_benchmarks_hold_the_same_figures_and_one_hash():
    stored = json.loads((ROOT / "docs/same-bits.json").read_text())
    redraw = "run python -m scripts.readme_picture"
    assert readme_picture.contents(stored) == stored, redraw
    assert readme_picture.caption(stored) in README, redraw
    with Image.open(ROOT / "docs/same-bits.png") as picture:
        assert picture.info["Source"] == readme_picture.digest(stored), redraw
    assert len(set(stored["weights_sha256"])) == 1
    assert dict(stored["calm"]) == dict(stored["storm"])


def test_the_picture_of_the_rooms_shows_the_imports_of_today():
    from scripts import architecture  # not above: every worker of pytest imports this file, and matplotlib takes long

    assert architecture.drawn() == architecture.edges(), "run python -m scripts.architecture"


def test_everything_the_readme_points_at_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    quoted = re.findall(r"`((?:tests|configs|scripts|trainer)/[\w./]+)`", README)
    assert links and quoted
    missing = [name for name in {*links, *quoted} if not (ROOT / name).exists()]
    assert not missing
