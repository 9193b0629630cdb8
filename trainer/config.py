"""Every setting of a run; reading, checking and fingerprinting them.

A config is TOML (one level of `extends`, then `--set` overrides) read into frozen, strict models. Unknown keys are
refused, all problems are reported at once, and a setting that would have no effect is a problem (config_rules.py).
Zero means "off" for numbers that can be off, since TOML has no null.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer import builtin, config_rules, files, own_code, tomlfile
from trainer.errors import ConfigError, of_system


class Section(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False,
        serialize_by_alias=True,
    )  # fmt: skip


class MixtureSource(Section):
    """One source of a mixture."""

    name: str = ""
    """Name in messages and of its held-out part: "val/NAME"."""
    source: str = ""
    """As data.source, but a function of one's own; a hub dataset is pinned as "hub:OWNER/NAME@COMMIT[:SPLIT]"."""
    weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the sequences that are trained on; the weights sum to 1."""
    epochs: int = Field(default=1, ge=1)
    """Number of times that its text may be read."""
    max_megabytes: float = Field(default=0.0, ge=0)
    """Stop reading it after this many megabytes of text; 0 reads all of it."""


class Data(Section):
    source: str = "python-stdlib"
    """"python-stdlib", "repo" (this source tree), a path or glob (.jsonl, .parquet, else text), "hub:OWNER/NAME", or a
    function of one's own that yields documents: "my_corpus.py:documents", "package.module:documents"."""
    mixture: tuple[MixtureSource, ...] = ()
    """Several sources with weights, as [[data.mixture]] tables, in the place of `source`. A text that two of them have
    belongs to the first."""
    revision: str = ""
    """Commit of a hub dataset (40 hex digits); required, since a branch moves and a run must not."""
    subset: str = ""
    """Configuration name of a hub dataset."""
    hub_split: str = "train"
    """Split of a hub dataset that documents are read from."""
    streaming: bool = False
    """Read a hub dataset as a stream instead of downloading it first."""
    text_column: str = "text"
    """Column that holds the text in jsonl, parquet and hub datasets."""
    unit: Literal["document", "paragraph", "line"] = "document"
    """Unit of a plain text file that makes one document: the whole file, a paragraph, or a line."""
    max_megabytes: float = Field(default=0.0, ge=0)
    """Stop reading the corpus after this many megabytes of text; 0 reads all of it."""
    unique_tokens: int = Field(default=0, ge=0)
    """Tokens of the training text that are read, as often as the steps take them; 0 reads all. They are whole sequences
    drawn by `seed`, and those of a smaller number are among those of a larger one."""
    heldout: Literal["hash", "tail"] = "hash"
    """"hash" holds out whole documents by a hash of their content, "tail" the last part of every document. Of a
    corpus that is a single document, both hold out the last part."""
    heldout_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Part of the text that is held out."""
    deduplicate: Literal["exact", "near"] = "exact"
    """Training documents that are dropped: copies of an earlier one, or also those that say nearly the same."""
    decontaminate: Literal["off", "report", "drop"] = "off"
    """Compare the training text with every set of eval.sets: "report" training documents that are near-duplicates of
    held-out ones (data/near.py), or "drop" them from training."""
    tokenizer: str = "bpe"
    """"bpe" (byte-level, trained on the training split), "bytes", "chars", the path of a tokenizer.json, or that of a
    repository of the hub at a commit: "hub:OWNER/NAME@COMMIT"."""
    vocab_size: int = Field(default=4096, ge=257)
    """Tokens of a trained BPE; has no meaning for other tokenizers."""
    micro_batches: int = Field(default=8, ge=1, le=2**20)
    """M: micro-batches in a step. The unit of work; any number of ranks up to M may share them."""
    micro_batch_sequences: int = Field(default=4, ge=1)
    """B: sequences in a micro-batch."""
    cache_dir: str = ""
    """Directory of tokenizers and token stores; empty means $TOPROPE_CACHE, else ~/.cache/toprope."""


Scalar = bool | int | float | str


class Model(Section):
    class_: str = Field(default="", alias="class")
    """A model of one's own: "my_gpt.py:MyGPT" (a file beside the config) or "package.module:MyGPT"; empty: the GPT."""
    options: dict[str, Scalar | tuple[Scalar, ...]] = {}
    """Passed on to the class of one's own."""
    n_layers: int = Field(default=4, ge=1)
    """Number of blocks: attention and MLP."""
    n_heads: int = Field(default=4, ge=1)
    """Query heads; they divide `width`."""
    n_kv_heads: int = Field(default=0, ge=0)
    """Key/value heads shared by groups of query heads; 0 means as many as n_heads."""
    head_width: int = Field(default=0, ge=0)
    """Channels of a head; 0 means width / n_heads."""
    width: int = Field(default=128, ge=1)
    """Channels of the residual stream."""
    context: int = Field(default=64, ge=1)
    """Tokens in a sequence."""
    vocab_size: int = Field(default=0, ge=0)
    """Rows of the embedding table; 0 takes the tokenizer's size, rounded up to a multiple of 64."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """Normalisation before attention, MLP and head."""
    norm_gain: bool = False
    """Learned gains in "rmsnorm" and in qk_norm, as Llama and Qwen3 have them; "layernorm" always has its own."""
    norm_epsilon: float = Field(default=0.0, ge=0, lt=1)
    """Added to the mean square under the root of a norm; 0 means 1e-6, and in "layernorm" 1e-5."""
    positions: Literal["learned", "rope"] = "rope"
    """A learned vector for each position, or queries and keys turned by it."""
    rope_base: float = Field(default=10_000.0, gt=0)
    """Base of the wavelengths of "rope"."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """Slower rotations, for a longer context than before: all by `rope_factor`, or the long waves alone ("llama3")."""
    rope_factor: float = Field(default=8.0, ge=1)
    """Factor by which `rope_scaling` slows rotations."""
    rope_original_context: int = Field(default=8192, ge=1)
    """Tokens of context before the scaling "llama3", which leaves waves alone that are shorter than a quarter of it."""
    rotated_share: float = Field(default=1.0, gt=0, le=1)
    """Share of a head's channels, from the first on, that "rope" turns; GPT-NeoX and Pythia turn 0.25."""
    mlp: Literal["gelu", "gelu_tanh", "swiglu", "relu2"] = "relu2"
    """Activation of the MLP; "gelu_tanh" is GPT-2's own approximation; "swiglu" has a gate, and so a third matrix."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the MLP divided by `width`."""
    qk_norm: bool = True
    """Normalise queries and keys."""
    tied_embeddings: bool = False
    """One matrix for embedding and head."""
    biases: bool = False
    """Biases in linear layers."""
    qkv_biases: bool = False
    """Biases in the projections to queries, keys and values alone, as Qwen2 has them."""
    parallel_block: bool = False
    """The MLP of a block reads what the attention reads, not its result; as GPT-J, GPT-NeoX and Pythia."""
    logit_softcap: float = Field(default=0.0, ge=0)
    """Logits are squashed into ±this by tanh; 0 is off."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-partition penalty in the training loss; 0 is off."""
    loss_chunk_tokens: int = Field(default=0, ge=0)
    """Tokens of a micro-batch whose logits are computed at a time, and again for the gradient; 0: all at once. Less
    memory, more time, other rounding."""
    bf16_residual: bool = False
    """Keep the sums between blocks in bfloat16, not float32: less to read and write, for GPUs. Needs numerics.precision
    "bf16"."""
    fp8_head: bool = False
    """Multiply head and activations in 8-bit floats, for GPUs that have them. Needs numerics.precision "bf16"."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that an activation is set to zero in training; 0 is off."""
    value_embeddings: bool = False
    """Token-indexed embeddings added to the values of every second layer's attention."""
    bigram_buckets: int = Field(default=0, ge=0)
    """Rows of a hashed table of (previous token, token) embeddings added to the input; 0 is off."""
    init: Literal["gpt2", "zero_proj"] = "zero_proj"
    """Initial weights: as GPT-2's, or with every block's output projections at zero."""
    init_draw: int = Field(default=0, ge=0)
    """Number of the draw of initial weights at this seed; the order of the data stays the same."""

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_channels(self) -> int:
        return self.head_width or self.width // self.n_heads

    @property
    def rotated_channels(self) -> int:
        return int(self.head_channels * self.rotated_share)

    @property
    def mlp_width(self) -> int:
        return round(self.mlp_ratio * self.width)


