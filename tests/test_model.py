"""The model's promises, each against a formula written out or an independent count."""

import hashlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

from tests.support import ROOT
from trainer import config, costs, model, sample
from trainer.errors import TokenizerError

VOCAB = 64
SMALL: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "width": 32, "context": 16}
SWITCHES: dict[str, tuple[Any, ...]] = {
    "norm": ("rmsnorm", "layernorm"),
    "positions": ("rope", "learned"),
    "rope_scaling": ("none", "linear", "llama3"),
    "rotated_share": (1.0, 0.5),
    "norm_gain": (False, True),
    "norm_epsilon": (0.0, 1e-4),
    "mlp": ("relu2", "gelu", "gelu_tanh", "swiglu"),
    "head_width": (0, 6),
    "n_kv_heads": (0, 1, 2),
    "qk_norm": (True, False),
    "tied_embeddings": (False, True),
    "biases": (False, True),
    "qkv_biases": (False, True),
    "parallel_block": (False, True),
    "logit_softcap": (0.0, 5.0),
    "z_loss": (0.0, 1e-2),
    "dropout": (0.0, 0.3),
    "value_embeddings": (False, True),
    "bigram_buckets": (0, 37),
    "init": ("zero_proj", "gpt2"),
}
SINGLE = [(name, value) for name, values in SWITCHES.items() for value in values[1:]]
switch_sets = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SWITCHES.items()})


def build(seed: int = 0, vocab: int = VOCAB, **switches: Any) -> model.GPT:
    gpt = model.construct(config.Model(**(SMALL | switches)), vocab)
    assert isinstance(gpt, model.GPT)
    model.initialise(gpt, gpt.settings, seed)
    return gpt


