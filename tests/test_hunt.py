"""From a run's symptoms to the operator that was wrong; right runs accuse nobody."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faulty_runs import fault
from tests.support import SMOKE, many_runs, settings, torchrun, trainer, with_faults, write_corpus
from trainer.errors import EXIT_FAILED, EXIT_USAGE, UsageError
from trainer.faults.wrong_operators import StridedSum
from trainer.hunt import page, reproduction, search
from trainer.hunt.symptoms import sampled_evaluation, samples, symptoms_of
from trainer.launch.agent import warm_server
from trainer.log import events, rundir
from trainer.log.events import EvalDone, NotFinite, StepDone
from trainer.sentinel.operator_check import OperatorCheck
from trainer.show.page import render

PLANTED = {
    "clean": [],
    "clean too": [],
    "wrong_operator": [fault("wrong_operator", 7, 0, steps=3)],
    "wrong_softmax": [fault("wrong_softmax", 7, 0, steps=3)],
    "wrong_index_add": [fault("wrong_index_add", 7, 0, steps=3)],
    "wrong_cast": [fault("wrong_cast", 7, 0, steps=3)],
}  # fmt: skip
OPERATORS = {
    "wrong_operator": ("aten.sum.dim_IntList", "aten.mean.dim"),
    "wrong_softmax": ("aten._log_softmax.default",),
    "wrong_index_add": ("aten.embedding_dense_backward.default",),
    "wrong_cast": ("aten._to_copy.default", "aten.copy_.default"),
}
"""The operators that each plant makes wrong."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of one rank for each plan of faults, all in one process."""
    directory = tmp_path_factory.mktemp("hunt")
    made = settings(
        data__source=write_corpus(directory / "corpus"), data__heldout_fraction=0.2, data__micro_batches=2,
        budget__steps=20, checkpoint__every_steps=2, checkpoint__keep_last=10, eval__every_steps=5,
        eval__max_tokens=128, model__n_layers=1,
    )  # fmt: skip
    plans = [[*made[1::2], f"seed={number}", with_faults(faults)[1]] for number, faults in enumerate(PLANTED.values())]
    many_runs(plans, directory)
    return {name: directory / str(number) for number, name in enumerate(PLANTED)}


def hunt(run: Path, out: Path, *steps: int) -> dict[str, Any]:
    """Hunt in a run, and write the page."""
    tree = search.hunt(run, steps, out, lambda text: None)
    page.write(tree, out)
    return tree


def reproduced(script: Path, cold: bool) -> tuple[int, str]:
    """Status and output of a script: if `cold`, in an interpreter of its own, else in a fork that has torch already."""
    output = script.with_suffix(".txt")
    if not cold and (server := warm_server()) is not None:
        child = server.start(script.stem, [], os.environ, directory=script.parent, output=output)
        if child is not None:
            return child.wait(60), output.read_text()
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, cwd=script.parent,
        env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["clean", "clean too"])
