"""torch's own layers: what they remember about their sizes follows their parameters."""

import copy
import dataclasses
import pickle

import pytest
import torch
from support.comparing import assert_same_state, call, untouched
from support.zoo import ZOO, randomise
from support.zoo.branches import Block, CifarResNet
from support.zoo.registry import conv, sandwich
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import graphprune
from graphprune.errors import GraphPruneError, InputError, PlanError, PruningWarning

X = torch.zeros(2, 3, 8, 8)
LAYERS = {  # layer after 8 channels, the sizes it remembers at half of them
    "conv": (lambda: conv(8, 6), {"in_channels": 4, "out_channels": 3}),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 2), {"in_channels": 4, "out_channels": 3}),
    "depthwise": (lambda: conv(8, 8, groups=8), {"in_channels": 4, "out_channels": 4, "groups": 4}),
    "grouped": (lambda: conv(8, 12, groups=2), {"in_channels": 4, "out_channels": 6, "groups": 2}),
    "batch": (lambda: nn.BatchNorm2d(8), {"num_features": 4}),
    "instance": (lambda: nn.InstanceNorm2d(8, affine=True), {"num_features": 4}),
    "group": (lambda: nn.GroupNorm(2, 8), {"num_channels": 4, "num_groups": 2}),
    "whole_groups": (lambda: nn.GroupNorm(8, 8), {"num_channels": 4, "num_groups": 4}),
    "prelu": (lambda: nn.PReLU(8), {"num_parameters": 4}),
}


def width(layer):
    return getattr(layer, "out_channels", 8)


@pytest.mark.parametrize("training", [True, False])
def test_a_spectral_norm_is_not_moved_by_looking_at_it(training):
    """In train mode every reading of its weight takes a step of the power iteration."""
    torch.manual_seed(0)
    net = nn.Sequential(
        conv(3, 12), nn.ReLU(), spectral_norm(conv(12, 12)), nn.Flatten(), nn.Linear(12 * 64, 4)
    )
    net = net.double().train(training)
    with untouched(net):
        graph = graphprune.trace(net, X.double())
        plan = graph.plan(0.5)
        small = graphprune.rebuild(net, plan)
        assert graphprune.verify(net, small, X.double()).difference < 1e-10


@pytest.mark.parametrize("kind", LAYERS)
def test_remembered_sizes_follow(kind):
    make, sizes = LAYERS[kind]
    thing = make()
    model = randomise(sandwich(thing, 8, width(thing))).eval()
    small = graphprune.rebuild(model, 0.5, X)
    assert {name: getattr(small.thing, name) for name in sizes} == sizes
    assert repr(small.thing) != repr(thing)
    graphprune.verify(model, small, X)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_fresh_layer_of_the_remembered_sizes_loads_the_weights(kind):
    """The sizes are those one would have written for this width from the start."""
    make, sizes = LAYERS[kind]
    thing = make()
    small = graphprune.rebuild(sandwich(thing, 8, width(thing)), 0.5, X).thing
    names = {"conv": ("in_channels", "out_channels"), "transposed": ("in_channels", "out_channels")}
    arguments = [getattr(small, name) for name in names.get(kind, ())]
    if arguments:
        fresh = type(small)(*arguments, small.kernel_size, padding=small.padding)
        fresh.load_state_dict(small.state_dict())
        assert_same_state(fresh, small)
    assert all(type(getattr(small, name)) is int for name in sizes)


def test_linear_and_embedding():
    entry = ZOO["EmbeddingClassifier"]
    small = graphprune.rebuild(entry.build(), 0.5, entry.inputs())
    assert (small.table.num_embeddings, small.table.embedding_dim) == (11, 4)
    assert (small.head.in_features, small.head.out_features) == (3, 4)


def test_layer_norm_shape():
    entry = ZOO["layer_norm_channels_last"]
    small = graphprune.rebuild(entry.build(), 0.5, entry.inputs())
    assert small.thing.norm.normalized_shape == (4,)


