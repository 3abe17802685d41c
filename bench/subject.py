"""One implementation in one cell: prepared, checked, its memory read; ready to be timed or known not to be.

Whatever goes wrong ends up in `status` and `reason`, never in a number.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from .check import CheckFailed, Oracle, forward_backward, poison
from .rivals import Attend, Implementation
from .shapes import Cell
from .work import tensor_bytes

DIRECTIONS = ("forward", "backward")


class Inputs:
    """q, k, v, do of a cell, [B,H,L,D] views of [B,L,H,D] memory, and the oracle for them."""

    def __init__(self, cell: Cell, device: torch.device, seed: int = 0):
        self.cell, self.device = cell, device
        generator = torch.Generator(device).manual_seed(seed)
        shape = (cell.batch, cell.length, cell.heads, cell.head_dim)
        self.q, self.k, self.v, self.do = (
            torch.randn(shape, generator=generator, device=device, dtype=cell.torch_dtype).transpose(1, 2)
            for _ in range(4)
        )
        self.oracle = Oracle(self.q, self.k, self.v, self.do, cell.mask())


@dataclass
class Subject:
    """What is known of one implementation in one cell before it is timed.

    Attributes:
        status: "ok", "unavailable", "failed" or "out of memory"; `reason` says more for all but the first. (Results
            know one more, "crashed": the process did not survive. See `supervisor.py`.)
        deviations: per tensor, largest error and limit.
        first_call_seconds: preparing, compiling and running forward + backward once.
        peak_bytes, extra_bytes: per direction, largest allocation during one call; with and without the inputs.
    """

    implementation: Implementation
    inputs: Inputs
    status: str = "ok"
    reason: str | None = None
    attend: Attend | None = None
    deviations: dict[str, dict[str, float]] | None = None
    first_call_seconds: float | None = None
    peak_bytes: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(DIRECTIONS))
    extra_bytes: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(DIRECTIONS))

    def leaves(self) -> tuple[torch.Tensor, ...]:
        return tuple(x.detach().requires_grad_() for x in (self.inputs.q, self.inputs.k, self.inputs.v))

    def forward(self, leaves: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.attend(*leaves)

    def graph(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """A fresh graph for `backward`."""
        leaves = self.leaves()
        return self.forward(leaves), leaves

    def backward(self, graph: tuple[torch.Tensor, tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        out, leaves = graph
        return torch.autograd.grad(out, leaves, self.inputs.do)

    def timed(self, direction: str) -> tuple[Callable, Callable]:
        """(call, prepare): call(prepare()) is one round of a measurement, and only the call is timed."""
        return (self.forward, self.leaves) if direction == "forward" else (self.backward, self.graph)

    def give_up(self, error: BaseException) -> None:
        self.attend = None
        self.status, self.reason = failure(error)


# What an implementation may raise: recorded, and the run goes on. SystemExit, because somebody else's code may exit.
ERRORS = (Exception, SystemExit)


def failure(error: BaseException) -> tuple[str, str]:
    """Status and reason of what raised."""
    status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
    message = str(error).strip().splitlines() or [""]
    return status, f"{type(error).__name__}: {message[0]}"[:300]


def examine(implementation: Implementation, inputs: Inputs) -> Subject:
    """Prepare, check, and read the memory of an implementation. Errors of the implementation do not leave here."""
    cell, device = inputs.cell, inputs.device
    subject = Subject(implementation, inputs)
    reason = implementation.unavailable(cell, device)
    if reason is not None:
        subject.status, subject.reason = "unavailable", reason
        return subject

    gc.collect()  # what it would free later would be missing from what the implementation takes
    held = requested_bytes(device, "current") if device.type == "cuda" else 0
    try:
        started = time.perf_counter()
        subject.attend = implementation.prepare(cell, device)
        if not callable(subject.attend):
            raise CheckFailed(f"prepare returned {type(subject.attend).__name__}, expected a function of q, k, v")
        poison(inputs.q, 6)
        actual = forward_backward(subject.attend, inputs.q, inputs.k, inputs.v, inputs.do)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        subject.first_call_seconds = time.perf_counter() - started
        subject.deviations = {n: asdict(d) for n, d in inputs.oracle.compare(actual).items()}
        del actual
        if device.type == "cuda":
            _read_memory(subject, held)
    except ERRORS as error:
        subject.give_up(error)
    return subject


def device_is_lost(device: torch.device) -> bool:
    """Whether an error such as an illegal address has left this process without a working device."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def release(device: torch.device) -> None:
    """Forget compiled functions and cached memory of an implementation that is done.

    FlexAttention compiles one function per shape; without this the compiler would reach its limit of versions.
    """
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _read_memory(subject: Subject, held: int) -> None:
    """`held` was allocated before the implementation was prepared: inputs, oracle, the buffer that flushes L2."""
    device = subject.inputs.device
    calls = {
        "forward": lambda: subject.forward(subject.leaves()),
        "backward": lambda: subject.backward(subject.graph()),
    }
    for direction, call in calls.items():
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        extra = requested_bytes(device, "peak") - held
        # q k v, and the gradient of the output when there is a backward
        num_inputs = 3 if direction == "forward" else 4
        subject.extra_bytes[direction] = extra
        subject.peak_bytes[direction] = extra + num_inputs * tensor_bytes(subject.inputs.cell)


def requested_bytes(device: torch.device, when: str) -> int:
    """CUDA memory that tensors asked for, "current" or "peak": the allocator's own rounding depends on its history."""
    return torch.cuda.memory_stats(device)[f"requested_bytes.all.{when}"]
