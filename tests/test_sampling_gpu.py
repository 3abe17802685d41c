"""The sampling kernels on a GPU: equal to the reference but for near ties, and right in distribution."""

import pytest
import torch

from hmar_kernels import sample_codes
from hmar_kernels.sampling import cuda, reference

pytestmark = pytest.mark.gpu

SETTINGS = [{}, {"top_k": 900}, {"top_p": 0.96}, {"top_k": 900, "top_p": 0.96, "temperature": 0.8}, {"greedy": True}]
NEAR = 1e-4  # exp and log of the GPU differ from the reference's in the last bits


@pytest.fixture(params=["triton", "cuda"])
def impl(request):
    if request.param == "cuda":
        reason = cuda.unavailable(torch.device("cuda", 0), torch.float32, cuda.MAX_CODES)
        if reason is not None:
            pytest.skip(reason)
    return request.param


def cell(dtype, num_codes, batch=3, tokens=200):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = 2 * torch.randn(2, batch, tokens, num_codes, generator=generator, device="cuda")
    seeds = torch.tensor([5, 2**62 + 9, 5], device="cuda")[:batch]
    positions = torch.arange(tokens, device="cuda") + 680
    return *logits.to(dtype), dict(seeds=seeds, positions=positions, guidance=torch.linspace(0.2, 3, batch).cuda())


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("num_codes", [37, 4096, 4098, 8192, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_equals_the_reference_but_for_near_ties(impl, dtype, num_codes, options, poisoned_memory):
    if impl == "cuda" and num_codes > cuda.MAX_CODES:
        pytest.skip(cuda.unavailable(torch.device("cuda", 0), dtype, num_codes))
    conditional, unconditional, arguments = cell(dtype, num_codes)
    actual = sample_codes(conditional, unconditional, impl=impl, **arguments, **options)
    expected = sample_codes(conditional, unconditional, impl="reference", **arguments, **options)
    assert not actual.nonfinite.any() and not expected.nonfinite.any()
    same = actual.codes == expected.codes
    assert same.double().mean() > 0.995
    torch.testing.assert_close(actual.confidence[same], expected.confidence[same], rtol=NEAR, atol=1e-7)
    # Where the codes differ, both have nearly the same score, or truncation passes between them.
    strength = arguments["guidance"][:, None, None]
    logits = (1 + strength) * conditional.float() - strength * unconditional.float()
    x = logits * (1 if options.get("greedy") else 1 / options.get("temperature", 1.0))
    scores = (x - x.amax(-1, keepdim=True)).exp().double()
    if not options.get("greedy"):
        positions = arguments["positions"].expand(len(x), -1)
        scores /= reference.exponential_noise(arguments["seeds"], positions, 0, num_codes)
    won = [scores.gather(-1, drawn.codes[..., None]).squeeze(-1)[~same] for drawn in (actual, expected)]
    near_tie = (won[0] / won[1] - 1).abs() < NEAR
    assert near_tie.all() or ("top_p" in options and (~near_tie).double().sum() < 0.002 * same.numel())


@pytest.mark.parametrize("top_k", [1, 2, 900, 4095])
def test_top_k_is_the_exact_set(impl, top_k):
    """Sixteen-bit logits tie often; all draws of many steps lie in the set, and the confidence is that of the set."""
    conditional, _, arguments = cell(torch.bfloat16, 4096, batch=1, tokens=64)
    kept = reference.kept_codes(conditional.float(), top_k, 0.0)
    probs = conditional.float().masked_fill(~kept, -torch.inf).softmax(-1)
    del arguments["guidance"]
    for step in range(50):
        drawn = sample_codes(conditional, top_k=top_k, step=step, impl=impl, **arguments)
        assert kept.gather(-1, drawn.codes[..., None]).all()
        expected = probs.gather(-1, drawn.codes[..., None]).squeeze(-1)
        torch.testing.assert_close(drawn.confidence, expected, rtol=NEAR, atol=1e-9)


def test_draws_follow_the_distribution(impl):
    logits = (2 * torch.randn(64, generator=torch.Generator().manual_seed(1))).cuda()
    n, seeds = 400_000, torch.tensor([3], device="cuda")
    options = dict(seeds=seeds, positions=torch.arange(n, device="cuda"), top_k=40, top_p=0.9)
    codes = sample_codes(logits.expand(1, n, 64), impl=impl, **options).codes
    kept = reference.kept_codes(logits, 40, 0.9)
    expected = n * logits.masked_fill(~kept, -torch.inf).double().softmax(-1)
    counts = torch.bincount(codes.flatten(), minlength=64)
    assert not counts[~kept].any()
    degrees = int(kept.sum()) - 1
    chi_square = ((counts - expected)[kept].square() / expected[kept]).sum().item()
    assert abs(chi_square - degrees) < 4.5 * (2 * degrees) ** 0.5


def test_logits_that_are_not_finite_are_reported(impl):
    conditional, unconditional, arguments = cell(torch.bfloat16, 4096)
    conditional[0, 3, 4095], unconditional[2, 199, 0], conditional[1, 0, 7] = torch.nan, torch.inf, -torch.inf
    drawn = sample_codes(conditional, unconditional, **arguments, top_k=900, top_p=0.96, impl=impl)
    assert drawn.nonfinite.nonzero().tolist() == [[0, 3], [1, 0], [2, 199]]
    assert (drawn.codes[drawn.nonfinite] == 0).all() and drawn.confidence[drawn.nonfinite].isnan().all()


@pytest.mark.parametrize("top_k, top_p", [(700, 0.0), (0, 0.6), (900, 0.3)])
def test_many_equal_codes(impl, top_k, top_p):
    """Equal ones, and neighbours among others far away, which crowd a bin."""
    seeds, positions = torch.tensor([3, 4], device="cuda"), torch.arange(100, device="cuda")
    options = {"seeds": seeds, "positions": positions, "top_k": top_k, "top_p": top_p}
    equal = torch.randn(2, 100, 1000, generator=torch.Generator().manual_seed(0)).clamp(-0.5, 0.5)
    crowded = (1 + torch.arange(1000) * 2.0**-23).repeat(2, 100, 1)
    crowded[..., 0], crowded[..., 1] = -3e38, 3.0
    for logits in (equal.cuda(), crowded.cuda()):
        actual, expected = (sample_codes(logits, impl=by, **options) for by in (impl, "reference"))
        same = actual.codes == expected.codes
        assert same.double().mean() > 0.99
        torch.testing.assert_close(actual.confidence[same], expected.confidence[same], rtol=NEAR, atol=1e-7)
        if not top_p:
            assert reference.kept_codes(logits, top_k, top_p).gather(-1, actual.codes[..., None]).all()


@pytest.mark.parametrize("impl", ["triton", "cuda", "auto"], indirect=True)
def test_in_a_cuda_graph_and_compiled(impl):
    conditional, unconditional, arguments = cell(torch.bfloat16, 4096)

    def draw(conditional, unconditional, seeds):
        options = arguments | {"seeds": seeds, "top_k": 900, "top_p": 0.96}
        return sample_codes(conditional, unconditional, **options, impl=impl, overlap=True)

    seeds = arguments["seeds"].clone()
    expected = draw(conditional, unconditional, seeds)
    compiled = torch.compile(draw, fullgraph=True)(conditional, unconditional, seeds)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draw(conditional, unconditional, seeds)
    graph.replay()
    for actual in (compiled, captured):
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    seeds.add_(1)
    graph.replay()
    assert torch.equal(captured.codes, draw(conditional, unconditional, seeds).codes)
    assert not torch.equal(captured.codes, expected.codes)
