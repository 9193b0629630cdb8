"""What a process computes with: device, build of torch, kernels, threads. With anything else the bits may be others.

It is recorded in config.json and in every AttemptStarted. A run goes on with what it began with, or with something
else that was accepted on purpose.
"""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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


def computes_with(config: Config, device: "torch.device") -> dict[str, str]:
    """Return what decides the bits of this process beside config and data, by name; after `job.set_numerics`."""
    import torch

    is_cuda = device.type == "cuda"
    # OpenMP starts no more threads than its limit, whatever torch asks for.
    threads = min(torch.get_num_threads(), int(os.environ.get("OMP_THREAD_LIMIT") or 2**31))
    found = {
        "device": device.type,
        "device model": torch.cuda.get_device_name(device) if is_cuda else _cpu_model(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "CPU threads": str(threads),
        "torch": f"{torch.__version__} of commit {str(torch.version.git_version)[:12]}",
    }
    if config.numerics.compile and not is_cuda:
        from torch._inductor.cpp_builder import get_cpp_compiler

        command = [get_cpp_compiler(), "--version"]
        found["C++ compiler"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[
            0
        ]
    return found | {name: value for name in KERNEL_VARIABLES if (value := os.environ.get(name))}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def compare(
    run: Path, recorded: Mapping[str, str] | None, ranks: Sequence[Mapping[str, str]], accept: bool
) -> list[str]:
    """Return the differences between what a run was computed with and what its ranks compute with now.

    Any rank may compute any micro-batch, so they must also be alike: without a record they are held against rank 0.
    Raises RunDirectoryError if there is a difference, unless all are to be accepted.
    """
    before = recorded or ranks[0]
    found: dict[str, list[str]] = {}
    for rank, now in enumerate(ranks):
        for line in differences(before, now):
            found.setdefault(line, []).append(str(rank))
    lines = [line if len(on) == len(ranks) else f"{line} (rank {', '.join(on)})" for line, on in found.items()]
    if lines and not accept:
        raise RunDirectoryError(
            f"{run} was computed with something else than this start would use:\n"
            + "".join(f"    {line}\n" for line in lines)
            + "  The steps that follow could end with other bits. Go back to what it was, accept that with "
            "--accept-other-bits, or give a new --run."
        )
    return lines
