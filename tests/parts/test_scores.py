"""Experts by scores of all kinds: each leaves as if its scores were minus infinity."""

import pytest
import torch
from support.comparing import untouched
from support.mixtures import Around, Pictures
from support.more_mixtures import KERNELS, KINDS, Kernels, Losing, Scored, Unlike, Zero
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import InputError, VerificationError

pytestmark = pytest.mark.filterwarnings("ignore:.*channels were removed")
NEVER = -1e9
OFTEN = {"soft, loop", "soft, batched", "slots, plain", "slots, layer", "weight norm", "cosine",
         "distance", "bounded", "noise", "a square", "tokens are chosen", "three are others",
         "experts behind the list", "flat"}  # fmt: skip
SOME = [
    name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow)
    for name in (*KINDS, *KERNELS)
]
FIXED = {"one is zero": (5,), "three are others": (0, 1, 2), "experts behind the list": (5, 6)}


@pytest.fixture(autouse=True)
def few_trials(request, monkeypatch):
    """Trials of a mixture are tested elsewhere."""
    if "slow" not in request.keywords:
        monkeypatch.setattr("graphprune.parts.fewer._CHOICES", 2)


def built(name):
    """A model with one mixture, and its inputs."""
    torch.manual_seed(0)
    if name in KERNELS:
        return Pictures(Kernels(name)).double().eval(), torch.randn(8, 3, 6, 6).double()
    return Around(KINDS[name]()).double().eval(), torch.randn(3, 12, 5).double()


def by_hand(model, plan, inputs):
    """The outputs of a model whose own method gives low scores to the experts that leave."""
    (change,) = plan.experts
    mixture = model.get_submodule(change.mixture)
    scores = mixture.scores

    def low(x):
        found = scores(x)
        return found.index_fill(-1, torch.tensor(change.gone), NEVER)

    mixture.scores = low
    with torch.no_grad():
        return model(inputs)


@pytest.mark.parametrize("name", SOME)
def test_small_is_the_original_without_scores(name):
    model, inputs = built(name)
    graph = graphprune.trace(model, inputs)
    (mixture,) = graph.experts
    assert mixture.fixed == FIXED.get(name, ())
    with untouched(model):
        plan = graph.plan(0.4, parts="experts", criterion="random", seed=1)
        small = graphprune.rebuild(model, plan)
    assert len(plan.experts[0].gone) >= 1
    assert not {*plan.experts[0].gone} & {*mixture.fixed}
    assert sum(p.numel() for p in small.parameters()) == plan.after.params
    assert plan.before.params - plan.after.params == mixture.params * len(plan.experts[0].gone)
    with torch.no_grad():
        before, found = model(inputs), small(inputs)
    wanted = by_hand(model, plan, inputs)
    assert torch.allclose(found, wanted, atol=1e-11)
    assert not torch.allclose(wanted, before, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*KINDS, *KERNELS])
def test_verify_agrees(name, seed, tmp_path):
    model, inputs = built(name)
    graph = graphprune.trace(model, inputs)
    plan = graph.plan((0.3, 0.4, 0.5)[seed], parts="experts", criterion="random", seed=seed)
    small = graphprune.rebuild(model, plan)
    report = graphprune.verify(model, small, inputs)
    assert report.verdict == "equal"
    open_ = [check.name for check in report.checks if not check.decided]
    assert all(name == "multinomial" and "train" in each for each in open_)
    graphprune.save(small, tmp_path / "small.safetensors")
    loaded = graphprune.load(tmp_path / "small.safetensors", built(name)[0]).eval()
    assert torch.equal(loaded(inputs), small(inputs))
    if name not in KERNELS:
        both = graphprune.rebuild(small, 0.3, inputs)
        assert graphprune.verify(model, both, inputs).verdict == "equal"


