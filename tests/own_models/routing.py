"""A mixture of experts with a load-balancing loss; each token goes to one expert.

Fedus et al. 2021 (Switch Transformer, arXiv:2101.03961).
"""

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.up = nn.Parameter(torch.empty(count, width, 2 * width))
        self.down = nn.Parameter(torch.empty(count, 2 * width, width))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        probabilities_BTE = self.router(x_BTD).float().softmax(-1)
        best_BT = probabilities_BTE.argmax(-1)
        chosen_BTE = nn.functional.one_hot(best_BT, probabilities_BTE.shape[-1]).to(probabilities_BTE.dtype)
        balance = (chosen_BTE.mean((0, 1)) * probabilities_BTE.mean((0, 1))).sum() * chosen_BTE.shape[-1]
        # All experts are computed and one is kept, so that every expert takes part in every micro-batch.
        h_EBTF = torch.einsum("btd,edf->ebtf", x_BTD, self.up).relu()
        y_EBTD = torch.einsum("ebtf,efd->ebtd", h_EBTF, self.down)
        return torch.einsum("ebtd,bte->btd", y_EBTD.float(), chosen_BTE * probabilities_BTE), balance
