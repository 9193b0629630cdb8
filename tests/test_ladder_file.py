"""Promises about ladder files: the plan, and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from trainer import config as configs
from trainer import costs
from trainer import model as models
from trainer.errors import ConfigError
from trainer.ladder.plan import arms, sizes
from trainer.ladder.plan import load as loading
from trainer.ladder.plan.ladder import AA, TARGET, Ladder
from trainer.ladder.plan.schema import CriterionTable
from trainer.ladder.stats.records import BASELINE, Criterion

TINY = """
[data]
source = "{corpus}"
tokenizer = "bytes"
heldout_fraction = 0.2
micro_batches = 2
micro_batch_sequences = 2

[model]
n_layers = 1
n_heads = 2
width = 16
context = 16

[optim]
learning_rate = 1e-2
weight_decay = 0.2

[checkpoint]
every_steps = 5

[eval]
every_steps = 0
max_tokens = 512
sets = ["val"]

[wandb]
mode = "disabled"
"""
HEAD = 'question = "Does it work?"\nbaseline = "tiny.toml"\nseeds = [0, 1]\n'
CODE = HEAD + 'metric = "code_length"\n'
SIZES = "[sizes]\ntokens_per_parameter = 0.2\n"
RUNGS = "".join(
    f'[[rungs]]\nname = "{name}"\nwidth = {width}\nn_layers = 1\n' for name, width in (("s", 16), ("m", 24), ("l", 32))
)
TARGET_TABLE = "[target]\nwidth = 64\nn_layers = 2\n"
ARM = '[[arms]]\nname = "no qk-norm"\nquestion = "Is it needed?"\nset = { model.qk_norm = false }\n'


def write(home: Path, text: str, name: str = "ladder") -> Path:
    path = home / f"{name}.toml"
    path.write_text(text)
    return path


def load(home: Path, *parts: str) -> Ladder:
    return loading.load(write(home, "".join(parts)))


def problems(home: Path, *parts: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(home, *parts)
    return str(caught.value)


def plain(head: str = HEAD, sizes: str = SIZES, rungs: str = RUNGS, target: str = TARGET_TABLE) -> str:
    return head + sizes + rungs + target


# Plans


def test_every_pair_differs_in_what_its_arm_declares_and_in_nothing_else(home):
    batch = '[[arms]]\nname = "batch"\nset = { data.micro_batches = 1 }\n'
    both = '[[arms]]\nname = "both"\ncombines = ["no qk-norm", "batch"]\n'
    ladder = load(home, plain(), ARM, batch, both)
    expected = {
        AA: {"model.init_draw"}, "no qk-norm": {"model.qk_norm"}, "batch": {"data.micro_batches", "budget.steps"},
        "both": {"model.qk_norm", "data.micro_batches", "budget.steps"},
    }  # fmt: skip
    base = {(run.rung, run.seed): run for run in ladder.runs if run.arm == BASELINE}
    assert len(ladder.runs) == 3 * 2 * 5
    for run in ladder.runs:
        if run.arm != BASELINE:
            lines = arms.difference(base[run.rung, run.seed].config, run.config)
            assert {line.partition(":")[0] for line in lines} == expected[run.arm]
            assert run.tokens == pytest.approx(base[run.rung, run.seed].tokens, abs=32)


def test_a_rung_s_figures_are_those_of_its_model_and_its_tokens_those_asked_for(home):
    ladder = load(home, plain())
    for rung in ladder.rungs:
        run = next(run for run in ladder.runs if run.rung == rung.name)
        counted = costs.parameter_count(models.construct(run.config.model, 320))
        assert rung.parameters == run.parameters == counted.non_embedding
        assert rung.flops == costs.flops_per_token(run.config.model, 320) * rung.tokens
        assert rung.tokens == pytest.approx(0.2 * rung.parameters, abs=32)
        assert run.config.model.n_heads == rung.shape.width // 8
    assert [rung.name for rung in ladder.rungs] == ["s", "m", "l"]
    assert ladder.target is not None
    assert ladder.target_flops == ladder.target.flops > ladder.rungs[-1].flops


def test_runs_come_by_size_then_seed_with_the_baseline_first(home):
    rungs = RUNGS.split("[[rungs]]")
    ladder = load(home, plain(rungs="[[rungs]]".join(["", *reversed(rungs[1:])])), ARM)
    assert [(run.rung, run.seed, run.arm) for run in ladder.runs] == [
        (rung, seed, arm) for rung in "sml" for seed in (0, 1) for arm in (BASELINE, AA, "no qk-norm")
    ]


@pytest.mark.parametrize("parameters", [20_000, 100_000, 3_000_000])
def test_a_size_by_parameters_is_the_nearest_of_its_aspect(home, parameters):
    rung = f'[[rungs]]\nname = "xl"\nparameters = {parameters}\n'
    target = "[target]\nflops = 1e18\n"
    ladder = load(home, plain(sizes=SIZES + "aspect = 16\nhead_width = 8\n", target=target), rung)
    found = next(rung for rung in ladder.rungs if rung.name == "xl")
    config = configs.load(home / "tiny.toml")
    counts = []
    for heads in range(1, 60):
        shape = sizes.Shape(8 * heads, max(1, round(heads / 2)), heads)
        counts.append(sizes.counts(sizes.with_shape(config, shape).model, 320)[0])
    assert found.parameters == min(counts, key=lambda count: abs(count - parameters))


def test_settings_that_scale_with_size_follow_their_rule(home):
    rules = (
        'learning_rate = "power"\nlearning_rate_exponent = -0.25\nbatch = "power"\nbatch_exponent = 0.5\n'
        'weight_decay = "inverse_steps"\nwarmup_fraction = 0.1\n'
    )
    ladder = load(home, plain(sizes=SIZES.replace("0.2", "2") + rules))
    runs = {run.rung: run for run in ladder.runs if run.arm == BASELINE}
    base = runs["s"]
    assert (base.config.optim.learning_rate, base.config.optim.weight_decay) == (1e-2, 0.2)
    assert base.config.data.micro_batches == 2
    for run in runs.values():
        ratio, optim = run.parameters / base.parameters, run.config.optim
        assert optim.learning_rate == pytest.approx(1e-2 * ratio**-0.25, rel=1e-5)
        assert run.config.data.micro_batches == round(2 * ratio**0.5)
        assert optim.warmup_steps == round(0.1 * run.config.budget.steps)
        product = optim.learning_rate * optim.weight_decay * run.config.budget.steps
        assert product == pytest.approx(1e-2 * 0.2 * base.config.budget.steps, rel=1e-4)


def test_mup_divides_hidden_rates_and_leaves_the_base_rung_as_it_is(home):
    ladder = load(home, plain(sizes=SIZES + 'learning_rate = "mup"\nweight_decay = "inverse_steps"\n'))
    runs = {run.rung: run.config for run in ladder.runs if run.arm == BASELINE}
    assert [runs[rung].optim.mup_base_width for rung in "sml"] == [0, 16, 16]
    hidden = {rung: 16 / config.model.width * config.optim.weight_decay for rung, config in runs.items()}
    products = [hidden[rung] * runs[rung].budget.steps for rung in "sml"]
    assert products == pytest.approx([products[0]] * 3, rel=1e-4)


def test_an_arm_may_change_a_rule_and_is_the_baseline_where_the_rule_does_nothing(home):
    arm = '[[arms]]\nname = "fixed"\nset = { sizes.learning_rate = "fixed" }\n'
    ladder = load(home, plain(sizes=SIZES + 'learning_rate = "mup"\nweight_decay = "inverse_steps"\n'), arm)
    keys = {(run.rung, run.arm): run.key for run in ladder.runs if run.seed == 0}
    assert [keys[rung, "fixed"] == keys[rung, BASELINE] for rung in "sml"] == [True, False, False]
    assert any("baseline at s" in notice for notice in ladder.notices)


def test_a_run_s_config_written_as_a_file_is_the_same_when_it_is_read(home, tmp_path):
    fault = '[[faults]]\nkind = "exit"\nat_step = 3\nrung = "s"\narm = ["baseline", "A/A"]\n'
    ladder = load(home, plain(), ARM, fault)
    for run in ladder.runs:
        path = tmp_path / "config.toml"
        path.write_text(configs.as_toml(run.config))
        assert configs.load(path) == run.config
        assert bool(run.config.faults) == (run.rung == "s" and run.arm != "no qk-norm")


def test_faults_and_names_of_a_ladder_do_not_change_which_run_it_is(home):
    fault = '[[faults]]\nkind = "exit"\nat_step = 3\n'
    reference, storm = load(home, plain(), ARM), load(home, plain(), ARM, fault)
    assert [run.key for run in reference.runs] == [run.key for run in storm.runs]
    scored = load(home, plain(head=HEAD + "set = { eval.max_tokens = 256 }\n"), ARM)
    assert not {run.key for run in reference.runs} & {run.key for run in scored.runs}


def test_the_target_is_predicted_or_run_after_all_rungs(home):
    assert not [run for run in load(home, plain()).runs if run.rung == TARGET]
    ladder = load(home, plain(target=TARGET_TABLE + 'seeds = [0]\narms = ["no qk-norm"]\n'), ARM)
    assert [run.arm for run in ladder.runs if run.rung == TARGET] == [BASELINE, "no qk-norm"]
    assert [run.rung for run in ladder.runs[-2:]] == [TARGET, TARGET]


def test_a_sweep_tries_every_rate_for_every_rung_and_arm_at_a_seed_of_its_own(home):
    ladder = load(home, plain(), ARM, "[tuning]\nrates = [0.5, 2.0]\nseed = 7\n")
    assert len(ladder.sweep) == 3 * 3 * 2
    assert {run.seed for run in ladder.sweep} == {7}
    rates = {run.rate: run.config.optim.learning_rate for run in ladder.sweep}
    assert rates == {0.5: 0.005, 2.0: 0.02}


def test_the_criterion_of_a_file_is_that_of_the_statistics():
    fields = {field.name: field.default for field in dataclasses.fields(Criterion)}
    assert CriterionTable().model_dump() == fields


def test_two_rungs_can_be_run_with_a_notice_that_there_will_be_no_fit(home):
    two = "[[rungs]]".join(RUNGS.split("[[rungs]]")[:3])
    ladder = load(home, plain(rungs=two))
    assert ladder.runs
    assert any("too few for a fit" in notice for notice in ladder.notices)


# Refusals


def test_all_problems_of_a_ladder_file_are_reported_at_once(home):
    head = HEAD.replace("[0, 1]", "[0, 0]") + 'metric = "books"\ndownstream = "tasks"\n'
    text = plain(head=head, target="[target]\nflops = 1.0\n")
    nothing = '[[arms]]\nname = "nothing"\n'
    same = '[[arms]]\nname = "same"\nset = { model.qk_norm = true }\n'
    two = '[[arms]]\nname = "two"\nset = { model.qk_norm = false, model.mlp = "gelu" }\n'
    typo = '[[arms]]\nname = "typo"\nset = { model.qknorm = false }\n'
    twins = ARM + ARM.replace("no qk-norm", "twin")
    double = '[[rungs]]\nname = "s"\nwidth = 48\nn_layers = 1\n[[rungs]]\nname = "equal"\nwidth = 32\nn_layers = 1\n'
    combined = '[[arms]]\nname = "mix"\ncombines = ["twin", "absent"]\n'
    message = problems(home, text, nothing, same, two, typo, twins, double, combined)
    for hint in (
        "seeds names 0 2 times", "metric = 'books'", "downstream = 'tasks'", "arm 'nothing' changes nothing",
        "arm 'same': it sets model.qk_norm to what the baseline has", "arm 'two' changes 2 settings",
        "Did you mean model.qk_norm", "'no qk-norm' and 'twin' make the same change", "2 rungs are called 's'",
        "have 22,528 parameters each", "the target takes 1.0·10⁰ FLOPs", "combines 'absent'",
    ):  # fmt: skip
        assert hint in message, (hint, message)


@pytest.mark.parametrize(
    ("parts", "hint"),
    [
        ((HEAD + "aaa = true\n" + SIZES + RUNGS + TARGET_TABLE,), "Did you mean aa?"),
        ((HEAD + SIZES + RUNGS,), "target is missing"),
        ((plain(sizes="[sizes]\ntokens_per_parameter = 1\nbacth = 'fixed'\n"),), "Did you mean batch?"),
        ((plain(sizes=SIZES + 'learning_rate = "power"\n'),), "sizes.learning_rate_exponent = 0"),
        (
            (plain(head=HEAD + "set = { model.head_width = 12 }\n", sizes=SIZES + "head_width = 8\n"),),
            "Both say how wide a head is",
        ),
        ((plain(), '[[rungs]]\nname = "x"\nwidth = 8\nparameters = 100\n'), "rung 'x' has no one size"),
        ((plain(target="[target]\nflops = 1e15\nwidth = 64\nn_layers = 1\n"),), "[target] needs one scale"),
        ((plain(target="[target]\nflops = 1e15\nseeds = [0]\n"),), "[target] has no size"),
        ((plain(), '[[arms]]\nname = "A/A"\nset = { model.qk_norm = false }\n'), "has a meaning of its own"),
        ((plain(), '[[arms]]\nname = "w"\nset = { model.width = 32 }\n'), "which rungs and seeds decide"),
        ((plain(), '[[arms]]\nname = "e"\nset = { eval.max_tokens = 5 }\n'), "which decides no weights"),
        ((plain(), '[[arms]]\nname = "t"\nset = { data.vocab_size = 300 }\n'), "bits_per_byte"),
        ((plain(), '[[arms]]\nname = "h"\nset = { data.heldout = "tail" }\n'), "which text is held out"),
        ((plain(head=CODE), '[[arms]]\nname = "h"\nset = { data.heldout = "tail" }\n'), "which text is held out"),
        ((plain(head=CODE), '[[arms]]\nname = "d"\nset = { model.dropout = 0.1 }\n'), "with dropout on"),
        ((plain(head=CODE + "[set]\nmodel.dropout = 0.1\n"),), "the baseline has model.dropout"),
        ((plain(head=CODE + '[set]\neval = { sets = ["code_length"], sources = { code_length = "x" } }\n'),), "so too"),
        ((plain(), '[[arms]]\nname = "g"\nset = { model.n_kv_heads = 3 }\n'), "does not divide model.n_heads"),
        ((plain(), '[[faults]]\nkind = "partition"\nat_step = 2\n'), "partition needs two nodes"),
        ((plain(), '[[faults]]\nkind = "agent_killed"\nat_step = 2\n'), "is made from outside"),
        ((plain(), '[[faults]]\nkind = "sigkill"\nat_seconds = 2.0\n'), "is made from outside"),
        ((plain(), '[[faults]]\nkind = "corrupt_tokens"\nat_step = 2\n'), "tokens that all runs read"),
        ((plain(), '[[faults]]\nkind = "exit"\nat_step = 2\narm = "absent"\n'), "faults[0] (exit) selects no run"),
        ((plain(), '[[faults]]\nkind = "exit"\nat_step = 60\n'), "s: faults[0] (exit): at_step = 60"),
        ((plain(), "[tuning]\nseed = 1\n"), "tuning.seed = 1 is also a seed"),
        ((plain(head=HEAD + "ranks = 3\n"),), "leaves 1 of 3 ranks without work"),
    ],
)
def test_a_ladder_that_makes_no_sense_is_refused(home, parts, hint):
    assert hint in problems(home, *parts)


def test_a_pair_that_differs_in_more_than_it_declares_is_refused(home):
    ladder = load(home, plain(), ARM)
    base, aa, arm = ladder.runs[:3]
    planned = next(arm for arm in ladder.arms if arm.name == "no qk-norm")
    assert arms.prove(planned, base, arm) == []
    assert "differs in more than it declares: model.init_draw" in arms.prove(planned, base, aa)[-1]
    assert "changes nothing" in arms.prove(planned, base, base)[0]


def test_the_ladders_in_configs_can_be_planned():
    for path in sorted((Path(__file__).parent.parent / "configs" / "ladders").glob("*.toml")):
        assert loading.load(path).runs
