"""The architectures of `transformers` that compute what a GPT does, and the names and places of its weights there.

`export` writes a run for them; `read` is the way back, for `init_from`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer import files
from trainer.config import Config, Model
from trainer.config_rules import HF
from trainer.data.tokenizer import END, ByteTokenizer, CharTokenizer, Tokenizer
from trainer.errors import ConfigError, UsageError
from trainer.model import LAYER_NORM_EPSILON, LLAMA3_FEWEST_TURNS, LLAMA3_MOST_TURNS, NORM_EPSILON, construct

ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh"),
    "relu2": ("relu2",),
    "swiglu": ("silu", "swish"),
}
"""Names there of each `model.mlp`; the first is the one that is written, but by GPT-2."""
SILENT: dict[str, dict[str, Any]] = {
    "gpt2": {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    "llama": {"hidden_act": "silu", "rms_norm_eps": 1e-6},
    "qwen2": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "use_sliding_window": False},
    "qwen3": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "head_dim": 128, "use_sliding_window": False},
    "arcee": {"hidden_act": "relu2", "rms_norm_eps": 1e-5},
    "apertus": {"hidden_act": "xielu", "rms_norm_eps": 1e-5},
    "stablelm": {"hidden_act": "silu", "layer_norm_eps": 1e-5, "use_parallel_residual": False, "qk_layernorm": False},
    "starcoder2": {"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5},
    "gpt_neox": {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True, "attention_bias": True},
}
"""Values that transformers takes where a config.json has none, by `model_type`."""


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, and the names that it gives to the parts of a model and of a block."""

    name: str
    model_type: str
    before_attention: str = "input_layernorm"
    before_mlp: str = "post_attention_layernorm"
    up: str = "up_proj"
    down: str = "down_proj"
    root: str = "model."
    blocks: str = "layers"
    embed: str = "embed_tokens"
    final_norm: str = "norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    out: str = "o_proj"


GPT2 = Architecture(
    "GPT2LMHeadModel", "gpt2", "ln_1", "ln_2", "c_fc", "c_proj",
    root="transformer.", blocks="h", embed="wte", final_norm="ln_f", attention="attn", out="c_proj",
)  # fmt: skip
GPT_NEOX = Architecture(
    "GPTNeoXForCausalLM", "gpt_neox", up="dense_h_to_4h", down="dense_4h_to_h",
    root="gpt_neox.", embed="embed_in", final_norm="final_layer_norm", head="embed_out", attention="attention",
    out="dense",
)  # fmt: skip
LLAMA = Architecture("LlamaForCausalLM", "llama")
QWEN2 = Architecture("Qwen2ForCausalLM", "qwen2")
QWEN3 = Architecture("Qwen3ForCausalLM", "qwen3")
ARCEE = Architecture("ArceeForCausalLM", "arcee")
APERTUS = Architecture("ApertusForCausalLM", "apertus", "attention_layernorm", "feedforward_layernorm")
STABLELM = Architecture("StableLmForCausalLM", "stablelm")
STARCODER2 = Architecture("Starcoder2ForCausalLM", "starcoder2", up="c_fc", down="c_proj")
PARTIAL = (GPT_NEOX, STABLELM)
"""Those that rotate a part of each head."""
PARTS = ("attention.qkv", "attention.out", "mlp.up", "mlp.out")
"""The matrices of a block."""


