"""Networks with branches: every way to add something to a stream that the tests know."""

import torch
from torch import nn
from torch.nn import functional as F


class Basic(nn.Module):
    """Of a ResNet: two convolutions, the sum in place, an activation behind it."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Inverted(nn.Module):
    """Of a MobileNet: narrow, wide, narrow; linear at its end."""

    def __init__(self, width):
        super().__init__()
        wide = 2 * width
        self.conv = nn.Sequential(
            nn.Conv2d(width, wide, 1), nn.ReLU6(), nn.Conv2d(wide, wide, 3, padding=1, groups=wide),
            nn.ReLU6(), nn.Conv2d(wide, width, 1),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x)


class Scaled(nn.Module):
    """Of a ConvNeXt: channels last inside, a scale of the layer, and dropout of the path."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        y = self.norm(x.permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return F.dropout(y.permute(0, 3, 1, 2), 0.1, self.training) + x


class Projected(nn.Module):
    """The stream itself goes through a layer; only the long way can leave."""

    def __init__(self, width):
        super().__init__()
        self.long = nn.Sequential(
            nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 1)
        )
        self.short = nn.Conv2d(width, width, 1, 2)

    def forward(self, x):
        return self.long(x) + self.short(x)


class Nested(nn.Module):
    """Of a U-Net with sums: what lies inside is a block of its own."""

    def __init__(self, width, inner):
        super().__init__()
        self.down, self.inner = nn.Conv2d(width, width, 2, 2), inner
        self.up = nn.ConvTranspose2d(width, width, 2, 2)

    def forward(self, x):
        return x + self.up(self.inner(self.down(x)))


class Shared(nn.Module):
    """One block that runs twice."""

    def __init__(self, width):
        super().__init__()
        self.block = Inverted(width)

    def forward(self, x):
        return self.block(self.block(x))


class Joined(nn.Module):
    """Of an Inception: ways side by side, one of them pooled, and a layer over all of them."""

    def __init__(self, width):
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(width, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.wide = nn.Conv2d(width, 4, 3, padding=1)
        self.pooled = nn.Conv2d(width, 2, 1)
        self.out = nn.Conv2d(9, width, 1)

    def forward(self, x):
        pooled = self.pooled(F.avg_pool2d(x, 3, 1, 1))
        return self.out(torch.cat([self.narrow(x), self.wide(x).relu(), pooled], 1))


class Dense(nn.Module):
    """Of a DenseNet: what every layer adds stands beside all that was there."""

    def __init__(self, width, grow=3, layers=3):
        super().__init__()
        wide = [width + grow * number for number in range(layers + 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in wide[:-1])
        self.layers = nn.ModuleList(nn.Conv2d(size, grow, 3, padding=1) for size in wide[:-1])
        self.out = nn.Conv2d(wide[-1], width, 1)

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return self.out(x)


CONVOLUTIONS = {
    "joined": Joined,
    "dense": Dense,
    "basic": Basic,
    "inverted": Inverted,
    "scaled": Scaled,
    "projected": Projected,
    "shared": Shared,
    "nested": lambda width: Nested(width, nn.Sequential(Inverted(width), Basic(width))),
}


class Images(nn.Module):
    """Blocks one after the other, as parts of a ``Sequential`` or in a loop over a list."""

    def __init__(self, kinds, width=4, loop=False):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        blocks = [CONVOLUTIONS[kind](width) for kind in kinds]
        self.blocks = nn.ModuleList(blocks) if loop else nn.Sequential(*blocks)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        if isinstance(self.blocks, nn.ModuleList):
            for block in self.blocks:
                x = block(x)
        else:
            x = self.blocks(x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Torch's attention, which returns a tuple."""

    def __init__(self, width):
        super().__init__()
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x, mask=None):
        return self.attend(x, x, x, need_weights=False)[0]


class Mlp(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Before(nn.Module):
    """Norms before the branches."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp, self.drop = Attention(width), Mlp(width), nn.Dropout(0.1)

    def forward(self, x, mask=None):
        x = x + self.drop(self.attention(self.norm1(x), mask=mask))
        return x + self.drop(self.mlp(self.norm2(x)))


class Behind(nn.Module):
    """Norms behind the sums, in a module of their own; the stream is passed by name."""

    def __init__(self, width):
        super().__init__()
        self.attention, self.mlp = Attention(width), Mlp(width)
        self.one, self.two = Sum(width), Sum(width)

    def forward(self, x, mask=None):
        x = self.one(self.attention(x, mask=mask), stream=x)
        return self.two(self.mlp(x), stream=x)


class Sum(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, added, stream):
        return self.norm(added + stream)


class Parallel(nn.Module):
    """Attention and MLP side by side, as in GPT-J and PaLM; returns a tuple."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(width), Attention(width), Mlp(width)

    def forward(self, x, mask=None):
        y = self.norm(x)
        return (self.attention(y, mask=mask) + self.mlp(y) + x, None)


TOKENS = {"before": Before, "behind": Behind, "parallel": Parallel}


class Texts(nn.Module):
    """Layers in a loop that gives them more than the stream, and takes tuples."""

    def __init__(self, kinds, width=8):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(TOKENS[kind](width) for kind in kinds)
        self.head = nn.Linear(width, 5)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            out = layer(x, mask=None)
            x = out[0] if isinstance(out, tuple) else out
        return self.head(x)


def images(*kinds, width=4, loop=False, seed=0):
    """A network for images, and inputs for it."""
    torch.manual_seed(seed)
    model = Images(kinds, width, loop)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return model.eval(), torch.randn(2, 3, 8, 8)


def texts(*kinds, width=8, seed=0):
    """A network for texts, and inputs for it."""
    torch.manual_seed(seed)
    return Texts(kinds, width).eval(), torch.randint(11, (2, 6))
