"""Optimizers: bits that do not depend on the shard, groups, rates as functions of the step."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Muon, Optimizer

from trainer import config, model, optim
from trainer.errors import ConfigError

SMALL: dict[str, Any] = {"n_layers": 2, "n_heads": 2, "width": 32, "context": 16}
VOCAB = 64


def build_model(**switches: Any) -> model.GPT:
    gpt = model.construct(config.Model(**(SMALL | switches)), VOCAB)
    assert isinstance(gpt, model.GPT)
    model.initialise(gpt, gpt.settings, 0)
    return gpt


def build(gpt: nn.Module, settings: config.Optim) -> list[Optimizer]:
    return optim.build(gpt, settings, SMALL["width"])


def train(gpt: model.GPT, optimizers: list[Optimizer], steps: int = 3) -> list[Tensor]:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        tokens_BT = torch.randint(VOCAB, (2, 17), generator=generator)
        gpt(tokens_BT[:, :-1], tokens_BT[:, 1:]).objective.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in gpt.parameters()]


class Holder(nn.Module):
    """A model of given tensors, for `build`."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ParameterList([nn.Parameter(t, requires_grad=True) for t in tensors])


def unaligned(tensor: Tensor, offset: int) -> Tensor:
    """The same values as a view into a flat buffer, `offset` elements from its start."""
    buffer = torch.full((tensor.numel() + offset + 3,), math.nan)
    return buffer[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)


@st.composite
def split_tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int], list[int]]:
    """A shape, cuts along its rows, and an offset for each part's buffer."""
    rows = draw(st.integers(1, 70))
    columns = draw(st.sampled_from([None, 1, 5, 15, 16, 17, 32, 36, 48, 100]))
    cuts = sorted(draw(st.sets(st.integers(1, rows), max_size=5)) | {0, rows})
    offsets = draw(st.lists(st.integers(0, 40), min_size=len(cuts) - 1, max_size=len(cuts) - 1))
    return (rows,) if columns is None else (rows, columns), cuts, offsets


@settings(max_examples=150, deadline=None)
@given(split_tensors(), st.integers(0, 2**31), st.sampled_from([0.0, 0.1]), st.sampled_from([0.9, 0.95, 0.999]))
def test_an_update_does_not_depend_on_the_shard_an_element_lies_in(
    split: tuple[tuple[int, ...], list[int], list[int]], seed: int, decay: float, beta2: float
) -> None:
    shape, cuts, offsets = split
    parts = [slice(*pair) for pair in itertools.pairwise(cuts)]
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator)
    whole = Holder([start.clone()])
    pieces = Holder([unaligned(start[part], offset) for part, offset in zip(parts, offsets, strict=True)])
    settings_ = config.Optim(weight_decay=decay, beta2=beta2, learning_rate=3e-3)
    (from_whole,), (from_pieces,) = (build(holder, settings_) for holder in (whole, pieces))
    for step in range(4):
        magnitude = 10.0 ** torch.randint(-8, 4, (), generator=generator).item()
        gradient = torch.randn(shape, generator=generator) * magnitude
        gradient[torch.rand(shape, generator=generator) < 0.2] = 0.0
        whole.blocks[0].grad = gradient
        for piece, part, offset in zip(pieces.blocks, parts, offsets, strict=True):
            piece.grad = unaligned(gradient[part], (offset * 7 + step) % 41)
        from_whole.step()
        from_pieces.step()
    assert torch.equal(whole.blocks[0], torch.cat(list(pieces.blocks)))
    for key in ("exp_avg", "exp_avg_sq"):
        joined = torch.cat([from_pieces.state[piece][key] for piece in pieces.blocks])
        assert torch.equal(from_whole.state[whole.blocks[0]][key], joined), key


def test_only_tensors_without_a_scalar_tail_are_fused() -> None:
    assert [optim.is_fused(shape) for shape in [(10, 32), (3, 16)]] == [True] * 2
    assert [optim.is_fused(shape) for shape in [(10, 36), (64,), (1,)]] == [False] * 3
    (adamw,) = build(build_model(norm="layernorm", biases=True, width=36), config.Optim())
    for group in adamw.param_groups:
        assert group["fused"] != group["foreach"]
        assert all(optim.is_fused(p.shape) == group["fused"] for p in group["params"])


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    gpt = build_model(norm="layernorm", positions="learned", biases=True, value_embeddings=True, bigram_buckets=37)
    names = {id(p): name for name, p in gpt.named_parameters()}
    (adamw,) = build(gpt, config.Optim(weight_decay=0.3))
    grouped = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    decaying = {names[id(p)] for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    matrices = ("qkv.weight", "attention.out.weight", "up.weight", "mlp.out.weight", "head.weight")
    assert decaying == {name for name in names.values() if name.endswith(matrices)}
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.0, 0.3}


