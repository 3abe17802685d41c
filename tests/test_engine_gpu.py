"""The engine's CUDA graphs against the same steps one by one, to the bit, and their memory."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from engine_cases import CLASSES, CONFIG, KINDS, PYRAMID, SAMPLINGS, build, build_tokenizer, holes, plain, sampling_for
from hmar.config import PRESETS
from hmar.engine import ATTENTIONS, DECODERS, PRODUCTS, Engine, FusedBlocks
from hmar.generate import SamplingConfig
from hmar.model import HMAR, NextScaleTransformer
from hmar.pyramid import Pyramid
from hmar.serve import Request, Server
from hmar.tokenizer import Tokenizer

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer().cuda()


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return build(request.param).cuda()


@pytest.fixture(scope="module")
def pairs(tokenizer):
    """By model and dtype: the engine that captures, and the one that does not."""
    return cache(lambda model, dtype: [Engine(model, tokenizer, dtype=dtype, capture=flag) for flag in (True, False)])


def assert_equal(actual, expected):
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("edited", [False, True], ids=["new", "edited"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_graphs_give_what_the_steps_give(pairs, model, name, edited, dtype):
    sampling, known = sampling_for(model, name), holes() if edited else None
    captured, stepwise = pairs(model, dtype)
    for seed in (1, 2, 1):
        arguments = {"sampling": replace(sampling, seed=seed), "known": known}
        assert_equal(
            captured.generate(CLASSES.roll(seed), **arguments), stepwise.generate(CLASSES.roll(seed), **arguments)
        )


def test_float32_codes_are_those_of_the_plain_functions(pairs, model, tokenizer, monkeypatch):
    """Greedy, where only a near tie of two codes could be rounded away."""
    # NOTE: the quantizer's convolutions would take TF32; the engine has matrices instead of them.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    sampling = sampling_for(model, "greedy")
    expected = plain(model, tokenizer, CLASSES, sampling)
    actual = pairs(model, None)[0].generate(CLASSES, sampling)
    assert torch.equal(actual.codes_BL, expected.codes_BL)
    torch.testing.assert_close(actual.images_BCHW, expected.images_BCHW, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("decoder", "convolutions"), [*((name, None) for name in DECODERS), ("fused", "hopper"), ("transposed", "hopper")]
)
@pytest.mark.parametrize("side", [16, 64])
def test_decoders_of_the_published_size(decoder, convolutions, side):
    """bfloat16 images of every decoder against float32 ones."""
    if convolutions == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the convolutions need compute capability 9.0")
    torch.manual_seed(0)
    with torch.device("cuda"):
        published = Tokenizer(PRESETS["d16-256"][0], Pyramid((1, side))).eval().requires_grad_(False)
    config = replace(CONFIG, code_dim=32, vocab_size=4096, sides=(1, side))
    model = HMAR(config).cuda()
    f_hat = torch.randn(2, 32, side, side, device="cuda")
    with torch.no_grad():
        expected = Engine(model, published, decoder="modules", capture=False).decode(f_hat)
        reference = published.bfloat16().decode_f_hat(f_hat.bfloat16())
    published.float()
    options = {"decoder": decoder, "convolutions": convolutions, "capture": False}
    actual = Engine(model, published, dtype=torch.bfloat16, **options).decode(f_hat)
    error, allowed = ((images.float() - expected).norm() for images in (actual, reference))
    assert actual.isfinite().all() and error <= 2 * allowed


def runnable(model, tokenizer, dtype):
    """Of PRODUCTS those that can run here with such a model."""
    for name in PRODUCTS:
        try:
            Engine(model, tokenizer, dtype=dtype, products=name)
        except ValueError as error:
            assert f'products="{name}" cannot run here' in str(error)
        else:
            yield name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_products_and_attention_by_either_implementation(model, tokenizer, dtype):
    """Graphs equal steps, and codes of one image are those of cuBLAS's products but for what rounding turns."""
    sampling = replace(sampling_for(model, "default"), seed=3)
    outputs = []
    for choices in product(runnable(model, tokenizer, dtype), ATTENTIONS):
        options = dict(zip(("products", "attention"), choices, strict=True), dtype=dtype)
        engines = [Engine(model, tokenizer, capture=flag, **options) for flag in (True, False)]
        captured, stepwise = (engine.generate(CLASSES[:1], sampling) for engine in engines)
        assert_equal(captured, stepwise)
        outputs.append(captured.codes_BL)
    assert all((codes_BL == outputs[0]).double().mean() > 0.5 for codes_BL in outputs)


