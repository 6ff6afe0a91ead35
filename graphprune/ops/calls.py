"""What calls are made of: functions and ops of torch take anything, and return anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]
Overload = torch._ops.OpOverload
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
