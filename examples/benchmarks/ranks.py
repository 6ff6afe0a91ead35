"""What a second process saves where plans and repairs are made from data, and what it sends.

    OMP_NUM_THREADS=1 python examples/benchmarks/ranks.py [--batches 16] [--ranks 64]

Every job runs on all batches in one process, then on half of them in each of two (gloo). The
clock is that of the processor, for the busier of the two: other work on the machine does not count,
nor does waiting. What more ranks cost is computed: a ring passes every reduced byte
2 (n - 1) / n times, at the bandwidth that was measured here.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn

import graphprune

SIZE = 64  # pixels


def build():
    """A network of six convolutions, and its graph."""
    torch.manual_seed(0)
    widths = 3, 32, 64, 64, 96, 96, 128
    layers = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Conv2d(inputs, outputs, 3, 1 + number % 2, 1, bias=False))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)
    model = nn.Sequential(*layers, *pooled).eval()
    graph = graphprune.trace(model, torch.randn(1, 3, SIZE, SIZE))
    return model, graph


def data_of(count):
    """Batches with classes."""
    numbers = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 3, SIZE, SIZE, generator=numbers), torch.arange(16) % 10)
        for _ in range(count)
    ]


def jobs(model, graph):
    """What is timed, by name: functions of the batches."""
    plan = graph.plan(target={"macs": 0.5})

    def calibrate(data, method):
        small = graphprune.rebuild(model, plan)
        graphprune.calibrate(small, model, [x for x, _ in data], method=method)

    return {
        'plan, "taylor"': lambda data: graph.plan(0.5, criterion="taylor", data=data),
        'plan, "wanda"': lambda data: graph.plan(0.5, criterion="wanda", data=data),
        'plan, "reconstruction"': lambda data: graph.plan(
            0.5, criterion="reconstruction", data=data
        ),
        'calibrate, "batchnorm"': lambda data: calibrate(data, "batchnorm"),
        'calibrate, "repair"': lambda data: calibrate(data, "repair"),
    }


def sent():
    """Count the bytes that are reduced and broadcast from now on, and the meetings."""
    counts = {"bytes": 0, "meetings": 0}
    reduce, broadcast, gather = dist.all_reduce, dist.broadcast, dist.all_gather_object

    def counted(function):
        def call(tensor, *args, **kwargs):
            counts["bytes"] += tensor.numel() * tensor.element_size()
            return function(tensor, *args, **kwargs)

        return call

    def met(*args, **kwargs):
        counts["meetings"] += 1
        return gather(*args, **kwargs)

    dist.all_reduce, dist.broadcast, dist.all_gather_object = (
        counted(reduce),
        counted(broadcast),
        met,
    )
    return counts


def bandwidth(repeats=8):
    """Bytes of a tensor that two processes reduce in a second of the clock on the wall."""
    flat = torch.ones(1 << 22, dtype=torch.float64)
    dist.all_reduce(flat)
    taken = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(flat)
        taken.append(time.perf_counter() - start)
    return flat.numel() * flat.element_size() / min(taken)


def worker(rank, size, count, folder):
    """Run all jobs on the batches of one rank."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    found = {"bandwidth": bandwidth() if size > 1 else 0.0, "jobs": {}}
    counts = sent()
    model, graph = build()
    for name, job in jobs(model, graph).items():
        counts.update(bytes=0, meetings=0)
        start, wall = time.process_time(), time.perf_counter()
        job(data_of(count)[rank::size])
        taken = time.process_time() - start, time.perf_counter() - wall
        found["jobs"][name] = *taken, counts["bytes"], counts["meetings"]
    torch.save(found, f"{folder}/{size}-{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=64)
    given = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, 2):
            mp.spawn(worker, (size, given.batches, folder), size)
            found[size] = [torch.load(Path(folder) / f"{size}-{r}.pt") for r in range(size)]
    speed = found[2][0]["bandwidth"]
    n = given.ranks
    print(f"reduced at {speed / 1e6:.0f} MB/s by two processes on gloo")
    heads = "one process, s", "two, s", "times faster", "on the wall", "MB", "meetings"
    print(f"| job | {' | '.join(heads)} | {n} ranks, s |")
    print("|---" * (len(heads) + 2) + "|")
    for name, (alone, wall, _, _) in found[1][0]["jobs"].items():
        both = [each["jobs"][name] for each in found[2]]
        busy, late = max(b[0] for b in both), max(b[1] for b in both)
        size, meetings = both[0][2], both[0][3]
        # two processes in a ring pass each byte once: 2 (n - 1) / n = 1
        ring = size * 2 * (n - 1) / n / speed
        print(
            f"| {name} | {alone:.2f} | {busy:.2f} | {alone / busy:.2f} | {wall / late:.2f} "
            f"| {size / 1e6:.1f} | {meetings} | {ring:.2f} |"
        )


if __name__ == "__main__":
    main()
