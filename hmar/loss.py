"""Training objectives: next-scale and masked prediction over codes, and the tokenizer's image losses.

HMAR, arXiv 2506.04421, section 4.2 (weights of scales) and 4.3 (masked prediction); VQGAN, arXiv 2012.09841, section 3
(tokenizer). The quantizer's own loss comes from `MultiScaleQuantizer.forward`. `next_scale_loss` and `masked_loss` say
what is computed from logits; training has no logits (`Head.loss`) and hands over targets with a weight each. Read next:
stages.py, model.py.

Shapes: B images, L tokens of the pyramid, V codes, S scales, C channels, H W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hmar.model import Targets
from hmar.pyramid import Pyramid


def scale_weights(pyramid: Pyramid) -> Tensor:
    """HMAR's weight of each scale in the next-scale loss: float32 [S], summing to 1.

    The normal density at the z-score of n_(K+1-k) / n_K among all ratios n / n_K (sample standard deviation): scales in
    the middle count most, and the many tokens of the last ones do not drown the first. Sides that are all equal have no
    spread and get equal weights.
    """
    ratios_S = torch.tensor(pyramid.sides, dtype=torch.float64).flip(0) / pyramid.side
    spread = ratios_S.std() if pyramid.num_scales > 1 else ratios_S.new_zeros(())
    z_S = (ratios_S - ratios_S.mean()) / spread if spread > 0 else torch.zeros_like(ratios_S)
    density_S = (-z_S.square() / 2).exp() / math.sqrt(2 * math.pi)
    return (density_S / density_S.sum()).float()


def token_weights(pyramid: Pyramid) -> Tensor:
    """`scale_weights` spread evenly over the tokens of each scale: float32 [L], summing to 1."""
    sizes_S = torch.tensor(pyramid.sizes)
    return (scale_weights(pyramid) / sizes_S).repeat_interleave(sizes_S)


def next_scale_loss(logits_BLV: Tensor, codes_BL: Tensor, token_weights_L: Tensor | None = None) -> Tensor:
    """Cross-entropy of every token's code, averaged over images: weighted by token (HMAR) or uniform (VAR, None)."""
    losses_BL = _cross_entropy(logits_BLV, codes_BL)
    if token_weights_L is None:
        return losses_BL.mean()
    return (losses_BL * token_weights_L).sum(1).mean()


def masked_loss(logits_BLV: Tensor, codes_BL: Tensor, masked: Tensor) -> Tensor:
    """Mean cross-entropy over hidden tokens. masked: bool [L] or [B, L], with a True; 0 otherwise."""
    losses_BL = _cross_entropy(logits_BLV, codes_BL)
    hidden_BL = masked.expand_as(losses_BL)
    # NOTE: a weighted sum and not an index, whose size would depend on data.
    return torch.where(hidden_BL, losses_BL, 0).sum() / hidden_BL.sum().clamp_min(1)


def next_scale_targets(codes_BL: Tensor, token_weights_L: Tensor | None = None) -> Targets:
    """What makes `Head.loss` the `next_scale_loss` of its logits."""
    if token_weights_L is None:
        token_weights_L = torch.full(codes_BL.shape[1:], 1 / codes_BL.shape[1], device=codes_BL.device)
    return Targets(codes_BL, (token_weights_L / len(codes_BL)).expand_as(codes_BL))


def masked_targets(codes_BL: Tensor, masked: Tensor) -> Targets:
    """What makes `Head.loss` the `masked_loss` of its logits."""
    hidden_BL = masked.expand_as(codes_BL)
    return Targets(codes_BL, hidden_BL / hidden_BL.sum().clamp_min(1))


def share(correct_BL: Tensor, masked: Tensor | None = None) -> Tensor:
    """Share of tokens, or of hidden tokens, of which something is true: a scalar."""
    if masked is None:
        return correct_BL.float().mean()
    hidden_BL = masked.expand_as(correct_BL)
    return (correct_BL & hidden_BL).sum() / hidden_BL.sum().clamp_min(1)


