"""Masks and the accuracy rule that the attention tests on CPU and GPU share."""

import torch

from hmar_kernels import SpanMask, attention
from hmar_kernels.accuracy import limits, row_group_norms

PYRAMIDS = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
NAMES = ("out", "lse", "dq", "dk", "dv")


def pyramid_mask(pattern: str, resolution: int) -> SpanMask:
    return getattr(SpanMask, pattern)([n * n for n in PYRAMIDS[resolution]])


def small_masks() -> dict[str, SpanMask]:
    """Odd lengths, every constructor, queries without keys, keys without queries, gaps in the transpose."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, 90, (75,), generator=generator)
    end = torch.minimum(start + torch.randint(0, 60, (75,), generator=generator), torch.tensor(97))
    return {
        "block_diagonal": SpanMask.block_diagonal([1, 4, 9, 16, 25, 36]),
        "block_causal": SpanMask.block_causal([1, 4, 9, 16, 25, 36]),
        "window2": SpanMask.window([1, 4, 9, 16, 25, 36], num_scales=2),
        "causal": SpanMask.causal(77),
        "full_rectangle": SpanMask.full(33, 101),
        "one_token": SpanMask.full(1, 1),
        "random_intervals": SpanMask.from_intervals(start, torch.maximum(start, end), num_keys=103),
        "blind_queries": SpanMask.from_intervals([0, 0, 5, 9, 0, 70], [70, 0, 9, 9, 0, 71], num_keys=80),
    }


def draw_inputs(mask, batch, heads, head_dim, dtype, device, seed=0, packed=False):
    """q, k, v, do, dlse; with `packed` the first three are views into one [B, L, 3, H, D] tensor."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    if packed:
        assert mask.num_queries == mask.num_keys
        q, k, v = draw(batch, mask.num_keys, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q = draw(batch, heads, mask.num_queries, head_dim)
        k, v = draw(batch, heads, mask.num_keys, head_dim), draw(batch, heads, mask.num_keys, head_dim)
    do = draw(batch, heads, mask.num_queries, head_dim)
    return q, k, v, do, draw(batch, heads, mask.num_queries).float()


def run(q, k, v, do, dlse, mask, impl, scale=None, with_lse=True):
    """(out, lse, dq, dk, dv); the gradient of lse takes part where a query has keys."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, mask, impl=impl, scale=scale, return_lse=True)
    sighted = (mask.key_end > mask.key_start).to(lse.device)
    loss = (out * do.to(out.dtype)).sum()
    if with_lse:
        loss = loss + (torch.where(sighted, lse, 0) * dlse.to(lse.dtype)).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))


def assert_accurate(inputs, mask, impl, scale=None, with_lse=True):
    """`impl` obeys the tolerance rule of hmar_kernels.accuracy in outputs and all gradients."""
    actual = run(*inputs, mask, impl, scale, with_lse)
    expected = run(*(x.double() for x in inputs), mask, "reference", scale, with_lse)
    eager = run(*inputs, mask, "reference", scale, with_lse)
    sighted = (mask.key_end > mask.key_start).to(inputs[0].device)
    for name, a, e, exact in zip(NAMES, actual, eager, expected, strict=True):
        if name == "lse":
            assert torch.equal(a.isfinite(), exact.isfinite())
            a, e, exact = (x[..., sighted, None] for x in (a, e, exact))
        assert a.isfinite().all(), f"{name} has non-finite values"
        error, limit = row_group_norms(a.double() - exact), limits(exact, e)
        worst = (error / limit).argmax()
        error, limit = error.flatten()[worst], limit.flatten()[worst]
        assert error <= limit, f"{name}: error norm {error:.3g} over some 64 rows, at most {limit:.3g} allowed"
    out, lse, dq = actual[0], actual[1], actual[2]
    assert not out[..., ~sighted, :].any() and not dq[..., ~sighted, :].any()
    assert (lse[..., ~sighted] == float("-inf")).all()
