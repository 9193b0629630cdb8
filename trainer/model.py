"""One GPT. Every element of it is a switch of `config.Model`; each class names the paper its element comes from.

Axes: B batch, T sequence, D width, H query heads, K key/value heads, N = H + K, G = H + 2K, C channels of a head,
P pairs of channels that rotate (C = 2P, or more), F hidden width of the MLP, V vocabulary.

Parameters are touched only inside `forward`, so that FSDP2 may gather them just before and free them just after.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from trainer import config, fp8, own_model, torch_versions
from trainer.errors import ConfigError

NORM_EPSILON = 1e-6
LAYER_NORM_EPSILON = 1e-5
# Its compiler loses the gradient of an autograd.Function that saves its own output, without a word.
LOSES_GRADIENTS = torch_versions.release(torch.__version__) < (2, 12)
EMBEDDING_STD = 0.02
VALUE_GATE_START = 0.5  # as modded-nanogpt
LLAMA3_FEWEST_TURNS, LLAMA3_MOST_TURNS = 1.0, 4.0  # of every Llama from 3.1 on
BIGRAM_MULTIPLIERS = (2_654_435_769, 2_246_822_519)  # odd, near 2^31; × a token id below 2^20 stays in int64


class Role(StrEnum):
    """The part that a module plays. Optimizer groups, sharding, initialisation, faults and costs ask for roles.

    A parameter has the role of the innermost module around it that declares one (`role_of_parameters`).
    """

    EMBEDDING = "embedding"
    """A table that is looked up: it costs no FLOPs and is not decayed."""
    BIGRAMS = "bigrams"
    """An embedding that adds to another one, so that "zero_proj" starts it at zero."""
    BLOCK = "block"
    """One layer: the unit of sharding, of compilation and of recomputing activations."""
    OUTPUT = "output"
    """A projection of a block back into the residual stream."""
    NORM = "norm"
    GATE = "gate"
    """A learned scalar."""
    HEAD = "head"
    """The projection to logits, if it has weights of its own."""


TABLES = (Role.EMBEDDING, Role.BIGRAMS)


def build(config: config.Config, vocab_size: int, device: torch.device) -> nn.Module:
    """Build the model of a config with its initial values, on `device`, alike on every rank; not yet sharded."""
    if config.model.fp8_head:
        fp8.require(device)
    model = construct(config.model, vocab_size, recompute=config.parallel.activation_checkpointing)
    initialise(model, config.model, config.seed)
    model.to(device)
    if config.numerics.compile:
        compile_blocks(model, flex_attention=config.flex_attention)
    return model


def compile_blocks(model: nn.Module, flex_attention: bool = False) -> None:
    """Compile each block, and on a GPU head and loss of a GPT, so that bits depend on shapes and on nothing earlier.

    By default torch makes kernels for any size once it has seen two, and once it has made 8 it runs what is new
    uncompiled, with other bits and no more than a warning.
    """
    _compile_without_limit()
    for block in blocks_of(model):
        block.compile(dynamic=False)
    # On CPUs they stay as they are: other kernels would change the bits of runs that were made with these.
    if isinstance(model, GPT) and model.embed.weight.is_cuda:
        model.head_and_loss = torch.compile(model.head_and_loss, dynamic=False)
        if flex_attention:
            model.attend_with_flex()


@torch_versions.patch(
    "a block that is given many shapes may run uncompiled, with other bits.",
    {
        "torch._dynamo.config:recompile_limit": None,
        "torch._dynamo.config:accumulated_recompile_limit": None,
        "torch._dynamo.config:fail_on_recompile_limit_hit": None,
    },
)
def _compile_without_limit() -> None:
    from torch._dynamo import config as dynamo

    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 2**20
    dynamo.fail_on_recompile_limit_hit = True


def construct(settings: config.Model, vocab_size: int, device: str = "cpu", *, recompute: bool = False) -> nn.Module:
    """Make a model without filling its parameters; on device "meta" it holds no numbers.

    Every model is made here, also one of the user's own (`model.class`). Called with input and target tokens a model
    returns `Losses`; its modules may declare a `role`. `recompute` makes the backward pass compute each block's
    activations again instead of keeping them. Raises ConfigError for a model of one's own that cannot be made.
    """
    if settings.class_:
        with torch.random.fork_rng(devices=()), torch.device(device):
            torch.manual_seed(0)  # buffers that are drawn must be the same on every rank
            own = own_model.construct(settings, vocab_size)
        _complete_roles(own, vocab_size)
        if recompute:
            for block in blocks_of(own):
                block.forward = functools.partial(_recomputed, block.forward, settings.dropout > 0)
        return own
    with torch.device(device):
        model = GPT(settings, vocab_size)
    for block in model.blocks:
        block.recompute = recompute  # pyright: ignore[reportArgumentType]
    return model


def _complete_roles(model: nn.Module, vocab_size: int) -> None:
    """Give the modules of a model of one's own the roles that they do not declare.

    Without declared blocks, the children of its outermost module lists are blocks. Raises ConfigError for a word that
    is no role.
    """
    in_lists: list[nn.Module] = []
    for name, module in model.named_modules():
        role = getattr(module, "role", None)
        if role is None and isinstance(module, nn.Embedding):
            role = Role.EMBEDDING
        elif role is None and isinstance(module, nn.Linear) and module.out_features == vocab_size:
            role = Role.HEAD
        if role is not None:
            if role not in [*Role]:
                known = ", ".join(Role)
                raise ConfigError([f"module {name or 'the model'} has role = {role!r}.\n  The roles are {known}."])
            module.role = Role(role)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        if isinstance(module, nn.ModuleList) and not any(
            module is part for outer in in_lists for part in outer.modules()
        ):
            in_lists += [child for child in module if not isinstance(child, nn.ModuleList)]
    if not blocks_of(model):
        for block in in_lists:
            if getattr(block, "role", None) is None:
                block.role = Role.BLOCK  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


def _recomputed(forward: Callable[..., Any], keep_rng: bool, *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=keep_rng, **named)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the model's blocks in the order of computing."""
    return [module for module in model.modules() if getattr(module, "role", None) is Role.BLOCK]


