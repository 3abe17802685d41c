"""Sampling: truncation, schedules, seeds, guidance, and the cache against none."""

import math
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from hmar import generate as generate_module
from hmar.config import PRESETS
from hmar.generate import (
    SamplingConfig,
    even_schedule,
    generate_hmar,
    generate_var,
    image_seed,
    resolve_ramp,
    resolve_schedule,
    stay_hidden,
)
from hmar.model import HMAR, NextScaleTransformer
from hmar.pyramid import Pyramid
from hmar.tokenizer import Tokenizer
from hmar_kernels import sample_codes

TOKENIZER_CONFIG, CONFIG = PRESETS["tiny"]
PYRAMID = CONFIG.pyramid
CLASSES = torch.tensor([0, 3, 1])


def build(cls, config=CONFIG, **kwargs):
    torch.manual_seed(0)
    model = cls(config, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(1)
    tokenizer = Tokenizer(TOKENIZER_CONFIG, PYRAMID)
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    return tokenizer.eval()


@pytest.fixture(scope="module")
def hmar():
    return build(HMAR)


@pytest.fixture(scope="module")
def var():
    return build(NextScaleTransformer, pattern="block_causal")


class Counting:
    """A model that counts its passes by branch and keeps their batch sizes."""

    def __init__(self, model):
        self.model, self.config, self.embedding, self.training = model, model.config, model.embedding, False
        self.next_scale_batches, self.masked_batches = [], []
        self.eval = self.train = lambda *_: None

    def next_scale(self, classes, *args):
        self.next_scale_batches.append(len(classes))
        return self.model.next_scale(classes, *args)

    def masked(self, classes, *args):
        self.masked_batches.append(len(classes))
        return self.model.masked(classes, *args)


def test_a_committed_code_is_never_hidden_again():
    confidence = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.4, 0.3, 0.2, 0.1]])
    hidden = torch.tensor([[False, True, True, True], [True, True, True, True]])
    expected = torch.tensor([[False, False, True, True], [False, False, True, True]])
    assert torch.equal(stay_hidden(confidence, hidden, 2), expected)
    expected = torch.tensor([[False, False, False, True], [False, False, False, False]])
    assert torch.equal(stay_hidden(confidence, hidden, torch.tensor([1, 0])), expected)


def test_default_schedules():
    def several(pixels):
        pyramid = Pyramid.for_resolution(pixels)
        schedule = resolve_schedule(pyramid)
        assert [sum(passes) for passes in schedule] == list(pyramid.sizes)
        return {side: passes for side, passes in zip(pyramid.sides, schedule, strict=True) if len(passes) > 1}

    assert several(256) == {2: (1, 3), 3: (1, 1, 2, 5)}
    assert several(512) == {2: (1, 3), 3: (1, 1, 2, 5), 4: (5, 11)}
    assert several(1024) == {2: (1, 3), 3: (1, 1, 2, 5), 4: (3, 5, 8)}


def test_schedules_in_every_form():
    pyramid = Pyramid((1, 2, 3))
    assert resolve_schedule(pyramid, "default") == resolve_schedule(pyramid) == ((1,), (1, 3), (1, 1, 2, 5))
    assert resolve_schedule(pyramid, "none") == ((1,), (4,), (9,))
    assert resolve_schedule(pyramid, {3: [4, 5]}) == ((1,), (4,), (4, 5))
    assert resolve_schedule(pyramid, [[1], [2, 2], [9]]) == ((1,), (2, 2), (9,))
    assert even_schedule(pyramid, 4) == ((1,), (1, 1, 1, 1), (2, 2, 2, 3))
    assert even_schedule(pyramid, 100) == ((1,), (1,) * 4, (1,) * 9)
    assert resolve_schedule(pyramid, even_schedule(pyramid, 2)) == ((1,), (2, 2), (4, 5))
    assert resolve_schedule(pyramid, "even-4") == even_schedule(pyramid, 4)
    assert resolve_schedule(pyramid, "one-token") == ((1,), (1,) * 4, (1,) * 9)
    assert resolve_schedule(pyramid, "even-1") == resolve_schedule(pyramid, "cosine-1") == ((1,), (4,), (9,))
    # Of 9 codes 9 cos(pi/8) = 8.3, 9 cos(pi/4) = 6.4 and 9 cos(3 pi/8) = 3.4 stay hidden after three of four passes.
    assert resolve_schedule(pyramid, "cosine-4") == ((1,), (1,) * 4, (1, 2, 3, 3))
    assert resolve_schedule(pyramid, "cosine-9") == ((1,), (1,) * 4, (1,) * 9)


