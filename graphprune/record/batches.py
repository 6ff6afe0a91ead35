"""Batches of data: what a ``DataLoader`` yields, how a model runs on one, and the loss on one.

A *batch* is a tensor (one positional input); a tuple or list whose first item is the input (a
tensor, a tuple of positional inputs or a dict of keyword inputs) and whose other items are targets;
or a dict of keyword inputs. A tuple or list of tensors, such as images of different sizes, is the
one input of a model that takes it so. *Data* is an iterable of batches: a list, a ``DataLoader``.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from graphprune.errors import InputError
from graphprune.ranks import Ranks

Loss = Callable[[nn.Module, Any], Tensor]
_KINDS = "a tensor, a tuple (input, targets...) or a dict of keyword arguments"
_TARGETS = re.compile("label|target")  # names of keyword arguments that are no inputs
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
_IGNORED = -100  # the target that cross entropy leaves out


@dataclass(frozen=True)
class Batch:
    """A batch taken apart: the arguments of the forward pass, and the targets."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[Any, ...]

    @classmethod
    def of(cls, batch: object) -> Batch:
        """Take apart what a ``DataLoader`` yielded.

        Raises:
            InputError: it is none of the accepted kinds, or empty.
        """
        if isinstance(batch, tuple | list) and batch:
            inputs, targets = batch[0], tuple(batch[1:])
        else:
            inputs, targets = batch, ()
        if isinstance(inputs, Tensor):
            return cls((inputs,), {}, targets)
        if isinstance(inputs, Mapping) and inputs and all(isinstance(key, str) for key in inputs):
            return cls((), dict(inputs), targets)
        if isinstance(inputs, tuple | list) and inputs:
            return cls(tuple(inputs), {}, targets)
        raise InputError(f"a batch must be {_KINDS}; found {describe(batch)}")

    @property
    def whole(self) -> Any:
        """The batch as a ``DataLoader`` yields such."""
        inputs = self.args[0] if len(self.args) == 1 else self.args
        return self.kwargs or (inputs, *self.targets)

    def to(self, device: torch.device, copy: bool = False) -> Batch:
        """The same batch with all its tensors on a device, copied where a model may write."""
        moved = pytree.tree_map_only(
            Tensor, lambda t: t.to(device, copy=copy), (self.args, self.kwargs, self.targets)
        )
        return Batch(*moved)


def told_apart(model: nn.Module, data: Iterable[object]) -> Iterator[Any]:
    """Batches of which :meth:`Batch.of` finds out how the model takes them.

    Whether a list of tensors is one argument (images of different sizes) or several is told by the
    first such batch: it is given to the model, as several first.

    Args:
        model: is left as it was.
        data: batches.
    """
    whole: bool | None = None
    for batch in data:
        other = _as_one(batch)
        if other is not None and whole is None:
            whole = not _runs_on(model, batch) and _runs_on(model, other)
        yield other if whole and other is not None else batch


def _as_one(batch: object) -> object:
    """The same batch with a list of tensors as one argument; ``None`` if there is none."""
    if not isinstance(batch, tuple | list) or not batch:
        return None
    if _tensors(batch[0]):
        return (([*batch[0]],), *batch[1:])
    return (([*batch],),) if _tensors(batch) else None


def _tensors(value: Any) -> bool:
    sequence = isinstance(value, tuple | list) and len(value) > 0
    return sequence and all(isinstance(item, Tensor) for item in value)


def _runs_on(model: nn.Module, batch: object) -> bool:
    with torch.no_grad(), at_rest(model):
        try:
            forward(model, batch)
        except InputError:
            return False
    return True


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def forward(model: nn.Module, batch: object) -> Any:
    """Run a model on a batch, on the model's device.

    Raises:
        InputError: the batch is none of the accepted kinds, or the model does not run on it.
    """
    return run(model, Batch.of(batch), batch)


