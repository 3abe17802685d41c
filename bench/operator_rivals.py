"""The fused operators beside attention: inputs of a training step, who computes them, and how much work they are.

An operator is a function of a dict of tensors to a dict of outputs; its gradients are those of `leaves`. Everything
runs under autocast as in training: parameters float32, residual stream, branches and products bfloat16. Read
`operators.py` next for what is done with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import hmar_kernels
from hmar.pyramid import Pyramid

VOCABULARY, HEAD_DIM = 4096, 64
MAX_LOG_SCALE = math.log(100)
LOW = torch.bfloat16

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A training step: pixels, depth of the model (which is as many heads wide), images."""

    resolution: int
    depth: int
    batch: int
    length: int

    @property
    def width(self) -> int:
        return HEAD_DIM * self.depth

    def __str__(self) -> str:
        return f"d{self.depth}-{self.resolution}-b{self.batch}"


SHAPES = tuple(
    Shape(resolution, depth, batch, Pyramid.for_resolution(resolution).length)
    for resolution, depth, batch in ((256, 16, 32), (256, 24, 16), (512, 16, 8), (512, 24, 8), (1024, 24, 2))
)
"""The steps whose time is the project's target for training."""
SMOKE_SHAPES = (Shape(64, 2, 2, 30),)
"""Sizes for a run on the CPU, which tries the harness and measures nothing of interest."""


@dataclass(frozen=True)
class OperatorCase:
    """One operator of a step.

    Attributes:
        draw: (shape, device) -> inputs, those of one training step.
        leaves: the inputs that have gradients.
        implementations: name -> function of the inputs; all under autocast, differentiable.
        bytes: (shape) -> fewest bytes that forward and backward must move.
        flops: (shape) -> FLOPs of the matrix products of forward and backward.
    """

    name: str
    draw: Callable[[Shape, torch.device], Tensors]
    leaves: tuple[str, ...]
    implementations: dict[str, Callable[[Tensors], Tensors]]
    bytes: Callable[[Shape], dict[str, int]]
    flops: Callable[[Shape], dict[str, int]]


def _normal(device: torch.device) -> Callable[..., torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator, device=device).to(dtype)


def _tokens(shape: Shape) -> int:
    return shape.batch * shape.length


def _draw_norm(shape: Shape, device: torch.device) -> Tensors:
    normal, size = _normal(device), (shape.batch, shape.length, shape.width)
    return {
        "x": normal(*size, dtype=LOW),
        "branch": normal(*size, dtype=LOW),
        "modulation": 0.5 * normal(shape.batch, 6 * shape.width, dtype=LOW),
        "keep": torch.full((shape.batch,), 1 / 0.9, device=device),
    }


def _norm(impl: str, inputs: Tensors) -> Tensors:
    scale, shift = inputs["modulation"][:, None].chunk(6, dim=-1)[:2]
    return {"h": hmar_kernels.modulated_norm(inputs["x"], scale, shift, impl=impl)}


def _residual_norm(impl: str, inputs: Tensors) -> Tensors:
    gate, scale, shift = inputs["modulation"][:, None].chunk(6, dim=-1)[:3]
    y, h = hmar_kernels.residual_modulated_norm(
        inputs["x"], inputs["branch"], gate, scale, shift, keep=inputs["keep"], impl=impl
    )
    return {"y": y, "h": h}


def _draw_norm_linear(shape: Shape, device: torch.device) -> Tensors:
    inputs = _draw_norm(shape, device)
    del inputs["keep"]
    return inputs | {"weight": _normal(device)(4 * shape.width, shape.width) / math.sqrt(shape.width)}


def _residual_norm_linear(impl: str, inputs: Tensors) -> Tensors:
    gate, scale, shift = inputs["modulation"][:, None].chunk(6, dim=-1)[:3]
    y, out = hmar_kernels.residual_norm_linear(
        inputs["x"], inputs["branch"], gate, scale, shift, inputs["weight"], keep_x=True, impl=impl
    )
    return {"y": y, "out": out}


