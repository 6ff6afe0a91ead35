"""Whether the views of a declaration hold on its sample; see ``check`` for channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphprune.ops.calls import Function
from graphprune.ops.fact import Fact, Unfollowed
from graphprune.ops.registry import Op
from graphprune.ops.samples import Random, Sample
from graphprune.ops.tiny import Tiny, close, run
from graphprune.ops.views import fact_rule, macs_of, multiplies


def macs(target: Function, op: Op, sample: Sample) -> Iterator[str]:
    """As torch's own counter counts, where it knows the op."""
    from torch.utils.flop_counter import FlopCounterMode  # here: importing graphprune stays quick

    args, kwargs = sample.made()
    with FlopCounterMode(display=False) as counter:
        target(*args, **kwargs)
    counted = counter.get_total_flops() // 2
    tiny = Tiny(target, op, sample, constant=False)
    own = macs_of(tiny.node, lambda node: node.meta["shape"])
    if counted and own != counted:
        yield f"macs: {own}, and torch counts {counted}"
    if multiplies(tiny.node) and not own > 0:
        yield f"macs: {own} of an op that multiplies"


def factors(target: Function, op: Op, sample: Sample) -> Iterator[str]:
    """The product of the operands, and what is added, is what the op computes."""
    args, kwargs = sample.made()
    if op.factors is None or (op.fact is not None and not op.factors(*args, **kwargs).matrix):
        return  # of other products it says what reaches the result
    parts = op.factors(*args, **kwargs)
    beta, alpha = parts.scales
    out = alpha * parts.product(*parts.operands)
    if parts.bias is not None:
        shape = parts.bias.shape if parts.window is None else (-1, *[1] * (out.dim() - 2))
        out = out + beta * parts.bias.reshape(shape)
    if not close(out, run(target, args, kwargs)[0]):
        yield "factors: their product is not what the op computes"


def meta(target: Any, op: Op, sample: Sample) -> Iterator[str]:
    """The shapes, dtypes and strides that torch's own kernel makes."""
    if op.meta is None:
        return
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), sample.made())
    found = op.meta(*args, **kwargs)
    if found is NotImplemented:
        yield "meta: does not follow the sample"
        return
    wanted, found = target(*args, **kwargs), found if isinstance(found, tuple) else (found,)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    pairs = [(a.shape, a.stride(), b.shape, b.stride()) for a, b in zip(found, wanted)]
    if any(a[:2] != a[2:] for a in pairs[: 1 if op.saves else None]):
        yield f"meta: {found[0].shape}, and torch makes {wanted[0].shape}"


def facts(target: Function, op: Op, sample: Sample) -> Iterator[str]:
    """What is said to be known is the same whatever stands at unknown places."""
    rule = fact_rule(op)
    if rule is None:
        return
    told = False
    for seed in range(3):
        args, unknown = _partly_known(sample, seed)
        try:
            claimed = rule(target, *args[0], **args[1])
        except (Unfollowed, RuntimeError):
            continue
        claimed = claimed if isinstance(claimed, list) else [claimed]
        told |= any(bool((~fact.unknown).any()) for fact in claimed)
        for number in range(3):
            filled = _filled(sample, seed, unknown, number)
            for fact, out in zip(claimed, run(target, *filled)):
                sure = ~fact.unknown
                if fact.value.shape != out.shape:
                    yield f"fact: {list(fact.value.shape)}, and the op makes {list(out.shape)}"
                elif not close(fact.value[sure], out[sure].to(fact.value.dtype)):
                    yield "fact: something is said to be known that depends on the input"
    if not told:
        yield "fact: nothing is ever known"


def _partly_known(sample: Sample, seed: int) -> tuple[Any, list[Tensor]]:
    """The arguments as facts, and where each random tensor is unknown; all is known at first."""
    generator = torch.Generator().manual_seed(seed)
    unknown: list[Tensor] = []

    def fact(tensor: Tensor, drawn: bool) -> Fact:
        where = torch.rand(tensor.shape, generator=generator) < 0.3 * min(seed, 1)
        where = where if drawn else torch.zeros_like(where)
        unknown.append(where)
        return Fact(tensor.clone(), where.clone())

    return _each(sample, seed, fact), unknown


def _filled(sample: Sample, seed: int, unknown: list[Tensor], number: int) -> Any:
    """The arguments with something else at unknown places."""
    left = iter(unknown)
    generator = torch.Generator().manual_seed(1000 + number)

    def other(tensor: Tensor, drawn: bool) -> Tensor:
        random = torch.rand(tensor.shape, generator=generator) * 3
        random = random > 1.5 if tensor.dtype is torch.bool else random
        return torch.where(next(left), random.to(tensor.dtype), tensor)

    return _each(sample, seed, other)


