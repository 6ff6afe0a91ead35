"""Which tensors ``torch.nn.utils.prune`` masks: a masked ``weight`` is called ``weight_orig``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.utils import prune

from graphprune.record.tensors import named_modules


def mask_hooks(module: nn.Module) -> list[prune.BasePruningMethod]:
    """What computes masked tensors of a module from ``..._orig`` and ``..._mask``."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


def masked_names(model: nn.Module) -> set[str]:
    """The tensors that are masked, by the names that they have without masks."""
    return {
        f"{name}.{hook._tensor_name}" if name else hook._tensor_name
        for name, module in named_modules(model)
        for hook in mask_hooks(module)
    }


def masks_of_state(names: Iterable[str]) -> set[str]:
    """The same for the names of a state."""
    known = set(names)
    plain = {name.removesuffix("_mask") for name in known if name.endswith("_mask")}
    return {name for name in plain if f"{name}_orig" in known}


def set_masks(model: nn.Module, wanted: Iterable[str]) -> None:
    """Put masks of ones where they are wanted, and take the others off, in place.

    Tensors that the model does not have are passed over.
    """
    wanted, now = set(wanted), masked_names(model)
    modules = dict(named_modules(model))
    for name in sorted(wanted ^ now):
        owner, _, leaf = name.rpartition(".")
        module = modules.get(owner)
        if name in now:
            prune.remove(modules[owner], leaf)
        elif module is not None and module._parameters.get(leaf) is not None:
            prune.identity(module, leaf)


def renamed(sizes: Mapping[str, tuple[int, ...]], wanted: set[str]) -> dict[str, tuple[int, ...]]:
    """Shapes by name as they are called when exactly the wanted tensors are masked."""
    found: dict[str, tuple[int, ...]] = {}
    masked = masks_of_state(sizes)
    for name, shape in sizes.items():
        plain = name.removesuffix("_orig").removesuffix("_mask")
        if plain not in masked and name not in wanted:
            found[name] = shape
        elif plain not in wanted:
            found[plain] = shape
        else:
            found |= {f"{plain}_orig": shape, f"{plain}_mask": shape}
    return found
