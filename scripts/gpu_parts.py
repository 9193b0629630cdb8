"""The parts of scripts/gpu: each returns what it found, as a tree for JSON.

No CUDA before a part begins: it runs in a process that is forked for it. `tiny` sizes try the
code itself where there is no GPU; their figures mean nothing.
"""

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.launch import agent

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.toml"
QUIET = ['wandb.mode="disabled"', 'eval.sets=["val"]', 'data.source="python-stdlib"']
VOCABULARY = 50_304
BF16_RESIDUAL = "model.bf16_residual=true"
BILLION = ["model.n_layers=20", "model.width=2048", "model.n_heads=16", "data.micro_batch_sequences=8"]


class SkippedError(Exception):
    """This part cannot run here, for the reason given."""


@dataclass(frozen=True)
class Place:
    on_gpu: bool
    tiny: bool
    scratch: Path

    @property
    def device(self) -> str:
        import torch

        return torch.cuda.get_device_name() if self.on_gpu else platform_name()

    @property
    def kind(self) -> str:
        return "cuda" if self.on_gpu else "cpu"

    def synchronise(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()


def platform_name() -> str:
    from trainer import provenance

    return provenance.cpu_model()


def seconds_of(place: Place, work: Callable[[], Any]) -> float:
    """Median seconds of one call, from an idle device to an idle device."""
    repeat, warm = 10, 3
    found = []
    for number in range(1 if place.tiny else repeat + warm):
        place.synchronise()
        began = time.perf_counter()
        work()
        place.synchronise()
        if number >= warm or place.tiny:
            found.append(time.perf_counter() - began)
    return statistics.median(found)


# The device by itself


def machine(place: Place) -> dict[str, Any]:
    """Speed of a copy and of a bf16 matrix product: what all other figures are to be held against."""
    import torch

    bytes_, side = (2**20, 128) if place.tiny else (2**30, 8192)
    a, b = (torch.empty(bytes_, dtype=torch.uint8, device=place.kind) for _ in range(2))
    host = torch.empty(bytes_, dtype=torch.uint8, pin_memory=place.on_gpu)
    x, y = (torch.randn(side, side, device=place.kind, dtype=torch.bfloat16) for _ in range(2))
    return {
        "device": place.device,
        "copy_bytes_per_second": 2 * bytes_ / seconds_of(place, lambda: b.copy_(a)),
        "to_pinned_bytes_per_second": bytes_ / seconds_of(place, lambda: host.copy_(a, non_blocking=True)),
        "matmul_flops_per_second": 2 * side**3 / seconds_of(place, lambda: x @ y),
    }


def tests(place: Place) -> dict[str, Any]:
    """The tests marked gpu."""
    if not place.on_gpu:
        raise SkippedError("the tests marked gpu need a GPU")
    try:
        import pytest  # noqa: F401
    except ImportError:
        raise SkippedError("pytest is not installed") from None
    # The other files may need what only development has.
    files = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-1500:] + done.stderr[-500:])
    return {"passed": done.stdout.strip().splitlines()[-1]}


# Promises: the same bits