def _each(sample: Sample, seed: int, function: Function) -> object:
    """A function of every tensor, zero here and there, and of whether it was drawn."""
    generator = torch.Generator().manual_seed(seed)

    def mapped(part: object, value: object) -> Any:
        if not isinstance(value, Tensor):
            return value
        real = value.is_floating_point() or value.is_complex()
        zero = torch.rand(value.shape, generator=generator) < 0.3
        value = value.masked_fill(zero, 0) if real else value
        drawn = isinstance(part, Random) and (real or value.dtype is torch.bool)
        return function(value, drawn)

    return pytree.tree_map(mapped, (list(sample.args), sample.kwargs), sample.made(seed))


def scaling(target: Function, op: Op, sample: Sample) -> Iterator[str]:
    """Zeroes stay zeroes; operands count with their exponents, or with their signs."""
    args, kwargs = sample.made()
    if op.linear:
        nothing = pytree.tree_map_only(Tensor, _unless_whole, (args, kwargs))
        if any(bool((out != 0).any()) for out in run(target, *nothing)):
            yield "linear: zeroes do not stay zeroes"
    (out,) = run(target, args, kwargs)[:1]
    for place, power in enumerate(op.powers):
        scaled = [2 * arg if number == place else arg for number, arg in enumerate(args)]
        if not close(run(target, scaled, kwargs)[0], out * 2**power):
            yield f"powers: operand {place} does not count with the exponent {power}"
    if op.signs:
        total = sum(sign * arg for sign, arg in zip(op.signs, args))
        if not close(out, torch.as_tensor(total)):
            yield "signs: their sum is not what the op computes"


def _unless_whole(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.is_floating_point() else tensor


def kernel(target: Function, op: Op, sample: Sample) -> Iterator[str]:
    """The substitute computes what torch's kernel computes in single precision."""
    if op.kernel is None:
        return
    args, kwargs = sample.made()
    precise = pytree.tree_map_only(
        Tensor, lambda x: x.double() if x.is_floating_point() else x, (args, kwargs)
    )
    found = op.kernel(*precise[0], **precise[1])
    if not torch.allclose(found, target(*args, **kwargs).double(), 1e-4, 1e-4):
        yield "kernel: other values than torch's"


def values(target: Function, op: Op, sample: Sample) -> Iterator[str]:
    """What is said of the values of the first result holds."""
    if not (op.keeps or op.bounds or op.hull):
        return
    args, kwargs = sample.made()
    first = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    first = first.clone()  # the op may write into it
    out = run(target, args, kwargs)[0]
    if op.keeps == "values" and not torch.equal(out, first):
        yield "keeps: other values"
    if op.keeps and not torch.equal(out.flatten(), first.flatten()):
        yield "keeps: another order"
    low, high = (float("-inf"), float("inf")) if op.bounds is None else op.bounds(*args, **kwargs)
    if not bool(((out >= low) & (out <= high)).all()):
        yield f"bounds: values outside of {low} to {high}"
    inside = (first >= low) & (first <= high)
    if op.clips and not torch.equal(out[inside], first[inside]):
        yield "clips: values within the bounds change"
    if op.hull:
        given = [leaf for leaf in pytree.tree_leaves(sample.made()) if isinstance(leaf, Tensor)]
        ends = [0.0, *(float(end) for t in given for end in (t.min(), t.max()))]
        slack = 1e-12 * max(map(abs, ends))
        if not min(ends) - slack <= float(out.min()) <= float(out.max()) <= max(ends) + slack:
            yield "hull: values beyond those of the operands"


def joined(target: Function, op: Op, sample: Sample) -> Iterator[str]:
    """Operands stand side by side: all of their values, and nothing else."""
    if not op.joins:
        return
    given = [leaf.flatten() for leaf in pytree.tree_leaves(sample.made()) if _is_tensor(leaf)]
    (out,) = run(target, *sample.made())
    if not torch.equal(out.flatten().sort().values, torch.cat(given).sort().values):
        yield "joins: other values than those of the operands"


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


CLAIMS = {
    "macs": macs,
    "factors": factors,
    "meta": meta,
    "fact": facts,
    "linear, powers or signs": scaling,
    "kernel": kernel,
    "keeps, bounds, clips or hull": values,
    "joins": joined,
}
