"""The report: what it says is true, nothing of a stranger's runs in it, and files are whole."""

from __future__ import annotations

import base64
import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import InputError, PlanError
from graphprune.report.charts import charts_of, ticks
from graphprune.report.content import Given, command_line, content_of
from graphprune.report.repeat import call_of
from graphprune.report.write import page
from graphprune.training import History
from graphprune.verification.models import Check
from graphprune.verification.report import Report

EVIL = "<script>alert(1)</script>"
QUOTES = "\"'><img src=x onerror=alert(1)>"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(torch.relu(self.norm(self.conv1(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Words(nn.Module):
    """Tied weights, and a product that no module runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.body = nn.Linear(8, 12)
        self.back = nn.Linear(12, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.back(torch.relu(self.body(self.embed(ids)))) @ self.embed.weight.T


IMAGE, IDS = torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, dtype=torch.long)


class Page(HTMLParser):
    """The elements, their attributes and all text of a page; it must be well-formed."""

    VOID = ("meta", "input", "wbr", "rect", "line", "circle", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def planned(net: nn.Module, x: torch.Tensor, **options: object) -> graphprune.Plan:
    return graphprune.trace(net, x).plan(**options)


def test_a_report_says_what_is_known(tmp_path: Path) -> None:
    net = Net().eval()
    plan = planned(net, IMAGE, ratio=0.5)
    small = graphprune.rebuild(net, plan)
    history = History(IMAGE)
    history.record(net, 0, accuracy=0.75)
    history.record(small, 1, "fine-tuned", accuracy=0.5)
    path = plan.report(
        tmp_path / "report.html",
        net,
        IMAGE,
        small=small,
        verification=graphprune.verify(net, small, IMAGE),
        measured=(graphprune.measure(net, IMAGE), graphprune.measure(small, IMAGE)),
        accuracy=(0.75, 0.5),
        history=history,
        command="graphprune shrink net.py:Net --ratio 0.5",
    )
    assert path == tmp_path / "report.html"
    found = read(path)
    for text in (
        "Verified.", "gradients, train mode", f"{plan.before.params:,}", f"{plan.after.params:,}",
        "75.0 %", "\N{MINUS SIGN}25.0 points", "latency", "blocks.0.conv1", "BatchNorm2d",
        "reads a model input", "model output", "test_report.py", "self.blocks(self.stem(x))",
        "fine-tuned", "graph.plan(0.5)", "graphprune shrink net.py:Net --ratio 0.5",
        graphprune.__version__, str(torch.__version__), "float32[1, 3, 8, 8]",
    ):  # fmt: skip
        assert text in found.text, text
    (link,) = [a["href"] for a in found.of("a") if "download" in a]
    assert graphprune.Plan.from_json(base64.b64decode(link.partition(",")[2]).decode()) == plan


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    net = Net().eval()
    found = read(planned(net, IMAGE, ratio=0.5).report(tmp_path / "report.html", net, IMAGE))
    targets = [a.get(key) for _, a in found.elements for key in ("src", "href") if a.get(key)]
    assert targets
    assert all(target.startswith(("#", "data:")) for target in targets)
    names = {a["id"] for _, a in found.elements if a.get("id")}
    assert {target[1:] for target in targets if target.startswith("#")} <= names
    assert not found.of("link")
    (policy,) = [a["content"] for a in found.of("meta") if "http-equiv" in a]
    assert "default-src 'none'" in policy


def test_nothing_of_a_stranger_runs(tmp_path: Path) -> None:
    """Names of modules, of values, notes, reasons, paths: all of it is text."""
    net = nn.Sequential()
    net.add_module(EVIL.replace(".", ""), nn.Linear(4, 8))
    net.add_module(QUOTES, nn.Linear(8, 2))
    plan = replace(planned(net, torch.zeros(1, 4), ratio=0.5), notes=(f"note {EVIL}",))
    history = History(torch.zeros(1, 4))
    history.record(net, 0, f"entry {EVIL}", **{f"value {QUOTES}": 1})
    history.record(net, 1, **{f"value {QUOTES}": 2})
    checks = (Check(f"check {EVIL}", QUOTES, 0.0, note=f"why {EVIL}"),)
    plan.report(
        tmp_path / "report.html",
        net,
        torch.zeros(1, 4),
        verification=Report(checks, 1e-10, True, f"reason {EVIL}", (f"noted {EVIL}",)),
        accuracy={f"accuracy {EVIL}": (0.5, 0.5)},
        history=history,
        command=f"graphprune {EVIL}",
        title=f"title {QUOTES}",
    )
    found = read(tmp_path / "report.html")
    assert len(found.of("script")) == 1
    assert not found.of("img")
    assert not [key for _, a in found.elements for key in a if key.startswith("on")]
    for text in (
        f"note {EVIL}", f"entry {EVIL}", f"value {QUOTES}", f"check {EVIL}", f"why {EVIL}",
        f"reason {EVIL}", f"noted {EVIL}", f"accuracy {EVIL}", f"graphprune {EVIL}",
        f"title {QUOTES}",
    ):  # fmt: skip
        assert text in found.text, text
    assert found.text.count(EVIL) > 12


def test_all_templates_escape() -> None:
    """Only the style sheet and the script, which are ours, are put in as they stand."""
    folder = Path(graphprune.__file__).parent / "report" / "templates"
    templates = sorted(folder.glob("*.j2"))
    assert len(templates) > 5
    for template in templates:
        text = template.read_text(encoding="utf-8")
        assert "autoescape" not in text
        wanted = 2 if template.name == "report.html.j2" else 0
        assert text.count("| safe") == wanted, template.name


@pytest.mark.parametrize(
    ("make", "x", "options"),
    [
        (Net, IMAGE, {"ratio": 0.5}),
        (Net, IMAGE, {"ratio": 0.5, "parts": "blocks"}),
        (Net, IMAGE, {"target": {"macs": 0.3}, "parts": ["blocks", "channels"]}),
        (Words, IDS, {"ratio": 0.25}),
    ],
)
def test_layers_add_up_to_the_costs_of_the_plan(make, x, options) -> None:
    net = make().eval()
    graph = graphprune.trace(net, x)
    plan = graph.plan(**options)
    layers = content_of(plan, Given(graph)).layers
    for side, cost in ((0, plan.before), (1, plan.after)):
        assert sum(layer.macs[side] for layer in layers) == cost.macs
        assert sum(layer.params[side] for layer in layers) == cost.params
    if plan.parts:
        left = [layer.name for layer in layers if layer.left]
        assert left == [
            layer.name
            for layer in layers
            if layer.name.startswith(tuple(f"{part.name}." for part in plan.parts))
        ]


class Shared(nn.Module):
    """Several groups tie the same layer: its inputs, outputs, and what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 4))
        self.down = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.up.T) @ self.down.T


def test_the_drawing_says_what_every_group_keeps() -> None:
    for net, x in ((nn.Sequential(Shared()).eval(), torch.zeros(1, 4)), (Net().eval(), IMAGE)):
        graph = graphprune.trace(net, x)
        plan = graph.plan(0.5)
        picture = content_of(plan, Given(graph)).picture
        kept = {group.name: len(group.kept) for group in plan.groups}
        said = {line.label.split()[0]: line.label for line in picture.lines}
        assert said.keys() == {group.name for group in graph.analysis.all_groups}
        for group in graph.analysis.all_groups:
            left = kept.get(group.name, group.size)
            change = f" \N{RIGHTWARDS ARROW} {left}" if left < group.size else ""
            assert said[group.name] == f"{group.name} \N{MIDDLE DOT} {group.size}{change}"


def test_a_plan_alone(tmp_path: Path) -> None:
    plan = graphprune.Plan.from_json(planned(Net().eval(), IMAGE, ratio=0.5).to_json())
    plan = replace(plan, inputs="float32[7, 3, 8, 8]")  # of a graph that nobody holds
    found = read(plan.report(str(tmp_path / "report.html")))
    assert "Not verified." in found.text
    assert "made from a plan alone" in found.text
    assert f"{plan.after.macs:,}" in found.text
    assert "blocks.0.conv1" in found.text


def test_the_graph_that_made_a_plan_is_found_while_it_is_in_use(tmp_path: Path) -> None:
    graph = graphprune.trace(Net().eval(), IMAGE)
    found = read(graph.plan(0.5).report(tmp_path / "report.html"))
    assert "reads a model input" in found.text
    assert "made from a plan alone" not in found.text


def test_parts_experts_and_vocabularies_that_left(tmp_path: Path) -> None:
    net = Net().eval()
    found = read(planned(net, IMAGE, ratio=0.5, parts="blocks").report(tmp_path / "a.html", net))
    assert "Parts that left" in found.text
    words = Words().eval()
    small = graphprune.trim_vocabulary(words, [0, 2, 4], IDS)
    found = read(small.graphprune_plan.report(tmp_path / "b.html", words, IDS))
    assert "vocabulary 9 -> 3 ids" in found.text
    assert "graph.plan(" not in found.text


def test_what_is_not_decided_is_not_called_verified() -> None:
    plan = planned(Net().eval(), IMAGE, ratio=0.5)
    undecided = Report((), 1e-10, True, "nothing was compared")
    text = Page(page(content_of(plan, Given(verification=undecided)))).text
    assert "Not decided" in text
    assert "Verified." not in text


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.5},
        {"ratio": 0.25, "keep": ["stem", "blocks.1.*"], "criterion": "l1"},
        {"target": {"macs": 0.5}, "min_kept": 0.25, "round_to": 2, "scope": "global"},
        {"ratio": 0.5, "parts": ["blocks"], "keep": ["blocks.0"]},
        {"target": {"macs": 0.3}, "parts": ["blocks", "channels"], "round_to": 2},
    ],
)
def test_the_call_makes_the_plan_once_more(options) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    plan = planned(net, IMAGE, **options)
    names = {"graphprune": graphprune, "model": net, "example_inputs": IMAGE}
    exec(call_of(plan), names)
    assert names["plan"] == plan
    assert names["small"].graphprune_plan == plan