def bits(place: Place) -> dict[str, Any]:
    """Grids on this device against the CPU's, the optimizer on shards, and steps that are made twice."""
    import torch

    from trainer import job, optim
    from trainer.exact import Grids

    job.set_numerics(config_of(place, []), torch.device(place.kind))
    generator = torch.Generator().manual_seed(1)
    shapes = {"wide": torch.Size((300, 768)), "odd": torch.Size((7, 33)), "vector": torch.Size((2304,))}
    on = {kind: Grids(shapes, 32, 5, torch.device(kind)) for kind in ("cpu", place.kind)}
    magnitude = torch.exp2(torch.rand(on["cpu"].magnitude.shape, generator=generator) * 140 - 90)
    magnitude[3] = 0
    for grids in on.values():
        grids.restore(magnitude)
    differ = []
    for name, shape in shapes.items():
        gradients = [torch.randn(shape, generator=generator) * 2.0**-exponent for exponent in range(0, 120, 15)]
        rounded = {kind: [grids.rounder(name)(g.to(kind)) for g in gradients] for kind, grids in on.items()}
        ours = rounded[place.kind]
        if not all(a.equal(b.cpu()) for a, b in zip(rounded["cpu"], ours, strict=True)):
            differ.append(f"rounding of {name}")
        forward, backward = sum(ours), sum(reversed(ours))
        assert isinstance(forward, torch.Tensor) and isinstance(backward, torch.Tensor)
        rows = slice(0, shape[0])
        squares = {kind: grids.squares([(name, forward.to(kind), rows)]).cpu() for kind, grids in on.items()}
        if not squares["cpu"].equal(squares[place.kind]):
            differ.append(f"sums of squares of {name}")
    if not on["cpu"].seen.equal(on[place.kind].seen.cpu()):
        differ.append("largest magnitudes")
    for shape in ((1000, 768), (320, 32)):
        whole = torch.randn(shape, generator=generator).to(place.kind)
        gradient = torch.randn(shape, generator=generator).to(place.kind)
        for parts in (2, 3):
            rows, fused = -(-shape[0] // parts), optim.is_fused(whole.shape)
            ends = []
            for tensors in ([whole.clone()], [part.clone() for part in whole.split(rows)]):
                for tensor, part in zip(
                    tensors, [gradient] if len(tensors) == 1 else gradient.split(rows), strict=True
                ):
                    tensor.grad = part.clone()
                torch.optim.AdamW([t.requires_grad_() for t in tensors], lr=1e-3, fused=fused, foreach=not fused).step()
                ends.append(torch.cat([tensor.detach() for tensor in tensors]))
            if not ends[0].equal(ends[1]):
                differ.append(f"AdamW of {shape} in {parts} shards")
    switches = {
        "as smoke": [], "bf16": ['numerics.precision="bf16"'], "dropout": ["model.dropout=0.1"],
        "gpt-2": ['model.norm="layernorm"', 'model.positions="learned"', 'model.mlp="gelu"', "model.qk_norm=false",
                  "model.tied_embeddings=true", "model.biases=true", 'model.init="gpt2"'],
        "bigrams": ["model.value_embeddings=true", "model.bigram_buckets=512"],
    }  # fmt: skip
    for name, more in [*switches.items()][: 2 if place.tiny else None]:
        ends = []
        for _ in range(2):
            trained = Steps(place, config_of(place, more), 320)
            trained(3)
            ends.append(trained.state.state_sha256())
        if ends[0] != ends[1]:
            differ.append(f"steps made twice: {name}")
    return {"differ": differ}


def compiled(place: Place) -> dict[str, Any]:
    """The start-up check of `numerics.compile`, in both precisions."""
    if place.tiny:
        raise SkippedError("compiling takes a minute; tests/test_torch_versions.py tries the check")
    import torch

    from trainer import compile_check

    device = torch.device(place.kind)
    for precision in ("fp32", "bf16"):
        more = [f'numerics.precision="{precision}"', "numerics.compile=true", "model.context=128"]
        config = config_of(place, more)
        compile_check.check(config, 320, device, Steps(place, config, 320).batches.micro_batch(0, 0))
    return {"gradients": "as eager"}


def runs(place: Place) -> dict[str, Any]:
    """The command line: twice, killed and resumed, sharded; all must end with one hash."""
    kill = ['faults=[{kind="sigkill", rank=0, at_step=5}]']
    jobs: dict[str, tuple[list[str], list[str]]] = {
        "once": ([], []), "killed and resumed": (kill, []), "fsdp, resumed replicated": (
            [*kill, 'parallel.strategy="fsdp"'], []),
    }  # fmt: skip
    if not place.tiny:
        jobs["again"] = [], []
        jobs["killed, resumed as a CUDA graph"] = kill, ["parallel.cuda_graphs=true"]
        jobs["CUDA graph"] = ["parallel.cuda_graphs=true"], []
        jobs["recomputed"] = ["parallel.activation_checkpointing=true"], []

    def hash_of(name: str) -> str:
        first, then = jobs[name]
        run = place.scratch / f"run-{name.replace(', ', '-').replace(' ', '-')}"
        killed = kill[0] in first
        train(place, run, first, expected=(-9,) if killed else (0,))
        if killed:
            train(place, run, then)
        return finished_hash(run)

    return same_hashes(place, jobs, hash_of)


def same_hashes(place: Place, names: Iterable[str], hash_of: Callable[[str], str]) -> dict[str, Any]:
    """Hashes by name. On a GPU the first job runs alone, which fills the caches, and the others side by side."""

    def attempt(name: str) -> str:
        try:
            return hash_of(name)
        except RuntimeError as error:
            return f"failed: {error}"

    first, *others = names
    hashes = {first: attempt(first)}
    with ThreadPoolExecutor(len(others) if place.on_gpu else 1) as pool:
        hashes |= dict(zip(others, pool.map(attempt, others), strict=True))
    return {"equal": len(set(hashes.values())) == 1, "hashes": hashes}


def ranks(place: Place) -> dict[str, Any]:
    """Several ranks that share the device over gloo: slow, and all must end with the hash of one rank."""
    jobs: dict[str, tuple[int, list[str]]] = {"1": (1, []), "2, fsdp": (2, ['parallel.strategy="fsdp"'])}
    if not place.tiny:
        jobs |= {"2": (2, []), "3": (3, []), "4, hybrid": (4, ['parallel.strategy="hybrid"'])}
    share = ["parallel.share_gpus=true"] if place.on_gpu else []

    def hash_of(name: str) -> str:
        count, more = jobs[name]
        run = place.scratch / f"ranks-{name.replace(', ', '-')}"
        train(place, run, [*more, *share] if count > 1 else more, ranks=count)
        return finished_hash(run)

    return same_hashes(place, jobs, hash_of)


def recovery(place: Place) -> dict[str, Any]:
    """SIGKILL of a rank under torchrun: seconds until the next step that is new."""
    if place.tiny:
        raise SkippedError("scripts/bench measures it on CPUs")
    run = place.scratch / "recovery"
    train(place, run, ['faults=[{kind="sigkill", rank=0, at_step=8}]'], ranks=1, restarts=1, launcher=True)
    (lost,) = [incident for incident in told(run)["incidents"] if incident["kind"] == "worker_lost"]
    return {"seconds_to_next_step": lost["seconds"], "lost_steps": lost["lost_steps"]}


# Speed


def speed(place: Place, more: list[str], sides: tuple[str, ...] = ("exact", "same kernels", "any kernels", "plain")):
    """Steps of gpt2_124m beside a plain loop of the same model, in turn: tokens/s, MFU, peak of memory."""
    import torch

    from trainer import costs
    from trainer.show import utilisation

    def config(exact: bool) -> Any:
        return big_config(place, [*more, f"numerics.exact={str(exact).lower()}"])

    vocabulary = 512 if place.tiny else VOCABULARY
    makers: dict[str, Callable[[], Callable[[int], None]]] = {
        "exact": lambda: Steps(place, config(True), vocabulary),
        # On a GPU the exact step but for its sums: without exact sums it would attend by other kernels.
        "same kernels": lambda: Steps(place, config(place.on_gpu), vocabulary, plain_sums=place.on_gpu),
        "any kernels": lambda: Steps(place, config(False), vocabulary),
        "plain": lambda: Plain(place, config(False), vocabulary),
    }
    found: dict[str, Any] = {}
    loops = {}
    for name in sides:
        choose_kernels(place, name)
        held = 0
        if place.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()  # by the loops before
        loops[name] = makers[name]()
        loops[name](2)  # compiles
        place.synchronise()
        if place.on_gpu:
            found.setdefault("peak_gib", {})[name] = (torch.cuda.max_memory_allocated() - held) / 2**30
    took: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1 if place.tiny else 5):
        for name in sides if number % 2 else reversed(sides):
            choose_kernels(place, name)
            place.synchronise()
            began = time.perf_counter()
            loops[name](1)
            place.synchronise()
            took[name].append(time.perf_counter() - began)
    settings = config(True)
    tokens = settings.data.micro_batches * settings.data.micro_batch_sequences * settings.model.context
    about = {
        "flops_per_token": costs.flops_per_token(settings.model, vocabulary),
        "computes_with": {"device model": place.device},
        "config": settings.model_dump(mode="json"),
    }
    flops, peak = utilisation.known(about)
    for name, seconds in took.items():
        rate = tokens / statistics.median(seconds)
        found[name] = {"tokens_per_second": rate, "mfu": flops * rate / peak if flops and peak else None}
    base = took[sides[0]]
    found["speed_of_exact"] = {
        f"over {name}": statistics.median(b / a for a, b in zip(base, took[name], strict=True)) for name in sides[1:]
    }
    if place.on_gpu:
        choose_kernels(place, "exact")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            loops["exact"](1)
            torch.cuda.set_sync_debug_mode("default")
        found["synchronisations_per_step"] = sum("called a synchronizing" in str(warning.message) for warning in caught)
    return found


