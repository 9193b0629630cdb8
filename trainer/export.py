"""A run's newest checkpoint as a folder that `transformers` opens: weights (safetensors), config.json, tokenizer.

Each combination of switches goes to an architecture there that computes the same; one that no architecture can hold is
refused. The logits differ by rounding alone, since kernels and their order differ.
"""

import json
from pathlib import Path

from trainer import files, sample
from trainer.architectures import Architecture, architecture_of, settings_of, tensors, tokenizer_json
from trainer.data.tokenizer import END, ByteTokenizer, CharTokenizer, Tokenizer
from trainer.errors import UsageError
from trainer.log import rundir
from trainer.model import GPT


def export(run: Path, out: Path) -> Architecture:
    """Write the folder `out`. Returns the architecture that it opens as.

    Raises UsageError where no architecture computes the same, or where `out` holds files already; CheckpointError for a
    run without an intact checkpoint.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder.\n  Name a new one: an export mixes with nothing.")
    architecture = architecture_of(rundir.config_of(run).model)
    model = sample.restore(run)
    assert isinstance(model, GPT)
    tokenizer = Tokenizer.load(rundir.tokenizer_path(run), rundir.read(run).get("tokenizer_sha256"))
    write(model, tokenizer, out)
    return architecture


def write(model: GPT, tokenizer: Tokenizer, out: Path) -> None:
    """Write weights, settings and tokenizer. Raises UsageError as `architecture_of` does, before any work."""
    from safetensors.torch import save_file

    architecture = architecture_of(model.settings)
    vocab_size = model.embed.num_embeddings
    out.mkdir(parents=True, exist_ok=True)
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    converted = {name: value.contiguous() for name, value in tensors(own, model.settings, architecture)}
    # Last: a folder without it is no model, so a write that was cut off is not mistaken for one.
    save_file(converted, out / "model.safetensors.partial", metadata={"format": "pt"})
    files.write(out / "tokenizer.json", tokenizer_json(tokenizer))
    ends = {"eos_token": _end_token(tokenizer), "bos_token": _end_token(tokenizer)}
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.settings.context, **ends}
    files.write(out / "tokenizer_config.json", json.dumps(facts, indent=1))
    settings = settings_of(model.settings, vocab_size, architecture)
    ids = {"bos_token_id": tokenizer.end_of_document, "eos_token_id": tokenizer.end_of_document}
    files.write(out / "generation_config.json", json.dumps(ids, indent=1))
    files.write(out / "config.json", json.dumps(settings | ids, indent=1))
    (out / "model.safetensors.partial").replace(out / "model.safetensors")


def _end_token(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer, ByteTokenizer | CharTokenizer):
        return END
    added = json.loads(tokenizer.to_json()).get("added_tokens", [])
    return next(token["content"] for token in added if token["id"] == tokenizer.end_of_document)