@pytest.mark.parametrize("kind", ["hmar", "var"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("products", PRODUCTS)
def test_overlap_changes_nothing(kind, batch, products):
    """d16 at 256 px, graphs of many images one after another, to the bit."""
    torch.manual_seed(0)
    tokenizer_config, config = PRESETS["d16-256"]
    with torch.device("cuda"):
        tokenizer = Tokenizer(tokenizer_config, config.pyramid).eval()
        model = (HMAR(config) if kind == "hmar" else NextScaleTransformer(config, "block_causal")).eval()
        torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
        for name, parameter in model.named_parameters():
            if name.endswith("head.linear.weight"):
                parameter.data.mul_(50)
    if products not in runnable(model, tokenizer, torch.bfloat16):
        pytest.skip(f"{products} cannot run here")
    engines = [
        Engine(model, tokenizer, dtype=torch.bfloat16, products=products, overlap=overlap) for overlap in (False, True)
    ]
    together = [isinstance(module, FusedBlocks) for module in engines[0].model.modules()]
    assert any(together) == (products == "blocks")
    for seed in range(8):
        sampling = SamplingConfig(cfg=1.5, top_k=900, top_p=0.96, seed=seed)
        classes = torch.arange(seed, seed + batch)
        assert_equal(*(engine.generate(classes, sampling) for engine in engines))


def test_programs_share_memory_and_stay_right_in_any_order(model, tokenizer):
    engine, stepwise = (Engine(model, tokenizer, dtype=torch.bfloat16, capture=flag) for flag in (True, False))
    classes = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    sampling = sampling_for(model, "default")
    expected = {n: stepwise.generate(classes[:n], sampling) for n in (1, 2, 8)}
    for n in (8, 1, 2, 8, 2, 1, 8):
        assert_equal(engine.generate(classes[:n], sampling), expected[n])
    assert len(engine.programs) == 3


def test_memory_is_bounded_and_given_back(tokenizer):
    engine = Engine(build("hmar").cuda(), tokenizer, max_bytes=1)
    first = engine.generate(CLASSES)
    assert len(engine.programs) == 1 and engine.graph_bytes > 0
    engine.generate(CLASSES[:1])
    assert [settings.batch for settings in engine.programs] == [1], "one program over the bound stays, alone"
    assert_equal(engine.generate(CLASSES), first)
    engine.forget()
    assert engine.graph_bytes == 0 and not engine.programs
    assert_equal(engine.generate(CLASSES), first)


def test_a_server_answers_from_graphs_as_step_by_step(tokenizer):
    """Batches that are filled up to captured sizes, by a thread of its own, with previews."""
    model = build("hmar").cuda()
    sampling, seen = SAMPLINGS["default"], []
    requests = [Request(i % 5, seed=i, sampling=sampling) for i in range(7)]
    requests[5] = replace(requests[5], on_preview=lambda k, image: seen.append((k, image)))
    with Server(Engine(model, tokenizer, dtype=torch.bfloat16), batch_sizes=(1, 2, 4)) as server:
        found = [future.result(120) for future in server.submit(*requests)]
        found += [future.result(120) for future in server.submit(requests[0])]
    with Server(Engine(model, tokenizer, dtype=torch.bfloat16, capture=False), batch_sizes=(1, 2, 4)) as server:
        expected = [future.result(120) for future in server.submit(*requests[:4])]
        expected += [future.result(120) for future in server.submit(*requests[4:6], requests[6], requests[6])][:3]
        expected += [future.result(120) for future in server.submit(requests[0])]
    for image, other in zip(found, expected, strict=True):
        assert torch.equal(image.codes_L, other.codes_L) and torch.equal(image.image_CHW, other.image_CHW)
    assert [k for k, _ in seen] == [*range(PYRAMID.num_scales)] * 2
    torch.testing.assert_close(seen[PYRAMID.num_scales - 1][1].cpu(), found[5].image_CHW.cpu(), atol=0.05, rtol=0.05)


def test_batches_of_many_sizes_leave_nothing_behind(tokenizer):
    engine = Engine(build("hmar").cuda(), tokenizer, dtype=torch.bfloat16, max_programs=1)
    engine.generate(CLASSES)
    engine.forget()
    before = torch.cuda.memory_allocated()
    for batch in range(1, 5):
        engine.generate(CLASSES.repeat(2)[:batch])
    engine.forget()
    assert torch.cuda.memory_allocated() - before < 1 << 20, "cuBLAS keeps 32 MiB for each stream"


def test_graphs_see_weights_that_change(tokenizer):
    model = build("hmar").cuda()
    engine = Engine(model, tokenizer, dtype=torch.bfloat16)
    before = engine.generate(CLASSES, SAMPLINGS["greedy"])
    model.load_state_dict(build("hmar", seed=9).state_dict())
    after = engine.generate(CLASSES, SAMPLINGS["greedy"])
    assert len(engine.programs) == 1 and not torch.equal(before.codes_BL, after.codes_BL)
    fresh = Engine(model, tokenizer, dtype=torch.bfloat16, capture=False).generate(CLASSES, SAMPLINGS["greedy"])
    assert_equal(after, fresh)


def test_previews_come_from_graphs(pairs, model):
    captured, stepwise = pairs(model, torch.bfloat16)
    seen = {}
    for name, engine in (("graphs", captured), ("steps", stepwise)):
        seen[name] = []
        engine.generate(CLASSES, on_scale=lambda k, f_hat, name=name: seen[name].append((k, f_hat)))
    assert [k for k, _ in seen["graphs"]] == list(range(PYRAMID.num_scales))
    for (_, actual), (_, expected) in zip(seen["graphs"], seen["steps"], strict=True):
        assert torch.equal(actual, expected)


def test_a_model_on_the_cpu_generates_on_the_gpu(model, tokenizer, pairs):
    engine = Engine(build("hmar"), build_tokenizer(), device="cuda", dtype=torch.bfloat16)
    output = engine.generate(CLASSES, SAMPLINGS["default"])
    assert output.images_BCHW.is_cuda and output.images_BCHW.isfinite().all()


@pytest.mark.parametrize("kind", ["hmar", "var"])
@pytest.mark.parametrize("preset", ["d16-256", "d16-512", "d16-1024"])
def test_published_sizes(kind, preset):
    """Random weights of the published sizes: graphs equal steps, and nothing is left over by a second image."""
    torch.manual_seed(0)
    tokenizer_config, config = PRESETS[preset]
    with torch.device("cuda"):
        tokenizer = Tokenizer(tokenizer_config, config.pyramid)
        model = HMAR(config) if kind == "hmar" else NextScaleTransformer(config, "block_causal")
        torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    sampling = SamplingConfig(cfg=1.5, top_k=900, top_p=0.96)
    outputs = []
    for capture in (True, False):
        engine = Engine(model.eval(), tokenizer.eval(), dtype=torch.bfloat16, capture=capture)
        engine.generate(torch.tensor([7, 8]), replace(sampling, seed=1))
        outputs.append(engine.generate(torch.tensor([1, 2]), sampling))
        engine.forget()
    assert_equal(*outputs)
    assert outputs[0].images_BCHW.isfinite().all() and outputs[0].images_BCHW.std() > 0