def architecture_of(model: Model) -> Architecture:
    """Return the architecture that computes what these switches do. Raises UsageError naming a switch that none has."""
    problems = [
        f"model.{name} = {json.dumps(getattr(model, name))}: no architecture of transformers has it with the rest"
        for name, is_set in (
            ("logit_softcap", model.logit_softcap),
            ("value_embeddings", model.value_embeddings),
            ("bigram_buckets", model.bigram_buckets),
        )
        if is_set
    ]
    if model.class_:
        problems = [f"model.class = {json.dumps(model.class_)}: transformers does not have it"]
    found = _nearest(model)
    if model.norm == "rmsnorm":
        if model.positions == "learned":
            problems.append('model.positions = "learned" with model.norm = "rmsnorm": use "rope", or "layernorm"')
        if model.qk_norm and model.biases:
            problems.append(f"model.biases = true with model.qk_norm = true: {found.name} has no biases in its MLP")
    elif model.qk_norm:
        problems.append('model.qk_norm = true with model.norm = "layernorm": no architecture has both')
    if found is STABLELM and model.biases:
        problems.append(f'model.biases = true with model.mlp = "swiglu": {found.name} has no biases in its MLP')
    if found is GPT2 and model.mlp == "swiglu":
        problems.append('model.mlp = "swiglu" with model.positions = "learned": GPT2LMHeadModel has no gate')
    if found in (GPT2, GPT_NEOX, STABLELM) and model.head_width:
        problems.append(f"model.head_width = {model.head_width}: {found.name} divides its width by the heads")
    if found in (GPT2, GPT_NEOX) and model.kv_heads != model.n_heads:
        problems.append(f"model.n_kv_heads = {model.n_kv_heads}: {found.name} has no groups of heads")
    if model.rotated_share < 1 and found not in PARTIAL:
        problems.append(f"model.rotated_share = {model.rotated_share}: {found.name} turns whole heads")
    if model.parallel_block and found is not GPT_NEOX:
        problems.append(f"model.parallel_block = true: {found.name} computes attention and MLP in turn")
    if model.head_width and model.width % model.n_heads and found in (LLAMA, QWEN2, ARCEE):
        problems.append(f"model.n_heads = {model.n_heads} does not divide model.width, which {found.name} asks for")
    if problems:
        raise UsageError(
            "This model cannot be exported: " + "; ".join(problems) + ".\n"
            "  docs/export.md lists the combinations that can. The run itself is as it was; `sample` reads it."
        )
    return found


def _nearest(model: Model) -> Architecture:
    """Return the architecture that has most of these switches."""
    is_gated = model.mlp == "swiglu"
    if model.norm == "layernorm":
        if model.positions == "learned":
            return GPT2
        if is_gated:
            return STABLELM
        return GPT_NEOX if model.parallel_block or model.rotated_share < 1 else STARCODER2
    if model.qk_norm:
        return QWEN3 if is_gated else APERTUS
    if not is_gated:
        return ARCEE
    return QWEN2 if model.qkv_biases else LLAMA


def _biased(model: Model, architecture: Architecture) -> tuple[str, ...]:
    """Return the parts of a block whose biases the architecture has; they are zero where the GPT has none."""
    attention, mlp = PARTS[:2], PARTS[2:]
    has_any = model.biases or model.qkv_biases
    if architecture in (QWEN2, STABLELM):
        return attention[:1] if model.qkv_biases else ()
    if architecture is GPT_NEOX:
        return (*attention, *mlp) if has_any else mlp
    if architecture in (GPT2, STARCODER2):
        return PARTS if has_any or architecture is GPT2 else ()
    return (*attention, *mlp) if model.biases else attention if model.qkv_biases else ()


