"""Gradual structured pruning in the user's own training loop."""

from __future__ import annotations

import glob
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from graphprune.api import ChannelGraph, rebuild, trace
from graphprune.channels.analysis import Group
from graphprune.criteria import check_needs, find
from graphprune.criteria.averaged import averaged
from graphprune.errors import InputError, PruningWarning, warn
from graphprune.plan.plan import Plan
from graphprune.planning.kinds import check_channels_alone
from graphprune.planning.naming import named
from graphprune.planning.options import Request
from graphprune.ranks import Ranks
from graphprune.record.batches import check_data
from graphprune.record.checks import check_model
from graphprune.text import share
from graphprune.training.copies import copies_of
from graphprune.training.optimizers import check_optimizer, sliced_state
from graphprune.training.ranks import retire, unwrapped_model
from graphprune.training.schedules import (
    OneShot,
    Schedule,
    SparsityOf,
    as_schedule,
    check_count,
    sparsity_at,
)
from graphprune.training.soft import SoftMasks
from graphprune.training.trial import unmaskable

_OWN = ("ratio", "target")  # options of a plan that the schedule takes the place of


@dataclass(frozen=True)
class Update:
    """One choice of channels: at which step, how sparse, and what the model costs without them."""

    step: int
    sparsity: float
    removed: int
    params: int
    macs: int


