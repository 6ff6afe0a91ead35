"""Mixtures of experts whose scores are other things than products, or weigh all of them.

Each has a method ``scores``, for references by hand.
"""

import torch
from torch import nn
from torch.nn import functional as F

from support.mixtures import Listed, expert


class Soft(nn.Module):
    """All experts take part, by their weights."""

    def __init__(self, how="loop", experts=4):
        super().__init__()
        self.how = how
        self.gate = nn.Sequential(nn.Linear(8, experts), nn.Tanh(), nn.Linear(experts, experts))
        self.experts = nn.ModuleList(expert() for _ in range(experts))

    def scores(self, x):
        return self.gate(x)

    def forward(self, x):
        gates = self.scores(x).relu() if self.how == "relu" else self.scores(x).softmax(-1)
        if self.how in ("loop", "relu"):
            out = torch.zeros_like(x)
            for number, part in enumerate(self.experts):
                out = out + gates[..., number : number + 1] * part(x)
            return out
        made = torch.stack([part(x) for part in self.experts], -1)
        if self.how == "einsum":
            return torch.einsum("...de,...e->...d", made, gates)
        return (made @ gates.unsqueeze(-1)).squeeze(-1)


class Batched(nn.Module):
    """All take part, as slices of tensors."""

    def __init__(self, experts=4):
        super().__init__()
        self.router = nn.Linear(8, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 8, 6) / 3)
        self.down = nn.Parameter(torch.randn(experts, 6, 8) / 3)
        self.num_experts = experts

    def scores(self, x):
        return self.router(x)

    def forward(self, x):
        flat = x.reshape(-1, 8)
        gates = self.scores(flat).softmax(-1)
        h = torch.bmm(flat.expand(self.num_experts, -1, -1), self.up).relu()
        return (torch.bmm(h, self.down) * gates.t()[..., None]).sum(0).reshape(x.shape)


class Slots(nn.Module):
    """Experts compute slots, which are mixtures of tokens (Puigcerver et al., 2023)."""

    def __init__(self, how="plain", experts=4, slots=3):
        super().__init__()
        self.how, self.num_experts, self.slots = how, experts, slots
        if how == "layer":
            self.phi = nn.Linear(8, experts * slots)
        elif how == "first":
            self.phi = nn.Parameter(torch.randn(experts, slots, 8) / 2)
        else:
            self.phi = nn.Parameter(torch.randn(8, experts, slots) / 2)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.experts = nn.ModuleList(expert() for _ in range(experts))

    def scores(self, x):
        if self.how == "layer":
            return self.phi(x).unflatten(-1, (self.num_experts, self.slots)).transpose(-1, -2)
        if self.how == "first":
            return torch.einsum("btd,esd->btse", x, self.phi)
        if self.how == "normed":
            x, phi = F.normalize(x, dim=-1), self.scale * F.normalize(self.phi, dim=0)
            return torch.einsum("btd,des->btse", x, phi)
        return torch.einsum("btd,des->btse", x, self.phi)

    def forward(self, x):
        scores = self.scores(x).transpose(-1, -2)
        given = torch.einsum("btd,btes->ebsd", x, scores.softmax(1))
        made = torch.stack([part(t) for part, t in zip(self.experts, given)], 1).flatten(1, 2)
        return torch.einsum("bpd,btp->btd", made, scores.flatten(2).softmax(-1))


class Kernels(nn.Module):
    """A mixture of kernels for every image (CondConv, Yang et al., 2019)."""

    def __init__(self, how="sigmoid", experts=3):
        super().__init__()
        self.how, self.num_experts = how, experts
        self.routing = nn.Linear(8, experts)
        shape = (experts, 8 * 8 * 9) if how == "flat" else (experts, 8, 8, 3, 3)
        self.weight = nn.Parameter(torch.randn(shape) / 5)
        self.bias = nn.Parameter(torch.randn(experts, 8) / 3)

    def scores(self, x):
        return self.routing(x.mean((2, 3)))

    def forward(self, x):
        scores = self.scores(x)
        gates = scores.softmax(-1) if self.how == "softmax" else scores.sigmoid()
        images, width, *sides = x.shape
        kernel = (gates @ self.weight.reshape(self.num_experts, -1)).reshape(-1, width, 3, 3)
        out = F.conv2d(
            x.reshape(1, -1, *sides), kernel, (gates @ self.bias).reshape(-1), 1, 1, 1, images
        )
        return out.reshape(x.shape)


