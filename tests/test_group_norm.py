"""Group norm: the reference against its definition, the kernels against float64 by the one rule of accuracy."""

import pytest
import torch
import torch.nn.functional as F

from hmar_kernels import group_norm, group_norm_conv, residual_group_norm
from hmar_kernels.group_norm import ChunkStatistics
from hmar_kernels.group_norm import triton as kernels

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels run there")
# N, C, H, W, groups
SHAPES = {
    "160 of 32": (2, 160, 8, 8, 32),
    "several chunks": (1, 32, 33, 35, 8),
    "odd": (2, 12, 5, 3, 4),
    "one group": (1, 6, 7, 7, 1),
    "a channel each": (3, 16, 1, 2, 16),
    "blocks of channels": (1, 256, 3, 5, 32),
}


def inputs(shape, dtype, device="cpu", mean=1.0):
    N, C, H, W, groups = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, H, W, generator=generator) * 2 + mean
    weight, bias = torch.randn(2, C, generator=generator)
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
    return x, groups, weight.to(device, dtype), bias.to(device, dtype)


def exact(x, groups, weight, bias, silu):
    """From the definition, in float64."""
    x, weight, bias = (t.double() for t in (x, weight, bias))
    parts = x.unflatten(1, (groups, -1))
    mean = parts.mean((2, 3, 4), keepdim=True)
    parts = (parts - mean) / ((parts - mean).square().mean((2, 3, 4), keepdim=True) + 1e-6).sqrt()
    y = parts.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]
    return y * y.sigmoid() if silu else y