def awake(gpt: model.GPT) -> model.GPT:
    """Moves every parameter away from its initial value, so that no zero hides a path."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return gpt


def tokens(*shape: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def gradients(gpt: model.GPT, seed: int = 0) -> dict[str, Tensor]:
    gpt.zero_grad(set_to_none=True)
    gpt(tokens(2, 16), tokens(2, 16, seed=1)).objective.backward()
    return {name: p.grad.clone() for name, p in gpt.named_parameters() if p.grad is not None}


@settings(max_examples=30, deadline=None)
@given(switch_sets, st.integers(1, 15))
def test_a_future_token_changes_no_earlier_logit(switches: dict[str, Any], position: int) -> None:
    gpt = awake(build(**switches)).eval()
    inputs_BT = tokens(1, 16)
    changed_BT = inputs_BT.clone()
    changed_BT[0, position] = (changed_BT[0, position] + 1) % VOCAB
    before_BTV, after_BTV = gpt(inputs_BT), gpt(changed_BT)
    assert before_BTV.dtype == torch.float32
    assert before_BTV.shape == (1, 16, VOCAB)
    torch.testing.assert_close(before_BTV[:, :position], after_BTV[:, :position], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before_BTV[:, position:], after_BTV[:, position:], rtol=1e-3, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(switch_sets)
def test_no_parameter_is_dead(switches: dict[str, Any]) -> None:
    gpt = build(**switches)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    torch.manual_seed(0)
    alive: set[str] = set()
    for _ in range(3):  # zero projections open in the first step, what lies behind them moves in the next
        found = gradients(gpt)
        alive |= {name for name, gradient in found.items() if gradient.any()}
        optimizer.step()
    assert alive == {name for name, _ in gpt.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
@settings(max_examples=15, deadline=None)
@given(switch_sets)
def test_the_same_inputs_give_the_same_bits_also_where_blocks_are_recomputed(
    recompute: bool, switches: dict[str, Any]
) -> None:
    gpt = awake(build(**switches))
    torch.manual_seed(3)
    first = gradients(gpt)
    for block in model.blocks_of(gpt):
        block.recompute = recompute  # pyright: ignore[reportArgumentType]
    torch.manual_seed(3)
    second = gradients(gpt)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("switch", "value"), SINGLE)
def test_every_switch_changes_the_objective(switch: str, value: Any) -> None:
    torch.manual_seed(0)
    base, changed = (awake(build(**s)) for s in ({}, {switch: value}))
    inputs_BT, targets_BT = tokens(2, 16), tokens(2, 16, seed=1)
    if switch == "init":
        base, changed = build(), build(init=value)
        assert base(inputs_BT, targets_BT).objective != changed(inputs_BT, targets_BT).objective
        return
    in_base = {name for name, _ in base.named_parameters()}
    with torch.no_grad():  # tensors that both have are equal, so that only the switch differs
        for name, parameter in changed.named_parameters():
            if name in in_base and base.get_parameter(name).shape == parameter.shape:
                parameter.copy_(base.get_parameter(name))
    assert base(inputs_BT, targets_BT).objective != changed(inputs_BT, targets_BT).objective


def test_switches_have_the_shapes_they_say() -> None:
    shapes = {name: tuple(p.shape) for name, p in build(n_kv_heads=2, mlp="swiglu", biases=True).named_parameters()}
    assert shapes["blocks.0.attention.qkv.weight"] == (32 + 2 * 16, 32)
    assert shapes["blocks.0.mlp.up.weight"] == (256, 32)
    assert shapes["blocks.0.mlp.out.bias"] == (32,)
    extras = dict(build(value_embeddings=True, bigram_buckets=37, n_kv_heads=1).named_parameters())
    assert extras["embed_bigrams.weight"].shape == (37, 32)
    assert extras["blocks.1.attention.embed_values.table.weight"].shape == (VOCAB, 8)
    assert extras["blocks.1.attention.embed_values.gate"].shape == (1,)
    assert not any(name.startswith("blocks.0.attention.embed_values") for name in extras)


def test_a_tied_head_is_the_embedding_table() -> None:
    tied, untied = build(tied_embeddings=True), build()
    assert costs.parameter_count(untied).total - costs.parameter_count(tied).total == VOCAB * 32
    assert "head.weight" not in dict(tied.named_parameters())
    seen: list[Any] = []
    tied.final_norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    logits_BTV = tied(tokens(1, 16))
    torch.testing.assert_close(logits_BTV, seen[0] @ tied.embed.weight.T)


def test_zero_projections_start_at_the_uniform_distribution() -> None:
    found = build(vocab=320)(tokens(2, 16), tokens(2, 16, seed=1))
    assert found.cross_entropy.item() == pytest.approx(math.log(320), abs=1e-6)


def test_objective_is_cross_entropy_plus_z_loss_of_capped_logits() -> None:
    plain, capped = awake(build()), awake(build(logit_softcap=2.0, z_loss=0.01))
    inputs_BT, targets_BT = tokens(2, 16), tokens(2, 16, seed=1)
    logits_BTV = (2.0 * torch.tanh(plain(inputs_BT) / 2.0)).double()
    torch.testing.assert_close(capped(inputs_BT).double(), logits_BTV, rtol=1e-5, atol=1e-6)
    log_z_BT = logits_BTV.exp().sum(-1).log()
    cross_entropy = (log_z_BT - logits_BTV.gather(-1, targets_BT[..., None])[..., 0]).mean()
    found = capped(inputs_BT, targets_BT)
    assert found.cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert found.objective.item() == pytest.approx((cross_entropy + 0.01 * log_z_BT.square().mean()).item(), rel=1e-5)
    assert found.objective.dtype == found.cross_entropy.dtype == torch.float32


def test_losses_are_float32_under_autocast_and_near_the_full_precision_ones() -> None:
    gpt = awake(build(value_embeddings=True, n_kv_heads=2))
    inputs_BT, targets_BT = tokens(2, 16), tokens(2, 16, seed=1)
    exact = gpt(inputs_BT, targets_BT)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gpt(inputs_BT, targets_BT)
        assert gpt(inputs_BT).dtype == torch.float32
    assert rough.objective.dtype == rough.cross_entropy.dtype == torch.float32
    assert rough.cross_entropy.item() == pytest.approx(exact.cross_entropy.item(), rel=0.02)


def test_rope_depends_on_distance_alone() -> None:
    rotation_TP2 = model._rotations(config.Model(**SMALL))
    q_C, k_C = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    q_TC, k_TC = (model._rotate(x_C.expand(1, 16, 1, 8), rotation_TP2)[0, :, 0] for x_C in (q_C, k_C))
    scores_TT = q_TC @ k_TC.T
    for distance in range(8):
        along = scores_TT.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores_TT[0, 0], q_C @ k_C)
    assert scores_TT.diagonal(-3)[0] != scores_TT.diagonal(-4)[0]


@pytest.mark.parametrize("switches", [{}, {"norm": "layernorm", "positions": "learned", "qk_norm": False}])
def test_without_positions_attention_would_not_see_order_and_with_them_it_does(switches: dict[str, Any]) -> None:
    gpt = awake(build(**switches)).eval()
    straight_BT = tokens(1, 16)
    swapped_BT = straight_BT.clone()
    swapped_BT[0, :2] = straight_BT[0, :2].flip(0)
    assert not torch.allclose(gpt(straight_BT)[0, -1], gpt(swapped_BT)[0, -1], atol=1e-4)


@pytest.mark.parametrize("function", ["rms", "relu2"])
def test_hand_written_gradients_match_finite_differences(function: str) -> None:
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    if function == "relu2":
        assert torch.autograd.gradcheck(model._SquaredReLU.apply, (x,))
        torch.testing.assert_close(model._SquaredReLU.apply(x), F.relu(x).square())
        return
    y = model._RMSNormalise.apply(x)
    torch.testing.assert_close(y, F.rms_norm(x, (6,), eps=model.NORM_EPSILON), rtol=1e-6, atol=1e-6)
    (ours,) = torch.autograd.grad(y.pow(3).sum(), x)
    (theirs,) = torch.autograd.grad(F.rms_norm(x, (6,), eps=model.NORM_EPSILON).pow(3).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    first = build(seed=7, n_layers=2)
    torch.manual_seed(99)
    longer = build(seed=7, n_layers=3, value_embeddings=True, bigram_buckets=37)
    shared = dict(longer.named_parameters())
    assert all(torch.equal(p, shared[name]) for name, p in first.named_parameters())
    other = dict(build(seed=8).named_parameters())
    assert not torch.equal(first.embed.weight, other["embed.weight"])
    qkv = [first.get_parameter(f"blocks.{layer}.attention.qkv.weight") for layer in (0, 1)]
    assert not torch.equal(qkv[0], qkv[1])


def test_another_draw_of_the_initial_weights_is_another_and_the_first_is_what_it_always_was() -> None:
    table = build(seed=7).embed.weight
    key = hashlib.sha256(b"7/embed.weight").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))
    assert torch.equal(table, torch.randn(table.shape, generator=generator) * model.EMBEDDING_STD)
    draws = [build(seed=7, init_draw=draw).embed.weight for draw in (0, 1, 2)]
    assert torch.equal(draws[0], table)
    assert not torch.equal(draws[1], draws[0])
    assert not torch.equal(draws[1], draws[2])


def test_a_draw_is_part_of_the_fingerprint_and_the_first_leaves_it_as_it_was() -> None:
    first, second = (config.parse({"model": {"init_draw": draw}}) for draw in (0, 1))
    assert "model.init_draw" not in config.mathematics(first)
    assert config.fingerprint(first) != config.fingerprint(second)


def test_a_model_built_on_the_meta_device_ends_up_the_same() -> None:
    direct = build(seed=7)
    gpt = model.construct(config.Model(**SMALL), VOCAB, "meta")
    assert isinstance(gpt, model.GPT)
    gpt.to_empty(device="cpu")
    gpt.reset_buffers()
    model.initialise(gpt, gpt.settings, 7)
    assert torch.equal(awake(gpt)(tokens(2, 16)), awake(direct)(tokens(2, 16)))


def test_gpt2_initialisation_has_the_published_deviations() -> None:
    parameters = dict(build(init="gpt2", width=128, biases=True).named_parameters())
    assert parameters["blocks.0.mlp.up.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert parameters["blocks.0.mlp.out.weight"].std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
    assert parameters["embed.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not parameters["blocks.1.mlp.up.bias"].any()


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_sharded_model_initialises_and_computes_like_the_plain_one(recompute: bool, tied: bool) -> None:
    switches: dict[str, Any] = {"tied_embeddings": tied, "value_embeddings": True, "bigram_buckets": 37}
    plain, sharded = build(**switches), model.construct(config.Model(**(SMALL | switches)), VOCAB)
    assert isinstance(sharded, model.GPT)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks_of(sharded):
        block.recompute = recompute  # pyright: ignore[reportArgumentType]
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    model.initialise(sharded, sharded.settings, 0)
    found = gradients(sharded)
    assert found.keys() == dict(plain.named_parameters()).keys()
    for name, expected in gradients(plain).items():
        assert torch.equal(found[name].full_tensor(), expected), name  # pyright: ignore[reportAttributeAccessIssue]


# Dynamo itself warns while it traces, and hides that in a way that an "error" filter overtakes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
@pytest.mark.parametrize("switches", [{}, {"value_embeddings": True, "n_kv_heads": 2, "mlp": "swiglu", "dropout": 0.0}])
def test_blocks_compile_without_graph_breaks_and_agree(switches: dict[str, Any]) -> None:
    gpt = awake(build(**switches))
    eager = gradients(gpt)
    for block in model.blocks_of(gpt):
        block.compile(fullgraph=True, backend="aot_eager")
    compiled = gradients(gpt)
    for name, expected in eager.items():
        torch.testing.assert_close(compiled[name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
def test_every_shape_gets_a_compiled_block_of_its_own_however_many_there_are(monkeypatch) -> None:
    """One for several shapes, or none for the ninth, would make bits depend on what a rank was given before."""
    torch._dynamo.reset()
    graphs: list[Any] = []
    compile_module = nn.Module.compile
    backend = lambda graph, _inputs: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(nn.Module, "compile", lambda block, **how: compile_module(block, backend=backend, **how))
    gpt = build(n_layers=1).requires_grad_(False)
    with torch._dynamo.config.patch(
        recompile_limit=8, accumulated_recompile_limit=8, fail_on_recompile_limit_hit=False
    ):
        model.compile_blocks(gpt)
        for length in range(2, 13):
            gpt(tokens(1, length))
    assert len(graphs) == 11


@pytest.mark.parametrize(
    "switches",
    [{}, {"mlp": "swiglu", "n_kv_heads": 2, "head_width": 12}, {"mlp": "gelu", "tied_embeddings": True}],
)
def test_flops_agree_with_what_torch_counts(switches: dict[str, Any]) -> None:
    gpt = model.construct(config.Model(**(SMALL | switches)), VOCAB, "meta")
    assert isinstance(gpt, model.GPT)
    inputs_BT = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    counter = FlopCounterMode(display=False)
    with counter:
        gpt(inputs_BT)
    predicted_flops = costs.flops_per_token(gpt.settings, VOCAB) * inputs_BT.numel() / 3
    assert predicted_flops == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_padding_of_the_vocabulary() -> None:
    cases = [(65, 0), (64, 0), (65, 65), (65, 100)]
    assert [costs.padded_vocab(*case) for case in cases] == [128, 64, 65, 100]
    with pytest.raises(TokenizerError, match=r"model\.vocab_size = 64 is smaller than the tokenizer's 65"):
        costs.padded_vocab(65, 64)


def test_parameter_count_of_gpt2_small_is_the_known_one() -> None:
    gpt2 = config.Model(
        n_layers=12, n_heads=12, width=768, context=1024, norm="layernorm", positions="learned", mlp="gelu",
        qk_norm=False, tied_embeddings=True, biases=True, init="gpt2",
    )  # fmt: skip
    counts = costs.parameter_count(model.construct(gpt2, 50257, "meta"))
    assert counts.total == 124_439_808
    assert counts.non_embedding == 124_439_808 - (50257 + 1024) * 768


def settings_for(**sections: dict[str, Any]) -> config.Config:
    return config.parse({"model": SMALL, "data": {"micro_batch_sequences": 2}} | sections)


@pytest.mark.parametrize(("sequences", "measured"), [(16, 8.69), (64, 27.97)])
def test_the_memory_that_is_told_for_a_gpu_is_what_one_took(sequences: int, measured: float):
    """GiB of gpt2_124m's compiled steps on an H200 (docs/gpu)."""
    wanted = [f"data.micro_batch_sequences={sequences}", "data.micro_batches=4"]
    told = costs.memory_per_rank(config.load(ROOT / "configs" / "gpt2_124m.toml", wanted), 50_304, 1)["total"]
    assert told / 2**30 == pytest.approx(measured, rel=0.05)