def test_tied_parameters_stay_tied():
    entry = ZOO["TiedEmbedding"]
    small = graphprune.rebuild(entry.build(), 0.5, entry.inputs())
    assert small.out.weight is small.table.weight


def test_one_module_under_two_names_stays_one():
    entry = ZOO["Siamese"]
    small = graphprune.rebuild(entry.build(), 0.5, entry.inputs())
    assert small.tower is small.alias


def test_hooks_are_kept():
    seen = []
    model = sandwich(nn.Identity())
    model.act.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    small = graphprune.rebuild(model, 0.5, X)
    seen.clear()
    call(small, X)
    assert seen == [(2, 4, 8, 8)]


def test_small_models_copy_pickle_and_train():
    model = randomise(CifarResNet(Block(8, 16, 2, nn.Conv2d(8, 16, 1, stride=2)))).eval()
    small = graphprune.rebuild(model, 0.5, X)
    for clone in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(call(clone, X), call(small, X))
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    before = call(small, X)
    small.train()(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(call(small.eval(), X), before)


def test_in_place_keeps_the_parameter_objects():
    model = randomise(sandwich(nn.PReLU(8))).eval()
    wanted = graphprune.rebuild(model, 0.5, X)
    tensors = {name: id(p) for name, p in model.named_parameters()}
    same = graphprune.rebuild(model, 0.5, X, inplace=True)
    assert same is model
    assert {name: id(p) for name, p in model.named_parameters()} == tensors
    assert_same_state(wanted, same)


class Largest(nn.Module):
    def forward(self, x):
        return x - x.amax(1, keepdim=True)


def test_exact_only_spares_renormalising_groups():
    model = randomise(sandwich(Largest())).eval()
    graph = graphprune.trace(model, X)
    assert not graph.group_of("stem").exact
    with pytest.warns(PruningWarning, match="2 of 13 channels"):
        small = graphprune.rebuild(model, 0.5, X, exact_only=True)
    assert (small.stem.out_channels, small.last.out_channels) == (8, 3)
    assert small.graphprune_plan.exact


class AccidentallyEqual(nn.Module):
    """Adds a shortcut when shapes agree; they do not, but could after pruning."""

    def __init__(self):
        super().__init__()
        self.conv = conv(8, 12)

    def forward(self, x):
        y = self.conv(x)
        return F.relu(x + y) if x.shape[1] == y.shape[1] else F.relu(y)


def test_shapes_that_become_equal_by_accident():
    """Either the plan is refused, or the small model equals the masked original."""
    model = randomise(sandwich(AccidentallyEqual(), 8, 12)).eval()
    graph = graphprune.trace(model, X)
    kept = {graph.group_of(name).name: range(6) for name in ("stem", "thing.conv")}
    with untouched(model):
        try:
            small = graphprune.rebuild(model, graph.plan_of(kept))
        except GraphPruneError:
            return
        assert graphprune.verify(model, small, X).difference <= 1e-10


def test_shapes_that_would_become_equal_by_ratio():
    model = randomise(sandwich(AccidentallyEqual(), 8, 12)).eval()
    graph = graphprune.trace(model, X)
    keep = {graph.group_of("stem").name: range(8), graph.group_of("thing.conv").name: range(8)}
    try:
        plan = graph.plan_of(keep)
    except GraphPruneError:
        return
    assert graphprune.verify(model, plan, X).difference <= 1e-10


def test_a_plan_fits_every_instance_of_the_architecture():
    first, second = (ZOO["cifar_projected"].build(seed) for seed in (1, 2))
    plan = graphprune.trace(first, X).plan(0.5)
    assert graphprune.verify(second, graphprune.rebuild(second, plan), X).difference <= 1e-10
    damaged = dataclasses.replace(plan, architecture="another")
    with untouched(second), pytest.raises(PlanError, match="another architecture"):
        graphprune.rebuild(second, damaged)


def test_parameters_of_the_model_itself_go_by_their_names(tmp_path):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(8, 3))

        def forward(self, x):
            return (x @ self.up).relu() @ self.down

    graph = graphprune.trace(Bare(), torch.randn(2, 3))
    assert [group.layers for group in graph.groups] == [("up", "down")]
    assert "up, down" in str(graph.plan(0.5))
    with pytest.raises(InputError, match="layers: down, up"):
        graph.group_of("upp")
    assert "<!-- down -->" in graph.draw(tmp_path / "bare.svg").read_text()


