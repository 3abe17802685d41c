"""The sampling operator: argument checks, choice of implementation, torch custom op.

The mathematics is in reference.py, the kernels in triton.py and cuda.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import cuda, reference, triton

KERNELS = {"triton": triton, "cuda": cuda}
# NOTE: measured by `bench.sampling` on an H100 (reports/data/sampling_h100.json, 036b6c3 and 3144409) with 4096 codes:
# truncated draws by "cuda" are 1.3 to 2.2 times as fast as by "triton", others .7 to 1.0 times.
MEASURED_CODES = 4096
IMPLEMENTATIONS = ("reference", *KERNELS)
"""Names that `sample_codes(..., impl=...)` takes beside "auto"."""


class SampledCodes(NamedTuple):
    """A draw for every token.

    Attributes:
        codes: int64 [B, n].
        confidence: float32 [B, n], the probability with which the code was drawn: after guidance, temperature and
            truncation; when greedy, after guidance alone.
        nonfinite: bool [B, n], whether the token's (guided) logits hold NaN or infinity. Its code is then 0 and means
            nothing, and its confidence is NaN. Of draws that are written `into` something, bool [B].
    """

    codes: Tensor
    confidence: Tensor
    nonfinite: Tensor


def sample_codes(
    logits: Tensor,
    unconditional: Tensor | None = None,
    *,
    seeds: Tensor,
    positions: Tensor,
    step: int = 0,
    guidance: float | Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    greedy: bool = False,
    into: SampledCodes | None = None,
    at: Tensor | None = None,
    impl: str = "auto",
    overlap: bool = False,
) -> SampledCodes:
    """One code a token, from logits with classifier-free guidance, truncated by top-k and then top-p.

    Drawn are the logits (1 + guidance) logits - guidance unconditional, divided by the temperature (HMAR, arXiv
    2506.04421, section 4.4). Nothing here waits for the device.

    Args:
        logits: [B, n, V], any strides; float16, bfloat16 or float32 (float64: reference only). Computed in float32.
        unconditional: the same for the null class; None without guidance.
        seeds: int64 [B] on the logits' device, one an image.
        positions: int64 [n] or [B, n], in [0, 2^31): places of the tokens within their images. Seed, position and step
            are all that a token's random numbers depend on.
        step: in [0, 2^31); tells draws of one token apart.
        guidance: strength, a number or a float32 tensor [B], one an image; needed exactly with `unconditional`.
        temperature: positive.
        top_k: keeps the codes at least as likely as the k-th; 0 turns it off.
        top_p: of those, the smallest set of most likely codes with a probability of at least p; of equally likely ones
            those of higher index first. In [0, 1]; 0 and 1 turn it off. Rounded to multiples of 2^-31.
        greedy: take the likeliest code (the first of equals), whatever temperature, top_k and top_p are.
        into: what the draws are written into and is returned, any strides: codes and confidence [B, N] at the places
            `at`, and in nonfinite [B] True for images of which a token's logits are not finite; the rest stays.
        at: int64 [B, n], places in [0, N), of which no image has two that are equal; None: N is n.
        impl: "auto" or one of IMPLEMENTATIONS. "cuda" is for at most 8192 codes, on GPUs of compute capability 9.0.
            A named implementation runs or raises; `choose` tells what "auto" takes.
        overlap: of "cuda": the kernel may start, and read seeds and positions, before the kernels queued before it have
            ended. For seeds and positions that no kernel writes which may still run.
    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit, or the implementation cannot take them.
    """
    _check(logits, unconditional, seeds, positions, step, guidance, temperature, top_k, top_p)
    B, n, num_codes = logits.shape
    _check_into(logits, into, at)
    if unconditional is not None:
        if not isinstance(guidance, Tensor):
            guidance = torch.full((B,), float(guidance), device=logits.device)
        guidance = guidance.contiguous()
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f'unknown impl "{impl}": expected "auto" or one of {", ".join(IMPLEMENTATIONS)}')
    if impl == "auto":
        impl, _ = choose(logits, top_k, top_p, greedy)
    elif impl in KERNELS:
        reason = KERNELS[impl].unavailable(logits.device, logits.dtype, num_codes)
        if reason is not None:
            raise ValueError(f'impl="{impl}" cannot run here: {reason}; impl="reference" would')
    numbers = (step, 1 / temperature, top_k, float(top_p), greedy)
    arguments = (logits, unconditional, guidance, seeds, positions.expand(B, n), *numbers)
    # NOTE: the operator's dispatch takes the host longer than the kernel takes, so it is there for tracing only.
    if impl != "reference" and not torch.compiler.is_compiling():
        return SampledCodes(*KERNELS[impl].forward(*arguments, into, at, overlap))
    drawn = SampledCodes(
        *(reference.forward(*arguments) if impl == "reference" else _sample(*arguments, overlap, impl))
    )
    return drawn if into is None else _write(drawn, into, at)


def choose(logits: Tensor, top_k: int = 0, top_p: float = 0.0, greedy: bool = False) -> tuple[str, str]:
    """What impl="auto" takes of IMPLEMENTATIONS, and the reason."""
    if not logits.is_cuda:
        return "reference", "the plain implementation serves CPU tensors"
    device, dtype, num_codes = logits.device, logits.dtype, logits.shape[2]
    if not any(reference.truncates(num_codes, top_k, top_p, greedy)):
        reason = "nothing is truncated, which it is not faster for"
    elif num_codes > MEASURED_CODES:
        reason = f"it was measured with up to {MEASURED_CODES} codes, got {num_codes}"
    else:
        reason = cuda.unavailable(device, dtype, num_codes)
    if reason is None:
        return "cuda", "it finds what truncation keeps without a search by halves"
    other = triton.unavailable(device, dtype, num_codes)
    return ("triton", f"not cuda: {reason}") if other is None else ("reference", other)


def _write(drawn: SampledCodes, into: SampledCodes, at: Tensor | None) -> SampledCodes:
    """What the kernel does by itself."""
    for target, values in ((into.codes, drawn.codes), (into.confidence, drawn.confidence)):
        if at is None:
            target.copy_(values)
        else:
            target.scatter_(1, at, values)
    into.nonfinite.logical_or_(drawn.nonfinite.any(1))
    return into


@torch.library.custom_op("hmar_kernels::sample_codes", mutates_args=())
def _sample(
    logits: Tensor,
    unconditional: Tensor | None,
    guidance: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    step: int,
    inverse_temperature: float,
    top_k: int,
    top_p: float,
    greedy: bool,
    overlap: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    numbers = (step, inverse_temperature, top_k, top_p, greedy)
    return KERNELS[impl].forward(logits, unconditional, guidance, seeds, positions, *numbers, overlap=overlap)


@_sample.register_fake
def _(
    logits, unconditional, guidance, seeds, positions, step, inverse_temperature, top_k, top_p, greedy, overlap, impl
):
    B, n, _ = logits.shape
    return (
        logits.new_empty(B, n, dtype=torch.int64),
        logits.new_empty(B, n, dtype=torch.float32),
        logits.new_empty(B, n, dtype=torch.bool),
    )


def _check(logits, unconditional, seeds, positions, step, guidance, temperature, top_k, top_p) -> None:
    if logits.ndim != 3 or 0 in logits.shape or not logits.is_floating_point():
        raise ValueError(f"logits must be floats [images, tokens, codes], none of them 0, got {_describe(logits)}")
    B, n, _ = logits.shape
    if unconditional is not None and (unconditional.shape, unconditional.dtype) != (logits.shape, logits.dtype):
        raise ValueError(
            f"unconditional logits must be of the shape and dtype of the others, {_describe(logits)}, got "
            f"{_describe(unconditional)}"
        )
    if (guidance is None) != (unconditional is None):
        given, lacking = ("guidance", "unconditional") if unconditional is None else ("unconditional", "guidance")
        raise ValueError(f"{given} is given without {lacking}: guidance needs both, drawing without it neither")
    if isinstance(guidance, Tensor) and (guidance.shape != (B,) or guidance.dtype != torch.float32):
        raise ValueError(f"guidance must be a number or float32 [{B}], one an image, got {_describe(guidance)}")
    if seeds.shape != (B,) or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be int64 [{B}], one an image, got {_describe(seeds)}")
    if positions.shape not in ((n,), (B, n)) or positions.dtype != torch.int64:
        raise ValueError(f"positions must be int64 [{n}] or [{B}, {n}], got {_describe(positions)}")
    others = {"unconditional": unconditional, "guidance": guidance, "seeds": seeds, "positions": positions}
    for name, tensor in others.items():
        if isinstance(tensor, Tensor) and tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device} and logits are on {logits.device}; move it there")
    for name, number, valid, expected in (
        ("step", step, 0 <= step < 2**31, "in [0, 2^31)"),
        ("temperature", temperature, 0 < temperature < math.inf, "positive; greedy=True takes the likeliest code"),
        ("top_k", top_k, top_k >= 0, "at least 0, which turns it off"),
        ("top_p", top_p, 0 <= top_p <= 1, "between 0, which turns it off, and 1"),
    ):
        if not valid:
            raise ValueError(f"{name} is {number}; it must be {expected}")


def _check_into(logits: Tensor, into: SampledCodes | None, at: Tensor | None) -> None:
    B, n, _ = logits.shape
    if into is None:
        if at is not None:
            raise ValueError("at is given without into: places are those of what the draws are written into")
        return
    size = n if at is None else into.codes.shape[-1]
    for name, tensor, shape, dtype in (
        ("into.codes", into.codes, (B, size), torch.int64),
        ("into.confidence", into.confidence, (B, size), torch.float32),
        ("into.nonfinite", into.nonfinite, (B,), torch.bool),
        ("at", at, (B, n), torch.int64),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {_describe(tensor)}")
        if tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device} and logits are on {logits.device}; move it there")


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"