def run(model: nn.Module, batch: Batch, shown: object = None) -> Any:
    """Run a model on a batch that was taken apart, on the model's device.

    Args:
        model: runs as it is.
        batch: the inputs.
        shown: in messages: what the user passed.

    Raises:
        InputError: the model does not run on it.
    """
    parts = batch.to(device_of(model), copy=True)
    try:
        return model(*parts.args, **parts.kwargs)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        given = batch.kwargs or (batch.args if len(batch.args) > 1 else batch.args[0])
        found = describe(given if shown is None else shown)
        raise InputError(
            f"{type(model).__name__} does not run on a batch {found}: {error}\n"
            f"a batch must be {_KINDS}"
        ) from error


def loss_of(model: nn.Module, batch: object) -> Tensor:
    """The default loss: what the model returns as its loss, else cross entropy with the target.

    Args:
        model: returns an object or a dict with ``loss`` (as models of ``transformers`` do when
            given labels), or logits [batch, classes, ...], as a tensor or as ``logits``.
        batch: its target holds class indices [batch, ...].

    Returns:
        A scalar.

    Raises:
        InputError: the loss cannot be told from the output and the target.
    """
    output = forward(model, batch)
    loss = _entry(output, "loss")
    if isinstance(loss, Tensor):
        return loss
    logits = output if isinstance(output, Tensor) else _entry(output, "logits")
    targets = Batch.of(batch).to(device_of(model)).targets
    problem = _mismatch(output if logits is None else logits, targets)
    if problem:
        raise InputError(
            f"no default loss: {problem}; pass loss=, a function (model, batch) -> scalar tensor"
        )
    return F.cross_entropy(logits, targets[0].long(), ignore_index=_IGNORED)


