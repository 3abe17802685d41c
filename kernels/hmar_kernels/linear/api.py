"""The linear operator: argument checks, choice of implementation, torch custom op.

The mathematics is in reference.py, kernels for few rows in cuda.py; impl="cublas" is a call of torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modulated_norm import modulated_norm
from ..modulated_norm.reference import residual as gated_residual
from . import cuda, reference

IMPLEMENTATIONS = ("reference", "cublas", "cuda")
"""Names that `linear(..., impl=...)` takes beside "auto"."""


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    statistics: Tensor | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    return_statistics: bool = False,
    impl: str = "auto",
    overlap: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = h W^T + b, then the tanh form of GELU (arXiv 1606.08415, section 2) if wanted, then residual + gate y.

    Args:
        x: [..., K] of the weight's dtype: nothing is cast, whatever autocast says. With `norm` or `residual` [B, L, K].
        weight: [N, K].
        bias: [N] or None, of the weight's dtype.
        norm: scale and shift [B, 1, K] of an adaptive layer norm before it, h = LN(x) (1 + scale) + shift, which has
            the weight's dtype; x, scale and shift then have dtypes of their own. None: h = x.
        statistics: of x, as the call that gave x returned them, which saves "cuda" a kernel for the norm of at most
            MAX_NORMED_ROWS rows.
        residual, gate: [B, L, N] and [B, 1, N], both or neither, dtypes of their own.
        eps: added to the variance of the norm.
        return_statistics: whether to return statistics of y too, for a norm of it.
        impl: "auto" or one of IMPLEMENTATIONS. "cublas" has bias and GELU behind the product, in the same kernel.
            "cuda" is for at most 32 rows, where the time goes into reading the weight, on GPUs of compute capability
            9.0: one kernel, and one before it for a norm without statistics or of more rows. Neither has a derivative.
            "auto" is "cublas" on a GPU where no gradient is needed, else "reference". A named implementation runs or
            raises.
        overlap: of "cuda": the kernel may read weight and bias before the kernels queued before it have ended. For
            weights that no kernel writes which may still run.
    Returns:
        [..., N] in x's dtype; after a norm in the weight's, of a residual in that of the residual. Sums are float32.
        With return_statistics also those, float32 [..., ceil(N / 64), 2]: of every 64 numbers of a row the mean and the
        sum of squared distances from it.
    Raises:
        ValueError: shapes or dtypes do not fit together, or the implementation cannot take them.
    """
    _check(x, weight, bias, norm, statistics, residual, gate)
    given = [t for t in (x, weight, bias, *(norm or ()), residual, gate) if t is not None]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f'unknown impl "{impl}": expected "auto" or one of {", ".join(IMPLEMENTATIONS)}')
    if impl == "auto":
        impl = "cublas" if x.is_cuda and not needs_grad else "reference"
    elif impl != "reference":
        reason = "it has no derivative" if needs_grad else None
        if reason is None and impl == "cublas" and not x.is_cuda:
            reason = f"it needs a CUDA device, got {x.device.type}"
        if reason is None and impl == "cuda":
            reason = cuda.unavailable(x, weight, bias, *(norm or (None, None)), gate, residual=residual)
        if reason is not None:
            raise ValueError(f'impl="{impl}" cannot run here: {reason}; impl="reference" would')
    if impl != "cuda":
        with torch.autocast(x.device.type, enabled=False):
            if impl == "reference":
                y = reference.forward(x, weight, bias, norm, gelu, residual, gate, eps)
            else:
                h = x if norm is None else modulated_norm(x, *norm, eps=eps, dtype=weight.dtype)
                y = _cublas(h.reshape(-1, h.shape[-1]), weight, bias, gelu).view(*x.shape[:-1], weight.shape[0])
                y = y if residual is None else gated_residual(residual, y, gate, None).to(residual.dtype)
            return (y, reference.statistics(y).float()) if return_statistics else y
    rows = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    scale, shift = (None, None) if norm is None else (_dense_rows(vector) for vector in norm)
    gate = None if gate is None else _dense_rows(gate)
    # NOTE: the operator's dispatch takes the host longer than the kernel takes, so it is there for tracing only.
    forward = _linear_cuda if torch.compiler.is_compiling() else cuda.forward
    tensors = rows, weight, bias, scale, shift, statistics, residual, gate
    outputs = forward(*tensors, gelu, eps, return_statistics, overlap)
    outputs = [output.view(*x.shape[:-1], *output.shape[2:]) for output in outputs]
    return (outputs[0], outputs[1]) if return_statistics else outputs[0]


