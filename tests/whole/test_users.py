"""Functions and data that users hand to rounds and pruners: which mistakes are noticed."""

import pytest
import torch
from support.loops import X, Y, build
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import InputError, RoundError
from graphprune.record.batches import forward
from graphprune.training import (
    Distillation,
    GroupLasso,
    History,
    Pruner,
    RewindPoint,
    Slimming,
    SparseLearning,
    cubic,
    iterate,
    lottery,
)


def train(model, optimizer=None, losses=lambda loss: loss):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        yield losses(loss)


def evaluate(model):
    return (model(X).argmax(1) == Y).double().mean()


def rounds(function, count=1, **options):
    return iterate(build(), count, function, evaluate, example_inputs=X[:2], **options)


# --- train --------------------------------------------------------------------------------------


def test_an_optimizer_of_another_model_is_noticed_behind_batch_norm():
    """The statistics of the norm move in every forward pass; the weights do not."""
    foreign = torch.optim.SGD(build().parameters(), 0.01)
    with pytest.raises(InputError, match=r"changed no weight .* make the optimizer inside train"):
        rounds(lambda model: train(model, foreign))


def test_statistics_alone_may_be_trained():
    def again(model):
        with torch.no_grad():
            model(X)

    assert rounds(again).plan is not None


@pytest.mark.parametrize(
    "losses",
    [
        lambda loss: (loss * float("nan"), 0),
        lambda loss: {"loss": float("inf"), "accuracy": 0.5},
        lambda loss: torch.stack([loss, loss * float("inf")]),
        lambda loss: [0.1, [float("nan")]],
    ],
)
def test_a_loss_that_is_not_finite_among_others(losses):
    with pytest.raises(RoundError, match=r"round 1: the loss is (nan|inf) \(number 1\)"):
        rounds(lambda model: train(model, losses=losses))
    with pytest.raises(RoundError, match=r"round 1: the loss is (nan|inf) \(number 1\)"):
        rounds(lambda model: returned(model, losses))


def returned(model, losses):
    *_, last = train(model, losses=losses)
    return last


def test_finite_losses_of_any_kind():
    def several(loss):
        return {
            "loss": loss,
            "parts": torch.stack([loss, loss]),
            "step": 3,
            "name": "a",
            "no": None,
        }

    assert rounds(lambda model: train(model, losses=several)).plan is not None


# --- data that is gone through again and again ----------------------------------------------------


def batches():
    yield X, Y


def test_a_generator_is_refused_before_anything_is_trained():
    says = "data is gone through more than once, but a generator yields its batches only once"
    with pytest.raises(InputError, match=says):
        Pruner(build(), X[:2], schedule=cubic(0.5, end=4), criterion="taylor", data=batches())
    with pytest.raises(InputError, match=says):
        rounds(train, 2, criterion="taylor", data=batches())
    assert rounds(train, 2, criterion="taylor", data=list(batches())).plan is not None


def test_data_that_is_missing_is_said_at_once():
    with pytest.raises(InputError, match="criterion 'taylor' needs gradients: pass data="):
        Pruner(build(), X[:2], schedule=cubic(0.5, end=4), criterion="taylor")
    with pytest.raises(InputError, match="criterion 'wanda' needs activations: pass data="):
        rounds(train, criterion="wanda")


@pytest.mark.parametrize("criterion", ["apoz", "wanda", "taylor", "mean_activation"])
def test_data_that_is_not_finite(criterion):
    data = [(X, Y), (X * float("nan"), Y)]
    with pytest.raises(InputError, match="batch 1 of data holds NaN or infinite values"):
        graphprune.trace(build(), X[:2]).plan(0.5, criterion=criterion, data=data)


