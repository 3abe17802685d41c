"""Transformer blocks of few rows: the operator's checks, and the kernel on a GPU against float64.

The source of the kernel runs on the CPU in test_block_rows_source.py.
"""

import re

import pytest
import torch

from block_cases import case
from hmar_kernels import linear, qk_norm_attention, transformer_blocks
from hmar_kernels.blocks import BlockWeights, Table, cuda, unavailable_on

# images, length: rows of each kernel, images that do not end where tiles of products do
ROWS = [(1, 1), (2, 1), (2, 4), (1, 5), (8, 1), (1, 9), (2, 8), (1, 16), (3, 4), (5, 3), (16, 1)]
ROWS += [(2, 9), (2, 16), (32, 1), (5, 6), (3, 7)]
WIDTHS = [(256, 512, 2), (1024, 4096, 3), (1536, 6144, 2), (1920, 7680, 2), (2304, 9216, 1)]


def test_reference_is_its_operators():
    x, blocks, vectors, most = case(2, 3, 128, 256, 2, torch.float64)
    actual, statistics = transformer_blocks(x.double(), blocks, vectors, max_log_scale=most)
    expected = x.double()
    for block, (gate_1, gate_2, scale_1, scale_2, shift_1, shift_2) in zip(blocks, vectors, strict=True):
        qkv = linear(expected, block.qkv, norm=(scale_1, shift_1))
        attended = qk_norm_attention(qkv, block.q_bias, block.v_bias, block.log_scale, max_log_scale=most)
        expected = linear(attended, block.proj, block.proj_bias, residual=expected, gate=gate_1)
        hidden = linear(expected, block.fc1, block.fc1_bias, norm=(scale_2, shift_2), gelu=True)
        expected = linear(hidden, block.fc2, block.fc2_bias, residual=expected, gate=gate_2)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(statistics[..., 0], actual.unflatten(-1, (-1, 64)).mean(-1).float())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 64)}, r"x must be floats \[B, L, 128\]"),
        ({"x": torch.zeros(3, 128)}, r"x must be floats \[B, L, 128\]"),
        ({"vectors": []}, "vectors of each block"),
        ({"vectors": [[torch.zeros(2, 1, 128)] * 5]}, r"six of \[2, 1, 128\]"),
        ({"vectors": [[torch.zeros(1, 1, 128)] * 6]}, r"six of \[2, 1, 128\]"),
        ({"impl": "triton"}, 'unknown impl "triton"'),
        ({"impl": "cuda"}, 'impl="cuda" cannot run here: it needs a CUDA device'),
    ],
)
def test_bad_input_is_refused(change, message):
    x, blocks, vectors, _ = case(2, 3, 128, 256, 1)
    with pytest.raises(ValueError, match=message):
        transformer_blocks(**{"x": x, "blocks": blocks, "vectors": vectors} | change)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"fc1": torch.zeros(512, 256)}, "fc1 is torch.bfloat16"),
        ({"fc2_bias": torch.zeros(3).bfloat16()}, r"fc2_bias is torch.bfloat16 \[256\]"),
        ({"proj": torch.zeros(256, 512).bfloat16()[:, ::2]}, "proj is contiguous"),
        ({"v_bias": torch.zeros(255)}, r"v_bias is torch.float32 \[256\]"),
        ({"q_bias": torch.zeros(256).half()}, r"q_bias is torch.float32 \[256\], got torch.float16"),
        ({"log_scale": torch.zeros(8)}, r"log_scale is torch.float32 \[4\]"),
    ],
)
def test_what_the_kernel_does_not_take(change, reason):
    _, blocks, _, _ = case(1, 2, 256, 512, 2)
    actual = cuda.refusal([blocks[0], blocks[1]._replace(**change)])
    assert actual is None if reason is None else re.search(reason, actual)


def test_sizes_and_rows_that_the_kernel_does_not_take():
    sizes = torch.bfloat16, 256, 512
    assert cuda.refusal_of_sizes(*sizes, 64) is None
    assert "1 to 64 blocks, got 65" in cuda.refusal_of_sizes(*sizes, 65)
    assert "multiple of 64, at least 256, got 192" in cuda.refusal_of_sizes(torch.bfloat16, 192, 512, 1)
    assert "multiple of 64, at least 256, got 520" in cuda.refusal_of_sizes(torch.bfloat16, 256, 520, 1)
    assert "not torch.float32" in cuda.refusal_of_sizes(torch.float32, 256, 512, 1)
    vectors = [[torch.zeros(1, 1, 256).bfloat16()] * 6]
    assert cuda.refusal_of_rows(torch.zeros(1, 16, 256), vectors, torch.bfloat16) is None
    assert cuda.refusal_of_rows(torch.zeros(2, 16, 256), vectors, torch.bfloat16) is None
    assert "at most 32, got 34" in cuda.refusal_of_rows(torch.zeros(2, 17, 256), vectors, torch.bfloat16)
    assert "at most 16 rows, got 17" in cuda.refusal_of_rows(torch.zeros(1, 17, 256), vectors, torch.bfloat16)
    assert "float32, got torch.bfloat16" in cuda.refusal_of_rows(
        torch.zeros(1, 2, 256).bfloat16(), vectors, torch.bfloat16
    )
    assert "torch.float16 as the weights" in cuda.refusal_of_rows(torch.zeros(1, 2, 256), vectors, torch.float16)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        Table(case(1, 2, 256, 512, 1)[1])


