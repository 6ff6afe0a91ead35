"""Write the files of this version, once a release: ``python write.py VERSION``."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from models import INPUTS, MODELS, mlp, seeded

import graphprune
from graphprune.training import RewindPoint, iterate

OPTIONS = {
    "block": {},
    "block_exact": {"exact_only": True},
    "padded": {},
    "padded_free": {"columns": "free"},
    "second_round": {},
}


def main(version: str) -> None:
    """One plan, one checkpoint and the outputs of each model; a history and a folder of rounds."""
    folder = Path(__file__).parent / version
    folder.mkdir(exist_ok=True)
    outputs = {}
    for name, make in MODELS.items():
        model, x = seeded(make), INPUTS[name]
        if name == "masked":
            small = graphprune.rebuild(model, graphprune.Plan.from_masks(model, x))
        else:
            small = graphprune.rebuild(model, 0.5, x, **OPTIONS[name])
        if name == "second_round":
            small = graphprune.rebuild(small, 0.4, x)
        small.graphprune_plan.to_json(folder / f"{name}.json")
        graphprune.save(small, folder / f"{name}.safetensors")
        outputs[name] = small(x).detach().flatten().tolist()
    (folder / "outputs.json").write_text(json.dumps(outputs))
    x, y = torch.linspace(-1, 1, 48).reshape(8, 6), torch.linspace(0, 1, 24).reshape(8, 3)

    def train(model: torch.nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        (model(x) - y).square().mean().backward()
        optimizer.step()

    model = seeded(mlp)
    outcome = iterate(
        model, 2, train, lambda m: -float((m(x) - y).square().mean()), sparsity=0.5,
        example_inputs=x, folder=folder / "rounds",
    )  # fmt: skip
    (folder / "history.json").write_text(outcome.history.to_json())
    RewindPoint(seeded(mlp)).save(folder / "rewind.pt")


if __name__ == "__main__":
    main(sys.argv[1])
