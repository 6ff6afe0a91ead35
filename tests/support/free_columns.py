"""Networks whose blocks may keep channels of their own."""

import torch
from torch import nn
from torch.nn import functional as F


class Grouped(nn.Module):
    def __init__(self, kind=nn.Conv2d):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.c = kind(16, 32, 3, padding=1, groups=2), nn.Conv2d(32, 4, 1)
        nn.init.uniform_(self.n.bias)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.n(self.a(x))))))


class Split(nn.Module):
    """The parts of a chunk go separate ways."""

    def __init__(self):
        super().__init__()
        self.a, self.m = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(24, 4, 1)

    def forward(self, x):
        a, b = self.a(x).chunk(2, 1)
        return self.c(torch.cat((a, b, F.relu(self.m(b))), 1))


class Gated(Split):
    """The parts of a chunk are multiplied: their columns are the same."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(8, 4, 1)
        del self.m

    def forward(self, x):
        a, b = self.a(x).chunk(2, 1)
        return self.c(a * torch.sigmoid(b))


class Halved(Grouped):
    """Positions of columns within each group count."""

    def forward(self, x):
        y = F.relu(self.n(self.a(x)))
        y = torch.cat((y[:, :4], y[:, 4:8], y[:, 8:]), 1).roll(1, 2)
        return self.c(F.relu(self.b(y)))


class Attention(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.qkv, self.out, self.kind = nn.Linear(16, 48), nn.Linear(16, 5), kind

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "sdpa":
            o = F.scaled_dot_product_attention(q, k, v)
        elif self.kind == "matmul":
            o = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v
        else:
            o = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
            o = torch.einsum("bhnm,bhmd->bhnd", o, v)
        return self.out(o.transpose(1, 2).reshape(batch, length, -1))


IMAGE, TEXT = (1, 3, 8, 8), (2, 5, 16)
FREE = {
    "grouped": (Grouped, IMAGE, {}),
    "grouped, transposed": (lambda: Grouped(nn.ConvTranspose2d), IMAGE, {}),
    "split": (Split, IMAGE, {}),
    "halved": (Halved, IMAGE, {}),
    **{
        f"heads, {kind}": (lambda kind=kind: Attention(kind), TEXT, {"attention": "head_dim"})
        for kind in ("sdpa", "matmul", "einsum")
    },
}


def made(name):
    torch.manual_seed(0)
    kind, shape, options = FREE[name]
    return kind().eval(), torch.randn(shape), options
