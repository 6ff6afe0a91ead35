"""Look at the channel graph: as a table, as a networkx graph, as a picture."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import graphprune


class Residual(nn.Module):
    """One residual block between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 24, 3, padding=1)
        self.outer = nn.Conv2d(24, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer(self.inner(x).relu())
        return self.head(x.mean((2, 3)))


graph = graphprune.trace(Residual(), torch.randn(1, 3, 16, 16))
print(graph)

# Groups and the parameter dimensions they tie are nodes, the ops that tie them are edges.
nx_graph = graph.to_networkx()
stream = graph.group_of("stem")
print(f"{stream.name} ties {sorted(nx_graph[stream.name])}")
assert stream.name == graph.group_of("outer").name != graph.group_of("inner").name
assert nx_graph.nodes[stream.name]["channels"] == 16

with tempfile.TemporaryDirectory() as folder:
    picture = graph.draw(Path(folder, "graph.svg"))
    assert picture.read_text().lstrip().startswith("<?xml")
