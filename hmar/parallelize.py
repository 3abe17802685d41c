"""What is applied to a model from outside: residual stream, recomputation, torch.compile, DDP and FSDP2, in this order.

The model knows nothing of them, and no name of its state dict changes. A stage's objective (stages.py), the model with
its loss, is what is compiled and wrapped; its transformer's blocks are the units of recomputation, of regional
compilation and of sharding. Read next: processes.py for the processes that share a run, train.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hmar.model import Block, MaskedTransformer, NextScaleTransformer, TokenEmbedding
from hmar.processes import Processes

BYTES_SUMMED = 64 << 20  # at once: by count 200 us of NVLink; the rest of what a sum costs is a tenth of that


def blocks(objective: nn.Module) -> Iterator[Block]:
    """The transformer blocks in it, in order; none in a tokenizer."""
    return (module for module in objective.modules() if isinstance(module, Block))


def narrow_residual_stream(objective: nn.Module, dtype: torch.dtype) -> None:
    """Keep and hand on the residual stream of its transformer in `dtype`, as VAR's published code does under autocast.

    Norms read it, and add branches to it, in float32, and round the sum once: a third of the bytes that a norm moves
    forward is saved, and three tenths of those backward.
    """
    for module in objective.modules():
        if isinstance(module, TokenEmbedding):
            module.stream_dtype = dtype


def checkpoint_activations(objective: nn.Module, mode: str) -> None:
    """Keep less for the backward pass and compute it again (Chen et al., arXiv 1604.06174).

    "mlp": the hidden layer of every block's MLP, 8 C of about 22 C bytes a token, for a sixth more forward work.
    "blocks": everything but the inputs of blocks, for one more forward pass. "none": nothing.
    """
    for block in blocks(objective):
        if mode == "mlp":
            _recompute(block.mlp)
        elif mode == "blocks":
            _recompute(block)


def _recompute(module: nn.Module) -> None:
    module.__class__ = _recomputing(type(module))


@functools.cache
def _recomputing(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward keeps its arguments only.

    NOTE: a class and not a new `forward` in the instance, for which torch.compile would make a graph a block.
    """

    def forward(self: nn.Module, *arguments: Any) -> Any:
        # NOTE: blocks draw nothing at random (the stage draws their drop paths), so no generator has to be put back.
        return checkpoint(
            functools.partial(cls.forward, self), *arguments, use_reentrant=False, preserve_rng_state=False
        )

    return type(cls.__name__, (cls,), {"forward": forward, "__doc__": cls.__doc__})


def compile_objective(objective: nn.Module, mode: bool | str, backend: str = "inductor") -> None:
    """torch.compile in place, in whole graphs: a graph break is an error.

    "model": model and loss as one graph. "blocks": each block; they share a graph (but for the first two, and stage 2's
    first trained ones), so that compile time does not depend on depth, and gradients can be reduced as soon as their
    block is done; the rest is as without. A module without blocks, the tokenizer, is compiled as a whole in both.
    False: nothing.
    """
    if not mode:
        return
    for module in objective.modules():
        if isinstance(module, (NextScaleTransformer, MaskedTransformer)):
            # NOTE: what a mask keeps when it is first asked would change under the compiler, which then begins again.
            module.masks[None].intervals(module.head.linear.weight.device)
    parts = list(blocks(objective)) if mode == "blocks" else []
    for part in parts or [objective]:
        part.compile(fullgraph=True, dynamic=False, backend=backend)


