"""Single weights instead of channels: magnitude masks of ``torch.nn.utils.prune``, and N:M."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune

from graphprune.errors import InputError, warn
from graphprune.planning.naming import patterns_of
from graphprune.planning.options import check_ratio
from graphprune.record.attention import MultiheadAttention
from graphprune.record.checks import check_model
from graphprune.record.masked_names import mask_hooks
from graphprune.record.tensors import named_modules
from graphprune.text import render, share, shorten
from graphprune.training.ranks import unwrapped_model

SCOPES = ("global", "local")
_LAYERS = (nn.Linear, _ConvNd)
Target = tuple[str, nn.Linear | _ConvNd]


@dataclass(frozen=True)
class LayerSparsity:
    """How many weights of a layer are zero, and why it was left alone, if it was."""

    layer: str
    size: int
    zeros: int
    note: str = ""


@dataclass(frozen=True)
class Sparsity:
    """The zeros in the weights of linear layers and convolutions; ``print`` it."""

    layers: tuple[LayerSparsity, ...]

    @property
    def fraction(self) -> float:
        """The fraction of zeros in the layers that have no note."""
        found = [layer for layer in self.layers if not layer.note]
        return sum(layer.zeros for layer in found) / max(1, sum(layer.size for layer in found))

    def __str__(self) -> str:
        """A table of the layers."""
        rows = [
            (row.layer, f"{row.size:,}", share(row.zeros, row.size), row.note)
            for row in self.layers
        ]
        title = f"{self.fraction:.1%} of the weights are zero"
        return render(title, ("layer", "weights", "zero", "left alone"), rows)


class NMStructured(prune.BasePruningMethod):
    """Of every ``m`` weights along the input channels the ``n`` largest stay.

    Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021. The method can be used like
    those of ``torch.nn.utils.prune``: ``NMStructured.apply(module, "weight", n=2, m=4)``.

    Example:
        >>> import torch
        >>> from graphprune.training import NMStructured
        >>> layer = torch.nn.Linear(8, 2)
        >>> _ = NMStructured.apply(layer, "weight", n=2, m=4)
        >>> layer.weight_mask.reshape(-1, 4).sum(1)
        tensor([2., 2., 2., 2.])
    """

    PRUNING_TYPE = "global"  # sees the whole tensor, with the mask before

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask, of the shape of the weight ``[out, in, ...]``."""
        if t.shape[1] % self.m:
            raise InputError(f"{t.shape[1]} input channels are no multiple of {self.m}")
        importance = (t.detach().abs() * default_mask).movedim(1, -1)
        blocks = importance.unflatten(-1, (-1, self.m))
        stays = torch.zeros_like(blocks).scatter_(-1, blocks.topk(self.n, dim=-1).indices, 1)
        return stays.flatten(-2).movedim(-1, 1) * default_mask


