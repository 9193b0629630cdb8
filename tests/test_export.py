"""Promises about exports: transformers opens them and computes the same."""

import contextlib
import itertools
import json
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.support import SMOKE, settings, trainer
from trainer import architectures, cli, config, export, job, sample
from trainer.api import open_run
from trainer.api import train as train_run
from trainer.data import prepare
from trainer.data.tokenizer import CharTokenizer, Tokenizer, train
from trainer.errors import ConfigError, UsageError
from trainer.model import construct, initialise

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers

TEXT = "def main() -> None:\n    print('ünïcode ✓', 3 * x)\n"
LLAMA3 = {"rope_scaling": "llama3", "rope_original_context": 1000}  # some waves are kept, some slowed, one in between
PYTHIA: dict[str, Any] = {
    "norm": "layernorm", "mlp": "gelu", "qk_norm": False, "biases": True, "rotated_share": 0.5, "parallel_block": True,
}  # fmt: skip
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("GPT2LMHeadModel", {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "biases": True}),
    (
        "GPT2LMHeadModel",
        {"norm": "layernorm", "positions": "learned", "mlp": "relu2", "qk_norm": False, "biases": False},
    ),
    ("LlamaForCausalLM", {"mlp": "swiglu", "qk_norm": False, "biases": False}),
    ("LlamaForCausalLM", {"mlp": "swiglu", "qk_norm": False, "biases": True}),
    ("Qwen3ForCausalLM", {"mlp": "swiglu", "qk_norm": True}),
    ("Qwen3ForCausalLM", {"mlp": "swiglu", "norm_gain": True, "norm_epsilon": 1e-4, "head_width": 12}),
    ("ArceeForCausalLM", {"mlp": "gelu_tanh", "qk_norm": False, "norm_gain": True, "biases": True, "head_width": 12}),
    ("ApertusForCausalLM", {"mlp": "gelu_tanh", "norm_gain": True, "head_width": 12}),
    ("Starcoder2ForCausalLM", {"norm": "layernorm", "mlp": "gelu_tanh", "qk_norm": False, "head_width": 12}),
    ("ArceeForCausalLM", {"mlp": "relu2", "qk_norm": False, "biases": True}),
    ("ArceeForCausalLM", {"mlp": "gelu", "qk_norm": False}),
    ("ApertusForCausalLM", {"mlp": "relu2", "qk_norm": True}),
    ("ApertusForCausalLM", {"mlp": "gelu", "qk_norm": True}),
    ("StableLmForCausalLM", {"norm": "layernorm", "mlp": "swiglu", "qk_norm": False}),
    ("Starcoder2ForCausalLM", {"norm": "layernorm", "mlp": "gelu", "qk_norm": False, "biases": True}),
    ("Starcoder2ForCausalLM", {"norm": "layernorm", "mlp": "relu2", "qk_norm": False, "biases": False}),
    ("LlamaForCausalLM", {"mlp": "swiglu", "qk_norm": False, "norm_gain": True, **LLAMA3}),
    ("Qwen2ForCausalLM", {"mlp": "swiglu", "qk_norm": False, "norm_gain": True, "qkv_biases": True}),
    ("Qwen2ForCausalLM", {"mlp": "swiglu", "qk_norm": False, "qkv_biases": True, "head_width": 12, **LLAMA3}),
    ("Qwen3ForCausalLM", {"mlp": "swiglu", "qkv_biases": True, "rope_scaling": "linear"}),
    ("ArceeForCausalLM", {"mlp": "relu2", "qk_norm": False, "qkv_biases": True, **LLAMA3}),
    ("ApertusForCausalLM", {"mlp": "relu2", "qkv_biases": True, **LLAMA3}),
    (
        "GPT2LMHeadModel",
        {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "qkv_biases": True},
    ),
    ("Starcoder2ForCausalLM", {"norm": "layernorm", "mlp": "gelu", "qk_norm": False, "qkv_biases": True, **LLAMA3}),
    ("StableLmForCausalLM", {**PYTHIA, "mlp": "swiglu", "biases": False, "parallel_block": False, "qkv_biases": True}),
    ("GPTNeoXForCausalLM", PYTHIA),
    ("GPTNeoXForCausalLM", {**PYTHIA, "biases": False, "mlp": "gelu_tanh", "parallel_block": False, **LLAMA3}),
    ("GPTNeoXForCausalLM", {**PYTHIA, "biases": False, "mlp": "relu2", "qkv_biases": True, "rotated_share": 1.0}),
]
WITHOUT_GROUPS = ("GPT2LMHeadModel", "GPTNeoXForCausalLM")


