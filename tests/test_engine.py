"""The engine on the CPU: the same images as the plain functions, fixed shapes, nothing computed twice."""

import math
import weakref
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from engine_cases import (
    CLASSES,
    CONFIG,
    KINDS,
    PYRAMID,
    SAMPLINGS,
    build,
    build_tokenizer,
    holes,
    plain,
    sampling_for,
)
from hmar import engine as engine_module
from hmar import generate as generate_module
from hmar import scale_maps as scale_maps_module
from hmar.config import ModelConfig
from hmar.decoder import FusedDecoder, TransposedUpsample
from hmar.engine import DECODERS, Engine, Program, resolve, resolve_named
from hmar.generate import KnownCodes, SamplingConfig, even_schedule
from hmar.model import HMAR, Attention, MaskedTransformer
from hmar.tokenizer import Upsample
from hmar_kernels import token_embedding, transformer_blocks, triton_device
from hmar_kernels.blocks import MAX_ROWS
from hmar_kernels.linear import cuda, reference
from hmar_kernels.qk_norm_attention import triton as attention
from hmar_kernels.token_embedding import Known


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer().double()


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    """In float64, so that another order of sums cannot turn a draw."""
    return build(request.param).double()


@pytest.fixture(scope="module")
def hmar():
    return build("hmar").double()


@pytest.fixture(scope="module")
def engines(tokenizer):
    """The engine of a model, made once. The cache keeps the model: another one must not come to have its id."""
    return cache(lambda model: Engine(model, tokenizer))


def assert_same(actual, expected):
    assert torch.equal(actual.codes_BL, expected.codes_BL)
    torch.testing.assert_close(actual.f_hat_BEhw, expected.f_hat_BEhw)
    torch.testing.assert_close(actual.images_BCHW, expected.images_BCHW)


# --- the same images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("edited", [False, True], ids=["new", "edited"])
def test_images_are_those_of_the_plain_functions(engines, model, tokenizer, name, edited):
    sampling, known = sampling_for(model, name), holes() if edited else None
    for options in ({"first_image": 7}, {"seeds_B": [5, 2**40, 5]}):
        expected = plain(model, tokenizer, CLASSES, sampling, known=known, **options)
        assert_same(engines(model).generate(CLASSES, sampling, known=known, **options), expected)


def test_one_row_of_known_codes_serves_a_batch(engines, model, tokenizer):
    known = type(holes())(*(tensor[:1] for tensor in holes()))
    expected = plain(model, tokenizer, CLASSES, SAMPLINGS["greedy"], known=known)
    assert_same(engines(model).generate(CLASSES, sampling_for(model, "greedy"), known=known), expected)


def test_edits_of_other_holes_share_a_program(engines, model, tokenizer):
    """Which passes run depends on the holes; what a skipped pass left from an earlier image must not matter."""
    sampling = sampling_for(model, "default")
    known = holes()
    shuffled = type(known)(known.codes_BL.flip(0), known.tokens_BL.flip(0))
    everything = type(known)(known.codes_BL, torch.ones_like(known.tokens_BL))
    before = len(engines(model).programs)
    for edit in (known, everything, shuffled, known):
        expected = plain(model, tokenizer, CLASSES, sampling, known=edit)
        assert_same(engines(model).generate(CLASSES, sampling, known=edit), expected)
    assert len(engines(model).programs) <= before + 1


def test_previews_are_the_latents_of_every_scale(engines, model, tokenizer):
    expected, actual = [], []
    plain(model, tokenizer, CLASSES, on_scale=lambda k, f_hat: expected.append((k, f_hat.clone())))
    engine = engines(model)
    output = engine.generate(CLASSES, on_scale=lambda k, f_hat: actual.append((k, f_hat)))
    assert [k for k, _ in actual] == [k for k, _ in expected] == list(range(PYRAMID.num_scales))
    for (_, mine), (_, theirs) in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(engine.decode(actual[-1][1]), output.images_BCHW)


