"""The architecture of a model without its weights."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from graphprune.errors import CheckpointError, GraphPruneError, InputError, ModelError


@dataclass(frozen=True)
class Original:
    """A copy on meta, and the devices of the tensors it was made from."""

    model: nn.Module
    devices: Mapping[str, torch.device]


def weightless(source: nn.Module | Callable[[], nn.Module]) -> Original:
    """A copy whose saved tensors are on meta; all other tensors keep their values.

    Args:
        source: a model, which is not touched; or a function that makes one, which is called on
            meta and, when that fails or loses values, once more for real.

    Raises:
        InputError: ``source`` is neither a model nor makes one.
        ModelError: the model is lazy and was not run yet.
        CheckpointError: other tensors are on meta, too, so that their values are unknown.
    """
    if isinstance(source, nn.Module):
        original, unknown = _emptied(source)
    else:
        original, unknown = _emptied_from(source)
    if unknown:
        raise CheckpointError(
            f"{type(original.model).__name__} has {unknown} tensors outside its state_dict "
            "(non-persistent buffers, plain attributes) on the meta device, and the file does not "
            "hold them: pass a model that is not on meta, or a function that makes one"
        )
    return original


def _emptied_from(factory: Callable[[], nn.Module]) -> tuple[Original, int]:
    _check_callable(factory)
    with torch.random.fork_rng([]):
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that loading weights to meta does nothing
                model = _made(factory)
            original, unknown = _emptied(model)
            if not unknown:
                return original, 0
        except Exception:  # it reads values; a mistake shows again when it is made for real
            pass
        try:
            return _emptied(_made(factory))
        except GraphPruneError:
            raise
        except Exception as error:
            raise InputError(
                f"the function that makes the model fails ({type(error).__name__}: {error})"
            ) from error


def _made(factory: Callable[[], nn.Module]) -> nn.Module:
    model = factory()
    if not isinstance(model, nn.Module):
        raise InputError(f"the factory returned a {type(model).__name__} instead of a module")
    return model


def _check_callable(factory: object) -> None:
    """Raise unless it can be called without arguments, as far as that can be told."""
    if not callable(factory):
        raise InputError(
            f"expected a model or a function that makes one, got {type(factory).__name__}"
        )
    name = getattr(factory, "__name__", type(factory).__name__)
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # no signature to be had
        return
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise InputError(
            f"{name} needs {', '.join(needed)}: pass a function without arguments that makes the "
            f"original model, such as lambda: {name}(...)"
        )


def _emptied(model: nn.Module) -> tuple[Original, int]:
    """The copy, and how many tensors are on meta although no file has them."""
    devices = {}
    memo: dict[int, object] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        if is_lazy(tensor):
            raise ModelError(f"{name!r} is not initialised (lazy module): run the model once first")
        devices[name] = tensor.device
        empty: Tensor = torch.empty_like(tensor.detach(), device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            vars(empty).update(vars(tensor))
        memo.setdefault(id(tensor), empty)
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # recomputed by hooks
                memo.setdefault(id(value), torch.empty_like(value.detach(), device="cpu"))
    saved = set(memo)
    clone = copy.deepcopy(model, memo)
    others = [v for key, v in memo.items() if key not in saved and isinstance(v, Tensor)]
    unknown = len({id(tensor) for tensor in others if tensor.is_meta})
    return Original(clone, devices), unknown
