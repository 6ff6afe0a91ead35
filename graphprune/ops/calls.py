"""What calls are made of: functions and ops of torch take anything, and return anything."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[..., Any]
Overload = torch._ops.OpOverload
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
TENSOR: Any = torch.Tensor  # with its attributes as descriptors
FUNCTORCH: Any = torch._C._functorch


_TOLD: set[type] = set()  # modes that dynamo passes over


class OpMode(TorchDispatchMode):
    """A mode that sees ATen ops."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # else dynamo is told of each op, and loaded for that
        return False

    def __enter__(self) -> Self:
        """Where dynamo is loaded, code may be compiled: the code of the mode must not be."""
        kind: Any = type(self)
        if "torch._dynamo" in sys.modules and kind not in _TOLD:
            _TOLD.add(kind)
            kind.__torch_dispatch__ = torch.compiler.disable(kind.__torch_dispatch__)
        mode: Any = super()
        mode.__enter__()
        return self


def args_of(node: fx.Node) -> Any:
    """The positional arguments of a node; their types are known from the op."""
    return node.args


def target_of(node: fx.Node) -> Any:
    """What a node calls."""
    return node.target
