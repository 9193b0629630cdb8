"""The promise everything rests on: the same bits at every world size and under every sharding.

Each world size trains all cases once on real gloo ranks; the tests hold the results against the single process.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from scripts import fuzz_equality
from tests.support import SMOKE, settings, shared_directory, torchrun, write_corpus
from trainer.data import cache

BASE = {"budget.steps": 3, "data.micro_batches": 5, "eval.max_tokens": 1024, "optim.learning_rate": 0.01}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "unclipped": {"optim.clip_norm": 0.0},
    "bf16": {"numerics.precision": "bf16"},
    "loss by chunks": {"model.loss_chunk_tokens": 48, "model.z_loss": 1e-4},
    "dropout": {"model.dropout": 0.1},
    "recomputed": {"model.dropout": 0.1, "parallel.activation_checkpointing": True},
    "seven micro-batches of one": {"data.micro_batches": 7, "data.micro_batch_sequences": 1},
    "repeated text": {"data.unique_tokens": 2048},
    # Odd widths: rows that fill no whole vector of the optimizer's kernels.
    "everything": {
        "model.width": 36, "model.n_heads": 6, "model.n_kv_heads": 2, "model.mlp": "swiglu", "model.norm": "layernorm",
        "model.biases": True, "model.tied_embeddings": True, "model.value_embeddings": True,
        "model.bigram_buckets": 101, "model.logit_softcap": 15.0, "model.z_loss": 1e-4, "model.init": "gpt2",
        "optim.schedule": "wsd", "optim.warmup_steps": 2, "optim.mup_base_width": 18,
    },
    "gpt-2": {
        "model.norm": "layernorm", "model.positions": "learned", "model.mlp": "gelu", "model.qk_norm": False,
        "model.biases": True, "model.tied_embeddings": True, "model.init": "gpt2", "model.dropout": 0.1,
    },
}  # fmt: skip
STRATEGIES: dict[str, dict[str, Any]] = {
    "replicate": {},
    "fsdp": {"parallel.strategy": "fsdp"},
    "hybrid": {"parallel.strategy": "hybrid"},
}
SCATTERED_ONCE = {"parallel.scatter_gradients": "step"}
MUON = {"optim.optimizer": "muon"}
PLAIN_SUMS = {"numerics.exact": False}
FOUR = {"data.micro_batches": 8, "islands.count": 4, "islands.inner_steps": 2, "budget.steps": 5}
ISLANDS: dict[str, dict[str, Any]] = {
    "islands": FOUR | {"model.dropout": 0.1},
    "islands, streamed in int4": FOUR
    | {
        "islands.inner_steps": 3, "islands.fragments": 2, "islands.overlap_steps": 1, "islands.mixing": 0.5,
        "islands.quantise": "int4", "model.width": 36, "model.n_heads": 6,
    },
    "islands, muon, int8": FOUR | MUON | {"islands.quantise": "int8"},
}  # fmt: skip
"""A cluster computes whole islands. Three of one rank have two, two and none of the four."""
OF_TWO_RANKS = ISLANDS["islands"] | {"parallel.island_ranks": 2}
STREAMED_OF_TWO = ISLANDS["islands, streamed in int4"] | {"parallel.island_ranks": 2}
COMPILED = {
    "data.micro_batches": 5, "model.context": 17, "model.n_layers": 1, "model.dropout": 0.1, "numerics.compile": True,
    "parallel.activation_checkpointing": True,
}  # fmt: skip
DRAWN = [f"0-{number}" for number in range(6)]
"""A sample of scripts/fuzz_equality, which trains as many as one likes."""


def cases_for(world_size: int) -> dict[str, dict[str, Any]]:
    strategies = [name for name in STRATEGIES if name != "hybrid" or world_size % 2 == 0]
    cases = {
        f"{feature} / {strategy}": BASE | FEATURES[feature] | STRATEGIES[strategy]
        for feature in FEATURES
        for strategy in strategies
    }
    cases |= {f"scattered once / {name}": BASE | STRATEGIES[name] | SCATTERED_ONCE for name in strategies[1:]}
    cases |= {f"{feature} / replicate": BASE | changes for feature, changes in ISLANDS.items()}
    if world_size % 2 == 0:
        cases |= {"of two ranks / islands": BASE | OF_TWO_RANKS, "of two ranks / streamed": BASE | STREAMED_OF_TWO}
    cases["muon / replicate"] = BASE | MUON
    cases["plain sums / replicate"] = BASE | PLAIN_SUMS
    if world_size < 4:
        cases |= {f"compiled / {strategy}": BASE | COMPILED | STRATEGIES[strategy] for strategy in strategies}
    return fuzz_equality.cases(DRAWN, world_size) | {
        name: {"config": str(SMOKE), "set": [f"{key}={json.dumps(value)}" for key, value in case.items()]}
        for name, case in cases.items()
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    worlds = (1, 2, 3, 4)

    def train(directory: Path) -> None:
        corpus = settings(data__source=write_corpus(directory / "corpus", 120), data__heldout_fraction=0.2)[1::2]
        for world_size in worlds:
            cases = directory / f"cases{world_size}.json"
            # The standard library is a corpus of which each case would first look at a thousand files.
            with_corpus = {n: case | {"set": [*corpus, *case["set"]]} for n, case in cases_for(world_size).items()}
            cases.write_text(json.dumps(with_corpus))
            result = directory / f"results{world_size}.json"
            torchrun(world_size, cases, result, module="tests.equality_worker", timeout=300)

    # Pytest's workers may share these tests: the first worker trains for all.
    trained = cache.built_once(shared_directory(tmp_path_factory), "equality", train, lambda phase, done, total: None)
    return {size: json.loads((trained / f"results{size}.json").read_text()) for size in worlds}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("feature", "world_size"),
    [
        *itertools.product([*FEATURES, *ISLANDS, "muon"], [1, 2, 3, 4]),
        ("compiled", 1),
        ("compiled", 2),
        ("compiled", 3),
    ],
)
def test_every_world_size_and_sharding_gives_the_bits_of_one_unsharded_process(results, world_size, feature):
    reference = results[1][f"{feature} / replicate"]
    compared = 0
    for strategy in STRATEGIES:
        other = results[world_size].get(f"{feature} / {strategy}")
        if other is not None:
            assert other == reference, f"{strategy} on {world_size} ranks"
            compared += 1
    assert compared == (1 if feature in ("muon", *ISLANDS) else 2 + (world_size % 2 == 0))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world_size", [2, 4])
def test_islands_of_two_ranks_each_give_the_bits_of_one_process_that_computes_all(results, world_size):
    found = results[world_size]
    assert found["of two ranks / islands"] == results[1]["islands / replicate"]
    assert found["of two ranks / streamed"] == results[1]["islands, streamed in int4 / replicate"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gradients_that_are_scattered_once_a_step_give_the_bits_of_those_scattered_each_micro_batch(
    results, world_size
):
    found = [result for name, result in results[world_size].items() if name.startswith("scattered once")]
    assert found == [results[1]["plain / replicate"]] * (1 + (world_size % 2 == 0))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", DRAWN)
def test_drawn_settings_give_one_result_at_every_world_size_and_sharding(results, seed):
    layouts = {
        f"{world_size} ranks, {name.removeprefix(f'{seed} ')}": result
        for world_size, by_name in results.items()
        for name, result in by_name.items()
        if name.startswith(f"{seed} ")
    }
    assert len(layouts) >= 2
    assert fuzz_equality.different(layouts) == []


@pytest.mark.timeout(600)
def test_without_exact_sums_world_sizes_disagree(results):
    """The equality above is no accident of the kernels."""
    hashes = {results[world_size]["plain sums / replicate"]["weights"] for world_size in (1, 2, 3, 4)}
    assert len(hashes) == 4


@pytest.mark.timeout(600)
def test_features_change_the_weights(results):
    """Guards the matrix itself: a switch without effect would make its row worthless."""
    weights = {feature: results[1][f"{feature} / replicate"]["weights"] for feature in [*FEATURES, *ISLANDS]}
    assert weights.pop("recomputed") == weights["dropout"], "recomputing must not change a bit"
    assert len(set(weights.values())) == len(weights)


@pytest.mark.timeout(600)
def test_the_first_step_is_redone_once_and_counted(results):
    assert results[1]["plain / replicate"]["redone"][0] == 1
    flushed = results[1]["plain / replicate"]["flushed"][0]
    assert flushed is not None
    assert 0 <= flushed < 1e-2