def sparsify(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | Mapping[nn.Module, float] | None = None,
    *,
    pattern: str | None = None,
    scope: str = "global",
    keep: str | nn.Module | Iterable[str | nn.Module] = (),
) -> Sparsity:
    """Mask the smallest single weights of linear layers and convolutions.

    The masks are those of ``torch.nn.utils.prune``: parameters stay the same objects under the name
    ``weight_orig``, so that optimizers go on; a masked weight gets no gradient. Weights that are
    zero or masked already count as removed, and stay masked. Works on small models as well: first
    smaller, then sparse. ``make_permanent`` writes the zeros into the weights.

    Args:
        model: is masked in place.
        sparsity: the fraction of weights that shall be zero, in [0, 1); or such fractions by glob
            pattern of layers, ``{"layer3.*": 0.9, "fc": 0.5}``, or by module: the last one that
            fits counts, each layer is compared by itself, and others are left alone.
        pattern: ``"2:4"`` keeps two of every four weights along the input channels, any ``"n:m"``
            likewise; instead of a sparsity.
        scope: ``"global"`` compares the weights of all layers, ``"local"`` those of each.
        keep: glob patterns of layers, or modules, that stay dense.

    Returns:
        The zeros of every layer. Layers are left alone, with a note, when their weight is shared or
        computed, or when another module reads it without calling them.

    Raises:
        InputError: an argument is wrong, or no layer can be masked.
        ModelError: as for ``graphprune.trace``.

    Warns:
        PruningWarning: a layer has lost all its weights.

    Example:
        >>> import torch
        >>> from graphprune.training import sparsify
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> round(sparsify(net, 0.5).fraction, 3), int(net[0].weight_mask.sum() < 32)
        (0.5, 1)
    """
    if (sparsity is None) == (pattern is None):
        raise InputError('say either a sparsity such as 0.8 or a pattern such as "2:4"')
    if scope not in SCOPES:
        raise InputError(f"scope must be one of {', '.join(SCOPES)}, not {scope!r}")
    model = unwrapped_model(model)
    check_model(model)
    by_layer = None
    if isinstance(sparsity, Mapping):
        if scope != SCOPES[0]:
            raise InputError("sparsity by layer compares within each: leave scope out")
        by_layer = _by_layer(sparsity, model)
    targets, notes = layers_to_mask(model, patterns_of(keep, model, "keep"), by_layer)
    if pattern is not None:
        _mask_pattern(targets, notes, *_numbers(pattern))
    elif by_layer is not None:
        for target in targets:
            _mask_smallest([target], by_layer[target[0]], scope)
    else:
        _mask_smallest(targets, check_ratio(sparsity, "sparsity", ""), scope)
    report = sparsity_of(model, notes)
    empty = [row.layer for row in report.layers if row.zeros == row.size and not row.note]
    if empty:
        advice = "" if scope == "local" or pattern else "use scope='local', or "
        warn(f"no weight is left in {shorten(empty)}: {advice}keep= them, or ask for less")
    return report


def sparsity_of(model: nn.Module, notes: Mapping[str, str] | None = None) -> Sparsity:
    """Count the zeros in the weights of linear layers and convolutions.

    Args:
        model: masked or not.
        notes: why layers were left alone, by name.

    Example:
        >>> import torch
        >>> from graphprune.training import sparsity_of
        >>> sparsity_of(torch.nn.Sequential(torch.nn.Linear(4, 8))).fraction
        0.0
    """
    model = unwrapped_model(model)
    rows = []
    for name, module in named_modules(model):
        if isinstance(module, _LAYERS):
            weight = module.weight.detach()
            hook = prune_hook(module)
            if hook is not None:  # the weight itself may be as it was before the last step
                weight = hook.apply_mask(module).detach()
            zeros = weight.numel() - int(weight.count_nonzero())
            rows.append(LayerSparsity(name, weight.numel(), zeros, (notes or {}).get(name, "")))
    return Sparsity(tuple(rows))


def make_permanent(model: nn.Module) -> nn.Module:
    """Write the zeros of all masks into the weights, and drop the masks (``prune.remove``).

    Parameters stay the same objects. Training on would fill the zeros again.

    Args:
        model: changed in place, and returned.

    Example:
        >>> import torch
        >>> from graphprune.training import make_permanent, sparsify
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> _ = sparsify(net, 0.5)
        >>> sorted(dict(make_permanent(net).named_parameters()))
        ['0.bias', '0.weight', '1.bias', '1.weight']
    """
    for _, module in named_modules(unwrapped_model(model)):
        for hook in mask_hooks(module):
            prune.remove(module, hook._tensor_name)
    return model


def prune_hook(module: nn.Module) -> prune.BasePruningMethod | None:
    """The hook that masks the weight of a module, if one does."""
    return next((hook for hook in mask_hooks(module) if hook._tensor_name == "weight"), None)


def _by_layer(amounts: Mapping[Any, Any], model: nn.Module) -> dict[str, float]:
    """The sparsity of every layer that patterns or modules name."""
    by_pattern = {p: a for k, a in amounts.items() for p in patterns_of([k], model, "sparsity")}
    names = [name for name, module in named_modules(model) if isinstance(module, _LAYERS)]
    found: dict[str, float] = {}
    for pattern, amount in by_pattern.items():
        if not isinstance(pattern, str):
            raise InputError(
                "sparsity must map glob patterns of layers, or modules, to fractions, such as "
                f'{{"layer3.*": 0.9}}; got {pattern!r}'
            )
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise InputError(
                f"sparsity pattern {pattern!r} fits no layer; layers: {shorten(names, 12)}"
            )
        found |= dict.fromkeys(fitting, check_ratio(amount, f"sparsity[{pattern!r}]", ""))
    return found