def _separate_norm_linear(inputs: Tensors) -> Tensors:
    """The fused norm and torch's linear layer, which keeps the norm's result and the rounded weight."""
    gate, scale, shift = inputs["modulation"][:, None].chunk(6, dim=-1)[:3]
    y, h = hmar_kernels.residual_modulated_norm(inputs["x"], inputs["branch"], gate, scale, shift)
    return {"y": y, "out": F.linear(h, inputs["weight"])}


def _draw_gelu_linear(shape: Shape, device: torch.device) -> Tensors:
    normal, hidden = _normal(device), 4 * shape.width
    return {
        "x": normal(shape.batch, shape.length, hidden, dtype=LOW),
        "bias": normal(hidden),
        "weight": normal(shape.width, hidden) / math.sqrt(hidden),
        "out_bias": normal(shape.width),
    }


def _gelu_linear(impl: str, inputs: Tensors) -> Tensors:
    return {"out": hmar_kernels.gelu_linear(**inputs, impl=impl)}


def _draw_qkv(shape: Shape, device: torch.device) -> Tensors:
    normal = _normal(device)
    return {
        "qkv": normal(shape.batch, shape.length, 3 * shape.width, dtype=LOW),
        "q_bias": normal(shape.width),
        "v_bias": normal(shape.width),
        "log_scale": torch.linspace(1, 3, shape.depth, device=device),
    }


def _qk_norm(impl: str, inputs: Tensors) -> Tensors:
    outputs = hmar_kernels.qk_norm(**inputs, max_log_scale=MAX_LOG_SCALE, impl=impl)
    return dict(zip("qkv", outputs, strict=True))


def _draw_loss(shape: Shape, device: torch.device) -> Tensors:
    normal, tokens = _normal(device), _tokens(shape)
    return {
        "hidden": normal(tokens, shape.width, dtype=LOW),
        "weight": normal(VOCABULARY, shape.width) / math.sqrt(shape.width),
        "bias": normal(VOCABULARY),
        "targets": torch.arange(tokens, device=device) * 7919 % VOCABULARY,
        "token_weight": normal(tokens).abs() / tokens,
    }


def _loss(impl: str, inputs: Tensors) -> Tensors:
    loss, _ = hmar_kernels.linear_cross_entropy(**inputs, impl=impl)
    return {"loss": loss}


CHUNKS = 4


def _chunked_loss(inputs: Tensors) -> Tensors:
    """Logits of a quarter of the tokens at a time, computed once more in the backward: plain torch."""

    def part(hidden, weight, bias, targets, token_weight):
        losses = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
        return (losses * token_weight).sum()

    rows = (x.chunk(CHUNKS) for x in (inputs["hidden"], inputs["targets"], inputs["token_weight"]))
    losses = [
        checkpoint(part, hidden, inputs["weight"], inputs["bias"], targets, weights, use_reentrant=False)
        for hidden, targets, weights in zip(*rows, strict=True)
    ]
    return {"loss": torch.stack(losses).sum()}