def test_a_tied_table_does_not_decay() -> None:
    groups = optim.group_of_parameters(build_model(tied_embeddings=True))
    assert groups["embed.weight"] == "embedding"
    assert "head" not in groups.values()


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    gpt = build_model(value_embeddings=True, norm="layernorm")
    adamw, muon = build(gpt, config.Optim(optimizer="muon", muon_learning_rate=0.03, muon_momentum=0.9))
    names = {id(p): name for name, p in gpt.named_parameters()}
    assert isinstance(adamw, AdamW)
    assert isinstance(muon, Muon)
    in_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    in_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert in_muon == {n for n in names.values() if n.endswith(("qkv.weight", "up.weight", "out.weight"))}
    assert in_muon | in_adamw == set(names.values())
    assert not in_muon & in_adamw
    assert muon.param_groups[0]["momentum"] == 0.9
    assert muon.param_groups[0]["peak_learning_rate"] == 0.03


def test_mup_divides_the_rate_of_matrices_with_a_wide_input() -> None:
    gpt = build_model(norm="layernorm")
    (adamw,) = build(gpt, config.Optim(learning_rate=1e-2, mup_base_width=8))
    names = {id(p): name for name, p in gpt.named_parameters()}
    rates = {names[id(p)]: group["peak_learning_rate"] for group in adamw.param_groups for p in group["params"]}
    assert rates["blocks.0.mlp.up.weight"] == rates["head.weight"] == 1e-2 * 8 / 32
    assert rates["embed.weight"] == rates["final_norm.weight"] == 1e-2


def test_weight_decay_is_decoupled_from_the_gradient() -> None:
    holder = Holder([torch.full((4, 16), 2.0)])
    (adamw,) = build(holder, config.Optim(learning_rate=0.1, weight_decay=0.5))
    holder.blocks[0].grad = torch.zeros(4, 16)
    adamw.step()
    torch.testing.assert_close(holder.blocks[0].detach(), torch.full((4, 16), 2.0 * (1 - 0.1 * 0.5)))


@pytest.mark.parametrize(("kind", "power"), [("rate", 1), ("corrected", 2), ("constant", 0)])
def test_decay_follows_its_schedule_while_the_rate_falls(kind: Any, power: int) -> None:
    settings_ = config.Optim(
        learning_rate=0.1, weight_decay=0.5, schedule="linear", final_fraction=0.25, weight_decay_schedule=kind
    )
    holder, left = Holder([torch.ones(16, 16)]), 1.0
    (adamw,) = build(holder, settings_)
    for step, rate in enumerate((1.0, 0.625, 0.25)):
        optim.set_learning_rates([adamw], step, settings_, 3)
        holder.blocks[0].grad = torch.zeros(16, 16)
        adamw.step()
        left *= 1 - 0.1 * 0.5 * rate**power
        torch.testing.assert_close(holder.blocks[0].detach(), torch.full((16, 16), left))


@pytest.mark.parametrize("shape", [(4, 16), (4, 5)])
def test_adamw_follows_the_published_update(shape: tuple[int, int]) -> None:
    holder = Holder([torch.randn(shape, generator=torch.Generator().manual_seed(0))])
    settings_ = config.Optim(learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9)
    (adamw,) = build(holder, settings_)
    weight, m, v = holder.blocks[0].detach().double().clone(), torch.zeros(shape), torch.zeros(shape)
    for t in range(1, 4):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(t))
        holder.blocks[0].grad = gradient
        adamw.step()
        m, v = 0.8 * m + 0.2 * gradient.double(), 0.9 * v + 0.1 * gradient.double() ** 2
        weight -= 0.01 * (0.1 * weight + (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8))
    torch.testing.assert_close(holder.blocks[0].detach().double(), weight, rtol=1e-5, atol=1e-6)


def factors(steps: int, **settings_: Any) -> list[float]:
    return [optim.learning_rate_factor(step, config.Optim(**settings_), steps) for step in range(steps)]