class Optim(Section):
    class_: str = Field(default="", alias="class")
    """An optimizer of one's own: "my_opt.py:MyOptimizer" (a file beside the config) or "package.module:MyOptimizer"."""
    options: dict[str, Scalar | tuple[Scalar, ...]] = {}
    """Passed on to the class of one's own, as keyword arguments."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon" is for the hidden matrices; the other parameters keep AdamW."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak rate of AdamW's parameters."""
    muon_learning_rate: float = Field(default=0.02, gt=0)
    """Peak rate of Muon's parameters: the hidden matrices."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of Muon's momentum."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; applies to matrices, not to norms, biases and embeddings."""
    weight_decay_schedule: Literal["rate", "corrected", "constant"] = "rate"
    """Decay of a step: rate × weight_decay, so that it falls as the rate does; "corrected": with the rate's square
    (Defazio 2025, arXiv:2506.02285); "constant": peak rate × weight_decay in every step."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 is off."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Learning rate after the warmup. "wsd" is constant, then decays linearly over the last `decay_fraction`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the rate rises linearly to its peak."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps in which a wsd schedule decays."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step as a fraction of the peak."""
    mup_base_width: int = Field(default=0, ge=0)
    """Width at which the rates were tuned; matrices with a wide input get rate × base / width. 0 is off."""


