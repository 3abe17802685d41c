"""Multi-scale residual quantisation: round trips, what the transformers read, the training loss, restarts."""

import pytest
import torch
import torch.nn.functional as F

from hmar.config import TokenizerConfig
from hmar.pyramid import Pyramid
from hmar.quantizer import MultiScaleQuantizer, phi_of_scale

PYRAMID = Pyramid((1, 2, 3, 4))


def make(pyramid=PYRAMID, seed=0, **changes):
    torch.manual_seed(seed)
    config = TokenizerConfig(**{"channels": 32, "vocab_size": 64, "code_dim": 6, **changes})
    quantizer = MultiScaleQuantizer(config, pyramid)
    torch.nn.init.normal_(quantizer.codebook.weight)
    return quantizer


def latent(quantizer, batch=3, seed=1):
    side = quantizer.pyramid.side
    return torch.randn(batch, quantizer.config.code_dim, side, side, generator=torch.Generator().manual_seed(seed))


def test_phi_of_scale():
    # k / 9 is at equal distance from two ticks for k = 2 and 7; the published arithmetic decides.
    assert phi_of_scale(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_of_scale(4, 4) == (0, 1, 2, 3)
    assert phi_of_scale(1, 4) == (0,)
    assert phi_of_scale(3, 1) == (0, 0, 0)
    assert phi_of_scale(5, 2) == (0, 0, 0, 1, 1)


@torch.no_grad()
def test_encode_is_the_residual_recursion():
    """Against the algorithm written out, with brute-force distances."""
    quantizer = make()
    latent_BEhw = latent(quantizer)
    codes_BL = quantizer.encode(latent_BEhw)
    assert codes_BL.dtype == torch.int64 and codes_BL.shape == (3, PYRAMID.length)
    residual, f_hat = latent_BEhw.clone(), torch.zeros_like(latent_BEhw)
    for k, side in enumerate(PYRAMID.sides):
        small = F.adaptive_avg_pool2d(residual, side).flatten(2).transpose(1, 2)
        distances = torch.cdist(small, quantizer.codebook.weight)
        codes = codes_BL[:, PYRAMID.slice(k)]
        chosen = distances.gather(2, codes[..., None]).squeeze(2)
        assert (chosen <= distances.amin(2) + 1e-5).all()
        h = quantizer.codebook(codes).transpose(1, 2).view(3, -1, side, side)
        h = F.interpolate(h, size=(4, 4), mode="bicubic") if side < 4 else h
        h = 0.5 * h + 0.5 * quantizer.phis[quantizer.phi_of_scale[k]](h)
        f_hat, residual = f_hat + h, residual - h
        torch.testing.assert_close(quantizer.f_hats(codes_BL)[k], f_hat)


def test_forward_agrees_with_encode_and_f_hats():
    quantizer = make()
    latent_BEhw = latent(quantizer).requires_grad_()
    f_hat, loss, codes_BL = quantizer(latent_BEhw)
    assert torch.equal(codes_BL, quantizer.encode(latent_BEhw))
    f_hats = quantizer.f_hats(codes_BL)
    torch.testing.assert_close(f_hat, f_hats[-1])
    expected = sum(1.25 * F.mse_loss(each, latent_BEhw) for each in f_hats) / 4
    torch.testing.assert_close(loss, expected)


def test_forward_gradients():
    """Straight-through to the latent, commitment to the latent, codebook loss to codes and phis only."""
    quantizer = make()
    latent_BEhw = latent(quantizer).requires_grad_()
    f_hat, loss, codes_BL = quantizer(latent_BEhw)
    weight = torch.randn_like(f_hat)
    (through,) = torch.autograd.grad((f_hat * weight).sum(), latent_BEhw, retain_graph=True)
    assert torch.equal(through, weight)

    loss.backward()
    f_hats = quantizer.f_hats(codes_BL)
    commitment = sum(0.25 * 2 * (latent_BEhw - each) / latent_BEhw.numel() for each in f_hats) / 4
    torch.testing.assert_close(latent_BEhw.grad, commitment.detach())
    used_V = torch.zeros(64, dtype=torch.bool).scatter(0, codes_BL.flatten(), True)
    assert torch.equal(quantizer.codebook.weight.grad.abs().sum(1) > 0, used_V)
    assert all(phi.weight.grad.abs().sum() > 0 for phi in quantizer.phis)


@pytest.mark.parametrize("sides", [(1, 2, 3, 4), (2, 3, 3, 5), (3,)])
@torch.no_grad()
def test_what_the_transformers_read(sides):
    pyramid = Pyramid(sides)
    quantizer = make(pyramid)
    codes_BL = torch.randint(64, (2, pyramid.length), generator=torch.Generator().manual_seed(2))
    inputs, residuals = quantizer.next_scale_inputs(codes_BL), quantizer.own_residuals(codes_BL)
    assert inputs.shape == residuals.shape == (2, pyramid.length - pyramid.sizes[0], 6)
    f_hat = quantizer.empty_f_hat(2)
    for k in range(pyramid.num_scales):
        codes_Bn = codes_BL[:, pyramid.slice(k)]
        if k > 0:
            span = slice(pyramid.offsets[k] - pyramid.sizes[0], pyramid.offsets[k + 1] - pyramid.sizes[0])
            assert torch.equal(inputs[:, span], quantizer.resize_input(f_hat, k))
            assert torch.equal(residuals[:, span], quantizer.own_residual(codes_Bn, k))
        f_hat = quantizer.accumulate(f_hat, codes_Bn, k)
    assert torch.equal(f_hat, quantizer.f_hats(codes_BL)[-1])


@torch.no_grad()
def test_inputs_do_not_leak_the_scale_they_predict():
    quantizer = make()
    codes_BL = torch.randint(64, (1, PYRAMID.length), generator=torch.Generator().manual_seed(2))
    before = quantizer.next_scale_inputs(codes_BL)
    for k in range(PYRAMID.num_scales):
        changed = codes_BL.clone()
        changed[:, PYRAMID.slice(k)] = (changed[:, PYRAMID.slice(k)] + 1) % 64
        after = quantizer.next_scale_inputs(changed)
        unchanged = PYRAMID.offsets[k + 1] - 1  # rows of the scales up to k, less the one token of scale 1
        assert torch.equal(before[:, :unchanged], after[:, :unchanged])
        assert k == PYRAMID.num_scales - 1 or not torch.equal(before[:, unchanged:], after[:, unchanged:])


@torch.no_grad()
def test_codes_do_not_depend_on_autocast():
    quantizer = make()
    latent_BEhw = latent(quantizer)
    expected = quantizer.encode(latent_BEhw)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.encode(latent_BEhw), expected)
        assert torch.equal(quantizer(latent_BEhw)[2], expected)
        assert quantizer.f_hats(expected)[-1].dtype == torch.float32


