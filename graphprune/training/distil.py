"""Distillation: a small model learns from its original."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.arguments import is_number
from graphprune.errors import InputError
from graphprune.plan.plan import Plan, plan_of
from graphprune.record.batches import Loss, check_loss, describe, device_of, forward, loss_of
from graphprune.record.checks import check_model
from graphprune.record.tensors import aliases
from graphprune.text import shorten
from graphprune.training.ranks import unwrapped_model

Compare = Callable[[Any, Any], Tensor]


class Distillation:
    """A loss: the task's, and how far a student is from its teacher.

    ``(1 - alpha) * task + alpha * soft + sum of features``: the soft part is the Kullback-Leibler
    divergence at a temperature (Hinton et al., "Distilling the Knowledge in a Neural Network",
    2015), the features are squared differences between the outputs of layers, relative to the
    teacher's (Romero et al., "FitNets", ICLR 2015). The plan of the student says which of the
    teacher's channels its own are, so that no layers in between have to be learned.

    One forward pass of each model; the teacher runs in eval mode and without gradients, and is not
    changed.

    Args:
        teacher: the original model.
        temperature: by what logits are divided.
        alpha: the share of the soft part, in [0, 1]; with 1 no targets are needed.
        loss: of the task, ``loss(model, batch)``, which runs the model on the batch once; by
            default what the model returns as its loss, else cross entropy with the target.
        soft: another function of the outputs of student and teacher, instead of the divergence.
        features: the names of layers whose outputs are compared; for a module without a weight of
            its own (a block) by the name of a layer that has the same channels:
            ``{"layer1": "layer1.2.bn2"}``.
        beta: by what the mean over the features is multiplied.
        compare: another function of the two outputs of a layer.

    Raises:
        InputError: an argument is wrong.

    Example:
        >>> import torch, graphprune
        >>> from graphprune.training import Distillation
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> small = graphprune.rebuild(net, 0.5)
        >>> distil = Distillation(net, temperature=2, features=["0"])
        >>> loss = distil(small, (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])))
        >>> loss.backward()
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        alpha: float = 0.9,
        loss: Loss | None = None,
        soft: Compare | None = None,
        features: Iterable[str] | Mapping[str, str] = (),
        beta: float = 1.0,
        compare: Compare | None = None,
    ) -> None:
        self.teacher = unwrapped_model(teacher)
        check_model(self.teacher)
        self.temperature = _positive("temperature", temperature)
        self.alpha = _positive("alpha", alpha, least=0.0)
        self.beta = _positive("beta", beta, least=0.0)
        if self.alpha > 1:
            raise InputError(f"alpha must be in [0, 1], the share of the soft part; got {alpha}")
        check_loss(loss)
        self.loss = loss_of if loss is None else loss
        self.soft = soft
        self.compare = relative_error if compare is None else compare
        given = [features] if isinstance(features, str) else features
        if not isinstance(given, Iterable):
            raise InputError(f"features must be names of modules, or a mapping; got {features!r}")
        known = given if isinstance(given, Mapping) else {name: name for name in given}
        self.features: dict[str, str] = dict(known)
        modules = dict(self.teacher.named_modules())
        for name in self.features:
            if name not in modules:
                names = shorten(filter(None, modules), 12)
                raise InputError(f"the teacher has no module {name!r}; it has {names}")
        self._kept: dict[str, dict[tuple[int, int], Tensor]] = {}
        self._known: tuple[int, Plan | None] | None = None

    def __call__(self, student: nn.Module, batch: object) -> Tensor:
        """The loss of a student on a batch; call ``backward`` on it.

        Args:
            student: a small model of the teacher, in the mode it is trained in.
            batch: as a ``DataLoader`` yields it: ``(inputs, targets)``.

        Returns:
            A scalar.

        Raises:
            InputError: the models do not run on the batch, their outputs cannot be compared, or the
                student is no small model of the teacher.
        """
        inner = unwrapped_model(student)
        if inner is self.teacher:
            raise InputError("student and teacher are the same model: keep the original for it")
        self._read_plan(inner)
        names = tuple(self.features)
        with _watching(student, inner, names) as ours:
            if self.alpha < 1:
                task = self.loss(student, batch)
            else:
                forward(student, batch)
                task = torch.zeros((), device=device_of(inner))
        if "" not in ours:
            raise InputError("loss(model, batch) did not run the model that it was given")
        with _resting(self.teacher), _watching(self.teacher, self.teacher, names) as theirs:
            forward(self.teacher, batch)
        total = (1 - self.alpha) * task
        if self.alpha:
            total = total + self.alpha * self._soft(ours[""], theirs[""])
        if names and self.beta:
            parts = [self._feature(name, ours, theirs) for name in names]
            total = total + self.beta * torch.stack(parts).mean()
        return total

    def _soft(self, student: object, teacher: object) -> Tensor:
        if self.soft is not None:
            return self.soft(student, teacher)
        (ours, dim), (theirs, _) = _logits(student), _logits(teacher)
        if ours.shape != theirs.shape:
            raise InputError(
                f"logits of student {list(ours.shape)} and teacher {list(theirs.shape)} differ: "
                "pass soft=, a function of the two outputs"
            )
        return divergence(ours, theirs, self.temperature, dim)

    def _feature(self, name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Tensor:
        for found, who in ((ours, "student"), (theirs, "teacher")):
            if not isinstance(found.get(name), Tensor):
                what = describe(found[name]) if name in found else "nothing: it was not called"
                raise InputError(f"module {name!r} of the {who} returned {what}, not a tensor")
        mine, other = ours[name], theirs[name]
        sizes = tuple(zip(other.shape, mine.shape))
        for dim, (size, width) in enumerate(sizes):
            if size != width:
                index = self._kept[name].get((size, width))
                if index is None:
                    raise InputError(
                        f"dimension {dim} of what {name!r} returns is {size} in the teacher and "
                        f"{width} in the student, which are not the channels of "
                        f"{self.features[name]!r}: name a layer that has the same channels, "
                        f"features={{{name!r}: layer}}"
                    )
                other = other.index_select(dim, index.to(other.device))
        return self.compare(mine, other)

    def _read_plan(self, student: nn.Module) -> None:
        """Which channels of the teacher the layers of the student have."""
        plan = plan_of(student)
        if self._known == (id(student), plan) or not self.features:
            return
        if plan is not None:
            plan.check(self.teacher)
        first = aliases(self.teacher)
        for name, layer in self.features.items():
            tensors = {
                first[f"{layer}.{leaf}"]
                for leaf in ("weight", "bias")
                if f"{layer}.{leaf}" in first
            }
            slots = [] if plan is None else [s for s in plan.slots if s.tensor in tensors]
            self._kept[name] = {}
            for slot in slots:
                written = slot.dim == 0 or (slot.dim == 1 and _transposed(self.teacher, layer))
                if written and slot.blocks == 1:
                    key = slot.size, len(slot.kept)
                    self._kept[name].setdefault(key, torch.tensor(slot.kept))
        self._known = id(student), plan


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, dim: int = 1) -> Tensor:
    """The Kullback-Leibler divergence of softened outputs, times the squared temperature.

    Args:
        student: logits [batch, classes, ...].
        teacher: logits of the same shape.
        temperature: by what both are divided.
        dim: where the classes are.

    Returns:
        The mean over the batch and all places, a scalar. Its gradients have the size of those of a
        cross entropy, whatever the temperature.

    Example:
        >>> import torch
        >>> from graphprune.training.distil import divergence
        >>> logits = torch.randn(5, 3)
        >>> divergence(logits, logits, 4.0)
        tensor(0.)
    """
    ours = F.log_softmax(student / temperature, dim)
    theirs = F.log_softmax(teacher / temperature, dim)
    parts = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim)
    return parts.mean() * temperature**2


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference as a fraction of the mean square of the teacher's."""
    scale = teacher.square().mean().clamp_min(torch.finfo(teacher.dtype).tiny)
    return (student - teacher).square().mean() / scale


def _logits(output: object) -> tuple[Tensor, int]:
    """The logits in an output, and the dimension of the classes."""
    if isinstance(output, Tensor) and output.dim() >= 2:
        return output, 1
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor) and found.dim() >= 2:
        return found, -1
    raise InputError(
        f"the model returned {describe(output)}, no logits [batch, classes]: pass soft=, a "
        "function of the outputs of student and teacher"
    )


def _transposed(model: nn.Module, layer: str) -> bool:
    module = model.get_submodule(layer)
    return isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups == 1


@contextlib.contextmanager
def _watching(
    outer: nn.Module, inner: nn.Module, names: Iterable[str]
) -> Iterator[dict[str, object]]:
    """What a model (under ``""``) and some of its modules return inside."""
    found: dict[str, object] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            found[name] = output

        return hook

    modules = {"": outer, **{name: inner.get_submodule(name) for name in names}}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; the modes as they were afterwards."""
    modes = [(module, module.training) for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _positive(name: str, value: Any, least: float | None = None) -> float:
    number = is_number(value, least or 0) and value != float("inf")
    if not number or (least is None and value == 0):
        raise InputError(
            f"{name} must be a {'positive' if least is None else 'non-negative'} "
            f"number, got {value!r}"
        )
    return float(value)