class Budget(Section):
    steps: int = Field(default=100, ge=1)
    """Optimizer steps of the run."""


class Parallel(Section):
    strategy: Literal["replicate", "fsdp", "hybrid"] = "replicate"
    """Every rank holds all weights, or a shard ("fsdp"), or groups of ranks share a copy ("hybrid")."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": a GPU for each rank of a machine if it has as many, else the CPU."""
    share_gpus: bool = False
    """Ranks of a machine with fewer GPUs share them, and communicate over gloo: slow, for trying several ranks."""
    shard_ranks: int = Field(default=2, ge=2)
    """Hybrid only: ranks that share one copy of the weights; the world is a multiple of it."""
    island_ranks: int = Field(default=1, ge=1)
    """With [islands]: ranks that share the work of an island; the world is a multiple of it."""
    reshard_after_forward: bool = True
    """FSDP: free gathered weights between forward and backward; less memory, one more all-gather."""
    scatter_gradients: Literal["micro-batch", "step"] = "micro-batch"
    """FSDP: spread gradients over the ranks after each micro-batch, or once a step: less traffic, but every rank then
    holds whole gradients. Exact sums make it the same bits."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations. Changes no bit of the result."""
    cuda_graphs: bool = False
    """Replay each micro-batch's kernels as one CUDA graph: for GPUs that would wait for the host. Changes no bit."""


class Numerics(Section):
    exact: bool = True
    """Round every micro-batch's gradient onto a grid, so that sums are exact in any order (trainer/exact.py)."""
    headroom_bits: int = Field(default=5, ge=1, le=10)
    """A gradient may grow by 2^this over its recent maximum before the step is redone on a coarser grid."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16" runs the model under autocast; master weights and optimizer stay float32."""
    threads: int = Field(default=1, ge=1)
    """CPU threads per rank. Some CPU kernels sum in an order that depends on it, so it is part of the fingerprint."""
    compile: bool = False
    """torch.compile each block, and on a GPU head and loss."""
    tf32: bool = False
    """fp32 on a GPU: matrix products and convolutions may round their inputs to TF32, 10 bits; many times faster."""


class Checkpoint(Section):
    every_steps: int = Field(default=50, ge=0)
    """Save after every so many steps; 0 saves only at the end."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Checkpoints of steps that this number divides are never removed; 0 keeps none of them."""
    memory_every_steps: int = Field(default=0, ge=0)
    """Copy the state into the machine's memory (/dev/shm) after every so many steps; 0 is off. Restarts then lose no
    more steps than that. Of several machines, each also keeps what the one before it holds, so that one may die."""
    max_failures: int = Field(default=3, ge=1)
    """Failed saves in a row after which the run stops; until then it trains on and tries again at the next."""


