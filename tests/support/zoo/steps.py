"""The steps that random networks are made of: each makes a value from those before."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 0.1  # norms of dead channels would otherwise blow rounding up by 1 / sqrt(eps) each
SPELLINGS = ("packed", "chunked", "separate", "einsum", "fused", "shared", "gated", "linear",
             "channels")  # fmt: skip


class Step(nn.Module):
    """Makes a value from those before."""

    def forward(self, values: list[Tensor]) -> Tensor:
        raise NotImplementedError


STEPS: dict[str, type[Step]] = {}


def step(cls: type[Step]) -> type[Step]:
    STEPS[cls.__name__] = cls
    return cls


@step
class Conv(Step):
    """Convolution, norm, activation."""

    def __init__(self, into: int, out: int, kernel: int, groups: int, norm: str, act: str) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv = nn.Conv2d(into, out, kernel, padding=kernel // 2, groups=groups, bias=bias)
        self.norm = {
            "none": nn.Identity, "batch": lambda: nn.BatchNorm2d(out, eps=EPS),
            "instance": lambda: nn.InstanceNorm2d(out, EPS, affine=True),
            "group": lambda: nn.GroupNorm(2 if out % 2 == 0 else 1, out, EPS),
        }[norm]()  # fmt: skip
        self.act = {"relu": nn.ReLU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(),
                    "prelu": nn.PReLU(out), "none": nn.Identity()}[act]  # fmt: skip

    def forward(self, values: list[Tensor]) -> Tensor:
        return self.act(self.norm(self.conv(values[-1])))


@step
class Transposed(Step):
    """Transposed convolution that keeps the resolution."""

    def __init__(self, into: int, out: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(into, out, 3, padding=1, groups=groups)

    def forward(self, values: list[Tensor]) -> Tensor:
        return torch.relu(self.conv(values[-1]))


@step
class Add(Step):
    """Residual addition of an earlier value, projected where widths differ."""

    def __init__(self, other: int, into: int, out: int) -> None:
        super().__init__()
        self.other = other
        self.project = nn.Identity() if into == out else nn.Conv2d(into, out, 1, bias=False)

    def forward(self, values: list[Tensor]) -> Tensor:
        return values[-1] + self.project(values[self.other])


@step
class Concat(Step):
    """Concatenation with an earlier value, then a norm over both."""

    def __init__(self, other: int, channels: int) -> None:
        super().__init__()
        self.other, self.norm = other, nn.BatchNorm2d(channels, eps=EPS)

    def forward(self, values: list[Tensor]) -> Tensor:
        return self.norm(torch.cat([values[self.other], values[-1]], dim=1))


@step
class Chunk(Step):
    """Equal parts, multiplied, added, or put back in another order."""

    def __init__(self, parts: int, join: str) -> None:
        super().__init__()
        self.parts, self.join = parts, join

    def forward(self, values: list[Tensor]) -> Tensor:
        first, *rest = torch.chunk(values[-1], self.parts, 1)
        if self.join == "cat":
            return torch.cat([*rest, first], 1)
        for part in rest:
            first = first * torch.sigmoid(part) if self.join == "gate" else first + part
        return first


@step
class Split(Step):
    """Two unequal parts, each through its own convolution."""

    def __init__(self, first: int, second: int, out: int) -> None:
        super().__init__()
        self.sizes = [first, second]
        self.a, self.b = nn.Conv2d(first, out, 1), nn.Conv2d(second, out, 3, padding=1)

    def forward(self, values: list[Tensor]) -> Tensor:
        a, b = torch.split(values[-1], self.sizes, dim=1)
        return torch.tanh(self.a(a)) * self.b(b)


@step
class Shared(Step):
    """One convolution called several times."""

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels, eps=EPS)
        self.times = times

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        for _ in range(self.times):
            x = torch.relu(self.norm(self.conv(x)))
        return x


@step
class Shuffle(Step):
    """Channel shuffle by views."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        b, c, h, w = x.size()
        x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous()
        return x.view(b, -1, h, w)


@step
class Pixels(Step):
    """Space to depth, or depth to space."""

    def __init__(self, down: bool) -> None:
        super().__init__()
        self.layer = nn.PixelUnshuffle(2) if down else nn.PixelShuffle(2)

    def forward(self, values: list[Tensor]) -> Tensor:
        return self.layer(values[-1])


@step
class Squeeze(Step):
    """Squeeze and excitation."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, inner), nn.Linear(inner, channels)

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


@step
class Scale(Step):
    """Bare parameters and a buffer on the channel dimension."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))
        self.offset = nn.Parameter(torch.randn(channels))
        self.register_buffer("gain", torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, values: list[Tensor]) -> Tensor:
        return values[-1] * self.scale * self.gain + self.offset.view(-1, 1, 1)