def assert_accurate(shape, dtype, silu, device="cpu", mean=1.0):
    x, groups, weight, bias = inputs(shape, dtype, device, mean)
    expected = exact(x, groups, weight, bias, silu)
    eager = F.group_norm(x, groups, weight, bias, 1e-6)
    eager = F.silu(eager) if silu else eager
    actual = group_norm(x, groups, weight, bias, eps=1e-6, silu=silu, impl="triton")
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=torch.channels_last)
    error, allowed = ((y.double() - expected).norm() for y in (actual, eager))
    floor = 32 * torch.finfo(torch.float32).eps * expected.numel() ** 0.5
    assert actual.isfinite().all()
    assert error <= 2 * allowed + torch.finfo(dtype).eps * expected.norm() + floor


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_reference_is_its_definition(name, silu):
    x, groups, weight, bias = inputs(SHAPES[name], torch.float64)
    actual = group_norm(x, groups, weight, bias, eps=1e-6, silu=silu)
    torch.testing.assert_close(actual, exact(x, groups, weight, bias, silu))
    assert torch.autograd.gradcheck(
        lambda x: group_norm(x, 2, weight[:4], bias[:4], silu=silu), x[:1, :4, :2, :2].contiguous().requires_grad_()
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_under_the_interpreter(name, silu, dtype, poisoned_memory):
    assert_accurate(SHAPES[name], dtype, silu)


@interpreted
def test_nothing_cancels_where_the_mean_is_large():
    x, groups, weight, bias = inputs(SHAPES["several chunks"], torch.float32, mean=3000.0)
    actual = group_norm(x, groups, weight, bias, eps=1e-6, impl="triton")
    torch.testing.assert_close(actual.double(), exact(x, groups, weight, bias, False), rtol=0, atol=2e-3)


def assert_residual_is_accurate(shape, dtype, device="cpu", mean=1.0):
    """The residual as its dtype rounds it, its norm as that of any image; the same for a shift alone."""
    x, groups, weight, bias = inputs(shape, dtype, device, mean)
    branch, shift = x.flip(0, 1).contiguous(memory_format=torch.channels_last), torch.roll(weight, 1)
    arguments = {"eps": 1e-6, "silu": True, "impl": "triton"}
    z, actual = residual_group_norm(x, branch, groups, weight, bias, shift=shift, **arguments)
    expected = (x.double() + branch.double() + shift.double()[:, None, None]).to(dtype)
    assert z.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(z, expected, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    assert torch.equal(actual, group_norm(z, groups, weight, bias, **arguments))
    z, actual = residual_group_norm(x, branch, groups, weight, bias, **arguments)
    torch.testing.assert_close(z, x + branch)
    assert torch.equal(actual, group_norm(z, groups, weight, bias, **arguments))
    shifted = group_norm(x, groups, weight, bias, shift=shift, **arguments)
    wanted = exact(x.double() + shift.double()[:, None, None], groups, weight, bias, True)
    error = (shifted.double() - wanted).norm()
    floor = 64 * torch.finfo(torch.float32).eps * wanted.numel() ** 0.5
    assert error <= torch.finfo(dtype).eps * wanted.norm() + floor


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", SHAPES)
def test_residuals_and_shifts_under_the_interpreter(name, dtype, poisoned_memory):
    assert_residual_is_accurate(SHAPES[name], dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_reference_adds_what_a_convolution_leaves(name):
    x, groups, weight, bias = inputs(SHAPES[name], torch.float64)
    branch, shift = x.flip(1), bias.flip(0)
    for left, right in ((None, shift), (branch, None), (branch, shift)):
        total = x + (0 if left is None else left) + (0 if right is None else right[:, None, None])
        if left is None:
            actual = group_norm(x, groups, weight, bias, shift=right, eps=1e-6)
        else:
            z, actual = residual_group_norm(x, left, groups, weight, bias, shift=right, eps=1e-6)
            torch.testing.assert_close(z, total)
        torch.testing.assert_close(actual, exact(total, groups, weight, bias, False))


def chunk_statistics(x, size):
    """In chunks of positions, one after the other."""
    parts = x.double().flatten(2).unflatten(2, (-1, size))
    deviations = parts.var(3, correction=0) * size
    return ChunkStatistics(*(t.transpose(1, 2).float().contiguous() for t in (parts.mean(3), deviations)), size)


@interpreted
@pytest.mark.parametrize("chunks", [1, 3, 128, 259])
def test_statistics_from_elsewhere(chunks, poisoned_memory):
    """As many as the factors take at once, and more, of which the last ones are fewer."""
    x, groups, weight, bias = inputs((2, 40, chunks, 4, 8), torch.float32, mean=30.0)
    shift = weight.flip(0)
    options = {"shift": shift, "eps": 1e-6, "silu": True, "impl": "triton"}
    actual = group_norm(x, groups, weight, bias, statistics=chunk_statistics(x, 4), **options)
    torch.testing.assert_close(actual, group_norm(x, groups, weight, bias, **options), rtol=1e-4, atol=1e-4)
    wrong = chunk_statistics(2 * x, 4)
    assert not torch.allclose(group_norm(x, groups, weight, bias, statistics=wrong, **options), actual, atol=0.1)


def test_statistics_of_another_image_are_refused():
    x, groups, weight, bias = inputs((2, 8, 4, 4, 2), torch.float32)
    for wrong in (chunk_statistics(x[:1], 4), chunk_statistics(x, 4)._replace(chunk_size=8)):
        with pytest.raises(ValueError, match="statistics must be of whole chunks of x"):
            group_norm(x, groups, weight, bias, statistics=wrong)


# output channels, KY, KX
CONVOLUTIONS = {"a picture": (3, 3, 3), "one tap": (16, 1, 1), "not square": (2, 3, 5), "most taps": (7, 3, 3)}


def assert_conv_is_accurate(shape, convolution, dtype, device="cpu"):
    """With and without what may be left out, and weights in either format."""
    x, groups, weight, bias = inputs(shape, dtype, device)
    branch, shift = x.flip(0, 1).contiguous(memory_format=torch.channels_last), torch.roll(weight, 1)
    channels, KY, KX = convolution
    generator = torch.Generator().manual_seed(1)
    conv_weight = torch.randn(channels, x.shape[1], KY, KX, generator=generator) / (x.shape[1] * KY * KX) ** 0.5
    conv_weight, conv_bias = conv_weight.to(device, dtype), torch.randn(channels, generator=generator).to(device, dtype)
    cells = [
        (branch, shift, conv_bias, True, torch.channels_last),
        (None, shift, None, True, torch.contiguous_format),
        (branch, None, conv_bias, False, torch.contiguous_format),
        (None, None, conv_bias, True, torch.channels_last),
    ]
    for added, constant, added_last, silu, layout in cells:
        arguments = (x, groups, weight, bias, conv_weight.contiguous(memory_format=layout), added_last)
        options = {"branch": added, "shift": constant}
        precise = [None if t is None else t.double() for t in arguments[2:] + tuple(options.values())]
        precise = (x.double(), groups, *precise[:4]), dict(zip(options, precise[4:], strict=True))
        expected = group_norm_conv(*precise[0], **precise[1], eps=1e-6, silu=silu, impl="reference")
        eager = group_norm_conv(*arguments, **options, eps=1e-6, silu=silu, impl="reference")
        actual = group_norm_conv(*arguments, **options, eps=1e-6, silu=silu, impl="triton")
        assert actual.dtype == dtype and actual.shape == expected.shape and actual.isfinite().all()
        assert actual.is_contiguous(memory_format=torch.channels_last)
        error, allowed = ((y.double() - expected).norm() for y in (actual, eager))
        floor = 64 * torch.finfo(torch.float32).eps * expected.numel() ** 0.5
        assert error <= 2 * allowed + torch.finfo(dtype).eps * expected.norm() + floor


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("convolution", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_convolutions_under_the_interpreter(name, convolution, dtype, poisoned_memory):
    assert_conv_is_accurate(SHAPES[name], convolution, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("convolution", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (4, 160, 256, 256, 32), (1, 160, 96, 200, 32)], ids=str)
def test_convolutions_on_a_gpu(shape, convolution, dtype, poisoned_memory):
    assert_conv_is_accurate(shape, convolution, dtype, "cuda")


@pytest.mark.gpu
def test_convolution_compiled_and_chosen_on_a_gpu():
    x, groups, weight, bias = inputs(SHAPES["160 of 32"], torch.bfloat16, "cuda")
    for channels, same in ((3, True), (8, False)):
        conv_weight = torch.randn(channels, 160, 3, 3, device="cuda", dtype=torch.bfloat16)

        def f(x, impl="auto", conv_weight=conv_weight):
            return group_norm_conv(x, groups, weight, bias, conv_weight, branch=x, silu=True, impl=impl)

        torch.testing.assert_close(torch.compile(f, fullgraph=True)(x), f(x), rtol=2e-2, atol=2e-1)
        if same:
            assert torch.equal(f(x), f(x, "triton"))
        else:
            with pytest.raises(ValueError, match="72 taps times output channels"):
                f(x, "triton")


def test_convolution_on_the_cpu_is_the_layers():
    x, groups, weight, bias = inputs(SHAPES["odd"], torch.float64)
    layer = torch.nn.Conv2d(12, 5, 3, padding=1).double().requires_grad_(False)
    actual = group_norm_conv(
        x, groups, weight, bias, layer.weight, layer.bias, branch=x, shift=bias, eps=1e-6, silu=True
    )
    torch.testing.assert_close(actual, layer(exact(2 * x + bias[:, None, None], groups, weight, bias, True)))


@pytest.mark.parametrize(
    "conv_weight, conv_bias, message",
    [
        (torch.zeros(3, 5, 3, 3), None, r"conv_weight must be \[O, 4, KY, KX\].* got \[3, 5, 3, 3\]"),
        (torch.zeros(3, 4, 2, 3), None, "KY and KX odd"),
        (torch.zeros(3, 4, 3, 3), torch.zeros(4), r"conv_bias must be \[3\]"),
        (torch.zeros(3, 4, 3, 3).half(), None, "conv_weight must be torch.float32"),
    ],
)
def test_convolutions_that_do_not_fit_are_refused(conv_weight, conv_bias, message):
    with pytest.raises(ValueError, match=message):
        group_norm_conv(torch.zeros(2, 4, 3, 3), 2, torch.zeros(4), torch.zeros(4), conv_weight, conv_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (4, 160, 256, 256, 32), (2, 640, 16, 16, 32)], ids=str)
def test_residuals_and_shifts_on_a_gpu(shape, dtype, poisoned_memory):
    assert_residual_is_accurate(shape, dtype, "cuda")


@pytest.mark.gpu
def test_residual_compiled_on_a_gpu():
    x, groups, weight, bias = inputs(SHAPES["160 of 32"], torch.bfloat16, "cuda")

    def both(x):
        return residual_group_norm(x, x, groups, weight, bias, shift=bias, silu=True)

    for actual, expected in zip(torch.compile(both, fullgraph=True)(x), both(x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (4, 160, 256, 256, 32), (2, 640, 16, 16, 32)], ids=str)
def test_kernels_on_a_gpu(shape, silu, dtype, poisoned_memory):
    assert_accurate(shape, dtype, silu, "cuda")
    assert_accurate(shape, dtype, silu, "cuda", mean=30.0)


@pytest.mark.gpu
def test_compiled_and_chosen_on_a_gpu():
    x, groups, weight, bias = inputs(SHAPES["160 of 32"], torch.bfloat16, "cuda")
    expected = group_norm(x, groups, weight, bias, silu=True, impl="triton")
    assert torch.equal(group_norm(x, groups, weight, bias, silu=True), expected)
    compiled = torch.compile(lambda x: group_norm(x, groups, weight, bias, silu=True), fullgraph=True)
    assert torch.equal(compiled(x), expected)


def test_chunks_are_few_enough_to_combine():
    assert [kernels.chunk_size(side * side) for side in (16, 256, 512, 1024)] == [512, 512, 2048, 8192]
    assert [kernels.chunk_size(256 * 256, images * 5) for images in (1, 16, 1000)] == [512, 2688, 4096]
    for positions in (1, 511, 65537, 100_001, 1 << 22):
        size = kernels.chunk_size(positions)
        assert size % kernels.ROUNDED == 0 and -(-positions // size) <= kernels.MAX_CHUNKS


def test_channel_blocks_divide_the_published_channels():
    assert {C: kernels.channel_block(C) for C in (160, 320, 640, 12, 256)} == {
        160: 32,
        320: 64,
        640: 128,
        12: 16,
        256: 128,
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 4, 3)}, "x must be floats"),
        ({"num_groups": 3}, "must divide the 4 channels"),
        ({"weight": torch.zeros(3)}, r"must be \[4\]"),
        ({"impl": "cuda"}, "unknown impl"),
        ({"shift": torch.zeros(2)}, r"shift must be \[4\]"),
        ({"impl": "triton", "x": torch.zeros(2, 4, 3, 3)}, "not channels-last"),
        ({"impl": "triton", "weight": torch.zeros(4, requires_grad=True)}, "no derivative"),
    ],
)
def test_bad_input_is_refused(change, message):
    x = torch.zeros(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    arguments = {"x": x, "num_groups": 2, "weight": torch.zeros(4), "bias": torch.zeros(4)} | change
    with pytest.raises(ValueError, match=message):
        group_norm(**arguments)


def test_a_branch_unlike_x_is_refused():
    x, vector = torch.zeros(2, 4, 3, 3), torch.zeros(4)
    for branch in (torch.zeros(2, 4, 3, 1), x.half()):
        with pytest.raises(ValueError, match="branch must be"):
            residual_group_norm(x, branch, 2, vector, vector)
