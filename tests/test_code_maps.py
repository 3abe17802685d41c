"""Maps of codes: the kernels against float64 by the one rule of accuracy, in place, and what they may not mix."""

import pytest
import torch

from hmar.pyramid import SIDES_BY_RESOLUTION
from hmar_kernels import accumulate_codes_, map_codes, token_embedding
from hmar_kernels.code_maps import choose
from hmar_kernels.code_maps import triton as kernels
from operator_cases import Draw, assert_within_limits, in_float64

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels run there")
# images, side of the codes, of the map, of the next scale (0: none), dimensions, codes of the table
SHAPES = {
    "one code": (1, 1, 4, 2, 8, 5),
    "odd": (3, 3, 7, 5, 6, 11),
    "no next scale": (2, 5, 5, 0, 32, 20),
    "more than a tile": (2, 13, 17, 16, 12, 40),
    "most rows, two tiles of dimensions": (1, 3, kernels.MAX_SIDE, kernels.MAX_SIDE, 40, 9),
}
PUBLISHED = {
    f"{batch} x {px} px, {n} to {following}": (batch, n, sides[-1], following, 32, 4096)
    for batch, px in ((1, 256), (3, 512), (2, 1024))
    for sides in (SIDES_BY_RESOLUTION[px],)
    for n, following in zip(sides, (*sides[1:-1], 0, 0), strict=True)
}
TENSORS = ("codes", "table", "row_matrix", "column_matrix")


def map_inputs(batch, n, m, following, dims, vocabulary, *, device="cpu", dtype=torch.float32):
    draw = Draw(device)
    inputs = {
        "f": draw(batch, m, m, dims, dtype=dtype),
        "table": draw(3, vocabulary, 3 * dims, dtype=dtype),
        "row_matrix": draw(m, 3 * n, dtype=dtype),
        "column_matrix": draw(m, 3 * n, dtype=dtype),
        "downsample": draw(following, m, dtype=dtype) if following else None,
    }
    generator = torch.Generator().manual_seed(1)
    return inputs | {"codes": torch.randint(vocabulary, (batch, n * n), generator=generator).to(device)}


def run(inputs, impl, **options):
    """Both operators; f is left as it was."""
    given, f = [inputs[name] for name in TENSORS], inputs["f"].clone()
    following = accumulate_codes_(f, *given, inputs["downsample"], impl=impl, **options)
    assert (following is None) == (inputs["downsample"] is None)
    outputs = {"map": map_codes(*given, impl=impl, **options), "f": f}
    return outputs if following is None else outputs | {"next": following}


def assert_accurate(shape, device="cpu", **options):
    inputs = map_inputs(*shape, device=device)
    exact = run(in_float64(inputs), "reference")
    assert_within_limits(run(inputs, "triton", **options), exact, run(inputs, "reference"), torch.float32)


@pytest.mark.parametrize("name", ["one code", "odd", "no next scale"])
def test_reference_is_the_sum_over_taps(name):
    inputs = map_inputs(*SHAPES[name], dtype=torch.float64)
    batch, n, m, _, dims, _ = SHAPES[name]
    taps = inputs["table"][:, inputs["codes"]].view(3, batch, n, n, 3, dims)
    rows, columns = inputs["row_matrix"].view(m, 3, n), inputs["column_matrix"].view(m, n, 3)
    expected = torch.einsum("rdi,dbijxe,cjx->brce", rows, taps, columns)
    outputs = run(inputs, "reference")
    torch.testing.assert_close(outputs["map"], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs["f"], inputs["f"] + expected, rtol=1e-12, atol=1e-12)
    if inputs["downsample"] is not None:
        following = torch.einsum("pr,brce,qc->bpqe", inputs["downsample"], outputs["f"], inputs["downsample"])
        torch.testing.assert_close(outputs["next"], following, rtol=1e-12, atol=1e-12)


@interpreted
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_under_the_interpreter(name, poisoned_memory):
    assert_accurate(SHAPES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapping"])
@pytest.mark.parametrize("name", SHAPES | PUBLISHED)
def test_kernels_on_a_gpu(name, overlap, poisoned_memory):
    assert_accurate((SHAPES | PUBLISHED)[name], "cuda", overlap=overlap)


def assert_strides_do_not_matter(device):
    inputs = map_inputs(*SHAPES["odd"], device=device)
    expected = run(inputs, "triton")
    strided = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in inputs.items() if name != "f"}
    among_others = torch.cat([inputs["codes"] + 99, inputs["codes"]], dim=1)[:, inputs["codes"].shape[1] :]
    for codes in (strided["codes"], among_others):
        actual = run(inputs | strided | {"codes": codes}, "triton")
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@interpreted
def test_strides_do_not_matter():
    assert_strides_do_not_matter("cpu")


@pytest.mark.gpu
def test_strides_do_not_matter_on_a_gpu():
    assert_strides_do_not_matter("cuda")


