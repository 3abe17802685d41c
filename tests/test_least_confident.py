"""Which codes stay hidden: the kernel is the stable sort, to the place, whatever the confidences are."""

import math

import pytest
import torch

from hmar_kernels import least_confident

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernel runs there")
SHAPES = {"one code": (1, 1), "odd": (3, 9), "a block": (2, 32), "two turns": (2, 145), "three turns": (1, 300)}


def confidences(kind, batch, length, device="cpu"):
    x = torch.rand(batch, length, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        x = (4 * x).round() / 4
    if kind == "odd":  # both zeros, negative ones, infinities, the smallest floats, NaN of either sign
        values = [0.0, -0.0, -1.0, math.inf, -math.inf, 1e-45, -1e-45, math.nan, -math.nan, 1.0, 0.5]
        x = torch.tensor(values)[(len(values) * x).long().clamp_max(len(values) - 1)]
    return x.to(device)


def assert_sorted(kind, batch, length, device="cpu"):
    confidence = confidences(kind, batch, length, device)
    some = torch.arange(batch * length, device=device).view(batch, length) % 3 > 0
    for hidden in (None, some, torch.zeros_like(some)):
        for count in {1, max(1, length // 3), length}:
            options = {"count": count, "first": 14}
            actual = least_confident(confidence, hidden, **options, impl="triton")
            # NOTE: on the CPU, for sorts on a GPU may take NaN of negative sign for the smallest.
            seen = None if hidden is None else hidden.cpu()
            expected = least_confident(confidence.cpu(), seen, **options, impl="reference")
            for name, x, y in zip(actual._fields, actual, expected, strict=True):
                assert x.dtype == y.dtype and torch.equal(x.cpu(), y), (name, hidden is None, count)


@interpreted
@pytest.mark.parametrize("kind", ["random", "ties", "odd"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_under_the_interpreter(name, kind, poisoned_memory):
    assert_sorted(kind, *SHAPES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "ties", "odd"])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (32, 9), (32, 256), (2, 4096)], ids=str)
def test_kernel_on_a_gpu(shape, kind, poisoned_memory):
    assert_sorted(kind, *shape, "cuda")


@pytest.mark.gpu
def test_in_a_graph_on_a_gpu():
    confidence = confidences("ties", 3, 25, "cuda")
    hidden = torch.arange(75, device="cuda").view(3, 25) % 4 > 0
    expected = least_confident(confidence, hidden, count=7, first=5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = least_confident(confidence * 2 / 2, hidden, count=7, first=5)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=interpreted)])
def test_by_hand(impl):
    """Hidden ones by rising confidence, equal ones by place, then visible ones."""
    confidence = torch.tensor([[0.9, 0.2, 0.2, 0.1, 0.5], [math.nan, 0.3, 0.9, math.nan, 0.2]])
    hidden = torch.tensor([[True, True, True, False, True], [True, True, False, True, False]])
    places, positions, still = least_confident(confidence, hidden, count=3, first=30, impl=impl)
    assert places.tolist() == [[1, 2, 4], [1, 2, 4]] and positions.tolist() == [[31, 32, 34], [31, 32, 34]]
    assert still.tolist() == [[False, True, True, False, True], [False, True, True, False, True]]
    assert least_confident(confidence, count=5, impl=impl).places.tolist() == [[3, 1, 2, 4, 0], [4, 1, 2, 0, 3]]


@interpreted
def test_strides_do_not_matter():
    confidence, hidden = confidences("ties", 9, 4).T, (torch.arange(36).view(9, 4) % 3 > 0).T
    actual = least_confident(confidence, hidden, count=4, impl="triton")
    expected = least_confident(confidence.contiguous(), hidden.contiguous(), count=4, impl="reference")
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"confidence": torch.zeros(5)}, r"floats \[images, codes\]"),
        ({"confidence": torch.zeros(2, 5, dtype=torch.int64)}, "must be floats"),
        ({"hidden": torch.ones(2, 4, dtype=torch.bool)}, r"hidden must be bool \[2, 5\]"),
        ({"hidden": torch.ones(2, 5)}, "got torch.float32"),
        ({"hidden": torch.ones(2, 5, dtype=torch.bool, device="meta")}, "hidden is on meta"),
        ({"count": 0}, "count is 0"),
        ({"count": 6}, "from 1 to the 5 codes"),
        ({"impl": "cuda"}, "unknown impl"),
        ({"impl": "triton", "confidence": torch.zeros(2, 5).double()}, "takes float32"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        least_confident(**({"confidence": torch.zeros(2, 5), "count": 2} | change))