class Pruner:
    """Removes channels while a model trains: first masked, in the end removed for good.

    Call :meth:`step` after each ``optimizer.step()`` and :meth:`finish` when the channels shall
    leave. In the soft phase a schedule says how many channels are masked: the weights that write
    and read them are held at zero, so that training goes on exactly as if they were gone. The
    weights that a channel had when it was masked are set aside. Whenever the schedule asks for
    another sparsity, all channels are scored again, and a masked one that is by now more important
    than others comes back with its weights. :meth:`finish` removes the masked channels in place:
    parameters stay the same objects, and optimizer state, copies and gradients are sliced with
    them, so that the next ``optimizer.step()`` goes on from there.

    Zeroes cannot stand for channels under a norm that takes statistics over them (the residual
    stream of a transformer, ``graph`` calls it renormalising), or that are summed without weights.
    Nor where zeroed weights are divided by their norm, as in weight normalisation. Such groups
    (:attr:`whole`) are left alone in the soft phase, and lose their channels in :meth:`finish`.

    Gradual pruning: Zhu and Gupta, "To prune, or not to prune", 2017; channels that may recover:
    He et al., "Soft Filter Pruning", IJCAI 2018.

    Args:
        model: is trained by the user's loop; one inside ``DistributedDataParallel`` (also by
            Accelerate) is found, and must be wrapped anew after :meth:`finish`.
        example_inputs: as for ``graphprune.trace``.
        optimizer: whose state shall follow; several in a list.
        schedule: a sparsity, a schedule, or any function step -> sparsity. The n-th call of
            :meth:`step` asks it for step n.
        copies: other models of the same architecture that shall shrink too: moving averages such
            as ``torch.optim.swa_utils.AveragedModel``.
        finish_at: the step that calls :meth:`finish` by itself.
        attention: as for ``graphprune.trace``.
        process_group: of ``torch.distributed``; scores are averaged over its ranks, and all of
            them must choose the same channels.
        options: as for ``graph.plan``, without ``ratio`` and ``target``. ``ratios`` and
            ``max_kept`` are what shall be reached with the last sparsity of a schedule; before,
            the removed fractions are smaller in proportion.

    Raises:
        InputError: an optimizer or copy that does not belong to the model, or another argument is
            wrong.
        ModelError, TraceError: as ``graphprune.trace``.

    Example:
        >>> import torch
        >>> from graphprune.training import Pruner, cubic
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = Pruner(net, torch.ones(1, 4), sgd, schedule=cubic(0.5, end=4))
        >>> for _ in range(4):
        ...     loss = net(torch.randn(16, 4)).square().mean()
        ...     sgd.zero_grad()
        ...     loss.backward()
        ...     sgd.step()
        ...     pruner.step()
        >>> pruner.finish()[0].out_features
        4
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        optimizer: Any = None,
        *,
        schedule: float | SparsityOf,
        copies: nn.Module | Iterable[nn.Module] = (),
        finish_at: int | None = None,
        attention: str = "heads",
        process_group: Any = None,
        **options: Any,
    ) -> None:
        self.schedule = as_schedule(schedule)
        self.wrapper = model
        self.model = unwrapped_model(model)
        for name in _OWN:
            if name in options:
                raise InputError(f"{name} is what the schedule says step by step: leave it out")
        check_channels_alone(options)
        self.options = named(options, self.model)
        if finish_at is not None:
            check_count("finish_at", finish_at, 1)
        self.finish_at = finish_at
        self.ranks = Ranks(process_group)
        if finish_at is not None and self.ranks.size > 1 and self.wrapper is self.model:
            raise InputError(
                "finish_at on several processes needs the wrapped model, which must be wrapped "
                "anew afterwards: pass the DistributedDataParallel, or call finish() after training"
            )
        self.steps = 0
        self.sparsity = 0.0
        self.history: list[Update] = []
        self.plan: Plan | None = None  # what was removed
        self.finished = False
        with self.ranks.together():
            check_model(self.model)
            found = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
            self.optimizers = [check_optimizer(o, self.model) for o in found if o is not None]
            self.copies = copies_of(self.model, copies)
            self.graph: ChannelGraph = trace(self.model, example_inputs, attention=attention)
            self.soft = SoftMasks(self.model)
            self._params = sum(p.numel() for p in self.model.parameters())
            self._check_options()
            self._whole = unmaskable(self.graph, self._plain_plan)

    def step(self) -> None:
        """Call it after each ``optimizer.step()``: holds the masks, and updates them when due.

        Raises:
            InputError: the schedule says no sparsity in [0, 1), or scores are not finite; the masks
                stay as they were.
            RankError: the ranks do not choose the same channels.
        """
        self.steps += 1
        if self.finished:
            return
        self.soft.hold()
        sparsity = sparsity_at(self.schedule, self.steps)
        known = isinstance(self.schedule, Schedule)  # and the same on all ranks, as was checked
        if sparsity != self.sparsity or not known:
            with self.ranks.together():
                self.ranks.check("step and sparsity", (self.steps, sparsity))
                if sparsity != self.sparsity:
                    self._update(sparsity)
        if self.finish_at is not None and self.steps >= self.finish_at:
            self.finish()

    def finish(self) -> nn.Module:
        """Remove the masked channels for good, in place; a second call does nothing.

        Groups that were left whole in the soft phase now lose their channels, too.

        Returns:
            The model, smaller.

        Raises:
            InputError: an optimizer keeps state that cannot be sliced; nothing was changed.
            RankError: the ranks do not choose the same channels.

        Warns:
            PruningWarning: the schedule has not come to its end.
        """
        if self.finished:
            return self.model
        if isinstance(self.schedule, Schedule) and self.sparsity < self.schedule.final:
            warn(
                f"finished at step {self.steps} with a sparsity of {self.sparsity:.3g}, where the "
                f"schedule goes on to {self.schedule.final:.3g} at step {self.schedule.end}"
            )
        with self.ranks.together():
            masked = self.soft.plan
            if masked is not None:
                self.ranks.check("the channels to remove", masked.to_json())
                self._remove(masked)
            if self._whole and self.sparsity:
                self._remove_whole()
        self.finished = True
        if self.wrapper is not self.model and self.plan is not None:
            retire(self.wrapper)
        return self.model

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks of the masked parameters by name, true where a weight stays."""
        return dict(self.soft.stays())

    @property
    def whole(self) -> tuple[str, ...]:
        """The layers of groups that zeroes cannot mask, and which stay whole until the finish."""
        names = (layer for group in self._whole for layer in group.layers)
        return tuple(dict.fromkeys(names))

    def _update(self, sparsity: float) -> None:
        """Choose the channels that are masked from now on."""
        before, aside = self.soft.plan, self.soft.aside
        self.soft.lift()
        plan = None
        try:
            if sparsity:
                last = isinstance(self.schedule, Schedule) and sparsity == self.schedule.final
                plan = self._plan(self.graph, sparsity, self._whole, quiet=not last)
                self.ranks.check("the channels to mask", plan.to_json())
                if plan.evaluated:
                    raise InputError("zeroes cannot mask some of the chosen channels; use keep=")
        except Exception:
            if before is not None:
                self.soft.put(before, aside)
            raise
        if plan is not None and plan.removed:
            self.soft.put(plan)
        self.sparsity = sparsity
        if plan is not None:
            cost = plan.after
            self.history.append(Update(self.steps, sparsity, plan.removed, cost.params, cost.macs))

    def _plan(
        self,
        graph: ChannelGraph,
        sparsity: float,
        spared: Sequence[Group],
        quiet: bool,
        options: Mapping[str, Any] | None = None,
    ) -> Plan:
        if options is None:
            criterion = averaged(self.options.get("criterion", "l2"), self.ranks)
            options = {**self.options, **self._limits(sparsity), "criterion": criterion}
        keep = options.get("keep", ())
        keep = [keep] if isinstance(keep, str) else list(keep)
        asked: Any = {
            **options,
            "process_group": self.ranks.asked,
            "keep": [*keep, *(_pattern(group, graph.groups) for group in spared)],
        }
        with warnings.catch_warnings():
            if quiet or spared:  # small groups at low sparsities; what waits for the finish
                warnings.simplefilter("ignore", PruningWarning)
            return graph.plan(sparsity, **asked)

    def _limits(self, sparsity: float) -> dict[str, object]:
        """Ratios and limits of single layers as they are at a sparsity of the schedule."""
        final = self.schedule.final if isinstance(self.schedule, Schedule) else 0.0
        part = sparsity / final if final else 1.0
        found: dict[str, Any] = {}
        if part == 1:
            return found
        ratios, most = self.options.get("ratios"), self.options.get("max_kept")
        if isinstance(ratios, Mapping):
            found["ratios"] = {name: part * ratio for name, ratio in ratios.items()}
        if isinstance(most, Mapping):
            found["max_kept"] = {name: 1 - part * (1 - kept) for name, kept in most.items()}
        elif most is not None:
            found["max_kept"] = 1 - part * (1 - most)
        return found

    def _remove_whole(self) -> None:
        """Remove channels from the groups that were whole until now."""
        graph = trace(self.model, self.graph.call, attention=self.graph.analysis.attention)
        whole = {group.layers for group in self._whole}
        rest = [group for group in graph.groups if group.layers not in whole]
        try:
            plan = self._plan(graph, self.sparsity, rest, quiet=True)
        except InputError as error:
            warn(f"{', '.join(self.whole)} stay whole: {error}")
            return
        self.ranks.check("the channels to remove", plan.to_json())
        if plan.removed:
            self._remove(plan)

    def _remove(self, plan: Plan) -> None:
        states = [s for o in self.optimizers for s in sliced_state(o, self.model, plan)]
        self.soft.drop()
        for model in (self.model, *self.copies):
            rebuild(model, plan, inplace=True)
        for state, key, value in states:
            state[key] = value
        self.plan = plan if self.plan is None else self.plan.then(plan)
        self.history.append(
            Update(self.steps, self.sparsity, self.plan.removed, plan.after.params, plan.after.macs)
        )

    def _check_options(self) -> None:
        """Find wrong options now, not at the first update; and ranks that were given others."""
        criterion = find(self.options.get("criterion", "l2")).name
        limited = [name for name in ("ratios", "max_kept") if name in self.options]
        if limited and not isinstance(self.schedule, Schedule):
            raise InputError(
                f"{' and '.join(limited)} go with a schedule whose last sparsity is known, such as "
                "cubic(0.5, end=1000); not with any function"
            )
        if self.options.get("data") is not None:
            once = isinstance(self.schedule, OneShot)
            check_data(self.options["data"], passes=1 if once else 2)
        check_needs(find(self.options.get("criterion", "l2")), self.options.get("data"))
        told = {**Request.of(0.0, self.options).said(), "criterion": criterion}
        schedule = self.schedule if isinstance(self.schedule, Schedule) else ""
        self.ranks.check("the model", self.graph.analysis.architecture)
        self.ranks.check("options and schedule", (repr(schedule), repr(sorted(told.items()))))

    def _plain_plan(self, spared: Sequence[Group]) -> Plan:
        """Half of the channels, whatever criterion the user has chosen."""
        plain = {n: v for n, v in self.options.items() if n not in ("criterion", "data", "loss")}
        return self._plan(self.graph, 0.5, spared, quiet=True, options=plain)

    def state_dict(self) -> dict[str, object]:
        """What a resumed run needs besides the model and the optimizer; ``torch.save`` takes it."""
        return {
            "steps": self.steps,
            "sparsity": self.sparsity,
            "history": [asdict(update) for update in self.history],
            "finished": self.finished,
            "plan": None if self.plan is None else self.plan.to_json(),
            "masked": None if self.soft.plan is None else self.soft.plan.to_json(),
            "aside": {name: tensor.clone() for name, tensor in self.soft.aside.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: load the pruner's first, then the model's and the optimizer's.

        If the channels were removed already, they are removed from the model, its copies and its
        optimizers, so that their own states fit.

        Raises:
            InputError: not a state of a pruner, or this one has finished already.
            PlanError: the state belongs to a model of another architecture.
        """
        missing = set(self.state_dict()) - set(state if isinstance(state, Mapping) else ())
        if missing:
            raise InputError(f"this is no state of a Pruner: {', '.join(sorted(missing))} missing")
        if self.finished and not state["finished"]:
            raise InputError(
                "this pruner has removed its channels, the state is from before: make a new "
                "Pruner for a new model"
            )
        plans = {key: state[key] and Plan.from_text(state[key]) for key in ("plan", "masked")}
        self.steps, self.sparsity = state["steps"], state["sparsity"]
        if plans["plan"] and not self.finished:
            plans["plan"].check(self.model)
            self.soft.lift()
            self._remove(plans["plan"])
        elif plans["masked"]:
            self.soft.put(plans["masked"], state["aside"])
        else:
            self.soft.lift()
        self.finished = state["finished"]
        self.history = [Update(**update) for update in state["history"]]

    def __str__(self) -> str:
        """The schedule and where it stands."""
        lines = [f"Pruner of {type(self.model).__name__}, step {self.steps}", f"{self.schedule}"]
        if self.history:
            last = self.history[-1]
            params = self._params
            state = "removed" if self.finished else "masked"
            lines.append(
                f"{last.removed} channels {state} (sparsity {last.sparsity:.1%}): "
                f"{last.params:,} of {params:,} parameters ({share(last.params, params)}) stay"
            )
        if self._whole and not self.finished:
            names = ", ".join(self.whole)
            lines.append(f"zeroes cannot mask, whole until the finish: {names}")
        return "\n".join(lines)


def _pattern(group: Group, groups: Iterable[Group]) -> str:
    """A pattern that names a tensor which writes the channels of a group, and of few others."""
    written = [m.slot.tensor for m in group.members if not m.reads]
    shared = Counter(m.slot.tensor for g in groups for m in g.members if not m.reads)
    return glob.escape(min(written or [group.members[0].slot.tensor], key=shared.__getitem__))
