"""The processes of torch.distributed's group, and the Python objects that they exchange. Without a group: this one."""

from typing import Any

import torch.distributed as dist


def first_process() -> bool:
    """Whether this process writes the experiment's files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def agree[T](value: T) -> T:
    """The first process's ``value``, in every process."""
    if not dist.is_initialized():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def gathered[T](value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The ``value`` of each process, by rank, in every process of ``group`` (None: of all)."""
    if not dist.is_initialized():
        return [value]
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, value, group=group)
    return every
