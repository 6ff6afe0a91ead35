"""The same program under the launchers that users start several processes with."""

import subprocess
import sys

import pytest
import torch

PROGRAM = """
import sys, torch, graphprune
from torch import distributed as dist, nn

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3))
net = net.double()
x = torch.randn(8, 16, 6, dtype=torch.float64)
if sys.argv[1] == "accelerate":
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    rank, size = accelerator.process_index, accelerator.num_processes
elif sys.argv[1] == "torchrun":
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
else:
    rank, size = 0, 1
data = list(x[rank::size])
graph = graphprune.trace(net, x[0])
plan = graph.plan(target={"params": 0.6}, criterion="reconstruction", data=data)
small = graphprune.rebuild(net, plan)
graphprune.calibrate(small, net, data)
torch.save((size, small.state_dict()), f"{sys.argv[2]}/{sys.argv[1]}-{rank}.pt")
if dist.is_initialized():
    dist.destroy_process_group()
"""
LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node={size}"),
    "accelerate": (
        "accelerate.commands.launch",
        *("--multi_gpu", "--num_processes={size}", "--num_machines=1", "--mixed_precision=no"),
        *("--dynamo_backend=no", "--main_process_port=0"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "size"), [("torchrun", 2), ("torchrun", 4), ("accelerate", 2)]
)
def test_a_program_under_a_launcher(launcher, size, tmp_path):

    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    module, *options = LAUNCHERS[launcher]
    command = [sys.executable, "-m", module, *(o.format(size=size) for o in options)]
    for words in ([*command, path, launcher, tmp_path], [sys.executable, path, "alone", tmp_path]):
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    _, wanted = torch.load(tmp_path / "alone-0.pt")
    found = [torch.load(tmp_path / f"{launcher}-{rank}.pt") for rank in range(size)]
    for count, state in found:
        assert count == size
        for name, tensor in state.items():
            assert torch.equal(tensor, found[0][1][name]), name
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-10, atol=1e-10, msg=name)
