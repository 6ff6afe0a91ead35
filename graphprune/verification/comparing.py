"""Run a small model and its masked original side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphprune.errors import GraphPruneError, ModelError, TraceError, VerificationError
from graphprune.execute.fold import recompute_masked
from graphprune.execute.shrink import cut, kept_indices, shrink
from graphprune.ops.registry import WHOLE, op_of
from graphprune.plan.plan import Plan
from graphprune.record.copying import copy_module
from graphprune.record.inputs import Call, resized
from graphprune.record.recording import record
from graphprune.record.skeleton import held_tensors
from graphprune.verification.masked import MaskedForward, mask
from graphprune.verification.reference import as_given, with_constants

EXAMPLE = "example inputs"


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, on which inputs, and the largest relative difference."""

    name: str
    inputs: str
    difference: float


class _DoesNotRun(GraphPruneError):
    """The original itself does not run on these inputs."""


class Session:
    """Both models in one precision, without dropout."""

    def __init__(
        self,
        model: nn.Module,
        small: nn.Module | Plan,
        plan: Plan,
        dtype: torch.dtype,
        tolerance: float,
        seed: int,
    ) -> None:
        self.plan, self.dtype, self.tolerance, self.seed = plan, dtype, tolerance, seed
        self.original = _copy(model, dtype)
        self.masked = mask(self.original, plan)
        if isinstance(small, Plan):
            self.small = shrink(self.original, plan)
        else:
            self.small = _copy(small, dtype)
            _unround(self.small, small, self.original, plan)
        self.device = next(self.original.parameters()).device

    def variants(self, call: Call) -> Iterator[tuple[str, Call]]:
        """The example inputs, another batch size and another resolution, as the model allows."""
        seen: list[str] = []
        for name, change in (
            ("another batch size", lambda t, c: resized(t, c, batch=True, side=False)),
            ("another resolution", lambda t, c: resized(t, c, batch=True, side=True)),
        ):
            inputs = self.random(call, change)
            if inputs is not None and str(inputs) not in seen and self.runs(inputs):
                seen.append(str(inputs))
                yield name, inputs
        if not seen:
            yield self.unchanged(call)

    def unchanged(self, call: Call) -> tuple[str, Call]:
        """Random inputs of the shapes of the example inputs."""
        inputs = self.random(call, lambda t, c: tuple(t.shape), unchanged=True)
        assert inputs is not None
        return EXAMPLE, inputs

    def random(
        self,
        call: Call,
        shape: Callable[[Tensor, Call], tuple[int, ...] | None],
        unchanged: bool = False,
    ) -> Call | None:
        """Inputs of changed shapes: floats are drawn, other values are repeated."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [shape(tensor, call) for tensor in call.tensors()]
        same = all(new == tuple(t.shape) for new, t in zip(shapes, call.tensors()))
        if same and not unchanged:
            return None
        wanted = iter(shapes)

        def draw(tensor: Tensor) -> Tensor:
            new = next(wanted)
            if new is None:
                new = tuple(tensor.shape)
            if tensor.is_floating_point():
                drawn = torch.randn(new, generator=generator, dtype=torch.float64)
                return drawn.to(self.device, self.dtype)
            values = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor
            for dim, size in enumerate(new):
                index = torch.arange(size, device=values.device) % values.shape[dim]
                values = values.index_select(dim, index)
            return values.to(self.device)

        return call.map(draw)

    def runs(self, call: Call) -> bool:
        """Whether the original runs on these inputs (on meta)."""
        try:
            record(self.original, call, training=False)
        except TraceError:
            return False
        return True

    def steps(self, variants: list[tuple[str, Call]]) -> list[Check]:
        """Gradients in both modes, on the last inputs on which the original trains."""
        checks: list[Check] = []
        for mode, training in (("eval", False), ("train", True)):
            reason = ""
            for name, inputs in reversed(variants):
                try:
                    checks += self.gradients(f"{mode} mode, {name}", inputs, training)
                    break
                except _DoesNotRun as error:
                    reason = str(error)
            else:
                text = f"{mode} mode: the original does not train ({reason})"
                checks.append(Check(text, "", 0.0))
        return checks

    def outputs(self, name: str, call: Call, training: bool) -> Check:
        """Compare outputs without gradients."""
        with torch.no_grad():
            try:
                wanted = self._run(self.masked, call, training)
            except Exception as error:
                text = f"the original does not run on {call} in {self.dtype} ({error})"
                raise ModelError(f"{text}: pass another dtype=, or example_inputs=") from error
            try:
                found = self._run(self.small, call, training)
            except Exception as error:
                self._fail(name, call, training, f"{type(error).__name__}: {error}")
        return self._compare(name, call, wanted, found, training)

    def given(self, name: str, call: Call) -> Check:
        """Compare with the original itself, whose constants a plan from masks has moved."""
        with torch.no_grad():
            wanted = self._run(as_given(self.original, self.plan), call, training=False)
            found = self._run(self.small, call, training=False)
        return self._compare(name, call, wanted, found, training=False)

    def _compare(self, name: str, call: Call, wanted: Any, found: Any, training: bool) -> Check:
        left, right = (_tensors(out) for out in (wanted, found))
        if [tuple(t.shape) for t in left] != [tuple(t.shape) for t in right]:
            shapes = [list(t.shape) for t in right]
            self._fail(name, call, training, f"output shapes {shapes} instead of the original's")
        worst = max((difference(a, b) for a, b in zip(left, right)), default=0.0)
        if not worst <= self.tolerance:
            self._fail(name, call, training, f"relative difference {worst:.1e}")
        return Check(name, str(call), worst)

    def gradients(self, name: str, call: Call, training: bool) -> list[Check]:
        """Compare outputs, gradients of kept weights and buffers after one step."""
        pair = [copy_module(self.masked, {}), copy_module(self.small, {})]
        outs = []
        for model in pair:
            model.zero_grad(set_to_none=True)
            try:
                out = self._run(model, call, training)
                self._backward(out)
            except Exception as error:
                if model is pair[0]:
                    raise _DoesNotRun(f"{type(error).__name__}: {error}") from error
                self._fail(name, call, training, f"{type(error).__name__}: {error}")
            outs.append(out)
        checks = [self._compare(f"output, {name}", call, outs[0], outs[1], training)]
        kept = kept_indices(self.plan)
        grads = [{n: p.grad for n, p in model.named_parameters()} for model in pair]
        peak = max((float(g.abs().max()) for g in grads[0].values() if g is not None), default=0.0)
        factors = {change.tensor: change.factor for change in self.plan.scales}
        worst, where = 0.0, ""
        for key, grad in grads[0].items():
            other = grads[1].get(key)
            other = other * factors[key] if other is not None and key in factors else other
            wanted = None if grad is None else cut(grad, kept.get(key, {}))
            gap = _gradient_gap(wanted, other, floor=1e-3 * peak)
            if not gap <= worst:
                worst, where = gap, key
        if not worst <= self.tolerance:
            text = f"the gradient of {where!r} differs by {worst:.1e}"
            self._fail(name, call, training, text)
        checks.append(Check(f"gradients, {name}", str(call), worst))
        if training:
            checks.append(self._buffers(name, call, pair[0], pair[1]))
        return checks

    def _backward(self, out: Any) -> None:
        """Gradients of a random weighting of all outputs."""
        generator = torch.Generator().manual_seed(self.seed)
        loss = sum(
            (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum()
            for t in _tensors(out)
            if t.is_floating_point() and t.requires_grad
        )
        if isinstance(loss, Tensor):
            loss.backward()

    def _buffers(self, name: str, call: Call, masked: nn.Module, small: nn.Module) -> Check:
        kept = kept_indices(self.plan)
        others = dict(small.named_buffers())
        floating = [b for b in masked.buffers() if b.is_floating_point() and b.numel()]
        peak = max((float(b.abs().max()) for b in floating), default=0.0)
        worst = 0.0
        shapes = {
            key: cut(buffer, kept.get(key, {})).shape
            for key, buffer in self.original.named_buffers()
        }
        numbers = {change.tensor for change in self.plan.indices}
        for key, buffer in masked.named_buffers():
            if key in numbers or others[key].shape != shapes[key]:
                continue  # replaced by the forward: an index for another resolution
            gap = difference(cut(buffer, kept.get(key, {})), others[key], floor=1e-3 * peak)
            if not gap <= worst:
                worst = gap
                if not gap <= self.tolerance:
                    self._fail(name, call, True, f"buffer {key!r} differs by {gap:.1e}")
        return Check(f"buffers, {name}", str(call), worst)

    def _run(self, model: nn.Module, call: Call, training: bool) -> Any:
        model.train(training)
        args, kwargs = call.on(self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), _NoDropout(self.dtype):
            torch.manual_seed(self.seed)
            return model(*args, **kwargs)

    def _fail(self, name: str, call: Call, training: bool, text: str) -> NoReturn:
        where = self._first_difference(call, training)
        raise VerificationError(
            f"{name}: {text} (tolerance {self.tolerance:.0e}) on {call}; "
            + (f"the first module that differs is {where}" if where else "no module output differs")
        )

    def _first_difference(self, call: Call, training: bool) -> str | None:
        """The first module whose output differs, in the order they run."""
        seen: list[tuple[str, Tensor]] = []

        def hook(name: str) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, out: Any) -> None:
                if isinstance(out, Tensor):
                    seen.append((name, out.detach().clone()))

            return keep

        original = with_constants(self.original, self.plan)
        forward = MaskedForward(original, copy_module(original, {}), self.plan)
        forward.module.train(training)
        small = copy_module(self.small, {})
        handles = [m.register_forward_hook(hook(n)) for n, m in small.named_modules()]
        try:
            with torch.no_grad(), _NoDropout(self.dtype):
                rec, masks = forward.prepared(call)
                torch.manual_seed(self.seed)
                _, values = forward.run(call)
            try:
                self._run(small, call, training)
            except Exception as error:
                return f"the one after {seen[-1][0] if seen else 'the input'!r} ({error})"
        finally:
            for handle in handles:
                handle.remove()
        analysis = masks.analysis
        for (name, node), (other, value) in zip(rec.calls, seen):
            if name != other:
                return f"{other!r} (runs where {name!r} was expected)"
            wanted = values[node].detach()
            for dim in range(wanted.dim()):
                keep = torch.from_numpy(analysis.positions(node, dim, masks.alive))
                wanted = wanted.index_select(dim, keep.nonzero().flatten().to(wanted.device))
            if wanted.shape != value.shape:
                return f"{name!r} (shape {list(value.shape)}, expected {list(wanted.shape)})"
            if not difference(wanted, value) <= self.tolerance:
                kind = type(small.get_submodule(name)).__name__
                return f"{name!r} ({kind}, relative difference {difference(wanted, value):.1e})"
        return None


_ATTENTION = {
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
}


class _NoDropout(TorchFunctionMode):
    """Leaves dropout out, which draws other numbers for other shapes; computes in one precision.

    Code that computes parts in float32 (norms, softmax) does so in float64 when that is asked for.
    """

    names = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
                       "feature_alpha_dropout", "dropout_", "feature_dropout"})  # fmt: skip

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype is torch.float64:
            func = torch.Tensor.double if func is torch.Tensor.float else func
            args = tuple(self.dtype if arg is torch.float32 else arg for arg in args)
            kwargs = {k: self.dtype if v is torch.float32 else v for k, v in kwargs.items()}
        if getattr(func, "__name__", "") in self.names:
            return args[0] if args else kwargs["input"]
        kernel = op_of(WHOLE.get(func, func)).kernel
        if kernel is not None:
            return kernel(*args, **kwargs)
        if func in _ATTENTION:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


def _gradient_gap(wanted: Tensor | None, found: Tensor | None, floor: float) -> float:
    """The difference of two gradients; one that is absent is zero."""
    if wanted is None:
        return 0.0 if found is None else difference(torch.zeros_like(found), found, floor)
    return difference(wanted, torch.zeros_like(wanted) if found is None else found, floor)


def difference(wanted: Tensor, found: Tensor, floor: float = 0.0) -> float:
    """The largest absolute difference over the largest wanted magnitude."""
    if wanted.shape != found.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(wanted, found) else float("inf")
    wanted, found = wanted.detach().double(), found.detach().double()
    same = (wanted == found) | (wanted.isnan() & found.isnan())
    gap = torch.where(same, torch.zeros_like(wanted), (wanted - found).abs())
    finite = wanted[wanted.isfinite()]
    scale = max(float(finite.abs().max()) if finite.numel() else 0.0, floor)
    worst = float(gap.max())
    return worst / scale if scale else worst


def _unround(copied: nn.Module, small: nn.Module, original: nn.Module, plan: Plan) -> None:
    """Undo the rounding of weights that were rescaled or added to in a lower precision."""
    kept, tensors = kept_indices(plan), dict(held_tensors(original))
    given, promoted = dict(held_tensors(small)), dict(held_tensors(copied))
    exacts = {
        change.tensor: tensors[change.tensor].detach() * change.factor for change in plan.scales
    }
    constants = dict(held_tensors(with_constants(original, plan)))
    for name in [b.tensor for b in plan.biases] + [m.tensor for m in plan.merges]:
        exacts[name] = constants[name].detach()
    for name, whole in exacts.items():
        exact = cut(whole, kept.get(name, {}))
        rounded = given[name].detach()
        if torch.allclose(exact.to(rounded), rounded, rtol=4 * torch.finfo(rounded.dtype).eps):
            promoted[name].data = exact


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    clone = copy_module(model, {})
    for _, tensor in held_tensors(clone):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    with torch.no_grad():  # torch does not run every module whose hook would do it
        recompute_masked(clone)
    for module in clone.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0
    return clone


def _tensors(out: Any) -> list[Tensor]:
    if not isinstance(out, Tensor | tuple | list | dict) and hasattr(out, "__dict__"):
        out = vars(out)
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
