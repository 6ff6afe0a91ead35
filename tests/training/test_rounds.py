"""Prune, train, evaluate, again: reports, floors, crashes, and functions that misbehave."""

import copy
import json

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import CheckpointError, InputError, RoundError
from graphprune.record.tensors import fingerprint
from graphprune.training import History, cubic, iterate, round_state

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] * X[:, 1:2] - X[:, 2:3].abs()


def net(width=16):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Dropout(0.1), nn.Linear(width, 1)
    )  # fmt: skip


def train(model, steps=5):
    """Draws random numbers, as loaders and dropout do."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        rows = torch.randperm(len(X))[:32]
        optimizer.zero_grad()
        loss = (model(X[rows]) - Y[rows]).square().mean()
        loss.backward()
        optimizer.step()
        yield loss


def evaluate(model):
    assert not model.training
    with torch.no_grad():
        return -float((model(X) - Y).square().mean())


def widths(outcome):
    return [entry.widths["0"] for entry in outcome.history.entries]


def same(left, right):
    mine, other = left.state_dict(), right.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def test_rounds_remove_equal_parts_of_what_is_left_and_report():
    model = net()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    outcome = iterate(model, 3, train, evaluate, sparsity=0.875, example_inputs=X)
    assert widths(outcome) == [16, 8, 4, 2]
    assert [e.values["sparsity"] for e in outcome.history.entries] == [0, 0.5, 0.75, 0.875]
    assert [e.step for e in outcome.history.entries] == [0, 1, 2, 3]
    last = outcome.history.entries[-1]
    assert last.params == sum(p.numel() for p in outcome.model.parameters())
    assert last.macs == graphprune.measure(outcome.model, X, latency=False).macs
    assert last.values["accuracy"] == evaluate(outcome.model.eval())
    assert last.values["before"] != last.values["accuracy"]
    assert outcome.reason == "all 3 rounds done"
    assert "of the MACs" in str(outcome)
    assert outcome.plan.architecture == fingerprint(model)
    rebuilt = graphprune.rebuild(model, outcome.plan)
    assert fingerprint(rebuilt) == fingerprint(outcome.model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


@pytest.mark.parametrize("scope", ["local", "global"])
def test_small_steps_add_up_exactly(scope):
    """A step of less than a channel is not lost by rounding."""
    outcome = iterate(net(10), 12, None, evaluate, sparsity=0.5, example_inputs=X, scope=scope)
    assert outcome.plan.removed == 10
    if scope == "local":
        assert outcome.model[0].out_features == outcome.model[3].out_features == 5


@pytest.mark.parametrize("quantity", ["macs", "params", "bytes"])
def test_a_budget_is_one_of_the_original(quantity):
    model = net(32)
    outcome = iterate(
        model, 3, None, evaluate, sparsity=0.6, quantity=quantity, example_inputs=X, scope="global"
    )
    measured = {
        "macs": outcome.history.entries[-1].macs / outcome.history.entries[0].macs,
        "params": outcome.history.entries[-1].params / outcome.history.entries[0].params,
        "bytes": outcome.plan.after.bytes / outcome.plan.before.bytes,
    }
    assert 0.35 <= measured[quantity] <= 0.4


def test_schedules_and_functions_say_the_sparsity_of_a_round():
    schedule = cubic(0.75, end=2)
    outcome = iterate(net(), 3, None, evaluate, sparsity=schedule, example_inputs=X)
    assert [e.values["sparsity"] for e in outcome.history.entries] == [0, 0.65625, 0.75]
    outcome = iterate(net(), 2, None, evaluate, sparsity=lambda n: (n + 1) / 4, example_inputs=X)
    assert widths(outcome) == [16, 12, 8]


def test_limits_are_fractions_of_the_original():
    outcome = iterate(
        net(), 3, None, evaluate, sparsity=0.875, example_inputs=X, min_kept={"3": 0.5}
    )
    assert (outcome.model[0].out_features, outcome.model[3].out_features) == (2, 8)


def floored(limit):
    """Good as long as the first layer is wide enough."""
    return lambda model: float(model[0].out_features >= limit)


def test_a_broken_floor_is_undone_and_approached_in_half_steps():
    outcome = iterate(
        net(32), 4, train, floored(10), sparsity=lambda n: (n + 1) / 5, example_inputs=X,
        floor=1.0, retries=2,
    )  # fmt: skip
    entries = outcome.history.entries
    assert widths(outcome) == [32, 26, 20, 13, 7, 10]
    assert [e.values["kept"] for e in entries] == [1, 1, 1, 1, 0, 1]
    assert outcome.model[0].out_features == 10
    assert entries[4].note == "below the floor: undone"
    outcome = iterate(
        net(32), 4, train, floored(13), sparsity=lambda n: (n + 1) / 5, example_inputs=X,
        floor=1.0, retries=1,
    )  # fmt: skip
    assert outcome.model[0].out_features == 13
    assert outcome.reason == "the floor was broken in round 4"


def test_a_drop_is_a_floor_below_the_original(tmp_path):
    """The share of the channels is what is evaluated, so that the end is known."""

    def evaluate(model):
        return 100 + 10 * model[0].out_features / 32

    def run(**more):
        return iterate(net(32), 4, train, evaluate, sparsity=lambda n: (n + 1) / 5,
                       example_inputs=X, **more)  # fmt: skip

    outcome = run(max_drop=4.1, retries=0, folder=tmp_path)
    assert widths(outcome) == [32, 26, 20, 13]
    assert [e.values["kept"] for e in outcome.history.entries] == [1, 1, 1, 0]
    assert outcome.model[0].out_features == 20
    assert outcome.reason == "more than max_drop was lost in round 3"
    assert outcome.history.entries[-1].note == "lost more than max_drop: undone"
    again = run(max_drop=4.1, retries=0, folder=tmp_path)
    assert same(outcome.model, again.model)
    assert run(max_drop=0.0).model[0].out_features == 32
    halves = run(max_drop=4.1)
    assert 110 - evaluate(halves.model) <= 4.1
    assert halves.model[0].out_features <= 20
    with pytest.raises(InputError, match=r"other max_drop: 4.1, now 5.0"):
        run(max_drop=5.0, retries=0, folder=tmp_path)


def right(model, of=32):
    """Of 1,000 answers a wrong one for each channel that is gone."""
    wrong = of - model[0].out_features
    return torch.cat([torch.zeros(wrong), torch.ones(1000 - wrong)]) > 0


def test_the_bound_of_a_drop_counts_where_every_example_has_a_number(tmp_path):
    def run(evaluate=right, **more):
        return iterate(net(32), 4, train, evaluate, sparsity=lambda n: (n + 1) / 5,
                       example_inputs=X, max_drop=0.02, retries=0, **more)  # fmt: skip

    outcome = run(folder=tmp_path)
    first, *rounds = outcome.history.entries
    assert "at most" not in first.values
    assert [e.values["accuracy"] for e in rounds] == pytest.approx([0.994, 0.988, 0.981])
    assert [e.values["at most"] for e in rounds] == pytest.approx(
        [0.0116, 0.0191, 0.0275], abs=1e-3
    )
    assert [e.values["kept"] for e in rounds] == [1, 1, 0]
    assert "at most" in str(outcome)
    again = run(folder=tmp_path)
    assert same(outcome.model, again.model)
    assert again.history.entries == outcome.history.entries
    with pytest.raises(InputError, match="it must always return the same"):
        run(lambda model: right(model) if model[0].out_features == 32 else 0.9)
    with pytest.raises(InputError, match="must be of the same examples"):
        run(lambda model: right(model)[model[0].out_features :])
    with pytest.raises(InputError, match="examples cannot show"):
        run(lambda model: right(model)[:20])
    with pytest.raises(InputError, match="evaluate must return a number, not Tensor"):
        iterate(net(32), 1, train, right, example_inputs=X)


def test_an_undone_round_leaves_the_last_good_model_on_disk(tmp_path):
    options = {"sparsity": lambda n: (n + 1) / 3, "example_inputs": X, "floor": 1.0}
    first = iterate(net(), 2, train, floored(9), folder=tmp_path, retries=0, **options)
    assert [entry.values["kept"] for entry in first.history.entries] == [1, 1, 0]
    second = iterate(net(), 2, train, floored(9), folder=tmp_path, retries=0, **options)
    assert same(first.model, second.model)
    assert second.reason == "the floor was broken in round 2"


def test_every_round_draws_numbers_of_its_own():
    drawn = []

    def draws(model):
        drawn.append(float(torch.rand(())))
        return train(model)

    for seed in (0, 0, 1):
        iterate(net(), 2, draws, evaluate, example_inputs=X, seed=seed)
    assert drawn[:2] == drawn[2:4]
    assert len(set(drawn)) == 4


def test_when_no_round_is_good_enough_the_original_is_returned():
    model = net()
    outcome = iterate(
        model, 2, train, floored(16), sparsity=0.5, example_inputs=X, floor=1, retries=0
    )
    assert outcome.model is model
    assert outcome.plan is None
    assert len(outcome.history.entries) == 2


def test_layers_that_are_kept_stay_whole():
    assert widths(iterate(net(), 2, train, evaluate, keep="0", example_inputs=X)) == [16, 16, 16]
    outcome = iterate(net(), 2, train, evaluate, keep="*", example_inputs=X)
    assert outcome.reason == "no round could remove a channel"


def test_a_step_below_one_channel_ends_it():
    outcome = iterate(
        net(4), 1, train, floored(4), sparsity=0.3, example_inputs=X, floor=1, retries=5
    )
    assert outcome.reason == "half a step is less than one channel"


class Crash(Exception):
    pass


@pytest.mark.parametrize("where", ["train", "evaluate"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_resumed_run_ends_as_one_that_was_not_cut_off(tmp_path, where, count):
    model = net()
    calls = []

    def crashing(name, function):
        def call(small):
            calls.append(name)
            if calls.count(name) == count and name == where:
                raise Crash
            return function(small)

        return call

    options = {"sparsity": 0.875, "example_inputs": X}
    wanted = iterate(model, 3, train, evaluate, **options)
    torch.manual_seed(99)
    functions = crashing("train", train), crashing("evaluate", evaluate)
    with pytest.raises(Crash) as raised:
        iterate(model, 3, *functions, folder=tmp_path, **options)
    if (where, count) != ("evaluate", 1):  # that is the original's, before the first round
        assert f"the finished rounds are in {str(tmp_path)!r}" in raised.value.__notes__[0]
    resumed = []

    def counted(small):
        resumed.append(small[0].out_features)
        return train(small)

    found = iterate(model, 3, counted, evaluate, folder=tmp_path, **options)
    assert same(found.model, wanted.model)
    assert found.history.entries == wanted.history.entries
    finished = count - 1 if where == "train" else max(0, (count - 2) // 2)
    assert len(resumed) == 3 - finished, "no finished round is trained again"


def test_a_crash_between_model_and_state_loses_one_round(tmp_path, monkeypatch):
    model = net()
    wanted = iterate(model, 3, train, evaluate, example_inputs=X)
    replace, calls = round_state._replace, []

    def crash(path, text):
        calls.append(path)
        if len(calls) == 3:  # the original, the first round, then this
            raise Crash
        replace(path, text)

    monkeypatch.setattr(round_state, "_replace", crash)
    with pytest.raises(Crash):
        iterate(model, 3, train, evaluate, example_inputs=X, folder=tmp_path)
    assert {path.name for path in tmp_path.glob("model*")} == {
        "model-1.safetensors",
        "model-2.safetensors",
    }
    found = iterate(model, 3, train, evaluate, example_inputs=X, folder=tmp_path)
    assert same(found.model, wanted.model)


def test_a_finished_folder_gives_its_outcome_at_once(tmp_path):
    model = net()
    first = iterate(model, 2, train, evaluate, example_inputs=X, folder=tmp_path)
    second = iterate(model, 2, lambda _: 1 / 0, evaluate, example_inputs=X, folder=tmp_path)
    assert same(first.model, second.model)
    assert first.plan == second.plan
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["model-2.safetensors", "state.json"]


def test_a_small_model_can_be_the_original(tmp_path):
    """Its earlier plan is composed with those of the rounds, on disk and off."""
    first = net()
    small = graphprune.rebuild(first, 0.5, X)
    options = {"sparsity": 0.5, "example_inputs": X, "folder": tmp_path}
    for _ in range(2):
        outcome = iterate(small, 2, train, evaluate, **options)
        assert widths(outcome)[-1] == 4
        assert fingerprint(graphprune.rebuild(first, outcome.plan)) == fingerprint(outcome.model)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rounds": 3}, r"other rounds: 2, now 3"),
        ({"sparsity": 0.25}, "other sparsity"),
        ({"floor": -9.0}, r"other floor: None, now -9.0"),
        ({"criterion": "l1"}, "other options"),
        ({"model": net(8)}, "other architecture"),
        ({"model": nn.Sequential(*[copy.deepcopy(m) for m in net()])}, ""),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path, change, text):
    arguments = {"model": net(), "rounds": 2, "sparsity": 0.5}
    rest = {"train": None, "evaluate": evaluate, "folder": tmp_path, "example_inputs": X}
    iterate(**arguments, **rest)
    if not text:
        with torch.no_grad():
            change["model"][0].weight.add_(0.5)
        text = "other weights"
    with pytest.raises(InputError, match=text):
        iterate(**{**arguments, **change}, **rest)


def test_a_damaged_folder_is_told(tmp_path):
    iterate(net(), 1, None, evaluate, folder=tmp_path, example_inputs=X)
    state = tmp_path / "state.json"
    text = state.read_text()
    (tmp_path / json.loads(text)["state"]["file"]).write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        iterate(net(), 1, None, evaluate, folder=tmp_path, example_inputs=X)
    state.write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="damaged or no state of rounds"):
        iterate(net(), 1, None, evaluate, folder=tmp_path, example_inputs=X)


def test_a_loss_that_is_not_finite_ends_the_round_and_loses_nothing(tmp_path):
    rounds, seen = [], []

    def broken(model):
        rounds.append(model)
        for loss in train(model):
            seen.append(loss)
            yield loss if len(rounds) < 2 else loss * float("nan")

    with pytest.raises(RoundError, match=r"round 2: the loss is nan \(number 1\)") as raised:
        iterate(net(), 3, broken, evaluate, folder=tmp_path, example_inputs=X, sparsity=0.875)
    assert len(seen) == 6, "five in the first round, one in the second"
    assert widths(raised.value.outcome) == [16, 8]
    kept = graphprune.load(tmp_path / "model-1.safetensors", net())
    assert same(kept, raised.value.outcome.model)
    outcome = iterate(net(), 3, train, evaluate, folder=tmp_path, example_inputs=X, sparsity=0.875)
    assert widths(outcome) == [16, 8, 4, 2]


def poison(model):
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda m: float("inf"), "the loss is inf"),
        (lambda m: torch.tensor(float("nan")), "the loss is nan"),
        (poison, r"after training, '0.weight' holds NaN or infinite"),
    ],
)
def test_other_ways_of_not_being_finite(function, text):
    with pytest.raises(RoundError, match=text) as raised:
        iterate(net(), 1, function, evaluate, example_inputs=X)
    assert raised.value.outcome.plan is None


def grow(model):
    model[0] = nn.Linear(6, 9)


def trains_a_copy(model):
    list(train(copy.deepcopy(model)))


OLD = net()


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (copy.deepcopy, "train returned another model"),
        (grow, "train changed the architecture"),
        (trains_a_copy, "train changed no weight of the model that it was given"),
        (lambda m: list(train(OLD)), "make the optimizer inside train"),
        (lambda m: None, "pass train=None"),
    ],
)
def test_a_train_that_replaces_the_model_is_told(function, text):
    with pytest.raises(InputError, match=text):
        iterate(net(), 1, function, evaluate, example_inputs=X)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rounds": 0}, "rounds must be an int of at least 1"),
        ({"retries": -1}, "retries must be an int of at least 0"),
        ({"train": "sgd"}, "train and evaluate must be functions"),
        ({"evaluate": None}, "train and evaluate must be functions"),
        ({"floor": "90 %"}, "floor must be a number"),
        ({"max_drop": -1}, "max_drop must be a finite number"),
        ({"max_drop": True}, "max_drop must be a finite number"),
        ({"max_drop": 1, "floor": 0.5}, "leave one of them out"),
        ({"floor": float("nan")}, "floor must be a number that evaluate may return, not nan"),
        ({"floor": 1.0}, r"the original itself evaluates to -[\d.]+, below the floor 1"),
        ({"sparsity": 1.5}, "sparsity of iterative must be a fraction"),
        ({"sparsity": lambda n: 0.5 - n / 4}, "must grow from round to round"),
        ({"sparsity": lambda n: 0.0}, "must grow from round to round"),
        ({"sparsity": lambda n: 2}, "the schedule's sparsity at step 0 must be a fraction"),
        ({"quantity": "watts"}, "quantity must be one of channels, macs, params, bytes"),
        ({"ratios": {"0": 0.5}}, "ratios is what the sparsity says round by round"),
        ({"ratio": 0.5}, "ratio is what the sparsity says round by round"),
        ({"scop": "local"}, "unknown option 'scop'"),
        ({"criterion": "best"}, "unknown criterion 'best'"),
        ({"evaluate": lambda m: "good"}, "evaluate must return a number, not str"),
        ({"evaluate": lambda m: float("nan")}, "the original model: the evaluation is nan"),
    ],
)
def test_wrong_arguments_are_explained(change, text):
    arguments = {"rounds": 2, "train": train, "evaluate": evaluate, "example_inputs": X, **change}
    with pytest.raises(InputError, match=text):
        iterate(net(), **arguments)


def test_modes_are_those_of_the_original_in_the_end():
    model = net()
    model[1].eval()
    outcome = iterate(model, 1, train, evaluate, example_inputs=X)
    assert [m.training for m in outcome.model] == [m.training for m in model]
    assert isinstance(outcome.history, History)
