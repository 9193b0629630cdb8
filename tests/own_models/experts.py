"""A model that declares no roles: what toprope needs to know is found out. Its layers are in a file beside it."""

import torch
from routing import Experts
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(width, width, 3, groups=width)
        self.experts = Experts(width, experts)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        past_BDT = nn.functional.pad(x_BTD.transpose(1, 2), (2, 0))
        x_BTD = x_BTD + self.mix(past_BDT).transpose(1, 2)
        y_BTD, balance = self.experts(x_BTD)
        return x_BTD + y_BTD, balance


class Mixture(nn.Module):
    def __init__(self, settings, vocab_size: int, options: dict) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, settings.width)
        self.layers = nn.ModuleList(Layer(settings.width, options["experts"]) for _ in range(settings.n_layers))
        self.head = nn.Linear(settings.width, vocab_size, bias=False)
        self.head.weight = self.embed.weight
        self.weight = options.get("balance", 0.01)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        x_BTD, balances = self.embed(inputs_BT), []
        for layer in self.layers:
            x_BTD, balance = layer(x_BTD)
            balances.append(balance)
        logits_BTV = self.head(x_BTD).float()
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        return loss + self.weight * torch.stack(balances).mean(), loss

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Start the experts' last matrices at zero; None leaves a parameter to toprope."""
        return torch.zeros(shape) if name.endswith("down") else None