@pytest.mark.gpu
def test_in_a_graph_with_kernels_before_and_behind_on_a_gpu():
    """Other codes at every replay; what is read by a kernel that may start early, and memory that is used again."""
    inputs = map_inputs(2, 13, 16, 10, 32, 4096, device="cuda")
    given, downsample = [inputs[name] for name in TENSORS], inputs["downsample"]
    dims, width = inputs["f"].shape[-1], 48
    weight, scale = torch.randn(width, dims, device="cuda"), torch.randn(width, device="cuda")
    position = {side: torch.randn(side * side, width, device="cuda") for side in (16, 10)}

    def steps(f, overlap):
        def embedded(x_BhwE):
            n = x_BhwE.shape[1]
            x_BLE = x_BhwE.reshape(len(x_BhwE), n * n, dims)
            return token_embedding(x_BLE, weight, scale, position[n], scale, impl="triton", overlap=overlap)

        outputs = []
        for _ in range(3):
            outputs.append(embedded(map_codes(*given, impl="triton", overlap=overlap)))
            outputs.append(embedded(accumulate_codes_(f, *given, downsample, impl="triton", overlap=overlap)))
        return outputs

    f = inputs["f"].clone()
    steps(f, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f.copy_(inputs["f"])
        outputs = steps(f, True)
    for _ in range(20):
        inputs["codes"].random_(4096)
        inputs["f"].normal_()
        expected_f = inputs["f"].clone()
        expected = steps(expected_f, False)
        graph.replay()
        assert torch.equal(f, expected_f)
        assert all(torch.equal(x, y) for x, y in zip(outputs, expected, strict=True))


def test_traced_by_torch_compile_without_a_graph_break():
    inputs = map_inputs(*SHAPES["odd"])
    expected = run(inputs, "reference")
    actual = torch.compile(lambda: run(inputs, "auto"), fullgraph=True, backend="aot_eager")()
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


def test_auto_is_the_reference_where_the_kernels_cannot_run():
    for change, reason in (
        ({"m": kernels.MAX_SIDE + 1}, "up to 64 rows"),
        ({"dtype": torch.float64}, "float32"),
    ):
        sizes = {"batch": 1, "n": 2, "m": 3, "following": 2, "dims": 4, "vocabulary": 5} | change
        inputs = map_inputs(**sizes)
        impl, found = choose(*(inputs[name] for name in TENSORS))
        assert impl == "reference" and reason in found
        assert run(inputs, "auto")["map"].dtype == inputs["table"].dtype


@pytest.mark.parametrize(
    "change, message",
    [
        ({"table": torch.zeros(2, 11, 18)}, r"table must be floats \[3, V, 3 E\]"),
        ({"row_matrix": torch.zeros(7, 6)}, r"must be \[m, 3 n\]"),
        ({"column_matrix": torch.zeros(6, 9)}, r"must be \[m, 3 n\]"),
        ({"codes": torch.zeros(3, 8, dtype=torch.int64)}, r"codes must be int64 \[B, 9\]"),
        ({"codes": torch.zeros(3, 9, dtype=torch.int32)}, "got torch.int32"),
        ({"column_matrix": torch.zeros(7, 9).double()}, "one dtype"),
        ({"column_matrix": torch.zeros(7, 9, device="meta")}, "column_matrix is on meta"),
        ({"f": torch.zeros(3, 7, 6, 6)}, r"f must be contiguous torch.float32 \[3, 7, 7, 6\]"),
        ({"f": torch.zeros(3, 7, 7, 12)[..., ::2]}, r"strides \[588, 84, 12, 2\]"),
        ({"f": torch.zeros(3, 7, 7, 6, device="meta")}, "f is on meta"),
        ({"downsample": torch.zeros(5, 7, device="meta")}, "downsample is on meta"),
        ({"f": torch.zeros(3, 7, 7, 6, requires_grad=True)}, "no derivative"),
        ({"downsample": torch.zeros(5, 7, requires_grad=True)}, "no derivative"),
        ({"downsample": torch.zeros(5, 6)}, r"\[n', 7\]"),
        ({"downsample": torch.zeros(8, 7)}, "no more rows"),
        ({"downsample": torch.zeros(5, 7).half()}, "got torch.float16"),
        ({"impl": "cuda"}, "unknown impl"),
    ],
)
def test_bad_input_is_refused(change, message):
    inputs = map_inputs(*SHAPES["odd"]) | {name: x for name, x in change.items() if name != "impl"}
    f, before = inputs["f"], inputs["f"].clone()
    with pytest.raises(ValueError, match=message):
        accumulate_codes_(f, *(inputs[name] for name in TENSORS), inputs["downsample"], impl=change.get("impl", "auto"))
    assert f.is_meta or torch.equal(f, before)


def test_implementations_that_cannot_run_are_refused():
    for change, reason in (({"dtype": torch.float64}, "float32"), ({"m": kernels.MAX_SIDE + 1}, "up to 64 rows")):
        sizes = {"batch": 1, "n": 2, "m": 3, "following": 2, "dims": 4, "vocabulary": 5} | change
        inputs = map_inputs(**sizes)
        given, before = [inputs[name] for name in TENSORS], inputs["f"].clone()
        with pytest.raises(ValueError, match=f'impl="triton" cannot run here: .*{reason}'):
            map_codes(*given, impl="triton")
        with pytest.raises(ValueError, match=f'impl="triton" cannot run here: .*{reason}'):
            accumulate_codes_(inputs["f"], *given, inputs["downsample"], impl="triton")
        assert torch.equal(inputs["f"], before)


def test_derivatives_are_refused():
    inputs = map_inputs(*SHAPES["odd"])
    given = [inputs[name] for name in TENSORS]
    given[1].requires_grad_()
    with pytest.raises(ValueError, match="no derivative"):
        map_codes(*given)
    with torch.no_grad():
        map_codes(*given)