class GradientAveraging:
    """What DistributedDataParallel does for gradients, in a form that a CUDA graph can hold.

    Gradients are summed over the processes beside the rest of backward, together as soon as it has BYTES_SUMMED of
    them, and where they lie; the loss of each process is divided by their number before. Nothing on the host changes
    from step to step.

    active: whether `backward` sums; without, gradients stay those of this process.
    """

    def __init__(self, module: nn.Module, num_processes: int):
        self.num_processes, self.active = num_processes, False
        self._sums: list[dist.Work] = []
        self._waiting: list[Tensor] = []
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # NOTE: NCCL connects processes when it first sums so much, which it could not do within a capture.
        for numel, dtype, device in sorted({(p.numel(), p.dtype, p.device) for p in trained}, key=str):
            for count in (1, min(8, -(-BYTES_SUMMED // (numel * dtype.itemsize)))):
                self._waiting = [torch.zeros(numel, dtype=dtype, device=device)] * count
                self._sum()
        self._wait()
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._add)

    def _add(self, parameter: Tensor) -> None:
        if self.active:
            self._waiting.append(parameter.grad)
            if sum(gradient.nbytes for gradient in self._waiting) >= BYTES_SUMMED:
                self._sum()

    def _sum(self) -> None:
        self._sums.append(dist.group.WORLD.allreduce_coalesced(self._waiting, dist.AllreduceCoalescedOptions()))
        self._waiting = []

    def _wait(self) -> None:
        for work in self._sums:
            work.wait()
        self._sums.clear()

    def backward(self, loss: Tensor) -> None:
        """Gradients of the mean of all processes' losses, added to those in `.grad`: what an earlier micro-batch left
        there is summed with them, once."""
        (loss / self.num_processes).backward()
        if self._waiting:
            self._sum()
        self._wait()


class Parallel:
    """How several processes share the training of an objective; alone, nothing.

    kind: "ddp", "fsdp" or "hsdp" (see TrainConfig). dtype: of the forward pass, None for float32. captured: forward and
    backward will be captured into CUDA graphs, which "ddp" can. The objective's parameters are what to optimise
    afterwards: sharded ones are DTensors.
    """

    def __init__(
        self,
        objective: nn.Module,
        kind: str,
        shard_size: int,
        processes: Processes,
        dtype: torch.dtype | None,
        captured: bool = False,
    ):
        self.kind = kind if processes.size > 1 else None
        self.forward = objective
        self.shards: dist.ProcessGroup | None = None
        self.averaging: GradientAveraging | None = None
        if self.kind == "ddp" and captured:
            self.averaging = GradientAveraging(objective, processes.size)
        elif self.kind == "ddp":
            # NOTE: no buffers to broadcast: all processes begin with the same ones, and none changes them.
            self.forward = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
        elif self.kind is not None:
            self._shard(objective, shard_size or processes.per_host, processes, dtype)

    def _shard(self, objective: nn.Module, shard_size: int, processes: Processes, dtype: torch.dtype | None) -> None:
        device_type = next(objective.parameters()).device.type
        if self.kind == "fsdp":
            mesh = init_device_mesh(device_type, (processes.size,), mesh_dim_names=("shard",))
        else:
            shape = (processes.size // shard_size, shard_size)
            mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
        self.shards = mesh.get_group("shard")
        # Blocks compute in `dtype` whatever autocast does; the rest, whose sums begin the residual stream, in float32.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks(objective):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(objective, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))

    @property
    def sharded(self) -> bool:
        """Whether parameters are DTensors, of which a part lies here."""
        return self.shards is not None

    @contextlib.contextmanager
    def synchronizing(self, last: bool) -> Iterator[bool]:
        """For the forward and backward of a micro-batch: gradients are averaged over the processes in the last one.

        Gives whether they are averaged by what is captured: one kind of a `CapturedStep`.
        """
        if self.averaging is not None:
            self.averaging.active = last
        elif self.kind == "ddp" and not last:
            with self.forward.no_sync():
                yield False
            return
        if self.sharded:
            self.forward.set_requires_gradient_sync(last)
        yield self.averaging is not None and last

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, all of it."""
        if self.averaging is None:
            loss.backward()
        else:
            self.averaging.backward(loss)

    def total_norm(self, norm: Tensor) -> Tensor:
        """The norm of all gradients, given that of the part that lies here."""
        if not self.sharded:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=self.shards)
        return square.sqrt()
