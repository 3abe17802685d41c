"""What a CUDA graph does, on the CPU: operations as they were once dispatched, again, on the tensors of that time.

Like a graph it is blind to all that the host decides, and to tensors that took the place of those it knows.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCHRONISING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Tape(TorchDispatchMode):
    """Records what is dispatched within the block; `replay` does it again."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator in SYNCHRONISING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operator}")
        options = options or {}
        output = operator(*arguments, **options)
        kinds = [value.alias_info for value in operator._schema.returns]
        is_view = any(kind is not None and not kind.is_write for kind in kinds)
        if not is_view:
            self.operations.append((operator, arguments, options, output))
        return output

    @torch.no_grad()
    def replay(self):
        for operator, arguments, options, output in self.operations:
            again = operator(*arguments, **options)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """In the place of hmar.cuda_graphs.Recorder. Counts what it is asked for; what it records seems not to have run."""

    def __init__(self, modules):
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.warm_ups = self.records = self.pools = 0
        self.reserved_bytes = self.hidden_bytes = 0

    def begin_again(self):
        self.pools += 1

    def warm_up(self, call):
        self.warm_ups += 1
        with torch.random.fork_rng([]):
            call()

    def measuring(self):
        return nullcontext()

    def record(self, call):
        self.records += 1
        before = [None if p.grad is None else (p.grad, p.grad.clone()) for p in self.parameters]
        with Tape() as tape:
            result = call()
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, before, strict=True):
                if saved is not None:
                    assert parameter.grad is saved[0]
                    parameter.grad.copy_(saved[1])
                elif parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
            for value in tree_leaves(result):
                if isinstance(value, Tensor):
                    value.fill_(float("nan"))
        return tape, result
