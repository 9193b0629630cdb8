"""A language model of one's own: a gated linear recurrence, after minGRU (Feng et al. 2024, arXiv:2410.01201)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mixer(nn.Module):
    """h_t = (1 - z_t) h_{t-1} + z_t v_t, channel by channel; gate z and value v depend on the token alone."""

    role = "block"  # one unit of sharding; without it, toprope takes the children of a ModuleList

    def __init__(self, width: int, openness: float) -> None:
        super().__init__()
        self.openness = openness
        self.norm = nn.LayerNorm(width)
        self.gate, self.value, self.out = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD = self.norm(x_BTD)
        z_BTD, v_BTD = (self.gate(y_BTD) + self.openness).sigmoid(), self.value(y_BTD)
        h_BD, states = torch.zeros_like(x_BTD[:, 0]), []
        for z_BD, v_BD in zip(z_BTD.unbind(1), v_BTD.unbind(1), strict=True):
            h_BD = h_BD + z_BD * (v_BD - h_BD)
            states.append(h_BD)
        return x_BTD + self.out(torch.stack(states, 1))


class Recurrent(nn.Module):
    """The three arguments and the two results are all that toprope asks for."""

    openness = 0.0

    def __init__(self, settings, vocab_size: int, options: dict) -> None:
        super().__init__()
        width = settings.width
        self.embed = nn.Embedding(vocab_size, width)
        self.mixers = nn.ModuleList(Mixer(width, self.openness) for _ in range(settings.n_layers))
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.penalty = options.get("penalty", 0.0)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        x_BTD = self.embed(inputs_BT)
        for mixer in self.mixers:
            x_BTD = mixer(x_BTD)
        logits_BTV = self.head(x_BTD).float()
        if targets_BT is None:
            return logits_BTV  # for `sample`
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        return loss + self.penalty * logits_BTV.square().mean(), loss


class Ungated(Recurrent):
    """Nothing is carried over from one token to the next."""

    openness = 1e4