def test_the_calls_of_several_rounds_and_of_masks() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    once = graphprune.rebuild(net, 0.25, IMAGE)
    twice = graphprune.rebuild(once, 0.5, IMAGE, criterion="l1")
    names = {"graphprune": graphprune, "model": net, "example_inputs": IMAGE}
    exec(call_of(twice.graphprune_plan), names)
    assert names["small"].graphprune_plan == twice.graphprune_plan
    nn.utils.prune.ln_structured(net.blocks[0].conv1, "weight", 0.5, n=2, dim=0)
    plan = graphprune.Plan.from_masks(net, IMAGE, fold="none")
    exec(call_of(plan), names)
    assert names["plan"] == plan


def test_data_are_named_where_the_criterion_needs_them() -> None:
    net = Net().eval()
    graph = graphprune.trace(net, IMAGE)
    plan = graph.plan(0.5, criterion="reconstruction", data=[torch.randn(4, 3, 8, 8)])
    assert "criterion='reconstruction', data=batches)" in call_of(plan)
    plan = graph.plan(0.5, criterion="taylor", data=[torch.randn(4, 3, 8, 8)],
                      loss=lambda model, batch: model(batch).square().sum())  # fmt: skip
    assert "criterion='taylor', data=batches, loss=loss)" in call_of(plan)