def made(changes: dict[str, Any], vocab_size: int = 320) -> Any:
    """A small model with these switches, all of whose parameters have values that matter."""
    chosen = config.parse({"model": {"n_layers": 2, "n_heads": 4, "width": 32, "context": 48, **changes}}).model
    model = construct(chosen, vocab_size)
    initialise(model, chosen, 0)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("name", "changes", "kv_heads"),
    [(*row, groups) for row in ROWS for groups in (0, 2) if not groups or row[0] not in WITHOUT_GROUPS],
)
def test_transformers_computes_the_same_logits(
    tmp_path: Path, name: str, changes: dict[str, Any], kv_heads: int, tied: bool
):
    rope = {} if changes.get("positions") == "learned" else {"rope_base": 5000.0}
    model = made({**changes, **rope, "n_kv_heads": kv_heads, "tied_embeddings": tied})
    export.write(model, train("bytes", [], 257), tmp_path / "out")
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == name
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    ids = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "changes"), ROWS)
def test_what_is_exported_is_read_back_to_the_same_bits(tmp_path: Path, name: str, changes: dict[str, Any]):
    model = made({**changes, "n_kv_heads": 0 if name in WITHOUT_GROUPS else 2})
    export.write(model, train("bytes", [], 257), tmp_path / "out")
    found = architectures.read(tmp_path / "out", model.settings, 320)
    own = dict(model.named_parameters())
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)


def test_a_folder_of_another_model_is_refused_with_each_difference(tmp_path: Path):
    model = made({"mlp": "swiglu"})
    export.write(model, train("bytes", [], 257), tmp_path / "out")
    wider = model.settings.model_copy(update={"width": 64, "n_layers": 3})
    with pytest.raises(ConfigError) as refused:
        architectures.read(tmp_path / "out", wider, 384)
    for name in ("hidden_size is 32", "num_hidden_layers is 2", "vocab_size is 320"):
        assert name in str(refused.value)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has values that this model has no place for"):
        architectures.read(tmp_path / "out", model.settings, 320)
    weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head\.weight is missing"):
        architectures.read(tmp_path / "out", model.settings, 320)
    with pytest.raises(ConfigError, match="cannot be read"):
        architectures.read(tmp_path, model.settings, 320)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "llama3"}}, "rope_type of the rotation is 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0}}, "rope_type of the rotation is 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type of the rotation is 'dynamic'"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor of the rotation is 0.25"),
        ({"sliding_window": 4, "use_sliding_window": True}, "sliding_window is 4"),
        ({"rope_parameters": ["x"]}, "rope_parameters in"),
        ({"rope_scaling": "linear"}, "rope_scaling in"),
        ({"sliding_window": "4"}, "sliding_window in"),
    ],
)
def test_a_folder_whose_model_computes_attention_otherwise_is_refused(tmp_path: Path, said: dict[str, Any], named: str):
    model = made({"mlp": "swiglu"})
    export.write(model, train("bytes", [], 257), tmp_path / "out")
    about = tmp_path / "out" / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | said))
    with pytest.raises(ConfigError) as refused:
        architectures.read(tmp_path / "out", model.settings, 320)
    assert named in str(refused.value)


def test_a_weight_that_the_model_has_no_place_for_is_refused(tmp_path: Path):
    model = made({"mlp": "swiglu"})
    export.write(model, train("bytes", [], 257), tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(weights, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"q_proj\.bias is a weight that this model has no place for"):
        architectures.read(tmp_path / "out", model.settings, 320)


def test_a_head_that_is_not_the_table_is_refused_by_a_model_whose_head_is(tmp_path: Path):
    model = made({"mlp": "swiglu", "tied_embeddings": True})
    export.write(model, train("bytes", [], 257), tmp_path / "out")
    about, weights = tmp_path / "out" / "config.json", load_file(tmp_path / "out" / "model.safetensors")
    said = json.loads(about.read_text())
    del said["tie_word_embeddings"]
    about.write_text(json.dumps(said))
    for head, refused in ((weights["model.embed_tokens.weight"], False), (torch.ones(320, 32), True)):
        save_file(weights | {"lm_head.weight": head.clone()}, tmp_path / "out" / "model.safetensors")
        with pytest.raises(ConfigError, match="not the table") if refused else contextlib.nullcontext():
            architectures.read(tmp_path / "out", model.settings, 320)


def test_a_gpt2_that_scales_its_attention_otherwise_is_refused(tmp_path: Path):
    model = made(dict(ROWS)["GPT2LMHeadModel"])
    export.write(model, train("bytes", [], 257), tmp_path / "out")
    about = tmp_path / "out" / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"scale_attn_by_inverse_layer_idx": True}))
    with pytest.raises(ConfigError, match="scale_attn_by_inverse_layer_idx is True"):
        architectures.read(tmp_path / "out", model.settings, 320)
    about.write_text("null")
    with pytest.raises(ConfigError, match="is not what transformers writes there"):
        architectures.read(tmp_path / "out", model.settings, 320)


