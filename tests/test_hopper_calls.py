"""The two ways to the Hopper kernels, by the operator and past it, on the CPU: plain formulas stand for the kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attention_cases import draw_inputs, run
from hmar_kernels import SpanMask, attention
from hmar_kernels.attention import cuda, hopper, hopper_launch, reference

MASK = SpanMask.block_causal([1, 4, 9, 16, 25])
OPERATORS = ["attention_hopper", "attention_hopper_backward"]


@pytest.fixture
def on_hopper(monkeypatch):
    """impl="hopper" takes CPU tensors."""

    def forward(q, k, v, *rest):
        out, lse = reference.forward(q, k, v, MASK, rest[4])
        return out, torch.where(lse == -math.inf, math.inf, lse / math.log(2))

    def backward(do, dlse_log2, q, k, v, out, lse_log2, *rest):
        scale = rest[-1]
        p = torch.where(MASK.to_dense(), (scale / math.log(2) * q @ k.mT - lse_log2[..., None]).exp2(), 0)
        delta = (out * do).sum(-1) - (0 if dlse_log2 is None else dlse_log2 / math.log(2))
        ds = p * (do @ v.mT - delta[..., None])
        return scale * ds @ k, scale * ds.mT @ q, p.mT @ do

    monkeypatch.setattr(cuda, "refusal", lambda q, k, v: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper, "_load_errors", {None: ""})
    monkeypatch.setattr(hopper, "_kernels", hopper_launch.HopperKernels(**hopper.table()))
    monkeypatch.setattr(hopper, "forward", forward)
    monkeypatch.setattr(hopper, "backward", backward)


class Recorder(TorchDispatchMode):
    """Which of our operators were called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hmar_kernels":
            self.seen.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_lse", [False, True])
def test_both_ways_give_the_reference(on_hopper, monkeypatch, with_lse):
    inputs = draw_inputs(MASK, 2, 3, 64, torch.float32, "cpu")
    expected = run(*inputs, MASK, "reference", with_lse=with_lse)
    with Recorder() as recorder:
        by_operator = run(*inputs, MASK, "hopper", with_lse=with_lse)
    assert recorder.seen == OPERATORS
    monkeypatch.setattr(torch.library.CustomOpDef, "__call__", lambda *args: pytest.fail("went through the operator"))
    for a, b, c in zip(run(*inputs, MASK, "hopper", with_lse=with_lse), by_operator, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_gradients_of_some_inputs_only(on_hopper, wanted):
    tensors = dict(zip("qkv", draw_inputs(MASK, 1, 2, 64, torch.float32, "cpu"), strict=False))
    tensors[wanted].requires_grad_()
    for impl in ("hopper", "reference"):
        attention(*tensors.values(), MASK, impl=impl).square().sum().backward()
        if impl == "hopper":
            gradient, tensors[wanted].grad = tensors[wanted].grad, None
    torch.testing.assert_close(gradient, tensors[wanted].grad)


def test_nothing_is_kept_without_gradients(on_hopper):
    q, k, v, *_ = draw_inputs(MASK, 1, 2, 64, torch.float32, "cpu")
    assert attention(q, k, v, MASK, impl="hopper").grad_fn is None
    with torch.no_grad():
        assert attention(q.requires_grad_(), k, v, MASK, impl="hopper").grad_fn is None


@pytest.mark.parametrize("linear", [False, True])
def test_a_second_derivative_is_refused(on_hopper, linear):
    """Also of a loss that is linear in the output, whose gradient depends on the inputs all the same."""
    q, k, v, do, _ = draw_inputs(MASK, 1, 2, 64, torch.float32, "cpu")
    q.requires_grad_()
    out = attention(q, k, v, MASK, impl="hopper")
    (gradient,) = torch.autograd.grad((out * do if linear else out.square()).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_hopper_backward"):
        ((out * do).sum() + gradient.square().sum()).backward()


def test_results_of_frozen_inputs_can_be_changed(on_hopper):
    q, k, v, do, _ = draw_inputs(MASK, 1, 2, 64, torch.float32, "cpu")
    out, lse = attention(q, k, v, MASK, impl="hopper", return_lse=True)
    out += do.requires_grad_()
    lse += 1
    out.sum().backward()
    assert torch.equal(do.grad, torch.ones_like(do))


def test_vmap_sees_the_operator(on_hopper):
    q, k, v, *_ = draw_inputs(MASK, 1, 2, 64, torch.float32, "cpu")
    many = torch.stack([q, 2 * q])
    expected = torch.stack([attention(x, k, v, MASK, impl="hopper") for x in many])
    torch.testing.assert_close(torch.vmap(lambda x: attention(x, k, v, MASK, impl="hopper"))(many), expected)


def test_checkpointing_that_selects_operators(on_hopper):
    """What is marked to be kept is the operator, so the forward kernel runs once."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    q, k, v, *_ = draw_inputs(MASK, 1, 2, 64, torch.float32, "cpu")
    q.requires_grad_()
    kept, calls = torch.ops.hmar_kernels.attention_hopper.default, []

    def policy(ctx, op, *args, **kwargs):
        if op is kept:
            calls.append(ctx.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def loss(q):
        return attention(q * 2, k, v, MASK, impl="hopper").square().sum()

    checkpoint(loss, q, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)).backward()
    gradient, q.grad = q.grad, None
    loss(q).backward()
    torch.testing.assert_close(gradient, q.grad)
    assert calls == [False, True]


def test_fake_tensors_need_no_kernel(on_hopper, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(hopper, "forward", lambda *args: pytest.fail("a kernel was asked for"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(2, 3, MASK.num_queries, 64, dtype=torch.bfloat16)
        assert attention(q, q, q, MASK, impl="hopper").shape == q.shape
    assert attention(q, q, q, MASK, impl="hopper").shape == q.shape  # the mode has gone, its tensors are still fake