def settings_of(model: Model, vocab_size: int, architecture: Architecture) -> dict[str, Any]:
    """Return the contents of config.json, without the ids of special tokens."""
    activation = "gelu_new" if (architecture, model.mlp) == (GPT2, "gelu_tanh") else ACTIVATIONS[model.mlp][0]
    of_layer_norm = model.norm_epsilon or LAYER_NORM_EPSILON
    common = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "dtype": "float32",
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tied_embeddings,
    }
    if architecture is GPT2:
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout)
        return common | dropouts | {
            "n_positions": model.context, "n_embd": model.width, "n_layer": model.n_layers, "n_head": model.n_heads,
            "n_inner": model.mlp_width, "activation_function": activation, "layer_norm_epsilon": of_layer_norm,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        }  # fmt: skip
    rope, biased = _rotation(model), _biased(model, architecture)
    own: dict[str, Any] = {"attention_bias": "attention.out" in biased, "mlp_bias": "mlp.out" in biased}
    if architecture is STARCODER2:
        own = {"use_bias": bool(biased)}
    elif architecture is QWEN2:
        own = {"use_sliding_window": False}
    elif architecture is STABLELM:
        own = {"use_qkv_bias": bool(biased), "use_parallel_residual": False, "qk_layernorm": False}
        own["partial_rotary_factor"] = rope["partial_rotary_factor"]
    elif architecture is GPT_NEOX:
        own = {"attention_bias": "attention.out" in biased, "use_parallel_residual": model.parallel_block}
        own |= {"rotary_pct": model.rotated_share, "rotary_emb_base": model.rope_base, "hidden_dropout": model.dropout}
    if architecture not in PARTIAL:
        del rope["partial_rotary_factor"]
    if model.rope_scaling != "none":
        own["rope_scaling"] = rope  # where versions before 5 look, as for rope_theta
    return common | own | {
        "hidden_size": model.width, "intermediate_size": model.mlp_width, "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_channels,
        "hidden_act": activation, "max_position_embeddings": model.context, "attention_dropout": model.dropout,
        "rms_norm_eps": model.norm_epsilon or NORM_EPSILON,
        "norm_epsilon": of_layer_norm, "layer_norm_eps": of_layer_norm,
        "rope_parameters": rope, "rope_theta": model.rope_base,
    }  # fmt: skip


def _rotation(model: Model) -> dict[str, Any]:
    """Return the rotation as transformers describes it."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_base}
    found["partial_rotary_factor"] = model.rotated_share
    if model.rope_scaling != "none":
        found |= {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling == "llama3":
        found |= {"low_freq_factor": LLAMA3_FEWEST_TURNS, "high_freq_factor": LLAMA3_MOST_TURNS}
        found["original_max_position_embeddings"] = model.rope_original_context
    return found


def tensors(own: Mapping[str, Tensor], settings: Model, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield (name there, value) of every tensor that the architecture has, from a GPT's parameters by name."""
    root = architecture.root
    yield f"{root}{architecture.embed}.weight", own["embed.weight"]
    if "embed_positions.weight" in own:
        yield root + "wpe.weight", own["embed_positions.weight"]
    yield from _norm(own, "final_norm", root + architecture.final_norm, settings)
    if "head.weight" in own:
        yield f"{architecture.head}.weight", own["head.weight"]
    for layer in range(settings.n_layers):
        ours, theirs = f"blocks.{layer}.", f"{root}{architecture.blocks}.{layer}."
        yield from _norm(own, ours + "attention_norm", theirs + architecture.before_attention, settings)
        yield from _norm(own, ours + "mlp_norm", theirs + architecture.before_mlp, settings)
        for kind, parts in (("weight", PARTS), ("bias", _biased(settings, architecture))):
            for part in parts:
                value = own.get(f"{ours}{part}.{kind}")
                if value is None:
                    value = _constant(0, own[f"{ours}{part}.weight"].shape[0], own)
                for name, piece in _pieces(part, value, settings, architecture):
                    yield f"{theirs}{name}.{kind}", piece
        if settings.qk_norm:
            for name in "qk":
                gain = own.get(f"{ours}attention.{name}_gain", _constant(1, settings.head_channels, own))
                half_by_half = gain.unflatten(0, (-1, 2)).T.flatten()  # as rows
                yield f"{theirs}{architecture.attention}.{name}_norm.weight", half_by_half


