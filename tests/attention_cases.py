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


def run(q, k, v, do, dlse, mask, impl, scale=None, with_lse=True, logit_bound=None, deterministic=None):
    """(out, lse, dq, dk, dv); the gradient of lse takes part where a query has keys."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    options = dict(impl=impl, scale=scale, logit_bound=logit_bound, deterministic=deterministic)
    out, lse = attention(q, k, v, mask, **options, return_lse=True)
    sighted = (mask.key_end > mask.key_start).to(lse.device)
    loss = (out * do.to(out.dtype)).sum()
    if with_lse:
        loss = loss + (torch.where(sighted, lse, 0) * dlse.to(lse.dtype)).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))


def assert_accurate(inputs, mask, impl, scale=None, with_lse=True, logit_bound=None, deterministic=None):
    """`impl` obeys the tolerance rule of hmar_kernels.accuracy in outputs and all gradients."""
    actual = run(*inputs, mask, impl, scale, with_lse, logit_bound, deterministic)
    assert_within_limits(actual, *oracles(inputs, mask, scale, with_lse), mask)


def oracles(inputs, mask, scale=None, with_lse=True):
    """What the tolerance rule measures by: the reference in float64 and in the inputs' dtype."""
    expected = run(*(x.double() for x in inputs), mask, "reference", scale, with_lse)
    return expected, run(*inputs, mask, "reference", scale, with_lse)


def assert_within_limits(actual, expected, eager, mask):
    """(out, lse, dq, dk, dv) obey the tolerance rule; `expected` and `eager` are those of `oracles`."""
    sighted = (mask.key_end > mask.key_start).to(actual[0].device)
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


def probe_positions(mask, count, num_positions, edges):
    """`count` positions in [0, num_positions): both sides of every edge of a run, then others at random."""
    near = sorted({p for edge in edges for p in (edge - 1, edge) if 0 <= p < num_positions})
    generator = torch.Generator().manual_seed(len(near))
    if len(near) > count:
        near = [near[i] for i in torch.randperm(len(near), generator=generator)[:count].tolist()]
    others = [p for p in torch.randperm(num_positions, generator=generator).tolist() if p not in set(near)]
    return torch.tensor((near + others)[:count])


def assert_exact_support(mask, impl, head_dim, dtype, device, heads=1):
    """`impl` sees exactly the mask's pairs: one key too many or too few in any probed row or column is found.

    Of `heads` equal heads the first is looked at.

    Uniform logits make every probability 1 / (number of keys). Up to `head_dim` probed keys j_d, as one-hot rows of v,
    show in out[i, d] which queries see them; probed queries i_d, as one-hot rows of do, show in dv[j, d] which keys
    they see. With one-hot k (or q) and the other of the two zero, dq (or dk) shows the same of the remaining pass.
    """
    num_q, num_k = mask.num_queries, mask.num_keys
    keys = probe_positions(mask, min(head_dim, num_k), num_k, [e for run in mask.runs for e in run[2:]])
    rows = probe_positions(mask, min(head_dim, num_q), num_q, [e for run in mask.runs for e in run[:2]])
    start, end = mask.intervals(device)
    seen_by_row = (end - start).double()
    weight = torch.where(end > start, 1 / seen_by_row.clamp(min=1), 0.0)
    keys, rows = keys.to(device), rows.to(device)
    row_sees_key = (keys >= start[:, None]) & (keys < end[:, None])  # [Lq, probed keys]
    positions = torch.arange(num_k, device=device)[:, None]
    key_in_row = (positions >= start[rows]) & (positions < end[rows])  # [Lk, probed rows]

    def one_hot(length, chosen):
        x = torch.zeros(1, 1, length, head_dim, device=device, dtype=dtype)
        x[0, 0, chosen, torch.arange(len(chosen), device=device)] = 1
        return x

    def run_heads(*tensors):
        repeated = (x.expand(-1, heads, *x.shape[2:]).contiguous() for x in tensors)
        return run(*repeated, mask, impl, 1.0, False)

    zero_q = torch.zeros(1, 1, num_q, head_dim, device=device, dtype=dtype)
    zero_k = torch.zeros(1, 1, num_k, head_dim, device=device, dtype=dtype)
    _, _, v, do, dlse = draw_inputs(mask, 1, 1, head_dim, dtype, device)

    out, lse, _, _, dv = run_heads(zero_q, zero_k, one_hot(num_k, keys), one_hot(num_q, rows), dlse)
    torch.testing.assert_close(lse[0, 0].double(), torch.log(seen_by_row), rtol=0, atol=2e-6 * float(num_k) ** 0.5)
    ulp = torch.finfo(dtype).eps
    for actual, visible, expected in (
        (out[0, 0, :, : len(keys)], row_sees_key, weight[:, None]),
        (dv[0, 0, :, : len(rows)], key_in_row, weight[rows]),
    ):
        assert torch.equal(actual != 0, visible)
        torch.testing.assert_close(actual.double(), visible * expected, rtol=8 * ulp, atol=0)

    sums = torch.cat([v.new_zeros(1, head_dim, dtype=torch.float64), v[0, 0].double().cumsum(0)])
    delta = (do[0, 0].double() * (sums[end.long()] - sums[start.long()])).sum(-1) * weight
    for q, k, index, probed, visible in (
        (zero_q, one_hot(num_k, keys), 2, keys, row_sees_key),
        (one_hot(num_q, rows), zero_k, 3, rows, key_in_row),
    ):
        gradient = run_heads(q, k, v, do, dlse)[index][0, 0, :, : len(probed)]
        if index == 2:
            ds = weight[:, None] * (do[0, 0].double() @ v[0, 0, keys].double().T - delta[:, None])
        else:
            ds = weight[rows] * (v[0, 0].double() @ do[0, 0, rows].double().T - delta[rows])
        assert not gradient[~visible].any()
        clear = visible & (ds.abs() > 1e-5)  # NOTE: above what float16 underflows or cancellation may hide
        assert (gradient[clear] != 0).all()
