"""Single weights: torch's masks, gradual pruning, N:M patterns, after structured removal too."""

import copy

import pytest
import torch
from support.loops import X, Y, build
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import graphprune
from graphprune.errors import InputError, ModelError, PruningWarning
from graphprune.training import (
    NMStructured,
    SparsePruner,
    cubic,
    make_permanent,
    sparsify,
    sparsity_of,
    to_semi_structured,
)


def net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 16),
        nn.Linear(16, 3),
    )


INPUT = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
LAYERS = ("0", "3", "4")


def weights(model):
    return [(model.get_submodule(name), "weight") for name in LAYERS]


def test_global_masks_are_those_of_torch():
    ours, theirs = net(), net()
    report = sparsify(ours, 0.7)
    prune.global_unstructured(weights(theirs), prune.L1Unstructured, amount=0.7)
    for name in LAYERS:
        mask = theirs.get_submodule(name).weight_mask
        assert torch.equal(ours.get_submodule(name).weight_mask, mask)
    assert report.fraction == pytest.approx(0.7, abs=1e-3)
    assert torch.equal(ours(INPUT), theirs(INPUT))


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_memory_format_does_not_matter(scope):
    plain = build().double()
    other = build().double().to(memory_format=torch.channels_last)
    for model in (plain, other):
        sparsify(model, 0.5, scope=scope)
    assert torch.equal(plain.inner.weight_mask, other.inner.weight_mask)
    assert torch.allclose(plain(X), other(X))


def test_local_masks_are_those_of_torch():
    ours, theirs = net(), net()
    sparsify(ours, 0.5, scope="local")
    for module, name in weights(theirs):
        prune.l1_unstructured(module, name, amount=0.5)
    for name in LAYERS:
        mask = theirs.get_submodule(name).weight_mask
        assert torch.equal(ours.get_submodule(name).weight_mask, mask)


def test_a_second_call_counts_what_is_gone_and_keeps_it():
    model = net()
    sparsify(model, 0.5)
    before = {name: model.get_submodule(name).weight_mask.bool() for name in LAYERS}
    assert sparsify(model, 0.8).fraction == pytest.approx(0.8, abs=1e-3)
    for name in LAYERS:
        after = model.get_submodule(name).weight_mask.bool()
        assert not (after & ~before[name]).any(), "no weight came back"
    assert sparsify(model, 0.2).fraction == pytest.approx(0.8, abs=1e-3)
    masked = sum(int((model.get_submodule(name).weight_mask == 0).sum()) for name in LAYERS)
    assert masked == pytest.approx(
        0.8 * sum(model.get_submodule(n).weight.numel() for n in LAYERS), 1e-3
    )
    assert len(model[0]._forward_pre_hooks) == 1
    assert not isinstance(next(iter(model[0]._forward_pre_hooks.values())), prune.PruningContainer)