def choose_kernels(place: Place, side: str) -> None:
    """Deterministic kernels for what must use the same ones as exact sums do; else any."""
    import torch

    if place.on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(side in ("exact", "same kernels"))
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010


def speed_compiled(place: Place) -> dict[str, Any]:
    if place.tiny:
        raise SkippedError("compiling takes a minute")
    return speed(place, ["numerics.compile=true"])


def speed_eager(place: Place) -> dict[str, Any]:
    return speed(place, ["numerics.compile=false"])


def speed_64(place: Place) -> dict[str, Any]:
    if place.tiny:
        raise SkippedError("64 sequences a micro-batch are for GPUs")
    more = ["numerics.compile=true", "data.micro_batch_sequences=64", "data.micro_batches=2"]
    return speed(place, more, ("exact", "any kernels"))


def speed_coarse(place: Place, switches: list[str]) -> dict[str, Any]:
    """With coarser numbers than bfloat16 products and float32 sums between blocks."""
    return speed(place, [f"numerics.compile={str(not place.tiny).lower()}", *switches], ("exact",))


def speed_billion(place: Place) -> dict[str, Any]:
    if place.tiny:
        raise SkippedError("a billion parameters are for GPUs")
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    if memory < 60:
        raise SkippedError(f"a billion parameters want about 60 GiB, and this GPU has {memory:.0f}")
    return speed(place, [*BILLION, "numerics.compile=true", "data.micro_batches=2"], ("exact",))