# --- errors and files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"verification": True}, "verification must be a Report, not bool"),
        ({"history": []}, "history must be a History, not list"),
        ({"small": 3}, "small must be a Module, not int"),
        ({"measured": 3}, "measured must be two measurements"),
        ({"accuracy": 0.5}, r"accuracy must be two numbers, \(before, after\)"),
        ({"accuracy": {"top-1": (0.5, "high")}}, "accuracy must be two numbers"),
        ({"notes": "trained"}, "notes must be texts"),
        ({"model": "resnet18"}, "model must be the original model, or its graph"),
    ],
)
def test_wrong_things(tmp_path: Path, given: dict[str, object], told: str) -> None:
    plan = planned(Net().eval(), IMAGE, ratio=0.5)
    with pytest.raises(InputError, match=told):
        plan.report(tmp_path / "report.html", **given)
    assert not list(tmp_path.iterdir())


def test_another_model(tmp_path: Path) -> None:
    net = Net().eval()
    plan = planned(net, IMAGE, ratio=0.5)
    with pytest.raises(PlanError, match="another architecture"):
        plan.report(tmp_path / "report.html", nn.Linear(3, 4))
    with pytest.raises(PlanError, match="applied to this model already"):
        plan.report(tmp_path / "report.html", graphprune.rebuild(net, plan))