def test_parameters_stay_the_same_objects_and_optimizers_go_on():
    model = net()
    known = {id(p) for p in model.parameters()}
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for sparsity in (0.3, 0.6):
        sparsify(model, sparsity)
        optimizer.zero_grad()
        model(INPUT).square().mean().backward()
        optimizer.step()
    assert {id(p) for p in model.parameters()} == known
    wanted = model(INPUT)
    assert make_permanent(model) is model
    assert {id(p) for p in model.parameters()} == known
    assert torch.equal(model(INPUT), wanted)
    assert sparsity_of(model).fraction == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("layer", [nn.Linear(16, 6), nn.Conv2d(8, 6, 3), nn.Conv1d(8, 4, 1)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_a_pattern_keeps_the_largest_of_every_block(layer, n, m):
    layer = copy.deepcopy(layer)
    before = layer.weight.detach().movedim(1, -1).reshape(-1, m)
    NMStructured.apply(layer, "weight", n=n, m=m)
    mask = layer.weight_mask.movedim(1, -1).reshape(-1, m).bool()
    assert (mask.sum(1) == n).all()
    rank = before.abs().argsort(1, descending=True)
    assert mask.gather(1, rank[:, :n]).all(), "the n largest stay"


def test_a_pattern_goes_with_masks_that_are_there():
    layer = nn.Linear(8, 4)
    prune.l1_unstructured(layer, "weight", 0.6)
    before = layer.weight_mask.clone()
    NMStructured.apply(layer, "weight", n=2, m=4)
    assert (layer.weight_mask <= before).all()
    assert (layer.weight_mask.reshape(-1, 4).sum(1) <= 2).all()


def test_layers_that_no_pattern_fits_are_named():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    report = sparsify(model, pattern="2:4")
    assert [row.note for row in report.layers] == ["6 input channels are no multiple of 4", ""]
    assert report.fraction == 0.5
    assert "no multiple of 4" in str(report)
    with pytest.raises(InputError, match="no layer has a multiple of 16"):
        sparsify(model, pattern="8:16")


def test_first_smaller_then_sparse():
    model = build()
    small = graphprune.rebuild(model, 0.5, X[:2])
    report = sparsify(small, 0.75)
    assert report.fraction == pytest.approx(0.75, abs=2e-3)
    dense = make_permanent(small)
    assert dense(X).shape == (16, 3)
    rest = sum(int(m.weight.count_nonzero()) for m in small.modules() if hasattr(m, "weight"))
    assert rest < 0.2 * sum(p.numel() for p in model.parameters())


def test_first_sparse_then_smaller_keeps_the_masks():
    model = build()
    sparsify(model, 0.5, scope="local")
    small = graphprune.rebuild(model, 0.5, X[:2])
    slots = {(slot.tensor, slot.dim): slot.kept for slot in small.graphprune_plan.slots}
    mask = model.inner.weight_mask
    for dim in (0, 1):
        mask = mask.index_select(dim, torch.tensor(slots["inner.weight_mask", dim]))
    assert torch.equal(small.inner.weight_mask, mask)
    assert graphprune.verify(model, small, X[:2]).difference < 1e-10


def test_a_gradual_pruner_follows_its_schedule_and_resumes():
    def run(model, optimizer, pruner, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
            pruner.step()

    def fresh():
        model = build()
        pruner = SparsePruner(model, schedule=cubic(0.9, end=6), scope="local")
        return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), pruner

    whole = fresh()
    run(*whole, 6)
    first = fresh()
    run(*first, 3)
    assert sparsity_of(first[0]).fraction == pytest.approx(cubic(0.9, end=6)(3), abs=5e-3)
    states = copy.deepcopy([first[i].state_dict() for i in (2, 0, 1)])
    second = fresh()
    for part, state in zip((second[2], second[0], second[1]), states):
        part.load_state_dict(state)
    run(*second, 3)
    for left, right in zip(whole[2].finish().parameters(), second[2].finish().parameters()):
        assert torch.equal(left, right)
    assert sparsity_of(whole[0]).fraction == pytest.approx(0.9, abs=5e-3)
    assert "of the weights are zero" in str(whole[2])
    whole[2].step()


def test_masked_weights_stay_zero_and_get_no_gradient():
    model = net()
    sparsify(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(INPUT).square().mean().backward()
        assert not model[3].weight_orig.grad[model[3].weight_mask == 0].any()
        optimizer.step()
    model(INPUT)
    assert not model[3].weight[model[3].weight_mask == 0].any()


def test_layers_that_masks_cannot_follow_are_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.mix = nn.Linear(8, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            x = self.table(x)
            x = x + self.attend(x, x, x, need_weights=False)[0]
            return self.head(self.mix(self.normed(x)))

    model = Tied()
    report = sparsify(model, 0.5)
    notes = {row.layer: row.note for row in report.layers}
    assert notes == {
        "attend.out_proj": "another module reads its weight",
        "normed": "its weight is computed",
        "mix": "",
        "head": "its weight is shared",
    }
    model(torch.arange(6).reshape(1, 6)).sum().backward()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "say either a sparsity"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "say either a sparsity"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": "half"}, "sparsity must be a number"),
        ({"sparsity": 0.5, "scope": "isomorphic"}, "scope must be one of global, local"),
        ({"sparsity": 0.5, "keep": "nothing*"}, "keep pattern 'nothing\\*' fits no layer"),
        ({"sparsity": 0.5, "keep": "*"}, "no layer can be masked: 0: keep"),
        ({"pattern": "4:2"}, "pattern must be a text"),
        ({"pattern": "two"}, "pattern must be a text"),
    ],
)
def test_wrong_arguments_are_explained(arguments, text):
    model = net()
    with pytest.raises(InputError, match=text):
        sparsify(model, **arguments)
    assert all(not name.endswith("_orig") for name, _ in model.named_parameters())


def test_wrong_schedules_and_states_are_explained():
    with pytest.raises(InputError, match="scope must be"):
        SparsePruner(net(), schedule=0.5, scope="all")
    pruner = SparsePruner(net(), schedule=lambda step: 0.5 if step < 2 else 0.25)
    pruner.step()
    with pytest.raises(InputError, match=r"falls from 0.5 to 0.25 at step 2"):
        pruner.step()
    with pytest.raises(InputError, match=r"no state of a SparsePruner: .*masks"):
        pruner.load_state_dict({"steps": 1})
    state = {**pruner.state_dict(), "masks": {"7.weight": torch.ones(2)}}
    with pytest.raises(InputError, match="fits no layer"):
        pruner.load_state_dict(state)


def test_a_layer_that_lost_everything_is_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(model[0].weight, 1e-3)
    nn.init.constant_(model[1].weight, 1.0)
    with pytest.warns(PruningWarning, match="no weight is left in 0"):
        sparsify(model, 0.5)


def test_without_the_hardware_semi_structured_tensors_are_refused():
    model = nn.Sequential(nn.Linear(64, 64))
    sparsify(model, pattern="2:4")
    with pytest.raises(ModelError, match=r"need CUDA and a device of compute capability 8.0"):
        to_semi_structured(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_semi_structured_tensors_compute_the_same():
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).half().cuda()
    sparsify(model, pattern="2:4")
    with pytest.raises(InputError, match="make_permanent"):
        to_semi_structured(model)
    make_permanent(model)
    fast = to_semi_structured(model)
    x = torch.randn(64, 128, device="cuda", dtype=torch.half)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-2, atol=1e-2)
    assert type(fast[0].weight.data).__name__.startswith("SparseSemiStructured")


def test_amounts_by_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 4)))
    report = sparsify(model, {"1.*": 0.25, model[1][1]: 0.5})
    assert [(row.layer, row.zeros, row.note) for row in report.layers] == [
        ("0", 0, "no sparsity for it"), ("1.0", 20, ""), ("1.1", 20, ""),
    ]  # fmt: skip
    assert sparsify(model, {"*": 0.5, "0": 0.125}).layers[0].zeros == 8
    assert sparsify(model, {model[1]: 0.75}, keep=[model[1][0]]).layers[2].zeros == 30


@pytest.mark.parametrize(
    ("sparsity", "options", "told"),
    [
        ({"head": 0.5}, {}, "sparsity pattern 'head' fits no layer; layers: 0"),
        ({"0": 1.5}, {}, r"sparsity\['0'\] must be in \[0, 1\)"),
        ({0: 0.5}, {}, "sparsity must map glob patterns of layers, or modules, to fractions"),
        ({"0": 0.5}, {"scope": "local"}, "leave scope out"),
        ({nn.Linear(2, 2): 0.5}, {}, "holds a Linear that is no module of this model"),
        ({}, {}, "no layer can be masked"),
    ],
)
def test_wrong_amounts_by_layer(sparsity, options, told) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(InputError, match=told):
        sparsify(model, sparsity, **options)
    assert isinstance(model[0].weight, nn.Parameter)
