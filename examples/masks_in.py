"""Masks in: PyTorch's pruning tutorial made smaller, and the per-filter loop on ResNet-18."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune

import graphprune


class LeNet(nn.Module):
    """The network of the tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, int(x.nelement() / x.shape[0]))
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def gap(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    """The largest relative difference of the outputs."""
    with torch.no_grad():
        wanted, found = model(x), small(x)
    return float((wanted - found).abs().max() / wanted.abs().max())


torch.manual_seed(0)

# The tutorial: masks by torch.nn.utils.prune. They hide filters, and nothing becomes smaller.
lenet = LeNet().double().eval()
for layer in (lenet.conv1, lenet.conv2, lenet.fc1, lenet.fc2):
    prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)
prune.random_unstructured(lenet.fc3, "weight", amount=0.3)
x = torch.randn(4, 1, 32, 32, dtype=torch.float64)
plan = graphprune.Plan.from_masks(lenet, x)
small = graphprune.rebuild(lenet, plan)
print(small)
print(plan)
print(f"{float((small.fc3.weight_mask == 0).double().mean()):.0%} of fc3 are masked, as before")
lenet_gap = gap(lenet, small, x)

# The loop that people write: every third filter is set to zero, in front of trained norms.
resnet = torchvision.models.resnet18(weights=None).double().eval()
for module in resnet.modules():
    if isinstance(module, nn.BatchNorm2d):  # as training leaves them
        nn.init.normal_(module.bias, 0.5)
        nn.init.normal_(module.running_mean)
    elif isinstance(module, nn.Conv2d):
        norms = module.weight.detach().abs().sum((1, 2, 3))
        for index in norms.argsort()[: len(norms) // 3].tolist():
            module.weight.data[index] = 0
images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
plan = graphprune.Plan.from_masks(resnet, images)
small = graphprune.rebuild(resnet, plan)
print(f"\n{plan.after.params / plan.before.params:.0%} of the parameters, ", end="")
print(f"{plan.after.macs / plan.before.macs:.0%} of the MACs of ResNet-18; what stays, and why:")
print("\n".join(plan.notes[:4]))
resnet_gap = gap(resnet, small, images)

print(f"\nlargest relative differences: {lenet_gap:.0e}, {resnet_gap:.0e}")
assert max(lenet_gap, resnet_gap) < 1e-10
