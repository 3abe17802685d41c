"""CUDA graphs: work that the host queues as one, however many kernels it has and however slow the host is.

A `Recorder` captures, for generation (engine.py) and for training. A `CapturedStep` is the forward and backward pass of
a micro-batch: arguments are copied into buffers, and gradients and results are left in buffers. What ends a step, the
optimizer, stays outside. Read next: train.py, whose micro-batches these are.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

WARM_UP_CALLS = 3  # as torch.cuda.make_graphed_callables: compilers, autotuners and libraries are done by then
Arguments = Sequence[Tensor | None]


class Graph(Protocol):
    """What was captured: `torch.cuda.CUDAGraph` is one."""

    def replay(self) -> None: ...


class Recorder:
    """Captures work of a CUDA device, on a stream beside the others, into graphs that share a pool of memory.

    Args:
        pool: that other recorders share, too; default is a new one. What shares a pool runs one after another.
        stream: default is one for all recorders of a device.

    Attributes:
        reserved_bytes: by how much the pool has grown.
        hidden_bytes: what of that belongs to no tensor that is still there. torch.cuda.max_memory_allocated does not
            know it, for graphs allocate when they are captured and not when they run.
    """

    def __init__(
        self, device: torch.device, pool: tuple[int, int] | None = None, stream: torch.cuda.Stream | None = None
    ):
        self.device, self.stream = device, stream or capture_stream(device)
        self.begin_again(pool)

    def begin_again(self, pool: tuple[int, int] | None = None) -> None:
        """In another pool, when the graphs in this one are gone."""
        self.pool = pool or torch.cuda.graph_pool_handle()
        self.reserved_bytes = self.hidden_bytes = 0

    def warm_up(self, call: Callable[[], object]) -> None:
        """Run it as it will be captured, so that whatever is made on first use is there. Random generators of torch
        are put back to where they were."""
        with torch.cuda.device(self.device), torch.random.fork_rng([torch.cuda.current_device()]):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                call()
            torch.cuda.synchronize()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """What is captured within the block counts in reserved_bytes and hidden_bytes."""
        gc.collect()
        torch.cuda.empty_cache()
        reserved, allocated = torch.cuda.memory_reserved(self.device), torch.cuda.memory_allocated(self.device)
        yield
        grown = max(0, torch.cuda.memory_reserved(self.device) - reserved)
        self.reserved_bytes += grown
        self.hidden_bytes += max(0, grown - (torch.cuda.memory_allocated(self.device) - allocated))

    def record(self, call: Callable[[], Any]) -> tuple[Graph, Any]:
        """A graph of what `call` queues, which does not run meanwhile, and what it returned, which a replay fills."""
        graph = torch.cuda.CUDAGraph()
        # NOTE: thread_local, for other threads, as a loader's, call CUDA meanwhile.
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = call()
        return graph, result


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    # NOTE: cuBLAS keeps a workspace, on an H100 of 32 MiB, for each stream and thread that it has seen.
    return torch.cuda.Stream(device)


@dataclass
class Recording:
    """What was captured for arguments of one shape: buffers, a graph that writes and those that add gradients, by
    (accumulate, kind)."""

    arguments: list[Tensor | None]
    kind: Hashable  # of the one that writes
    gradients: list[Tensor | None] = field(default_factory=list)
    graphs: dict[tuple[bool, Hashable], Graph] = field(default_factory=dict)
    results: dict[tuple[bool, Hashable], Any] = field(default_factory=dict)


class CapturedStep:
    """A forward and backward pass that runs as a CUDA graph, one for every shape of its arguments; or as it is.

    Args:
        modules: whose parameters and buffers it reads.
        recorder: what captures; None runs the function itself.

    A module's tensor that is put elsewhere (`load_state_dict(assign=True)`, `.data = ...`) makes all graphs be captured
    again; changes in place need nothing. Whatever else decides what is computed, as `train()` and `requires_grad_()`,
    is noticed after `forget`.
    """

    def __init__(self, modules: Sequence[nn.Module], recorder: Recorder | None):
        self.recorder = recorder
        self._owners = [
            (owner, name)
            for module in {sub: None for module in modules for sub in module.modules()}
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self._recordings: dict[tuple, Recording] = {}
        self._places: list[int] = []

    def peak_bytes(self, device: torch.device) -> int:
        """`torch.cuda.max_memory_allocated` as if the graphs allocated while they run."""
        hidden = 0 if self.recorder is None else self.recorder.hidden_bytes
        return max(torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device) + hidden)

    def __call__(
        self, compute: Callable[..., Any], *arguments: Tensor | None, accumulate: bool = False, kind: Hashable = None
    ) -> Any:
        """What compute(*arguments) returns: scalars, one or a nest of lists, tuples and dicts.

        compute: the same in all calls. It leaves gradients in `.grad` of the modules' parameters, as `backward` does.
            Nothing of the host that it depends on may change from call to call, and of the device only arguments, and
            the values of tensors that stay where they are. Random numbers of the device's default generator are those
            of a run that is not captured.
        accumulate: there are gradients, to which these are added; else there are none.
        kind: of computation, of which each has a graph: what of the host may change from call to call after all, as
            whether gradients are averaged over processes. Calls that do not accumulate are all of one kind, or
            ValueError.
        """
        if self.recorder is None:
            return compute(*arguments)
        tensors = [owner[name] for owner, name in self._owners]
        parameters = list({id(tensor): tensor for tensor in tensors if tensor.requires_grad}.values())
        places = [tensor.data_ptr() for tensor in tensors]
        if places != self._places:
            self.forget()
            self._places = places
        key = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in arguments)
        if key not in self._recordings:
            self._recordings[key] = self._prepare(compute, arguments, parameters, kind)
        recording = self._recordings[key]
        if not accumulate and kind != recording.kind:
            raise ValueError(f"kind is {kind!r}; calls that do not accumulate were {recording.kind!r} before")
        for buffer, argument in zip(recording.arguments, arguments, strict=True):
            if buffer is not None:
                buffer.copy_(argument)
        if accumulate:
            gather_gradients(parameters, recording.gradients)
        else:
            put_gradients(parameters, recording.gradients)
        way = (accumulate, kind)
        if way not in recording.graphs:
            self._record(compute, recording, way)
        recording.graphs[way].replay()
        return tree_map_only(Tensor, torch.clone, recording.results[way])

    def forget(self) -> None:
        """Drop all graphs. Their memory is free when nothing holds their gradients any more."""
        if self._recordings:
            # NOTE: the frames of an error may hold a recording; and NCCL, if sums over processes are in a graph, ends
            # only after the graph.
            for recording in self._recordings.values():
                recording.graphs.clear()
            self._recordings.clear()
            self.recorder.begin_again()

    def _prepare(
        self, compute: Callable[..., Any], arguments: Arguments, parameters: list[Tensor], kind: Hashable
    ) -> Recording:
        """Buffers, and the graph that writes gradients, which are those it leaves. The parameters keep their own."""
        recording = Recording([None if tensor is None else tensor.clone() for tensor in arguments], kind)
        before = [parameter.grad for parameter in parameters]

        def warm_up() -> None:
            for call in range(WARM_UP_CALLS):
                if call < WARM_UP_CALLS - 1:  # the last one adds, as the other graph will
                    put_gradients(parameters, [None] * len(parameters))
                compute(*recording.arguments)

        self.recorder.warm_up(warm_up)
        # NOTE: without a gradient, backward leaves what it has computed in the graph's memory, and adds nothing.
        put_gradients(parameters, [None] * len(parameters))
        self._record(compute, recording, (False, kind))
        recording.gradients = [parameter.grad for parameter in parameters]
        put_gradients(parameters, before)
        return recording

    def _record(self, compute: Callable[..., Any], recording: Recording, way: tuple[bool, Hashable]) -> None:
        try:
            with self.recorder.measuring():
                graph, result = self.recorder.record(lambda: compute(*recording.arguments))
        except RuntimeError as error:
            if (lack := lack_of_memory(error)) is not None:
                raise lack from None
            cause = error.__context__ or error
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise RuntimeError(
                f"this step cannot be captured into a CUDA graph ({reason}): cuda_graphs=false runs it without"
            ) from cause
        recording.graphs[way], recording.results[way] = graph, result


def lack_of_memory(error: BaseException) -> torch.OutOfMemoryError | None:
    """The OutOfMemoryError that it is or that was raised before it: a capture in which something was raised cannot end
    either."""
    found = (lack for lack in (error, error.__context__) if isinstance(lack, torch.OutOfMemoryError))
    return next(found, None)


def put_gradients(parameters: Sequence[Tensor], gradients: Arguments) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


@torch.no_grad()
def gather_gradients(parameters: Sequence[Tensor], own: Arguments) -> None:
    """Put these gradients in place of those that are there, with their values: another graph's, or of no graph."""
    for parameter, gradient in zip(parameters, own, strict=True):
        if gradient is None or gradient is parameter.grad:
            continue
        if parameter.grad is None:
            gradient.zero_()
        else:
            gradient.copy_(parameter.grad)
        parameter.grad = gradient