class Eval(Section):
    every_steps: int = Field(default=50, ge=0)
    """Evaluate after every so many steps and at the end; 0 evaluates only at the end."""
    max_tokens: int = Field(default=65_536, ge=1)
    """Tokens scored per set, spread evenly over it."""
    sets: tuple[str, ...] = ("val", "repo") if builtin.IN_CHECKOUT else ("val",)
    """"val" (text kept from training), "repo" (this repository's own source, or the installed package's), or names from
    `eval.sources`. The default has "repo" only in a checkout of the repository."""
    sources: dict[str, str] = {}
    """Further held-out sets: name = path, glob, or "hub:OWNER/NAME@COMMIT[:SPLIT]"."""


class Elastic(Section):
    mode: Literal["restart", "quorum"] = "restart"
    """When a rank dies: torchrun restarts all ranks, or the others finish the step; see `python -m trainer launch`."""
    step_timeout_seconds: float = Field(default=300.0, gt=0)
    """A rank without progress for so long counts as hung: stacks are dumped and its process ends."""
    startup_timeout_seconds: float = Field(default=1800.0, gt=0)
    """The same before an attempt's first step: kernels may have to be compiled, a tokenizer trained.

    Reading and encoding data counts as progress."""
    takeover_seconds: float = Field(default=0.0, ge=0)
    """With `launch --islands`: a cluster that has had no launcher for so long is taken over by another one; 0: after
    `step_timeout_seconds`."""


class Islands(Section):
    count: int = Field(default=0, ge=0, le=1024)
    """K: virtual islands, each with weights of its own and every K-th micro-batch of a step; any number of ranks up to
    K may compute them. 0 is off: one set of weights for all."""
    inner_steps: int = Field(default=30, ge=1)
    """H: steps that islands take between two exchanges of what they have learnt. The last step ends a round too."""
    outer_learning_rate: float = Field(default=0.7, gt=0)
    """Rate of the outer step, along the mean of the islands' changes; 1 without momentum takes the mean of weights."""
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Nesterov momentum of the outer step; 0 is off."""
    fragments: int = Field(default=1, ge=1)
    """Parts of the weights that are exchanged in turn, spread evenly over `inner_steps`."""
    overlap_steps: int = Field(default=0, ge=0)
    """Steps that islands go on with while an exchange travels; it is applied after so many."""
    mixing: float = Field(default=0.0, ge=0, lt=1)
    """Share of an island's own weights that is kept when the outer weights arrive; 0 replaces them."""
    quantise: Literal["none", "int8", "int4"] = "none"
    """Width of what is sent of a change; what rounding leaves out is added to the next (error feedback)."""


class Distil(Section):
    runs: tuple[str, ...] = ()
    """Directories of finished runs with this run's tokenizer, the teachers: the target of each token becomes a mixture
    of the text's token and of their probabilities, averaged. Empty: the text alone."""
    weights_sha256: tuple[str, ...] = ()
    """Digests of the weights that they ended with, in the same order, as `inspect` shows them. A directory may change,
    and the run must not."""
    weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the teachers' probabilities in the target; 1 leaves nothing to the text's own tokens."""


class Sentinel(Section):
    audit: str = "0"
    """Share of the micro-batches that a second rank computes too, such as "1/32"; "0" is off."""
    state_hash_every_steps: int = Field(default=0, ge=0)
    """Check the reduction, and weights, moments and grids, in every so many steps; 0 is off."""
    act: Literal["repair", "report", "stop"] = "repair"
    """Action where bits differ: compute again and copy from a replica, log and train on, or stop."""
    quarantine_within: int = Field(default=16, ge=0)
    """A rank that is wrong a second time within so many checked steps is quarantined: the job ends with exit status 76
    and names the rank's node; under `launch` that worker alone leaves. 0 is off: what was repaired is only logged,
    however often."""

    @property
    def on(self) -> bool:
        return Fraction(self.audit) > 0 or self.state_hash_every_steps > 0


class Wandb(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """"auto": online if a key is in the environment or netrc, else offline. WANDB_MODE overrides."""
    project: str = "toprope"
    """W&B project that the run is in."""
    entity: str = ""
    """User or team that owns it; empty: the key's own."""
    group: str = ""
    """Runs of one group are shown together."""
    tags: tuple[str, ...] = ()
    """Labels of the run."""
    job_type: str = "train"
    """Kind of work, by which W&B groups runs too."""


