"""Inputs, runs and the accuracy rule that the tests of the fused operators on CPU and GPU share.

A run is a dict from names to tensors: outputs, and gradients for random gradients of the outputs.
"""

import math

import torch

from hmar_kernels import (
    gelu_linear,
    linear_cross_entropy,
    modulated_norm,
    norm_linear,
    qk_norm,
    residual_modulated_norm,
    residual_norm_linear,
    summed_modulated_norm,
)
from hmar_kernels.accuracy import limits, row_group_norms

MAX_LOG_SCALE = math.log(100)


class Draw:
    """Standard normal tensors, the same on every device for a seed."""

    def __init__(self, device, seed=0):
        self.device, self.generator = device, torch.Generator().manual_seed(seed)

    def __call__(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)


def norm_inputs(batch, length, width, *, x_dtype, dtype, device="cpu", keep=True):
    """x in x_dtype, branch in dtype, and six vectors in dtype that are chunks of one tensor."""
    draw = Draw(device)
    inputs = {
        "x": 2 * draw(batch, length, width, dtype=x_dtype) + 1,
        "branch": draw(batch, length, width, dtype=dtype),
        "modulation": 0.5 * draw(batch, 6 * width, dtype=dtype),
        "keep": None,
    }
    if keep:
        inputs["keep"] = torch.tensor([0.0, 1.25] * batch, device=device)[:batch]
    return inputs


def run_norm(inputs, impl, dtype=None, lean=None):
    """Both operators, one after the other, as in a block."""
    x, branch, modulation = (inputs[name].detach().requires_grad_() for name in ("x", "branch", "modulation"))
    gate, _, scale, scale_after, shift, shift_after = modulation[:, None].chunk(6, dim=-1)
    h = modulated_norm(x, scale, shift, dtype=dtype, impl=impl)
    y, h_after = residual_modulated_norm(
        x, branch, gate, scale_after, shift_after, keep=inputs["keep"], dtype=dtype, impl=impl
    )
    outputs = {"h": h, "y": y, "h_after": h_after}
    return outputs | gradients(outputs, {"x": x, "branch": branch, "modulation": modulation}, lean)


def summed_inputs(parts, batch, length, width, x_dtype, dtype, device="cpu"):
    draw = Draw(device)
    return {
        "x": 2 * draw(batch, length, width, dtype=x_dtype) + 1,
        "parts": draw(parts, batch, length, width, dtype=dtype),
        "bias": draw(width, dtype=dtype),
    } | {name: 0.5 * draw(batch, 1, width, dtype=dtype) for name in ("gate", "scale", "shift")}


def assert_parts_add_up(parts, batch, length, width, x_dtype, dtype, device="cpu"):
    """The kernel of `summed_modulated_norm` by the rule of accuracy."""
    inputs = summed_inputs(parts, batch, length, width, x_dtype, dtype, device)

    def run(inputs, impl, **options):
        y, h = summed_modulated_norm(**inputs, eps=1e-3, impl=impl, **options)
        return {"y": y, "h": h}

    actual = run(inputs, "triton", dtype=dtype)
    assert (actual["y"].dtype, actual["h"].dtype) == (x_dtype, dtype)
    exact, plain = run(in_float64(inputs), "reference"), run(inputs, "reference", dtype=dtype)
    for name, its_dtype in (("y", x_dtype), ("h", dtype)):
        assert_within_limits({name: actual[name]}, {name: exact[name]}, {name: plain[name]}, its_dtype)


def norm_linear_inputs(batch, length, width, columns, *, x_dtype, dtype, weight_dtype=None, device="cpu"):
    """Those of the norm without `keep`, and weights of both operators' linear layers."""
    inputs = norm_inputs(batch, length, width, x_dtype=x_dtype, dtype=dtype, device=device)
    draw = Draw(device, seed=2)
    weights = {name: draw(columns, width, dtype=weight_dtype or dtype) / math.sqrt(width) for name in ("w1", "w2")}
    return {name: x for name, x in inputs.items() if name != "keep"} | weights


