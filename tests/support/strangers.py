"""Plans and files as strangers might write them: real ones, changed, under a right digest."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import graphprune
from graphprune.execute import checkpoint


class Views(nn.Module):
    """Heads by an attribute, a number in the code of a helper, a remembered tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.shape = 4, (4, 6)
        self.into, self.out = nn.Linear(5, 24), nn.Linear(24, 3)
        self.table = "table.pt"

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x).view(-1, self.heads, 6).relu()
        return self.out(x.reshape(-1, self.shape[0] * 6))


class Written(nn.Module):
    """Widths that are written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 12), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).split([8, 4], -1)
        return self.last(left.relu()) + right.mean()


class Shuffled(nn.Module):
    """A buffer that permutes channels, an RMSNorm whose eps follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 2)
        self.register_buffer("order", torch.arange(8).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)[:, self.order]))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 2),
    )  # fmt: skip


def masked() -> nn.Module:
    """With dead channels that leave constants behind."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Linear(8, 2))
    prune.ln_structured(net[0], "weight", 0.5, n=2, dim=0)
    return net


class Counted(nn.Module):
    """Norms and a softmax that count what left, as modules and in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        self.groups, self.bare = nn.GroupNorm(1, 8), nn.LayerNorm(8, elementwise_affine=False)
        self.softmax, self.middle = nn.Softmax(-1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.softmax(self.groups(self.norm(self.first(x)))))
        return self.last(F.layer_norm(self.bare(x), self.bare.normalized_shape) * x.softmax(-1))


def zeroes() -> nn.Module:
    """With zeroes in front of a LayerNorm."""
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    with torch.no_grad():
        net[0].weight[:3] = net[0].bias[:3, None] = 0
    return net


def seeded(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return factory().eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "views": (Views, torch.randn(2, 5)),
    "written": (Written, torch.randn(2, 4)),
    "shuffled": (Shuffled, torch.randn(2, 4)),
    "images": (images, torch.randn(2, 3, 8, 8)),
    "masked": (masked, torch.randn(2, 4)),
    "counted": (Counted, torch.randn(2, 4)),
    "zeroes": (zeroes, torch.randn(2, 4)),
}


def plan_for(name: str) -> graphprune.Plan:
    """A real plan of the model."""
    factory, x = MODELS[name]
    model = seeded(factory)
    if name in ("masked", "zeroes"):
        return graphprune.Plan.from_masks(model, x)
    return graphprune.trace(model, x).plan(0.5, exact_only=name in ("shuffled", "counted"))


def forged(body: Any, version: int = 3) -> str:
    """The text of a plan with a right digest."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(
        {"format": "graphprune-plan", "version": version, "digest": digest, "plan": body}
    )


def body_of(plan: graphprune.Plan) -> Any:
    return json.loads(plan.to_json())["plan"]


# What a value may become, whatever it was.
POOL: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, -(2**63), 2**70, 0.0, -1.5, 1e308, "", "x", "0",
    "0-3", "3-0", "-", "0-99999999", "0,0", "1-2-3", "weight", "0.weight", "training", "_modules",
    "__class__", "_forward_hooks", "global", "method", "attribute", [], [0], [[]], {}, {"a": 1},
    {"after": {"after": 3}}, "\x00", "../x", "/dev/zero", "9" * 400,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to everything in nested data."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items if isinstance(value, dict | list) else ():
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))
        else:
            yield (*path, key)


def mutated(body: Any, generator: random.Random) -> Any:
    """A copy with one to three changes."""
    body = copy.deepcopy(body)
    for _ in range(generator.choice((1, 1, 2, 3))):
        ways = list(places(body))
        path = generator.choice(ways)
        holder = body
        for step in path[:-1]:
            holder = holder[step]
        key, old = path[-1], holder[path[-1]]
        kind = generator.choice(("pool", "pool", "swap", "near", "drop", "twice"))
        if kind == "drop":
            del holder[key]
        elif kind == "twice" and isinstance(holder, list):
            holder.append(copy.deepcopy(old))
        elif kind == "near" and type(old) in (int, float):
            holder[key] = old + generator.choice((-1, 1, -old, old))
        elif kind == "swap":
            other = body
            for step in generator.choice(ways):
                other = other[step] if _has(other, step) else other
            holder[key] = copy.deepcopy(other)
        else:
            holder[key] = copy.deepcopy(generator.choice(POOL))
    return body


def _has(value: Any, step: Any) -> bool:
    if isinstance(value, dict):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and step < len(value)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a plan could change: values, attributes, classes, hooks."""
    found: dict[str, Any] = {name: t.detach().clone() for name, t in model.state_dict().items()}
    for name, module in model.named_modules():
        found[f"{name}:class"] = type(module)
        for key, value in vars(module).items():
            if not isinstance(value, Tensor) and key not in ("_parameters", "_buffers", "_modules"):
                found[f"{name}:{key}"] = copy.copy(value)
    return found


def difference(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The names of what is not the same."""
    odd = before.keys() ^ after.keys()
    for name in before.keys() & after.keys():
        one, two = before[name], after[name]
        tensors = isinstance(one, Tensor) and isinstance(two, Tensor)
        same = torch.equal(one, two) if tensors else type(one) is type(two) and one == two
        odd |= set() if same else {name}
    return odd


def rewrite(path: Any, generator: random.Random) -> None:
    """Change a checkpoint anywhere, and give it a right digest."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    kind = generator.choice(("plan", "plan", "text", "aliases", "layouts", "dtypes", "tensor"))
    if kind == "plan":
        metadata["plan"] = forged(mutated(json.loads(metadata["plan"])["plan"], generator))
    elif kind == "text":
        metadata["plan"] = str(generator.choice(("/dev/zero", "[" * 9999, "{}", "null", "", "1")))
    elif kind == "tensor":
        name = generator.choice(sorted(tensors))
        change: Callable[[Tensor], Tensor] = generator.choice(
            (
                lambda t: t.flatten()[:1].clone(), lambda t: t.double(), lambda t: t.to(torch.int8),
                lambda t: t.unsqueeze(0), lambda t: t.bool(), lambda t: t.new_zeros(0),
            )
        )  # fmt: skip
        tensors[name] = change(tensors[name]).contiguous()
        if generator.random() < 0.3:
            tensors[generator.choice(("x", "0.weight_mask", "training"))] = tensors.pop(name)
    else:
        names = [*tensors, "x", "0.bias", "int8", "nn", "load"]
        metadata[kind] = generator.choice(
            (
                json.dumps({generator.choice(names): generator.choice(names)}),
                json.dumps(generator.choice(POOL)), "{", json.dumps({"x": POOL[0]}),
            )
        )  # fmt: skip
    metadata["digest"] = checkpoint._digest(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