def assert_accurate(actual, x, blocks, vectors, max_log_scale):
    y, statistics = actual
    exact = [BlockWeights(*(t.double() for t in block)) for block in blocks]
    options = {"max_log_scale": max_log_scale, "impl": "reference"}
    expected, _ = transformer_blocks(x.double(), exact, [[t.double() for t in v] for v in vectors], **options)
    eager, _ = transformer_blocks(x, blocks, vectors, **options)
    error, allowed = ((t.double() - expected).norm() for t in (y, eager))
    assert y.isfinite().all() and error <= 2 * allowed
    tiles = y.double().unflatten(-1, (-1, 64))
    squares = (tiles - tiles.mean(-1, keepdim=True)).square().sum(-1)
    torch.testing.assert_close(statistics.double(), torch.stack([tiles.mean(-1), squares], -1), rtol=1e-4, atol=1e-4)


def skip_without_kernel(dtype=torch.bfloat16):
    reason = unavailable_on(torch.device("cuda"), dtype, 256, 512, cuda.HEAD_DIM, 1)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("images, length", ROWS)
@pytest.mark.parametrize("sizes", WIDTHS, ids=str)
def test_blocks_on_a_gpu(sizes, images, length, poisoned_memory):
    skip_without_kernel()
    given = x, blocks, vectors, most = case(images, length, *sizes, device="cuda")
    actual = transformer_blocks(x, blocks, vectors, max_log_scale=most, impl="cuda")
    assert_accurate(actual, *given)


@pytest.mark.gpu
@pytest.mark.parametrize("images, length", [(2, 3), (1, 16), (2, 8), (2, 9), (2, 16)])
def test_blocks_on_a_gpu_in_half_precision(images, length, poisoned_memory):
    skip_without_kernel(torch.float16)
    given = x, blocks, vectors, most = case(images, length, 1024, 4096, 2, torch.float16, "cuda")
    assert_accurate(transformer_blocks(x, blocks, vectors, max_log_scale=most, impl="cuda"), *given)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [8, 16])
def test_launches_on_a_gpu_are_alike_and_can_be_captured(length, poisoned_memory):
    """One after the other without a pause, in a graph, of inputs that change: counters are left as they were found."""
    skip_without_kernel()
    x, blocks, vectors, most = case(2, length, 1536, 6144, 4, device="cuda")
    table = Table(blocks)
    options = {"max_log_scale": most, "impl": "cuda"}
    first = transformer_blocks(x, table, vectors, **options)
    for _ in range(50):
        again = transformer_blocks(x, table, vectors, **options)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = transformer_blocks(x, table, vectors, **options)
        captured, _ = transformer_blocks(captured, table, vectors, **options)
    expected, _ = transformer_blocks(first[0], table, vectors, **options)
    for _ in range(20):
        graph.replay()
    assert torch.equal(captured, expected)
    x.mul_(0.5)
    graph.replay()
    half, _ = transformer_blocks(x, table, vectors, **options)
    assert torch.equal(captured, transformer_blocks(half, table, vectors, **options)[0])
    assert table.counters.tolist() == [0, 0]


@pytest.mark.gpu
def test_images_on_a_gpu_depend_on_no_others(poisoned_memory):
    skip_without_kernel()
    x, blocks, vectors, most = case(4, 3, 1024, 4096, 2, device="cuda")
    options = {"max_log_scale": most, "impl": "cuda"}
    expected, _ = transformer_blocks(x, blocks, vectors, **options)
    x[1] = float("nan")
    actual, _ = transformer_blocks(x, blocks, vectors, **options)
    others = [0, 2, 3]
    assert torch.equal(actual[others], expected[others]) and actual[1].isnan().any()


@pytest.mark.gpu
def test_weights_and_vectors_in_other_places(poisoned_memory):
    """Vectors that are not side by side, or misaligned, and weights written to after the table was made."""
    skip_without_kernel()
    x, blocks, vectors, most = case(2, 2, 256, 512, 2, device="cuda")
    options = {"max_log_scale": most, "impl": "cuda"}
    expected, _ = transformer_blocks(x, blocks, vectors, **options)
    apart = [[vector.clone() for vector in given] for given in vectors]
    apart[0][2] = torch.cat([apart[0][2].flatten()[:1], apart[0][2].flatten()])[1:].view(2, 1, 256)
    assert torch.equal(transformer_blocks(x, blocks, apart, **options)[0], expected)
    table = Table(blocks)
    for block in blocks:
        block.q_bias.mul_(3), block.log_scale.add_(0.5), block.fc1.mul_(0.5), block.fc2_bias.neg_()
    assert_accurate(transformer_blocks(x, table, vectors, **options), x, blocks, vectors, most)
