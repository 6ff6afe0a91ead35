"""Small models that are saved after masks were put on, removed, or carried over."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import graphprune
from graphprune.errors import CheckpointError, InputError
from graphprune.record.masked_names import masked_names, set_masks
from graphprune.training import make_permanent, sparsify

X = torch.randn(5, 8)


def net():
    torch.manual_seed(0)
    layers = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    return nn.Sequential(*layers)


def masked():
    model = net()
    sparsify(model, 0.3)
    return model


def permanent():
    return make_permanent(masked())


def structured():
    model = net()
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    return model


def exactly(model):
    return graphprune.rebuild(model, graphprune.Plan.from_masks(model))


FLOWS = {
    "from masks": lambda: exactly(structured()),
    "from masks, removed": lambda: make_permanent(exactly(structured())),
    "masked, then smaller": lambda: graphprune.rebuild(masked(), 0.5),
    "masked, smaller, permanent": lambda: make_permanent(graphprune.rebuild(masked(), 0.5)),
    "permanent, then smaller": lambda: graphprune.rebuild(permanent(), 0.5),
    "smaller, then masked": lambda: sparse(graphprune.rebuild(net(), 0.5)),
    "smaller, masked, permanent": lambda: make_permanent(sparse(graphprune.rebuild(net(), 0.5))),
    "masked twice": lambda: sparse(graphprune.rebuild(masked(), 0.5)),
}


def sparse(model):
    sparsify(model, 0.6)
    return model


@pytest.mark.parametrize(
    ("flow", "source"), [*itertools.product(FLOWS, (net, masked, permanent, structured))]
)
def test_any_of_the_architectures_loads_it(flow, source, tmp_path):
    """The masks of the file come back, whichever the architecture has."""
    small = FLOWS[flow]()
    path = graphprune.save(small, tmp_path / "small.safetensors")
    given = source()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    for architecture in (given, source):
        loaded = graphprune.load(path, architecture)
        assert masked_names(loaded) == masked_names(small)
        state = small.state_dict()
        assert {n: t.shape for n, t in loaded.state_dict().items()} == {
            n: t.shape for n, t in state.items()
        }
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
        assert torch.equal(loaded[0].weight, small[0].weight), "computed before the first call"
        assert torch.equal(loaded(X), small(X))
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())


class Odd(nn.Module):
    """Two layers share a weight, and a list holds a layer a second time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.c.weight = self.b.weight
        self.out = nn.Linear(16, 3)
        self.stages = nn.ModuleList([self.a])

    def forward(self, x):
        return self.out(self.c(self.b(self.a(x).relu()).relu()).relu())


def odd(names):
    model = Odd()
    for name in names:
        prune.l1_unstructured(model.get_submodule(name), "weight", 0.3)
    if {"b", "c"} <= set(names):
        model.c.weight_orig = model.b.weight_orig
        model.c.weight_mask = model.b.weight_mask
    return model


@pytest.mark.parametrize("names", ["a", "bc", "abc"])
def test_masks_of_shared_weights_and_of_modules_with_two_names(names, tmp_path):
    small = graphprune.rebuild(odd(names), 0.5, X)
    path = graphprune.save(small, tmp_path / "small.safetensors")
    loaded = graphprune.load(path, odd(names))
    assert masked_names(loaded) == masked_names(small) != set()
    assert torch.equal(loaded(X), small(X))


def test_masks_of_a_bias_that_the_plan_has_made(tmp_path):
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 16, bias=False), nn.ReLU()
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    plain = exactly(make_permanent(model))
    assert plain[2].bias is not None
    prune.l1_unstructured(plain[2], "bias", 0.5)
    loaded = graphprune.load(graphprune.save(plain, tmp_path / "a.safetensors"), model)
    assert masked_names(loaded) == {"2.bias"}
    assert torch.equal(loaded(X), plain(X))


def test_another_architecture_is_still_refused(tmp_path):
    path = graphprune.save(FLOWS["masked, then smaller"](), tmp_path / "small.safetensors")
    other = nn.Sequential(nn.Linear(8, 31), nn.ReLU(), nn.Linear(31, 32), nn.ReLU(), net()[4])
    with pytest.raises(CheckpointError, match=r"does not fit Sequential: shapes: 0\.weight"):
        graphprune.load(path, other)


def test_masks_are_put_on_and_taken_off():
    model = net()
    set_masks(model, {"0.weight", "4.bias", "nowhere.weight"})
    assert masked_names(model) == {"0.weight", "4.bias"}
    set_masks(model, {"2.weight"})
    assert masked_names(model) == {"2.weight"}
    assert torch.equal(model(X), net()(X))


def test_verify_names_masks_of_one_model_alone():
    model = masked()
    small = make_permanent(graphprune.rebuild(model, 0.5))
    with pytest.raises(InputError, match=r"0\.weight, .* has a mask .* in one of the models alone"):
        graphprune.verify(model, small, X)


def test_a_compiled_model_is_neither_saved_nor_repaired(tmp_path):
    small = graphprune.rebuild(net(), 0.5)
    compiled = torch.compile(small)
    for call in (
        lambda: graphprune.save(compiled, tmp_path / "small.safetensors"),
        lambda: graphprune.calibrate(compiled, net(), [X]),
        lambda: graphprune.verify(net(), compiled, X),
    ):
        with pytest.raises(graphprune.errors.ModelError, match="the model is compiled"):
            call()
    assert not list(tmp_path.iterdir())
