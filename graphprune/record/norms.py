"""LayerNorm and GroupNorm that count channels which left as zeroes, with the same parameters.

A smaller norm of torch takes its statistics over the channels that it is given. These take them
over as many as the original had, as the masked model does.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from graphprune.ops.exact_norms import group_norm, layer_norm


class ExactLayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al., 2016) over ``of`` numbers, of which those that are not given are zero.

    Parameters, their names, arguments and results are those of ``nn.LayerNorm``; ``of`` is an
    attribute. ``graphprune.rebuild(..., exact_only=True)`` makes them.

    Example:
        >>> import torch
        >>> from graphprune.record.norms import count_as_zero
        >>> whole, small = torch.nn.LayerNorm(5), torch.nn.LayerNorm(3)
        >>> count_as_zero(small, 5)
        >>> small
        ExactLayerNorm((3,), eps=1e-05, elementwise_affine=True, of=5)
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0]])
        >>> torch.allclose(small(x[:, :3]), whole(x)[:, :3])
        True
    """

    of: int

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.LayerNorm.forward``."""
        shape, weight, bias = self.normalized_shape, self.weight, self.bias
        return layer_norm(input, shape, weight, bias, self.eps, of=self.of)

    def extra_repr(self) -> str:
        """The arguments, and of how many numbers."""
        return f"{super().extra_repr()}, of={self.of}"


class ExactGroupNorm(nn.GroupNorm):
    """GroupNorm (Wu and He, 2018) of groups of ``of`` channels; those that are not given are zero.

    Parameters, their names, arguments and results are those of ``nn.GroupNorm``; ``of`` is an
    attribute. ``graphprune.rebuild(..., exact_only=True)`` makes them.

    Example:
        >>> import torch
        >>> from graphprune.record.norms import count_as_zero
        >>> whole, small = torch.nn.GroupNorm(1, 5), torch.nn.GroupNorm(1, 3)
        >>> count_as_zero(small, 5)
        >>> x = torch.randn(2, 5, 4)
        >>> x[:, 3:] = 0
        >>> torch.allclose(small(x[:, :3]), whole(x)[:, :3], atol=1e-6)
        True
    """

    of: int

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.GroupNorm.forward``."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, of=self.of)

    def extra_repr(self) -> str:
        """The arguments, and of how many channels the groups are."""
        return f"{super().extra_repr()}, of={self.of}"


EXACT: dict[type, type] = {nn.LayerNorm: ExactLayerNorm, nn.GroupNorm: ExactGroupNorm}


def counted(module: nn.Module) -> int:
    """How many numbers, or channels of a group, a norm of torch takes its statistics over.

    0 for all other modules, among them norms whose forward is not torch's own.
    """
    if type(module) not in EXACT or "forward" in vars(module):
        return 0
    if isinstance(module, nn.GroupNorm):
        return module.num_channels // module.num_groups
    assert isinstance(module, nn.LayerNorm)
    return math.prod(module.normalized_shape)


def count_as_zero(module: nn.Module, of: int) -> None:
    """Make a norm of torch one that counts what left as zeroes, in place.

    Args:
        module: an ``nn.LayerNorm`` or ``nn.GroupNorm`` itself, no class derived from it.
        of: how many numbers, or channels of a group, it counts.
    """
    module.__class__ = EXACT[type(module)]
    vars(module)["of"] = of