class Scored(Listed):
    """The best are chosen, by scores of many kinds."""

    def __init__(self, how="product", experts=5, chosen=2):
        super().__init__(experts, chosen)
        self.how = how
        self.temperature = nn.Parameter(torch.tensor(0.4))
        if how == "weight norm":
            self.router = nn.utils.parametrizations.weight_norm(self.router)
        elif how == "two layers":
            self.router = nn.Sequential(
                nn.Linear(8, experts), nn.ReLU(), nn.Linear(experts, experts)
            )
        elif how in _CENTRES:
            self.router, self.centres = None, nn.Parameter(torch.randn(experts, 8))
        elif how == "scaled":
            self.factor = nn.Parameter(torch.rand(experts) + 0.5)
            self.shift = nn.Parameter(torch.randn(experts))
        elif how == "noise":
            self.router, self.gate = None, nn.Parameter(torch.randn(8, experts) / 2)
            self.noise = nn.Parameter(torch.randn(8, experts) / 2)

    def scores(self, x):
        return _CENTRES[self.how](x, self.centres) if self.how in _CENTRES else self.plain(x)

    def plain(self, x):
        if self.how == "noise":
            clean = x @ self.gate
            noise = torch.randn_like(clean) * F.softplus(x @ self.noise)
            return clean + noise if self.training else clean
        if self.how == "cosine of weights":
            weight = F.normalize(self.router.weight, dim=-1)
            return F.linear(x, weight) * self.temperature.exp().clamp(max=100)
        scores = self.router(x)
        if self.how == "scaled":
            return scores * self.factor + self.shift
        if self.how == "bounded":
            return scores.clamp(-20, 20)
        return 3 * torch.tanh(scores / 3) if self.how == "capped" else scores

    def gates(self, scores):
        return scores.softmax(-1)

    def forward(self, x):
        flat = x.reshape(-1, 8)
        weights, places = self.gates(self.scores(flat)).topk(self.chosen, -1)
        return self.mixed(flat, weights, places).reshape(x.shape)

    def mixed(self, flat, weights, places):
        out = torch.zeros_like(flat)
        for number, part in enumerate(self.experts):
            rows, slot = torch.where(places == number)
            made = part(flat[rows])
            made = made[0] if isinstance(made, tuple) else made
            out = out.index_add(0, rows, made * weights[rows, slot, None])
        return out


def _cosine(x, centres):
    return (
        (x / x.norm(dim=-1, keepdim=True)) @ (centres / centres.norm(dim=-1, keepdim=True)).T / 0.3
    )


def _expanded(x, centres):
    return 2 * x @ centres.T - x.pow(2).sum(-1, True) - centres.pow(2).sum(-1)


_CENTRES = {
    "cosine": _cosine,
    "distance": lambda x, centres: -torch.cdist(x, centres),
    "kernel": lambda x, centres: (-torch.cdist(x, centres)).exp(),
    "squares": lambda x, centres: -((x[:, None] - centres) ** 2).sum(-1),
    "expanded": lambda x, centres: (
        2 * x @ centres.T - x.pow(2).sum(-1, True) - (centres**2).sum(-1)
    ),
}


class Square(Scored):
    """As many experts as channels: which side of the weight is which cannot be read off it."""

    def __init__(self):
        super().__init__(experts=8)
        self.router, self.gate = None, nn.Parameter(torch.randn(8, 8))

    def scores(self, x):
        return x @ self.gate


