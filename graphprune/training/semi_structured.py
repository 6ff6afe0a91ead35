"""2:4 patterns as torch's own sparse tensors, where the device has kernels for them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from graphprune.errors import InputError, ModelError
from graphprune.record.checks import check_model
from graphprune.record.tensors import named_modules
from graphprune.training.ranks import unwrapped_model
from graphprune.training.sparse import prune_hook, read_elsewhere


def to_semi_structured(model: nn.Module) -> nn.Module:
    """A copy for inference whose 2:4 sparse linear layers are torch's semi-structured tensors.

    Args:
        model: on a CUDA device of compute capability 8.0 or newer, in half precision (or int8);
            after ``sparsify(model, pattern="2:4")`` and ``make_permanent``.

    Returns:
        The copy. Linear layers without the pattern, or of a shape that the kernels do not take,
        stay dense.

    Raises:
        ModelError: the device has no such kernels, or no layer could be converted; says why.
        InputError: masks are still on the model.

    Example:
        >>> import torch, graphprune
        >>> from graphprune.training import to_semi_structured
        >>> try:
        ...     _ = to_semi_structured(torch.nn.Sequential(torch.nn.Linear(64, 64)))
        ... except graphprune.errors.ModelError as error:
        ...     print(str(error)[:28])
        2:4 sparse tensors need CUDA
    """
    model = unwrapped_model(model)
    check_model(model)
    device = next(model.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise ModelError(
            "2:4 sparse tensors need CUDA and a device of compute capability 8.0 or newer, the "
            f"model is on {device}: move it there with model.half().cuda(). Elsewhere the zeros "
            "stay in dense tensors"
        )
    if any(prune_hook(module) is not None for _, module in named_modules(model)):
        raise InputError("the model has masks: call make_permanent(model) first")
    small, dense = copy.deepcopy(model).eval(), []
    inside = read_elsewhere(small)
    linear = [(n, m) for n, m in named_modules(small) if isinstance(m, nn.Linear)]
    for name, module in linear:
        problem = "another module reads its weight" if id(module) in inside else _convert(module)
        if problem:
            dense.append(f"{name}: {problem}")
    if len(dense) == len(linear):
        why = "; ".join(dense[:4]) or "the model has no linear layers"
        raise ModelError(f"no layer became a 2:4 sparse tensor: {why}")
    return small


def _convert(module: nn.Linear) -> str:
    """Convert a layer, or say why it stays dense."""
    weight = module.weight.detach()
    if weight.shape[1] % 4 or int((weight.unflatten(1, (-1, 4)) != 0).sum(-1).max()) > 2:
        return "its weight has no 2:4 pattern"
    try:
        tensor = torch.sparse.to_sparse_semi_structured(weight.contiguous())
    except RuntimeError as error:
        return str(error).splitlines()[0]
    module.weight = nn.Parameter(tensor, requires_grad=False)
    return ""