def test_memory_is_divided_by_sharding_and_activations_by_recomputing() -> None:
    plain = costs.memory_per_rank(settings_for(), VOCAB, 2)
    assert plain["master_weights"] == 4 * costs.parameter_count(build()).total
    assert plain["optimizer"] == 2 * plain["master_weights"]
    sharded = costs.memory_per_rank(settings_for(parallel={"strategy": "fsdp"}), VOCAB, 2)
    assert sharded["master_weights"] * 2 == plain["master_weights"]
    assert 0 == plain["gathered"] < sharded["gathered"] <= plain["master_weights"]
    recomputed = costs.memory_per_rank(settings_for(parallel={"activation_checkpointing": True}), VOCAB, 2)
    assert recomputed["activations"] < plain["activations"] / 2
    muon = costs.memory_per_rank(settings_for(optim={"optimizer": "muon"}), VOCAB, 2)
    assert muon["optimizer"] < plain["optimizer"]
    for parts in (plain, sharded, recomputed, muon):
        assert parts["total"] == sum(parts.values()) - parts["total"]


@pytest.mark.parametrize(
    ("device", "quadratic", "dropout"), [("cuda", False, 0.0), ("cuda", False, 0.1), ("cpu", True, 0.0)]
)
def test_memory_is_told_of_the_operators_that_the_device_uses(device: str, quadratic: bool, dropout: float) -> None:
    """In bf16 a CPU keeps matrices of T × T for attention's backward pass; a GPU keeps none."""

    def activations(context: int) -> int:
        sizes = {"model": SMALL | {"context": context, "dropout": dropout}, "data": {"micro_batch_sequences": 1}}
        config_of = config.parse(sizes | {"numerics": {"precision": "bf16"}, "parallel": {"device": device}})
        return costs.memory_per_rank(config_of, VOCAB, 1)["activations"]

    linear, twice = 2 * activations(512), activations(1024)
    matrices = SMALL["n_layers"] * SMALL["n_heads"] * 1024**2 * 2  # bf16 weights alone
    assert (twice - linear > matrices / 2) == quadratic
    if not quadratic:
        assert twice == pytest.approx(linear, rel=0.05)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7, 32, 100])