class Tensorboard(Section):
    on: bool = False
    """Write RUN/tensorboard too, the same curves as in W&B. Needs the package: pip install 'toprope[tensorboard]'."""


class FaultEntry(Section, extra="allow"):
    """One planned fault, as far as all kinds share its settings. The kinds and their own settings: trainer/faults/."""

    kind: str
    """Name of the fault: trainer/faults/ has one class for each."""
    rank: int | str = "any"
    """A number, "any" (one drawn by `seed`), "all", "rank0", or "writer" (who commits checkpoints)."""
    at_step: int | None = Field(default=None, ge=1)
    """Step (the first is 1) during whose computing, saving or evaluating it strikes."""
    at_seconds: float | None = Field(default=None, ge=0)
    """Seconds after the job began, instead of a step; such faults are made from outside the worker."""
    phase: str = ""
    """Phase of a rank's work (trainer/phases.py) at which it strikes; default the kind's usual one."""
    attempt: int | None = Field(default=None, ge=0)
    """Attempt in which it strikes; default the first that gets there. No fault fires twice on a rank."""


class Config(Section):
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides initial weights, the order of the data and dropout."""
    data: Data = Data()
    """The text, its split, its tokens, and how many a step takes."""
    model: Model = Model()
    """The GPT: its sizes and switches."""
    init_from: str = ""
    """"hf:DIR" begins with the weights of a folder of transformers instead of random ones (docs/export.md)."""
    optim: Optim = Optim()
    """Optimizers, learning rates and their schedule."""
    budget: Budget = Budget()
    """When the run is finished."""
    parallel: Parallel = Parallel()
    """Division of the work among ranks. Changes no bit of the result."""
    numerics: Numerics = Numerics()
    """Rounding and addition of numbers."""
    islands: Islands = Islands()
    """Virtual clusters that train apart and exchange changes of the weights now and then. Off by default."""
    distil: Distil = Distil()
    """Finished runs whose averaged probabilities are learnt from, beside the text. Off by default."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved, and what is kept."""
    eval: Eval = Eval()
    """When the model is scored, and on what."""
    elastic: Elastic = Elastic()
    """Limits of time after which a rank counts as hung."""
    sentinel: Sentinel = Sentinel()
    """Checks for ranks that compute, receive or keep wrong bits, and the action then. Changes no bit of the result."""
    wandb: Wandb = Wandb()
    """Display of the run in Weights & Biases."""
    tensorboard: Tensorboard = Tensorboard()
    """Curves for TensorBoard."""
    faults: tuple[FaultEntry, ...] = ()
    """Planned faults, as [[faults]] tables. None by default."""

    @property
    def flex_attention(self) -> bool:
        """True if compiled blocks on a GPU attend by FlexAttention: deterministic, and faster than flash attention is
        then. Without exact sums any kernel will do, and cuDNN's is the fastest."""
        model, numerics = self.model, self.numerics
        fits = not model.dropout and not model.class_ and model.context % 128 == 0 and model.head_channels >= 16
        return numerics.compile and numerics.exact and fits


# These sections decide the weights. Everything else may change between attempts of one run.
MATHEMATICS = ("seed", "data", "model", "optim", "budget", "numerics", "islands", "distil")
NOT_MATHEMATICS = ("data.cache_dir", "data.streaming", "distil.runs")
# Left out at the value that changes nothing, so that runs older than the setting keep their fingerprint.
ADDED_LATER = {
    "data.deduplicate": "exact",
    "data.decontaminate": "off",
    "data.unique_tokens": 0,
    "data.mixture": [],
    "model.init_draw": 0,
    "optim.weight_decay_schedule": "rate",
    "model.class": "",
    "optim.class": "",
    "numerics.tf32": False,
    "model.loss_chunk_tokens": 0,
    "model.bf16_residual": False,
    "model.fp8_head": False,
    "model.head_width": 0,
    "model.norm_gain": False,
    "model.norm_epsilon": 0.0,
    "model.rope_scaling": "none",
    "model.rope_factor": 8.0,
    "model.rope_original_context": 8192,
    "model.rotated_share": 1.0,
    "model.qkv_biases": False,
    "model.parallel_block": False,
    **{f"islands.{name}": field.default for name, field in Islands.model_fields.items()},
    "distil.weights_sha256": [],
    "distil.weight": Distil().weight,
}
# These say where the text is. What it is is known when it has been read: a run is compared by data_sha256 (rundir.py).
PLACES_OF_TEXT = ("data.source", "data.revision", "data.subset", "data.hub_split", "data.text_column")