def test_what_was_compiled_in_place_is_recorded_plain_and_comes_out_plain():
    torch.manual_seed(0)
    model = sandwich(nn.Sequential(conv(8, 8), nn.ReLU())).eval()
    wanted = graphprune.rebuild(model, 0.5, X)
    model.compile(backend="eager")
    model.act.compile(backend="eager")
    small = graphprune.rebuild(model, 0.5, X)
    assert small.graphprune_plan == wanted.graphprune_plan
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(call(small, X + 1), call(wanted, X + 1)), "it runs its own weights"


class OneWeightPerExpert(nn.modules.conv._ConvNd):
    """A convolution whose first dimension counts experts (CondConv)."""

    def __init__(self, into, out, experts):
        super().__init__(into, out, (3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 1, True, "zeros")
        self.routing = nn.Linear(into, experts)
        self.weight = nn.Parameter(torch.randn(experts, out, into, 3, 3))

    def forward(self, x):
        shares = torch.sigmoid(self.routing(x.mean((0, 2, 3))))
        kernel = torch.sum(shares[:, None, None, None, None] * self.weight, 0)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding)


class OneMatrixPerMember(nn.Linear):
    """A linear layer of several models at once."""

    def __init__(self, members, into, out):
        super().__init__(into, out)
        self.weight = nn.Parameter(torch.randn(members, into, out))

    def forward(self, x):
        return (x.unsqueeze(0) @ self.weight).mean(0) + self.bias


@pytest.mark.parametrize("kind", ["experts", "members"])
def test_layers_whose_weight_has_another_dimension_than_torchs_are_cut(kind):
    if kind == "experts":
        model = sandwich(OneWeightPerExpert(8, 6, 3), 8, 6)
        model, x, wanted = randomise(model).eval(), torch.randn(2, 3, 8, 8), (2, 3, 4, 3, 3)
    else:
        middle = OneMatrixPerMember(3, 8, 6)
        model = nn.Sequential(nn.Linear(4, 8), middle, nn.ReLU(), nn.Linear(6, 2)).eval()
        model, x, wanted = randomise(model), torch.randn(5, 4), (2, 4, 3)
    small = graphprune.rebuild(model, 0.5, x)
    shapes = [tuple(parameter.shape) for parameter in small.parameters()]
    assert wanted in shapes, "of three, two stay"
    assert graphprune.verify(model, small, x).verdict == "equal"


class PartlyCompiled(nn.Module):
    """A compiled part, as ``torch.compile`` wraps it, and a compiled function."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.part = torch.compile(nn.Sequential(nn.Linear(12, 12), nn.ReLU()), backend="eager")
        self.rest = torch.compile(lambda x, y: F.gelu(x) * y, backend="eager")

    def forward(self, x):
        x = self.first(x)
        return self.last(self.rest(self.part(x), x))


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # beside global hooks
@pytest.mark.filterwarnings("ignore::RuntimeWarning:torch")  # dynamo's, of versions of Python
def test_compiled_parts_are_recorded_op_by_op():
    """Dynamo must not compile what looks at the ops: it would see them at other times."""
    torch.manual_seed(0)
    model, x = PartlyCompiled().eval(), torch.randn(4, 6)
    small = graphprune.rebuild(model, 0.5, x)
    assert small.first.out_features == small.last.in_features == 6
    assert graphprune.verify(model, small, x).verdict == "equal"
