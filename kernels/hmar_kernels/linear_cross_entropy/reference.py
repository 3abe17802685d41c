"""Linear layer and weighted cross-entropy, stated plainly.

    z = hidden weight^T + bias,   loss = sum_n w_n (log sum_v exp(z_nv) - z_n,target(n))

A token of weight 0 takes no part, whatever its logits. Any dtype, any device; differentiated by autograd. Every other
implementation is measured against this one in float64.
"""

import torch
import torch.nn.functional as F


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [N,C], weight [V,C], bias [V], targets [N], token_weight [N] or None -> loss [], correct bool [N]."""
    logits = F.linear(hidden, weight, bias)
    correct = logits.detach().argmax(-1) == targets
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if token_weight is None:
        return F.cross_entropy(logits, targets), correct
    # NOTE: selected before the logarithm, so that logits of a token of weight 0 have no gradient even if not finite.
    logits = logits.masked_fill((token_weight == 0)[:, None], 0.0)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * token_weight).sum(), correct