def micro(place: Place) -> dict[str, Any]:
    """Rounding, attention, head and loss by themselves."""
    import torch
    import torch.nn.functional as F

    from trainer import model as models
    from trainer.exact import Grids

    config, kind = big_config(place, []), place.kind
    vocabulary = 512 if place.tiny else VOCABULARY
    shapes = {n: p.shape for n, p in models.construct(config.model, vocabulary, "meta").named_parameters()}
    grids = Grids(shapes, 32, 5, torch.device(kind))
    gradients = {name: torch.randn(shape, device=kind) * 1e-4 for name, shape in shapes.items()}
    flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), device=kind)
    parts = flat.split([shape.numel() for shape in shapes.values()])
    sums = [part.view(shape) for part, shape in zip(parts, shapes.values(), strict=True)]
    listed = list(gradients.values())
    found: dict[str, Any] = {
        "accumulate_seconds": seconds_of(place, lambda: torch._foreach_add_(sums, listed)),
        "round_and_accumulate_seconds": seconds_of(place, lambda: grids.add(listed, flat)),
    }
    b, h, t, c = (2, 2, 64, 32) if place.tiny else (16, 12, 1024, 64)
    q, k, v, out = (torch.randn(b, h, t, c, device=kind, dtype=torch.bfloat16) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    for word, deterministic in (("any", False), ("deterministic", True)):
        torch.use_deterministic_algorithms(deterministic)

        def attend() -> Any:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return torch.autograd.grad(y, inputs, out)

        with contextlib.suppress(RuntimeError):
            found[f"attention_{word}_seconds"] = seconds_of(place, attend)
    torch.use_deterministic_algorithms(False)
    rows, width = (128, 64) if place.tiny else (16 * 1024, 768)
    x = torch.randn(rows, width, device=kind, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(vocabulary, width, device=kind, requires_grad=True)
    targets = torch.randint(0, vocabulary, (1, rows), device=kind)

    def head_and_loss() -> Any:
        with torch.autocast(kind, dtype=torch.bfloat16):
            logits = F.linear(x, w).float().unsqueeze(0)
        return torch.autograd.grad(models.losses(logits, targets, 0.0).objective, (x, w))

    found["head_and_loss_seconds"] = seconds_of(place, head_and_loss)
    if place.on_gpu:
        compiled_losses = torch.compile(lambda x, w: models.losses(F.linear(x, w).float().unsqueeze(0), targets, 0.0))

        def compiled_head_and_loss() -> Any:
            with torch.autocast(kind, dtype=torch.bfloat16):
                return torch.autograd.grad(compiled_losses(x, w).objective, (x, w))

        found["compiled_head_and_loss_seconds"] = seconds_of(place, compiled_head_and_loss)
    return found


def saving(place: Place) -> dict[str, Any]:
    """The stall of saves of gpt2_124m, the first included, and steps beside one."""
    from trainer import checkpoint
    from trainer import config as configs

    config = big_config(place, ["numerics.compile=false", "data.micro_batches=2"])
    trained = Steps(place, config, 512 if place.tiny else VOCABULARY)
    trained(1)
    identity = {"fingerprint": "gpu", "run_id": "gpu"}
    saver = checkpoint.Saver(place.scratch / "saves", trained.ranks, identity, configs.Checkpoint(keep_last=1))
    began = time.perf_counter()
    saver.reserve(trained.state.tensors())  # as at the start of a run
    found: dict[str, Any] = {"reserve_seconds": time.perf_counter() - began}
    found |= {"step_seconds": seconds_of(place, lambda: trained(1)), "saves": []}
    for _ in range(3):
        place.synchronise()
        began = time.perf_counter()
        saver.begin(trained.state.step, trained.state.tensors())
        stall = time.perf_counter() - began
        trained(1)
        place.synchronise()
        beside = time.perf_counter() - began - stall
        saver.finish()
        found["saves"].append({"stall_seconds": stall, "step_beside_seconds": beside})
    saver.close()
    return found


PARTS: dict[str, tuple[float, Callable[[Place], dict[str, Any]]]] = {
    "machine": (30, machine),
    "bits": (60, bits),
    "speed": (200, speed_compiled),
    "runs": (90, runs),
    "ranks": (90, ranks),
    "compiled": (60, compiled),
    "saving": (60, saving),
    "speed-64": (60, speed_64),
    "speed-billion": (90, speed_billion),
    "micro": (40, micro),
    "speed-eager": (60, speed_eager),
    "recovery": (60, recovery),
    "tests": (90, tests),
    "speed-bf16-residual": (60, functools.partial(speed_coarse, switches=[BF16_RESIDUAL])),
    "speed-fp8-head": (60, functools.partial(speed_coarse, switches=[BF16_RESIDUAL, "model.fp8_head=true"])),
}
"""In the order of their worth, each with its limit in seconds."""
UNTIMED = ("bits", "runs", "ranks", "compiled", "tests")
"""Parts that may run beside others: none of their figures is a time."""


# Shared by the parts


def config_of(place: Place, more: list[str]) -> Any:
    from trainer import config as configs

    return configs.load(SMOKE, [*QUIET, f'parallel.device="{place.kind}"', *more])


def big_config(place: Place, more: list[str]) -> Any:
    """gpt2_124m with a step of 4 micro-batches; `more` overrides."""
    from trainer import config as configs

    tiny = ["model.n_layers=2", "model.width=64", "model.n_heads=2", "model.context=64", "model.vocab_size=512",
            "data.vocab_size=512", "data.micro_batch_sequences=2", "optim.warmup_steps=2"]  # fmt: skip
    tiny = tiny if place.tiny else []
    settings = ["data.micro_batches=4", "budget.steps=100000", f'parallel.device="{place.kind}"']
    settings += ["parallel.cuda_graphs=true"] if place.on_gpu else []
    return configs.load(ROOT / "configs" / "gpt2_124m.toml", [*QUIET, *settings, *tiny, *more])


class Steps:
    """toprope's own step in this process, one rank, on random tokens; called with a number of steps."""

    def __init__(self, place: Place, config: Any, vocabulary: int, plain_sums: bool = False) -> None:
        import torch

        from trainer import job, loop
        from trainer.data import Batches
        from trainer.parallel.world import AllRanks, World
        from trainer.step import StepContext

        job.set_numerics(config, torch.device(place.kind))
        self.ranks = World(0, 1, torch.device(place.kind))
        tokens = np.random.default_rng(0).integers(0, min(vocabulary, 257), 2**15 if place.tiny else 2**21)
        self.batches = Batches(
            tokens.astype(np.uint16), seed=config.seed, context=config.model.context,
            micro_batches=config.data.micro_batches, sequences=config.data.micro_batch_sequences,
        )  # fmt: skip
        self.state = job.build(config, vocabulary, self.ranks)
        if plain_sums:
            self.state.grids = None
            self.state.sharding.add_with(None)
        job.capture(self.state, config, self.ranks.device)
        context = StepContext(config, AllRanks(self.ranks, config.data.micro_batches), self.batches)
        checkpointer: Any = None  # a step saves nothing
        self._collaborators = loop.Collaborators(context, lambda event: None, lambda model, step: (), checkpointer)
        self._take_step = loop.take_step

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self._take_step(self.state, self._collaborators)


class Plain:
    """The loop that a user of PyTorch would write, after nanoGPT's: autocast, pinned batches, fused AdamW."""

    def __init__(self, place: Place, config: Any, vocabulary: int) -> None:
        import torch

        from trainer import model as models

        self._config, self._device, self._vocabulary = config, torch.device(place.kind), vocabulary
        self._model: Any = models.construct(config.model, vocabulary)
        models.initialise(self._model, config.model, 0)
        self._model.to(self._device)
        if config.numerics.compile:
            self._model.compile(dynamic=False)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, steps: int) -> None:
        import torch

        count = self._config.data.micro_batches
        for _ in range(steps):
            total = torch.zeros((), device=self._device)
            for _ in range(count):
                with torch.autocast(self._device.type, dtype=torch.bfloat16):
                    objective, loss = self._model(self._batch(), self._batch())
                (objective / count).backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            total.item()

    def _batch(self) -> Any:
        import torch

        shape = (self._config.data.micro_batch_sequences, self._config.model.context)
        tokens = torch.randint(0, min(self._vocabulary, 257), shape, generator=self._generator)
        return (tokens.pin_memory() if self._device.type == "cuda" else tokens).to(self._device, non_blocking=True)


def train(
    place: Place, run: Path, more: list[str], ranks: int = 1, restarts: int = 0, expected: tuple[int, ...] = (0,),
    launcher: bool = False,
) -> None:  # fmt: skip
    """Train smoke by the command line, under torchrun for several ranks.

    Raises RuntimeError for another exit status.
    """
    steps, every = (8, 3) if place.tiny else (20, 3)
    small = ["data.max_megabytes=1.0", f"budget.steps={steps}", f"checkpoint.every_steps={every}", "eval.every_steps=0"]
    settings = [*QUIET, *small, f'parallel.device="{place.kind}"', "optim.warmup_steps=0", *more]
    module, words = "trainer", ["train", str(SMOKE), "--run", str(run)]
    words += [part for setting in settings for part in ("--set", setting)]
    if ranks > 1 or launcher:
        module, options = "trainer.launch.torchrun", ["--standalone", f"--nproc-per-node={ranks}"]
        words = [*options, f"--max-restarts={restarts}", "-m", "trainer", *words]
    output = run.with_suffix(".txt")
    # On CPUs a process with torch imported is forked: the import takes most of such a short run.
    server = None if place.on_gpu else agent.warm_server()
    child = server and server.start(module, words, dict(os.environ), directory=ROOT, output=output)
    if child:
        status = child.wait()
    else:
        with output.open("w") as file:
            command = [sys.executable, "-m", module, *words]
            status = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, check=False).returncode
    if status not in expected:
        raise RuntimeError(f"exit {status}: {output.read_text()[-1500:]}")


