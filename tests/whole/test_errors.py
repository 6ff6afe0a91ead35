"""Bad input: a clear error of the library's own tree, and the model untouched."""

import copy
import json

import pytest
import torch
from torch import nn

import graphprune
from graphprune import deploy
from graphprune.criteria import criteria
from graphprune.errors import (
    GraphPruneError,
    InputError,
    ModelError,
    PlanError,
    PruningWarning,
    TraceError,
)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


X = torch.zeros(1, 3, 8, 8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = Small().eval()
    before = copy.deepcopy(net.state_dict())
    yield net
    assert not net.training
    after = net.state_dict()
    assert all(
        torch.equal(before[key].nan_to_num(7.0), after[key].nan_to_num(7.0)) for key in before
    )


@pytest.mark.parametrize("ratio", [1.0, 1, -0.1, 50, float("nan"), "half", None, True, [0.5]])
def test_ratio(model, ratio):
    with pytest.raises(InputError, match=r"ratio must be .*\[0, 1\)"):
        graphprune.rebuild(model, ratio, X)


def test_criterion_lists_the_valid_ones(model):
    with pytest.raises(InputError, match="unknown criterion 'l3'") as caught:
        graphprune.rebuild(model, 0.5, X, criterion="l3")
    assert all(name in str(caught.value) for name in criteria())


def test_criterion_of_wrong_shape_or_not_finite(model):
    with pytest.raises(InputError, match="one score per channel"):
        graphprune.rebuild(model, 0.5, X, criterion=lambda g, t, r: torch.zeros(g.size + 1))
    with pytest.raises(InputError, match="not finite"):
        graphprune.rebuild(model, 0.5, X, criterion=lambda g, t, r: torch.zeros(g.size) / 0)
    with pytest.raises(InputError, match="name or a callable"):
        graphprune.rebuild(model, 0.5, X, criterion=3)


def test_scope(model):
    with pytest.raises(InputError, match="unknown scope 'everywhere'; choose one of local, global"):
        graphprune.rebuild(model, 0.5, X, scope="everywhere")


def test_keep_pattern_that_matches_nothing(model):
    with pytest.raises(InputError, match=r"'layer9\.\*' matches no layer"):
        graphprune.rebuild(model, 0.5, X, keep=["layer9.*"])


class Tied(nn.Module):
    """The output layer reads the stream through the weight with which the embedding writes it."""

    def __init__(self, tied):
        super().__init__()
        self.emb = nn.Embedding(40, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.out = nn.Linear(32, 40, bias=False)
        if tied:
            self.out.weight = self.emb.weight

    def forward(self, tokens):
        x = self.emb(tokens)
        return self.out(x + self.down(self.up(x).relu()))


class Listed(nn.Module):
    """Every layer has two names, and none shares its weight with another one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.stages = nn.ModuleList([self.a, self.b])

    def forward(self, x):
        for stage in self.stages:
            x = stage(x).relu()
        return self.c(x)


def test_patterns_of_layers_with_two_names():
    x = torch.randn(2, 4)
    for name in ("b", "stages.1"):
        small = graphprune.rebuild(Listed(), 0.5, x, keep=name)
        assert (small.a.out_features, small.b.out_features) == (4, 8)
        small = graphprune.rebuild(Listed(), None, x, ratios={name: 0.5})
        assert (small.a.out_features, small.b.out_features) == (8, 4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options", [{"keep": "emb"}, {"min_kept": {"emb": 1.0}}, {"ratios": {"emb": 0.0}}]
)
def test_patterns_of_layers_that_share_a_weight(tied, options):
    tokens = torch.arange(6).reshape(2, 3)
    small = graphprune.rebuild(Tied(tied), 0.5, tokens, **options)
    assert (small.emb.embedding_dim, small.up.out_features) == (32, 32)


def test_keep_patterns_keep(model):
    small = graphprune.rebuild(model, 0.5, X, keep="conv1")
    assert small.conv1.out_channels == 8
    assert small.conv2.out_channels == 3


def test_example_inputs_of_wrong_shape(model):
    with pytest.raises(TraceError, match=r"inside module 'conv1'") as caught:
        graphprune.rebuild(model, 0.5, torch.zeros(1, 5, 8, 8))
    assert "float32[1, 5, 8, 8]" in str(caught.value)
    assert str(caught.value.__cause__) in str(caught.value)


def test_example_inputs_without_tensor(model):
    with pytest.raises(InputError, match="holds no tensor"):
        graphprune.rebuild(model, 0.5, [1, 2])


def test_inputs_that_cannot_be_inferred():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, a, b):
            return self.fc(a + b)

    with pytest.raises(InputError, match="pass example_inputs="):
        graphprune.trace(Two())


def test_no_prunable_group_says_why():
    with pytest.raises(InputError, match="model output") as caught:
        graphprune.rebuild(nn.Linear(3, 2), 0.5)
    assert "reads a model input" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model, value):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.conv2.weight[1, 2, 0, 0] = value
    with pytest.raises(ModelError, match=r"'conv2.weight' holds NaN or infinite"):
        graphprune.rebuild(model, 0.5, X)


def test_wrappers(model):
    with pytest.raises(ModelError, match=r"pass model\.module"):
        graphprune.rebuild(nn.DataParallel(model), 0.5, X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted(model):
    with pytest.raises(ModelError, match="scripted"):
        graphprune.rebuild(torch.jit.script(copy.deepcopy(model)), 0.5, X)


def test_compiled(model):
    with pytest.raises(ModelError, match="compiled: pass the original"):
        graphprune.rebuild(torch.compile(model), 0.5, X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized():
    from torch.ao.nn.quantized import Conv2d

    with pytest.raises(ModelError, match="quantized"):
        graphprune.rebuild(nn.Sequential(Conv2d(3, 4, 1)), 0.5, X)


def test_meta():
    with pytest.raises(InputError, match="the model is on the meta device"):
        graphprune.rebuild(Small().to("meta"), 0.5, X)
    with pytest.raises(ModelError, match="on the meta device"):
        graphprune.verify(Small().to("meta"), Small(), X)


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), -1, "a"], ids=repr)
def test_bounds_that_are_none(tolerance):
    model = Small()
    with pytest.raises(InputError, match="tolerance must be a finite number"):
        graphprune.verify(model, graphprune.rebuild(model, 0.5, X), X, tolerance=tolerance)


def test_seeds():
    """Any int of 64 bits; numpy takes fewer."""
    model = Small()
    small = graphprune.rebuild(model, 0.5, X)
    for seed in (-1, 2**40):
        assert graphprune.verify(model, small, X, seed=seed)
    for seed in (2**70, "a", 0.5):
        with pytest.raises(InputError, match="seed must be an int of at most 64 bits"):
            graphprune.verify(model, small, X, seed=seed)
        with pytest.raises(InputError, match="seed must be an int of at most 64 bits"):
            graphprune.rebuild(model, 0.5, X, seed=seed)


def test_inputs_that_show_nothing_decide_nothing():
    model = Small()
    small = graphprune.rebuild(model, 0.5, X)
    found = graphprune.verify(model, small, torch.full_like(X, float("nan")))
    rows = {check.name: check.decided for check in found.checks}
    assert rows["output, example inputs"] is False
    assert any(rows.values())


@pytest.mark.parametrize("wrong", [5, None, "", "a\0b"], ids=repr)
def test_paths_that_are_none(wrong):
    model = Small()
    small = graphprune.rebuild(model, 0.5, X)
    for use in (
        lambda: graphprune.save(small, wrong),
        lambda: graphprune.load(wrong, model),
        lambda: graphprune.from_pretrained(wrong),
        lambda: graphprune.save_pretrained(small, wrong),
        lambda: graphprune.shrink_folder(wrong, "out", 0.5),
        lambda: graphprune.shrink_folder("folder", wrong, 0.5),
        lambda: small.graphprune_plan.report(wrong, model),
        lambda: deploy.export(small, wrong, X),
        lambda: deploy.quantize(wrong, "out.onnx", [X]),
        lambda: deploy.repeat(wrong, small),
    ):
        with pytest.raises(InputError, match=r"must be a path, a text or a pathlib\.Path; got"):
            use()


def test_lazy():
    with pytest.raises(ModelError, match="not initialised"):
        graphprune.rebuild(nn.Sequential(nn.LazyConv2d(4, 3)), 0.5, X)


def test_not_a_module():
    with pytest.raises(ModelError, match=r"must be a torch\.nn\.Module, not dict"):
        graphprune.rebuild({}, 0.5)


def test_no_parameters():
    with pytest.raises(ModelError, match="no parameters"):
        graphprune.rebuild(nn.ReLU(), 0.5, X)


def test_plan_of_another_architecture(model):
    plan = graphprune.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3))).plan(0.5)
    with pytest.raises(PlanError, match=r"another architecture: it expects '0\.weight'"):
        graphprune.rebuild(model, plan)
    with pytest.raises(PlanError):
        graphprune.mask(model, plan)
    with pytest.raises(PlanError):
        graphprune.verify(model, plan, X)


def test_plan_applied_twice(model):
    plan = graphprune.trace(model, X).plan(0.5)
    with pytest.raises(PlanError, match="applied to this model already"):
        graphprune.rebuild(graphprune.rebuild(model, plan), plan)


def test_damaged_plans(model, tmp_path):
    text = graphprune.trace(model, X).plan(0.5).to_json()
    for bad, message in (
        (text[: len(text) // 2], "not JSON"),
        (text.replace('"kept": "', '"kept": "1,', 1), "damaged: its content does not match"),
        ('{"a": 1}', "not a graphprune plan"),
        ("[]", "not a graphprune plan"),
        (text.replace('"version": 3', '"version": 99'), "version 99"),
    ):
        with pytest.raises(PlanError, match=message):
            graphprune.Plan.from_json(bad)
    with pytest.raises(PlanError, match="cannot read a plan"):
        graphprune.Plan.from_json(tmp_path / "absent.json")
    outer = json.loads(text)
    assert outer["format"] == "graphprune-plan"


def test_plan_of_checks_groups(model):
    graph = graphprune.trace(model, X)
    with pytest.raises(InputError, match="no removable group 'g99'"):
        graph.plan_of({"g99": [0]})
    name = graph.groups[0].name
    for kept in ([], [8], [-1]):
        with pytest.raises(InputError, match="must keep at least one of its channels"):
            graph.plan_of({name: kept})


def test_group_of_unknown_layer(model):
    with pytest.raises(InputError, match=r"no channels of 'conv9'.*conv1"):
        graphprune.trace(model, X).group_of("conv9")


def test_verify_needs_a_plan(model):
    with pytest.raises(InputError, match="without a graphprune_plan"):
        graphprune.verify(model, copy.deepcopy(model), X)


def test_draw_to_unknown_format(model, tmp_path):
    with pytest.raises(InputError, match="cannot draw"):
        graphprune.trace(model, X).draw(tmp_path / "graph.xyz")


def test_nothing_removed_is_a_warning_with_reasons():
    @torch.library.custom_op("graphprune_tests::odd", mutates_args=())
    def odd(x: torch.Tensor) -> torch.Tensor:
        return x.flip(1)

    odd.register_fake(torch.empty_like)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 40), nn.Linear(40, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.c(self.b(odd(self.a(x))))

    with pytest.warns(PruningWarning, match=r"2 of 44 channels were removed where 50%.*") as caught:
        graphprune.rebuild(Net(), 0.5)
    text = str(caught[0].message)
    assert "unknown op graphprune_tests.odd" in text
    assert "test_errors.py:" in text
    assert caught[0].filename == __file__


def test_every_error_is_one_of_ours():
    for name in ("InputError", "ModelError", "PlanError", "TraceError"):
        assert issubclass(getattr(graphprune.errors, name), GraphPruneError)


def test_what_is_no_plan(model):
    plan = graphprune.trace(model, X).plan(0.5)
    with pytest.raises(InputError, match=r"plan must be a Plan, such as .*; got float"):
        graphprune.mask(model, 0.5)
    with pytest.raises(PlanError, match="cannot read a plan from 'None'"):
        graphprune.Plan.from_json(None)
    with pytest.raises(PlanError, match=r"expects 8 channels .* where 4 are left: make it for the"):
        plan.then(plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, r"dtype must be one of torch.float64, .*; got 'float32'"),
        ({"dtype": torch.int8}, r"dtype must be one of .*; got torch.int8"),
        ({"tolerance": "small"}, "tolerance must be a finite number of at least 0.* got 'small'"),
        ({"tolerance": -1.0}, "tolerance must be a finite number of at least 0.* got -1.0"),
        ({"tolerance": float("nan")}, "tolerance must be a finite number of at least 0.* got nan"),
    ],
)
def test_how_to_verify(model, options, message):
    small = graphprune.rebuild(model, 0.5, X)
    with pytest.raises(InputError, match=message):
        graphprune.verify(model, small, X, **options)


CLASSES = torch.tensor([1])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, g: g.plan(X), r"must be a number in \[0, 1\) or a Plan, not Tensor$"),
        (lambda m, g: g.plan(0.5, uniform="yes"), "uniform must be True or False, not 'yes'"),
        (lambda m, g: g.plan(0.5, exact_only="no"), "exact_only must be True or False, not 'no'"),
        (lambda m, g: g.plan(0.5, progress=1), "progress must be True or False, not 1"),
        (
            lambda m, g: g.plan(
                0.5, criterion="taylor", loss=nn.CrossEntropyLoss(), data=[(X, CLASSES)]
            ),
            r"loss must be a function \(model, batch\) -> scalar.* not CrossEntropyLoss",
        ),
        (
            lambda m, g: g.plan(
                0.5, criterion="taylor", loss=nn.functional.cross_entropy, data=[(X, CLASSES)]
            ),
            r"loss must be a function \(model, batch\) -> scalar.* not <function",
        ),
        (lambda m, g: g.plan(target={"macs": "half"}), 'such as "50%" or "1.2G"; got \'half\''),
        (lambda m, g: g.plan_of([0, 1]), "kept must map groups to the channels that stay.* list"),
        (lambda m, g: g.plan_of({"g0": [True] * 8}), r"by number.*bool of shape \[8\]"),
        (lambda m, g: g.plan_of({"g0": torch.ones(8) > 0}), "mask.nonzero"),
        (lambda m, g: g.plan_of({"g0": [0.5]}), "by number, such as .* float64"),
        (
            lambda m, g: g.sensitivity(m, lambda m: 1.0, target={"macs": 0.5}),
            "sensitivity takes no target",
        ),
        (lambda m, g: g.sensitivity(m, None), "evaluate must be a function model -> number"),
        (lambda m, g: g.sensitivity(m, lambda m: 1.0, 0.5), "fractions must be several numbers"),
        (
            lambda m, g: graphprune.Plan.from_masks(m, X, masks=[True]),
            "masks must map layers to boolean vectors .* got list",
        ),
    ],
)
def test_arguments_of_the_wrong_kind(model, call, says):
    with pytest.raises(InputError, match=says):
        call(model, graphprune.trace(model, X))


def test_calibration_on_values_that_are_not_finite(model):
    small = graphprune.rebuild(model, 0.5, X)
    before = copy.deepcopy(small.state_dict())
    bad = torch.full((2, 3, 8, 8), float("nan"))
    for method in ("repair", "bias", "batchnorm"):
        with pytest.raises(InputError, match="batch 1 of data holds NaN or infinite values"):
            graphprune.calibrate(small, model, [torch.ones(2, 3, 8, 8), bad], method=method)
    with pytest.raises(InputError, match=r"seed must be an int of at most 64 bits.*'a'"):
        graphprune.calibrate(small, model, [torch.ones(2, 3, 8, 8)], seed="a")
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())


def test_kept_channels_by_number_of_any_kind(model):
    graph = graphprune.trace(model, X)
    wanted = graph.plan_of({"g0": [0, 2, 5]})
    for same in ({5, 0, 2}, (5, 2, 0), torch.tensor([0, 2, 5]), iter([0, 5, 2])):
        assert graph.plan_of({"g0": same}) == wanted