def test_a_loss_by_chunks_is_the_loss_with_its_gradients(chunk: int, precision: torch.dtype) -> None:
    switches = {"logit_softcap": 5.0, "z_loss": 1e-2, "tied_embeddings": True}
    whole, chunked = awake(build(**switches)), build(**switches, loss_chunk_tokens=chunk)
    chunked.load_state_dict(whole.state_dict())
    found = []
    for gpt in (whole, chunked):
        with torch.autocast("cpu", precision, precision == torch.bfloat16):
            losses = gpt(tokens(2, 16), tokens(2, 16, seed=1))
        losses.objective.backward()
        found.append((losses, {name: p.grad for name, p in gpt.named_parameters()}))
    tolerance = 1e-5 if precision == torch.float32 else 2e-2
    torch.testing.assert_close(found[1][0], found[0][0], rtol=tolerance, atol=tolerance)
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).norm() <= tolerance * gradient.norm(), name
    assert torch.equal(chunked(tokens(1, 16)), whole(tokens(1, 16))), "logits that are asked for are all there"


def test_a_loss_by_chunks_never_keeps_the_logits_of_all_tokens() -> None:
    def activations(**switches: int) -> int:
        sizes = {"model": SMALL | {"context": 256} | switches, "data": {"micro_batch_sequences": 4}}
        return costs.memory_per_rank(config.parse(sizes), 8192, 1)["activations"]

    logits = 4 * 256 * 8192 * 4
    assert activations() - activations(loss_chunk_tokens=128) >= logits


