"""Refuse, before anything is done, models that cannot be analysed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphprune.errors import InputError, ModelError
from graphprune.record.tensors import named_modules, named_tensors
from graphprune.text import shorten

_STATISTICS = ("running_mean", "running_var")  # other buffers may hold -inf, as masks do
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def check_model(model: object, *, values: bool = True, weightless: bool = False) -> None:
    """Raise unless the model is an initialised, floating point, plain ``nn.Module``.

    Args:
        model: what the user passed.
        values: also look for NaN and infinite values.
        weightless: all parameters may be on the meta device.

    Raises:
        ModelError: says what was found and what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    name = type(model).__name__
    if name in _WRAPPERS:
        raise ModelError(f"the model is wrapped in {name}: pass model.module, and wrap the result")
    if name == "OptimizedModule":
        raise ModelError("the model is compiled: pass the original module, and compile the result")
    for path, module in named_modules(model):
        where = f"module {path!r}" if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{where} is scripted or traced: pass the Python module instead")
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise ModelError(f"{where} is quantized: prune the float model first, then quantize")
    weightless = weightless and is_weightless(model)
    for path, tensor in named_tensors(model):
        _check_tensor(path, tensor, weightless)
        weights = isinstance(tensor, nn.Parameter) or path.endswith(_STATISTICS)
        if (
            values
            and weights
            and not tensor.is_meta
            and tensor.is_floating_point()
            and not _finite(tensor)
        ):
            raise ModelError(f"{path!r} holds NaN or infinite values: repair the weights first")
    if not any(True for _ in model.parameters()):
        raise ModelError(f"{name} has no parameters: nothing can be pruned")


def is_weightless(model: nn.Module) -> bool:
    """Whether a model has parameters, all of them on the meta device."""
    parameters = [parameter.is_meta for parameter in model.parameters()]
    return bool(parameters) and all(parameters)


def check_weights(model: nn.Module, weights: object) -> None:
    """Raise unless what stands for the parameters of a model names all of them.

    Raises:
        InputError: says what is missing, or that the model has weights of its own.
    """
    if weights is None:
        return
    if not is_weightless(model):
        raise InputError(
            "weights= stands for those of a model on the meta device, and this one has its own: "
            "leave it out"
        )
    if not isinstance(weights, Mapping):
        raise InputError(
            f"weights must map names to tensors, such as a state_dict; got {type(weights).__name__}"
        )
    missing = [
        name
        for name, tensor in named_tensors(model)
        if isinstance(tensor, nn.Parameter) and name not in weights
    ]
    if missing:
        raise InputError(
            f"weights have no {shorten(missing, 4)}: pass a tensor for every parameter, by its "
            "name in the model"
        )


def _check_tensor(path: str, tensor: torch.Tensor, weightless: bool) -> None:
    if is_lazy(tensor):
        raise ModelError(f"{path!r} is not initialised (lazy module): run the model once first")
    if type(tensor).__name__ == "DTensor":
        raise ModelError(f"{path!r} is sharded over devices: prune the plain model, then shard it")
    if is_traceable_wrapper_subclass(tensor):
        raise ModelError(
            f"{path!r} is a {type(tensor).__name__}, which holds its values in another form (as "
            "quantized weights do): prune the plain model first, then convert it"
        )
    if tensor.is_meta and not weightless:
        raise ModelError(f"{path!r} is on the meta device: load the weights first")
    if hasattr(tensor, "__tensor_flatten__"):
        raise ModelError(
            f"{path!r} is a {type(tensor).__name__}, which packs its values, as quantized weights "
            "do: prune the float model first, then quantize; a small model is saved before that"
        )
    if tensor.is_quantized:
        raise ModelError(f"{path!r} is quantized: prune the float model first, then quantize")


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite, without a temporary of the same size."""
    if not tensor.numel():
        return True
    return all(math.isfinite(bound) for bound in map(float, torch.aminmax(tensor.detach())))