def test_every_image_may_have_a_guidance_of_its_own(engines, model, tokenizer):
    strengths = [0.0, 1.5, 3.0]
    together = engines(model).generate(CLASSES, SAMPLINGS["greedy"], cfg_B=strengths, seeds_B=[1, 2, 3])
    for i, cfg in enumerate(strengths):
        sampling = replace(sampling_for(model, "greedy"), cfg=cfg)
        alone = plain(model, tokenizer, CLASSES[i : i + 1], sampling, seeds_B=[i + 1])
        assert torch.equal(alone.codes_BL[0], together.codes_BL[i])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_that_of_autocast(kind):
    """Weights rounded once against weights rounded by autocast in every pass; the decoder rounds more. The GELU follows
    another rounding, so a near tie may fall to another code, and change what comes after it."""
    model, tokenizer = build(kind), build_tokenizer()
    sampling = SamplingConfig(cfg=2.0, top_k=30, seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(model, tokenizer, CLASSES, sampling)
    engine = Engine(model, tokenizer, dtype=torch.bfloat16)
    actual = engine.generate(CLASSES, sampling)
    same_B = (actual.codes_BL == expected.codes_BL).all(1)
    assert same_B.any() and (actual.codes_BL == expected.codes_BL).float().mean() > 0.9
    of_same = actual.images_BCHW.float()[same_B], expected.images_BCHW.float()[same_B]
    torch.testing.assert_close(*of_same, rtol=0, atol=0.05)
    assert actual.f_hat_BEhw.dtype == torch.float32
    kept = {
        p.dtype for module in engine.model.modules() if isinstance(module, torch.nn.Linear) for p in module.parameters()
    }
    assert kept == {torch.bfloat16} and engine.decoder.conv_out.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels run there")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normed", [64, 0])