@pytest.mark.parametrize("name", ["slots, layer", "distance"])
def test_verify_compares_gradients(name):
    model, inputs = built(name)
    small = graphprune.rebuild(model, 0.3, inputs, parts="experts", criterion="random")
    report = graphprune.verify(model, small, inputs)
    assert report.verdict == "equal"
    assert {"gradients, train mode, another batch size"} <= {c.name for c in report.checks}
    with torch.no_grad():
        next(small.layers[0].experts.parameters()).mul_(1.01)
    with pytest.raises(VerificationError):
        graphprune.verify(model, small, inputs)


def test_drawn_noise_is_that_of_the_experts_that_stay():
    """In training, too, the small model is the original: noise of what left is left out."""
    model, inputs = built("noise")
    plan = graphprune.trace(model, inputs).plan(0.4, parts="experts", criterion="random")
    assert {"noise", "gate"} <= {name.rpartition(".")[2] for name, _ in plan.experts[0].slices}
    report = graphprune.verify(model, plan, inputs)
    assert all(check.decided for check in report.checks)
    assert any("train mode" in check.name for check in report.checks)


def test_a_drawn_choice_is_told():
    model, inputs = built("multinomial")
    plan = graphprune.trace(model, inputs).plan(0.4, parts="experts", criterion="random")
    report = graphprune.verify(model, plan, inputs)
    assert report.verdict == "equal"
    assert ["drawn which experts" in c.note for c in report.checks if not c.decided] == [True]


def test_slots_leave_with_their_expert():
    model, inputs = built("slots, layer")
    small = graphprune.rebuild(model, 0.5, inputs, parts="experts", criterion="random")
    layer = small.layers[0]
    assert (layer.phi.out_features, layer.phi.bias.shape, layer.num_experts) == (6, (6,), 2)
    assert layer.slots == 3


def test_experts_behind_the_list_stay():
    model, inputs = built("experts behind the list")
    small = graphprune.rebuild(model, 0.4, inputs, parts="experts", criterion="random")
    layer = small.layers[0]
    assert (layer.n_routed_experts, layer.num_experts, len(layer.experts)) == (3, 5, 3)
    assert layer.router.weight.shape == (5, 8)


@pytest.mark.parametrize("criterion", ["taylor", "reconstruction", "l2"])
@pytest.mark.parametrize("name", ["slots, layer", pytest.param("flat", marks=pytest.mark.slow)])
def test_criteria(name, criterion):
    model, inputs = built(name)
    data = [(inputs, torch.zeros(()).double())]
    plan = graphprune.trace(model, inputs).plan(
        0.4,
        parts="experts",
        criterion=criterion,
        data=data,
        loss=lambda m, b: m(b[0]).square().mean(),
    )
    assert not {*plan.experts[0].gone} & {*FIXED.get(name, ())}


# --- losses -------------------------------------------------------------------------------------


class Trained(Around):
    """Adds up what mixtures return beside, and returns it as well, or in training alone."""

    def __init__(self, *mixtures, when="always"):
        super().__init__(*mixtures)
        self.when = when

    def forward(self, x):
        h, total = self.first(x), 0
        for norm, layer in zip(self.norms, self.layers):
            made = layer(norm(h))
            made, loss = made if isinstance(made, tuple) else (made, layer.aux)
            h, total = h + made, total + loss
        told = {"logits": self.last(h), "loss": h.mean() + total, "norm": h.norm()}
        return told if self.when == "always" or self.training else told["logits"]


@pytest.mark.parametrize(("kept_in", "when"), [("", "always"), ("aux", "training")])
def test_losses_of_mixtures_are_not_compared(kept_in, when):
    torch.manual_seed(0)
    model = Trained(Losing(kept_in), Losing(kept_in), when=when).double().eval()
    inputs = torch.randn(3, 12, 5).double()
    with untouched(model):
        plan = graphprune.trace(model, inputs).plan(0.4, parts="experts", criterion="random")
        assert plan.request["outputs"]["train"] == [0, 2]
        assert any("not compared" in note for note in plan.notes)
        small = graphprune.rebuild(model, plan)
        assert graphprune.verify(model, small, inputs).verdict == "equal"
    with torch.no_grad():
        small.last.bias.add_(1)
    with pytest.raises(VerificationError):
        graphprune.verify(model, small, inputs)