def _pieces(part: str, value: Tensor, settings: Model, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in a block there, value) of what a matrix or bias of a block becomes."""
    attention = architecture.attention
    if architecture is GPT2:  # its matrices are stored inputs × outputs
        name = {"attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc"}.get(
            part, "mlp.c_proj"
        )
        yield name, value.T if value.ndim == 2 else value
    elif part == "attention.qkv" and architecture is GPT_NEOX:  # query, key and value of each head in turn
        by_head = [rows.unflatten(0, (settings.n_heads, -1)) for rows in _split(value, settings)]
        yield f"{attention}.query_key_value", torch.stack(by_head, 1).flatten(0, 2)
    elif part == "attention.qkv":
        for name, rows in zip("qkv", _split(value, settings), strict=True):
            yield f"{attention}.{name}_proj", rows
    elif part == "attention.out":
        yield f"{attention}.{architecture.out}", value
    elif part == "mlp.up" and settings.mlp == "swiglu":
        gate, up = value.chunk(2)
        yield "mlp.gate_proj", gate
        yield f"mlp.{architecture.up}", up
    else:
        yield f"mlp.{architecture.up if part == 'mlp.up' else architecture.down}", value


def _norm(own: Mapping[str, Tensor], ours: str, theirs: str, settings: Model) -> Iterator[tuple[str, Tensor]]:
    """Yield a norm's gain, which is 1 where the model has none, and for layer norm its offset."""
    ones = _constant(1, settings.width, own)
    yield f"{theirs}.weight", own.get(f"{ours}.weight", ones)
    if settings.norm == "layernorm":
        yield f"{theirs}.bias", own.get(f"{ours}.bias", torch.zeros_like(ones))