def test_wrong_places(tmp_path: Path) -> None:
    plan = planned(Net().eval(), IMAGE, ratio=0.5)
    with pytest.raises(InputError, match="is a folder: name a file in it"):
        plan.report(tmp_path)
    with pytest.raises(InputError, match=r"no folder .* to write 'report.html' into"):
        plan.report(tmp_path / "missing" / "report.html")
    with pytest.raises(InputError, match="path must be a path, a text or a pathlib"):
        plan.report(None)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    plan = planned(Net().eval(), IMAGE, ratio=0.5)
    path = tmp_path / "report.html"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(InputError, match=r"cannot write .* No space left on device"):
            plan.report(path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    plan.report(path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- charts and commands ----------------------------------------------------------------------


def test_ticks_span_the_values() -> None:
    for low, high in ((0.0, 1.0), (0.31, 0.72), (-3.0, 7.5), (1e6, 3e6), (0.0, 1e-4)):
        found = ticks(low, high, 4)
        assert found[0] <= low
        assert found[-1] >= high
        assert 3 <= len(found) <= 8
    assert ticks(3, 3, 4) == [3.0]
    assert ticks(0, 2, 5, whole=True) == [0.0, 1.0, 2.0]


def test_labels_of_lines_do_not_lie_on_each_other() -> None:
    net = Net().eval()
    history = History(IMAGE)
    for step in range(3):
        history.record(net, step, loss=float("nan") if step == 1 else step)
    cost, loss = charts_of(history.entries)  # and no widths, as none changed
    assert cost.title == "Parameters and MACs"
    first, second = sorted(line.y for line in cost.series)
    assert second - first >= 12
    assert len(loss.series[0].points) == 2
    assert charts_of(history.entries[:1]) == []


def test_widths_are_lines_that_say_their_layers() -> None:
    net = Net().eval()
    history = History(IMAGE)
    history.record(net, 0)
    history.record(graphprune.rebuild(net, 0.5, IMAGE, keep=[net.blocks[0].conv1]), 4)
    _, widths = charts_of(history.entries)
    whole, half = widths.series
    assert whole.label == "100 % \N{HORIZONTAL ELLIPSIS}ocks.0.conv1 +1"
    assert half.label == "50 % stem +3"
    assert (whole.kind, half.kind) == ("thin pale", "thin")
    assert len({y for _, y in whole.points}) == 1
    assert len({y for _, y in half.points}) == 2
    assert half.points[-1][0] <= widths.right
    left = Page(page(content_of(planned(net, IMAGE, ratio=0.5), Given(history=history))))
    assert "50 % stem +3" in left.text


def test_the_command_can_be_typed_again() -> None:
    given = ["/usr/bin/graphprune", "shrink", "my net.py:f", "--ratios", "layer3.*=0.6"]
    assert command_line(given) == "graphprune shrink 'my net.py:f' --ratios 'layer3.*=0.6'"