class Masked(nn.Module):
    """Takes a mask beside its input, or targets among its keyword arguments."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, mask=None, labels=None):
        x = self.first(x).relu()
        mask = torch.zeros(()) if mask is None else mask
        return self.last(torch.softmax(x @ x.mT + mask, -1) @ x)


def test_numbers_that_may_be_infinite_or_missing():
    """Masks of attention, targets, sparse inputs: none of them is refused."""
    x = torch.randn(4, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    graph = graphprune.trace(Masked(), (x, mask))
    loss = {"loss": lambda model, batch: forward(model, batch).square().mean()}
    for batch in (
        ((x, mask), torch.zeros(4)),
        (x, torch.full((4,), float("nan"))),
        {"x": x, "labels": torch.full((4,), float("nan"))},
    ):
        for criterion, options in (("wanda", {}), ("taylor", loss)):
            assert graph.plan(0.5, criterion=criterion, data=[batch], **options).removed
    adjacent = torch.eye(8).to_sparse()
    sparse = graphprune.trace(build(), X[:2])
    found = sparse.plan(
        0.5, criterion="taylor", data=[adjacent], loss=lambda model, _: model(X).square().mean()
    )
    assert found.removed


def test_data_for_one_pass_is_enough_for_one_choice():
    pruner = Pruner(build(), X[:2], schedule=0.5, criterion="taylor", data=batches())
    pruner.step()
    assert pruner.soft.plan.removed
    assert rounds(train, 1, criterion="taylor", data=batches()).plan is not None


def test_limits_that_leave_no_choice_are_exact_in_the_end():
    """1 - (1 - 0.1) is not 0.1 in floating point."""
    pruner = Pruner(build(), X[:2], schedule=0.9, min_kept=0.1, max_kept=0.1)
    pruner.step()
    assert pruner.soft.plan.removed


def test_of_a_mapping_only_losses_count():
    def report(loss):
        return {"train_loss": loss, "best_before": float("inf")}

    assert rounds(lambda model: returned(model, report)).plan is not None


def test_rounds_say_what_held_them():
    outcome = rounds(train, 2, sparsity=0.75, min_kept=0.5)
    assert outcome.reason.startswith("all 2 rounds done; min_kept holds ")
    assert rounds(train, 2, sparsity=0.5, min_kept=0.4).reason == "all 2 rounds done"


# --- gradual limits of single layers --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"ratios": {"inner": 0.75}}, {"inner": [12, 10, 8, 6, 3]}),
        ({"max_kept": 0.25}, {"inner": [12, 9, 7, 5, 3]}),
        ({"max_kept": {"inner": 0.25}}, {"inner": [12, 9, 7, 5, 3]}),
    ],
)
def test_limits_of_layers_grow_with_the_schedule(options, kept):
    model = build()
    schedule = graphprune.training.linear(0.5, end=4)
    pruner = Pruner(model, X[:2], schedule=schedule, **options)
    (group,) = (g.name for g in pruner.graph.groups if g.size == 12)
    found = [12]
    for _ in range(4):
        pruner.step()
        counts = {g.name: len(g.kept) for g in pruner.soft.plan.groups}
        found.append(counts[group])
    assert found == kept["inner"]
    pruner.finish()
    assert model.inner.out_channels == 3


def test_limits_of_layers_need_a_last_sparsity():
    with pytest.raises(InputError, match="ratios go with a schedule whose last sparsity is known"):
        Pruner(build(), X[:2], schedule=lambda step: 0.5, ratios={"inner": 0.5})


# --- arguments of the wrong kind -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Slimming(build(), 0.1), "graph must be what graphprune.trace.* got Residual"),
        (lambda: GroupLasso(build(), 0.1), "graph must be what graphprune.trace.* got Residual"),
        (
            lambda: lottery(build(), lambda m, s: train(m), evaluate, sparsity=0.5),
            "point must be a RewindPoint, such as .* got Residual",
        ),
        (
            lambda: lottery(RewindPoint(build()), train_alone, evaluate, sparsity=0.5),
            r"train must be a function of a model and a step: train\(model, step\)",
        ),
        (lambda: Pruner(build(), X, schedule=0.5, copies=[3]), r"copies\[0\] is no copy"),
        (lambda: Pruner(build(), X, schedule=cubic), "schedule must be a sparsity, a schedule"),
        (
            lambda: Pruner(build(), X[:2], schedule=0.5).load_state_dict(None),
            "this is no state of a Pruner",
        ),
        (lambda: Distillation(build(), features=3), "features must be names of modules"),
        (
            lambda: SparseLearning(graphprune.trace(build(), X[:2]), 0.1, alpha=-1),
            "alpha must be a number of at least 0, such as 4; got -1",
        ),
        (
            lambda: Distillation(build(), loss=nn.CrossEntropyLoss()),
            r"loss must be a function \(model, batch\) -> scalar",
        ),
    ],
)
def test_arguments_of_the_wrong_kind(call, says):
    with pytest.raises(InputError, match=says):
        call()


def train_alone(model):
    return None


def test_files_that_cannot_be_written(tmp_path):
    history = History(X[:2])
    history.record(build(), 0, accuracy=0.5)
    graph = graphprune.trace(build(), X[:2])
    sensitivity = graph.sensitivity(build(), evaluate, (0.5, 0.75))
    for write in (history.plot, history.plot_widths, cubic(0.5, end=4).plot, sensitivity.plot):
        for path in (tmp_path / "a.xyz", tmp_path / "nowhere/a.svg"):
            with pytest.raises(InputError, match="cannot draw to"):
                write(path)
        assert write(tmp_path / "a.svg").stat().st_size > 1000
    with pytest.raises(InputError, match=r"cannot write .*nowhere/a\.csv"):
        history.to_csv(tmp_path / "nowhere/a.csv")
