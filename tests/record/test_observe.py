"""Every product of an activation with a parameter is seen, however the model calls it."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, prune

import graphprune
from graphprune.record.observe import observing
from graphprune.record.windows import Window

D = torch.float64


def seen(model, *args, grad=False):
    found = []
    with torch.set_grad_enabled(grad), observing(model, found.append):
        model(*args)
    return found


def names(model, *args):
    return [(product.weight, product.bias) for product in seen(model, *args)]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 3, dtype=D))
        self.kernel = nn.Parameter(torch.randn(5, 4, 3, dtype=D))
        self.shift = nn.Parameter(torch.randn(3, dtype=D))

    def forward(self, x):
        x = F.conv1d(x, self.kernel, padding="same")
        x = x[:, :4].mean(2)
        x = torch.addmm(self.shift, x, self.table)
        return x @ self.table.T @ self.table.double()


def test_functional_calls_are_seen():
    found = seen(Functional(), torch.randn(2, 4, 6, dtype=D))
    assert [(p.weight, p.bias, p.flipped) for p in found] == [
        ("kernel", None, False),
        ("table", "shift", True),
        ("table", None, False),
        ("table", None, True),
    ]


def test_shared_modules_and_tied_weights_go_by_their_first_name():
    first = nn.Linear(4, 4)
    second = nn.Linear(4, 4)
    second.weight = first.weight
    net = nn.Sequential(first, second, first)
    x = torch.randn(2, 4)
    assert names(net, x) == [
        ("0.weight", "0.bias"), ("0.weight", "1.bias"), ("0.weight", "0.bias")
    ]  # fmt: skip


def test_attention_of_torch_is_seen():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    found = [p.weight for p in seen(layer, torch.randn(2, 5, 8))]
    assert found == [
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"
    ]  # fmt: skip
    cross = nn.MultiheadAttention(8, 2)
    query, key = torch.randn(5, 2, 8), torch.randn(6, 2, 8)
    found = seen(cross, query, key, key.clone())
    assert [(p.weight, p.start) for p in found[:3]] == [("in_proj_weight", i) for i in (0, 8, 16)]


@pytest.mark.parametrize("grad", [False, True])
def test_watching_changes_nothing(grad):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double().train()
    x = torch.randn(2, 5, 8, dtype=D)
    with torch.set_grad_enabled(grad):
        wanted = layer(x)
        with observing(layer, lambda product: None):
            assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), "0.weight_orig"),
        (parametrizations.weight_norm, "0.parametrizations.weight.original1"),
        (nn.utils.weight_norm, "0.weight_v"),
    ],
)
def test_computed_weights_are_known_by_their_parameter(change, name):
    net = nn.Sequential(nn.Linear(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old weight_norm is deprecated
        change(net[0])
    x = torch.randn(2, 4)
    (product,) = seen(net, x)
    assert (product.weight, product.computed) == (name, True)
    assert torch.allclose(F.linear(x, product.value, net[0].bias), product.output)


def test_a_callback_may_replace_the_output():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with observing(net, lambda p: p.output * 0 if p.weight == "0.weight" else None):
        out = net(torch.randn(2, 4))
    assert torch.allclose(out, net[1].bias.expand(2, 2))


def test_nothing_is_left_behind_even_on_errors():
    net = nn.Sequential(nn.Linear(4, 3))
    before = copy.deepcopy(vars(net[0]))
    with pytest.raises(ZeroDivisionError), observing(net, lambda product: 1 / 0):
        net(torch.randn(2, 4))
    assert not nn_module._global_forward_hooks
    assert not torch.overrides._get_current_function_mode_stack()
    assert vars(net[0]).keys() == before.keys()
    net(torch.randn(2, 4))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=2, dilation=2), (2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 4, (3, 2), padding=(1, 0)), (2, 6, 5, 6)),
    "same": (lambda: nn.Conv2d(6, 4, (4, 3), padding="same"), (2, 6, 5, 6)),
    "valid": (lambda: nn.Conv2d(6, 4, 3, padding="valid"), (2, 6, 5, 6)),
    "reflect": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (2, 6, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
    "conv3d grouped": (
        lambda: nn.Conv3d(4, 6, (2, 1, 3), (1, 2, 1), (0, 1, 2), (2, 1, 2), groups=2),
        (2, 4, 4, 3, 5),
    ),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3), (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, padding=1), (2, 6, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1), (2, 6, 4, 5)),
    "transposed groups": (lambda: nn.ConvTranspose1d(6, 4, 3, 3, groups=2, dilation=2), (2, 6, 4)),
    "transposed3d": (
        lambda: nn.ConvTranspose3d(4, 6, (2, 3, 1), (2, 1, 3), 1, (1, 0, 2), 2, dilation=2),
        (2, 4, 3, 2, 3),
    ),
    "transposed cut": (lambda: nn.ConvTranspose2d(6, 4, 2, padding=2), (2, 6, 4, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_windows_times_matrix_is_the_output(kind):
    make, shape = LAYERS[kind]
    layer = make().double()
    layer.bias = None
    (product,) = seen(layer, torch.randn(shape, dtype=D))
    window = Window.of(product)
    rows, matrix = window.rows(product.input), window.matrix(product.value)
    found = torch.einsum("pgc,goc->pgo", rows, matrix)
    assert torch.allclose(found, window.outputs(product.output), atol=1e-12)
    assert window.places(product.output) == len(rows)
    pick = torch.randperm(len(rows))[:7]
    assert torch.equal(window.rows(product.input, pick), rows[pick])
    assert torch.equal(window.outputs(product.output, pick), window.outputs(product.output)[pick])
    assert torch.equal(window.weight(matrix, product.value), product.value)


def test_a_recording_leaves_no_hook_in_torch():
    """Where it did, ``torch.compile`` would warn of hooks from then on."""

    def hooks():
        found = {key: held for key, held in vars(nn_module).items() if key.startswith("_global")}
        assert {"_global_forward_hooks", "_global_forward_pre_hooks"} <= found.keys()
        return {key: list(held) for key, held in found.items() if isinstance(held, dict)}

    before = hooks()  # an export that failed may have left some
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    graphprune.rebuild(net, 0.5, torch.randn(2, 4))
    assert hooks() == before