def told(run: Path) -> dict[str, Any]:
    from trainer.log import summary

    return json.loads(json.dumps(summary.summarise(run), default=str))


def finished_hash(run: Path) -> str:
    """state_sha256 of a finished run."""
    found = told(run)
    if found["status"] != "finished":
        raise RuntimeError(f"{run.name} is {found['status']} at step {found['step']}")
    return found["state_sha256"]


TARGETS = (
    ("exact over the same deterministic kernels", ("speed", "speed_of_exact", "over same kernels"), 0.98, True),
    ("exact over any kernels", ("speed", "speed_of_exact", "over any kernels"), 0.93, True),
    ("MFU, 124 M, 64 sequences", ("speed-64", "exact", "mfu"), 0.38, True),
    ("MFU, 1 B", ("speed-billion", "exact", "mfu"), 0.50, True),
    ("stall of the first save, seconds", ("saving", "saves", 0, "stall_seconds"), 0.1, False),
    ("differences of bits", ("bits", "differ"), [], None),
    ("two runs, killed, fsdp to replicated: one hash", ("runs", "equal"), True, None),
    ("several ranks: one hash", ("ranks", "equal"), True, None),
)
"""(what, where in `parts`, target, True: at least, False: at most, None: exactly)."""


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def target_rows(report: dict[str, Any]) -> list[str]:
    """Rows of a table in Markdown: what, measured, target, verdict."""
    tiny, rows = report["about"]["tiny"], []
    for what, path, target, at_least in TARGETS:
        value = at(report["parts"], path)
        sign = {True: "≥ ", False: "≤ ", None: ""}[at_least]
        reached = value == target if at_least is None else value is not None and (value >= target) == at_least
        verdict = (
            "unknown" if value is None or (tiny and at_least is not None) else "holds" if reached else "**missed**"
        )
        shown = f"{value:.3g}" if isinstance(value, float) else "none" if value == [] else str(value)
        rows.append(f"| {what} | {'–' if value is None else shown} | {sign}{target or 'none'} | {verdict} |")
    return rows


def table(report: dict[str, Any]) -> str:
    """The targets with what was measured, and all parts with their state, as Markdown."""
    about, parts = report["about"], report["parts"]
    note = " · *tiny sizes: the figures mean nothing*" if about["tiny"] else ""
    lines = [f"{about['device']} · torch {about['torch']} · {about['date']}{note}", ""]
    lines += ["| | measured | target | |", "|---|---|---|---|", *target_rows(report)]
    lines += ["", "| part | seconds | |", "|---|---|---|"]
    for name, part in parts.items():
        state = next((f"{word}: {part[word]}" for word in ("skipped", "error") if word in part), "made")
        lines.append(f"| {name} | {part.get('seconds', '–')} | {state.splitlines()[0]} |")
    for name in (name for name in parts if name.startswith("speed")):
        for side in ("exact", "same kernels", "any kernels", "plain"):
            if rate := at(parts, (name, side)):
                mfu = "" if rate["mfu"] is None else f", MFU {rate['mfu']:.3f}"
                lines.append(f"\n{name}, {side}: {rate['tokens_per_second']:,.0f} tokens/s{mfu}")
    return "\n".join(lines) + "\n"
