"""A training loop that uses nothing of toprope but exact sums, and ends with one hash on any number of ranks.

torchrun --standalone --nproc-per-node 3 examples/plain_loop.py            # replicated; try 1, 2 and 3 ranks
torchrun --standalone --nproc-per-node 2 examples/plain_loop.py --fsdp     # sharded: the same hash
torchrun --standalone --nproc-per-node 2 examples/plain_loop.py --plain    # without exact sums: another hash per world
"""

import argparse
import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer.exact import ExactGradients

MICRO_BATCHES, ROWS, CONTEXT, WIDTH = 8, 16, 32, 64


class ByteModel(nn.Module):
    """Predicts the next byte from the last CONTEXT ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.hidden = nn.Linear(CONTEXT * WIDTH, 4 * WIDTH)
        self.head = nn.Linear(4 * WIDTH, 256)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(bytes_BT).flatten(1))))


def micro_batch(text: Tensor, step: int, index: int) -> tuple[Tensor, Tensor]:
    """A function of (step, index) alone: whoever computes it gets the same rows."""
    random = torch.Generator().manual_seed(1_000_003 * step + index)
    starts = torch.randint(len(text) - CONTEXT - 1, (ROWS,), generator=random)
    windows = torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()]).long()
    return windows[:, :-1], windows[:, -1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--fsdp", action="store_true")
    way.add_argument("--plain", action="store_true", help="sum gradients as floats are usually summed")
    chosen = parser.parse_args()

    torch.set_num_threads(1)  # some kernels sum in an order that depends on the number of threads
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = ByteModel()
    if chosen.fsdp:
        fully_shard(model)
    source = Path(nn.__file__).with_name("modules") / "module.py"  # any text will do, as long as it is the same
    text = torch.frombuffer(bytearray(source.read_bytes()), dtype=torch.uint8)
    gradients = None if chosen.plain else ExactGradients(model, MICRO_BATCHES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for step in range(chosen.steps):
        loss_sum = torch.zeros(MICRO_BATCHES)
        if gradients is None:
            optimizer.zero_grad()
        for _ in gradients.passes() if gradients else (0,):
            for turn in range(-(-MICRO_BATCHES // ranks)):
                index = turn * ranks + rank
                own = index < MICRO_BATCHES
                if not own and not chosen.fsdp:
                    continue
                inputs, targets = micro_batch(text, step, index if own else 0)
                loss = nn.functional.cross_entropy(model(inputs), targets)
                (loss * (1.0 if own else 0.0) / MICRO_BATCHES).backward()
                if own:
                    loss_sum[index] = loss.detach()
        if gradients is None:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            gradients.clip_(1.0)
        optimizer.step()
        dist.all_reduce(loss_sum)
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}  loss {loss_sum.mean():.4f}")

    sha = hashlib.sha256()
    for parameter in model.parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        sha.update(full.detach().numpy().tobytes())
    if rank == 0:
        print(f"weights_sha256 {sha.hexdigest()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