def linear_parts(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    """Summands of x W^T, each of a part of K, as one batched product: [parts, ..., N] in x's dtype.

    Of few rows and columns a product fills the GPU only where K is divided, too. `summed_modulated_norm` adds up.

    Args:
        x: [..., K]. weight: [N, K], of x's dtype: nothing is cast, whatever autocast says.
        parts: divides K.
    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(x, weight, None, None, None, None, None)
    (N, K), leading = weight.shape, x.shape[:-1]
    if parts < 1 or K % parts:
        raise ValueError(f"parts is {parts}; it must divide K, which is {K}")
    x_PRk = x.reshape(-1, parts, K // parts).transpose(0, 1)
    weight_PkN = weight.unflatten(1, (parts, -1)).permute(1, 2, 0)
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(x_PRk, weight_PkN).view(parts, *leading, N)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, Tensor] | None,
    statistics: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> None:
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1] or 0 in x.shape or 0 in weight.shape:
        raise ValueError(
            f"x must be [..., K] and weight [N, K], none of them 0, got {list(x.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], one a row of the weight, got {list(bias.shape)}")
    alike = [tensor for tensor in (None if norm else x, weight, bias) if tensor is not None]
    if len({tensor.dtype for tensor in alike}) > 1 or not weight.is_floating_point():
        dtypes = ", ".join(str(tensor.dtype) for tensor in alike)
        raise ValueError(f"x, weight and bias must be of one floating dtype, got {dtypes}; x.to(weight.dtype) is")
    if (residual is None) != (gate is None):
        raise ValueError("residual and gate go together, got one of them; torch.ones([B, 1, N]) is a gate that adds")
    if (norm is not None or residual is not None) and x.ndim != 3:
        raise ValueError(f"x must be [B, L, K] with a norm or a residual, got {list(x.shape)}; x[None] has one image")
    expected = {}
    if norm is not None:
        expected |= {"scale": (norm[0], [x.shape[0], 1, x.shape[2]]), "shift": (norm[1], [x.shape[0], 1, x.shape[2]])}
    if residual is not None:
        expected["residual"] = residual, [*x.shape[:2], weight.shape[0]]
        expected["gate"] = gate, [x.shape[0], 1, weight.shape[0]]
    if statistics is not None:
        if norm is None:
            raise ValueError("statistics are for a norm, got them without one; leave them out")
        shape = [*x.shape[:2], -(-x.shape[2] // reference.TILE), 2]
        if list(statistics.shape) != shape or statistics.dtype != torch.float32:
            raise ValueError(
                f"statistics must be float32 {shape} to go with x {list(x.shape)}, as return_statistics gives them, "
                f"got {statistics.dtype} {list(statistics.shape)}"
            )
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be floats {shape} to go with x {list(x.shape)} and weight {list(weight.shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )


def _dense_rows(vector: Tensor) -> Tensor:
    """[B, 1, C] of any stride over B."""
    return vector if vector.stride(-1) == 1 else vector.contiguous()


def _cublas(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    if gelu and bias is not None:
        # NOTE: on CUDA this is the tanh form; on a CPU it would be the other one.
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return reference.forward(x, weight, bias, gelu=gelu)


_linear_cuda = torch.library.custom_op("hmar_kernels::linear_cuda", cuda.forward, mutates_args=())


@_linear_cuda.register_fake
def _(x, weight, bias, scale, shift, statistics, residual, gate, gelu, eps, return_statistics, overlap):
    y = x.new_empty(*x.shape[:2], weight.shape[0], dtype=weight.dtype if residual is None else residual.dtype)
    return [y, cuda.empty_statistics(y)] if return_statistics else [y]
