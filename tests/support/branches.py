"""Code that takes other ways for other values."""

import torch
from torch import nn
from torch.nn import functional as F


class Branches(nn.Module):
    """The same functions with other weights, as the values of the input say."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        h = self.norm(self.stem(x))
        h = F.linear(h, self.a) if float(x.sum()) > 0 else F.linear(h, self.b) * 2
        return self.head(F.softmax(h, -1))