@step
class Pad(Step):
    """Constant channels before and after."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, values: list[Tensor]) -> Tensor:
        return F.pad(values[-1], (0, 0, 0, 0, self.before, self.after), value=0.25)


@step
class Pool(Step):
    """Half the resolution."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2) if kind == "max" else nn.AvgPool2d(2)

    def forward(self, values: list[Tensor]) -> Tensor:
        return self.pool(values[-1])


@step
class Attention(Step):
    """Attention between places, in one of several spellings, added to the value."""

    def __init__(self, channels: int, heads: int, width: int, spelling: str) -> None:
        super().__init__()
        self.heads, self.width, self.spelling = heads, width, spelling
        self.scale, inner = width**-0.5, heads * width
        if spelling in ("packed", "chunked", "channels"):
            self.qkv = nn.Linear(channels, 3 * inner)
        else:
            shared = width if spelling == "shared" else inner
            self.q, self.k = nn.Linear(channels, inner), nn.Linear(channels, shared)
            self.v = nn.Linear(channels, shared)
        self.gate = nn.Linear(channels, inner) if spelling == "gated" else None
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        self.out = nn.Linear(inner, channels)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, _ = x.shape
        if self.spelling == "packed":
            y = self.qkv(x).reshape(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
            return y.unbind(0)
        if self.spelling in ("chunked", "channels"):
            parts = self.qkv(x).chunk(3, dim=-1)
        else:
            parts = self.q(x), self.k(x), self.v(x)
        return tuple(part.view(b, n, -1, self.width).transpose(1, 2) for part in parts)

    def mixed(self, x: Tensor) -> Tensor:
        """Batch, heads, places, width."""
        q, k, v = self.parts(x)
        if self.spelling == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
            return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        if self.spelling == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        if self.spelling == "channels":
            return (((q.mT @ k) * self.scale).softmax(-1) @ v.mT).mT
        if self.spelling == "linear":
            q, k = torch.sigmoid(q), torch.sigmoid(k)
            return q @ (k.mT @ v) / (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        return (q @ k.mT * (self.scale * self.temperature)).softmax(-1) @ v

    def tokens(self, x: Tensor) -> Tensor:
        y = self.mixed(x).transpose(1, 2).flatten(2)
        return self.out(y if self.gate is None else y * torch.sigmoid(self.gate(x)))

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        b, _, h, w = x.shape
        y = self.tokens(x.flatten(2).transpose(1, 2))
        return x + y.transpose(1, 2).reshape(b, -1, h, w)


@step
class Window(Attention):
    """Attention in windows of two by two, shifted or not."""

    def __init__(self, channels: int, heads: int, width: int, shift: int) -> None:
        super().__init__(channels, heads, width, "packed")
        self.shift = shift

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1].permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        y = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = self.tokens(y).view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(b, h, w, c)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        return values[-1] + y.permute(0, 3, 1, 2)


@step
class TokenNorm(Step):
    """A norm over channels."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        if kind == "layer":
            self.norm = nn.LayerNorm(channels, EPS)

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1].permute(0, 2, 3, 1)
        if self.kind == "layer":
            x = self.norm(x) * self.weight
        elif self.kind == "rms":
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.weight
        else:
            x = x - x.mean(-1, keepdim=True)
            x = x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS) * self.weight
        return x.permute(0, 3, 1, 2)


@step
class Recurrent(Step):
    """A recurrent layer along the columns of the pooled rows, spread over the rows again."""

    def __init__(self, channels: int, hidden: int, kind: str, both: bool) -> None:
        super().__init__()
        layer = nn.LSTM if kind == "lstm" else nn.GRU
        self.rnn = layer(channels, hidden, batch_first=True, bidirectional=both)

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1]
        y, _ = self.rnn(x.mean(2).transpose(1, 2))
        return y.transpose(1, 2).unsqueeze(2).expand(-1, -1, x.shape[2], -1)


@step
class Experts(Step):
    """Experts with weights of three dimensions, weighted by a router, added to the value."""

    def __init__(self, channels: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(channels, experts)
        self.up = nn.Parameter(torch.randn(experts, channels, hidden) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, hidden, channels) * 0.3)

    def forward(self, values: list[Tensor]) -> Tensor:
        x = values[-1].permute(0, 2, 3, 1)
        y = torch.tanh(torch.einsum("bhwc,eck->bhwek", x, self.up))
        y = torch.einsum("bhwek,ekc->bhwec", y, self.down)
        y = (y * self.router(x).softmax(-1).unsqueeze(-1)).sum(-2)
        return values[-1] + y.permute(0, 3, 1, 2)