def layers_to_mask(
    model: nn.Module, keep: str | Iterable[str], only: Container[str] | None = None
) -> tuple[list[Target], dict[str, str]]:
    """The layers to mask by name, and why the others are left alone."""
    patterns = (keep,) if isinstance(keep, str) else tuple(keep)
    layers = [(name, m) for name, m in named_modules(model) if isinstance(m, _LAYERS)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in layers):
            names = shorten([name for name, _ in layers], 12)
            raise InputError(f"keep pattern {pattern!r} fits no layer; layers: {names}")
    members = [p for _, m in named_modules(model) for p in m._parameters.values()]
    uses = Counter(id(parameter) for parameter in members if parameter is not None)
    inside = read_elsewhere(model)
    notes: dict[str, str] = {}
    targets: list[Target] = []
    for name, module in layers:
        masked = prune_hook(module) is not None
        weight = module._parameters.get("weight_orig" if masked else "weight")
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            notes[name] = "keep"
        elif only is not None and name not in only:
            notes[name] = "no sparsity for it"
        elif id(module) in inside:
            notes[name] = "another module reads its weight"
        elif weight is None:
            notes[name] = "its weight is computed"
        elif uses[id(weight)] > 1:
            notes[name] = "its weight is shared"
        else:
            targets.append((name, module))
    if not targets:
        why = "; ".join(f"{name}: {note}" for name, note in notes.items())
        raise InputError(f"no layer can be masked: {why or 'no linear layer or convolution'}")
    return targets, notes


def read_elsewhere(model: nn.Module) -> set[int]:
    """Layers whose weight is used without calling them: their masks would not follow it."""
    kinds = (nn.MultiheadAttention, MultiheadAttention)
    owners = [module for _, module in named_modules(model) if isinstance(module, kinds)]
    return {id(module) for owner in owners for module in owner.modules()}


def _mask_smallest(targets: Sequence[Target], sparsity: float, scope: str) -> None:
    """Mask so many weights in all that this fraction is zero.

    Masks before become zeros, which are the smallest weights: so counts are of all weights, and
    no chain of pruning methods grows with every call.
    """
    pools = [targets] if scope == "global" else [[target] for target in targets]
    for pool in pools:
        modules = [module for _, module in pool]
        for module in modules:
            if prune_hook(module) is not None:
                prune.remove(module, "weight")
        weights = [module.weight.detach() for module in modules]
        zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
        wanted = max(zeros, round(sparsity * sum(weight.numel() for weight in weights)))
        sizes = torch.cat([weight.abs().reshape(-1).float() for weight in weights])
        masks = torch.ones_like(sizes)
        masks[sizes.topk(wanted, largest=False).indices] = 0
        parts = masks.split([weight.numel() for weight in weights])
        for module, weight, mask in zip(modules, weights, parts):
            prune.custom_from_mask(module, "weight", mask.reshape(weight.shape))


def _mask_pattern(targets: Sequence[Target], notes: dict[str, str], n: int, m: int) -> None:
    """Mask by a pattern; layers whose input channels it does not divide get a note."""
    fitting = 0
    for name, module in targets:
        if module.weight.shape[1] % m:
            notes[name] = f"{module.weight.shape[1]} input channels are no multiple of {m}"
            continue
        if prune_hook(module) is not None:
            prune.remove(module, "weight")
        method: Any = NMStructured  # torch's own apply has no types
        method.apply(module, "weight", n=n, m=m)
        fitting += 1
    if not fitting:
        raise InputError(f"no layer has a multiple of {m} input channels: {notes}")


def _numbers(pattern: str) -> tuple[int, int]:
    first, _, second = str(pattern).partition(":")
    if not (first.isdigit() and second.isdigit() and 0 < int(first) < int(second)):
        raise InputError(f'pattern must be a text such as "2:4", two of four stay; not {pattern!r}')
    return int(first), int(second)