def run_norm_linear(inputs, impl, keep_x=None, lean=None):
    """Both operators, one after the other, as in a block."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    gate, _, scale, scale_after, shift, shift_after = leaves["modulation"][:, None].chunk(6, dim=-1)
    out = norm_linear(leaves["x"], scale, shift, leaves["w1"], impl=impl)
    y, out_after = residual_norm_linear(
        leaves["x"], leaves["branch"], gate, scale_after, shift_after, leaves["w2"], keep_x=bool(keep_x), impl=impl
    )
    outputs = {"out": out, "y": y, "out_after": out_after}
    return outputs | gradients(outputs, leaves, lean)


def gelu_linear_inputs(*shape, hidden, columns, dtype, weight_dtype=None, device="cpu"):
    """x [*shape, hidden], well into both tails of GELU."""
    draw, weight_dtype = Draw(device), weight_dtype or dtype
    return {
        "x": 2 * draw(*shape, hidden, dtype=dtype),
        "bias": draw(hidden, dtype=weight_dtype),
        "weight": draw(columns, hidden, dtype=weight_dtype) / math.sqrt(hidden),
        "out_bias": draw(columns, dtype=weight_dtype),
    }


def run_gelu_linear(inputs, impl, lean=None):
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = {"out": gelu_linear(**leaves, impl=impl)}
    return outputs | gradients(outputs, leaves, lean)


def under_autocast(run, dtype):
    """The run under autocast to `dtype`, but for the reference in float64, which autocast would round."""

    def within(inputs, *options, **named):
        x = inputs["x"]
        with torch.autocast(x.device.type, dtype, enabled=x.dtype != torch.float64):
            return run(inputs, *options, **named)

    return within


def qkv_inputs(batch, length, heads, head_dim, *, dtype, device="cpu"):
    draw = Draw(device)
    width = heads * head_dim
    return {
        "qkv": draw(batch, length, 3 * width, dtype=dtype),
        "q_bias": draw(width),
        "v_bias": draw(width),
        # from small to beyond the limit
        "log_scale": torch.linspace(-1, 5, heads, device=device),
    }


def run_qk_norm(inputs, impl, lean=None):
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = dict(zip("qkv", qk_norm(**leaves, max_log_scale=MAX_LOG_SCALE, impl=impl), strict=True))
    return outputs | gradients(outputs, leaves, lean)


def loss_inputs(tokens, width, vocabulary, *, dtype, device="cpu", weighted=True, bias=True):
    """Weights like those of a pyramid's tokens over a batch, some of them 0."""
    draw = Draw(device)
    inputs = {
        "hidden": draw(tokens, width, dtype=dtype),
        "weight": draw(vocabulary, width, dtype=dtype) / math.sqrt(width),
        "bias": draw(vocabulary, dtype=dtype) if bias else None,
        "targets": torch.arange(tokens, device=device) * 7 % vocabulary,
        "token_weight": None,
    }
    if weighted:
        inputs["token_weight"] = draw(tokens).abs() / tokens * (torch.arange(tokens, device=device) % 5 != 3)
    return inputs


def run_loss(inputs, impl, lean=None):
    leaves = {
        name: x.detach().requires_grad_() if x is not None and name in ("hidden", "weight", "bias") else x
        for name, x in inputs.items()
    }
    loss, correct = linear_cross_entropy(**leaves, impl=impl)
    names = ["hidden", "weight", "bias"] if leaves["bias"] is not None else ["hidden", "weight"]
    found = torch.autograd.grad(3 * loss, [leaves[name] for name in names])
    return {"loss": loss.detach(), "correct": correct} | {f"d_{name}": x for name, x in zip(names, found, strict=True)}


def gradients(outputs, leaves, lean=None):
    """d_NAME of every leaf, for random gradients of the outputs; these lose their graph.

    lean: outputs to whose signs the gradients lean, so that sums over tokens do not all but cancel.
    """
    draw, seeds = Draw("cpu", seed=1), []
    for name, x in outputs.items():
        seed = draw(*x.shape).to(x.device)
        seeds.append((seed if lean is None else seed + lean[name].sign()).to(x.dtype))
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), seeds)
    for name in outputs:
        outputs[name] = outputs[name].detach()
    return {f"d_{name}": x for name, x in zip(leaves, found, strict=True)}


def in_float64(inputs):
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in inputs.items()
    }


def assert_within_limits(actual, exact, eager, dtype):
    """The rule of hmar_kernels.accuracy. exact: the reference in float64; eager: in the inputs' dtypes, of which
    `dtype` has the fewest bits."""
    assert actual.keys() == exact.keys() == eager.keys()
    for name, a in actual.items():
        e, x = eager[name], exact[name]
        assert (a.shape, a.dtype) == (e.shape, e.dtype), name
        if not a.is_floating_point():
            continue
        assert a.isfinite().all(), f"{name} has non-finite values"
        a, e, x = (t.reshape(1, -1) if t.ndim < 2 else t for t in (a, e, x))
        error, limit = row_group_norms(a.double() - x), limits(x, e, dtype)
        worst = (error / limit).argmax()
        error, limit = error.flatten()[worst], limit.flatten()[worst]
        assert error <= limit, f"{name}: error norm {error:.3g} over some 64 rows, at most {limit:.3g} allowed"


def assert_accurate(run, inputs, *options):
    """run(inputs, "triton", *options) obeys the rule in outputs and gradients."""
    exact_inputs, nothing = in_float64(inputs), [None for _ in options]
    lean = run(exact_inputs, "reference", *nothing)
    exact = run(exact_inputs, "reference", *nothing, lean=lean)
    eager, actual = (run(inputs, impl, *options, lean=lean) for impl in ("reference", "triton"))
    dtypes = [x.dtype for x in inputs.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    assert_within_limits(actual, exact, eager, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))


def assert_correct_agrees(inputs):
    """Whether the target's logit is the largest is the same in both implementations, but for near ties."""
    logits = torch.nn.functional.linear(inputs["hidden"].double(), inputs["weight"].double())
    if inputs["bias"] is not None:
        logits += inputs["bias"].double()
    inputs = inputs | {"targets": torch.where(inputs["targets"] % 2 == 0, logits.argmax(-1), inputs["targets"])}
    top = logits.topk(2).values
    clear = top[:, 0] - top[:, 1] > 4 * torch.finfo(inputs["hidden"].dtype).eps * logits.abs().amax(-1)
    expected = logits.argmax(-1) == inputs["targets"]
    assert clear.sum() > len(clear) // 2 and expected[clear].any() and not expected[clear].all()
    for impl in ("reference", "triton"):
        _, correct = linear_cross_entropy(**inputs, impl=impl)
        assert correct.dtype == torch.bool and torch.equal(correct[clear], expected[clear])
