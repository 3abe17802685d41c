"""The processes that share one training run: started by torchrun, or this one alone.

They agree on everything that one of them learns alone: a signal to stop, a checkpoint that is damaged, the reason for
which one of them fails. Agreement travels over gloo on the CPU, beside the GPUs' NCCL. Read next: parallelize.py for
how they share a model, train.py.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FAILURE = "failure"
SECONDS_BETWEEN_LOOKS = 1.0
# For a process that is about to say itself what is wrong, as all do when all meet the same error.
SECONDS_OF_GRACE = 3.0


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
            torch.cuda.set_device(processes.local_rank % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend)
        processes._owns_group = True
        # NOTE: a connection of its own; in that of the group a request waits for the one before it.
        processes._store = dist.distributed_c10d._get_default_store().clone()
        threading.Thread(target=processes._watch, daemon=True).start()
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
        agreed = 0
        if self._vote is not None:
            work, result = self._vote
            work.wait()
            agreed = int(result)
        vote = torch.tensor(number)
        self._vote = dist.all_reduce(vote, dist.ReduceOp.MAX, async_op=True), vote
        return agreed

    def agree_now(self, number: int) -> int:
        """The largest number that a process gives in this call."""
        if self.size == 1:
            return number
        self.agree(number)
        return self.agree(0)

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
        if self._owns_group:
            dist.destroy_process_group()
            self._owns_group = False