def role_of_parameters(model: nn.Module) -> dict[str, Role | None]:
    """Return each parameter's name and role, in the model's order; None where no module around it declares one."""
    roles: dict[str, Role | None] = dict.fromkeys(name for name, _ in model.named_parameters())
    for prefix, module in model.named_modules():  # outer modules come first, so that inner ones override them
        role = getattr(module, "role", None)
        if role is not None:
            # A tied parameter has the name of its first place only.
            roles |= {name: role for name, _ in module.named_parameters(prefix) if name in roles}
    return roles


class Losses(NamedTuple):
    objective: Tensor
    """Cross-entropy plus penalties; the gradient is taken of this. Scalar, float32."""
    cross_entropy: Tensor
    """Mean nats per token. Scalar, float32."""


@dataclass(frozen=True)
class Lesson:
    """Teachers' probabilities for a micro-batch, and their weight (distil.py)."""

    probabilities: Callable[[int, int], Tensor]
    """(first, last) to the probabilities float32[N, V] of tokens first to last − 1 of the flattened micro-batch."""
    weight: float
    """Their share in the target; the rest is the text's token."""


class GPT(nn.Module):
    """Decoder-only transformer with pre-norm residual blocks (Radford et al. 2019, GPT-2).

    Without targets `forward` returns logits_BTV in float32, with targets `Losses`. Rows of the vocabulary beyond the
    tokenizer's are not masked: no target names them, so training drives their probability to zero.
    Parameters are left unfilled: call `initialise`. A model built on the meta device needs `to_empty` and
    `reset_buffers` before that.
    """

    def __init__(self, model: config.Model, vocab_size: int) -> None:
        super().__init__()
        self.settings = model
        self.embed = Embedding(vocab_size, model.width)
        self.embed_positions = Embedding(model.context, model.width) if model.positions == "learned" else None
        self.embed_bigrams = Bigrams(model.bigram_buckets, model.width) if model.bigram_buckets else None
        self.blocks = nn.ModuleList(Block(model, layer, vocab_size) for layer in range(model.n_layers))
        self.final_norm = _norm(model)
        # A tied head has no module of its own: one name per tensor for checkpoints, hashes and shards.
        self.head = None if model.tied_embeddings else Linear(model.width, vocab_size, bias=False, role=Role.HEAD)
        if model.positions == "rope":
            shape = (model.context, model.rotated_channels // 2, 2)
            self.register_buffer("rotation_TP2", torch.empty(shape), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill the table of rotations, which is neither a parameter nor part of the state."""
        if self.settings.positions == "rope":
            self.rotation_TP2 = _rotations(self.settings).to(self.rotation_TP2.device)

    def attend_with_flex(self) -> None:
        """Have compiled blocks attend by FlexAttention, whose backward pass is deterministic and fast on GPUs."""
        from torch.nn.attention.flex_attention import create_block_mask

        t, device = self.settings.context, self.embed.weight.device
        mask = create_block_mask(_is_past, None, None, t, t, device=device)  # pyright: ignore[reportArgumentType]
        for block in self.blocks:
            block.attention.causal_mask = mask  # pyright: ignore

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor | None = None, lesson: Lesson | None = None) -> Any:
        """Token ids to float32 logits_BTV, or to `Losses` if targets are given. T may be shorter than the context.

        With a lesson the objective is of its mixture of targets; the cross-entropy stays that of the text.
        """
        x_BTD = self.hidden(inputs_BT)
        head_VD = self.head_weight
        if targets_BT is not None and lesson is not None:
            return self._losses_taught(x_BTD, head_VD, targets_BT, lesson)
        if targets_BT is not None and self.settings.loss_chunk_tokens:
            return self._losses_by_chunks(x_BTD, head_VD, targets_BT)
        if targets_BT is None:
            return self._logits(x_BTD, head_VD)
        return self.head_and_loss(x_BTD, head_VD, targets_BT)

    @property
    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def hidden(self, inputs_BT: Tensor) -> Tensor:
        """x_BTD after the last norm, which the head reads."""
        x_BTD = self.embed(inputs_BT)
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions(torch.arange(inputs_BT.shape[1], device=inputs_BT.device))
        if self.embed_bigrams is not None:
            x_BTD = x_BTD + self.embed_bigrams(inputs_BT)
        x_BTD = F.dropout(x_BTD, self.settings.dropout, self.training)
        if self.settings.bf16_residual and torch.is_autocast_enabled(x_BTD.device.type):  # `sample` is in float32
            x_BTD = x_BTD.bfloat16()
        rotation_TP2 = self.rotation_TP2[: inputs_BT.shape[1]] if self.settings.positions == "rope" else None
        for block in self.blocks:
            x_BTD = block(x_BTD, inputs_BT, rotation_TP2)
        return self.final_norm(x_BTD)

    def head_and_loss(self, x_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> Losses:
        """Compiled, it makes no float32 copy of the logits."""
        return losses(self._logits(x_BTD, head_VD), targets_BT, self.settings.z_loss)

    def _logits(self, x: Tensor, head_VD: Tensor) -> Tensor:
        product = fp8.linear if self.settings.fp8_head else F.linear
        logits = product(x, head_VD).float()
        if self.settings.logit_softcap:
            logits = self.settings.logit_softcap * torch.tanh(logits / self.settings.logit_softcap)
        return logits

    def _losses_by_chunks(self, x_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> Losses:
        """`losses` without the logits of all tokens at once: the backward pass computes each chunk's again."""
        chunks = (t.split(self.settings.loss_chunk_tokens) for t in (x_BTD.flatten(0, 1), targets_BT.flatten()))
        sums = [
            checkpoint(self._loss_sums, x, head_VD, targets, use_reentrant=False, preserve_rng_state=False)
            for x, targets in zip(*chunks, strict=True)
        ]
        cross_entropy, penalty = (torch.stack(parts).sum() / targets_BT.numel() for parts in zip(*sums, strict=True))
        return Losses(cross_entropy + self.settings.z_loss * penalty, cross_entropy)

    def _losses_taught(self, x_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, lesson: Lesson) -> Losses:
        """Losses whose target is the lesson's mixture (Hinton et al. 2015, at temperature 1).

        By chunks where `loss_chunk_tokens` asks for them, teachers' probabilities included.
        """
        x_ND, targets_N, sums = x_BTD.flatten(0, 1), targets_BT.flatten(), []
        size = self.settings.loss_chunk_tokens or len(targets_N)
        for first in range(0, len(targets_N), size):
            part = slice(first, min(first + size, len(targets_N)))
            arguments = (x_ND[part], head_VD, targets_N[part], lesson, part)
            if size >= len(targets_N):
                sums.append(self._taught_sums(*arguments))
            else:
                sums.append(checkpoint(self._taught_sums, *arguments, use_reentrant=False, preserve_rng_state=False))
        cross_entropy, taught, penalty = (torch.stack(part).sum() / len(targets_N) for part in zip(*sums, strict=True))
        objective = (1 - lesson.weight) * cross_entropy + lesson.weight * taught
        return Losses(objective + self.settings.z_loss * penalty, cross_entropy)

    def _taught_sums(
        self, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, lesson: Lesson, part: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over tokens: cross-entropy to the text, to the teachers, and the square of log Z."""
        logits_NV = self._logits(x_ND, self._head_of_chunks(head_VD))
        log_NV = logits_NV.log_softmax(-1)
        taught = -(lesson.probabilities(part.start, part.stop) * log_NV).sum()
        cross_entropy = F.nll_loss(log_NV, targets_N, reduction="sum")
        if not self.settings.z_loss:
            return cross_entropy, taught, torch.zeros_like(cross_entropy)
        return cross_entropy, taught, torch.logsumexp(logits_NV, dim=-1).square().sum()

    def probabilities(self, x_ND: Tensor) -> Tensor:
        """Probabilities float32[N, V] of what `hidden` gave of N tokens."""
        return self._logits(x_ND, self._head_of_chunks(self.head_weight)).softmax(-1)

    def _head_of_chunks(self, head_VD: Tensor) -> Tensor:
        """Autocast would cast it once for all chunks, and add up their gradients in 16 bits."""
        kind = head_VD.device.type
        if self.settings.fp8_head or not torch.is_autocast_enabled(kind):
            return head_VD
        return head_VD.to(torch.get_autocast_dtype(kind))

    def _loss_sums(self, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = self._logits(x_ND, self._head_of_chunks(head_VD))
        cross_entropy = F.cross_entropy(logits_NV, targets_N, reduction="sum")
        if not self.settings.z_loss:
            return cross_entropy, torch.zeros_like(cross_entropy)
        return cross_entropy, torch.logsumexp(logits_NV, dim=-1).square().sum()


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm: Xiong et al. 2020).

    parallel_block: x + attention(norm(x)) + mlp(norm(x)) (Wang & Komatsuzaki 2021, GPT-J; Black et al. 2022, GPT-NeoX).
    """

    role = Role.BLOCK

    def __init__(self, model: config.Model, layer: int, vocab_size: int) -> None:
        super().__init__()
        self.attention_norm = _norm(model)
        self.attention = Attention(model, layer, vocab_size)
        self.mlp_norm = _norm(model)
        self.mlp = MLP(model)
        self.is_parallel = model.parallel_block
        self.dropout = model.dropout
        self.recompute = False
        """Keep only the block's input for the backward pass and compute the rest again. Changes no bit."""

    def forward(self, x_BTD: Tensor, inputs_BT: Tensor, rotation_TP2: Tensor | None) -> Tensor:
        # Without gradients nothing is kept for a backward pass, so there is nothing to save by recomputing.
        if not (self.recompute and torch.is_grad_enabled()):
            return self._forward(x_BTD, inputs_BT, rotation_TP2)
        keep_rng = self.dropout > 0  # dropout must draw the same mask again; saving the generator's state costs time
        arguments = (x_BTD, inputs_BT, rotation_TP2)
        return checkpoint(self._forward, *arguments, use_reentrant=False, preserve_rng_state=keep_rng)

    def _forward(self, x_BTD: Tensor, inputs_BT: Tensor, rotation_TP2: Tensor | None) -> Tensor:
        mixed_BTD = self.attention(self.attention_norm(x_BTD), inputs_BT, rotation_TP2)
        attended_BTD = x_BTD + F.dropout(mixed_BTD, self.dropout, self.training)
        read_BTD = x_BTD if self.is_parallel else attended_BTD
        return attended_BTD + F.dropout(self.mlp(self.mlp_norm(read_BTD)), self.dropout, self.training)


class Attention(nn.Module):
    """Causal multi-head attention (Vaswani et al. 2017).

    Grouped key/value heads: Ainslie et al. 2023. qk_norm: queries and keys are RMS-normalised per head, after
    Henry et al. 2020 and Dehghani et al. 2023; without a learned gain, as nanochat and modded-nanogpt, or with one
    that all heads share, as Qwen3.
    """

    q_gain: nn.Parameter | None
    k_gain: nn.Parameter | None

    def __init__(self, model: config.Model, layer: int, vocab_size: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.channels = model.n_heads, model.kv_heads, model.head_channels
        self.qk_norm, self.epsilon, self.dropout = model.qk_norm, model.norm_epsilon or NORM_EPSILON, model.dropout
        qkv_width = (self.heads + 2 * self.kv_heads) * self.channels
        self.qkv = Linear(model.width, qkv_width, bias=model.biases or model.qkv_biases)
        self.out = Linear(self.heads * self.channels, model.width, bias=model.biases, role=Role.OUTPUT)
        for name in ("q_gain", "k_gain"):
            has_gain = model.qk_norm and model.norm_gain
            self.register_parameter(name, nn.Parameter(torch.empty(self.channels)) if has_gain else None)
        self.causal_mask: Any = None
        has_values = model.value_embeddings and layer % 2 == 1
        self.embed_values = ValueEmbedding(vocab_size, self.kv_heads * self.channels) if has_values else None

    def forward(self, x_BTD: Tensor, inputs_BT: Tensor, rotation_TP2: Tensor | None) -> Tensor:
        b, t, _ = x_BTD.shape
        qkv_BTGC = self.qkv(x_BTD).view(b, t, self.heads + 2 * self.kv_heads, self.channels)
        qk_BTNC, v_BTKC = qkv_BTGC.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        if self.embed_values is not None:
            v_BTKC = v_BTKC + self.embed_values(inputs_BT).view(b, t, self.kv_heads, self.channels).to(v_BTKC.dtype)
        if self.qk_norm:
            qk_BTNC = self.normalise(qk_BTNC)
        if rotation_TP2 is not None:
            qk_BTNC = _rotate(qk_BTNC, rotation_TP2)
        q_BTHC, k_BTKC = qk_BTNC.split((self.heads, self.kv_heads), dim=2)
        dropout = self.dropout if self.training else 0.0
        y_BHTC = _attend(
            q_BTHC.transpose(1, 2), k_BTKC.transpose(1, 2), v_BTKC.transpose(1, 2), dropout, self.causal_mask
        )
        return self.out(y_BHTC.transpose(1, 2).flatten(2))

    def normalise(self, qk_BTNC: Tensor) -> Tensor:
        qk_BTNC = _rms_normalise(qk_BTNC, self.epsilon)
        if self.q_gain is None or self.k_gain is None:
            return qk_BTNC
        gain_NC = torch.cat((self.q_gain.expand(self.heads, -1), self.k_gain.expand(self.kv_heads, -1)))
        return qk_BTNC * gain_NC.to(qk_BTNC.dtype)


def _is_past(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


_traced_as = ""


@contextlib.contextmanager
def traced_as(device_type: str) -> Iterator[None]:
    """Choose operators as on another kind of device, whose memory is counted by tensors without data."""
    global _traced_as  # noqa: PLW0603
    before, _traced_as = _traced_as, device_type
    try:
        yield
    finally:
        _traced_as = before


def _attend(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, dropout: float, mask: Any = None) -> Tensor:
    """Causal attention; query heads share key/value heads in groups of H / K.

    `mask` is the block mask of FlexAttention (Dong et al. 2024), which is used while compiling.
    """
    if mask is not None and torch.compiler.is_compiling() and q_BHTC.shape[2] == mask.shape[-1]:
        from torch.nn.attention.flex_attention import flex_attention

        gqa = q_BHTC.shape[1] != k_BKTC.shape[1]
        return flex_attention(q_BHTC, k_BKTC, v_BKTC, block_mask=mask, enable_gqa=gqa)  # pyright: ignore
    if (_traced_as or q_BHTC.device.type) == "cpu" and v_BKTC.dtype == torch.bfloat16:
        # torch 2.13's CPU kernel is slow in bfloat16: plain matrix products took 0.2–0.6 of its time.
        group = q_BHTC.shape[1] // k_BKTC.shape[1]
        k_BHTC = k_BKTC.repeat_interleave(group, 1) if group > 1 else k_BKTC
        v_BHTC = v_BKTC.repeat_interleave(group, 1) if group > 1 else v_BKTC
        t = q_BHTC.shape[2]
        future_TT = torch.ones(t, t, dtype=torch.bool, device=q_BHTC.device).triu(1)
        scores_BHTT = (q_BHTC @ k_BHTC.transpose(2, 3)).float() * q_BHTC.shape[3] ** -0.5
        weights_BHTT = scores_BHTT.masked_fill(future_TT, -math.inf).softmax(3).to(v_BHTC.dtype)
        return F.dropout(weights_BHTT, dropout) @ v_BHTC
    if _traced_as == "cuda":
        dropout = 0.0  # fused kernels draw the mask again; a CPU has none with dropout, and would keep T × T
    return F.scaled_dot_product_attention(
        q_BHTC, k_BKTC, v_BKTC, dropout_p=dropout, is_causal=True, enable_gqa=q_BHTC.shape[1] != k_BKTC.shape[1]
    )


class MLP(nn.Module):
    """gelu (Hendrycks & Gimpel 2016), relu2 = relu(x)² (So et al. 2021) or swiglu = silu(a)·b (Shazeer 2020).

    gelu_tanh is the approximation of gelu that GPT-2 was trained with. swiglu has three matrices; set mlp_ratio = 8/3
    for the parameters of the others at 4.
    """

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.kind = model.mlp
        up_width = model.mlp_width * (2 if model.mlp == "swiglu" else 1)
        self.up = Linear(model.width, up_width, bias=model.biases)
        self.out = Linear(model.mlp_width, model.width, bias=model.biases, role=Role.OUTPUT)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = self.up(x_BTD)
        if self.kind == "gelu":
            return self.out(F.gelu(h_BTF))
        if self.kind == "gelu_tanh":
            return self.out(F.gelu(h_BTF, approximate="tanh"))
        if self.kind == "relu2":
            return self.out(_SquaredReLU.apply(h_BTF))
        gate_BTF, value_BTF = h_BTF.chunk(2, dim=-1)
        return self.out(F.silu(gate_BTF) * value_BTF)


class Embedding(nn.Embedding):
    role = Role.EMBEDDING

    def reset_parameters(self) -> None:
        """Do nothing: `initialise` does it. On the meta device torch would import its compiler here, over a second."""


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, *, bias: bool, role: Role | None = None) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.role = role

    def reset_parameters(self) -> None:
        """Do nothing, as for Embedding."""


class Bigrams(Embedding):
    """Embedding of hash(previous token, token); the first position sees token 0 before it (modded-nanogpt, 2025)."""

    role = Role.BIGRAMS

    def forward(self, input: Tensor) -> Tensor:
        previous_BT = F.pad(input[:, :-1], (1, 0))
        a, b = BIGRAM_MULTIPLIERS
        return super().forward((previous_BT * a ^ input * b) % self.num_embeddings)


class ValueEmbedding(nn.Module):
    """A table of values by token, times one learned gate (modded-nanogpt; after Zhou et al. 2024, value residuals)."""

    role = Role.GATE

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.table = Embedding(vocab_size, width)
        self.gate = nn.Parameter(torch.empty(1))  # not a 0-d tensor: FSDP2 shards axis 0

    def forward(self, inputs_BT: Tensor) -> Tensor:
        return self.gate * self.table(inputs_BT)


class RMSNorm(nn.Module):
    """x / rms(x) (Zhang & Sennrich 2019). Without a gain the matrix that follows can hold it (nanochat does so)."""

    weight: nn.Parameter | None

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.epsilon = model.norm_epsilon or NORM_EPSILON
        if model.norm_gain:
            self.role = Role.NORM
        self.register_parameter("weight", nn.Parameter(torch.empty(model.width)) if model.norm_gain else None)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD = _rms_normalise(x_BTD, self.epsilon)
        return y_BTD if self.weight is None else y_BTD * self.weight.to(y_BTD.dtype)


def _rms_normalise(x: Tensor, epsilon: float = NORM_EPSILON) -> Tensor:
    if LOSES_GRADIENTS and torch.compiler.is_compiling():
        return (x * _rms_scale(x, epsilon)).to(x.dtype)
    return _RMSNormalise.apply(x, epsilon)


def _rms_scale(x: Tensor, epsilon: float = NORM_EPSILON) -> Tensor:
    precise = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
    return (norm.square() / x.shape[-1] + epsilon).rsqrt()


class _RMSNormalise(torch.autograd.Function):
    """x / sqrt(mean x² + ε) over the last axis: half the time of F.rms_norm on CPU, whose backward is many kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, epsilon: float = NORM_EPSILON) -> Tensor:  # pyright: ignore
        scale = _rms_scale(x, epsilon)
        y = (x * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale), None


class _SquaredReLU(torch.autograd.Function):
    """relu(x)²: autograd would keep and read the input too, which costs as much as a gelu; this costs less."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)


def losses(logits_BTV: Tensor, targets_BT: Tensor, z_loss: float) -> Losses:
    """Mean cross-entropy, and the objective: plus z_loss · mean(log Z)² penalty (Chowdhery et al. 2022, PaLM)."""
    logits_NV = logits_BTV.flatten(0, 1)
    cross_entropy = F.cross_entropy(logits_NV, targets_BT.flatten())
    if not z_loss:
        return Losses(cross_entropy, cross_entropy)
    penalty = torch.logsumexp(logits_NV, dim=-1).square().mean()
    return Losses(cross_entropy + z_loss * penalty, cross_entropy)


def initialise(model: nn.Module, settings: config.Model, seed: int) -> None:
    """Fill every parameter from (seed, draw, its name, its full shape) alone: device, order, sharding do not matter.

    "gpt2": normal, sd 0.02, residual output projections divided by sqrt(2·n_layers) (Radford et al. 2019).
    "zero_proj": matrices normal with sd 1/sqrt(input width); residual output projections, an untied head and bigrams
    zero, so that every block starts as the identity (Zhang et al. 2019, Fixup; Yang et al. 2022, table 8).
    Drawn on the CPU in float32. Each rank draws whole tensors and keeps its shard, without communication.
    """
    roles = role_of_parameters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = _declared(model, name, parameter.shape, settings, seed)
            if value is None:
                value = _initial(name, roles[name], parameter.shape, settings, seed)
            value = value.to(parameter.device)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                value = distribute_tensor(value, mesh, placements, src_data_rank=None)
            parameter.copy_(value)


def _initial(name: str, role: Role | None, shape: torch.Size, settings: config.Model, seed: int) -> Tensor:
    if role is Role.GATE:
        return torch.full(shape, VALUE_GATE_START)
    if len(shape) < 2:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    if settings.init == "gpt2":
        deviation = EMBEDDING_STD / math.sqrt(2 * settings.n_layers) if role is Role.OUTPUT else EMBEDDING_STD
    elif role in (Role.OUTPUT, Role.HEAD, Role.BIGRAMS):
        deviation = 0.0
    else:
        deviation = EMBEDDING_STD if role is Role.EMBEDDING else shape[1] ** -0.5
    return torch.randn(shape, generator=_generator(name, settings, seed)) * deviation


def _declared(model: nn.Module, name: str, shape: torch.Size, settings: config.Model, seed: int) -> Tensor | None:
    generator = _generator(name, settings, seed)
    return own_model.initial_value(model, name, shape, generator) if settings.class_ else None


def _generator(name: str, settings: config.Model, seed: int) -> torch.Generator:
    # Keyed by the parameter's name, so a new parameter changes no other parameter's values.
    draw = f"/{settings.init_draw}" if settings.init_draw else ""
    key = hashlib.sha256(f"{seed}/{name}{draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))


def _norm(model: config.Model) -> nn.Module:
    if model.norm == "rmsnorm":
        return RMSNorm(model)
    norm = nn.LayerNorm(model.width, model.norm_epsilon or LAYER_NORM_EPSILON, bias=model.biases)  # Ba et al. 2016
    norm.role = Role.NORM  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    return norm


def _rotations(model: config.Model) -> Tensor:
    """cos and sin of position × frequency, float32, computed in float64: axes T, P, 2. Su et al. 2021 (RoPE)."""
    pairs = model.rotated_channels // 2
    frequency_P = model.rope_base ** -(torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
    if model.rope_scaling != "none":
        frequency_P = _slowed(frequency_P, model)
    angle_TP = torch.arange(model.context, dtype=torch.float64, device="cpu")[:, None] * frequency_P
    return torch.stack((angle_TP.cos(), angle_TP.sin()), dim=-1).float()


def _slowed(frequency_P: Tensor, model: config.Model) -> Tensor:
    """Frequencies for a longer context: all divided (Chen et al. 2023), or as Llama 3.1 does (Grattafiori et al. 2024).

    There, waves that turn LLAMA3_FEWEST_TURNS or less in the original context are slowed, those that turn
    LLAMA3_MOST_TURNS or more are kept, and between the two it goes over linearly.
    """
    slow_P = frequency_P / model.rope_factor
    if model.rope_scaling == "linear":
        return slow_P
    turns_P = model.rope_original_context * frequency_P / (2 * math.pi)
    kept_P = ((turns_P - LLAMA3_FEWEST_TURNS) / (LLAMA3_MOST_TURNS - LLAMA3_FEWEST_TURNS)).clamp(0, 1)
    return kept_P * frequency_P + (1 - kept_P) * slow_P


def _rotate(x_BTNC: Tensor, rotation_TP2: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels by its angle: a complex product is one kernel, a real one four.

    Channels beyond those of the table stay as they are.
    """
    turned = 2 * rotation_TP2.shape[1]
    if turned < x_BTNC.shape[-1]:
        return torch.cat((_rotate(x_BTNC[..., :turned], rotation_TP2), x_BTNC[..., turned:]), dim=-1)
    pairs_BTNP2 = x_BTNC.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor has no complex numbers, and fuses the real product itself
        a, b = pairs_BTNP2.unbind(-1)
        cos, sin = rotation_TP2[:, None].unbind(-1)
        turned_BTNP2 = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    else:
        turns_TP = torch.view_as_complex(rotation_TP2)[:, None]
        turned_BTNP2 = torch.view_as_real(torch.view_as_complex(pairs_BTNP2) * turns_TP)
    return turned_BTNP2.flatten(-2).to(x_BTNC.dtype)
