"""The models of the files in this folder: never change their code, plans name places in it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune


class Block(nn.Module):
    """Attention by hand, with a size in an attribute, a size as a number, and an RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 4, 8
        self.embed = nn.Linear(6, 16)
        self.norm = nn.RMSNorm(16)
        self.qkv = nn.Linear(16, 96)
        self.out = nn.Linear(32, 16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        parts = self.qkv(self.norm(x)).view(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        x = x + self.out(y.transpose(1, 2).reshape(b, n, 32))
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


class Padded(nn.Module):
    """A stem, grouped columns, and a shortcut that is padded by numbers in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = self.grouped(F.relu(self.wide(x)))
        return self.last(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def masked() -> nn.Module:
    """Filters masked behind a bias: constants that a plan folds into the next layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(1))
    net[0].bias.data.fill_(0.5)
    prune.ln_structured(net[0], "weight", 0.5, n=2, dim=0)
    return net


def seeded(make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


INPUTS = {
    "block": torch.linspace(-1, 1, 60).reshape(2, 5, 6),
    "block_exact": torch.linspace(-1, 1, 60).reshape(2, 5, 6),
    "padded": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8),
    "padded_free": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8),
    "second_round": torch.linspace(-1, 1, 12).reshape(2, 6),
    "masked": torch.linspace(-1, 1, 200).reshape(2, 2, 5, 10),
}
MODELS = {
    "block": Block,
    "block_exact": Block,
    "padded": Padded,
    "padded_free": Padded,
    "second_round": mlp,
    "masked": masked,
}
