"""Scans, Fourier layers, graphs, mixers and sequence layers without attention or recurrence."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import IMAGE, Apply, awkward, conv, sandwich
from support.zoo.streams import TOKENS, WIDTH, stream


# Inner channels of the scan, states (rows of the two projections, columns of the table of decays),
# rank of the steps: three sets, all read out of one projection of known sizes.
@awkward(TOKENS, removable=WIDTH + 10 + 4 + 3)
def selective_scan():  # Mamba
    class Scan(nn.Module):
        def __init__(self):
            super().__init__()
            self.rank, self.states, self.inner = 3, 4, 10
            self.inp, self.conv = nn.Linear(WIDTH, 20), nn.Conv1d(10, 10, 3, padding=2, groups=10)
            self.project, self.step = nn.Linear(10, 3 + 8, bias=False), nn.Linear(3, 10)
            self.decay = nn.Parameter(torch.rand(10, 4).log())
            self.skip, self.out = nn.Parameter(torch.rand(10)), nn.Linear(10, WIDTH)

        def forward(self, x):
            n = x.shape[1]
            x, gate = self.inp(x).chunk(2, dim=-1)
            x = F.silu(self.conv(x.transpose(1, 2))[..., :n].transpose(1, 2))
            step, b, c = self.project(x).split([self.rank, self.states, self.states], dim=-1)
            step = F.softplus(self.step(step))
            a = torch.exp(step.unsqueeze(-1) * -torch.exp(self.decay))
            bx = step.unsqueeze(-1) * b.unsqueeze(2) * x.unsqueeze(-1)
            h, outs = torch.zeros_like(bx[:, 0]), []
            for i in range(n):
                h = a[:, i] * h + bx[:, i]
                outs.append((h * c[:, i].unsqueeze(1)).sum(-1))
            y = torch.stack(outs, dim=1) + x * self.skip
            return self.out(y * F.silu(gate))

    return stream(Scan())


# Each channel has four states of its own; the states are shared in number, not in weights.
@awkward(TOKENS, removable=WIDTH + 4)
def diagonal_state_space():
    class Diagonal(nn.Module):
        def __init__(self):
            super().__init__()
            self.decay, self.b, self.c = (nn.Parameter(torch.rand(WIDTH, 4)) for _ in range(3))

        def forward(self, x):
            n = x.shape[1]
            powers = torch.exp(-self.decay.unsqueeze(-1) * torch.arange(n, dtype=x.dtype))
            kernel = ((self.b * self.c).unsqueeze(-1) * powers).sum(1)
            x = F.pad(x.transpose(1, 2), (n - 1, 0))
            y = F.conv1d(x, kernel.flip(-1).unsqueeze(1), groups=x.shape[1])
            return torch.tanh(y).transpose(1, 2)

    return stream(Diagonal())


@awkward(TOKENS, removable=WIDTH)  # the long convolution through frequencies of the sequence
def convolution_by_fourier_transform():
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(WIDTH, 5))

        def forward(self, x):
            n = x.shape[1]
            x = torch.fft.rfft(x.transpose(1, 2), n=2 * n)
            y = torch.fft.irfft(x * torch.fft.rfft(self.kernel, n=2 * n), n=2 * n)[..., :n]
            return y.transpose(1, 2)

    return stream(Long())


@awkward(TOKENS, removable=0)  # frequencies of the channels mix all of them
def fourier_transform_of_channels():  # FNet
    return stream(Apply(lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real))


@awkward(TOKENS, removable=WIDTH)  # the same over places leaves channels alone
def fourier_transform_of_places():
    return stream(Apply(lambda x: torch.fft.fft(x, dim=1).real))


@awkward(IMAGE, removable=8 + 6 + 5)  # complex weights between input and output channels
def fourier_neural_operator():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.modes, self.short = 3, conv(8, 6, 1)
            self.weight = nn.Parameter(torch.randn(8, 6, 3, 3, dtype=torch.cfloat) * 0.1)

        def forward(self, x):
            _, _, h, w = x.shape
            f = torch.fft.rfft2(x)[:, :, : self.modes, : self.modes]
            out = torch.einsum("bixy,ioxy->boxy", f, self.weight.to(f.dtype))
            out = F.pad(out, (0, w // 2 + 1 - self.modes, 0, h - self.modes))
            return F.gelu(torch.fft.irfft2(out, s=(h, w)) + self.short(x))

    return sandwich(Spectral(), 8, 6)


@awkward(IMAGE, removable=8 + 5)  # a filter of each channel's frequencies, as pairs of reals
def global_filter():
    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 5, 8, 2) * 0.1)

        def forward(self, x):
            f = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2), norm="ortho")
            f = f * torch.view_as_complex(self.weight)
            x = torch.fft.irfft2(f, s=x.shape[2:], dim=(1, 2), norm="ortho")
            return x.permute(0, 3, 1, 2)

    return sandwich(Filter())


# Ten nodes with an adjacency; only features are channels.
@awkward((2, 10, 6), (2, 10, 10), removable=8 + 7)
class GraphConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 4)

    def forward(self, x, adjacency):
        adjacency = torch.sigmoid(adjacency) + torch.eye(x.shape[1], dtype=x.dtype)
        scale = adjacency.sum(-1, keepdim=True).rsqrt()
        adjacency = adjacency * scale * scale.transpose(1, 2)
        x = F.relu(adjacency @ self.first(x))
        return self.head(F.relu(torch.bmm(adjacency, self.second(x))).mean(1))


@awkward((10, 6), removable=8 + 7)  # the adjacency is a buffer of the model, squared
def graph_convolution_of_a_fixed_graph():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 4)
            self.register_buffer("adjacency", torch.rand(10, 10))

        def forward(self, x):
            two = self.adjacency @ self.adjacency
            return self.head(F.elu(two @ self.b(F.relu(self.adjacency @ self.a(x)))))

    return Fixed()


@awkward((10, 6), (10, 10), removable=4 * 3)  # scores of pairs: no head can leave before a concat
class GraphAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 3, bias=False) for _ in range(4))
        self.scores = nn.ParameterList(torch.randn(6, 1) for _ in range(4))
        self.head = nn.Linear(12, 4)

    def forward(self, x, adjacency):
        outs = []
        for layer, score in zip(self.layers, self.scores, strict=True):
            h = layer(x)
            e = h @ score[: h.shape[1]] + (h @ score[h.shape[1] :]).T
            e = torch.where(adjacency > 0, F.leaky_relu(e, 0.2), -9e15 * torch.ones_like(e))
            outs.append(F.elu(e.softmax(1) @ h))
        return self.head(torch.cat(outs, dim=1))


def _edges():
    return torch.randn(10, 6), torch.stack([torch.arange(20) % 10, torch.arange(20) * 7 % 10])


# Messages along a list of edges; both ends are concatenated.
@awkward(_edges, removable=8 + 9 + 7)
class MessagePassing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.message = nn.Linear(6, 8), nn.Linear(16, 9)
        self.update, self.head = nn.Linear(17, 7), nn.Linear(7, 4)

    def forward(self, x, edges):
        x = F.relu(self.inp(x))
        both = F.relu(self.message(torch.cat([x[edges[0]], x[edges[1]]], dim=-1)))
        index = edges[1].unsqueeze(-1).expand_as(both)
        total = torch.zeros(x.shape[0], both.shape[1], dtype=x.dtype).scatter_add(0, index, both)
        return self.head(F.relu(self.update(torch.cat([x, total], dim=1))))


@awkward((2, 7, 3), removable=8 + 9)  # a maximum over the points, their positions in the input
def point_cloud():
    return nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 9), Apply(lambda x: x.max(1)[0]), nn.ReLU(),
        nn.Linear(9, 4))  # fmt: skip


# Differences with the neighbours, nearest in the input; a maximum over them.
@awkward((2, 3, 9), removable=8 + 7)
class EdgeConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 8, 1, bias=False), nn.Conv2d(16, 7, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Conv1d(7, 4, 1)

    def pairs(self, x, at):
        b, c, n = x.shape
        near = x.transpose(1, 2).reshape(b * n, c)[at.flatten()].view(b, n, 3, c)
        x = x.transpose(1, 2).view(b, n, 1, c).expand(-1, -1, 3, -1)
        return torch.cat((near - x, x), dim=3).permute(0, 3, 1, 2)

    def forward(self, x):
        n = x.shape[2]
        at = torch.cdist(x.mT, x.mT).topk(3, dim=-1, largest=False)[1]
        at = at + torch.arange(x.shape[0]).view(-1, 1, 1) * n
        x = F.relu(self.norm(self.a(self.pairs(x, at)))).amax(-1)
        return self.head(F.relu(self.b(self.pairs(x, at))).amax(-1))


# Places are mixed by their own layers: hidden places are channels, tokens are not.
@awkward(TOKENS, removable=WIDTH + 9 + 16)
def mixer():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
            self.places = nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 5))
            self.mlp = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12))

        def forward(self, x):
            x = x + self.places(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.mlp(self.norm2(x))

    return stream(Mixer())


@awkward(TOKENS, removable=WIDTH + 8)  # column j of both halves
def spatial_gating_unit():
    class Gating(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(12, 16), nn.Linear(8, 12), nn.LayerNorm(8)
            self.places = nn.Conv1d(5, 5, 1)

        def forward(self, x):
            u, v = F.gelu(self.up(x)).chunk(2, dim=-1)
            return self.down(u * self.places(self.norm(v)))

    return stream(Gating())


# Time mixing: a running weighted mean of the values, channel by channel.
@awkward(TOKENS, removable=WIDTH + 10 + 16)
def time_and_channel_mixing():  # RWKV
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.rand(3, 1, 1, WIDTH))
            self.decay, self.first = nn.Parameter(torch.rand(10)), nn.Parameter(torch.rand(10))
            self.r, self.k, self.v = (nn.Linear(WIDTH, 10, bias=False) for _ in range(3))
            self.out, self.up, self.down = (
                nn.Linear(10, WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH))  # fmt: skip

        def forward(self, x):
            before = F.pad(x, (0, 0, 1, -1))
            parts = (x * mix + before * (1 - mix) for mix in self.mix)
            r, k, v = (f(part) for f, part in zip((self.r, self.k, self.v), parts, strict=True))
            above = below = torch.zeros_like(v[:, 0])
            outs = []
            for t in range(x.shape[1]):
                now = torch.exp(self.first + k[:, t])
                outs.append((above + now * v[:, t]) / (below + now))
                fade = torch.exp(-torch.exp(self.decay))
                above, below = fade * above + k[:, t].exp() * v[:, t], fade * below + k[:, t].exp()
            x = x + self.out(torch.sigmoid(r) * torch.stack(outs, dim=1))
            return x + self.down(torch.relu(self.up(x)).square())

    return stream(Mixing())


@awkward((2, 3, 16), removable=8 + 8 + 8)  # WaveNet: gates, residuals and skips
class DilatedGates(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.head = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 4, 1)
        self.gates = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=d) for d in (1, 2))
        self.outs = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(2))

    def forward(self, x):
        x, skips = self.inp(x), 0
        for gate, out in zip(self.gates, self.outs, strict=True):
            a, b = gate(F.pad(x, (gate.dilation[0], 0))).chunk(2, 1)
            y = out(torch.tanh(a) * torch.sigmoid(b))
            x, skips = x + y, skips + y
        return self.head(F.relu(skips))


# Two projections of the last step of a queue of frames: flattened windows of a sequence.
@awkward((2, 9, 6), removable=8 + 7)
def windows_of_frames_flattened():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.mix, self.head = nn.Linear(6, 8), nn.Linear(24, 7), nn.Linear(7, 4)

        def forward(self, x):
            x = torch.relu(self.inp(x))
            return self.head(torch.relu(self.mix(x.unfold(1, 3, 2).flatten(2))))

    return Frames()


@awkward(TOKENS, removable=WIDTH)  # a running sum over places, not over channels
def running_sums_over_places():
    return stream(Apply(lambda x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(1, -1, 1)))


@awkward(TOKENS, removable=0)  # a running sum over channels has an order
def running_sums_over_channels():
    return stream(Apply(lambda x: x.cumsum(-1)))


# Slots compete for places and are updated by a cell: the slots' channels are the cell's.
@awkward(TOKENS, removable=WIDTH + 8 + 5 + 9)
class SlotAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.slots = nn.Linear(6, WIDTH), nn.Parameter(torch.randn(1, 3, 8))
        self.q, self.k, self.v = nn.Linear(8, 5), nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 9)
        self.cell, self.norm, self.head = nn.GRUCell(9, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.inp(x))
        slots, k, v = self.slots.expand(x.shape[0], -1, -1), self.k(x), self.v(x)
        for _ in range(2):
            weights = (self.q(self.norm(slots)) @ k.transpose(1, 2) * 0.4).softmax(dim=1) + 1e-8
            updates = (weights / weights.sum(-1, keepdim=True)) @ v
            slots = self.cell(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return self.head(slots)


@awkward(IMAGE, removable=8 + 6 + 5)  # an embedding looked up by values: codes stay, width goes
def vector_quantisation():
    class Quantise(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.codes = conv(8, 6, 1), nn.Embedding(7, 6)

        def forward(self, x):
            x = self.down(x).permute(0, 2, 3, 1)
            flat = x.flatten(0, 2)
            weight = self.codes.weight
            apart = (
                flat.square().sum(1, keepdim=True) + weight.square().sum(1) - 2 * flat @ weight.t()
            )
            found = self.codes(apart.argmin(1)).view_as(x)
            return (x + (found - x).detach()).permute(0, 3, 1, 2)

    return sandwich(Quantise(), 8, 6)


# Four vectors of three and votes by einsum: 4 whole vectors leave more than 3 columns.
@awkward(IMAGE, removable=4)
class Capsules(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.votes = conv(3, 12), nn.Parameter(torch.randn(4, 3, 2, 5) * 0.3)

    def forward(self, x):
        x = self.conv(x).mean((2, 3)).view(-1, 4, 3)
        return torch.einsum("bij,ijkl->bikl", torch.tanh(x), self.votes).sum(1)


@awkward((2, 6), removable=8)
def factorisation_machine():  # squares of sums minus sums of squares, of embedded features
    class Machine(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.linear = nn.Parameter(torch.randn(6, 8)), nn.Linear(6, 1)

        def forward(self, x):
            both = (x @ self.table).square() - x.square() @ self.table.square()
            return self.linear(x) + 0.5 * both.sum(1, keepdim=True)

    return Machine()


@awkward((3, 6), removable=9 + 9)  # random features: cosines and sines side by side
def random_fourier_features():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(6, 9))
            self.mix, self.head = nn.Linear(18, 9), nn.Linear(9, 4)

        def forward(self, x):
            x = x @ self.table
            return self.head(torch.relu(self.mix(torch.cat([x.cos(), x.sin()], dim=-1))))

    return Features()