def load(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML config, its `extends` base, then `key=value` overrides. Raises ConfigError naming every problem."""
    tree = tomlfile.read_extended(path, anchored)
    if isinstance(tree.get("config"), str):  # every campaign has this key, and no config
        fact = f"{path} is a campaign: a plan for breaking runs of {path.parent / tree['config']}."
        raise ConfigError([f"{fact}\n  `python -m trainer chaos {path}` carries it out; `train` takes a config."])
    problems = [problem for text in overrides for problem in tomlfile.override(tree, text, Config)]
    if problems:
        raise ConfigError(problems)
    return parse(anchored(tree, Path()))


def anchored(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make paths of files of one's own code absolute: in a file they start from its folder, else from the current one.

    Settings may also be flat, as an arm's: {"model.class": …}.
    """
    if isinstance(tree.get("init_from"), str) and tree["init_from"].startswith(config_rules.HF):
        tree["init_from"] = config_rules.HF + str(folder.absolute() / tree["init_from"].removeprefix(config_rules.HF))
    distil = tree.get("distil")
    for node, name in ((tree, "distil.runs"), (distil, "runs")):
        if isinstance(node, dict) and isinstance(node.get(name), list | tuple):
            node[name] = [str(folder.absolute() / run) if isinstance(run, str) else run for run in node[name]]
    for setting in own_code.SETTINGS:
        section, _, key = setting.partition(".")
        for node, name in ((tree, setting), (tree.get(section), key)):
            if isinstance(node, dict) and isinstance(node.get(name), str):
                node[name] = own_code.anchored(node[name], folder)
    held_out = tree.get("eval")
    sources = held_out.get("sources") if isinstance(held_out, dict) else None
    named = [(tree, key) for key in tree if key.startswith("eval.sources.")]
    named += [(sources, name) for name in sources] if isinstance(sources, dict) else []
    for node, name in named:
        if isinstance(node[name], str):
            node[name] = own_code.anchored(node[name], folder)
    return tree


def parse(tree: Mapping[str, Any], check_rules: bool = True) -> Config:
    """Validate a tree of settings. Raises ConfigError with all problems at once.

    Without `check_rules` only keys and types are checked, as for a config that a run was trained with: a rule that was
    added since must not close the run.
    """
    try:
        config = Config.model_validate(tomlfile.tuples(tree))
    except ValidationError as error:
        known = list(flatten(Config().model_dump()))
        mistakes = tomlfile.mistakes(error, tree)
        raise ConfigError([config_rules.explain(mistake, known) for mistake in mistakes]) from None
    if check_rules and (problems := config_rules.contradictions(config) + config_rules.without_effect(config)):
        raise ConfigError(problems)
    return config


def check_world(config: Config, world_size: int) -> None:
    """Raise ConfigError if `config` cannot use a world of so many ranks."""
    problems: list[str] = []
    m, shard = config.data.micro_batches, config.parallel.shard_ranks
    if world_size > m:
        problems.append(
            f"data.micro_batches = {m} leaves {world_size - m} of {world_size} ranks without work.\n"
            f"  A micro-batch is the smallest unit of work. Start at most {m} ranks, or set data.micro_batches to "
            f"{world_size} or more."
        )
    if config.islands.count:
        problems += _clusters_problems(config, world_size)
    if config.parallel.strategy == "hybrid" and world_size % shard:
        problems.append(
            f"parallel.shard_ranks = {shard} does not divide the world of {world_size} ranks.\n"
            f"  A hybrid mesh is replicas × shards. Start a multiple of {shard} ranks, or change parallel.shard_ranks."
        )
    if problems:
        raise ConfigError(problems)


def _clusters_problems(config: Config, world_size: int) -> list[str]:
    islands, ranks = config.islands.count, config.parallel.island_ranks
    if world_size % ranks:
        return [
            f"parallel.island_ranks = {ranks} does not divide the world of {world_size} ranks.\n"
            f"  Clusters have equally many ranks. Start a multiple of {ranks} ranks, or change parallel.island_ranks."
        ]
    if world_size > islands * ranks:
        return [
            f"islands.count = {islands} leaves {world_size - islands * ranks} of {world_size} ranks without an island, "
            f"with parallel.island_ranks = {ranks}.\n"
            f"  Clusters compute whole islands. Start at most {islands * ranks} ranks, or raise parallel.island_ranks."
        ]
    return []


def fingerprint(config: Config, parent: Mapping[str, Any] | None = None) -> str:
    """SHA-256 (hex) of what decides the weights: settings, and the state that the run begins from (branch.py)."""
    return hashlib.sha256(json.dumps(mathematics(config, parent), sort_keys=True).encode()).hexdigest()


def mathematics(config: Config, parent: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what decides the weights, flat: {"optim.learning_rate": 0.001, ...}."""
    flat = flatten(config.model_dump(mode="json", include=set(MATHEMATICS)))
    for setting, name in config_rules.own_names(config).items():
        # The place of a file does not count, its content does.
        flat[setting] = name.rpartition(":")[2]
        section = setting.partition(".")[0]
        flat |= {f"{section}.code {part}": digest for part, digest in own_code.digests(name, setting).items()}
    if parent:
        flat |= {f"parent.{key}": parent[key] for key in ("step", "state_sha256")}
    if config.init_from:
        flat["init_from"] = _weights_digest(config)
    if flat["data.decontaminate"] == "report":
        flat["data.decontaminate"] = "off"  # what is read stays the same
    flat["distil.weights_sha256"] = sorted(flat["distil.weights_sha256"])  # their mean has no order
    left_out = {key for key, unchanged in ADDED_LATER.items() if flat[key] == unchanged}.union(NOT_MATHEMATICS)
    if config.distil.runs:
        left_out.discard("distil.weight")
    return {key: value for key, value in flat.items() if key not in left_out}


def _weights_digest(config: Config) -> str:
    """Digest of the weights that the run begins with. Raises ConfigError if they are gone."""
    try:
        stats = [(path, path.stat()) for path in config_rules.weights_of(config)]
        return files.json_sha256([_file_digest(path, about.st_size, about.st_mtime_ns) for path, about in stats])
    except OSError as error:
        raise ConfigError([of_system(error, "init_from cannot be read", "", "Name a folder that can be.")]) from None


@functools.cache
def _file_digest(path: Path, size: int, time_ns: int) -> str:
    return files.sha256(path)


def same_but_for_places(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """True if two results of `mathematics` differ only in where the text and the tokenizer's file are."""
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} - {*PLACES_OF_TEXT}
    if not all(any(key.startswith("data.code ") for key in tree) for tree in (old, new)):
        changed = {key for key in changed if not key.startswith("data.code ")}  # of a function that a file replaces
    named = {tree.get("data.tokenizer") for tree in (old, new)} & {"bpe", "bytes", "chars"}
    return not changed - ({"data.tokenizer"} if not named else set())


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a config file, for editors: every setting with its type, default and description."""
    schema = Config.model_json_schema()
    extends = {"type": "string", "description": "Path of the config, relative to this file, that this one changes."}
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A toprope config"}
    return schema | title | {"properties": {"extends": extends} | schema["properties"]}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting on which two flat trees disagree."""
    pairs = [(key, old.get(key, "(absent)"), new.get(key, "(absent)")) for key in sorted(old.keys() | new.keys())]
    return [f"{key}: {json.dumps(before)} → {json.dumps(after)}" for key, before, after in pairs if before != after]


def as_toml(config: Config) -> str:
    """Return a file that `load` reads back as the same config; settings at their defaults are left out."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    faults = tree.pop("faults", [])
    tables = {name: tree.pop(name) for name in list(tree) if isinstance(tree[name], dict)}
    lines = tomlfile.lines(tree)
    named = [(f"[{name}]", table) for name, table in tables.items()]
    for header, table in named + [("[[faults]]", fault) for fault in faults]:
        lines += ["", header, *tomlfile.lines(table)]
    return "\n".join(lines).lstrip() + "\n"
