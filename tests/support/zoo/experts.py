"""Mixtures of experts: hidden channels leave, routers stay."""

import torch
from torch import nn
from torch.nn import functional as F

from support.zoo.registry import awkward
from support.zoo.streams import TOKENS, WIDTH, stream

EXPERTS = 3


def own_mlp(hidden=10):
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))


class Stacked(nn.Module):
    """Weights of all experts in one tensor; each token goes through all, weighted."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 10) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, 10, WIDTH) * 0.3)

    def forward(self, x):
        y = F.silu(torch.einsum("bnd,edh->bneh", x, self.up))
        y = torch.einsum("bneh,ehd->bned", y, self.down)
        return (y * self.router(x).softmax(-1).unsqueeze(-1)).sum(2)


# All experts lose the same hidden channels; the router's outputs stay.
@awkward(TOKENS, removable=WIDTH + 10)
def experts_stacked_in_one_weight():
    return stream(Stacked())


@awkward(TOKENS, removable=WIDTH + 10)
def experts_stacked_for_batched_products():
    class Batched(Stacked):
        def forward(self, x):
            flat = x.flatten(0, 1)
            y = torch.bmm(flat.expand(EXPERTS, -1, -1), self.up).relu()
            y = torch.bmm(y, self.down)
            return (y * self.router(flat).softmax(-1).t().unsqueeze(-1)).sum(0).view_as(x)

    return stream(Batched())


@awkward(TOKENS, removable=WIDTH + 10)  # gate and up are halves of one weight
def experts_stacked_with_gates():
    class Gates(Stacked):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 20) * 0.3)

        def forward(self, x):
            gate, up = torch.einsum("bnd,edh->bneh", x, self.up).chunk(2, dim=-1)
            y = torch.einsum("bneh,ehd->bned", F.silu(gate) * up, self.down)
            return torch.einsum("bned,bne->bnd", y, self.router(x).softmax(-1))

    return stream(Gates())


@awkward(TOKENS, removable=WIDTH + 10)  # two experts of each token, their weights looked up
def experts_looked_up_for_each_token():
    class Lookup(Stacked):
        def forward(self, x):
            score, at = self.router(x).softmax(-1).topk(2, dim=-1)
            y = torch.einsum("bnd,bnkdh->bnkh", x, self.up[at]).relu()
            y = torch.einsum("bnkh,bnkhd->bnkd", y, self.down[at])
            return (y * score.unsqueeze(-1)).sum(2)

    return stream(Lookup())


@awkward(TOKENS, removable=WIDTH + 10)  # a loop over the experts' slices of one weight
def experts_indexed_in_a_loop():
    class Loop(Stacked):
        def forward(self, x):
            scores = self.router(x).softmax(-1)
            parts = [
                F.gelu(x @ self.up[i]) @ self.down[i] * scores[..., i : i + 1]
                for i in range(EXPERTS)
            ]
            return torch.stack(parts).sum(0)

    return stream(Loop())


# Experts that are modules have hidden channels of their own.
@awkward(TOKENS, removable=WIDTH + EXPERTS * 10)
def experts_in_a_list():
    class Soft(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(WIDTH, EXPERTS)
            self.experts = nn.ModuleList(own_mlp() for _ in range(EXPERTS))

        def forward(self, x):
            weights = self.router(x).softmax(-1)
            outs = torch.stack([expert(x) for expert in self.experts], dim=-1)
            return (outs * weights.unsqueeze(-2)).sum(-1)

    return stream(Soft())


# Tokens are sent to their experts: which ones is known at run time only.
@awkward(TOKENS, removable=WIDTH + EXPERTS * 10)
def experts_that_read_their_own_tokens():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(WIDTH, EXPERTS)
            self.experts = nn.ModuleList(own_mlp() for _ in range(EXPERTS))

        def forward(self, x):
            flat = x.reshape(-1, x.shape[-1])
            weights, chosen = self.router(flat).softmax(-1).topk(2, dim=-1)
            out = torch.zeros_like(flat)
            for number, expert in enumerate(self.experts):
                token, slot = torch.where(chosen == number)
                out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
            return out.view_as(x)

    return stream(Routed())


# No token of the example inputs reaches the first expert: it must be cut like the others.
@awkward(TOKENS, removable=WIDTH + 2 * 10)
def an_expert_without_tokens():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(own_mlp() for _ in range(2))

        def forward(self, x):
            flat = x.reshape(-1, x.shape[-1])
            out = torch.zeros_like(flat)
            for expert, chosen in zip(self.experts, (flat.sum(1) > 1e4, flat.sum(1) <= 1e4)):
                (token,) = torch.where(chosen)
                out = out.index_add(0, token, expert(flat[token]))
            return out.view_as(x)

    return stream(Sparse())


# An expert that all tokens share, beside one that is chosen by the sample.
@awkward(TOKENS, removable=WIDTH + 10 + 7)
def shared_expert_beside_a_gated_one():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.other, self.gate = own_mlp(), own_mlp(7), nn.Linear(WIDTH, 1)

        def forward(self, x):
            return self.shared(x) + torch.sigmoid(self.gate(x)) * self.other(x)

    return stream(Shared())