def test_whole_gradients_are_counted_where_they_are_scattered_once_a_step() -> None:
    fsdp = {"strategy": "fsdp"}
    each = costs.memory_per_rank(settings_for(parallel=fsdp), VOCAB, 2)["gradients"]
    once = costs.memory_per_rank(settings_for(parallel=fsdp | {"scatter_gradients": "step"}), VOCAB, 2)["gradients"]
    assert once == each + 4 * costs.parameter_count(build()).total


# Sampling


@settings(max_examples=40, deadline=None)
@given(switch_sets)
def test_a_model_that_keeps_keys_and_values_takes_the_same_greedy_tokens_up_to_and_beyond_its_context(switches):
    gpt = awake(build(**switches)).eval()
    greedy, generator = sample.Drawing(temperature=0), torch.Generator()
    texts = []
    for reader in (sample.Reader(gpt, SMALL["context"]), sample.CachedReader(gpt)):
        ids = [5, 9, 2]
        for _ in range(20):
            ids.append(sample.draw(reader.next_logits(ids), greedy, generator))
        texts.append(ids)
    assert texts[0] == texts[1]


def test_cached_logits_are_those_of_the_whole_text_up_to_rounding():
    gpt = awake(build(value_embeddings=True, bigram_buckets=37, n_kv_heads=2)).eval()
    ids = tokens(16).tolist()
    reader, whole = sample.CachedReader(gpt), gpt(torch.tensor([ids]))[0]
    for end in (3, *range(4, 17)):
        torch.testing.assert_close(reader.next_logits(ids[:end]), whole[end - 1])


def test_tokens_are_drawn_from_the_fewest_likeliest_that_reach_the_share():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    drawn: dict[float, set[int]] = {}
    for share in (1e-9, 0.49, 0.51, 0.74, 0.76, 1.0):
        generator = torch.Generator().manual_seed(0)
        drawn[share] = {sample.draw(logits, sample.Drawing(1.0, 0, share), generator) for _ in range(300)}
    assert drawn == {1e-9: {1}, 0.49: {1}, 0.51: {1, 3}, 0.74: {1, 3}, 0.76: {1, 2, 3}, 1.0: {0, 1, 2, 3}}
    narrowed = {sample.draw(logits, sample.Drawing(1.0, 2, 0.99), torch.Generator().manual_seed(n)) for n in range(99)}
    assert narrowed == {1, 3}