FOREIGN: dict[str, Any] = {
    "gpt2": transformers.GPT2Config(
        vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "llama": transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    ),
    "llama, tied": transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=88, num_hidden_layers=1, num_attention_heads=4,
        head_dim=16, tie_word_embeddings=True,
    ),
    "qwen3": transformers.Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "llama 3.1": transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=2,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
    ),
    "llama, linear": transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=88, num_hidden_layers=1, num_attention_heads=4,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ),
    "qwen2": transformers.Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "pythia": transformers.GPTNeoXConfig(
        vocab_size=300, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    ),
    "gpt-neox, in turn": transformers.GPTNeoXConfig(
        vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        use_parallel_residual=False, hidden_act="gelu_new", rotary_pct=0.5, rotary_emb_base=5000, layer_norm_eps=1e-4,
    ),
    "starcoder2": transformers.Starcoder2Config(
        vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip
"""Models as their makers configure them, but small: with gains, biases, epsilons and activations of their own."""


def saved(folder: Path, settings: Any, headless: bool = False) -> Any:
    """A model of transformers, all of whose weights matter, and its folder as `save_pretrained` writes it."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for number, parameter in enumerate(theirs.parameters()):
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    (theirs.base_model if headless else theirs).save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_made_by_transformers_goes_in_and_out_with_the_same_logits(tmp_path: Path, name: str):
    theirs = saved(tmp_path / "in", FOREIGN[name], headless=name == "gpt2")
    fits = fitting(tmp_path / "in", config.Model(context=64))
    chosen = config.parse({"model": {"context": 64} | fits}).model
    ours: Any = construct(chosen, 300)
    values = architectures.read(tmp_path / "in", chosen, 300)
    with torch.no_grad():
        for own, parameter in ours.named_parameters():
            parameter.copy_(values[own])
    export.write(ours, train("bytes", [], 257), tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(back) is type(theirs)
    ids = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours.eval()(ids), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(back(ids).logits, expected, rtol=1e-4, atol=1e-4)


def fitting(folder: Path, start: config.Model) -> dict[str, Any]:
    """Return the changes to these settings of [model] that let it hold a folder: the refusal lists them."""
    with pytest.raises(ConfigError) as refused:
        architectures.read(folder, start, 300)
    line = str(refused.value).partition("set in [model]: ")[2].splitlines()[0]
    return tomllib.loads(line.removesuffix(".").replace(", ", "\n"))


def test_the_settings_that_a_refusal_lists_are_taken_and_none_are_listed_where_none_fit(tmp_path: Path):
    llama, start = FOREIGN["llama"].to_dict(), config.Model(context=64)
    saved(tmp_path / "short", transformers.LlamaConfig(**llama | {"max_position_embeddings": 32}))
    fits = fitting(tmp_path / "short", start)
    assert fits["context"] == 32
    architectures.read(tmp_path / "short", config.parse({"model": {"context": 64} | fits}).model, 300)
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    saved(tmp_path / "scaled", transformers.LlamaConfig(**llama | {"rope_parameters": scaled}))
    with pytest.raises(ConfigError, match=r"No settings of \[model\] hold it"):
        architectures.read(tmp_path / "scaled", start, 300)


def test_training_goes_on_from_a_model_that_transformers_made(tmp_path: Path):
    theirs = saved(tmp_path / "in", FOREIGN["qwen3"])
    model = fitting(tmp_path / "in", config.load(SMOKE).model)
    few = {"budget.steps": 2, "eval.max_tokens": 64, "data.micro_batches": 2, "init_from": f"hf:{tmp_path}/in"}
    refused = CliRunner().invoke(cli.app, ["train", str(SMOKE), "--dry-run", "--set", f"init_from=hf:{tmp_path}/in"])
    assert isinstance(refused.exception, ConfigError) and "head_width = 12" in str(refused.exception)
    few |= {f"model.{name}": value for name, value in model.items()}
    chosen = config.load(SMOKE, [f"{name}={json.dumps(value)}" for name, value in few.items()])
    with pytest.raises(ConfigError, match="num_attention_heads is 4"):
        train_run(config.load(SMOKE, [f"init_from=hf:{tmp_path}/in", "data.tokenizer=bytes"]), tmp_path / "run")
    done = train_run(chosen, tmp_path / "run")  # what was refused has left no run of another config
    batches = job.batches_of(chosen, prepare(chosen.data, chosen.eval, 32)).for_step(0)
    losses = []
    for batch in batches:
        with torch.no_grad():
            logits = theirs(torch.from_numpy(batch.inputs)).logits
        losses.append(F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten()).item())
    first, second = (row["loss"] for row in done.losses())
    assert first == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert second != first
    assert export.export(tmp_path / "run", tmp_path / "out").name == "Qwen3ForCausalLM"


@pytest.mark.parametrize(("changes", "switch"), [
    ({"norm": "layernorm", "qk_norm": False, "mlp": "swiglu", "head_width": 12}, "head_width"),
    ({"mlp": "swiglu", "qk_norm": False, "head_width": 12, "width": 30}, "n_heads"),
    ({"logit_softcap": 15.0}, "logit_softcap"), ({"value_embeddings": True}, "value_embeddings"),
    ({"bigram_buckets": 64}, "bigram_buckets"), ({"positions": "learned"}, "positions"),
    ({"qk_norm": True, "biases": True}, "biases"), ({"norm": "layernorm", "qk_norm": True}, "qk_norm"),
    ({"norm": "layernorm", "qk_norm": False, "positions": "learned", "mlp": "swiglu"}, "mlp"),
    ({"norm": "layernorm", "qk_norm": False, "positions": "learned", "mlp": "gelu", "n_kv_heads": 2}, "n_kv_heads"),
    ({"norm": "layernorm", "qk_norm": False, "mlp": "swiglu", "biases": True}, "biases"),
    ({"mlp": "swiglu", "rotated_share": 0.5}, "rotated_share"), ({"parallel_block": True}, "parallel_block"),
    ({**PYTHIA, "mlp": "swiglu", "biases": False}, "parallel_block"), ({**PYTHIA, "n_kv_heads": 2}, "n_kv_heads"),
    ({**PYTHIA, "head_width": 12}, "head_width"), ({**PYTHIA, "qk_norm": True}, "qk_norm"),
])  # fmt: skip
def test_a_combination_that_no_architecture_has_is_refused_by_the_switch(changes: dict[str, Any], switch: str):
    with pytest.raises(UsageError, match=f"model.{switch}"):
        export.architecture_of(config.parse({"model": {"n_heads": 4, "width": 32, **changes}}).model)


def test_every_combination_of_switches_is_exported_or_refused():
    switches = {"norm": ("layernorm", "rmsnorm"), "positions": ("learned", "rope"), "mlp": ("gelu", "relu2", "swiglu")}
    switches |= dict.fromkeys(("qk_norm", "biases", "parallel_block"), (False, True))
    for values in itertools.product(*switches.values()):
        chosen = dict(zip(switches, values, strict=True))
        try:
            name = export.architecture_of(config.parse({"model": chosen}).model).name
        except UsageError:
            continue
        assert any(row == name for row, _ in ROWS)


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_the_tokenizer_gives_the_same_ids_and_the_same_text(tmp_path: Path, kind: str):
    tokenizer = train(kind, [TEXT * 20], 400)
    text = TEXT + ("µ" if isinstance(tokenizer, CharTokenizer) else "\x00 \x7f\n\n")
    export.write(made({"mlp": "swiglu"}, 512), tokenizer, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = tokenizer.encode_batch([text])[0].tolist()
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours
    known = [token for token in ours if not isinstance(tokenizer, CharTokenizer) or token != tokenizer.unknown]
    assert theirs.decode(known, skip_special_tokens=True) == tokenizer.decode(known)
    assert theirs.eos_token_id == tokenizer.end_of_document


@pytest.mark.slow
def test_a_trained_run_writes_the_same_greedy_text_in_transformers(tmp_path: Path):
    few = settings(budget__steps=20, eval__every_steps=0, checkpoint__every_steps=0, data__tokenizer="bpe")
    trainer("train", SMOKE, "--run", tmp_path / "run", *few)
    done = trainer("export", tmp_path / "run", tmp_path / "out")
    assert "ApertusForCausalLM" in done.stdout
    assert "not an empty folder" in trainer("export", tmp_path / "run", tmp_path / "out", check=False).stderr
    (drawn,) = [*map("".join, sample.generate(tmp_path / "run", "def ", 20, sample.Drawing(0.0, 0), [0]))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("def ", add_special_tokens=False)["input_ids"]]])
        found = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0]
    assert tokenizer.decode(found, skip_special_tokens=True) == drawn
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] % 64 == 0
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.json").vocab_size == tokenizer.vocab_size

    # And back: a run that begins with these weights. Its first loss is that of a trained model.
    start = [*few, *settings(budget__steps=2, init_from=f"hf:{tmp_path / 'out'}")]
    trainer("train", SMOKE, "--run", tmp_path / "begun", *start)
    first, begun = open_run(tmp_path / "run"), open_run(tmp_path / "begun")
    assert begun.losses()[0]["loss"] < 0.95 * first.losses()[0]["loss"]
    assert begun.losses()[0]["loss"] == pytest.approx(first.losses()[-1]["loss"], rel=0.05)
    with (tmp_path / "out" / "model.safetensors").open("ab") as weights:
        weights.write(b" ")
    refused = trainer("train", SMOKE, "--run", tmp_path / "begun", *start, check=False)
    assert refused.returncode == 2 and "init_from" in refused.stderr