def test_usage():
    quantizer = make()
    codes_BL = torch.tensor([[0, 0, 1], [1, 5, 63]])
    assert quantizer.usage(codes_BL).item() == 4 / 64


def test_restart_moves_only_codes_idle_for_long():
    quantizer = make(restart_after=2)
    quantizer.idle_steps_V.zero_()
    latent_BEhw = latent(quantizer)
    codes_BL = torch.arange(30).repeat(3, 1)
    before = quantizer.codebook.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        assert not quantizer.restart_unused_codes(latent_BEhw, codes_BL, generator).any()
        assert torch.equal(quantizer.codebook.weight, before)
    moved_V = quantizer.restart_unused_codes(latent_BEhw, codes_BL, generator)
    assert torch.equal(moved_V, torch.arange(64) >= 30)
    assert torch.equal(quantizer.codebook.weight[:30], before[:30])
    assert (quantizer.codebook.weight[30:] != before[30:]).any(1).all()
    assert (quantizer.idle_steps_V == 0).all()


def test_restart_places_codes_on_residuals_of_the_batch():
    quantizer = make(restart_after=1, vocab_size=16)
    with torch.no_grad():
        quantizer.codebook.weight[1:] += 1000  # NOTE: out of reach, so that every token takes code 0
    latent_BEhw = latent(quantizer)
    codes_BL = quantizer.encode(latent_BEhw)
    assert (codes_BL == 0).all()
    residuals = [F.adaptive_avg_pool2d(latent_BEhw, 1)]
    f_hats = quantizer.f_hats(codes_BL)
    residuals += [F.adaptive_avg_pool2d(latent_BEhw - f_hats[k - 1], PYRAMID.sides[k]) for k in range(1, 4)]
    pool = torch.cat([r.permute(0, 2, 3, 1).reshape(-1, 6) for r in residuals])
    moved_V = quantizer.restart_unused_codes(latent_BEhw, codes_BL, torch.Generator().manual_seed(0))
    assert moved_V.sum() == 15
    assert ((quantizer.codebook.weight[1:, None] - pool).norm(dim=2).amin(1) < 1e-5).all()
    assert quantizer.usage(quantizer.encode(latent_BEhw)) > 0.5


def test_restart_repeats_itself_and_survives_a_checkpoint():
    latent_BEhw = latent(make())
    results = []
    for interrupted in (False, True):
        quantizer = make(restart_after=1)
        generator = torch.Generator().manual_seed(7)
        for step in range(4):
            if interrupted and step == 2:
                state, rng = quantizer.state_dict(), generator.get_state()
                quantizer = make(restart_after=1, seed=99)
                quantizer.load_state_dict(state)
                generator = torch.Generator()
                generator.set_state(rng)
            quantizer.restart_unused_codes(latent_BEhw, quantizer.encode(latent_BEhw), generator)
        results.append(quantizer.codebook.weight)
    assert torch.equal(*results)


def test_restart_can_be_off():
    quantizer = make(restart_after=0)
    before = quantizer.codebook.weight.detach().clone()
    latent_BEhw = latent(quantizer)
    for _ in range(3):
        moved_V = quantizer.restart_unused_codes(latent_BEhw, torch.zeros(3, 30, dtype=torch.int64), torch.Generator())
        assert not moved_V.any()
    assert torch.equal(quantizer.codebook.weight, before)


def test_wrong_shapes_are_refused():
    quantizer = make()
    with pytest.raises(ValueError, match=r"\(batch, 6, 4, 4\)"):
        quantizer.encode(torch.zeros(1, 6, 4, 5))
    with pytest.raises(ValueError, match=r"\(batch, 30\)"):
        quantizer.f_hats(torch.zeros(1, 29, dtype=torch.int64))
    with pytest.raises(ValueError, match="float32"):
        quantizer.own_residuals(torch.zeros(1, 30))