def _under_autocast(function: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    def run(inputs: Tensors) -> Tensors:
        with torch.autocast(next(iter(inputs.values())).device.type, LOW):
            return function(inputs)

    return run


def _implementations(operator: Callable[[str, Tensors], Tensors], **others: Callable) -> dict[str, Callable]:
    """Ours, the reference eagerly and compiled by itself, and others."""

    def reference(inputs: Tensors) -> Tensors:
        return operator("reference", inputs)

    found = {
        "triton": lambda inputs: operator("triton", inputs),
        "compiled": torch.compile(reference, fullgraph=True, dynamic=False),
        **others,
        "eager": reference,
    }
    return {name: _under_autocast(function) for name, function in found.items()}


def _no_products(shape: Shape) -> dict[str, int]:
    return {"forward": 0, "backward": 0}


def _elements(tensors: dict[str, int]) -> Callable[[Shape], dict[str, int]]:
    """Bytes of so many bfloat16 [B, L, C] tensors in each direction."""
    return lambda shape: {
        direction: LOW.itemsize * count * _tokens(shape) * shape.width for direction, count in tensors.items()
    }


def _norm_linear_bytes(shape: Shape) -> dict[str, int]:
    tokens, c = _tokens(shape), shape.width
    # forward: x, y and branch, out. Backward: dy, x, dx and d_out, branch, d_branch.
    return {
        "forward": 2 * tokens * (3 * c + 4 * c) + 4 * 4 * c * c,
        "backward": 2 * tokens * (5 * c + 4 * c) + 2 * 4 * 4 * c * c,
    }


def _gelu_linear_bytes(shape: Shape) -> dict[str, int]:
    tokens, c = _tokens(shape), shape.width
    # x, out; x, dx, d_out
    return {
        "forward": 2 * tokens * (4 * c + c) + 4 * 4 * c * c,
        "backward": 2 * tokens * (2 * 4 * c + c) + 2 * 4 * 4 * c * c,
    }


def _hidden_flops(shape: Shape) -> dict[str, int]:
    """Of a linear layer between C and 4 C channels."""
    product = 2 * _tokens(shape) * 4 * shape.width**2
    return {"forward": product, "backward": 2 * product}


def _loss_bytes(shape: Shape) -> dict[str, int]:
    hidden, weight = 2 * _tokens(shape) * shape.width, 4 * VOCABULARY * shape.width
    return {"forward": hidden + weight, "backward": 2 * hidden + 2 * weight}


def _loss_flops(shape: Shape) -> dict[str, int]:
    product = 2 * _tokens(shape) * shape.width * VOCABULARY
    return {"forward": product, "backward": 2 * product}


def cases() -> list[OperatorCase]:
    """Fresh implementations, so that nothing compiled for one shape is in the way of another."""
    return [
        OperatorCase(
            "modulated_norm",
            _draw_norm,
            ("x", "modulation"),
            _implementations(_norm),
            # x, h; dh, x, dx
            _elements({"forward": 2, "backward": 3}),
            _no_products,
        ),
        OperatorCase(
            "residual_modulated_norm",
            _draw_norm,
            ("x", "branch", "modulation"),
            _implementations(_residual_norm),
            # x, y and branch, h; dy, y, dx and dh, branch, d_branch
            _elements({"forward": 4, "backward": 6}),
            _no_products,
        ),
        OperatorCase(
            "residual_norm_linear",
            _draw_norm_linear,
            ("x", "branch", "modulation", "weight"),
            _implementations(_residual_norm_linear, separate=_separate_norm_linear),
            _norm_linear_bytes,
            _hidden_flops,
        ),
        OperatorCase(
            "gelu_linear",
            _draw_gelu_linear,
            ("x", "bias", "weight", "out_bias"),
            _implementations(_gelu_linear),
            _gelu_linear_bytes,
            _hidden_flops,
        ),
        OperatorCase(
            "qk_norm",
            _draw_qkv,
            ("qkv", "q_bias", "v_bias", "log_scale"),
            _implementations(_qk_norm),
            # qkv, q, k, v; dq, dk, dv, q, k, d_qkv
            _elements({"forward": 6, "backward": 8}),
            _no_products,
        ),
        OperatorCase(
            "linear_cross_entropy",
            _draw_loss,
            ("hidden", "weight", "bias"),
            _implementations(_loss, chunked=_chunked_loss),
            _loss_bytes,
            _loss_flops,
        ),
    ]


PLAIN = {
    name: partial(operator, "reference")
    for name, operator in {
        "modulated_norm": _norm,
        "residual_modulated_norm": _residual_norm,
        "residual_norm_linear": _residual_norm_linear,
        "gelu_linear": _gelu_linear,
        "qk_norm": _qk_norm,
        "linear_cross_entropy": _loss,
    }.items()
}
"""The reference of each operator outside autocast."""
NAMES = tuple(PLAIN)
IMPLEMENTATIONS = ("triton", "compiled", "chunked", "separate", "eager")
