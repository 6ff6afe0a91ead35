"""Ids of two models side by side: the original reads old ones, the small model new ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphprune.plan.plan import Plan
from graphprune.plan.vocabulary import Vocabulary, changed, for_small
from graphprune.record.inputs import Call
from graphprune.record.outputs import named_leaves


class Ids:
    """What the vocabularies of a plan mean for the inputs and outputs of both models.

    Args:
        plan: it may have no vocabulary; then nothing is changed.
        model: the original.
    """

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self.vocabularies, self.model = plan.vocabularies, model
        self.replaced = False  # whether inputs held ids that have left

    def both(self, call: Call) -> Call:
        """Inputs for the original that the small model can be given as well."""

        def settle(vocabulary: Vocabulary, ids: Tensor) -> Tensor:
            found = vocabulary.settled(ids)
            self.replaced |= not torch.equal(found, ids)
            return found

        return changed(call, self.model, self.vocabularies, settle) if self.vocabularies else call

    def drawn(self, call: Call, generator: torch.Generator) -> Call:
        """The same inputs with other ids among those that stay; negative ones stay."""

        def draw(vocabulary: Vocabulary, ids: Tensor) -> Tensor:
            kept = torch.tensor(vocabulary.kept)
            places = torch.randint(len(kept), ids.shape, generator=generator)
            return torch.where(ids < 0, ids, kept[places].to(ids))

        return changed(call, self.model, self.vocabularies, draw) if self.vocabularies else call

    def small(self, call: Call) -> Call:
        """The inputs of the small model."""
        return for_small(call, self.model, self.vocabularies)

    def kept(self, out: object) -> list[Tensor]:
        """The tensors in an output of the original, of logits those of ids that stay."""
        return [self._cut(name, tensor) for name, tensor in named_leaves(out)]

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        for vocabulary in self.vocabularies:
            for output, dim in vocabulary.outputs:
                if output == name and dim < tensor.dim() and tensor.shape[dim] == vocabulary.size:
                    index = torch.tensor(vocabulary.kept, device=tensor.device)
                    tensor = tensor.index_select(dim, index)
        return tensor
