"""Query-key normalisation, stated plainly (arXiv 2010.04245; VAR, arXiv 2404.02905, appendix on the architecture).

    q = s (q' + b_q) / |q' + b_q|,   k = k' / |k'|,   v = v' + b_v,   s_h = exp(min(log_scale_h, max_log_scale))

where q', k', v' are the three thirds of a projection without bias and the norms are of heads, at least 1e-12. Any
dtype, any device; differentiated by autograd. Every other implementation is measured against this one in float64.
"""

import torch
import torch.nn.functional as F


def forward(
    qkv: torch.Tensor, q_bias: torch.Tensor, v_bias: torch.Tensor, log_scale: torch.Tensor, max_log_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qkv [B,L,3C], q_bias v_bias [C], log_scale [H] -> q, k, v [B,H,L,D] in qkv's dtype."""
    q, k, v = qkv.unflatten(2, (3, log_scale.shape[0], -1)).permute(2, 0, 3, 1, 4)
    q_bias, v_bias = (bias.to(qkv.dtype).unflatten(0, (-1, 1, q.shape[-1])) for bias in (q_bias, v_bias))
    scale = log_scale.clamp_max(max_log_scale).exp()[:, None, None]
    q = F.normalize(q + q_bias, dim=-1) * scale
    return q.to(qkv.dtype), F.normalize(k, dim=-1).to(qkv.dtype), v + v_bias
