"""Out of memory, explained: what was asked for, what was there, and the settings that lower it."""

import contextlib
import re
import resource
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from trainer.errors import OutOfMemoryError

if TYPE_CHECKING:
    import torch

GIB = 2**30
ASKED = re.compile(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", re.IGNORECASE)
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
        if (asked := ASKED.search(str(error))) is None:
            raise
        there = _on_gpu(device) if device.type == "cuda" else _on_cpu()
        raise OutOfMemoryError(
            f"{device} is out of memory: {asked[1]} {asked[2]} more were asked for; {there}.\n{REMEDY}", was_enough()
        ) from None


def _on_gpu(device: "torch.device") -> str:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    there = f"this process holds {own / GIB:.1f} GiB, and {free / GIB:.1f} of {total / GIB:.1f} GiB are free"
    others = total - free - own
    if others > OTHERS_SHARE * total:
        there += f". Other processes hold {others / GIB:.1f} GiB of this GPU (nvidia-smi names them)"
    return there


def _on_cpu() -> str:
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return f"this process has held {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB:.1f} GiB"