class Choosing(nn.Module):
    """Every expert chooses its tokens (Zhou et al., 2022)."""

    def __init__(self, stacked=False, experts=4):
        super().__init__()
        self.router = nn.Linear(8, experts, bias=False)
        self.stacked = stacked
        if stacked:
            self.up = nn.Parameter(torch.randn(experts, 8, 6) / 3)
            self.down = nn.Parameter(torch.randn(experts, 6, 8) / 3)
        else:
            self.experts = nn.ModuleList(expert() for _ in range(experts))

    def scores(self, x):
        return self.router(x)

    def forward(self, x):
        flat = x.reshape(-1, 8)
        weights, places = self.scores(flat).softmax(-1).topk(len(flat) // 3, 0)
        if self.stacked:
            made = torch.bmm(torch.bmm(flat[places.T], self.up).relu(), self.down)
        else:
            made = torch.stack([part(flat[p]) for part, p in zip(self.experts, places.T)])
        made = (made * weights.T[..., None]).reshape(-1, 8)
        return torch.zeros_like(flat).index_add(0, places.T.reshape(-1), made).reshape(x.shape)


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


class Constant(nn.Module):
    """A learned vector beside the token (Jin et al., "MoE++", 2024)."""

    def __init__(self):
        super().__init__()
        self.vector, self.mix = nn.Parameter(torch.randn(8)), nn.Linear(8, 2)

    def forward(self, x):
        gates = self.mix(x).softmax(-1)
        return gates[:, :1] * x + gates[:, 1:] * self.vector


class Unlike(Scored):
    """Some experts are not like the others."""

    def __init__(self, *others, first=False):
        super().__init__(experts=5 + len(others))
        equal, unlike = [expert() for _ in range(5)], [kind() for kind in others]
        self.experts = nn.ModuleList(unlike + equal if first else equal + unlike)


class Beyond(Scored):
    """Experts behind those of the list hand tokens on (LongCat, 2025)."""

    def __init__(self, experts=5, others=2):
        super().__init__(experts=experts + others)
        self.n_routed_experts = experts
        self.experts = self.experts[:experts]

    def mixed(self, flat, weights, places):
        handed = (weights * (places >= self.n_routed_experts)).sum(-1, keepdim=True)
        return super().mixed(flat, weights, places) + handed * flat


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = expert()

    def forward(self, x):
        return self.inner(x), None


class Pairs(Scored):
    """Experts return tuples."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Pair() for _ in range(5))


class Drawn(Scored):
    """Which expert it is is drawn in training."""

    def gates(self, scores):
        if self.training and self.how == "gumbel":
            return F.gumbel_softmax(scores, hard=True)
        return scores.softmax(-1)

    def forward(self, x):
        flat = x.reshape(-1, 8)
        gates = self.gates(self.scores(flat))
        if self.training and self.how == "multinomial":
            places = torch.multinomial(gates, 1)
        else:
            places = gates.argmax(-1, keepdim=True)
        return self.mixed(flat, gates.gather(-1, places), places).reshape(x.shape)


class Losing(Scored):
    """Returns a loss that spreads tokens evenly (Fedus et al., 2021)."""

    def __init__(self, kept_in=""):
        super().__init__(chosen=1)
        self.kept_in, self.aux = kept_in, None

    def forward(self, x):
        flat = x.reshape(-1, 8)
        gates = self.scores(flat).softmax(-1)
        weights, places = gates.topk(1, -1)
        shares = F.one_hot(places[:, 0], self.num_experts).to(gates).mean(0)
        loss = self.num_experts * (shares * gates.mean(0)).sum()
        out = self.mixed(flat, weights, places).reshape(x.shape)
        if not self.kept_in:
            return out, loss
        setattr(self, self.kept_in, loss)
        return out


KINDS = {
    **{f"soft, {how}": (lambda how=how: Soft(how)) for how in ("loop", "einsum", "matmul", "relu")},
    "soft, batched": Batched,
    **{
        f"slots, {how}": (lambda how=how: Slots(how))
        for how in ("plain", "first", "layer", "normed")
    },
    **{
        how: (lambda how=how: Scored(how))
        for how in (
            *("cosine of weights", "weight norm", "two layers", "scaled", "bounded", "capped"),
            *("noise", *_CENTRES),
        )
    },
    "a square": Square,
    "tokens are chosen": Choosing,
    "tokens are chosen, stacked": lambda: Choosing(stacked=True),
    "one is zero": lambda: Unlike(Zero),
    "three are others": lambda: Unlike(Zero, nn.Identity, Constant, first=True),
    "experts behind the list": Beyond,
    "experts return tuples": Pairs,
    "gumbel": lambda: Drawn("gumbel"),
    "multinomial": lambda: Drawn("multinomial"),
    "a loss in an attribute": lambda: Losing("aux"),
}
KERNELS = ("sigmoid", "softmax", "flat")
