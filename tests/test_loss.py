"""Objectives against their definitions written out."""

import math
import statistics

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from hmar.loss import (
    TokenizerLoss,
    draw_mask,
    masked_loss,
    next_scale_loss,
    scale_weights,
    share,
    token_weights,
)
from hmar.pyramid import Pyramid

PYRAMID = Pyramid((1, 2, 3))


def logits_and_codes(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 14, 7, generator=generator, dtype=torch.float64)
    return logits, torch.randint(7, (3, 14), generator=generator)


def test_published_scale_weights():
    expected = [0.0247, 0.0642, 0.1150, 0.1379, 0.1402, 0.1329, 0.1208, 0.1054, 0.0882, 0.0709]
    assert scale_weights(Pyramid.for_resolution(256)).tolist() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("sides", [(1, 2, 3, 4), (2, 2), (5,), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)])
def test_weights_follow_their_definition(sides):
    pyramid = Pyramid(sides)
    ratios = [side / sides[-1] for side in reversed(sides)]
    if len(set(sides)) > 1:
        mean, std = statistics.mean(ratios), statistics.stdev(ratios)
        density = [math.exp(-(((r - mean) / std) ** 2) / 2) for r in ratios]
    else:
        density = [1.0] * len(sides)
    expected = [d / sum(density) for d in density]
    assert scale_weights(pyramid).tolist() == pytest.approx(expected, rel=1e-5)
    weights_L = token_weights(pyramid)
    assert weights_L.shape == (pyramid.length,)
    for k, weight in enumerate(expected):
        tokens = weights_L[pyramid.slice(k)]
        assert tokens.sum().item() == pytest.approx(weight, rel=1e-5)
        assert (tokens == tokens[0]).all()


def test_next_scale_loss():
    logits, codes = logits_and_codes()
    nll = -logits.log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1)
    torch.testing.assert_close(next_scale_loss(logits, codes), nll.mean())
    weights = token_weights(PYRAMID)
    torch.testing.assert_close(next_scale_loss(logits, codes, weights), (nll * weights).sum() / 3)
    uniform = torch.full((14,), 1 / 14, dtype=torch.float64)
    torch.testing.assert_close(next_scale_loss(logits, codes, uniform), next_scale_loss(logits, codes))


@pytest.mark.parametrize("per_image", [False, True])
def test_masked_loss_counts_hidden_tokens_only(per_image):
    logits, codes = logits_and_codes()
    nll = -logits.log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1)
    shape = (3, 14) if per_image else (14,)
    masked = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    expected = nll[masked.expand(3, 14)].mean()
    torch.testing.assert_close(masked_loss(logits, codes, masked), expected)
    spoiled = logits.masked_fill(~masked.expand(3, 14)[..., None], math.nan)
    torch.testing.assert_close(masked_loss(spoiled, codes, masked), expected)
    assert masked_loss(logits, codes, torch.zeros_like(masked)) == 0

    right = logits.argmax(-1) == codes
    assert share(right).item() == pytest.approx(right.double().mean().item())
    hidden_right = right[masked.expand(3, 14)].double().mean().item()
    assert share(right, masked).item() == pytest.approx(hidden_right)


def test_mismatched_codes_are_refused():
    logits, codes = logits_and_codes()
    with pytest.raises(ValueError, match=r"\(3, 13\)"):
        next_scale_loss(logits, codes[:, 1:])


@pytest.mark.parametrize("ratio, expected", [(0.5, (0, 2, 5)), (1.0, (0, 4, 9)), (0.01, (0, 1, 1)), (0.0, (0, 1, 1))])
def test_draw_mask_hides_the_same_share_of_every_scale(ratio, expected):
    masked_L = draw_mask(PYRAMID, ratio)
    assert tuple(int(masked_L[PYRAMID.slice(k)].sum()) for k in range(3)) == expected


def test_draw_mask_is_random_and_repeats_itself():
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([draw_mask(PYRAMID, generator=generator) for _ in range(2000)])
    # ceil(u n) of n positions: on average (n + 1) / 2, spread evenly over the positions.
    assert not masks[:, 0].any()
    assert masks[:, 1:5].float().mean(0).tolist() == pytest.approx([5 / 8] * 4, abs=0.05)
    assert masks[:, 5:].float().mean(0).tolist() == pytest.approx([10 / 18] * 9, abs=0.05)
    again = draw_mask(PYRAMID, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, masks[0])


def test_draw_mask_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        draw_mask(PYRAMID, 1.5)
    with pytest.raises(ValueError, match="second one"):
        draw_mask(Pyramid((4,)), 0.5)


class MeanDistance(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, reconstruction, images):
        return self.scale * (reconstruction.mean((1, 2, 3)) - images.mean((1, 2, 3))).abs()


def test_tokenizer_loss_reconstruction_and_perceptual():
    torch.manual_seed(0)
    images, reconstruction = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    loss, terms = TokenizerLoss(l1=0.5, l2=2.0)(reconstruction, images)
    torch.testing.assert_close(loss, 0.5 * F.l1_loss(reconstruction, images) + 2 * F.mse_loss(reconstruction, images))
    assert set(terms) == {"l1", "l2"}

    perceptual = MeanDistance()
    with_perceptual = TokenizerLoss(l1=0.5, l2=2.0, perceptual=perceptual, perceptual_weight=3.0)
    total, terms = with_perceptual(reconstruction, images)
    torch.testing.assert_close(total, loss + 3.0 * perceptual(reconstruction, images).mean())
    assert not perceptual.scale.requires_grad


def test_tokenizer_loss_adversarial_waits_and_balances():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 4, 4)
    last = nn.Conv2d(3, 3, 1)
    reconstruction = last(torch.randn(2, 3, 4, 4))
    discriminator = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten())
    loss_of = TokenizerLoss(discriminator=discriminator, adversarial_weight=0.5, adversarial_start=10)
    early, terms = loss_of(reconstruction, images, step=9, last_weight=last.weight)
    assert "adversarial" not in terms
    assert loss_of.discriminator_loss(reconstruction, images, step=9) == 0

    late, terms = loss_of(reconstruction, images, step=10, last_weight=last.weight)
    torch.testing.assert_close(terms["adversarial"], -discriminator(reconstruction).mean().detach())
    # Both terms pull on the last layer in the ratio of the weight.
    (early_grad,) = torch.autograd.grad(early, last.weight, retain_graph=True)
    (late_grad,) = torch.autograd.grad(late, last.weight, retain_graph=True)
    assert (late_grad - early_grad).norm().item() == pytest.approx(0.5 * early_grad.norm().item(), rel=1e-2)

    real, fake = discriminator(images), discriminator(reconstruction)
    expected = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    actual = loss_of.discriminator_loss(reconstruction, images, step=10)
    torch.testing.assert_close(actual, expected)
    actual.backward()
    assert last.weight.grad is None
    with pytest.raises(ValueError, match="no discriminator"):
        TokenizerLoss().discriminator_loss(reconstruction, images)
