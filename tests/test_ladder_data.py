"""Promises about ladders over data: rungs are amounts of unique text, and multipliers are of text."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests import ladder_reports, ladders
from tests.ladders import Design
from tests.test_ladder_file import load, problems
from tests.test_ladder_file import plain as over_compute
from tests.test_ladder_report import screen
from trainer import data as datas
from trainer import job
from trainer.errors import ConfigError
from trainer.ladder import settle, tuning
from trainer.ladder.plan import arms
from trainer.ladder.plan.ladder import AA, TARGET, PlannedArm, PlannedRun
from trainer.ladder.report import build, page
from trainer.ladder.stats.records import BASELINE, Interval, Remedy
from trainer.ladder.stats.repetition import Repetition

HEAD = 'question = "What is it worth in text?"\nbaseline = "tiny.toml"\nseeds = [0, 1]\n'
EPOCHS = '[sizes]\naxis = "data"\nepochs = 4\n'
FIXED = '[sizes]\naxis = "data"\nrun_tokens = 8192\n'
RUNGS = "".join(
    f'[[rungs]]\nname = "{name}"\nunique_tokens = {n}\n' for name, n in (("s", 512), ("m", 1000), ("l", 2048))
)
TARGET_TABLE = "[target]\nunique_tokens = 100_000_000\n"
TAUGHT = '[[arms]]\nname = "taught"\ndistil = 2\n'
FOUR = '[[arms]]\nname = "four"\nensemble = 4\n'
CONTEXT, PER_STEP = 16, 2 * 2 * 16


def arm(name: str, setting: str, value: str) -> str:
    return f'[[arms]]\nname = "{name}"\nset = {{ {setting} = {value} }}\n'


def plain(head: str = HEAD, sizes: str = EPOCHS, rungs: str = RUNGS, target: str = TARGET_TABLE) -> str:
    return head + sizes + rungs + target


def ids_of(run: PlannedRun) -> list[int]:
    """Windows that a run reads, in order."""
    config = run.config
    batches = job.batches_of(config, datas.prepare(config.data, config.eval, CONTEXT))
    steps = range(config.budget.steps)
    return [int(i) for step in steps for batch in batches.for_step(step) for i in batch.sample_ids]


# Plans


def test_each_run_reads_all_of_its_unique_text_so_many_times_and_no_other(home):
    ladder = load(home, plain())
    assert [rung.unique_tokens for rung in ladder.rungs] == [512, 1000, 2048]
    for run in ladder.runs[:: len(ladder.arms) + 1]:
        sequences = run.unique_tokens // CONTEXT
        read = ids_of(run)
        times = np.unique(read, return_counts=True)[1]
        assert len(times) == sequences and times.min() == 4, "a last step may begin a fifth epoch"
        assert len(read) - 4 * sequences < PER_STEP / CONTEXT
    by_rung = {run.rung: set(ids_of(run)) for run in ladder.runs if (run.arm, run.seed) == (BASELINE, 0)}
    assert by_rung["s"] < by_rung["m"] < by_rung["l"], "more text contains the smaller rung's"
    other = next(run for run in ladder.runs if (run.arm, run.seed, run.rung) == (BASELINE, 1, "s"))
    assert set(ids_of(other)) != by_rung["s"], "a seed draws text of its own"


def test_with_a_fixed_budget_compute_is_one_and_more_text_means_fewer_epochs(home):
    ladder = load(home, plain(sizes=FIXED))
    assert {rung.tokens for rung in ladder.rungs} == {8192}
    assert len({rung.flops for rung in ladder.rungs}) == 1
    times = [np.unique(ids_of(run), return_counts=True)[1] for run in ladder.runs if (run.arm, run.seed) == (AA, 0)]
    assert [(t.min(), t.max()) for t in times] == [(16, 16), (8, 9), (4, 4)]


def test_arms_over_data_may_change_epochs_decay_dropout_and_the_model_s_size(home):
    changes = (
        ("epochs", "sizes.epochs", "16"), ("decay", "optim.weight_decay", "1.6"), ("dropout", "model.dropout", "0.1"),
        ("deeper", "model.n_layers", "2"),
    )  # fmt: skip
    ladder = load(home, plain(), *(arm(*change) for change in changes))
    base = {(run.rung, run.seed): run for run in ladder.runs if run.arm == BASELINE}
    expected = {name: {setting} for name, setting, _ in changes} | {"epochs": {"budget.steps"}, AA: {"model.init_draw"}}
    for run in ladder.runs:
        twin = base[run.rung, run.seed]
        assert run.unique_tokens == twin.unique_tokens
        if run.arm != BASELINE:
            lines = arms.difference(twin.config, run.config)
            assert {line.partition(":")[0] for line in lines} == expected[run.arm]
            longer, costlier = run.tokens / twin.tokens, run.flops_per_token / twin.flops_per_token
            assert longer == pytest.approx(4.0 if run.arm == "epochs" else 1.0, rel=0.02)
            assert (costlier > 1) == (run.arm == "deeper")
    assert not any("tokens stay equal" in notice for notice in ladder.notices)


def test_an_ensemble_s_members_differ_in_their_initial_weights_alone_and_all_of_them_cost(home):
    both = '[[arms]]\nname = "both"\ncombines = ["four", "decay"]\n'
    ladder = load(home, plain(), FOUR, arm("decay", "optim.weight_decay", "1.6"), both)
    by_arm = {run.arm: run for run in ladder.runs if (run.rung, run.seed) == ("m", 1)}
    base, four = by_arm[BASELINE], by_arm["four"]
    assert [member.key for member in four.members[:2]] == [base.key, by_arm[AA].key], "two of them are there already"
    assert [member.config.model.init_draw for member in four.members] == [0, 1, 2, 3]
    assert {tuple(ids_of(member)) for member in four.members} == {tuple(ids_of(base))}
    assert four.flops == 4 * base.flops and four.unique_tokens == base.unique_tokens
    assert four.key not in {member.key for member in four.members}
    assert {member.config.optim.weight_decay for member in by_arm["both"].members} == {1.6}
    assert len({run.key for run in tuning.wanted(ladder, home)}) == 3 * 2 * (2 + 2 + 4)


def test_a_taught_run_is_a_change_of_its_own_and_its_teachers_cost_too(home):
    both = '[[arms]]\nname = "both"\ncombines = ["taught", "decay"]\n'
    ladder = load(home, plain(), TAUGHT, arm("decay", "optim.weight_decay", "1.6"), both)
    by_arm = {run.arm: run for run in ladder.runs if (run.rung, run.seed) == ("m", 1)}
    base, taught = by_arm[BASELINE], by_arm["taught"]
    *teachers, student = taught.members
    assert [teacher.key for teacher in teachers] == [base.key, by_arm[AA].key], "they are there already"
    assert student.config == taught.config and student.teachers == tuple(teachers)
    assert student.config.model == base.config.model, "it begins with the baseline's weights"
    assert len({base.key, taught.key, student.key, by_arm["both"].key}) == 4
    forward = base.flops_per_token // 3
    assert student.flops == (base.flops_per_token + 2 * forward) * base.tokens
    assert taught.flops == 2 * base.flops + student.flops and taught.unique_tokens == base.unique_tokens
    assert {member.config.optim.weight_decay for member in by_arm["both"].members} == {1.6}
    assert len({run.key for run in tuning.wanted(ladder, home)}) == 3 * 2 * (2 + 1 + 3)


def test_rules_that_scale_with_size_follow_the_text(home):
    rules = 'learning_rate = "power"\nlearning_rate_exponent = -0.5\nweight_decay = "inverse_steps"\n'
    ladder = load(home, plain(sizes=EPOCHS + rules))
    runs = {run.rung: run for run in ladder.runs if (run.arm, run.seed) == (BASELINE, 0)}
    assert runs["l"].config.optim.learning_rate == pytest.approx(1e-2 * 4**-0.5)
    products = [
        run.config.optim.learning_rate * run.config.optim.weight_decay * run.config.budget.steps
        for run in runs.values()
    ]
    assert products == pytest.approx([products[0]] * 3, rel=1e-4)


def test_a_target_over_data_may_be_more_text_than_there_is_unless_it_is_run(home):
    ladder = load(home, plain())
    assert (ladder.target, ladder.target_amount) == (None, 1e8)
    ran = load(home, plain(target="[target]\nunique_tokens = 4096\nseeds = [0]\n"))
    assert [run.rung for run in ran.runs if run.unique_tokens == 4096] == [TARGET]
    assert "[target] has 100,000,000 unique tokens" in problems(home, plain(target=TARGET_TABLE + "seeds = [0]\n"))


def test_a_ladder_over_compute_is_planned_and_recorded_as_before(home):
    ladder = load(home, over_compute())
    assert (ladder.axis, ladder.target_amount) == ("compute", ladder.target_flops)
    assert not [key for key in ladder.settings if key in ("sizes.axis", "sizes.epochs", "target.unique_tokens")]
    assert not any("unique_tokens" in rung.to_json() for rung in ladder.rungs)


@pytest.mark.parametrize(
    ("parts", "hint"),
    [
        ((plain(), '[[rungs]]\nname = "x"\nunique_tokens = 50_000_000\n'), "What is read twice is not unique"),
        ((plain(), '[[rungs]]\nname = "x"\nunique_tokens = 15\n'), "less than one sequence of 16"),
        ((plain(), '[[rungs]]\nname = "x"\nunique_tokens = 512\n'), "have 512 unique tokens each"),
        ((plain(), '[[rungs]]\nname = "x"\nwidth = 16\nn_layers = 1\n'), "rung 'x' has no one amount of text"),
        ((plain(), '[[rungs]]\nname = "x"\nwidth = 16\nunique_tokens = 600\n'), "rung 'x' has no one amount of text"),
        ((plain(sizes=FIXED.replace("8192", "1024")),), "reads 0.5 epochs of 2,048 unique tokens"),
        ((plain(), arm("few", "sizes.epochs", "0.5")), "reads a part of the text only"),
        ((plain(sizes=FIXED), arm("few", "sizes.run_tokens", "640")), "reads 0.64 epochs of 1,000 unique tokens"),
        ((plain(sizes='[sizes]\naxis = "data"\n'),), "needs epochs or run_tokens, not both"),
        ((plain(sizes=EPOCHS + "run_tokens = 4096\n"),), "needs epochs or run_tokens, not both"),
        ((plain(sizes=EPOCHS + "tokens_per_parameter = 20.0\n"),), "sizes.tokens_per_parameter has no effect"),
        ((plain(sizes=EPOCHS + 'learning_rate = "mup"\n'),), "all runs have one width"),
        ((plain(sizes="[sizes]\ntokens_per_parameter = 20.0\n"),), "rung 's' has unique_tokens"),
        ((plain(sizes="[sizes]\nepochs = 4\n"),), "needs tokens_per_parameter"),
        ((plain(target="[target]\nflops = 1e15\n"),), 'With sizes.axis = "data" the target is an amount'),
        ((plain(target="[target]\nunique_tokens = 1024\n"),), "fewer than rung 'l' with 2,048"),
        ((plain() + "[criterion]\nmax_slowdown = 2.0\n",), "criterion.max_slowdown has no effect"),
        ((plain(head=HEAD + "set = { data.unique_tokens = 512 }\n"),), "is set for all runs, and rungs decide it"),
        ((plain(), arm("own", "data.unique_tokens", "512")), "which rungs and seeds decide"),
        ((plain(head=HEAD + 'metric = "code_length"\n'),), "needs text that is read once"),
        ((plain(), FOUR.replace("4", "1")), "an ensemble of one is the baseline"),
        ((plain(), FOUR + "set = { model.dropout = 0.1 }\n"), "has ensemble and set"),
        ((plain(), FOUR + "distil = 2\n"), "has ensemble and distil"),
        ((plain(), FOUR, TAUGHT, '[[arms]]\nname = "x"\ncombines = ["four", "taught"]\n'), "an ensemble and distil"),
        ((plain(head=HEAD + 'metric = "code_length"\n', sizes=EPOCHS.replace("4", "1")), TAUGHT), "make no code"),
        (
            (plain(head=HEAD + "set = { islands.count = 2, islands.inner_steps = 4 }\n"), TAUGHT),
            "does not know islands",
        ),
        ((over_compute(), FOUR + 'combines = ["A", "B"]\n'), "has ensemble and combines"),
        ((plain(head=HEAD + 'metric = "code_length"\n', sizes=EPOCHS.replace("4", "1")), FOUR), "an ensemble has none"),
        ((plain(), arm("t", "data.tokenizer", '"chars"')), "are another amount of text"),
        ((plain(), arm("c", "model.context", "8")), 'Compare contexts on the axis "compute"'),
    ],
)
def test_a_ladder_over_data_that_makes_no_sense_is_refused(home, parts, hint):
    assert hint in problems(home, *parts)


def test_further_runs_over_data_are_seeds_or_an_amount_between_the_largest_rung_and_the_target(home):
    ladder = load(home, plain(), arm("dropout", "model.dropout", "0.1"))
    wider, added = settle._widened(ladder, "dropout", Remedy("rung", 2, 4000.4, None, 0.5, 8000.8))
    assert added.unique_tokens == 4000 and wider.rungs[-1].unique_tokens == 4000
    assert {run.seed for run in wider.runs if run.rung == "added 1"} == {0, 1}
    with pytest.raises(ConfigError, match="What is read twice is not unique"):
        settle._widened(ladder, "dropout", Remedy("rung", 2, 5e7, None, 0.5, 1e8))


# Reports


TEXT = Design(tuple(np.geomspace(1e6, 3e7, 4)), sd=0.004, target=1e8)
WORTH = {AA: ladders.UNCHANGED, "dropout": ladders.line(1.6, 1.6), "copies": ladders.line(0.5, 0.5)}


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    """Report of a made-up ladder over data: a token of text counts as 1e7 FLOPs in the other made-up ladders."""
    wide = replace(TEXT, flops=tuple(1e7 * n for n in TEXT.flops), target=1e15)
    compute = {"dropout": 1.0, "copies": 4.0}
    runs = [
        replace(
            run, parameters=10**5, unique_tokens=round(run.flops / 1e7), flops=1e12 * compute.get(run.arm, 1.0),
            seconds=99.0, undisturbed_seconds=99.0 * compute.get(run.arm, 1.0),
        )
        for run in ladder_reports.runs_of(wide, WORTH)
    ]  # fmt: skip
    planned = ladder_reports.ladder_of(wide, list(WORTH), axis="data", target=None, target_unique_tokens=10**8)
    rungs = [replace(rung, unique_tokens=round(rung.flops / 1e7)) for rung in planned.rungs]
    ladder = replace(planned, rungs=rungs, target_flops=0.0)
    return build.build_report(build.CollectedLadder(ladder, runs, record=ladder_reports.HISTORY))


LAW = Repetition(2.5, None, 1490.0, 0.35, Interval(15.0, None, None), None, 0, None)
OTHERS: dict[str, dict[str, Any]] = {
    AA: {"model.init_draw": 1}, "more": {"sizes.epochs": 16}, "decay": {"optim.weight_decay": 1.6},
}  # fmt: skip


def reread(epochs: int, more: int) -> build.CollectedLadder:
    """A made-up ladder whose losses follow LAW: arm "more" reads the text `more` times, others `epochs`."""
    design = replace(TEXT, flops=tuple(1e7 * n for n in TEXT.flops), sd=0.0, target=1e15)
    random, runs = np.random.Generator(np.random.Philox(5)), []
    for run in ladder_reports.runs_of(design, dict.fromkeys(OTHERS, ladders.UNCHANGED)):
        unique = round(run.flops / 1e7)
        tokens = unique * (more if run.arm == "more" else epochs)
        loss = float(LAW.loss_at(np.array(1e5), np.array(float(tokens)), np.array(float(unique))))
        loss += 0.004 * float(random.standard_normal()) + (run.arm == "decay")
        runs.append(replace(run, parameters=10**5, tokens=tokens, unique_tokens=unique, flops=1e12, loss=loss))
    planned = ladder_reports.ladder_of(design, list(OTHERS), axis="data", target=None, target_unique_tokens=10**8)
    rungs = [
        replace(rung, unique_tokens=round(rung.flops / 1e7), tokens=epochs * round(rung.flops / 1e7))
        for rung in planned.rungs
    ]
    changed = [PlannedArm(name, "is it worth it?", settings) for name, settings in OTHERS.items()]
    ladder = replace(planned, rungs=rungs, arms=changed, target_flops=0.0)
    return build.CollectedLadder(ladder, runs, record=ladder_reports.HISTORY)


@pytest.fixture(scope="module")
def read_again() -> dict[str, Any]:
    return build.build_report(reread(4, 16))


def test_the_law_of_repeated_text_is_fitted_to_runs_that_differ_in_their_epochs_alone_and_told(read_again):
    law = read_again["repetition"]
    assert law["refused"] is None
    assert law["runs"] == 3 * len(TEXT.flops) * TEXT.seeds, "the arm of weight decay is left out"
    assert law["R_D"]["low"] < 15.0 < law["R_D"]["high"]
    assert [(row["unique_tokens"], row["epochs"]) for row in law["rungs"]] == [(round(n), 4.0) for n in TEXT.flops]
    for row in law["rungs"]:
        assert row["worth"]["low"] < LAW.worth_of(4.0).value < row["worth"]["high"]
    html = page.html(read_again, [])
    assert "Text that is read again" in html and f"Fitted to {law['runs']} runs of the baseline" in html
    shown = " ".join(screen(read_again).split())
    assert "text read again: R_D " in shown and "R_N" not in shown, "all runs have one size"
    penalty = law["penalty"]
    assert penalty["held"] == ["delta", "kappa"], "4 and 16 epochs do not tell them"
    assert penalty["sd"] > 1.5 * law["sd"], "the made-up losses follow the other law"
    assert [row["epochs"]["high"] for row in penalty["rungs"]] == [None] * len(TEXT.flops), "none was seen"
    assert "epochs with the lowest loss" in html and "if it can harm: the loss at r3 is lowest after ? (" in shown


def test_arms_of_other_sizes_belong_to_the_law_and_what_they_tell_is_shown(read_again):
    ladder = reread(4, 16).ladder
    wide = PlannedArm("wide", "is it worth it?", {"model.width": 96})
    assert build._alike(replace(ladder, arms=[*ladder.arms, wide])) == {BASELINE, AA, "more", "wide"}
    law = read_again["repetition"] | {"R_N": Interval(5.0, 2.0, None).to_json()}
    tree = read_again | {"repetition": law}
    assert "R<sub>N</sub> = 5.00 (2.00 to ?)" in page.html(tree, [])
    assert ", R_N 5.00 (2.00 to ?)" in " ".join(screen(tree).split())


def test_without_repeats_the_report_says_why_there_is_no_law_of_them(read_again):
    refused = build._repetition(reread(1, 1))
    assert refused["refused"].startswith("no run read its text more than 1 times")
    tree = read_again | {"repetition": refused}
    assert "No law of it: no run read its text more than 1 times" in page.html(tree, [])
    assert "text read again" not in screen(tree)


def test_multipliers_over_data_are_of_text_and_what_an_arm_computes_does_not_count(tree):
    found = {verdict["arm"]: verdict for verdict in tree["verdicts"]}
    assert found["dropout"]["decision"] == "promote" and found["copies"]["decision"] == "reject"
    assert found["dropout"]["multiplier"]["value"] == pytest.approx(1.6, rel=0.15)
    assert found["copies"]["multiplier"]["value"] == pytest.approx(0.5, rel=0.15)
    assert found["dropout"]["why"].endswith("the baseline's unique text.")
    assert {arm["name"]: arm["compute"] for arm in tree["arms"]} == {AA: 1.0, "dropout": 1.0, "copies": 4.0}
    assert found["dropout"]["target_flops"] == 1e8 and tree["target"]["unique_tokens"] == 10**8
    assert tree["course"]["verdicts"] == [], "text is short, not time"


def test_the_largest_rung_over_data_is_predicted_from_less_text(tree):
    largest = [row for row in tree["predictions"] if row["rung"] == "r3" and row["arm"] == BASELINE]
    assert [(row["flops"], row["by"]) for row in largest] == [(3e7, ["r0", "r1", "r2"])]
    assert abs(largest[0]["error"]) < 0.02


def test_page_pictures_and_terminal_speak_of_text(tree):
    pictures = page.draw(tree)
    assert [(picture.name, picture.title) for picture in pictures] == [
        ("multiplier", "Multiplier against unique text"), ("loss", "Loss against unique text"),
        ("prediction", "Predictions against observations"),
    ]  # fmt: skip
    for picture in pictures[:2]:
        assert "unique text of a run (tokens)" in picture.svg and "FLOPs" not in picture.svg
    html = page.html(tree, pictures)
    for words in ("× the unique text", "surely worth 1.02× unique text at the target", "10⁸ tokens of unique text"):
        assert words in html, words
    assert "compute multiplier" not in html and "surely takes at most" not in html
    shown = screen(tree)
    assert "× the unique text" in shown and "a step takes" not in shown and "4.00×" in shown
