"""Processes that meet in a file."""

from datetime import timedelta

from torch import distributed as dist


def join(rank, size, folder):
    """Become one rank of a group on gloo; one that waits for a minute fails."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