class Alone(Around):
    def forward(self, x):
        h = self.first(x)
        made, loss = self.layers[0](self.norms[0](h))
        return self.last(h + made).mean() + loss


def test_a_model_that_returns_nothing_but_a_loss():
    torch.manual_seed(0)
    model = Alone(Losing()).double().eval()
    with untouched(model), pytest.raises(InputError, match="is a loss that counts them"):
        graphprune.trace(model, torch.randn(3, 12, 5).double()).plan(0.4, parts="experts")


# --- what stays ---------------------------------------------------------------------------------


class Standard(Scored):
    """Scores are normalised over the experts."""

    def scores(self, x):
        return F.layer_norm(self.router(x), (self.num_experts,))


class Meaning(Scored):
    """Scores are weighed by their mean, of which each is a part."""

    def gates(self, scores):
        return scores - scores.mean(-1, keepdim=True).abs()


class Capacity(Scored):
    """An expert takes its share of the tokens, as many as there are experts."""

    def mixed(self, flat, weights, places):
        most = len(flat) // len(self.experts)
        order = F.one_hot(places, len(self.experts)).cumsum(0).gather(-1, places[..., None])
        return super().mixed(flat, weights * (order[..., 0] <= most), places)


@pytest.mark.parametrize("kind", [Standard, Meaning, Capacity])
def test_what_stays_is_told_why(kind):
    torch.manual_seed(0)
    graph = graphprune.trace(Around(kind()).double().eval(), torch.randn(4, 9, 5).double())
    assert graph.experts == ()
    with pytest.raises(InputError, match=r"layers\.0: .*(counts them|cannot be told)"):
        graph.plan(0.4, parts="experts")


class Bound(Scored):
    """Its code names an expert."""

    def mixed(self, flat, weights, places):
        return super().mixed(flat, weights, places) + self.experts[4](flat)


def test_code_that_does_not_run_is_told():
    torch.manual_seed(0)
    graph = graphprune.trace(Around(Bound()).double().eval(), torch.randn(4, 9, 5).double())
    with pytest.raises(InputError, match=r"layers\.0: its code does not run.*IndexError"):
        graph.plan(0.4, parts="experts")


class Gated(nn.Module):
    """Channels that are weighed one by one are no experts, nor are layers one after the other."""

    def __init__(self):
        super().__init__()
        self.up, self.gate = nn.Linear(8, 4), nn.Linear(8, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.down = nn.Linear(4, 8)

    def forward(self, x):
        h = self.up(x) * self.gate(x).sigmoid()
        for layer in self.layers:
            h = layer(h).relu()
        return self.down(h)


def test_gates_of_channels_are_no_scores():
    graph = graphprune.trace(Around(Gated()).double().eval(), torch.randn(2, 4, 5).double())
    assert graph.experts == ()


def test_as_many_unlike_experts_stay():
    torch.manual_seed(0)
    model = Around(Unlike(Zero, nn.Identity)).double().eval()
    graph = graphprune.trace(model, torch.randn(4, 9, 5).double())
    with pytest.raises(InputError, match="must"):
        graph.plan(1.0, parts="experts")
    plan = graph.plan(0.8, parts="experts", criterion="random")
    assert {5, 6} < {*plan.experts[0].kept}
    assert len(plan.experts[0].kept) == 3


class Partly(Scored):
    """Weights depend on the places of experts."""

    def gates(self, scores):
        gates = scores.softmax(-1)
        return gates * torch.linspace(1, 2, gates.shape[-1], dtype=gates.dtype)


def test_numbers_that_belong_to_places_are_noticed():
    torch.manual_seed(0)
    graph = graphprune.trace(Around(Partly()).double().eval(), torch.randn(4, 9, 5).double())
    assert graph.experts == ()
