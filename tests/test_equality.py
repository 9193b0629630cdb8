"""The promise everything rests on: the same bits at every world size and under every sharding.

Each world size trains all cases once on real gloo ranks; the tests hold the results against the single process.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import fuzz_equality
from tests.support import SMOKE, settings, shared_directory, torchrun, write_corpus
from trainer.data import cache

BASE = {"budget.steps": 2, "data.micro_batches": 5, "eval.max_tokens": 320, "optim.learning_rate": 0.01}
"""The first step is computed twice and the second uses its moments. Shares of five are uneven on 2, 3 and 4 ranks, of
micro-batches and of the batches of an evaluation."""
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "unclipped": {"optim.clip_norm": 0.0},
    "bf16": {"numerics.precision": "bf16"},
    "coarse numbers": {"numerics.precision": "bf16", "model.bf16_residual": True, "model.fp8_head": True},
    "loss by chunks, as Qwen3 and Pythia": {
        "model.loss_chunk_tokens": 48, "model.z_loss": 1e-4, "model.mlp": "swiglu", "model.n_heads": 4,
        "model.n_kv_heads": 2, "model.head_width": 12, "model.norm_gain": True, "model.norm_epsilon": 1e-5,
        "model.rope_scaling": "llama3", "model.rope_original_context": 1000, "model.rotated_share": 0.5,
        "model.qkv_biases": True, "model.parallel_block": True,
    },
    "dropout": {"model.dropout": 0.1},
    "recomputed": {"model.dropout": 0.1, "parallel.activation_checkpointing": True},
    "seven micro-batches of one": {"data.micro_batches": 7, "data.micro_batch_sequences": 1},
    "repeated text": {"data.unique_tokens": 2048},
    # Odd widths: rows that fill no whole vector of the optimizer's kernels.
    "everything": {
        "model.width": 36, "model.n_heads": 6, "model.n_kv_heads": 2, "model.mlp": "swiglu", "model.norm": "layernorm",
        "model.biases": True, "model.tied_embeddings": True, "model.value_embeddings": True,
        "model.bigram_buckets": 101, "model.logit_softcap": 15.0, "model.z_loss": 1e-4, "model.init": "gpt2",
        "optim.schedule": "wsd", "optim.warmup_steps": 1, "optim.mup_base_width": 18, "model.dropout": 0.1,
        "model.loss_chunk_tokens": 48, "parallel.activation_checkpointing": True,
    },
    "gpt-2": {
        "model.norm": "layernorm", "model.positions": "learned", "model.mlp": "gelu_tanh", "model.qk_norm": False,
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
Layout = tuple[int, str]
"""World size and strategy."""
LAYOUTS: list[Layout] = [
    (world_size, strategy)
    for world_size in (1, 2, 3, 4)
    for strategy in ("replicate", "fsdp", "hybrid")
    if strategy != "hybrid" or world_size % 2 == 0
]
REFERENCE: Layout = (1, "replicate")
CROSSED: tuple[list[Layout], ...] = (
    [(2, "hybrid"), (3, "fsdp"), (4, "replicate")],
    [(2, "replicate"), (3, "fsdp"), (4, "hybrid")],
    [(1, "fsdp"), (2, "fsdp"), (3, "replicate"), (4, "hybrid")],
)
"""Sets of layouts in each of which every world size and every strategy occurs."""
COMPILED = {
    "data.micro_batches": 5, "model.context": 17, "model.n_layers": 1, "model.dropout": 0.1, "numerics.compile": True,
    "parallel.activation_checkpointing": True,
}  # fmt: skip
DRAWN = [f"0-{number}" for number in range(6)]
"""A sample of scripts/fuzz_equality, which trains as many as one likes."""


def grid() -> Iterator[tuple[str, Layout, dict[str, Any]]]:
    """Every case as (feature, world size and strategy, what it sets).

    bf16, and most switches at once, meet every layout. Any other one of FEATURES meets every world size and every
    strategy, but not each of one with each of the other. What follows them meets the layouts that it is for.
    """

    def on(feature: str, changes: dict[str, Any], *layouts: Layout) -> Iterator[tuple[str, Layout, dict[str, Any]]]:
        yield from ((feature, layout, changes) for layout in layouts)

    for number, (feature, changes) in enumerate(FEATURES.items()):
        crossed = [REFERENCE, *CROSSED[number % len(CROSSED)]]
        yield from on(feature, changes, *(LAYOUTS if feature in ("everything", "bf16") else crossed))
    yield from on("scattered once", SCATTERED_ONCE, (1, "fsdp"), (3, "fsdp"), (2, "hybrid"), (4, "hybrid"))
    alone, two, three, four = ((size, "replicate") for size in (1, 2, 3, 4))
    islands = zip(ISLANDS.items(), [(alone, two, three, four), (alone, three), (alone, four)], strict=True)
    for (feature, changes), layouts in islands:
        yield from on(feature, changes, *layouts)
    yield from on("islands of two ranks", OF_TWO_RANKS, two, four)
    yield from on("islands of two ranks, streamed in int4", STREAMED_OF_TWO, two, four)
    yield from on("muon", MUON, alone, two, three, four)
    yield from on("plain sums", PLAIN_SUMS, alone, two, three, four)
    # A compilation takes as long as ten of the others train.
    yield from on("compiled", COMPILED, REFERENCE, two, (3, "fsdp"))


SAME = {
    "scattered once": "plain",
    "islands of two ranks": "islands",
    "islands of two ranks, streamed in int4": "islands, streamed in int4",
}
"""Features that must not change a bit of another one."""


def cases_for(world_size: int) -> dict[str, dict[str, Any]]:
    """The equality worker's cases at one world size, by feature or seed and strategy."""
    found = {
        f"{feature} / {strategy}": {
            "config": str(SMOKE),
            "set": [f"{key}={json.dumps(value)}" for key, value in (BASE | STRATEGIES[strategy] | changes).items()],
        }
        for feature, (size, strategy), changes in grid()
        if size == world_size
    }
    return found | {name: case for size, name, case in drawn_cases() if size == world_size}


