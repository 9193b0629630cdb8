"""Means that a process computes with: code, device, build of torch, kernels, threads. Others may give other bits.

It is recorded in config.json and in every AttemptStarted. A run goes on with what it began with, or with something
else that was accepted on purpose.
"""

import functools
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import own_code
from trainer.config import Config, differences
from trainer.errors import RunDirectoryError

if TYPE_CHECKING:
    import torch

KERNEL_VARIABLES = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE", "OMP_DYNAMIC", "ONEDNN_MAX_CPU_ISA")
"""Variables of the environment by which libraries below torch choose kernels."""

NOT_RECORDED = (
    "the run does not say what it was computed with, as an older toprope made it. From here on it is recorded; if the "
    "machine or torch is another than before, the steps that follow may have other bits."
)

NUMERIC_SOURCES: dict[str, tuple[str, ...]] = {
    "config.py": ("Model",),
    "costs.py": ("padded_vocab",),
    "data/batches.py": (),
    "distil.py": ("Teachers", "load"),
    "evaluate.py": (),
    "exact.py": (),
    "exact_triton.py": (),
    "fp8.py": (),
    "job.py": ("set_numerics", "build", "batches_of", "scorer"),
    "loop.py": ("take_step", "finite_gradients"),
    "micro_batch_graph.py": (),
    "model.py": (),
    "optim.py": (),
    "own_model.py": ("construct", "initial_value"),
    "own_optimizer.py": (),
    "parallel/partial.py": (),
    "parallel/sharding.py": (),
    "parallel/world.py": ("World", "StepMembers", "AllRanks"),
    "step.py": (),
}
"""Code that decides the bits: files of the package, and their functions and classes where it is not all of them.

What makes tokens of text is left out: tokens and tokenizer are identified by their own digests.
"""


CODE_BEFORE_RECORDS = "3f3b3e07ab4d257b"
"""Digest that stands for the code from before code was recorded. What is keyed by code leaves it out at this value, so
that what was made then keeps its key."""

SAME_BITS = {
    "cb58cdba3b5e040a": CODE_BEFORE_RECORDS,
    "f38a500422d428ba": CODE_BEFORE_RECORDS,
    "3fad2a4999664368": CODE_BEFORE_RECORDS,
    "88866fe9961cf82d": CODE_BEFORE_RECORDS,
    "4de2e53bb038dbea": CODE_BEFORE_RECORDS,
    "8a0a7d92b0c087be": "ecc09f419acf64f8",
    "6a203954882fcdf3": "ecc09f419acf64f8",
    "8c43015a40aad009": "ecc09f419acf64f8",
    "a507687b478b8424": "ecc09f419acf64f8",
}
"""By the digest of code, of all of it or of a folder: that of older code with the same bits, which stands for both.
Runs are then resumed and keep their keys. A change that changes no bit adds an entry for its digest."""


def same_bits(digest: str) -> str:
    """Return the digest that stands for all code with the bits of this one."""
    return SAME_BITS.get(digest, digest)


@functools.cache
def code(package: Path = Path(__file__).parent) -> dict[str, dict[str, str]]:
    """Return a digest of each function that decides the bits, and of what is outside of them: {file: {name: digest}}.

    Of the syntax tree: comments, formatting and docstrings do not count, but for a module's own; nor does Python's
    version.
    """
    found: dict[str, dict[str, str]] = {}
    for file, chosen in NUMERIC_SOURCES.items():
        if (package / file).is_file():  # the tree of another commit may not have it
            found[file] = own_code.digests_of(own_code.parse(package / file), chosen)
    return found


def code_digest() -> str:
    """Digest of all code that decides the bits."""
    return same_bits(own_code.digest_of(code()))


@functools.cache
def _digest_of_folder(name: str, package: Path = Path(__file__).parent) -> str:
    """Digest of the code of a folder that decides bits of some runs only: those of the others keep their record."""
    paths = sorted((package / name).glob("*.py"))
    return same_bits(own_code.digest_of({path.name: own_code.digests_of(own_code.parse(path), ()) for path in paths}))