def test_warmup_rises_from_one_step_to_the_peak() -> None:
    assert factors(10, schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0] + [1.0] * 6


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_decays_start_at_the_peak_and_end_in_the_final_fraction(schedule: str, warmup: int) -> None:
    found = factors(21, schedule=schedule, warmup_steps=warmup, final_fraction=0.2)
    assert found[max(warmup - 1, 0)] == max(found) == 1.0
    assert found[-1] == pytest.approx(0.2, abs=1e-12)
    after = found[max(warmup - 1, 0) :]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize(
    ("steps", "settings_"),
    [
        (2, {"schedule": "wsd", "decay_fraction": 0.2}),
        (100, {"schedule": "wsd", "decay_fraction": 0.004}),
        (9, {"schedule": "wsd", "decay_fraction": 0.01, "warmup_steps": 8}),
        (5, {"schedule": "wsd", "decay_fraction": 1e-300}),
        (9, {"schedule": "cosine", "warmup_steps": 8}),
    ],
)
def test_the_shortest_decay_has_one_step_and_reaches_the_final_fraction(steps: int, settings_: dict[str, Any]) -> None:
    found = factors(steps, final_fraction=0.25, **settings_)
    assert found[-2:] == [1.0, pytest.approx(0.25)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_warmup_that_leaves_no_step_to_decay_in_is_refused(schedule: str) -> None:
    def parse(name: str, steps: int) -> config.Config:
        return config.parse({"budget": {"steps": steps}, "optim": {"schedule": name, "warmup_steps": 8}})

    with pytest.raises(ConfigError, match=r"warmup_steps = 8 leaves .* no step to decay in"):
        parse(schedule, 8)
    assert parse(schedule, 9).optim.warmup_steps == parse("constant", 8).optim.warmup_steps == 8
    config.parse({"budget": {"steps": 1}, "optim": {"schedule": schedule, "warmup_steps": 1}})  # a peak and no more


def test_schedules_have_their_published_shape() -> None:
    assert factors(21, schedule="linear", final_fraction=0.0)[10] == pytest.approx(0.5)
    assert factors(21, schedule="linear", final_fraction=0.0)[15] == pytest.approx(0.25)
    assert factors(21, schedule="cosine", final_fraction=0.1)[10] == pytest.approx(0.55)
    assert factors(21, schedule="cosine", final_fraction=0.0)[5] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    wsd = factors(20, schedule="wsd", decay_fraction=0.2, final_fraction=0.0)
    assert wsd[:16] == [1.0] * 16
    assert wsd[16:] == pytest.approx([0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5), (2, 0)])
def test_shortest_schedules_are_defined(schedule: str, steps: int, warmup: int) -> None:
    found = factors(steps, schedule=schedule, warmup_steps=warmup, decay_fraction=1.0)
    assert all(0 < factor <= 1 for factor in found)


def test_steps_outside_the_schedule_are_refused() -> None:
    for step in (-1, 10):
        with pytest.raises(ValueError, match=f"step = {step} is outside a schedule of 10 steps"):
            optim.learning_rate_factor(step, config.Optim(), 10)


def test_rates_are_set_from_the_step_alone() -> None:
    settings_ = config.Optim(
        optimizer="muon", learning_rate=4e-3, muon_learning_rate=0.02, mup_base_width=8, schedule="linear"
    )
    optimizers = build(build_model(), settings_)
    for step in (7, 3, 3):
        factor = optim.learning_rate_factor(step, settings_, 10)
        assert optim.set_learning_rates(optimizers, step, settings_, 10) == 4e-3 * factor
        rates = {group["name"]: group["lr"] for o in optimizers for group in o.param_groups}
        assert rates["hidden/muon"] == 0.02 * factor
        assert rates["head/fused"] == 1e-3 * factor


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("width", [32, 36])
def test_state_made_before_the_first_step_is_what_the_optimizer_would_make(kind: Any, width: int) -> None:
    switches: dict[str, Any] = {"width": width, "norm": "layernorm", "value_embeddings": True}
    early, lazy = build_model(**switches), build_model(**switches)
    settings_ = config.Optim(optimizer=kind)
    early_optimizers, lazy_optimizers = build(early, settings_), build(lazy, settings_)
    optim.materialise_state(early_optimizers)
    assert all(len(o.state) == sum(len(g["params"]) for g in o.param_groups) for o in early_optimizers)
    assert not any(value.any() for o in early_optimizers for state in o.state.values() for value in state.values())
    trained = train(early, early_optimizers), train(lazy, lazy_optimizers)
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))
    for mine, theirs in zip(early_optimizers, lazy_optimizers, strict=True):
        a, b = mine.state_dict()["state"], theirs.state_dict()["state"]
        assert a.keys() == b.keys()
        for index in a:
            assert list(a[index]) == list(b[index])
            for key, value in a[index].items():
                other = b[index][key]
                assert (value.dtype, value.device, value.stride()) == (other.dtype, other.device, other.stride())
                assert torch.equal(value, other)


def test_materialising_twice_keeps_moments() -> None:
    gpt = build_model()
    optimizers = build(gpt, config.Optim())
    train(gpt, optimizers, steps=1)
    before = {id(p): state["exp_avg"].clone() for p, state in optimizers[0].state.items()}
    optim.materialise_state(optimizers)
    assert all(torch.equal(before[id(p)], state["exp_avg"]) for p, state in optimizers[0].state.items())


@pytest.mark.usefixtures("one_rank_group")
def test_sharded_parameters_get_sharded_state_and_the_same_bits() -> None:
    switches: dict[str, Any] = {"norm": "layernorm", "value_embeddings": True}
    plain, sharded = build_model(**switches), build_model(**switches)
    mesh = init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    settings_ = config.Optim(mup_base_width=8)
    optimizers = build(sharded, settings_)
    optim.materialise_state(optimizers)
    for parameter, state in optimizers[0].state.items():
        assert type(state["exp_avg"]) is type(parameter.data)
        assert state["step"].shape == ()
    found = train(sharded, optimizers)
    expected = train(plain, build(plain, settings_))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.full_tensor(), b)  # pyright: ignore[reportAttributeAccessIssue]
