"""Mixtures of experts in many spellings, over eight channels."""

import torch
from torch import nn
from torch.nn import functional as F


def expert(width=8, hidden=6):
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Listed(nn.Module):
    """A list of modules; every one runs on the tokens that choose it."""

    def __init__(self, experts=5, chosen=2, shared=False):
        super().__init__()
        self.router = nn.Linear(8, experts)
        self.experts = nn.ModuleList(expert() for _ in range(experts))
        self.shared = expert() if shared else None
        self.num_experts, self.chosen = experts, chosen
        nn.init.orthogonal_(self.router.weight)  # each is chosen for some of few tokens
        nn.init.normal_(self.router.bias, std=0.1)

    def forward(self, x):
        flat = x.reshape(-1, 8)
        weights, places = self.router(flat).softmax(-1).topk(self.chosen, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number in range(self.num_experts):
            rows, slot = torch.where(places == number)
            if len(rows):
                added = self.experts[number](flat[rows]) * weights[rows, slot, None]
                out = out.index_add(0, rows, added)
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.reshape(x.shape)


class Counted(Listed):
    """Runs over the list itself, and all tokens through every expert."""

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        chosen = scores.topk(self.chosen, -1).indices
        hit = F.one_hot(chosen, len(self.experts)).sum(-2)
        gates = (scores * hit).to(x)
        return sum(gate * part(x) for gate, part in zip(gates[..., None].unbind(-2), self.experts))


class Named(nn.Module):
    """A dictionary of experts, of which every token chooses one."""

    def __init__(self, experts=4):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(8, experts))
        self.experts = nn.ModuleDict({f"expert_{n}": expert() for n in range(experts)})
        self.experts.add_module("dropout", nn.Dropout(0.1))  # is no expert

    def forward(self, x):
        flat = x.reshape(-1, 8)
        scores = (flat @ self.gate).softmax(-1)
        best, place = scores.max(-1)
        out = torch.zeros_like(flat)
        for number in range(len(self.experts) - 1):
            part = self.experts[f"expert_{number}"]
            rows = (place == number).nonzero()[:, 0]
            out[rows] = self.experts["dropout"](best[rows, None] * part(flat[rows]))
        return out.reshape(x.shape)


class Stacked(nn.Module):
    """Weights of three dimensions, gathered for every token."""

    def __init__(self, experts=6, chosen=2, sigmoid=False, groups=1):
        super().__init__()
        self.router = nn.Linear(8, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 8, 7) / 3)
        self.down = nn.Parameter(torch.randn(experts, 7, 8) / 3)
        self.bias = nn.Parameter(torch.randn(experts, 8) / 3)
        self.n_group, self.n_experts = groups, experts
        self.chosen, self.sigmoid = chosen, sigmoid
        self.register_buffer("correction", torch.randn(experts) / 3)

    def scores(self, x):
        scores = self.router(x)
        if not self.sigmoid:
            return scores.softmax(-1), scores
        return scores.sigmoid(), scores.sigmoid() + self.correction

    def forward(self, x):
        gates, ranked = self.scores(x)
        if self.n_group > 1:
            grouped = ranked.unflatten(-1, (self.n_group, self.n_experts // self.n_group))
            best = grouped.topk(2, -1).values.sum(-1).topk(1, -1).indices
            inside = torch.zeros_like(grouped[..., 0]).scatter(-1, best, 1.0).bool()
            ranked = grouped.masked_fill(~inside[..., None], -torch.inf).flatten(-2)
        places = ranked.topk(self.chosen, -1).indices
        h = torch.einsum("...d,...kde->...ke", x, self.up[places]).relu()
        h = torch.einsum("...ke,...ked->...kd", h, self.down[places]) + self.bias[places]
        return (h * gates.gather(-1, places)[..., None]).sum(-2)


class Noisy(Listed):
    """Noise is added to the scores while the model trains (Shazeer et al., 2017)."""

    def __init__(self, experts=5):
        super().__init__(experts)
        self.noise = nn.Linear(8, experts, bias=False)

    def forward(self, x):
        flat = x.reshape(-1, 8)
        scores = self.router(flat)
        if self.training:
            scores = scores + torch.randn_like(scores) * F.softplus(self.noise(flat))
        weights, places = scores.topk(self.chosen, -1)
        weights = weights.softmax(-1)
        out = torch.zeros_like(flat)
        for number, part in enumerate(self.experts):
            rows, slot = torch.where(places == number)
            out = out.index_add(0, rows, part(flat[rows]) * weights[rows, slot, None])
        return out.reshape(x.shape)


class Images(nn.Module):
    """Convolutions as experts, chosen for every image by its mean."""

    def __init__(self, experts=4, chosen=2):
        super().__init__()
        self.fc = nn.Linear(8, experts)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(experts))
        self.chosen = chosen
        with torch.no_grad():
            self.fc.weight.mul_(10)

    def forward(self, x):
        weights, places = self.fc(x.mean((2, 3))).topk(self.chosen)
        weights = weights.softmax(-1)
        images = []
        for image, gate, place in zip(x, weights, places.tolist()):
            made = [g * self.convs[p](image[None]) for g, p in zip(gate, place)]
            images.append(torch.stack(made).sum(0))
        return torch.cat(images)


class Around(nn.Module):
    """A layer before a mixture and one behind it, on a stream."""

    def __init__(self, *mixtures):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.layers = nn.ModuleList(mixtures)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in mixtures)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        for norm, layer in zip(self.norms, self.layers):
            h = h + layer(norm(h))
        return self.last(h)


class Pictures(nn.Module):
    def __init__(self, mixture):
        super().__init__()
        self.first, self.mixture = nn.Conv2d(3, 8, 3), mixture
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last((h + self.mixture(h)).mean((2, 3)))


TOKENS = {
    "a list": Listed,
    "a list and a shared one": lambda: Listed(shared=True),
    "a list that is run over": Counted,
    "a dictionary, one for each token": Named,
    "stacked weights": Stacked,
    "sigmoids and a correction": lambda: Stacked(sigmoid=True),
    "groups": lambda: Stacked(8, groups=2),
    "groups and a correction": lambda: Stacked(8, groups=2, sigmoid=True),
    "noise": Noisy,
}


def built(name):
    """A model with two mixtures, or one of images, and its inputs."""
    torch.manual_seed(0)
    if name == "images":
        return Pictures(Images()).double().eval(), torch.randn(8, 3, 6, 6).double()
    kind = TOKENS.get(name, Listed)
    model = Around(kind(), kind()).double().eval()
    return model, torch.randn(3, 12, 5).double()


SPELLINGS = (*TOKENS, "images")
