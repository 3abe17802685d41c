"""The engine's maps of the quantizer against the quantizer, which convolves and interpolates."""

from dataclasses import replace

import pytest
import torch

from hmar.config import TokenizerConfig
from hmar.pyramid import SIDES_BY_RESOLUTION, Pyramid
from hmar.quantizer import MultiScaleQuantizer
from hmar.scale_maps import ScaleMaps

CONFIG = TokenizerConfig(code_dim=6, vocab_size=30)
PYRAMIDS = {"small": (1, 2, 3, 5), "one": (3,), **{f"{px} px": SIDES_BY_RESOLUTION[px] for px in (256, 512, 1024)}}


def build(sides, dtype=torch.float64, config=CONFIG):
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(config, Pyramid(sides)).to(dtype).requires_grad_(False)
    torch.nn.init.normal_(quantizer.codebook.weight)
    return quantizer, ScaleMaps(quantizer)


def assert_same_maps(quantizer, maps, batch, **tolerance):
    f_hat, expected = maps.empty_f_hat(batch), quantizer.empty_f_hat(batch)
    inputs = maps.first_inputs(f_hat)
    assert inputs.shape == (batch, 0, CONFIG.code_dim)
    for k, size in enumerate(quantizer.pyramid.sizes):
        codes_Bn = torch.randint(CONFIG.vocab_size, (batch, size))
        if k > 0:
            torch.testing.assert_close(inputs, quantizer.resize_input(expected, k), **tolerance)
        own = maps.own_residual(codes_Bn, k)
        torch.testing.assert_close(own, quantizer.own_residual(codes_Bn, k), **tolerance)
        inputs = maps.accumulate_(f_hat, codes_Bn, k)
        expected = quantizer.accumulate(expected, codes_Bn, k)
        torch.testing.assert_close(f_hat, expected, **tolerance)
    assert inputs is None


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_maps_are_those_of_the_quantizer(name, batch):
    assert_same_maps(*build(PYRAMIDS[name]), batch, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_phis, ratio", [(1, 1.0), (2, 0.0), (3, 0.3)])
def test_any_phis(num_phis, ratio):
    quantizer, maps = build((1, 2, 3, 5), config=replace(CONFIG, num_phis=num_phis, phi_ratio=ratio))
    assert_same_maps(quantizer, maps, 2, rtol=1e-10, atol=1e-10)


def test_in_float32_whatever_autocast_says():
    quantizer, maps = build(SIDES_BY_RESOLUTION[256], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_maps(quantizer, maps, 2, rtol=1e-5, atol=1e-5)


def test_tables_follow_weights_in_their_memory():
    quantizer, maps = build((1, 2, 3))
    pointers = [table.data_ptr() for table in maps.tables]
    quantizer.codebook.weight.mul_(2)
    quantizer.phis[0].bias.add_(1)
    maps.derive()
    assert_same_maps(quantizer, maps, 2)
    assert [table.data_ptr() for table in maps.tables] == pointers


@pytest.mark.gpu
@pytest.mark.parametrize("name", PYRAMIDS)
def test_maps_on_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    quantizer, _ = build(PYRAMIDS[name], torch.float32)
    with torch.device("cuda"):
        assert_same_maps(quantizer.cuda(), ScaleMaps(quantizer.cuda()), 2, rtol=1e-4, atol=1e-4)