def _split(qkv: Tensor, settings: Model) -> list[Tensor]:
    """Split rows into queries, keys and values. Channels that rotate together are neighbours here, halves there."""
    heads, kv_heads, channels = settings.n_heads, settings.kv_heads, settings.head_channels
    parts = list(qkv.split((heads * channels, kv_heads * channels, kv_heads * channels)))
    turned = settings.rotated_channels
    for number, count in ((0, heads), (1, kv_heads)):
        turning, still = parts[number].unflatten(0, (count, channels)).split((turned, channels - turned), 1)
        halves = turning.unflatten(1, (turned // 2, 2)).transpose(1, 2).flatten(1, 2)
        parts[number] = torch.cat((halves, still), 1).flatten(0, 1)
    return parts


def _constant(value: int, size: int, own: Mapping[str, Tensor]) -> Tensor:
    """A tensor that the architecture has and the GPT has not."""
    return torch.full((size,), value, dtype=own["embed.weight"].dtype)


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return the tokenizer.json of the `tokenizers` library with the same ids."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    if isinstance(tokenizer, ByteTokenizer):
        # Byte-level BPE without a merge; its letter for each byte, in the order of bytes.
        letters = {letter: _byte_of(letter) for letter in pre_tokenizers.ByteLevel.alphabet()}
        library: Any = Library(models.BPE(vocab=letters, merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    elif isinstance(tokenizer, CharTokenizer):
        characters = json.loads(tokenizer.to_json())["characters"]
        vocab = {character: number for number, character in enumerate(characters)}
        vocab |= {END: tokenizer.end_of_document, UNKNOWN: tokenizer.unknown}
        library = Library(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN, fuse_unk=False))
        library.decoder = decoders.Fuse()
        library.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    else:
        return tokenizer.to_json()
    return library.to_str()


UNKNOWN = "<|unk|>"


def _byte_of(letter: str) -> int:
    """Return the byte that byte-level BPE writes as this letter: printable ones as they are, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if ord(letter) < 256:
        return ord(letter)
    return [byte for byte in range(256) if byte not in printable][ord(letter) - 256]


# The way back


FIRST_PLACE = 2
"""Places are counted from here on: 0 and 1 are the constants."""


def read(folder: Path, settings: Model, rows: int) -> dict[str, Tensor]:
    """Return the parameters of a GPT with these settings and rows of the vocabulary, from a folder of transformers.

    Raises ConfigError naming every difference: another architecture, other sizes, or weights that a GPT has no place
    for, as gains of its norms where they have none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        architecture = architecture_of(settings)
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = {
            name: value.float()
            for file in sorted(folder.glob("*.safetensors"))
            for name, value in load_file(file).items()
        }
    except UsageError as error:
        raise ConfigError([f"init_from: {str(error).splitlines()[0]}\n  docs/export.md lists what can be."]) from None
    except (OSError, ValueError, SafetensorError) as error:
        fact = f"init_from: {folder} cannot be read as a model of transformers: {error}."
        raise ConfigError([f"{fact}\n  It needs config.json and *.safetensors."]) from None
    kinds = {"rope_parameters": dict, "rope_scaling": dict, "sliding_window": int, "model_type": str}
    wrong = ["what stands"]
    if isinstance(said, dict):
        wrong = [name for name, kind in kinds.items() if not isinstance(said.get(name), kind | None)]
    if wrong:
        fact = f"init_from: {wrong[0]} in {folder}/config.json is not what transformers writes there."
        raise ConfigError([f"{fact}\n  Name another folder."])
    said = _completed(said)
    root, head_name = architecture.root, f"{architecture.head}.weight"
    if not any(name.startswith(root) for name in found):  # saved without a head, as GPT-2 on the hub
        found = {name if name == head_name else root + name: value for name, value in found.items()}
    problems = _differences(said, settings, rows, architecture, folder) + _rotation_problems(said, settings)
    window = said.get("sliding_window") if said.get("use_sliding_window", True) else None
    if window is not None and window < settings.context:
        problems.append(f"init_from: sliding_window is {window!r} there, and attention here sees the whole context")
    head = found.get(head_name)
    if settings.tied_embeddings and "tie_word_embeddings" not in said and head is not None:
        table = found.get(f"{root}{architecture.embed}.weight")
        if table is None or not torch.equal(head, table):
            problems.append(
                f"init_from: {head_name} is not the table of embeddings, which model.tied_embeddings makes it"
            )
    own: dict[str, Tensor] = {}
    if not problems:
        own, problems = _inverse(found, settings, rows, architecture)
    if problems:
        remedy = _remedy(said, found, settings, folder, window)
        raise ConfigError([*(f"{problem}." for problem in problems[:-1]), f"{problems[-1]}.\n  {remedy}"])
    return own


def _remedy(
    said: Mapping[str, Any], found: Mapping[str, Tensor], settings: Model, folder: Path, window: int | None
) -> str:
    """Return the settings to change, if any settings hold this folder's model."""
    fitting = _fitting(said, found)
    longest = [most for most in (said.get("max_position_embeddings"), window) if isinstance(most, int)]
    if fitting and min(longest, default=settings.context) < settings.context:
        fitting["context"] = min(longest)
    fitted, left = settings.model_copy(update=fitting), []
    try:
        left = _differences(said, fitted, fitted.vocab_size, architecture_of(fitted), folder)
    except UsageError:
        fitting = {}
    if not fitting or left or _rotation_problems(said, fitted):
        return "No settings of [model] hold it. Name another folder."
    changed = {name: value for name, value in fitting.items() if value != getattr(settings, name)}
    if not changed:
        return "Change [model], or name another folder."
    return f"For this folder, set in [model]: {', '.join(f'{k} = {json.dumps(v)}' for k, v in changed.items())}."


def _completed(said: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with what transformers takes where it is silent."""
    said = SILENT.get(said.get("model_type", ""), {}) | said
    width, heads = said.get("hidden_size"), said.get("num_attention_heads")
    if said.get("n_inner", 0) is None and isinstance(said.get("n_embd"), int):
        said["n_inner"] = 4 * said["n_embd"]
    if said.get("num_key_value_heads", 0) is None:
        said["num_key_value_heads"] = heads
    if said.get("head_dim", 0) is None and isinstance(width, int) and isinstance(heads, int) and heads:
        said["head_dim"] = width // heads
    return said


def _differences(
    said: Mapping[str, Any], settings: Model, rows: int, architecture: Architecture, folder: Path
) -> list[str]:
    """Return a problem for each value of config.json that is another than these settings would write."""
    dropouts = {"attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"}
    rotations = {
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
        "partial_rotary_factor",
        "rotary_pct",
        "rotary_emb_base",
    }
    free = {"architectures", "dtype"} | rotations | dropouts
    problems = []
    for name, value in settings_of(settings, rows, architecture).items():
        alike = [value]
        if name in ("hidden_act", "activation_function"):
            alike = [*ACTIVATIONS[settings.mlp]]
        elif name == "max_position_embeddings" and isinstance(said.get(name), int) and said[name] >= value:
            continue  # rotations are the same, however many of them are used
        if name in said and name not in free and said[name] not in alike:
            theirs = f"{said[name]!r} in {folder}/config.json"
            problems.append(f"init_from: {name} is {theirs}, and {value!r} by this config")
    return problems


def _rotation_problems(said: Mapping[str, Any], settings: Model) -> list[str]:
    if settings.positions != "rope":
        return []
    theirs, ours = _rotation_of(said), _rotation(settings)
    problems = []
    if theirs["rope_theta"] != settings.rope_base:
        theta = theirs["rope_theta"]
        problems.append(f"init_from: rope_theta is {theta!r} there, and model.rope_base {settings.rope_base!r} here")
    return problems + [
        f"init_from: {name} of the rotation is {theirs.get(name)!r} there, and {ours.get(name)!r} here"
        for name in dict.fromkeys((*theirs, *ours))
        if name != "rope_theta" and ours.get(name) != theirs.get(name)
    ]


def _rotation_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotation that a config.json describes, by the names of today's transformers."""
    kind = said.get("model_type")
    usual = 12e6 if kind == APERTUS.model_type else 10_000.0
    share = 0.25 if kind in (STABLELM.model_type, GPT_NEOX.model_type) else 1.0
    found = {
        "rope_type": "default",
        "rope_theta": said.get("rope_theta", said.get("rotary_emb_base", usual)),
        "partial_rotary_factor": said.get("partial_rotary_factor", said.get("rotary_pct", share)),
    }
    given = said.get("rope_scaling") or said.get("rope_parameters") or {}
    if "type" in given:  # its name in older files
        given = {"rope_type": given["type"]} | {name: value for name, value in given.items() if name != "type"}
    found |= given
    if found["rope_type"] == "llama3":
        found.setdefault("original_max_position_embeddings", said.get("max_position_embeddings"))
    return found


def _fitting(said: Mapping[str, Any], found: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings of [model] that hold such a folder's model; {} where it is no architecture of ours."""
    kind = said.get("model_type")
    mlp = {theirs: ours for ours, names in ACTIVATIONS.items() for theirs in names}
    try:
        if kind == GPT2.model_type:
            width, heads = said["n_embd"], said["n_head"]
            return {
                "n_layers": said["n_layer"], "n_heads": heads, "n_kv_heads": 0, "head_width": 0, "width": width,
                "context": said["n_positions"], "vocab_size": said["vocab_size"], "norm": "layernorm",
                "norm_gain": False, "norm_epsilon": _unless(said["layer_norm_epsilon"], LAYER_NORM_EPSILON),
                "positions": "learned", "mlp": mlp[said["activation_function"]],
                "mlp_ratio": said.get("n_inner", 4 * width) / width, "qk_norm": False, "biases": True,
                "tied_embeddings": "lm_head.weight" not in found or said.get("tie_word_embeddings", True),
            }  # fmt: skip
        if kind not in SILENT:
            return {}
        width, heads, kv_heads = said["hidden_size"], said["num_attention_heads"], said.get("num_key_value_heads")
        is_rms = kind not in (STABLELM.model_type, STARCODER2.model_type, GPT_NEOX.model_type)
        epsilon = said.get("rms_norm_eps", said.get("norm_epsilon", said.get("layer_norm_eps")))
        has_head = "lm_head.weight" in found or "embed_out.weight" in found
        gains = [value for name, value in found.items() if name.endswith("norm.weight")]
        return {
            "n_layers": said["num_hidden_layers"], "n_heads": heads, "n_kv_heads": _unless(kv_heads or 0, heads),
            "head_width": _unless(said.get("head_dim", 0), width // heads), "width": width,
            "vocab_size": said["vocab_size"], "norm": "rmsnorm" if is_rms else "layernorm",
            "norm_gain": is_rms and any(bool((gain != 1).any()) for gain in gains),
            "norm_epsilon": _unless(epsilon, NORM_EPSILON if is_rms else LAYER_NORM_EPSILON), "positions": "rope",
            "mlp": mlp[said["hidden_act"]],
            "mlp_ratio": said["intermediate_size"] / width,
            "qk_norm": kind in (QWEN3.model_type, APERTUS.model_type),
            "biases": kind == GPT_NEOX.model_type or bool(said.get("use_bias", said.get("mlp_bias", False))),
            "qkv_biases": kind == QWEN2.model_type or bool(said.get("use_qkv_bias", False)),
            "parallel_block": bool(said.get("use_parallel_residual", False)),
            "tied_embeddings": bool(said.get("tie_word_embeddings", not has_head)),
        } | _fitting_rotation(_rotation_of(said))  # fmt: skip
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # no such file was ever written by transformers
        return {}


def _fitting_rotation(rotation: Mapping[str, Any]) -> dict[str, Any]:
    names = {"rope_scaling": "rope_type", "rope_factor": "factor", "rotated_share": "partial_rotary_factor"}
    names |= {"rope_original_context": "original_max_position_embeddings", "rope_base": "rope_theta"}
    found = {ours: rotation.get(theirs, Model.model_fields[ours].default) for ours, theirs in names.items()}
    if found["rope_scaling"] not in ("linear", "llama3"):
        found["rope_scaling"] = "none"
    return found | {name: float(found[name]) for name in ("rope_factor", "rotated_share", "rope_base")}


def _unless(value: Any, usual: Any) -> Any:
    """0 for a value that the setting's default stands for."""
    return 0 if value == usual else value


def _inverse(
    found: Mapping[str, Tensor], settings: Model, rows: int, architecture: Architecture
) -> tuple[dict[str, Tensor], list[str]]:
    """Undo `tensors`: numbers of places, sent through it, tell where each weight there belongs here."""
    shapes = {name: p.shape for name, p in construct(settings, rows, "meta").named_parameters()}
    places, first = dict[str, Tensor](), FIRST_PLACE
    for name, shape in shapes.items():
        places[name] = torch.arange(first, first + shape.numel(), dtype=torch.int64).view(shape)
        first += shape.numel()
    flat, problems, seen = torch.empty(first), list[str](), set[str]()
    for name, place in tensors(places, settings, architecture):
        value = found.get(name)
        seen.add(name)
        if value is None or value.shape != place.shape:
            theirs = "missing" if value is None else f"of shape {tuple(value.shape)}, not {tuple(place.shape)}"
            problems.append(f"init_from: {name} is {theirs}")
            continue
        constant = place < FIRST_PLACE
        if not torch.equal(value[constant], place[constant].float()):
            problems.append(f"init_from: {name} has values that this model has no place for")
        flat[place[~constant]] = value[~constant]
    buffers = (".attn.bias", ".attention.bias", ".masked_bias", "rotary_emb.inv_freq")  # older versions saved them
    problems += [
        f"init_from: {name} is a weight that this model has no place for"
        for name in sorted(found.keys() - seen)
        if not name.endswith(buffers) and not (name == f"{architecture.head}.weight" and settings.tied_embeddings)
    ]
    return {name: flat[places[name]] for name in shapes}, problems


def folder_of(config: Config) -> Path:
    """Return the folder that `init_from` names."""
    return Path(config.init_from.removeprefix(HF))


def values(config: Config, rows: int, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return the weights that `init_from` names, by the names of a GPT's parameters.

    Raises ConfigError as `read` does, and if the folder's tokenizer gives other ids.
    """
    folder = folder_of(config)
    found = read(folder, config.model, rows)
    if (folder / "tokenizer.json").exists():
        theirs, ours = (json.loads(text) for text in (files.read(folder / "tokenizer.json"), tokenizer_json(tokenizer)))
        if theirs.get("model", {}).get("vocab") != ours.get("model", {}).get("vocab"):
            fact = f"init_from: the tokenizer of {folder} gives other ids than this run's, so the weights mean nothing."
            raise ConfigError([f'{fact}\n  Set data.tokenizer = "{folder}/tokenizer.json".'])
    return found


def begin(config: Config, rows: int, tokenizer: Tokenizer, model: nn.Module) -> None:
    """Fill a model, sharded or not, with the weights that `init_from` names. Raises ConfigError as `values` does."""
    found = values(config, rows, tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = found[name].to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)