def code_changes(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a line for each file whose code differs, with the functions that do."""
    lines = []
    for file in sorted(before.keys() | now.keys()):
        old, new = before.get(file, {}), now.get(file, {})
        if names := sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
            lines.append(f"code: {file}: {', '.join(names)}")
    return lines


def computes_with(config: Config, device: "torch.device") -> dict[str, str]:
    """Return what decides the bits of this process beside config and data, by name; after `job.set_numerics`."""
    import torch

    is_cuda = device.type == "cuda"
    # OpenMP starts no more threads than its limit, whatever torch asks for.
    threads = min(torch.get_num_threads(), int(os.environ.get("OMP_THREAD_LIMIT") or 2**31))
    found = {
        "code": code_digest(),
        "device": device.type,
        "device model": torch.cuda.get_device_name(device) if is_cuda else cpu_model(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "CPU threads": str(threads),
        "torch": f"{torch.__version__} of commit {str(torch.version.git_version)[:12]}",
    }
    if is_cuda:
        found |= _gpu_kernels(config)
    if config.islands.count:
        found["code of islands"] = _digest_of_folder("islands")
    if config.numerics.compile and not is_cuda:
        from torch._inductor.cpp_builder import get_cpp_compiler

        command = [get_cpp_compiler(), "--version"]
        shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        found["C++ compiler"] = shown.partition("\n")[0]
    return found | {name: value for name in KERNEL_VARIABLES if (value := os.environ.get(name))}


def _gpu_kernels(config: Config) -> dict[str, str]:
    """Return what decides which kernels a GPU runs, beside torch and the GPU itself.

    Not recorded on CPUs, so that older runs resume: nothing in toprope changes these there.
    """
    import torch
    from torch.backends import cuda

    attention = {
        "flash": cuda.flash_sdp_enabled,
        "cuDNN": cuda.cudnn_sdp_enabled,
        "memory-efficient": cuda.mem_efficient_sdp_enabled,
        "math": cuda.math_sdp_enabled,
    }
    return {
        "CUDA": str(torch.version.cuda or torch.version.hip),
        "cuDNN": str(torch.backends.cudnn.version()),
        "attention": ", ".join(name for name, enabled in attention.items() if enabled()),
        "attention in compiled blocks": "FlexAttention" if config.flex_attention else "as in others",
        "TF32": "on" if torch.get_float32_matmul_precision() != "highest" else "off",
        "deterministic kernels": "on" if torch.are_deterministic_algorithms_enabled() else "off",
        "cuBLAS workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG", "default"),
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def compare(run: Path, contents: Mapping[str, Any], ranks: Sequence[Mapping[str, str]], accept: bool) -> list[str]:
    """Return the differences between what a run was computed with and what its ranks compute with now.

    `contents` are those of its config.json; none for a new run. Any rank may compute any micro-batch, so they must
    also be alike: without a record they are held against rank 0.
    Raises RunDirectoryError if there is a difference, unless all are to be accepted.
    """
    before = dict(contents.get("computes_with") or ranks[0])
    if "code" in before:
        before["code"] = same_bits(before["code"])
    found: dict[str, list[str]] = {}
    for rank, now in enumerate(ranks):
        for line in differences(before, now):
            found.setdefault(line, []).append(str(rank))
    lines = [line if len(on) == len(ranks) else f"{line} (rank {', '.join(on)})" for line, on in found.items()]
    if before.get("code") != ranks[0]["code"]:
        lines = code_changes(contents.get("code", {}), code()) + [line for line in lines if not line.startswith("code")]
    if lines and not accept:
        listed = "".join(f"    {line}\n" for line in lines)
        if any(now != ranks[0] for now in ranks):
            raise RunDirectoryError(
                f"{run} was not started: its ranks differ from one another{' or from those before' * bool(contents)}:\n"
                f"{listed}  Any rank may compute any micro-batch, so bits would depend on which one does. Use the same "
                "on all nodes (torch, its build, kind of machine), or accept other bits with --accept-other-bits."
            )
        device = before.get("device", "")
        chosen = f' (parallel.device = "{device}" chooses the device)' if device != ranks[0]["device"] else ""
        raise RunDirectoryError(
            f"{run} was computed with something else than this start would use:\n{listed}"
            f"  The steps that follow could end with other bits. Go back to what it was{chosen}, accept that with "
            "--accept-other-bits, or give a new --run."
        )
    return lines