@pytest.mark.parametrize("pixels", [256, 512])
@pytest.mark.parametrize("num_passes", [1, 2, 5, 8, 30, 300])
def test_cosine_schedules_commit_more_and_more(pixels, num_passes):
    pyramid = Pyramid.for_resolution(pixels)
    schedule = resolve_schedule(pyramid, f"cosine-{num_passes}")
    for k, (passes, size) in enumerate(zip(schedule, pyramid.sizes, strict=True)):
        assert len(passes) == (1 if k == 0 else min(num_passes, size))
        assert all(later >= now - 1 for now, later in pairwise(passes)), "up to rounding"
        assert len(passes) == 1 or passes[-1] >= passes[0]


@pytest.mark.parametrize(
    "schedule, message",
    [
        ("fast", "known are default, none, one-token, even-N and cosine-N"),
        ("even-0", "known are"),
        ("even-", "known are"),
        ([[1], [4]], "2 scales"),
        ([[1], [1, 2], [9]], "add up to 4"),
        ([[1], [4, 0], [9]], "positive integers"),
        ([[1], [2.0, 2.0], [9]], "positive integers"),
        ([[1], [], [9]], "add up to 4"),
        ({5: [25]}, "names sides"),
    ],
)
def test_bad_schedules_are_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        resolve_schedule(Pyramid((1, 2, 3)), schedule)


def test_scale_one_is_never_masked():
    assert resolve_schedule(Pyramid((2, 2)))[0] == (4,)
    with pytest.raises(ValueError, match="never masked"):
        resolve_schedule(Pyramid((2, 3)), [[1, 3], [9]])


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("cfg", [0.0, 2.0])
def test_cached_var_equals_uncached(var, tokenizer, greedy, cfg):
    var, tokenizer = var.double(), tokenizer.double()
    sampling = SamplingConfig(cfg=cfg, greedy=greedy, top_k=20, top_p=0.95, seed=5)
    cached = generate_var(var, tokenizer, CLASSES, sampling, use_cache=True)
    uncached = generate_var(var, tokenizer, CLASSES, sampling, use_cache=False)
    assert torch.equal(cached.codes_BL, uncached.codes_BL)
    torch.testing.assert_close(cached.f_hat_BEhw, uncached.f_hat_BEhw, rtol=0, atol=1e-12)
    var.float(), tokenizer.float()


@torch.no_grad()
def test_greedy_codes_are_what_training_would_predict(var, tokenizer):
    """Teacher forcing on the generated codes must give them back, scale by scale."""
    output = generate_var(var, tokenizer, CLASSES, SamplingConfig(cfg=0, greedy=True))
    inputs = tokenizer.quantizer.next_scale_inputs(output.codes_BL)
    assert torch.equal(var(CLASSES, inputs).argmax(-1), output.codes_BL)
    model = build(NextScaleTransformer, pattern="block_diagonal")
    output = generate_var(model, tokenizer, CLASSES, SamplingConfig(cfg=0, greedy=True))
    assert torch.equal(
        model(CLASSES, tokenizer.quantizer.next_scale_inputs(output.codes_BL)).argmax(-1), output.codes_BL
    )


@torch.no_grad()
def test_hmar_in_one_pass_a_scale_is_next_scale_prediction(hmar, tokenizer):
    output = generate_hmar(hmar, tokenizer, CLASSES, SamplingConfig(cfg=0, greedy=True, schedule="none"))
    inputs = tokenizer.quantizer.next_scale_inputs(output.codes_BL)
    assert torch.equal(hmar.next_scale(CLASSES, inputs).argmax(-1), output.codes_BL)
    assert torch.equal(output.images_BCHW, tokenizer.decode(output.codes_BL))
    assert torch.equal(output.f_hat_BEhw, tokenizer.quantizer.f_hats(output.codes_BL)[-1])


@contextmanager
def guided_logits():
    """Collects the logits that every draw sees, after guidance."""
    seen = []

    def spy(logits, unconditional=None, *, guidance=None, **options):
        seen.append(logits if unconditional is None else (1 + guidance) * logits - guidance * unconditional)
        return sample_codes(logits, unconditional, guidance=guidance, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_module, "sample_codes", spy)
        yield seen