def draw_mask(pyramid: Pyramid, ratio: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Which codes masked prediction hides in one step: bool [L] on the CPU.

    The same ratio, uniform in [0, 1) unless given, holds for all scales: ceil(ratio n_k^2) positions of each, drawn
    without replacement. Scale 1 is never hidden. At least one position is, even for a ratio of 0.
    """
    if ratio is None:
        ratio = torch.rand((), generator=generator, device=_device(generator)).item()
    if not 0 <= ratio <= 1:
        raise ValueError(f"A mask ratio lies in [0, 1], got {ratio}.")
    if pyramid.num_scales == 1:
        raise ValueError(f"The pyramid {pyramid.sides} has only scale 1, which is never masked; it needs a second one.")
    masked_L = torch.zeros(pyramid.length, dtype=torch.bool)
    for k in range(1, pyramid.num_scales):
        size = pyramid.sizes[k]
        # NOTE: a ratio of exactly 0 would leave masked prediction without a target.
        hidden = max(1, math.ceil(ratio * size))
        order = torch.randperm(size, generator=generator, device=_device(generator))
        masked_L[pyramid.offsets[k] + order[:hidden].cpu()] = True
    return masked_L


class TokenizerLoss(nn.Module):
    """Image losses of the tokenizer: reconstruction, and perceptual and adversarial terms where modules are given.

    Args:
        l1, l2: weights of mean absolute and mean squared error.
        perceptual: module (reconstruction, images) -> distance per image or scalar; off when None.
        perceptual_weight: its weight.
        discriminator: module images -> logits, larger for real ones; off when None. Its parameters belong to this
            module's but are trained apart, on `discriminator_loss`.
        adversarial_weight: weight of the adversarial term relative to the reconstruction's gradient.
        adversarial_start: step from which the adversarial term and the discriminator's loss count.
    """

    def __init__(
        self,
        l1: float = 1.0,
        l2: float = 1.0,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        discriminator: nn.Module | None = None,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 0,
    ):
        super().__init__()
        self.l1 = l1
        self.l2 = l2
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.discriminator = discriminator
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        if perceptual is not None:
            perceptual.requires_grad_(False)

    def forward(
        self, reconstruction_BCHW: Tensor, images_BCHW: Tensor, step: int = 0, last_weight: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its named terms (detached, unweighted).

        last_weight: weight of the decoder's last convolution. With it the adversarial term is scaled so that both terms
        pull equally hard on that layer (VQGAN, equation 7), times `adversarial_weight`.
        """
        terms = {
            "l1": (reconstruction_BCHW - images_BCHW).abs().mean(),
            "l2": (reconstruction_BCHW - images_BCHW).square().mean(),
        }
        loss = self.l1 * terms["l1"] + self.l2 * terms["l2"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction_BCHW, images_BCHW).mean()
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if self.discriminator is not None and step >= self.adversarial_start:
            terms["adversarial"] = -self.discriminator(reconstruction_BCHW).mean()
            balance = self.adversarial_weight * _balance(loss, terms["adversarial"], last_weight)
            loss = loss + balance * terms["adversarial"]
        return loss, {name: term.detach() for name, term in terms.items()}

    def discriminator_loss(self, reconstruction_BCHW: Tensor, images_BCHW: Tensor, step: int = 0) -> Tensor:
        """Hinge loss of the discriminator on real and reconstructed images; 0 before the warm-up ends."""
        if self.discriminator is None:
            raise ValueError("This TokenizerLoss has no discriminator to train; pass one to its constructor.")
        if step < self.adversarial_start:
            return images_BCHW.new_zeros(())
        real = F.relu(1 - self.discriminator(images_BCHW)).mean()
        fake = F.relu(1 + self.discriminator(reconstruction_BCHW.detach())).mean()
        return (real + fake) / 2


def _cross_entropy(logits_BLV: Tensor, codes_BL: Tensor) -> Tensor:
    if logits_BLV.ndim != 3 or codes_BL.shape != logits_BLV.shape[:2]:
        raise ValueError(
            f"Logits have shape {tuple(logits_BLV.shape)} and codes {tuple(codes_BL.shape)}; expected (batch, tokens, "
            "vocabulary) and (batch, tokens)."
        )
    return F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten(), reduction="none").view(codes_BL.shape)


def _balance(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_weight: Tensor | None) -> Tensor | float:
    if last_weight is None:
        return 1.0
    reconstruction_grad = torch.autograd.grad(reconstruction_loss, last_weight, retain_graph=True)[0]
    adversarial_grad = torch.autograd.grad(adversarial_loss, last_weight, retain_graph=True)[0]
    return (reconstruction_grad.norm() / (adversarial_grad.norm() + 1e-4)).clamp(0, 1e4).detach()


def _device(generator: torch.Generator | None) -> torch.device | str:
    return generator.device if generator is not None else "cpu"
