"""Processes that share work: those of one torchrun, or this one alone.

A training run is shared step by step (`Processes`): all agree on everything that one of them learns alone, a signal to
stop, a checkpoint that is damaged, the reason for which one of them fails. Agreement travels over gloo on the CPU,
beside the GPUs' NCCL. Drawing and encoding images are shared through files (`joined_processes`): each process does its
part, and all wait for each other at the end. These can also be started one by one, with a rank each and without knowing
each other. Read next: parallelize.py for how a run shares a model, train.py; evaluate.py and tokenize.py, which share
images.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FAILURE = "failure"
SECONDS_BETWEEN_LOOKS = 1.0
# For a process that is about to say itself what is wrong, as all do when all meet the same error.
SECONDS_OF_GRACE = 3.0
LONGEST_WAIT = timedelta(days=14)  # of a process that has done its part for the others


# NOTE: gloo's threads take the GIL to give up a tensor. DistributedDataParallel's reducer may be the last to hold the
# group; if it ended the group, with the GIL held, right after a collective, it would wait for these threads forever.
_ended_groups: list[dist.ProcessGroup] = []
atexit.register(_ended_groups.clear)


class ProcessFailedError(RuntimeError):
    """Another process of the run has failed; the message says which and why."""


class Processes:
    """This process among `size` ones. `join` makes one; close it in the end.

    rank and size are torchrun's RANK and WORLD_SIZE, per_host its LOCAL_WORLD_SIZE; a process that torchrun did not
    start is alone.
    """

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.per_host = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self._vote: tuple[dist.Work, Tensor] | None = None
        self._owns_group = False
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    @classmethod
    def join(cls) -> Processes:
        """Meet the others (env:// rendezvous) and form torch.distributed's default group."""
        processes = cls()
        if processes.size == 1:
            return processes
        if dist.is_initialized():
            raise ValueError("torch.distributed is initialised already: hmar.train.train forms the group itself")
        backend = "gloo"
        if torch.cuda.is_available():
            take_gpu(processes.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend)
        processes._owns_group = True
        # NOTE: a connection of its own; in that of the group a request waits for the one before it.
        processes._store = dist.distributed_c10d._get_default_store().clone()
        processes._watcher = threading.Thread(target=processes._watch, name="hmar-watcher", daemon=True)
        processes._watcher.start()
        return processes

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """Which images of a batch are this process's."""
        size = batch_size // self.size
        return slice(self.rank * size, (self.rank + 1) * size)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, on the values' device and without waiting for it."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def agree(self, number: int) -> int:
        """The largest number that a process gave in the call before this one; alone, in this one.

        Called once a step by all. NOTE: the answer of a step is read in the next one, so that nobody waits for it.
        """
        if self.size == 1:
            return number
        agreed = self._count()
        vote = torch.tensor(number)
        self._vote = dist.all_reduce(vote, dist.ReduceOp.MAX, async_op=True), vote
        return agreed

    def agree_now(self, number: int) -> int:
        """The largest number that a process gives in this call."""
        if self.size == 1:
            return number
        self.agree(number)
        return self._count()

    def _count(self) -> int:
        """The largest number of the vote under way; 0 if there is none. No vote is under way afterwards."""
        if self._vote is None:
            return 0
        work, result = self._vote
        work.wait()
        self._vote = None
        return int(result)

    def first_does(self, action: Callable[[], Any]) -> Any:
        """What the first process gets from an action that it does for all; its Exception is raised in all."""
        result = error = None
        if self.first:
            try:
                result = action()
            except Exception as raised:
                if self.size == 1:
                    raise
                error = raised
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def broadcast(self, value: Any) -> Any:
        """The first process's value (anything that can be pickled), in all."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value in the order of ranks, in all."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends; they end, too, within seconds, wherever they wait.

        Raises ProcessFailedError if one of them had told first, for then `error` is likely only what followed.
        """
        if self.size == 1:
            return
        own = f"process {self.rank} failed: {type(error).__name__}: {error}"
        try:
            first = self._store.compare_set(FAILURE, "", own).decode()
        except (RuntimeError, OSError):  # the process that keeps the store is gone
            return
        if first != own:
            raise ProcessFailedError(first) from error

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            try:
                failed = self._store.check([FAILURE])
            except (RuntimeError, OSError):  # the process that keeps the store is gone; torchrun ends the others
                return
            if failed:
                reason = self._store.get(FAILURE).decode()
                if not self._ended.wait(SECONDS_OF_GRACE):
                    print(f"error: {reason}; process {self.rank} ends with it", file=sys.stderr, flush=True)
                    # NOTE: the main thread may wait for the failed process in a collective that never returns.
                    os._exit(1)

    def close(self) -> None:
        self._ended.set()
        if self._watcher is not None:
            # NOTE: were it the last to hold this object, it would give up the group's works while the interpreter ends,
            # which aborts the process, "without an active exception".
            self._watcher.join()
            self._watcher = None
        self._vote = None
        if self._owns_group:
            _ended_groups.append(dist.group.WORLD)
            dist.destroy_process_group()
            self._owns_group = False


def find_device(name: str, processes: Processes | None = None) -> torch.device:
    """The torch device for "auto", "cpu", "cuda" or "cuda:N"; ValueError if it is not there.

    "auto" and "cuda" give each of several processes of a host a GPU of its own.
    """
    local_rank = processes.local_rank if processes is not None and processes.size > 1 else None
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'device="{name}" is not a device: expected auto, cpu, cuda or cuda:N') from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'device="{name}" is not supported: expected auto, cpu, cuda or cuda:N')
    if device.type == "cuda" and local_rank is not None:
        if device.index is not None:
            raise ValueError(f'device="{name}" is one GPU for {processes.size} processes: use device=cuda')
        device = torch.device("cuda", local_rank)
        name = str(device)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f'device="{name}" is not there: torch finds {torch.cuda.device_count()} GPUs; use device=cpu')
    return device


def take_gpu(local_rank: int) -> torch.device:
    """Make the GPU of this process of the host the current one."""
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def device_of(device: str, rank: int, world_size: int) -> str:
    """A GPU for each process of this host, where a device was left open; else the named one."""
    if world_size == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return str(take_gpu(int(os.environ.get("LOCAL_RANK", rank))))


def know_each_other(rank: int, world_size: int, overwrite: bool) -> bool:
    """Whether the processes can wait for each other. ValueError if a rank is not one of theirs, or where processes that
    do not know each other are to overwrite what others may have just written."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size} processes; it must be from 0 to {world_size - 1}")
    together = world_size > 1 and dist.is_initialized()
    if world_size > 1 and overwrite and not together:
        raise ValueError("processes that do not know each other cannot overwrite: delete the output folder first")
    return together


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
