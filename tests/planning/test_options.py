"""Options of a plan: what is refused, with texts that name what is valid."""

import numpy as np
import pytest
from torch import nn

import graphprune
from graphprune.errors import InputError
from graphprune.planning.options import Request


@pytest.fixture(scope="module")
def graph():
    net = nn.Sequential()
    net.inner = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU())
    net.fc = nn.Linear(48, 10)
    return graphprune.trace(net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crieterion": "l1"}, "unknown option 'crieterion'; did you mean 'criterion'.*round_to"),
        ({"zzz": 1}, "unknown option 'zzz' Options: criterion, scope"),
        ({"scope": "locl"}, "unknown scope 'locl'; choose one of local, global, isomorphic"),
        ({"target": 0.5}, "target must map quantities to limits"),
        ({"target": {}}, "target must map quantities to limits"),
        ({"target": {"flops": 0.5}}, "unknown target 'flops'; choose of macs, params"),
        ({"target": {"macs": 0}}, "target 'macs' must be a fraction .* got 0"),
        ({"target": {"macs": -3}}, "target 'macs' must be a fraction"),
        ({"target": {"macs": float("nan")}}, "target 'macs' must be a fraction"),
        ({"target": {"macs": True}}, "target 'macs' must be a fraction"),
        ({"target": {"macs": "half"}}, "target 'macs' must be .* got 'half'"),
        ({"target": {"macs": "5 ms"}}, "target 'macs' must be"),
        ({"target": {"macs": "150%"}}, "target 'macs' must be"),
        ({"target": {"latency": "5 MB"}}, "target 'latency' must be .*0.8 ms"),
        ({"ratio": 0.5, "target": {"macs": 0.5}}, "both a ratio .* and a target"),
        ({}, "nothing says how much to remove"),
        ({"ratio": 0.5, "round_to": 0}, "round_to must be a positive int such as 8, not 0"),
        ({"ratio": 0.5, "round_to": 8.0}, "round_to must be a positive int such as 8, not 8.0"),
        ({"ratio": 0.5, "min_kept": 2}, "min_kept must be a fraction .* got 2"),
        ({"ratio": 0.5, "max_kept": {"fc": "all"}}, "max_kept must be a fraction .* 'fc'"),
        ({"ratio": 0.5, "min_kept": 0.8, "max_kept": 0.5}, "min_kept 0.8 is above max_kept 0.5"),
        ({"ratios": 0.5}, "ratios must map glob patterns"),
        ({"ratios": {"inner.*": 1.0}}, r"ratios\['inner.\*'\] must be in \[0, 1\)"),
        ({"ratios": {"outr.*": 0.5}}, r"ratios pattern 'outr.\*' matches no layer; layers: fc"),
        ({"ratio": 0.5, "keep": "outr"}, "keep pattern 'outr' matches no layer"),
        ({"ratio": 0.5, "threads": 0}, "threads must be a positive int, got 0"),
        ({"ratio": 0.5, "keep": 3}, "keep must be a glob pattern of layers such as .* got 3"),
        ({"ratio": 0.5, "keep": ["fc", 3]}, r"keep must be a glob .* got \['fc', 3\]"),
        ({"ratio": 0.5, "seed": "a"}, "seed must be an int of at most 64 bits.*'a'"),
        ({"ratio": 0.5, "loss": 3}, r"loss must be a function \(model, batch\) -> scalar.*; not 3"),
        ({"target": {"macs": "1.2.3M"}}, "target 'macs' must be a fraction .* got '1.2.3M'"),
        ({"target": {"params": "."}}, "target 'params' must be a fraction .* got '.'"),
        ({"target": {"latency": "0 ms"}}, "target 'latency' must be a fraction .* got '0 ms'"),
        ({"ratios": {3: 0.5}}, "ratios must map glob patterns .* not {3: 0.5}"),
        ({"ratio": 0.5, "min_kept": {3: 0.5}}, "min_kept must be a fraction .* got 0.5 for 3"),
    ],
)
def test_wrong_options(graph, options, message):
    with pytest.raises(InputError, match=message):
        graph.plan(**options)


def test_numbers_of_numpy(graph):
    assert graph.plan(np.float32(0.25)) == graph.plan(0.25)
    plan = graph.plan(target={"params": np.int64(2_000)}, min_kept=np.float32(0.1))
    assert plan.groups == graph.plan(target={"params": 2_000}, min_kept=0.1).groups


def test_every_option_is_documented_and_has_a_default():
    text = graphprune.Options.__doc__
    for name in graphprune.Options.__annotations__:
        assert f"\n        {name}: " in text
        assert hasattr(Request(), name)
