"""Processes that share work through files: each does its part, all wait for each other, a failure in one ends all.

They are those of one torchrun, which know each other, or were started one by one with a rank each and do not.
Read next: evaluate.py and tokenize.py, which share their images like this.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

LONGEST_WAIT = timedelta(days=14)  # of a process for the others


@contextmanager
def joined_processes(rank: int, world_size: int) -> Iterator[None]:
    """Within the block the processes of one torchrun know each other, so that they can wait for all."""
    joins = world_size > 1 and "MASTER_ADDR" in os.environ and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        if joins:
            # NOTE: a process that ends with gloo's threads running is often aborted, "without an active exception".
            dist.destroy_process_group()


@contextmanager
def sharing_failures(together: bool) -> Iterator[None]:
    """At the end of the block the processes wait for each other; if it failed in one, it fails in all."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if together:
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if failure is None else str(failure))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failure is None and failed:
            raise ValueError(f"stopped, because process {failed[0]} failed: {messages[failed[0]]}")
    if failure is not None:
        raise failure


def wait_for_all() -> None:
    """Returns when all processes have come here. ValueError if one of them has ended instead."""
    try:
        dist.barrier()
    except RuntimeError as error:
        raise ValueError("stopped, because another process ended before its part was done") from error


def device_of(device: str, rank: int, world_size: int) -> str:
    """A GPU for each process of this machine."""
    if world_size == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    local = int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count()
    torch.cuda.set_device(local)
    return f"cuda:{local}"