def _entry(output: object, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _mismatch(logits: object, targets: tuple[object, ...]) -> str:
    """Why cross entropy does not apply; empty when it does."""
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        return f"the model returned {describe(logits)}, neither a loss nor logits [batch, classes]"
    if len(targets) != 1 or not isinstance(targets[0], Tensor):
        return f"the batch has {len(targets) or 'no'} targets, where one tensor was expected"
    target = targets[0]
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        return f"the target {describe(target)} holds no class indices"
    wanted = (logits.shape[0], *logits.shape[2:])
    if target.shape != wanted:
        return (
            f"the target has shape {list(target.shape)} where logits {list(logits.shape)} "
            f"need class indices of shape {list(wanted)}"
        )
    used = target[target != _IGNORED]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < logits.shape[1]:
        low, high = int(used.min()), int(used.max())
        return f"the target holds classes {low}..{high} where the model has {logits.shape[1]}"
    return ""


def takes(function: Callable[..., object], count: int) -> bool:
    """Whether a function can be called with so many positional arguments, as far as one sees."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # built in, without a signature
        return True
    return True


def check_finite(batch: object, number: int) -> None:
    """Raise if the inputs of a batch are not finite: neither is what is computed from them.

    Targets may be anything, and so may infinite masks behind the first input.

    Raises:
        InputError: tells the number of the batch.
    """
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(inputs, Mapping):
        inputs = [v for name, v in inputs.items() if not _TARGETS.search(str(name).lower())]
    for place, tensor in enumerate(pytree.tree_leaves(inputs)):
        dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided
        if not dense or not tensor.is_floating_point():
            continue
        if bool((tensor.isnan() if place else ~tensor.isfinite()).any()):
            raise InputError(f"batch {number} of data holds NaN or infinite values")


def check_batched(batch: object, number: int, traced: str) -> None:
    """Raise where a batch is a single item: it has a dimension less than the example inputs.

    Args:
        batch: one of data.
        number: of the batch.
        traced: the example inputs, as :func:`describe` tells of them.

    Raises:
        InputError: tells the number of the batch.
    """
    parts = Batch.of(batch)
    found = _dimensions(describe([*parts.args, *parts.kwargs.values()]))
    wanted = _dimensions(traced)
    if len(found) == len(wanted) and found and all(a == b - 1 for a, b in zip(found, wanted)):
        given = describe(parts.kwargs or parts.args)
        raise InputError(
            f"batch {number} of data is {given}, where the model was traced on "
            f"{traced}: single items are no batches; pass a DataLoader of them"
        )


def _dimensions(described: str) -> list[int]:
    """How many dimensions each tensor has."""
    return [len(sides.split(",")) for sides in re.findall(r"\w\[([\d, ]*)\]", described)]


class Through(Iterable[object]):
    """Data that is gone through in some way of its own; it has as many batches."""

    def __init__(self, data: Iterable[object]) -> None:
        self.data = data

    def __len__(self) -> int:
        found = count_of(self.data)
        if found is None:
            raise TypeError("the number of batches is not known")
        return found


class Batched(Through):
    """Data whose batches are compared with example inputs, as they are gone through."""

    def __init__(self, data: Iterable[object], traced: str) -> None:
        super().__init__(data)
        self.traced = traced

    def __iter__(self) -> Iterator[object]:
        for number, batch in enumerate(self.data):
            check_batched(batch, number, self.traced)
            yield batch


def check_loss(loss: object) -> None:
    """Raise unless it is ``None`` or may be called with a model and a batch.

    Raises:
        InputError: not callable, or one of torch's own losses, which take outputs and targets.
    """
    of_torch = (getattr(loss, "__module__", None) or "").startswith("torch.")
    if loss is not None and (of_torch or not callable(loss)):
        raise InputError(
            "loss must be a function (model, batch) -> scalar, such as lambda model, batch: "
            f"F.cross_entropy(model(batch[0]), batch[1]); not {loss!r}"
        )


def check_data(data: Any, *, passes: int = 1) -> Iterable[object]:
    """Data as an iterable of batches.

    Args:
        data: what the user passed.
        passes: how often it will be gone through.

    Raises:
        InputError: it is a single batch, no iterable, or cannot be gone through that often.
    """
    if isinstance(data, Tensor | Mapping):
        raise InputError(
            f"data must be an iterable of batches, such as a list or a DataLoader; found one batch "
            f"{describe(data)}: pass [batch]"
        )
    iterable = isinstance(data, Iterable) or hasattr(data, "__getitem__")
    if isinstance(data, str | bytes) or not iterable:
        raise InputError(
            "data must be an iterable of batches, such as a list or a DataLoader, not "
            f"{type(data).__name__}"
        )
    if passes > 1 and isinstance(data, Iterator):
        raise InputError(
            f"data is gone through more than once, but a {type(data).__name__} yields its batches "
            "only once: pass list(data) or a DataLoader"
        )
    found: Iterable[Any] = data
    return found


def batches(data: Any, ranks: Ranks | None = None) -> Iterator[Any]:
    """The batches of data, of which there must be one at least, on one of several ranks.

    Raises:
        InputError: there is none.
    """
    found = False
    for batch in data:
        found = True
        yield batch
    if not (found if ranks is None else any(ranks.share(found))):
        text = " (a generator yields its batches only once)" if isinstance(data, Iterator) else ""
        raise InputError(f"data holds no batches{text}")


def count_of(data: Any) -> int | None:
    """The number of batches, when it is known."""
    try:
        return len(data)
    except TypeError:  # a generator, or a DataLoader over an iterable dataset
        return None


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards, also on errors, modes are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards, also on errors, modes, buffers and random states are restored.

    Buffers are those of the model's modules; a module that counts its calls in one is set back.
    """
    own = (buffer for buffer in model.buffers() if not (buffer.is_inference() or buffer.is_meta))
    buffers = [(buffer, buffer.detach().clone()) for buffer in own]
    places = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), evaluated(model):
        try:
            yield
        finally:
            for place, known in places:
                place.update(known)
            with torch.no_grad():
                for buffer, copied in buffers:
                    if not torch.equal(buffer, copied):  # batch norm bumps no version
                        buffer.copy_(copied)


def describe(tree: object) -> str:
    """Types and shapes of nested data, for messages."""
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')}{list(tree.shape)}"
    if isinstance(tree, tuple | list):
        return f"({', '.join(map(describe, tree))})"
    if isinstance(tree, Mapping):
        return f"{{{', '.join(f'{key}: {describe(value)}' for key, value in tree.items())}}}"
    return type(tree).__name__
