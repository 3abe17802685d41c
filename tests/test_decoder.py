"""The engine's decoder against the tokenizer's modules, and the passes over the maps that it saves."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hmar import decoder as fused
from hmar.config import TokenizerConfig
from hmar.decoder import FusedDecoder, TransposedUpsample, attended
from hmar.tokenizer import Decoder, Upsample
from hmar_kernels.conv2d import hopper
from hmar_kernels.group_norm import ChunkStatistics

CONFIG = TokenizerConfig(channels=8, multipliers=(1, 1, 2, 4), num_res_blocks=1, norm_groups=4, code_dim=6)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def build(config=CONFIG, dtype=torch.float64, layout=torch.channels_last):
    torch.manual_seed(0)
    decoder = Decoder(config).to(dtype, memory_format=layout).eval().requires_grad_(False)
    latent = torch.randn(2, config.code_dim, 3, 4, dtype=dtype).contiguous(memory_format=layout)
    return decoder, latent


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("multipliers", [(1,), (2, 1), (1, 1, 2, 4)], ids=str)
def test_images_are_those_of_the_modules(multipliers, transposed, layout):
    decoder, latent = build(replace(CONFIG, multipliers=multipliers), layout=layout)
    actual, expected = FusedDecoder(decoder, transposed)(latent), decoder(latent)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("transposed", [False, True])
def test_half_precision_loses_no_more_than_the_modules_do(transposed):
    exact, latent = build()
    expected = exact(latent)
    rounded, _ = build(dtype=torch.bfloat16)
    errors = [(d(latent.bfloat16()) - expected).norm() for d in (FusedDecoder(rounded, transposed), rounded)]
    assert errors[0] <= 1.5 * errors[1] and errors[0] < 0.1 * expected.norm()


@pytest.mark.parametrize("score_bytes", [1, 2 * 7 * 8 * 3, 1 << 20])
def test_attention_in_chunks(score_bytes, monkeypatch):
    monkeypatch.setattr(fused, "SCORE_BYTES", score_bytes)
    q, k, v = torch.randn(3, 2, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attended(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_attention_keeps_scores_in_float32():
    q, k, v = 4 * torch.randn(3, 1, 50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    error = (attended(q, k, v) - expected).norm() / expected.norm()
    scores = ((q @ k.transpose(1, 2)) / 8).softmax(-1)
    assert error < 4e-3 < (scores @ v - expected).norm() / expected.norm()


def test_transposed_weights_follow():
    decoder, latent = build()
    made = FusedDecoder(decoder, transposed=True)
    kept = [upsample.weight.data_ptr() for upsample in made.upsamples]
    for parameter in decoder.parameters():
        parameter.mul_(1.3)
    assert not torch.allclose(made(latent), decoder(latent))
    made.derive()
    torch.testing.assert_close(made(latent), decoder(latent))
    assert [upsample.weight.data_ptr() for upsample in made.upsamples] == kept, "graphs read this memory"


def test_transposed_upsampling_alone():
    upsample = Upsample(5).double().requires_grad_(False)
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(TransposedUpsample(upsample)(x).total(), upsample(x))


@pytest.mark.parametrize(
    ("multiprocessors", "expected"),
    [
        (1, {"same": 1 + 2 * (2 + 4 * 2), "doubled": 3, "statistics": 2 + 4 * 2 + 3}),
        (1000, {"doubled": 3, "statistics": 3}),
    ],
    ids=["large maps", "small maps"],
)
def test_hopper_convolutions_take_what_the_decoder_has(multiprocessors, expected, monkeypatch):
    """All but the last one, to three channels, and those of 1x1; torch's stand for the kernels."""
    calls = Counter()
    unavailable = hopper.unavailable

    def convolution(x, weight, doubled):
        reason = unavailable(x.bfloat16(), weight.bfloat16(), None, doubled=doubled)
        assert reason == "the kernels run on CUDA tensors, got cpu"
        calls["doubled" if doubled else "same"] += 1
        return F.conv_transpose2d(x, weight, stride=2, padding=1) if doubled else F.conv2d(x, weight, padding=1)

    def with_statistics(x, weight, *, doubled):
        out = convolution(x, weight, doubled)
        rows = out.permute(0, 2, 3, 1)
        calls["statistics"] += 1
        return out, ChunkStatistics(rows.mean(2), rows.var(2, correction=0) * rows.shape[2], rows.shape[2])

    monkeypatch.setattr(fused, "unavailable_on", lambda device, dtype: None)
    monkeypatch.setattr(hopper, "unavailable", lambda *arguments, **options: None)
    monkeypatch.setattr(hopper, "num_multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(hopper, "conv2d", lambda x, weight, bias: convolution(x, weight, False))
    monkeypatch.setattr(hopper, "with_statistics", with_statistics)
    decoder, latent = build(replace(CONFIG, code_dim=8))
    made = FusedDecoder(decoder, transposed=True)
    torch.testing.assert_close(made(latent), decoder(latent), rtol=1e-10, atol=1e-10)
    assert calls == expected
    for parameter in decoder.parameters():
        parameter.mul_(1.3)
    made.derive()
    torch.testing.assert_close(made(latent), decoder(latent), rtol=1e-10, atol=1e-10)


def test_hopper_convolutions_are_not_replaced_silently():
    """Asked for by name; by default torch's run where they cannot."""
    decoder, _ = build(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r'cannot run here: .* got cpu; convolutions="torch" would'):
        FusedDecoder(decoder, convolutions="hopper")
    with pytest.raises(ValueError, match=r"cannot run here: .* float16 and bfloat16, got torch.float64"):
        FusedDecoder(decoder.double(), convolutions="hopper")
    assert FusedDecoder(decoder).impl == FusedDecoder(decoder, convolutions="torch").impl == "reference"


class Counted(TorchDispatchMode):
    """Operators that were called, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.biased = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        self.biased += func is torch.ops.aten.convolution.default and args[2] is not None
        return func(*args, **(kwargs or {}))


def test_no_convolution_adds_a_bias_but_the_last(monkeypatch):
    """On a GPU each is a pass over the map; and no residual is added outside of a norm, but before upsampling."""
    decoder, latent = build()
    residual_norms = Counter()

    def counted(norm):
        def call(*arguments, **options):
            residual_norms.update(["calls"] if options.get("branch", arguments) is not None else [])
            return norm(*arguments, **options)

        return call

    for name in ("residual_group_norm", "group_norm_conv"):
        monkeypatch.setattr(fused, name, counted(getattr(fused, name)))
    with Counted() as modules:
        decoder(latent)
    with Counted() as ours:
        FusedDecoder(decoder)(latent)
    blocks, attentions, upsamples = 2 + 4 * 2, 1 + 2, 3
    assert modules.biased == modules.calls["convolution"] and ours.biased == 1
    assert modules.calls["convolution"] - ours.calls["convolution"] == 2 * attentions, "1x1, as products"
    assert residual_norms["calls"] == blocks + attentions - upsamples


@pytest.mark.parametrize("transposed", [False, True])
def test_every_map_of_channels_last_latents_is_channels_last(transposed, monkeypatch):
    """Which the kernels of the norms need: they would fall back without a word."""
    decoder, latent = build()
    layouts = Counter()

    def watched(function):
        def call(*arguments, **options):
            maps = [t for t in arguments if torch.is_tensor(t) and t.ndim == 4]
            layouts.update(t.is_contiguous(memory_format=torch.channels_last) for t in maps)
            return function(*arguments, **options)

        return call

    for name in ("group_norm", "residual_group_norm", "group_norm_conv"):
        monkeypatch.setattr(fused, name, watched(getattr(fused, name)))
    FusedDecoder(decoder, transposed)(latent)
    assert set(layouts) == {True} and layouts[True] > 30
