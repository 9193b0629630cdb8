"""Promises about tables of runs that were made elsewhere."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests import ladders
from tests.ladders import Arm, Design
from trainer import api, cli
from trainer.errors import EXIT_FINISHED, ConfigError
from trainer.ladder import report
from trainer.ladder.judge import judge, meaning, read_criterion, table
from trainer.ladder.stats import decision, downstream, verdict
from trainer.ladder.stats.records import BASELINE, Criterion, Interval, RunResult

DESIGN = dataclasses.replace(ladders.LONG, seeds=2)
ONE_SEED = dataclasses.replace(ladders.LONG, seeds=1)
ARMS: Mapping[str, Arm] = {"better": ladders.line(1.6, 1.6), "worse": ladders.line(0.7, 0.7)}
Values = dict[str, Any]


def results(design: Design = DESIGN, arms: Mapping[str, Arm] = ARMS) -> list[RunResult]:
    random = np.random.Generator(np.random.Philox(5))
    return ladders.draw(design, ladders.power_law(), arms, random)


def rows(found: Sequence[RunResult]) -> list[Values]:
    return [
        {"arm": run.arm, "params": run.parameters, "tokens": run.tokens, "seed": run.seed, "loss": float(run.loss)}
        for run in found
    ]


def write(path: Path, table: Sequence[Values]) -> Path:
    """Write a table in the form that the name's ending tells."""
    if path.suffix == ".json":
        path.write_text(json.dumps(list(table), indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(list(table)), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(table)
    return path


def change(table: Sequence[Values], number: int, **values: Any) -> list[Values]:
    return [row | values if place == number else row for place, row in enumerate(table)]


def problems(path: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        judge(str(path), **options)
    return str(caught.value)


# Verdicts


@pytest.mark.parametrize("name", ["runs.csv", "runs.tsv", "runs.json", "runs.jsonl", "runs.parquet"])
def test_a_table_gets_the_verdicts_that_the_same_runs_get_as_a_ladder(tmp_path, name):
    found = results()
    tree = judge(str(write(tmp_path / name, rows(found))), target_flops=DESIGN.target)
    # The table has N and D, and the ladder's runs were made with C = 120 N² only about: 6·N·D is the table's compute.
    found = [dataclasses.replace(run, flops=6.0 * run.parameters * run.tokens) for run in found]
    expected = verdict.judge(decision.without_time(found), Criterion(), DESIGN.target)
    judged = {row["arm"]: (row["decision"], row["multiplier"]["value"]) for row in tree["verdicts"]}
    assert judged == {row.arm: (row.decision, pytest.approx(row.multiplier.value)) for row in expected}
    assert {name: word for name, (word, _) in judged.items()} == {"better": "promote", "worse": "reject"}
    assert "course" not in tree  # nothing is known of how the runs were executed


def test_columns_are_guessed_by_name_or_named_and_said(tmp_path):
    renamed = [
        {
            "Recipe": row["arm"],
            "n": row["params"],
            "train tokens": row["tokens"],
            "note": "x",
            "c4_val_loss": row["loss"],
        }
        for row in rows(results(ONE_SEED))
    ]
    path = str(write(tmp_path / "runs.csv", renamed))
    tree = judge(path)
    assert tree["table"]["columns"] == {
        "arm": "Recipe", "params": "n", "tokens": "train tokens", "loss": "c4_val_loss"
    }  # fmt: skip
    said = " ".join(tree["notices"])
    assert "loss = c4_val_loss (guessed)" in said and "Not used: note." in said
    assert "has no seeds" in said and "No target was given" in said and "compute is 6·params·tokens" in said
    alone = judge(path, columns={"arm": "", "rung": "Recipe", "loss": "c4_val_loss"})
    assert alone["arms"] == []


@pytest.mark.parametrize(
    ("metric", "of_loss"),
    [
        ("perplexity", math.exp),
        ("accuracy", lambda loss: 1 - loss / 10),
        ("accuracy in %", lambda loss: 100 - 10 * loss),
    ],
)
def test_other_metrics_are_turned_into_one_that_falls_as_a_loss_does(
    tmp_path, metric: str, of_loss: Callable[[float], float]
):
    table = rows(results())
    plain = judge(str(write(tmp_path / "plain.csv", table)), target_flops=DESIGN.target)
    turned = [{metric: of_loss(row["loss"])} | {key: row[key] for key in row if key != "loss"} for row in table]
    tree = judge(str(write(tmp_path / "turned.csv", turned)), columns={"loss": metric}, target_flops=DESIGN.target)
    assert f"{metric}" in " ".join(tree["notices"][1:])
    for row, expected in zip(tree["verdicts"], plain["verdicts"], strict=True):
        assert row["decision"] == expected["decision"]
        assert row["multiplier"]["value"] == pytest.approx(expected["multiplier"]["value"], rel=1e-6)


def test_unequal_seeds_missing_rungs_and_missing_losses_are_judged_and_said(tmp_path):
    table = rows(results())
    table = change(table, 1, loss="")
    table = [row for row in table if not (row["arm"] == "worse" and row["params"] == table[0]["params"])]
    table = [row | {"seed": row["seed"] + 10} if row["arm"] == "better" else row for row in table]
    tree = judge(str(write(tmp_path / "runs.csv", table)), target_flops=DESIGN.target)
    said = " ".join(tree["notices"])
    assert "line 3: no loss: the run is missing." in said
    assert "No seeds are shared with the baseline by better: compared as independent runs." in said
    better, worse = ({rung["rung"]: rung for rung in row["rungs"]} for row in tree["verdicts"])
    first, second, *_ = better
    assert (better[first]["pairs"], better[second]["pairs"], worse[first]["pairs"]) == (1, 2, 0)
    assert "no finished pair" in worse[first]["gap"]


def test_seconds_decide_as_in_a_ladder_where_the_table_has_them(tmp_path):
    table = [row | {"seconds": row["tokens"] * (2.0 if row["arm"] == "better" else 1.0)} for row in rows(results())]
    tree = judge(str(write(tmp_path / "runs.csv", table)), target_flops=DESIGN.target)
    assert tree["verdicts"][0]["decision"] == "promote"
    assert tree["course"]["verdicts"][0]["decision"] == "reject"
    assert "A step takes at least 2× as long" in tree["course"]["verdicts"][0]["why"]


def test_one_arm_is_predicted_and_a_form_that_does_not_fit_is_warned_of(tmp_path):
    base = [run for run in results() if run.arm == BASELINE]
    tree = judge(str(write(tmp_path / "runs.csv", rows(base))), target_flops=1e17)
    assert [guess["inside"] for guess in tree["predictions"]] == [True, None]
    assert not [notice for notice in tree["notices"] if "do not trust" in notice]
    largest = max(run.flops for run in base)
    bent = [dataclasses.replace(run, loss=run.loss + 0.2 * (run.flops == largest)) for run in base]
    tree = judge(str(write(tmp_path / "bent.csv", rows(bent))), target_flops=1e17)
    assert len([notice for notice in tree["notices"] if "do not trust its target" in notice]) == 2


def test_arms_whose_best_sizes_differ_from_the_baselines_are_compared_by_compute(tmp_path):
    # Each arm has the best size of each budget, found on a coarse grid: no size is common, and N and D wander.
    table = []
    for budget in np.geomspace(1e16, 1e19, 7):
        for arm, gain in (("baseline", 1.0), ("better", 1.3)):
            wander = {"baseline": (0.6, 1.5), "better": (0.8, 1.2)}[arm][len(table) // 2 % 2]
            params = wander * math.sqrt(budget / 120)
            noise = 0.0005 * (-1) ** (len(table) % 3)
            loss = ladders.power_law()(budget * gain / 1e4) + noise
            table.append({"arm": arm, "params": params, "tokens": budget / 6 / params, "flops": budget, "loss": loss})
    tree = judge(str(write(tmp_path / "best.csv", table)), target_flops=1e20)
    assert "runs are compared by their compute alone" in " ".join(tree["notices"])
    (verdict,) = tree["verdicts"]
    assert [rung["pairs"] for rung in verdict["rungs"]] == [1] * 7
    assert verdict["decision"] == "promote" and verdict["multiplier"]["value"] == pytest.approx(1.3, rel=0.05)
    # One size of the arm that is the baseline's too, and sizes are what is compared.
    table[1] |= {"params": table[0]["params"], "tokens": table[0]["tokens"]}
    assert "surface" in judge(str(write(tmp_path / "one.csv", table)), target_flops=1e20)


def test_runs_on_no_one_line_of_compute_are_fitted_by_surfaces_that_are_tested_on_the_largest_run(tmp_path):
    def loss(n: float, d: float) -> float:
        return 1.8 + 400 / n**0.34 + 1100 / d**0.37

    table = [
        {"params": n, "tokens": n * ratio, "loss": loss(n, n * ratio)}
        for n in (1e7, 4e7, 2e8, 1e9)
        for ratio in (5, 20, 80)
    ]
    tree = judge(str(write(tmp_path / "runs.csv", table)), target_flops=1e22)
    assert tree["fit"] is None and "parameters and tokens vary apart" in tree["no_fit"]
    form = tree["surface"]["forms"][0]
    assert form["values"] == pytest.approx({"E": 1.8, "A": 400, "alpha": 0.34, "B": 1100, "beta": 0.37}, rel=0.05)
    assert form["held_out"]["fits"] and form["held_out"]["parameters"] == 1e9
    # The best size of a budget, in closed form (Hoffmann et al. 2022, equation 4).
    ratio = (0.34 * 400 / (0.37 * 1100)) ** (1 / 0.71)
    assert form["target"]["parameters"] == pytest.approx(ratio * (1e22 / 6) ** (0.37 / 0.71), rel=0.1)
    assert "E + A / N^α + B / D^β: E 1.8" in shown(tree)
    assert "Loss against parameters and tokens" in report.html(tree, [])
    both = [
        row | {"arm": arm, "loss": row["loss"] - gain} for row in table for arm, gain in (("base", 0), ("new", 0.01))
    ]
    tree = judge(str(write(tmp_path / "both.csv", both)), target_flops=1e22)
    differences = [row["difference"]["value"] for row in tree["differences"]]
    assert differences == pytest.approx([-0.01] * 12) and "size by size" in " ".join(tree["notices"])
    table[-1]["loss"] += 0.2
    tree = judge(str(write(tmp_path / "odd.csv", table)), target_flops=1e22)
    assert "misses the largest" in " ".join(tree["notices"])


def test_data_that_were_repeated_more_often_than_a_form_knows_of_are_left_out_and_counted(tmp_path):
    table = [row | {"unique_tokens": row["tokens"] / (8 if row["seed"] else 1)} for row in rows(results())]
    tree = judge(str(write(tmp_path / "runs.csv", table)))
    assert len(tree["runs"]) == len(table) / 2
    assert "15 lines (3, 5, 7, 9, 11, …): data were repeated more than 4 times" in " ".join(tree["notices"])


def test_arms_with_seeds_of_their_own_are_compared_as_independent_runs_whatever_the_numbers(tmp_path):
    table = [row | {"seed": row["seed"] + (1 if row["arm"] == BASELINE else 2 + len(ARMS))} for row in rows(results())]
    tree = judge(str(write(tmp_path / "runs.csv", table)))
    assert any("compared as independent runs" in notice for notice in tree["notices"])
    for found in tree["verdicts"]:
        assert found["pairing"] == {"ratio": None, "correlation": None}
        assert [rung["pairs"] for rung in found["rungs"]] == [DESIGN.seeds] * len(found["rungs"])


def test_a_share_of_right_answers_may_differ_as_much_as_bits_do_from_nats(tmp_path):
    table = [{**row, "accuracy": 0.3 if row["arm"] == BASELINE else 0.433} for row in rows(results())]
    for number, row in enumerate(table):
        row["accuracy"] += 0.05 * math.log10(row["params"]) + 1e-4 * number
        del row["loss"]
    assert judge(str(write(tmp_path / "runs.csv", table)))["runs"]


def test_runs_of_one_arm_and_seed_that_fall_into_one_rung_are_refused_with_their_lines(tmp_path):
    table = rows(results())
    message = problems(write(tmp_path / "runs.csv", [*table, table[-1] | {"params": 1.05 * table[-1]["params"]}]))
    assert "about the compute of rung" in message and f"lines {len(table) + 1}, {len(table) + 2}" in message


def test_an_arm_that_is_called_0_or_false_is_an_arm(tmp_path):
    table = [row | {"arm": {BASELINE: 0, "better": False}.get(row["arm"], 2)} for row in rows(results())]
    tree = judge(str(write(tmp_path / "runs.jsonl", table)))
    assert {arm["name"] for arm in tree["arms"]} == {"False", "2"}


def test_seconds_without_tokens_are_said_to_be_unused(tmp_path):
    table = [
        {
            "arm": row["arm"],
            "flops": 6 * row["params"] * row["tokens"],
            "seed": row["seed"],
            "loss": row["loss"],
            "seconds": 5,
        }
        for row in rows(results())
    ]
    assert any("not used" in notice for notice in judge(str(write(tmp_path / "runs.csv", table)))["notices"])


# Faults


def test_all_faults_of_a_table_are_reported_at_once_with_their_lines(tmp_path):
    table = rows(results())
    table = change(table, 0, loss="oops")
    table = change(table, 2, tokens=0)
    table = change(table, 4, params=125)
    table = change(table, 6, seed=1.5)
    table = change(table, 8, loss=-1.0)
    table = [*table, table[10], table[12] | {"loss": 9.0}]
    path = write(tmp_path / "runs.csv", table)
    path.write_text(path.read_text() + "one,field,more,than,there,are\n")
    message = problems(path)
    for hint in (
        "line 2: loss = 'oops' is no number", "line 4: tokens = '0' is not positive",
        "line 6: params = '125' is too few", "line 8: seed = '1.5' is no whole number",
        "line 10: loss is not positive", "lines 12, 32: are the same run",
        "lines 14, 33: are one run with different results", "line 34: there are 6 fields, and line 1 names 5 columns",
    ):  # fmt: skip
        assert hint in message, (hint, message)


@pytest.mark.parametrize(
    ("edit", "options", "hint"),
    [
        (lambda row: row, {"columns": {"loss": "los"}}, "has no column 'los'. Did you mean loss?"),
        (lambda row: row, {"columns": {"losses": "loss"}}, "there is no such role. Did you mean loss?"),
        (lambda row: {"score": row["loss"]}, {}, "has no column that is called a loss"),
        (lambda row: {"loss": row["loss"]}, {}, "has no compute"),
        (lambda row: row | {"test_loss_a": 1, "loss_b": 1, "loss": None}, {"columns": {"loss": ""}}, "called a loss"),
        (lambda row: {"loss_a": 1, "loss_b": 2, "c": 1e9}, {}, "several losses: 'loss_a', 'loss_b'"),
        (lambda row: row, {"baseline": "bettter"}, "has no such arm. Did you mean better?"),
        (lambda row: row, {"target_flops": 1e9}, "is no finite amount from the largest run's"),
        (lambda row: row, {"target_flops": math.inf}, "is no finite amount"),
        (lambda row: row, {"target_flops": math.nan}, "is no finite amount"),
        (lambda row: row | {"params": 1e300, "tokens": 1e300, "flops": 1e15}, {}, "no run has so much compute"),
        (lambda row: {"": 1} | row, {}, "line 1: a column has no name"),
        (lambda row: row | {"flops": 6e-18 * row["params"] * row["tokens"]}, {}, "is too few"),
        (lambda row: row | {"flops": 6e-4 * row["params"] * row["tokens"]}, {}, "FLOPs / (6·params·tokens) is 0.0001"),
        (lambda row: row | {"loss": row["loss"] * (1.4427 if row["seed"] else 1)}, {}, "as bits are of nats"),
        (lambda row: row | {"loss": 100 * row["loss"]}, {"more_is_better": True}, "it is no share"),
        (lambda row: row | {"loss": ""}, {}, "has no run with a result"),
    ],
)  # fmt: skip
def test_a_table_that_makes_no_sense_is_refused_with_the_remedy(tmp_path, edit, options, hint):
    path = write(tmp_path / "runs.csv", [edit(row) for row in rows(results())])
    message = problems(path, **options)
    assert hint in message
    assert "\n  " in message


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("none.csv", None, "does not exist"), ("empty.csv", "", "has no rows"),
        ("runs.xls", "x", "its name ends with .xls"),
        ("runs.csv", "loss,loss\n1,2\n", "line 1: 'loss' names several columns"),
        ("broken.jsonl", "1\n", "line 1: no JSON"), ("list.jsonl", "[1]\n", "entry 1: there is no JSON object"),
        ("broken.json", "[{,", "the list is no JSON"), ("deep.json", "[" * 100_000, "the list is no JSON: too deep"),
        ("broken.parquet", "no", "is no whole parquet file"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_refused(tmp_path, name, text, hint):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert hint in problems(tmp_path / name)


def test_a_run_whose_loss_is_not_finite_diverged_and_its_arm_is_not_promoted(tmp_path):
    table = rows(results())
    number = next(number for number, row in enumerate(table) if row["arm"] == "better")
    tree = judge(str(write(tmp_path / "runs.csv", change(table, number, loss="nan"))), target_flops=DESIGN.target)
    assert f"line {number + 2}: loss is not finite: the run diverged." in tree["notices"]
    assert tree["verdicts"][0]["decision"] == "inconclusive"


# Tables as spreadsheets and people write them


def nasty(*edits: Callable[[Values], Values], separator: str = ",", header: bool = True) -> str:
    """Five sizes of two arms with exact values, as text; each row edited."""
    table = []
    for size in range(5):
        for arm, gain in (("base", 1.0), ("muon", 1.5)):
            params, tokens = 124_000_000 * 3**size, 2_500_000_000 * 3**size
            loss = round(1.7 + 40 * (6 * params * tokens * gain) ** -0.09, 4)
            row: Values = {"arm": arm, "params": params, "tokens": tokens, "seed": 0, "loss": loss}
            for edit in edits:
                row = edit(row)
            table.append(row)
    lines = [separator.join(map(str, row.values())) for row in table]
    return "\n".join([*([separator.join(table[0])] if header else []), *lines]) + "\n"


def renamed(**names: str) -> Callable[[Values], Values]:
    return lambda row: {names.get(name, name): value for name, value in row.items()}


def written(**forms: Callable[[Any], Any]) -> Callable[[Values], Values]:
    return lambda row: row | {name: form(row[name]) for name, form in forms.items()}


def comma(value: float) -> str:
    return str(value).replace(".", ",")


def grouped(mark: str) -> Callable[[int], str]:
    return lambda value: f"{value:,}".replace(",", mark)


def quoted(form: Callable[[Any], Any]) -> Callable[[Any], str]:
    return lambda value: f'"{form(value)}"'


LONG: Mapping[str, bytes | str] = {
    "plain": nasty(),
    "UTF-8 with a mark, CRLF": b"\xef\xbb\xbf" + nasty().replace("\n", "\r\n").encode(),
    "UTF-16 with tabs, as Excel's Unicode text": nasty(separator="\t").encode("utf-16"),
    "CR alone": nasty().replace("\n", "\r"),
    "semicolons": nasty(separator=";"),
    "semicolons and decimal commas": nasty(written(loss=comma), separator=";"),
    "sep=; above": "sep=;\n" + nasty(written(loss=comma), separator=";"),
    "decimal commas, points between groups": nasty(written(loss=comma, params=grouped(".")), separator=";"),
    "decimal commas in quotes": nasty(written(loss=quoted(comma))),
    "commas between groups": nasty(written(params=quoted(grouped(",")), tokens=quoted(grouped(",")))),
    "spaces between groups": nasty(written(params=grouped(" "), tokens=grouped("\u202f"))),
    "apostrophes between groups": nasty(written(params=grouped("'"))),
    "underscores": nasty(written(params=grouped("_"))),
    "124M and 2.5B": nasty(written(params=lambda n: f"{n / 1e6:g}M", tokens=lambda d: f"{d / 1e9:g} B")),
    "124 million": nasty(written(params=lambda n: f"{n / 1e6:g} million", tokens=lambda d: f"{d / 1e9}bn")),
    "1.24e8": nasty(written(params=lambda n: f"{n:.10e}", tokens=lambda d: f"{d:E}")),
    "+124000000": nasty(written(params=lambda n: f"+{n}")),
    "124000000.0": nasty(written(params=float, seed=float)),
    "millions by the column": nasty(
        written(params=lambda n: n / 1e6, tokens=lambda d: d / 1e9), renamed(params="Params (M)", tokens="tokens [B]")
    ),
    "millions by the column's last word": nasty(
        written(params=lambda n: n / 1e6, tokens=lambda d: d / 1e9),
        renamed(params="n_params_millions", tokens="tokens_b"),
    ),
    "a unit in the column and in the value": nasty(
        written(params=lambda n: f"{n / 1e6}M"), renamed(params="params (M)")
    ),
    "headers in quotes, capitals, spaces": nasty(renamed(arm='" Arm "', loss='"VAL  Loss"', params='"N params"')),
    "losses with a unit": nasty(renamed(loss="val loss (nats/token)")),
    "val/loss of W&B": nasty(renamed(loss="val/loss")),
    "a held-out loss beside the training's": nasty(
        lambda row: row | {"train_loss": 9.0, "loss_std": 0.1}, renamed(loss="eval_loss")
    ),
    "a column loss that is not the held-out one": nasty(renamed(loss="val_loss"), lambda row: row | {"loss": 9.0}),
    "comments above, between and below": "# from our sweep, 2024\n\n"
    + nasty().replace("base,372", "# half way\nbase,372") + "#end\n",
    "a header after the mark of comments": "# " + nasty(),
    "empty lines above": "\n\n" + nasty(),
    "empty columns and lines at the end": "\n".join(line + ",," for line in nasty().splitlines()) + "\n,,,,,,\n",
    "seeds that are names": nasty(written(seed=lambda _: "seed-a")),
    "seeds of 20 digits": nasty(written(seed=lambda _: 2**64 - 1)),
    "missing seeds": nasty(written(seed=lambda _: "NA")),
    "spaces around values": nasty(written(arm=lambda a: f"  {a} ", loss=lambda v: f" {v} ")),
    "an unused column in another alphabet": nasty(lambda row: row | {"заметка": "да; нет"}),
}  # fmt: skip


def read_rows(path: Path) -> list[tuple[Any, ...]]:
    found = table.read(str(path))
    wrong: list[str] = []
    runs = meaning.read_runs(found, meaning.choose_columns(found, {}), False, [], wrong)
    wrong += [*found.problems, *meaning.contradictions(found, runs, False, True)]
    assert not wrong
    return [(run.arm, run.params, run.tokens, run.loss) for run in runs]


@pytest.mark.parametrize("name", LONG)
def test_a_table_is_read_as_it_was_meant_however_it_is_written(tmp_path: Path, name: str):
    text, path = LONG[name], tmp_path / "runs.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "plain.csv").write_text(nasty())
    for found, expected in zip(read_rows(path), read_rows(tmp_path / "plain.csv"), strict=True):
        assert found == (expected[0], *(pytest.approx(value, rel=1e-12) for value in expected[1:]))


def last(**values: Any) -> str:
    """The table with these values in its last row."""
    lines = nasty().splitlines()
    fields = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True)) | values
    return "\n".join([*lines[:-1], ",".join(map(str, fields.values()))]) + "\n"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (nasty().replace("\n", "\n,M,B,,nats\n", 1), "line 2: params = 'M' is no number"),
        (nasty(written(params=quoted(lambda n: f"{n // 1000},00"))), "params = '124000,00' may be a fraction"),
        (nasty(written(loss=lambda v: '"2,413"')), "may be a fraction or a group of thousands"),
        (nasty(written(loss=quoted(comma), params=lambda n: f"{n / 1e6:.2f}M")), "may be a fraction"),
        (nasty(written(params=quoted(lambda n: "1,2345"))), "params = '1,2345' may be a fraction"),
        (nasty(written(loss=lambda v: f"{v} ± 0.02")), "± 0.02' is no number"),
        (nasty(written(loss=lambda v: f"{v}M")), "M' is no number"),
        (nasty(written(tokens=lambda d: f"{d / 1e9}GB")), "GB' is no number"),
        (last(arm="Muon"), "'muon' and 'Muon' differ in case or spaces alone"),
        (last(loss="45%"), "is no percentage, and other values of its column are"),
        (last(loss="#DIV/0!"), "'#DIV/0!' is no number"),
        (last(loss="OOM"), "the loss of a run that diverged is nan"),
        (last(loss=1e12), "is no loss or share of any model"),
        (last(params="", tokens="", arm="mean"), "neither FLOPs nor parameters and tokens are known"),
        (last(seed="0.5"), "is no whole number"),
        (last(arm=""), "arm is missing"),
        (nasty(written(tokens=lambda d: d // 1_000_000)), "parameters for each token"),
        (nasty(written(params=lambda n: n * 10**9), renamed(params="params_b")), "is too many"),
        (nasty(lambda row: row | {"Loss": 1.0}), "'loss' and 'Loss' are alike"),
        (nasty(lambda row: row | {"muon_loss": 2.0}, renamed(loss="base_loss")), "write their runs below one"),
        (nasty(lambda row: row | {"muon": 2.0}, renamed(loss="base", arm="name")), "write their runs below one"),
        (nasty(separator=" "), "line 1: columns are separated by spaces"),
        (nasty(header=False), "no column that is called a loss"),
        (nasty().encode() + b"M\xfcller", "is no text in UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is no text in UTF-8"),
        (nasty().replace("muon", '"muon', 1), "fields"),
        (nasty(lambda row: row | {"": 1}), "a column has no name"),
        (nasty(lambda row: row | {"unique_tokens": row["tokens"] // 5}), "data were repeated more than 4 times"),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_or_in_none_is_refused_with_the_remedy(
    tmp_path: Path, text: bytes | str, hint: str
):
    (tmp_path / "runs.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = problems(tmp_path / "runs.csv")
    assert hint in message
    assert "\n  " in message


def test_two_columns_of_one_name_are_refused_in_parquet_too(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    columns = pyarrow.table([[1.0], [2.0], [1e9]], names=["loss", "loss", "flops"])
    pytest.importorskip("pyarrow.parquet").write_table(columns, tmp_path / "runs.parquet")
    assert "two columns of one name.\n  " in problems(tmp_path / "runs.parquet")


def test_percentages_are_shares_and_compute_may_have_a_unit(tmp_path: Path):
    trees = []
    for share, compute in (("{:.8%}", "compute (PF-days)"), ("{:.10f}", "flops")):
        table = [
            {"arm": row["arm"], "seed": row["seed"], "accuracy": share.format(1 - row["loss"] / 10)}
            | {compute: 6 * row["params"] * row["tokens"] / (8.64e19 if "(" in compute else 1)}
            for row in rows(results())
        ]
        trees.append(judge(str(write(tmp_path / "runs.csv", table)), target_flops=DESIGN.target))
    found, expected = ([(row["decision"], row["multiplier"]["value"]) for row in tree["verdicts"]] for tree in trees)
    assert found == [(decision, pytest.approx(value, rel=1e-6)) for decision, value in expected]


# Sources and command


def test_a_folder_of_offline_wandb_runs_is_a_table_of_their_settings_and_last_metrics(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    found = results(ONE_SEED, {})
    for row in rows(found):
        settings = {"size": {"params": row["params"]}, "tokens": row["tokens"]}
        run = wandb.init(mode="offline", dir=tmp_path, name=f"of {row['params']}", config=settings)
        run.log({"val_loss": row["loss"] + 1})
        run.log({"val_loss": row["loss"]})
        run.finish()
    wandb.teardown()  # its service writes the last records when it ends
    tree = judge(str(tmp_path), columns={"params": "size.params"}, target_flops=DESIGN.target)
    made = [(run["place"], run["parameters"], run["loss"]) for run in tree["runs"]]
    assert sorted(made) == sorted((f"run of {run.parameters}", run.parameters, run.loss) for run in found)


def test_runs_of_a_wandb_project_or_group_are_a_table_and_its_errors_have_a_remedy(monkeypatch):
    asked = []

    def runs(project: str, filters: Values) -> list[SimpleNamespace]:
        asked.append((project, filters.get("group")))
        if project != "lab/sweep":
            raise ValueError("Could not find project")
        return [
            SimpleNamespace(
                name=f"run {row['params']}", group="g", config=row, summary={"loss": row["loss"], "_step": 3}
            )
            for row in rows(results(ONE_SEED, {}))
        ]

    monkeypatch.setattr("wandb.Api", lambda: SimpleNamespace(runs=runs))
    assert len(judge("wandb:lab/sweep")["runs"]) == len(judge("wandb:lab/sweep/g")["runs"]) == 5
    assert asked == [("lab/sweep", None), ("lab/sweep", "g")]
    for source, hint in (("wandb:lab/none", "wandb login"), ("wandb:lab", "names no project")):
        assert hint in problems(Path(source))


def test_the_command_writes_the_page_of_a_ladder_and_prints_one_json_object(tmp_path):
    path = write(tmp_path / "runs.csv", rows(results()))
    rule = tmp_path / "rule.toml"
    rule.write_text("[criterion]\nmin_gain = 3.0\n")
    options = [
        "judge",
        path,
        "--out",
        tmp_path / "out",
        "--target",
        f"{DESIGN.target:g}",
        "--criterion",
        rule,
        "--json",
    ]
    done = CliRunner().invoke(cli.app, [str(option) for option in options])
    assert done.exit_code == EXIT_FINISHED, done.output
    tree = json.loads(done.stdout)
    assert [row["decision"] for row in tree["verdicts"]] == ["reject", "reject"]  # by the criterion of the file
    assert tree == json.loads((tmp_path / "out" / "report.json").read_text())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "better" in page and "Columns: arm = arm (guessed)" in page and "git checkout" not in page
    rule.write_text("min_gian = 3.0\n")
    with pytest.raises(ConfigError, match="Did you mean min_gain"):
        read_criterion(rule)
    assert isinstance(CliRunner().invoke(cli.app, ["judge", str(path), "--column", "loss"]).exception, ConfigError)


def shown(tree: Values) -> str:
    """The report as a terminal shows it, in one line."""
    console = Console(file=io.StringIO(), width=100)
    console.print(report.terminal(tree))
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_the_api_judges_a_table_and_gives_a_record_for_each_arm(tmp_path):
    table = write(tmp_path / "runs.csv", rows(results()))
    report = api.judge(table, out=tmp_path / "out")
    found = {row["arm"]: row for row in report.verdicts()}
    assert {arm: row["decision"] for arm, row in found.items()} == {"better": "promote", "worse": "reject"}
    assert found["better"]["low"] <= found["better"]["multiplier"] <= found["better"]["high"]
    assert found["better"]["multiplier"] == pytest.approx(1.6, rel=0.2)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report.tree
    with pytest.raises(ConfigError, match="val_nll"):
        api.judge(table, columns={"loss": "val_nll"})


# A metric that is no loss


def with_accuracy(
    found: Sequence[RunResult], sd: float = 0.004, off: Mapping[str, float] | None = None
) -> list[Values]:
    """Rows with an accuracy that follows the loss: 0.25 by chance, up to 0.9."""
    random = np.random.Generator(np.random.Philox(4))
    return [
        row | {"accuracy": accuracy(row["loss"]) + (off or {}).get(row["arm"], 0.0) + sd * random.standard_normal()}
        for row in rows(found)
    ]


def accuracy(loss: float) -> float:
    return 0.25 + 0.65 / (1 + math.exp(2.5 * (loss - 3.2)))


def test_a_tasks_accuracy_is_predicted_through_the_loss_with_the_links_error(tmp_path):
    path = write(tmp_path / "runs.csv", with_accuracy(results()))
    tree = judge(str(path), target_flops=DESIGN.target)
    assert tree["table"]["columns"]["downstream"] == "accuracy" and tree["metric"] == "loss"
    found = {row["arm"]: row for row in tree["downstream"]["predictions"]}
    base = ladders.power_law()
    truths = {"baseline": 1.0, "better": 1.6, "worse": 0.7}
    for arm, gain in truths.items():
        metric = found[arm]["metric"]
        assert metric["value"] == pytest.approx(accuracy(base(DESIGN.target * gain)), abs=0.02)
        assert metric["low"] < metric["value"] < metric["high"]
    difference = found["better"]["difference"]
    assert 0 < difference["low"] < accuracy(base(DESIGN.target * 1.6)) - accuracy(base(DESIGN.target))
    assert found["worse"]["difference"]["high"] < 0
    assert "accuracy of better at the target" in shown(tree) and "accuracy at the target" in report.html(tree, [])
    noisier = write(tmp_path / "noisier.csv", with_accuracy(results(), sd=0.02))
    wider = judge(str(noisier), target_flops=DESIGN.target)["downstream"]["predictions"][0]["metric"]
    assert wider["high"] - wider["low"] > 1.5 * (found[BASELINE]["metric"]["high"] - found[BASELINE]["metric"]["low"])


def test_a_links_interval_holds_the_truth_as_often_as_it_says():
    random, base, held = np.random.Generator(np.random.Philox(2)), ladders.power_law(), []
    loss = np.repeat([base(flops) for flops in ladders.LONG.flops], 4) + 0.005 * random.standard_normal(20)
    known = Interval(base(1e16), base(1e16), base(1e16))
    for _ in range(20):
        metric = [accuracy(value) + 0.004 * float(random.standard_normal()) for value in loss]
        found = downstream.Link(loss, np.array(metric), ["arm"] * len(loss), 1.0).predict(known)
        held.append(ladders.covers(found, accuracy(base(1e16))))
    assert sum(held) >= 17


def test_an_arm_that_lies_off_the_link_makes_what_the_loss_says_of_the_metric_uncertain(tmp_path):
    off = write(tmp_path / "off.csv", with_accuracy(results(), off={"better": -0.05}))
    tree = judge(str(off), target_flops=DESIGN.target)
    assert "lie off the link" in " ".join(tree["notices"])
    difference = next(row for row in tree["downstream"]["predictions"] if row["arm"] == "better")["difference"]
    assert difference["low"] < 0 < difference["high"]


def test_a_metric_in_bits_is_linked_by_a_line_and_few_runs_are_refused(tmp_path):
    table = [
        row | {"downstream_bpb": 0.2 + 0.3 * row["loss"] + 1e-3 * (n % 3)} for n, row in enumerate(rows(results()))
    ]
    named = {"downstream": "downstream_bpb"}
    tree = judge(str(write(tmp_path / "runs.csv", table)), columns=named, target_flops=DESIGN.target)
    assert tree["downstream"]["link"]["form"] == "line"
    found = tree["downstream"]["predictions"][0]["metric"]
    assert found["low"] < 0.201 + 0.3 * ladders.power_law()(DESIGN.target) < found["high"]
    few = [row | {"downstream_bpb": row["downstream_bpb"] if number < 2 else ""} for number, row in enumerate(table)]
    tree = judge(str(write(tmp_path / "few.csv", few)), columns=named, target_flops=DESIGN.target)
    assert "needs 3 runs of different loss" in tree["downstream"]["refused"]


def test_the_ranking_at_the_largest_size_is_shown_beside_the_verdicts(tmp_path):
    found = results(ONE_SEED, {"fades": ladders.line(3, 0.9), "worse": ladders.line(0.7, 0.7)})
    tree = judge(str(write(tmp_path / "runs.csv", rows(found))), target_flops=1e18)
    says = {row["arm"]: row["says"] for row in tree["ranking"]}
    assert list(says) == ["fades", BASELINE, "worse"]
    assert says == {"fades": "promote", BASELINE: None, "worse": "reject"}
    decided = {row["arm"]: row["decision"] for row in tree["verdicts"]}
    assert decided["fades"] != "promote" and decided["worse"] == "reject"
    assert "the best first: fades, baseline, worse" in shown(tree)
    assert "By ranking at the largest size alone" in report.html(tree, [])
