"""Out of memory, explained: what was asked for, what was there, and the settings that lower it."""

import contextlib
import re
import resource
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from trainer.errors import OutOfMemoryError, WorldError

if TYPE_CHECKING:
    import torch

GIB = 2**30
ASKED = re.compile(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", re.IGNORECASE)
NO_ROOM = re.compile(r"CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|failure 2 'out of memory'")
"""Messages of CUDA and its libraries where there is no room for what torch does not allocate: contexts, workspaces."""
BUSY = "busy or unavailable"
REMEDY = (
    "  Without changing a bit: parallel.activation_checkpointing = true, checkpoint.memory_every_steps = 0, or "
    'parallel.strategy = "fsdp" on several devices. Else, in a new run: model.loss_chunk_tokens, a smaller '
    "data.micro_batch_sequences with more data.micro_batches, or "
    'numerics.precision = "bf16". `train --dry-run` shows what needs how much.'
)
OTHERS_SHARE = 0.05  # of a GPU's memory; contexts and displays hold some


@contextlib.contextmanager
def explained(device: "torch.device", was_enough: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn torch's errors of memory into OutOfMemoryError. Starting again would only repeat them.

    But not if `was_enough` says that steps have been made with the same settings: then something else takes the memory.
    """
    try:
        yield
    except RuntimeError as error:
        if BUSY in str(error):
            raise WorldError(
                f"{device} is busy: another process has it for itself alone.\n"
                "  nvidia-smi names that process, and shows the compute mode. End it, have the mode set to Default "
                "(nvidia-smi -c 0), or choose another GPU by CUDA_VISIBLE_DEVICES."
            ) from None
        asked, remedy = ASKED.search(str(error)), REMEDY
        if asked is not None:
            fact = f"{asked[1]} {asked[2]} more were asked for"
        elif NO_ROOM.search(str(error)):
            fact = "there is no room even for what CUDA and its libraries need for themselves"
            remedy = f"  If others fill this GPU, choose another one by CUDA_VISIBLE_DEVICES, or wait.\n{REMEDY}"
        else:
            raise
        there = _on_gpu(device) if device.type == "cuda" else _on_cpu()
        raise OutOfMemoryError(f"{device} is out of memory: {fact}; {there}.\n{remedy}", was_enough()) from None


def _on_gpu(device: "torch.device") -> str:
    import torch

    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # to ask takes a context, too
        return "nvidia-smi tells how much is free, and who holds the rest"
    own = torch.cuda.memory_reserved(device)
    there = f"this process holds {own / GIB:.1f} GiB, and {free / GIB:.1f} of {total / GIB:.1f} GiB are free"
    others = total - free - own
    if others > OTHERS_SHARE * total:
        there += f". Other processes hold {others / GIB:.1f} GiB of this GPU (nvidia-smi names them)"
    return there


def _on_cpu() -> str:
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return f"this process has held {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB:.1f} GiB"