def test_products_of_few_rows_by_the_kernels_where_they_can_run(normed, kind, monkeypatch):
    """Which rows are few: here up to 64, so that the largest scale of three images and their null class is not. Norms
    and residuals are in the products, and nothing is left for torch to add. Statistics, of up to `normed` rows, go from
    one to the next, but for the first norm of a pass, and of a masked pass's head. The reference stands for the
    kernels."""
    few, measured = [], Counter()
    monkeypatch.setattr(engine_module, "FEW_ROWS", {math.inf: 64})
    monkeypatch.setattr(engine_module, "MAX_NORMED_ROWS", normed)
    model, tokenizer, sampling = build(kind), build_tokenizer(), SamplingConfig(cfg=2.0, top_k=30, seed=4)
    expected = Engine(model, tokenizer, dtype=torch.float16).generate(CLASSES, sampling)

    def seen(x, weight, bias, scale, shift, statistics, residual, gate, gelu, eps, return_statistics, overlap):
        few.append((x.shape[0] * x.shape[1], scale is not None, residual is not None))
        assert return_statistics == (residual is not None and normed > 0)
        norm = None if scale is None else (scale, shift)
        if statistics is not None:
            torch.testing.assert_close(statistics, reference.statistics(x))
        measured[statistics is not None] += norm is not None
        y = reference.forward(x, weight, bias, norm, gelu, residual, gate, eps)
        return [y, reference.statistics(y)] if return_statistics else [y]

    monkeypatch.setattr(engine_module, "unavailable_on", lambda *_: None)
    monkeypatch.setattr(cuda, "unavailable", lambda *_, residual: None)
    monkeypatch.setattr(cuda, "forward", seen)
    engine = Engine(model, tokenizer, dtype=torch.float16, attention="fused")
    actual = engine.generate(CLASSES, sampling)
    assert (actual.codes_BL == expected.codes_BL).float().mean() > 0.9
    assert torch.equal(actual.codes_BL[:, : PYRAMID.offsets[2]], expected.codes_BL[:, : PYRAMID.offsets[2]])
    kinds = Counter((norm, residual) for _, norm, residual in few)
    modulations = kinds.pop((False, False))
    assert modulations >= CONFIG.depth + (kind == "hmar") + len(engine._heads()), "those of blocks and heads"
    assert few[0] == (6, False, False), "before all passes"
    rows = Counter(rows for rows, *others in few if any(others))
    passes = {2 * 3 if kind == "var" else 3: 1, 2 * 3 * 4: 1, 2 * 3 * 9: 1}
    masked = {3 * 4: 1, 3 * 9: 3} if kind == "hmar" else {}
    passes |= masked
    assert passes.keys() <= rows.keys() and max(rows) <= 64 and 2 * 3 * 25 not in rows
    num_passes = sum(passes.values())
    assert kinds[True, False] > kinds[False, True] == 2 * CONFIG.depth * num_passes
    without = num_passes + sum(masked.values()) if normed else kinds[True, False]
    assert measured == Counter({True: kinds[True, False] - without, False: without})


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels run there")
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_few_rows_by_one_kernel_where_it_can_run(kind, monkeypatch):
    """All of a list at once, where keys are not cached. The reference stands for the kernel."""
    calls = []

    class Weights:
        def __init__(self, given):
            self.blocks, self.dtype = given, torch.float16

    def together(x, table, vectors, *, max_log_scale, impl):
        calls.append((x.shape[0] * x.shape[1], len(table.blocks)))
        assert impl == "cuda" and isinstance(table, Weights)
        return transformer_blocks(x, table.blocks, vectors, max_log_scale=max_log_scale, impl="reference")

    model, tokenizer, sampling = build(kind), build_tokenizer(), SamplingConfig(cfg=2.0, top_k=30, seed=4)
    expected = Engine(model, tokenizer, dtype=torch.float16).generate(CLASSES, sampling)
    monkeypatch.setattr(engine_module, "FEW_ROWS", {math.inf: 0})
    monkeypatch.setattr(engine_module, "unavailable_on", lambda *_: None)
    monkeypatch.setattr(engine_module.blocks, "unavailable_on", lambda *_: None)
    monkeypatch.setattr(engine_module, "transformer_blocks", together)
    monkeypatch.setattr(engine_module, "Table", Weights)
    engine = Engine(model, tokenizer, dtype=torch.float16)
    actual = engine.generate(CLASSES, sampling)
    assert (actual.codes_BL == expected.codes_BL).float().mean() > 0.9
    assert torch.equal(actual.codes_BL[:, : PYRAMID.offsets[2]], expected.codes_BL[:, : PYRAMID.offsets[2]])
    lists = [len(blocks) for blocks in engine._block_lists()]
    assert sum(lists) == len(engine._blocks()) and len(engine._attentions()) == len(engine._blocks())
    if kind == "var":
        assert not calls
        return
    # NOTE: rows of three images, with the null class where it takes part.
    few = {3, 12, 24, 27} if kind == "hmar" else {3, 24}
    depths = [lists[0], lists[1]] if kind == "hmar" else lists
    assert {rows for rows, _ in calls} == few and {depth for _, depth in calls} == set(lists)
    assert Counter(calls)[3, depths[0]] == 1 and max(rows for rows, _ in calls) <= MAX_ROWS


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels run there")
def test_short_images_are_attended_by_one_kernel(monkeypatch):
    """And those of VAR, whose earlier keys are in a cache; not longer ones."""
    shapes = []

    def attending(attend):
        return lambda qkv, *rest: shapes.append(qkv.shape[:2]) or attend(qkv, *rest)

    for name in ("forward", "forward_cached"):
        monkeypatch.setattr(attention, name, attending(getattr(attention, name)))
    # The longest scale, pairs of queries and keys. NOTE: behind one cached token four have 20.
    hmar, var = {(6, 1), (6, 4), (3, 4)}, {(6, 1), (6, 4)}
    for kind, length, pairs, seen in (("hmar", 8, 16, hmar), ("var", 8, 20, var), ("var", 8, 19, {(6, 1)})):
        monkeypatch.setattr(engine_module, "MAX_LENGTH", length)
        monkeypatch.setattr(engine_module, "FUSED_PAIRS", pairs)
        model, tokenizer, sampling = build(kind), build_tokenizer(), SamplingConfig(cfg=2.0, cfg_ramp="constant")
        expected = Engine(model, tokenizer, dtype=torch.float16).generate(CLASSES, sampling)
        actual = Engine(model, tokenizer, dtype=torch.float16, attention="fused").generate(CLASSES, sampling)
        assert {tuple(shape) for shape in shapes} == seen
        assert (actual.codes_BL == expected.codes_BL).float().mean() > 0.9
        shapes.clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels run there")
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_codes_by_one_kernel(kind, monkeypatch):
    """Images once, whether or not the null class has the same tokens; all scales but the first."""
    calls = []

    def embedded(inputs, *tables, copies, **options):
        calls.append((*inputs.shape[:2], copies, tables[-1] is not None))
        return token_embedding(inputs, *tables, copies=copies, impl="triton", **options)

    model, tokenizer = build(kind), build_tokenizer()
    sampling = replace(sampling_for(model, "guided masked passes"), cfg_ramp=[0.0, 0.0, 1.0, 1.0])
    monkeypatch.setattr(engine_module, "token_embedding", embedded)
    actual = Engine(model, tokenizer, dtype=torch.float16).generate(CLASSES, sampling)
    monkeypatch.setattr(engine_module, "token_embedding", token_embedding)
    expected = Engine(model, tokenizer, dtype=torch.float16).generate(CLASSES, sampling)
    assert (actual.codes_BL == expected.codes_BL).float().mean() > 0.9
    first = 2 if kind == "var" else 1
    masked = Counter({(3, 4, 2, True): 1, (3, 9, 2, True): 3} if kind == "hmar" else {})
    assert Counter(calls) == {(3, 4, first, False): 1, (3, 9, 2, False): 1, (3, 25, 2, False): 1} | masked


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels run there")
@pytest.mark.parametrize("name", ["default", "one-token", "guided masked passes"])
def test_draws_by_the_kernels(name, monkeypatch):
    """Written where they belong, and put in order by ranks: the codes of the plain functions."""
    model, tokenizer, sampling = build("hmar"), build_tokenizer(), SAMPLINGS[name]
    expected = plain(model, tokenizer, CLASSES, sampling)
    for module, operator in ((engine_module, "least_confident"), (generate_module, "sample_codes")):
        monkeypatch.setattr(module, operator, partial(getattr(module, operator), impl="triton"))
    engine = Engine(model, tokenizer)
    for _ in range(2):
        assert torch.equal(engine.generate(CLASSES, sampling).codes_BL, expected.codes_BL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_engine_gpu.py runs the kernels")
@pytest.mark.parametrize("kind", ["hmar", "var"])
def test_half_precision_with_the_kernels_of_a_block(kind, monkeypatch):
    """Norms and heads by Triton under the interpreter: the codes of the references but for near ties."""
    model, tokenizer = build(kind), build_tokenizer()
    sampling = SamplingConfig(cfg=2.0, top_k=30, seed=4)
    expected = Engine(model, tokenizer, dtype=torch.bfloat16).generate(CLASSES, sampling)
    chosen = []
    monkeypatch.setattr(triton_device, "choose", lambda *_: (chosen.append("triton") or "triton", "for this test"))
    actual = Engine(model, tokenizer, dtype=torch.bfloat16).generate(CLASSES, sampling)
    assert chosen
    first = PYRAMID.offsets[2]
    assert torch.equal(actual.codes_BL[:, :first], expected.codes_BL[:, :first])
    assert (actual.codes_BL == expected.codes_BL).float().mean() > 0.9


def test_compiled_blocks_give_the_same_images(hmar, tokenizer):
    sampling = SamplingConfig(cfg=0.0, top_k=20, schedule={2: [1, 3]})
    expected = plain(hmar, tokenizer, CLASSES, sampling)
    for options in (
        {"compile": "eager"},
        {"compile_decoder": "eager"},
        {"compile_decoder": "eager", "decoder": "fused"},
    ):
        assert_same(Engine(hmar, tokenizer, **options).generate(CLASSES, sampling), expected)


def test_every_decoder_gives_the_same_images(hmar, tokenizer):
    sampling = SamplingConfig(cfg=1.0, top_k=20)
    expected = plain(hmar, tokenizer, CLASSES, sampling)
    for decoder in DECODERS:
        assert_same(Engine(hmar, tokenizer, decoder=decoder).generate(CLASSES, sampling), expected)


def test_the_decoder_of_a_dtype_is_fused_and_transposed(hmar, tokenizer):
    assert not isinstance(Engine(hmar, tokenizer).decoding, FusedDecoder)
    decoding = Engine(hmar, tokenizer, dtype=torch.bfloat16).decoding
    assert decoding.impl == "reference", "the hand-written convolutions run on Hopper GPUs only"
    assert isinstance(decoding, FusedDecoder) and isinstance(decoding.upsamples[0], TransposedUpsample)


def test_cudnn_chooses_by_trying_only_while_the_engine_runs(hmar, tokenizer, monkeypatch):
    for asked in (True, False):
        engine = Engine(hmar, tokenizer, cudnn_benchmark=asked)
        monkeypatch.setattr(engine, "device", torch.device("cuda", 0))
        for outside in (True, False):
            monkeypatch.setattr(torch.backends.cudnn, "benchmark", outside)
            with pytest.raises(KeyError), engine._convolutions():
                assert torch.backends.cudnn.benchmark is (asked or outside)
                raise KeyError
            assert torch.backends.cudnn.benchmark is outside


def test_shared_modulation_in_half_precision():
    """Which blocks read in float32, and heads do not."""
    model, tokenizer = build("var", replace(CONFIG, shared_modulation=True)), build_tokenizer()
    sampling = SamplingConfig(cfg=2.0, top_k=30, seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(model, tokenizer, CLASSES, sampling)
    actual = Engine(model, tokenizer, dtype=torch.bfloat16).generate(CLASSES, sampling)
    assert (actual.codes_BL == expected.codes_BL).float().mean() > 0.9


def test_shared_modulation(tokenizer):
    """The layout of VAR d36: one linear for all blocks, and a table in each."""
    model = build("var", replace(CONFIG, shared_modulation=True)).double()
    sampling = SamplingConfig(cfg=2.0, top_k=30)
    assert_same(Engine(model, tokenizer).generate(CLASSES, sampling), plain(model, tokenizer, CLASSES, sampling))


# --- fixed shapes, no waiting -----------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """Names and shapes of all operators that run."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
        self.calls.append((str(func), [tuple(x.shape) for x in tensors]))
        return result


@pytest.mark.parametrize("edited", [False, True], ids=["new", "edited"])
def test_steps_have_fixed_shapes_and_read_no_numbers(engines, model, edited):
    """What a graph needs: the same operators on the same shapes for all arguments, and none that waits for a value."""
    engine = engines(model)
    sampling = sampling_for(model, "default")
    seen = []
    for seed in (1, 2):
        known = holes() if edited else None
        engine.generate(CLASSES.roll(seed), replace(sampling, seed=seed), known=known)
        program = engine.programs[next(reversed(engine.programs))]
        with Recorded() as recorded, torch.no_grad():
            for segment in program.segments:
                segment.run()
        seen.append(recorded.calls)
    assert seen[0] == seen[1] and len(seen[0]) > 100
    waiting = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.item.default", "aten.equal.default"}
    assert not waiting & {name for name, _ in seen[0]}


class Kernels(TorchDispatchMode):
    """Names of all operators that run, without those that only look at memory in another way or take some."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kinds = [value.alias_info for value in func._schema.returns]
        is_view = any(kind is not None and not kind.is_write for kind in kinds)
        if not is_view and "empty" not in str(func):
            self.names.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))

    def unseen(self, name, call):
        """`call`, of which nothing counts but `name`."""

        def named(*arguments, **options):
            self.names.extend([name] if name else [])
            with _disable_current_modes():
                return call(*arguments, **options)

        return named


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
def test_few_kernels_around_the_model(guided, monkeypatch):
    """Maps, embedding and draws of a pass; nothing is copied, repeated, cast or put in order beside them."""
    engine = Engine(build("hmar"), build_tokenizer(), dtype=torch.float16)
    sampling = SamplingConfig(cfg=2.0 * guided, masked_cfg_factor=1.0, schedule={3: [1, 3, 5]}, cfg_ramp="constant")
    engine.generate(CLASSES, sampling)
    (program,), seen = engine.programs.values(), Kernels()
    for module, name in (
        (engine_module, "token_embedding"),
        (engine_module, "least_confident"),
        (generate_module, "sample_codes"),
        (scale_maps_module, "accumulate_codes_"),
        (scale_maps_module, "map_codes"),
    ):
        monkeypatch.setattr(module, name, seen.unseen(name, getattr(module, name)))
    logits = seen.unseen(None, lambda rows, n: torch.randn(rows, n, CONFIG.vocab_size).half())
    mask_C, embedding = engine.model.mask_embedding_C, engine.model.embedding

    def next_scale(class_R, inputs, scales):
        return logits(len(embedding(class_R, inputs, scales)[1]), PYRAMID.sizes[scales[0]])

    def masked(class_R, inputs, residuals, hidden, scales, places_Rm):
        x_RnC = embedding(class_R, inputs, scales, Known(residuals, hidden, mask_C))[1]
        assert len(x_RnC) == len(places_Rm)
        return logits(len(x_RnC), places_Rm.shape[1])

    monkeypatch.setattr(engine.model, "next_scale", next_scale)
    monkeypatch.setattr(engine.model, "masked", masked)
    steps = []
    with torch.no_grad(), engine._surroundings():
        program._begin()
        for k in range(2):
            program._commit(k)
        seen.names = []
        with seen:
            for step in (
                lambda: program._predict(2),
                lambda: program._masked(2, 1),
                lambda: program._masked(2, 2),
                lambda: program._commit(2),
            ):
                step()
                steps.append(seen.names)
                seen.names = []
    masked_pass = ["least_confident", "map_codes"] + guided * ["cat"] + ["token_embedding", "sample_codes"]
    assert steps[0] == ["token_embedding", "sample_codes"]
    assert steps[1] == steps[2] == masked_pass
    assert steps[3] == ["accumulate_codes_"], "with the inputs of the next scale"


# --- no wasted work ---------------------------------------------------------------------------------------------------


def shapes_of_inputs(modules):
    """Records the shape of the first argument of every call of the modules."""
    seen = []
    for module in modules:
        module.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape)))
    return seen


def test_modulation_is_computed_once_an_image(hmar, tokenizer):
    engine = Engine(hmar, tokenizer)
    seen = shapes_of_inputs(remembered.modulation for remembered in engine._remembered)
    engine.generate(CLASSES, SAMPLINGS["one-token"])
    assert len(seen) == 1 + CONFIG.depth + 1 + 2, "the classes, every block, those of the two branches, and two heads"
    assert Counter(seen) == {(6,): 1, (6, CONFIG.width): len(seen) - 1}


def test_masked_passes_skip_the_null_class_and_finished_codes(hmar, tokenizer):
    engine = Engine(hmar, tokenizer)
    heads = shapes_of_inputs([engine.model.mask_head.linear])
    blocks = shapes_of_inputs(block.attention.proj for block in engine.model.mask_blocks)
    engine.generate(CLASSES, SamplingConfig(cfg=2.0, schedule={2: [1, 3], 3: [1, 1, 2, 5]}))
    assert heads == [(3, m, CONFIG.width) for m in (3, 8, 7, 5)]
    assert blocks == [(3, n, CONFIG.width) for n in (4, 9, 9, 9)]
    heads.clear()
    engine.generate(CLASSES, SamplingConfig(cfg=2.0, schedule={2: [1, 3]}, masked_cfg_factor=1e-6))
    assert heads == [(6, 3, CONFIG.width)], "parity with the published code"


def test_passes_without_guidance_skip_the_null_class(hmar, tokenizer):
    engine = Engine(hmar, tokenizer)
    rows = shapes_of_inputs([engine.model.next_scale_head.linear])
    engine.generate(CLASSES, SamplingConfig(cfg=2.0, cfg_ramp=[0, 1, 0, 1], schedule="none"))
    assert [shape[:2] for shape in rows] == [(3, 1), (6, 4), (3, 9), (6, 25)]


def test_every_scale_passes_var_once(tokenizer):
    engine = Engine(build("var").double(), tokenizer)
    seen = shapes_of_inputs([engine.model.blocks[0].attention.proj])
    engine.generate(CLASSES, SamplingConfig(cfg=2.0))
    assert [shape[1] for shape in seen] == list(PYRAMID.sizes)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, decoder",
    [(None, None), (None, "transposed"), (torch.bfloat16, "transposed"), (torch.bfloat16, "modules")],
)
def test_weights_that_change_are_noticed(dtype, decoder):
    model, tokenizer = build("hmar"), build_tokenizer()
    engine = Engine(model, tokenizer, dtype=dtype, decoder=decoder)
    sampling = SamplingConfig(cfg=1.0, greedy=True)
    before = engine.generate(CLASSES, sampling)
    model.load_state_dict(build("hmar", seed=9).state_dict())
    tokenizer.load_state_dict(build_tokenizer(seed=9).state_dict())
    after = engine.generate(CLASSES, sampling)
    assert len(engine.programs) == 1, "graphs read the same memory"
    assert not torch.equal(before.codes_BL, after.codes_BL)
    fresh = Engine(build("hmar", seed=9), build_tokenizer(seed=9), dtype=dtype, decoder=decoder)
    expected = fresh.generate(CLASSES, sampling)
    assert torch.equal(after.images_BCHW, expected.images_BCHW)
    model.embedding.position_LC.data.zero_()
    engine.refresh()
    assert not torch.equal(engine.generate(CLASSES, sampling).f_hat_BEhw, after.f_hat_BEhw)


def test_weights_are_looked_at_while_the_device_works(monkeypatch):
    """Of programs that are captured: here their steps stand for the graphs."""
    model, tokenizer = build("hmar").double(), build_tokenizer().double()
    engine, sampling = Engine(model, tokenizer), SamplingConfig(cfg=1.0, top_k=5)
    before = engine.generate(CLASSES, sampling)
    order = []
    run, versions = Program.run, Engine._current_versions
    monkeypatch.setattr(Program, "run", lambda *arguments: order.append("run") or run(*arguments))
    monkeypatch.setattr(Engine, "_current_versions", lambda engine: order.append("look") or versions(engine))
    engine.captures = True
    assert_same(engine.generate(CLASSES, sampling), before)
    assert order == ["run", "look"]
    tokenizer.load_state_dict(build_tokenizer(seed=9).state_dict())
    order.clear()
    after = engine.generate(CLASSES, sampling)
    assert order == ["run", "look", "look", "run"], "refresh remembers what it has seen"
    assert_same(after, plain(model, tokenizer, CLASSES, sampling))
    order.clear()
    tokenizer.quantizer.codebook.weight.detach().mul_(1.1)
    assert_same(
        engine.generate(CLASSES, sampling, on_scale=lambda k, f_hat: None), plain(model, tokenizer, CLASSES, sampling)
    )
    assert order == ["look", "look", "run"], "nothing of old weights is shown"


def test_weights_in_place_are_not_looked_at():
    """They are read where they are; but what something is derived from, and what is copied, is."""
    model, tokenizer = build("hmar").double(), build_tokenizer().double()
    engine = Engine(model, tokenizer)
    quantizer = {id(parameter) for parameter in tokenizer.quantizer.parameters()}
    scales = {id(module.log_scale_H) for module in model.modules() if isinstance(module, Attention)}
    assert {id(source) for source in engine._watched} == quantizer | scales
    sampling = SamplingConfig(cfg=1.0, greedy=True)
    before = engine.generate(CLASSES, sampling)
    for parameter in (*model.parameters(), *tokenizer.decoder.parameters()):
        if id(parameter) not in scales:
            parameter.detach().mul_(0.9)
    after = engine.generate(CLASSES, sampling)
    assert not torch.equal(after.images_BCHW, before.images_BCHW)
    assert_same(after, plain(model, tokenizer, CLASSES, sampling))
    transposed = Engine(model, tokenizer, decoder="transposed")
    upsamples = {id(m.conv.weight) for m in tokenizer.decoder.modules() if isinstance(m, Upsample)}
    assert upsamples < {id(source) for source in transposed._watched}
    linears = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert linears < {id(source) for source in Engine(model, tokenizer, dtype=torch.bfloat16)._watched}


def test_settings_are_resolved_once():
    """And as often as it takes where they have no names."""
    arguments = (PYRAMID, 2, True, False, False)
    sampling = (1e-6, 1.0, 10, 0.5, False)
    first = resolve_named(*arguments, "even-2", "linear", *sampling)
    assert resolve_named(*arguments, "even-2", "linear", *sampling) is first
    schedule = [list(passes) for passes in even_schedule(PYRAMID, 2)]
    again = resolve(*arguments, schedule, [0, 1 / 3, 2 / 3, 1], *sampling)
    assert again.settings == first.settings and again.settings.guided_S == (False, True, True, True)
    assert first.factors.tolist() == again.factors.tolist() == [0, 1 / 3, 2 / 3, 1, 1e-6]


def test_weights_in_place_are_not_copied():
    model, tokenizer = build("hmar"), build_tokenizer()
    engine = Engine(model, tokenizer)
    assert all(source.data_ptr() == copied.data_ptr() for source, copied in engine._pairs)
    engine = Engine(model, tokenizer, dtype=torch.bfloat16)
    shared = {source.data_ptr() == copied.data_ptr() for source, copied in engine._pairs if source.ndim == 1}
    assert shared == {True, False}, "biases of linear layers are copied, those of attention are not"
    assert model.embedding.codes.weight.dtype == torch.float32 and model.training is False


def test_weights_that_are_replaced_are_an_error():
    """The engine would go on with the old ones."""
    model, tokenizer = build("hmar").double(), build_tokenizer().double()
    engine = Engine(model, tokenizer)
    engine.generate(CLASSES)
    model.load_state_dict(deepcopy(model.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match=r"was replaced by another tensor.*or make a new Engine"):
        engine.generate(CLASSES)
    assert_same(Engine(model, tokenizer).generate(CLASSES), plain(model, tokenizer, CLASSES))
    engine = Engine(model, tokenizer)
    tokenizer.decoder.conv_in.bias = torch.nn.Parameter(tokenizer.decoder.conv_in.bias.detach() + 1)
    with pytest.raises(RuntimeError, match="the weight bias"):
        engine.generate(CLASSES)


def test_the_model_itself_stays_as_it_was(tokenizer):
    model = build("hmar").double().train()
    before, names = deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    Engine(model, tokenizer).generate(CLASSES)
    assert [name for name, _ in model.named_modules()] == names and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- programs ---------------------------------------------------------------------------------------------------------


def test_programs_are_made_for_sizes_and_settings_and_for_nothing_else(hmar, tokenizer):
    engine = Engine(hmar, tokenizer, max_programs=3)
    base = SamplingConfig(cfg=1.5, top_k=20)
    engine.generate(CLASSES, base)
    for same in (replace(base, seed=3), replace(base, cfg=2.5), replace(base, schedule="default")):
        engine.generate(CLASSES.flip(0), same)
    assert len(engine.programs) == 1
    first = next(iter(engine.programs))
    engine.generate(CLASSES[:2], base)
    engine.generate(CLASSES, replace(base, top_k=21))
    engine.generate(CLASSES, base)
    assert len(engine.programs) == 3 and next(reversed(engine.programs)) == first
    engine.generate(CLASSES, replace(base, schedule=even_schedule(PYRAMID, 2)))
    assert len(engine.programs) == 3 and [s.batch for s in engine.programs] == [3, 3, 3], "the unused one went"
    engine.forget()
    assert not engine.programs and engine.graph_bytes == 0


def test_a_program_without_room_takes_that_of_the_others(hmar, tokenizer, monkeypatch):
    """And what the failed one held is free by then."""
    engine = Engine(hmar, tokenizer)
    first = engine.generate(CLASSES)
    capture, held = Engine._capture, []

    def runs_out(engine, settings):
        if engine.programs:
            held.append(large := torch.zeros(10))
            held[:] = [weakref.ref(large)]
            raise torch.OutOfMemoryError("no room")
        assert held[0]() is None
        return capture(engine, settings)

    monkeypatch.setattr(Engine, "_capture", runs_out)
    fewer = engine.generate(CLASSES[:2])
    assert [settings.batch for settings in engine.programs] == [2]
    assert torch.equal(fewer.codes_BL, first.codes_BL[:2])
    monkeypatch.setattr(Engine, "_capture", lambda engine, settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(CLASSES)
    assert len(engine.programs) == 1, "nothing else is a reason to drop them"


def test_generating_within_generating_is_refused(hmar, tokenizer):
    engine = Engine(hmar, tokenizer)
    for call in (lambda: engine.generate(CLASSES[:1]), engine.forget):
        with pytest.raises(RuntimeError, match="one batch at a time"):
            engine.generate(CLASSES, on_scale=lambda k, f_hat, call=call: call())
    assert_same(engine.generate(CLASSES), plain(hmar, tokenizer, CLASSES))


def test_logits_that_are_not_finite_are_refused_and_later_images_are_not(tokenizer):
    model = build("hmar").double()
    engine = Engine(model, tokenizer)
    row = model.embedding.classes.weight[3].clone()
    with torch.no_grad():
        model.embedding.classes.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"logits of scale 1 are NaN or infinite for images \[1\]"):
        engine.generate(CLASSES)
    with torch.no_grad():
        model.embedding.classes.weight[3] = row
    assert_same(engine.generate(CLASSES), plain(model, tokenizer, CLASSES))


def test_bad_arguments_are_refused(hmar, tokenizer):
    engine = Engine(hmar, tokenizer)
    codes, tokens = holes()
    two = KnownCodes(codes[:2], tokens[:2])
    for call, message in (
        (lambda: Engine(MaskedTransformer(CONFIG), tokenizer), "cannot generate alone"),
        (lambda: Engine(hmar, tokenizer, dtype=torch.float64), "expected torch.bfloat16"),
        (lambda: Engine(hmar, tokenizer, capture=True), "CUDA graphs need a CUDA device"),
        (lambda: Engine(hmar, tokenizer, max_programs=0), "at least one"),
        (lambda: Engine(hmar, tokenizer, products="cutlass"), "expected one of cublas, cuda"),
        (lambda: Engine(hmar, tokenizer, dtype=torch.bfloat16, products="cuda"), 'products="cublas" would'),
        (lambda: Engine(hmar, tokenizer, attention="flash"), "expected one of separate, fused"),
        (lambda: Engine(hmar, tokenizer, decoder="fast"), "expected one of modules, fused, transposed"),
        (lambda: Engine(hmar, tokenizer, convolutions="cudnn"), "expected one of torch, hopper"),
        (lambda: Engine(hmar, tokenizer, convolutions="torch"), '"modules" has its own'),
        (lambda: Engine(hmar, tokenizer, dtype=torch.bfloat16, convolutions="hopper"), 'convolutions="torch" would'),
        (lambda: Engine(HMAR(ModelConfig(depth=2, width=32)), tokenizer), "tokenizer has"),
        (lambda: engine.generate(torch.tensor([6])), r"0\.\.4"),
        (lambda: engine.generate(CLASSES, cfg_B=[1.0]), "1 strengths of guidance for 3 images"),
        (lambda: engine.generate(CLASSES, cfg_B=[1.0, -1.0, 0.0]), "cfg is -1.0"),
        (lambda: engine.generate(CLASSES, seeds_B=[1]), "for each of 3"),
        (lambda: engine.generate(CLASSES, known=two), r"codes_BL is torch.int64 \[2, 39\]; expected .* \[3, 39\]"),
        (lambda: plain(hmar, tokenizer, CLASSES, known=two), r"expected torch.int64 \[1, 39\] or \[3, 39\]"),
        (lambda: engine.generate(CLASSES, known=KnownCodes(codes, codes)), "expected torch.bool"),
        (lambda: engine.generate(CLASSES, known=KnownCodes(codes + 99, tokens)), "expected 0 to"),
        (lambda: engine.generate(CLASSES, known=KnownCodes(codes, tokens[:1])), "3 rows of codes and 1 of tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_operators_of_an_image_are_few(hmar, tokenizer):
    """The modulation linears are the only ones that run once an image; all others once a pass."""
    engine = Engine(hmar, tokenizer)
    counts = Counter()
    for name, module in engine.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
    engine.generate(CLASSES, SamplingConfig(cfg=2.0, schedule={2: [1, 3], 3: [1, 1, 2, 5]}))
    passes = {"trunk": 4 + 4, "next_scale_blocks": 4, "mask_blocks": 4, "next_scale_head": 4, "mask_head": 4}
    for name, count in counts.items():
        if "modulation" in name:
            assert count == 1, name
        elif name.endswith(("proj", "fc1", "fc2", "head.linear")):
            assert count == passes[name.split(".")[0]], name
    assert sum("modulation" in name for name in counts) == CONFIG.depth + 1 + 2
