"""One differentiable operator, two ways to call it: as a torch custom op where someone looks on, else directly.

A compiler, a tracer or selective checkpointing must see one node of a graph with known shapes; to everybody else the
dispatch of a custom op costs the host more time than small kernels take. Used by the operators' `api.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode


class Operator:
    """`forward` under the name hmar_kernels::`name`, called like a function of positional arguments.

    Args:
        name: of the custom op.
        forward: arguments annotated with types of custom ops; allocates and returns its outputs.
        fake: the same with empty outputs, for tracing.
        setup: (ctx, inputs, output), saves what `backward` needs; None for an operator without a derivative, which
            raises a RuntimeError where one is asked for.
        backward: (ctx, *gradients of the outputs) -> gradients of the inputs.
    """

    def __init__(self, name: str, forward: Callable, *, fake: Callable, setup: Callable | None = None, backward=None):
        definition = torch.library.custom_op(f"hmar_kernels::{name}", forward, mutates_args=())
        definition.register_fake(fake)
        self.forward, self.direct = forward, None
        if setup is not None:
            definition.register_autograd(backward, setup_context=setup)
            self.direct = _direct(name, forward, setup, backward)
        self.overload = getattr(torch.ops.hmar_kernels, name).default

    def __call__(self, *arguments):
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        if is_traced(*tensors):
            return self.overload(*arguments)
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return self.forward(*arguments)
        return self.overload(*arguments) if self.direct is None else self.direct.apply(*arguments)


def _direct(name: str, run: Callable, setup: Callable, run_backward: Callable) -> type[torch.autograd.Function]:
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            output = run(*arguments)
            setup(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx, *gradients):
            return run_backward(ctx, *gradients)

    Direct.__name__ = Direct.__qualname__ = name
    return Direct


def is_traced(*tensors: torch.Tensor) -> bool:
    """Whether someone looks on who must see an operator: a compiler, a mode (fake tensors, selective checkpointing,
    counters of operations), a transform of functions (vmap), or tensors that are not plain ones."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._are_functorch_transforms_active()
        or any(type(x) not in (torch.Tensor, torch.nn.Parameter) for x in tensors)
    )