def test_a_right_run_replays_to_the_bits_of_its_log_and_nobody_is_accused(
    runs: dict[str, Path], tmp_path: Path, name: str
):
    tree = hunt(runs[name], tmp_path)
    assert tree["suspects"] == [] and "no operator is accused" in tree["summary"]
    assert len(tree["checked"]) == search.STEPS and all(one["as_logged"] for one in tree["checked"])
    assert [symptom["text"] for symptom in tree["symptoms"] if symptom["set"]] == [
        "the evaluation of step 20, without a symptom"
    ]
    assert "No operator is accused" in (tmp_path / search.PAGE).read_text()


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_that_was_wrong_in_3_of_20_steps_is_ranked_first_when_nobody_names_a_step(
    runs: dict[str, Path], tmp_path: Path, name: str
):
    tree = hunt(runs[name], tmp_path)
    first = tree["suspects"][0]
    assert first["operator"] in OPERATORS[name]
    assert len(tree["checked"]) <= search.STEPS and all(one["as_logged"] for one in tree["checked"])
    assert {suspect["operator"] for suspect in tree["suspects"]} <= {*OPERATORS[name]}
    assert tree["confirmations"] and all(found["gone"] for found in tree["confirmations"]), tree["confirmations"]
    script = tree["reproduction"]
    assert script["lines"] <= 30
    status, output = reproduced(Path(script["script"]), cold=name == "wrong_softmax")
    assert status == 1 and "entries are wrong" in output, output
    assert f"{first['operator']} is wrong" in (tmp_path / search.PAGE).read_text()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_what_one_rank_alone_computes_wrong_is_found_and_named_with_the_rank(tmp_path: Path):
    made = settings(
        data__source=write_corpus(tmp_path / "corpus"), data__heldout_fraction=0.2, data__micro_batches=4,
        budget__steps=8, checkpoint__every_steps=3, eval__every_steps=0, model__n_layers=1,
        sentinel__audit="1", sentinel__act="report",
    )  # fmt: skip
    faults = with_faults([fault("wrong_matmul", 6, 1, steps=2)])
    torchrun(2, "train", SMOKE, "--run", tmp_path / "run", *made, *faults)
    tree = hunt(tmp_path / "run", tmp_path / "out")
    assert tree["symptoms"][0]["kind"] == "disagreement"
    first = tree["suspects"][0]
    assert first["operator"] == "aten.mm.default" and set(first["places"]) == {"rank 1"}
    assert [found["gone"] for found in tree["confirmations"]] == [True] * 4, json.dumps(tree["confirmations"])


def test_where_no_symptom_leads_to_a_cause_the_last_the_least_usual_and_the_farthest_steps_are_looked_at(
    tmp_path: Path,
):
    quiet = {number: step(number) for number in range(1, 101)} | {60: step(60, grad_norm=1.3)}
    run = logged(tmp_path, *quiet.values(), scored(50, 4.0), scored(100, 4.0))
    everywhere = [0, 50]
    assert symptoms_of(run) == []
    order = [symptom.step for symptom in samples(run, everywhere, 50)]
    assert order[:3] == [100, 60, 1] and sorted(order) == list(range(1, 101))
    assert next(samples(run, everywhere, 50, seen=(100, 60))).step == 99
    # Steps are not computed again by the hundred to reach one that nobody asked for.
    assert {symptom.step for symptom in samples(run, [90], 5)} == set(range(91, 96))
    last, none = sampled_evaluation(run, [90], 5), sampled_evaluation(run, [10], 5)
    assert last is None and none is None
    found = sampled_evaluation(run, [96], 5)
    assert found is not None and (found.step, found.set) == (100, "val")


def logged(run: Path, *made: events.Event) -> Path:
    log = events.EventLog.open(run, 0, 0)
    for event in made:
        log.append(event)
    log.close()
    return run


def step(number: int, **more: Any) -> StepDone:
    values = {
        "loss": 4.0 + 0.01 * (number % 3), "grad_norm": 1.0 + 0.05 * (number % 4), "learning_rate": 0.1, "tokens": 1,
        "seconds": 1.0, "samples": "", "redone": 0, "flushed": None,
    }  # fmt: skip
    return StepDone(step=number, **values | more)