def drawn_cases() -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Drawn configs: the reference, and every third of the other layouts that one allows, from another one on each."""
    for number, seed in enumerate(DRAWN):
        allowed = [(size, *case) for size in fuzz_equality.WORLDS for case in fuzz_equality.cases([seed], size).items()]
        reference, *others = allowed
        yield from (reference, *others[number % min(3, len(others)) :: 3])


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
    ("feature", "world_size", "strategy"), [(case[0], *case[1]) for case in grid() if case[0] != "plain sums"]
)
def test_every_world_size_and_sharding_gives_the_bits_of_one_unsharded_process(results, feature, world_size, strategy):
    reference = results[1][f"{SAME.get(feature, feature)} / replicate"]
    assert results[world_size][f"{feature} / {strategy}"] == reference


def test_bf16_and_many_switches_meet_every_layout_and_each_switch_every_world_size_and_every_strategy():
    met: dict[str, set[Layout]] = {}
    for feature, layout, _ in grid():
        met.setdefault(feature, set()).add(layout)
    assert met["everything"] == met["bf16"] == set(LAYOUTS)
    for feature in FEATURES:
        assert {size for size, _ in met[feature]} == {1, 2, 3, 4}
        assert {strategy for _, strategy in met[feature]} == set(STRATEGIES)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", DRAWN)
def test_drawn_settings_give_one_result_at_every_world_size_and_sharding(results, seed):
    layouts = {
        f"{world_size} ranks, {name.removeprefix(f'{seed} ')}": result
        for world_size, by_name in results.items()
        for name, result in by_name.items()
        if name.startswith(f"{seed} ")
    }
    assert len(layouts) >= 2 and "1 ranks, replicate" in layouts
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