@pytest.mark.parametrize("generate", ["hmar", "var"])
@pytest.mark.parametrize("ramp", ["linear", "constant", "cosine", [0.5, 0.0, 2.0]])
def test_guidance_follows_its_ramp(hmar, var, tokenizer, generate, ramp):
    """Logits of a doubled batch against the formula on two single passes."""
    named = {"linear": [0, 0.5, 1], "constant": [1, 1, 1], "cosine": [0, 0.5, 1]}
    factors = named[ramp] if isinstance(ramp, str) else ramp
    sampling = SamplingConfig(cfg=2.0, cfg_ramp=ramp, greedy=True, schedule="none")
    with guided_logits() as seen:
        output = (generate_hmar if generate == "hmar" else generate_var)(
            hmar if generate == "hmar" else var, tokenizer, CLASSES, sampling
        )
    forward = hmar.next_scale if generate == "hmar" else var
    inputs = tokenizer.quantizer.next_scale_inputs(output.codes_BL)
    with torch.no_grad():
        conditional = forward(CLASSES, inputs)
        unconditional = forward(torch.full_like(CLASSES, CONFIG.null_class), inputs)
    for k, (logits, factor) in enumerate(zip(seen, factors, strict=True)):
        expected = (1 + 2 * factor) * conditional - 2 * factor * unconditional
        torch.testing.assert_close(logits, expected[:, PYRAMID.slice(k)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("generate", ["hmar", "var"])
def test_logits_that_are_not_finite_are_refused(hmar, var, tokenizer, generate):
    """An overflow that starts at one position must not end in a silent code."""
    model = deepcopy(hmar if generate == "hmar" else var)
    with torch.no_grad():
        model.embedding.position_LC[PYRAMID.offsets[1] + 2] = math.inf
    function = generate_hmar if generate == "hmar" else generate_var
    with pytest.raises(ValueError, match=r"logits of scale 2 are NaN or infinite for images \[0, 1, 2\]"):
        function(model, tokenizer, CLASSES, SamplingConfig(top_k=20))


def test_ramps_in_every_form():
    pyramid = Pyramid((1, 2, 3, 4, 5))
    assert resolve_ramp(pyramid) == resolve_ramp(pyramid, "linear") == (0, 0.25, 0.5, 0.75, 1)
    assert resolve_ramp(pyramid, "constant") == (1,) * 5
    assert resolve_ramp(pyramid, "cosine") == pytest.approx((0, 0.1464466, 0.5, 0.8535534, 1))
    assert resolve_ramp(pyramid, [0, 3, 1, 0.5, 2]) == (0, 3, 1, 0.5, 2)
    assert resolve_ramp(Pyramid((4,))) == (0,)


@pytest.mark.parametrize(
    "ramp, message",
    [
        ("steep", "known are linear, constant, cosine"),
        ([0, 1], "2 factors, but the pyramid"),
        ([0, -1, 1], "factor -1"),
        ([0, math.inf, 1], "factor inf"),
        ([0, "1", 1], "factor '1'"),
    ],
)
def test_bad_ramps_are_refused(hmar, tokenizer, ramp, message):
    with pytest.raises(ValueError, match=message):
        generate_hmar(hmar, tokenizer, CLASSES, SamplingConfig(cfg_ramp=ramp))


@pytest.mark.parametrize("greedy", [True, False])
def test_one_code_a_pass(hmar, tokenizer, greedy):
    schedule = even_schedule(PYRAMID, 1000)
    counting = Counting(hmar)
    output = generate_hmar(counting, tokenizer, CLASSES, SamplingConfig(schedule=schedule, greedy=greedy))
    assert len(counting.next_scale_batches) == 3
    assert len(counting.masked_batches) == 3 + 15
    assert output.codes_BL.shape == (3, PYRAMID.length)
    other = generate_hmar(hmar, tokenizer, CLASSES, SamplingConfig(schedule="none", greedy=greedy))
    assert not torch.equal(output.codes_BL, other.codes_BL)


def test_the_first_pass_keeps_its_surest_codes(hmar, tokenizer):
    """Follow a greedy [1, 3] scale by hand."""
    sampling = SamplingConfig(cfg=0, greedy=True, schedule={2: [1, 3]})
    output = generate_hmar(hmar, tokenizer, CLASSES, sampling)
    quantizer = tokenizer.quantizer
    with torch.no_grad():
        f_hat = quantizer.accumulate(quantizer.empty_f_hat(3), output.codes_BL[:, :1], 0)
        inputs = quantizer.resize_input(f_hat, 1)
        confidence, first = hmar.next_scale(CLASSES, inputs, (1, 2)).softmax(-1).max(-1)
        hidden = confidence < confidence.amax(1, keepdim=True)
        assert (hidden.sum(1) == 3).all()
        second = hmar.masked(CLASSES, inputs, quantizer.own_residual(first, 1), hidden, (1, 2)).argmax(-1)
    assert torch.equal(output.codes_BL[:, 1:5], torch.where(hidden, second, first))


def test_masked_guidance_of_zero_skips_the_unconditional_half(hmar, tokenizer):
    outputs = []
    for factor, batch in ((1e-6, 6), (0.0, 3)):
        counting = Counting(hmar)
        sampling = SamplingConfig(cfg=1.5, greedy=True, masked_cfg_factor=factor, schedule={2: [1, 3]})
        outputs.append(generate_hmar(counting, tokenizer, CLASSES, sampling))
        assert counting.masked_batches == [batch]
        assert counting.next_scale_batches == [3, 6, 6]
    assert torch.equal(outputs[0].codes_BL, outputs[1].codes_BL)


@pytest.mark.parametrize("generate", ["hmar", "var"])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(hmar, var, tokenizer, generate):
    def codes(classes, seed=3, first_image=0):
        sampling = SamplingConfig(seed=seed, top_k=25, top_p=0.97)
        if generate == "hmar":
            return generate_hmar(hmar, tokenizer, classes, sampling, first_image=first_image).codes_BL
        return generate_var(var, tokenizer, classes, sampling, first_image=first_image).codes_BL

    together = codes(CLASSES)
    assert torch.equal(together, codes(CLASSES))
    for i in range(3):
        assert torch.equal(together[i : i + 1], codes(CLASSES[i : i + 1], first_image=i))
    assert not torch.equal(together, codes(CLASSES, seed=4))
    same_class = codes(torch.tensor([2, 2]))
    assert not torch.equal(same_class[0], same_class[1])


@pytest.mark.parametrize("schedule", ["default", "one-token"])
@pytest.mark.parametrize("generate", ["hmar", "var"])
def test_seeds_of_images_hold_in_every_batch_and_order(hmar, var, tokenizer, generate, schedule):
    classes, seeds = torch.tensor([0, 3, 1, 0, 2]), [11, 5, 2**40, 5, 0]

    def codes(order):
        sampling = SamplingConfig(seed=99, top_k=25, schedule=schedule if generate == "hmar" else None)
        function, model = (generate_hmar, hmar) if generate == "hmar" else (generate_var, var)
        chosen = [seeds[i] for i in order]
        return function(model, tokenizer, classes[order], sampling, seeds_B=chosen).codes_BL

    together = codes([0, 1, 2, 3, 4])
    assert torch.equal(together, torch.cat([codes([i]) for i in range(5)]))
    assert torch.equal(together[[3, 0, 4, 1, 2]], codes([3, 0, 4, 1, 2]))
    assert len({tuple(row) for row in together.tolist()}) == 5


def test_a_seed_of_its_own_is_the_first_image_of_that_seed(hmar, tokenizer):
    sampling = SamplingConfig(seed=7, top_k=25)
    expected = generate_hmar(hmar, tokenizer, CLASSES[:1], sampling).codes_BL
    for seeds in ([7], torch.tensor([7])):
        actual = generate_hmar(hmar, tokenizer, CLASSES[:1], replace(sampling, seed=0), seeds_B=seeds).codes_BL
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("seeds", [[1, 2], [1, 2, -3], [1, 2, 0.5], [1, 2, True]])
def test_bad_seeds_are_refused(hmar, tokenizer, seeds):
    with pytest.raises(ValueError, match="a non-negative integer for each of 3 images"):
        generate_hmar(hmar, tokenizer, CLASSES, seeds_B=seeds)
    with pytest.raises(ValueError, match="no first_image"):
        generate_hmar(hmar, tokenizer, CLASSES, seeds_B=[1, 2, 3], first_image=1)


def test_image_seeds_differ_and_fit_into_int64():
    seeds = {image_seed(seed, image) for seed in (*range(40), 2**70) for image in range(40)}
    assert len(seeds) == 41 * 40 and max(seeds) < 2**63


def test_progress_and_modes(hmar, tokenizer):
    seen = []
    hmar.train()
    output = generate_hmar(
        hmar, tokenizer, CLASSES, SamplingConfig(), on_scale=lambda k, f_hat: seen.append((k, f_hat))
    )
    assert [k for k, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][1], output.f_hat_BEhw)
    assert hmar.training and not tokenizer.training
    hmar.eval()
    assert output.images_BCHW.shape == (3, 3, 16, 16)
    assert output.images_BCHW.abs().max() <= 1
    assert not output.f_hat_BEhw.requires_grad


@pytest.mark.parametrize(
    "classes, message",
    [
        (torch.tensor([0, 5]), r"0\.\.3"),
        (torch.tensor([-1]), r"0\.\.3"),
        (torch.tensor([[1]]), "vector of integers"),
        (torch.tensor([0.5]), "vector of integers"),
        (torch.tensor([], dtype=torch.int64), "vector of integers"),
    ],
)
def test_bad_classes_are_refused(hmar, tokenizer, classes, message):
    with pytest.raises(ValueError, match=message):
        generate_hmar(hmar, tokenizer, classes)


def test_a_tokenizer_of_other_sizes_is_refused(tokenizer):
    with pytest.raises(ValueError, match="tokenizer has"):
        generate_hmar(build(HMAR, replace(CONFIG, vocab_size=16)), tokenizer, CLASSES)


@pytest.mark.parametrize("change", [{"temperature": 0}, {"top_p": 1.1}, {"top_k": -1}, {"cfg": -1}, {"seed": -1}])
def test_bad_sampling_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        SamplingConfig(**change)