def scored(number: int, loss: float) -> EvalDone:
    return EvalDone(step=number, set="val", loss=loss, bits_per_byte=None, tokens=1, seconds=1.0, digest="")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ([], []),
        ([step(20, loss=9.0)], [("loss_spike", 20)]),
        ([step(20, grad_norm=80.0)], [("norm_spike", 20)]),
        ([step(20, redone=1)], [("redone", 20)]),
        ([NotFinite(step=20, loss=1.0, grad_norm=float("inf"), trial=0)], [("not_finite", 20)]),
        ([scored(10, 4.0), scored(20, 3.9), scored(30, 4.4)], [("evaluation", 30)]),
    ],
    ids=["nothing", "loss", "gradient norm", "redone", "not finite", "evaluation"],
)
def test_the_log_shows_each_symptom_and_a_quiet_log_none(tmp_path: Path, changed: list[Any], expected: list[Any]):
    steps = {number: step(number) for number in range(1, 41)}
    others = [event for event in changed if not isinstance(event, StepDone)]
    steps |= {event.step: event for event in changed if isinstance(event, StepDone)}
    run = logged(tmp_path, *steps.values(), *others)
    assert [(symptom.kind, symptom.step) for symptom in symptoms_of(run)] == expected


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        (["norm_spike"], "explains 1 of 1"),
        (["sample"], "wrong in 1 of 1 looked at"),
        (["norm_spike", "sample"], "wrong in 1 of 2 looked at"),
    ],
)
def test_steps_that_were_chosen_without_a_symptom_are_not_called_symptoms(kinds: list[str], told: str):
    symptoms = [{"kind": kind, "text": f"step {n}", "step": n} for n, kind in enumerate(kinds)]
    worst = {"where": "", "shape": "[3]", "place": [0], "found": "1", "expected": "2", "wrong": 1, "entries": 3}
    suspect = {"operator": "aten.sum.default", "excess": 9.0, "explains": [len(kinds) - 1], "conditions": ["one call"],
               "worst": worst}  # fmt: skip
    confirmed = {"symptom": "step 0", "kind": kinds[-1], "what": "loss", "before": "1", "after": "2", "gone": True}
    tree = {"run": "a run", "ranks": 1, "summary": "wrong", "planted": False, "symptoms": symptoms, "checked": [],
            "suspects": [suspect], "confirmations": [confirmed], "reproduction": None, "not_checked": []}  # fmt: skip
    html = render("hunt.html", tree=tree, pictures={"timeline": "", "evidence": ""})
    assert ("ymptom" in html, "that were looked at" in html) == ("sample" not in kinds, "sample" in kinds)
    [line] = [line for line in page.lines(tree) if line.startswith("suspect")]
    assert told in line


def test_a_failing_call_is_made_as_small_as_still_fails_with_its_strides():
    x = torch.randn(70, 65536, generator=torch.Generator().manual_seed(0))
    machine: Any = StridedSum()
    machine.active = [machine]
    with machine, OperatorCheck() as check:
        x.sum(0)
    (failure,) = check.failures
    fails = reproduction._tester(failure.operator, machine)
    smaller = reproduction.shrunk(failure.arguments, lambda tried: fails(tried, failure.keywords) is not None)
    assert smaller[0].shape == (64, 1) and smaller[0].stride() == (65536, 1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"computes_with": {"torch": "1.0"}}, "was computed with something else"),
        ({"data_sha256": "0" * 64}, "was trained on data"),
        ({"config": {"numerics": {"compile": True}}}, "numerics.compile"),
        ({"config": {"numerics": {"exact": False}}}, "numerics.exact"),
    ],
    ids=["another torch", "other data", "compiled", "inexact"],
)  # fmt: skip
def test_a_run_that_cannot_be_computed_again_is_refused_with_what_differs(
    runs: dict[str, Path], tmp_path: Path, changes: dict[str, Any], told: str
):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", runs["clean"], run], check=True)
    contents = json.loads(rundir.config_path(run).read_text())
    for key, value in changes.items():
        if key == "config":
            contents["config"]["numerics"] |= value["numerics"]
        else:
            contents[key] = contents[key] | value if isinstance(value, dict) else value
    rundir.config_path(run).write_text(json.dumps(contents))
    with pytest.raises(UsageError, match=told):
        hunt(run, tmp_path / "out", 3)


def test_the_command_says_who_is_accused_by_its_exit_status_and_refuses_a_run_without_checkpoints(
    runs: dict[str, Path], tmp_path: Path
):
    out = tmp_path / "out"
    done = trainer(
        "hunt", runs["wrong_softmax"], "--step", "7", "--symptoms", "none", "--out", out, "--json", check=False
    )
    tree = json.loads(done.stdout)
    assert done.returncode == EXIT_FAILED and tree["suspects"][0]["operator"] == OPERATORS["wrong_softmax"][0]
    assert json.loads((out / search.REPORT).read_text()) == tree
    subprocess.run(["cp", "-r", runs["clean"], tmp_path / "run"], check=True)
    subprocess.run(["rm", "-r", tmp_path / "run" / "checkpoints"], check=True)
    refused = trainer("hunt", tmp_path / "run", "--out", tmp_path / "none", check=False)
    assert refused.returncode == EXIT_USAGE and "has no checkpoint" in refused.stderr
