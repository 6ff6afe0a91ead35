"""Move the layers of a segment together by gradient steps, after each was refitted on its own.

A segment ends where a layer that lost inputs is compared with the original, and begins with the
products that make these inputs. Their weights, biases and BatchNorms are moved together so that the
error at the end falls (Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block
Reconstruction", ICLR 2021), from the least-squares solution (He et al., "Channel Pruning for
Accelerating Very Deep Neural Networks", ICCV 2017).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.calibration.replay import Replay
from graphprune.calibration.segments import Segment
from graphprune.calibration.sums import Errors, reduced
from graphprune.ranks import Ranks

RATE = 1e-3  # of the first step
_EIGHTH = 8
_JUDGES = 4  # batches that are enough to tell
_SAME = 1e-4  # of the largest value: rounding


class Joint:
    """The joint refit of one segment.

    Args:
        keep: the channels of the original that the small model has at the end.
        turns: of the batches of this rank, by number; with eight or more of all ranks, every
            eighth, four at most, is held out: they tell whether anything was gained.
        ranks: which have other batches. They take the steps together: one after the other.
    """

    def __init__(
        self,
        original: Replay,
        small: Replay,
        segment: Segment,
        keep: Tensor,
        turns: Mapping[int, int],
        ranks: Ranks,
    ) -> None:
        self.original, self.small, self.segment, self.keep = original, small, segment, keep
        self.active, self.ranks = [*turns], ranks
        own = [(ranks.rank, which) for which in turns]
        dealt, _ = ranks.in_turn(own, [*turns.values()])
        judges = dealt[_EIGHTH - 1 :: _EIGHTH][:_JUDGES] or dealt
        self.taught = [turn for turn in dealt if turn not in judges] or dealt
        self.judged = len(judges)
        self.judges = [which for rank, which in judges if rank == ranks.rank]
        self.start = {n: small.tensors[name].detach() for n, name in segment.moved.items()}
        self.zeroes = {n: t == 0 for n, t in self.start.items() if t.dim() > 1}

    def refit(self, sweeps: int, generator: torch.Generator) -> float | None:
        """Move the parameters, if that lowers the error over the batches that judge.

        Returns:
            The squared error at the end as a fraction of the variance there, on all places;
            ``None`` if everything stays as it was: nothing was gained, a dtype other than float32
            and float64, an op without a derivative, a value that is written to meanwhile.
        """
        end = self.segment.layer.end
        held = {which: self.small.value(which, end) for which in self.active}
        if not all(self.ranks.share(self._can(held))):
            return None
        before = self._error(held)
        moved = self._trained(sweeps, before / self.judged, generator)
        if moved is None:
            return None
        outputs = {which: self._run(which, moved) for which in self.active}
        if not self._error(outputs) < before:
            return None
        for number, tensor in moved.items():
            self.start[number].copy_(tensor)
        for which, output in outputs.items():  # nothing else of the segment is read again
            self.small.runs[which].values[self.small.node(which, end)] = output
        return self._relative(outputs)

    def _can(self, held: Mapping[int, Tensor]) -> bool:
        """Whether dtypes allow it, and the segment is all there is."""
        tensors = (*held.values(), *self.start.values())
        if any(t.dtype not in (torch.float32, torch.float64) for t in tensors):
            return False
        return all(_equal(self._run(w, self.start), held[w]) for w in self.active[:1])

    def _run(self, which: int, moved: Mapping[int, Tensor]) -> Tensor:
        """The value at the end for one batch."""
        run = self.small.runs[which]
        nodes, held = run.nodes, run.values
        values: dict[fx.Node, Any] = {nodes[n]: held[nodes[n]] for n in self.segment.inputs}
        values.update({nodes[number]: tensor for number, tensor in moved.items()})
        for number in self.segment.numbers:
            values[nodes[number]] = self.small.compute(run, nodes[number], values)
        return values[nodes[self.segment.layer.end]]

    def _goal(self, which: int) -> Tensor:
        layer = self.segment.layer
        return self.original.value(which, layer.end).index_select(layer.channel_dim, self.keep)

    def _behind(self, which: int, value: Tensor) -> Tensor:
        """The value behind the activation."""
        if self.segment.activation is None:
            return value
        node = self.small.node(which, self.segment.activation)
        run = self.small.runs[which]
        return self.small.compute(run, node, {node.all_input_nodes[0]: value.clone()})

    def _error(self, outputs: Mapping[int, Tensor]) -> float:
        """The sum of the mean squared errors of the batches that judge."""
        own = sum(float(self._gap(w, outputs[w]).square().mean()) for w in self.judges)
        return sum(self.ranks.share(own))

    def _gap(self, which: int, output: Tensor) -> Tensor:
        return self._behind(which, output) - self._behind(which, self._goal(which))

    def _relative(self, outputs: Mapping[int, Tensor]) -> float:
        """The squared error at the end as a fraction of the variance there."""
        errors = Errors()
        for which, output in outputs.items():
            wanted, found = (
                value.movedim(self.segment.layer.channel_dim, -1).flatten(0, -2)
                for value in (self._goal(which), output)
            )
            errors.add(wanted - found, wanted)
        return reduced({"": errors}, self.ranks)[""].relative

    def _trained(
        self, sweeps: int, scale: float, generator: torch.Generator
    ) -> dict[int, Tensor] | None:
        """Adam on one batch after another, in another order in every sweep, at a rate down to 0.

        Returns:
            ``None`` where something has no derivative.
        """
        moved = {n: t.clone().requires_grad_() for n, t in self.start.items()}
        batches = len(self.taught)
        optimiser = torch.optim.Adam(list(moved.values()), RATE)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, sweeps * batches)
        with torch.enable_grad():
            for _ in range(sweeps):
                for place in torch.randperm(batches, generator=generator).tolist():
                    optimiser.zero_grad()
                    if not self._differentiated(self.taught[place], moved, scale):
                        return None
                    self._hold_zeroes(moved)
                    optimiser.step()
                    falling.step()
        return {n: t.detach() for n, t in moved.items()}

    def _differentiated(
        self, turn: tuple[int, int], moved: Mapping[int, Tensor], scale: float
    ) -> bool:
        """Give all ranks the gradients of a batch of one of them, if there are any."""
        rank, which = turn
        known: tuple[int, ...] | None = ()
        if rank == self.ranks.rank:
            try:
                gap = self._behind(which, self._run(which, moved))
                gap = gap - self._behind(which, self._goal(which))
                (gap.square().mean() / max(scale, torch.finfo(gap.dtype).tiny)).backward()
                known = tuple(n for n, tensor in moved.items() if tensor.grad is not None)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                known = None
        known = self.ranks.share(known)[rank]
        if known is None:
            return False
        gradients = []
        for number in known:
            gradient = moved[number].grad
            gradients.append(torch.zeros_like(moved[number]) if gradient is None else gradient)
            moved[number].grad = gradients[-1]
        self.ranks.copy_from(rank, gradients)
        return True

    def _hold_zeroes(self, moved: Mapping[int, Tensor]) -> None:
        """Take their gradients: a sparse layer stays sparse."""
        for number, zero in self.zeroes.items():
            grad = moved[number].grad
            if grad is not None:
                grad.masked_fill_(zero, 0)


def _equal(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().amax()) <= _SAME * float(b.abs().amax())
