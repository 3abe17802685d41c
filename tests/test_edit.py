"""Editing: what counts as known, that nothing of a hole leaks, that known codes are put back and seen."""

import contextlib
import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from hmar.checkpoint import save_pretrained
from hmar.config import PRESETS
from hmar.edit import KnownImage, blank, box_hole, fit_image, inpaint, known_tokens, outpaint, paint, place
from hmar.generate import KnownCodes, SamplingConfig, generate_hmar, generate_var, masked_passes
from hmar.model import HMAR, MaskedTransformer, NextScaleTransformer
from hmar.pyramid import Pyramid
from hmar.tokenizer import Tokenizer
from hmar_command import hmar_here

TOKENIZER_CONFIG, CONFIG = PRESETS["tiny"]
CONFIG = replace(CONFIG, sides=(1, 2, 3, 6))
PYRAMID = CONFIG.pyramid
SIZE = 6 * TOKENIZER_CONFIG.stride  # 24 pixels, stride 4
SAMPLING = SamplingConfig(top_k=20, seed=2)
HOLES = {
    "corner": (0, 0, 9, 10),
    "one pixel": (13, 6, 14, 7),
    "middle": (8, 8, 16, 16),
    "half": (0, 12, 24, 24),
    "most": (0, 0, 24, 17),
}


def random_model(cls, config=CONFIG, seed=0, **options):
    torch.manual_seed(seed)
    model = cls(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def random_tokenizer(pyramid):
    torch.manual_seed(1)
    tokenizer = Tokenizer(TOKENIZER_CONFIG, pyramid)
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    return tokenizer.eval()


MODELS = {
    "hmar": lambda: random_model(HMAR),
    "var": lambda: random_model(NextScaleTransformer, pattern="block_causal"),
    "next-scale": lambda: random_model(NextScaleTransformer, pattern="block_diagonal"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def hmar():
    return MODELS["hmar"]()


@pytest.fixture(scope="module")
def tokenizer():
    return random_tokenizer(PYRAMID)


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3)) * 2 - 1


def hole_of(name):
    return box_hole(SIZE, SIZE, HOLES[name])


@contextlib.contextmanager
def recorded(model):
    """(classes, residuals, hidden, scales) of every call of the masked branch."""
    asked, masked = [], model.masked

    def record(classes, inputs, residuals, hidden, scales):
        asked.append((classes, residuals, hidden, scales))
        return masked(classes, inputs, residuals, hidden, scales)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "masked", record)
        yield asked


# --- what is known ----------------------------------------------------------------------------------------------------


def known_by_definition(hole_HW, sides, stride, share):
    """Token by token: cells without a hole, then the share of them in the window that resizing by area averages."""
    last = sides[-1]
    whole = [
        [not hole_HW[y * stride : (y + 1) * stride, x * stride : (x + 1) * stride].any() for x in range(last)]
        for y in range(last)
    ]
    known = []
    for side in sides:
        spans = [range(i * last // side, math.ceil((i + 1) * last / side)) for i in range(side)]
        for rows in spans:
            for columns in spans:
                cells = [whole[y][x] for y in rows for x in columns]
                known.append(sum(cells) >= share * len(cells) - 1e-9)
    return known


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("hole", HOLES)
def test_known_tokens_follow_their_definition(tokenizer, hole, share):
    hole_HW = hole_of(hole)
    actual = known_tokens(tokenizer, hole_HW[None], share)
    assert actual[0].tolist() == known_by_definition(hole_HW, PYRAMID.sides, 4, share)


def test_known_tokens_of_the_published_pyramid():
    config = replace(TOKENIZER_CONFIG, multipliers=(1, 1, 1, 1, 1), channels=4)
    tokenizer = Tokenizer(config, Pyramid.for_resolution(256))
    hole_HW = box_hole(256, 256, (100, 30, 190, 200))
    actual = known_tokens(tokenizer, hole_HW[None], 0.5)
    assert actual[0].tolist() == known_by_definition(hole_HW, tokenizer.pyramid.sides, 16, 0.5)
    assert actual[0, 0] and not actual[0].all()


def test_a_single_pixel_takes_its_token_from_the_last_scale_only(tokenizer):
    known_L = known_tokens(tokenizer, hole_of("one pixel")[None])[0]
    unknown = (~known_L).nonzero().flatten().tolist()
    assert unknown == [PYRAMID.offsets[3] + 1 * 6 + 3]  # pixel (13, 6) is in column 3 and row 1
    assert (~known_tokens(tokenizer, hole_of("one pixel")[None], 1.0)[0]).sum() == 4, "one at every scale"


def test_blank_fills_from_known_pixels_alone(images):
    hole_HW = hole_of("middle")
    hole_BHW = hole_HW.expand(3, -1, -1)
    filled = blank(images, hole_BHW)
    assert torch.equal(filled[:, :, ~hole_HW], images[:, :, ~hole_HW])
    assert filled[:, :, hole_HW].abs().max() < 0.9, "averages of known pixels"
    for junk in (math.nan, math.inf, -5.0):
        assert torch.equal(blank(images.masked_fill(hole_BHW[:, None], junk), hole_BHW), filled)
    flat = torch.full((1, 3, 7, 5), 0.25)
    holes = torch.rand(1, 7, 5, generator=torch.Generator().manual_seed(0)) < 0.8
    torch.testing.assert_close(blank(flat.masked_fill(holes[:, None], 9.0), holes), flat)


def test_blank_is_close_to_what_is_near():
    """Left black and right white, with a hole across the border: its left part gets darker than its right one."""
    images = torch.ones(1, 1, 16, 16)
    images[..., :8] = -1
    filled = blank(images, box_hole(16, 16, (4, 4, 12, 12))[None])[0, 0, 4:12, 4:12]
    assert filled[:, 0].max() < -0.3 and filled[:, -1].min() > 0.3


# --- nothing leaks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hole", HOLES)
def test_the_hole_in_the_input_does_not_change_a_bit(model, tokenizer, images, hole):
    hole_HW = hole_of(hole)
    class_B = torch.tensor([0, 3, 1])
    expected = inpaint(model, tokenizer, images, hole_HW, class_B, SAMPLING, composite=True)
    for junk in (torch.randn(images.shape), torch.tensor(math.nan), torch.tensor(math.inf)):
        changed = torch.where(hole_HW, junk, images)
        actual = inpaint(model, tokenizer, changed, hole_HW, class_B, SAMPLING, composite=True)
        assert torch.equal(actual.images_BCHW, expected.images_BCHW)
        assert torch.equal(actual.codes_BL, expected.codes_BL)
        assert torch.equal(actual.f_hat_BEhw, expected.f_hat_BEhw)
    y, x = (~hole_HW).nonzero()[0].tolist()
    changed = images.clone()
    changed[:, :, y : y + 2, x : x + 2] *= -1
    known = inpaint(model, tokenizer, changed, hole_HW, class_B, SAMPLING).known
    assert not torch.equal(known.blanked_BCHW, expected.known.blanked_BCHW), "known pixels do count"


@pytest.mark.parametrize("fit", ["resize", "crop"])
@pytest.mark.parametrize("height, width", [(50, 40), (24, 31), (11, 17)])
def test_the_hole_does_not_leak_through_resizing(fit, height, width):
    hole = box_hole(height, width, (3, 2, 9, 8))
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    resized, resized_hole = fit_image(images, hole, (SIZE, SIZE), fit)
    assert resized.shape == (2, 3, SIZE, SIZE) and resized_hole.shape == (SIZE, SIZE)
    assert 0 < resized_hole.sum() < SIZE * SIZE
    for junk in (1e9, math.nan, math.inf):
        other, other_hole = fit_image(images.masked_fill(hole, junk), hole, (SIZE, SIZE), fit)
        assert torch.equal(other_hole, resized_hole)
        assert torch.equal(other[..., ~resized_hole], resized[..., ~resized_hole])
        if (height, width) != (24, 31) or fit == "resize":
            assert torch.equal(other, resized), "only where nothing is resized the hole still holds what it held"


# --- codes are put back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hole", HOLES)
def test_known_codes_are_put_back_at_every_scale(model, tokenizer, images, hole):
    hole_HW = hole_of(hole)
    output = inpaint(model, tokenizer, images, hole_HW, sampling=SAMPLING)
    known = output.known.codes
    encoded = tokenizer.encode(blank(images, hole_HW.expand(3, -1, -1)))
    tokens_BL = known_tokens(tokenizer, hole_HW[None]).expand(3, -1)
    assert torch.equal(known.tokens_BL, tokens_BL) and torch.equal(known.codes_BL, encoded)
    assert torch.equal(output.codes_BL[tokens_BL], encoded[tokens_BL])
    assert not torch.equal(output.codes_BL[~tokens_BL], encoded[~tokens_BL])
    assert torch.equal(output.f_hat_BEhw, tokenizer.quantizer.f_hats(output.codes_BL)[-1])
    assert torch.equal(output.images_BCHW, tokenizer.decode(output.codes_BL))


def test_everything_known_is_the_reconstruction(model, tokenizer, images):
    codes_BL = tokenizer.encode(images)
    known = KnownCodes(codes_BL, torch.ones_like(codes_BL, dtype=torch.bool))
    generate = generate_hmar if isinstance(model, HMAR) else generate_var
    output = generate(model, tokenizer, torch.tensor([0, 1, 2]), SAMPLING, known=known)
    assert torch.equal(output.codes_BL, codes_BL)
    assert torch.equal(output.images_BCHW, tokenizer.decode(codes_BL))


def test_nothing_known_is_plain_sampling(model, tokenizer, images):
    codes_BL = tokenizer.encode(images)
    known = KnownCodes(codes_BL, torch.zeros_like(codes_BL, dtype=torch.bool))
    generate = generate_hmar if isinstance(model, HMAR) else generate_var
    class_B = torch.tensor([0, 1, 2])
    for schedule in ("default", "one-token", "none") if isinstance(model, HMAR) else ("none",):
        sampling = replace(SAMPLING, schedule=schedule)
        expected = generate(model, tokenizer, class_B, sampling)
        assert torch.equal(generate(model, tokenizer, class_B, sampling, known=known).codes_BL, expected.codes_BL)


def test_far_from_the_hole_the_latent_is_that_of_the_reconstruction(model, tokenizer, images):
    """One unknown token, at the last scale: phi reaches one position further, and beyond nothing changes by a bit."""
    output = inpaint(model, tokenizer, images, hole_of("one pixel"), sampling=SAMPLING)
    expected = tokenizer.quantizer.f_hats(output.known.codes.codes_BL)[-1]
    near_hw = torch.zeros(6, 6, dtype=torch.bool)
    near_hw[0:3, 2:5] = True
    assert torch.equal(output.f_hat_BEhw[:, :, ~near_hw], expected[:, :, ~near_hw])
    assert not torch.equal(output.f_hat_BEhw[:, :, 1, 3], expected[:, :, 1, 3])
    torch.testing.assert_close(output.known.reconstruct(), tokenizer.decode_f_hat(expected))


def test_composite_keeps_the_original_pixels(model, tokenizer, images):
    hole_HW = hole_of("middle")
    plain = inpaint(model, tokenizer, images, hole_HW, sampling=SAMPLING).images_BCHW
    pasted = inpaint(model, tokenizer, images, hole_HW, sampling=SAMPLING, composite=True).images_BCHW
    assert torch.equal(pasted[:, :, ~hole_HW], images[:, :, ~hole_HW])
    assert torch.equal(pasted[:, :, hole_HW], plain[:, :, hole_HW])
    assert not torch.equal(plain[:, :, ~hole_HW], images[:, :, ~hole_HW])
    with torch.autocast("cpu", torch.bfloat16):
        output = inpaint(model, tokenizer, images, hole_HW, sampling=SAMPLING, composite=True)
    assert torch.equal(output.images_BCHW[:, :, ~hole_HW], images[:, :, ~hole_HW]), "at full precision"
    encoded = inpaint(model, tokenizer, images, hole_HW, sampling=SAMPLING).known.codes.codes_BL
    assert torch.equal(output.known.codes.codes_BL, encoded)


# --- HMAR's masked passes ---------------------------------------------------------------------------------------------


def test_masked_passes_by_hand():
    assert masked_passes((1, 1, 2, 5), [9]) == [[0], [8], [7], [5]], "nothing known: the schedule"
    assert masked_passes((9,), [9, 4, 0]) == [[0, 4, 0]]
    # Of 4 unknown codes 8/9, 7/9 and 5/9 are left after the passes: 4, 4 and 3, rounded up.
    assert masked_passes((1, 1, 2, 5), [9, 4]) == [[0, 4], [8, 0], [7, 0], [5, 3]]
    assert masked_passes((1,) * 4, [3]) == [[3], [0], [2], [1]], "two passes that would commit one code are one"
    assert masked_passes((4, 5), [8]) == [[8], [5]]


def test_masked_passes_begin_with_all_unknown_codes_and_never_hide_more():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        size = int(torch.randint(2, 40, (1,), generator=generator))
        cuts = torch.randperm(size - 1, generator=generator)[: int(torch.randint(0, size, (1,), generator=generator))]
        edges = [0, *(cuts.sort().values + 1).tolist(), size]
        passes = [b - a for a, b in pairwise(edges)]
        for unknown in range(1, size):
            hidden = [count for (count,) in masked_passes(passes, [unknown]) if count]
            assert hidden[0] == unknown and hidden[-1] >= 1
            assert all(later < now for now, later in pairwise(hidden))
            assert len(hidden) <= min(len(passes), unknown)


@pytest.mark.parametrize("schedule", ["none", "default", "even-3", "one-token"])
def test_masked_passes_see_the_known_tokens(hmar, tokenizer, images, schedule):
    hole_HW = hole_of("middle")
    with recorded(hmar) as asked:
        output = inpaint(hmar, tokenizer, images, hole_HW, sampling=replace(SAMPLING, schedule=schedule))
    tokens_BL = output.known.codes.tokens_BL
    scales = [k for k in range(1, 4) if not tokens_BL[0, PYRAMID.slice(k)].all()]
    assert scales == [2, 3] and sorted({scale[0] for *_, scale in asked}) == scales
    for k in scales:
        hidden = [hidden_Bn for _, _, hidden_Bn, scale in asked if scale[0] == k]
        known_Bn = tokens_BL[:, PYRAMID.slice(k)]
        assert torch.equal(hidden[0], ~known_Bn), "the first pass predicts everything unknown"
        assert all(not (hidden_Bn & known_Bn).any() for hidden_Bn in hidden)
        if schedule == "none":
            assert len(hidden) == 1
        if schedule == "one-token":
            assert [int(hidden_Bn[0].sum()) for hidden_Bn in hidden] == list(range(int((~known_Bn[0]).sum()), 0, -1))
    assert torch.equal(output.codes_BL[tokens_BL], output.known.codes.codes_BL[tokens_BL])


@pytest.mark.parametrize("kind", MODELS)
def test_only_hmar_reads_known_codes_of_the_same_scale(tokenizer, images, kind):
    """Change known codes of the last scale alone: HMAR's hole changes there, next-scale prediction cannot know."""
    model, hole_HW = MODELS[kind](), hole_of("half")
    sampling = replace(SAMPLING, schedule="none")
    known = KnownImage(tokenizer, images, hole_HW)
    before = paint(model, known, sampling=sampling).codes_BL
    tokens_BL = known.codes.tokens_BL
    last = PYRAMID.slice(3)
    codes_BL = known.codes.codes_BL.clone()
    codes_BL[:, last] = (codes_BL[:, last] + 7) % CONFIG.vocab_size
    known.codes = KnownCodes(codes_BL, tokens_BL)
    after = paint(model, known, sampling=sampling).codes_BL
    assert torch.equal(after[:, : last.start], before[:, : last.start])
    hole_BL = ~tokens_BL
    hole_BL[:, : last.start] = False
    assert torch.equal(after[hole_BL], before[hole_BL]) == (kind != "hmar")


def test_the_first_masked_pass_has_the_guidance_of_the_pass_it_replaces(hmar, tokenizer, images):
    hole_HW, class_B = hole_of("most"), torch.tensor([0, 3, 1])
    with recorded(hmar) as asked:
        inpaint(hmar, tokenizer, images, hole_HW, class_B, replace(SAMPLING, cfg=2.0, masked_cfg_factor=0.0))
    batches = [(scale[0], len(classes), int(hidden[0].sum())) for classes, _, hidden, scale in asked]
    assert batches == [(1, 3, 3), (2, 6, 6), (2, 3, 5), (2, 3, 4), (3, 6, 30)], (
        "at 2 x 2 nothing is known, and the masked pass is one of the schedule's own"
    )
    assert asked[1][0].tolist() == [0, 3, 1, 4, 4, 4]


# --- classes, seeds and batches ---------------------------------------------------------------------------------------


def test_without_a_class_it_is_the_null_class_and_guidance_does_not_matter(model, tokenizer, images):
    hole_HW = hole_of("half")
    null_B = torch.full((3,), CONFIG.null_class)
    expected = inpaint(model, tokenizer, images, hole_HW, null_B, replace(SAMPLING, cfg=0.0)).codes_BL
    for cfg in (0.0, 4.0):
        assert torch.equal(
            inpaint(model, tokenizer, images, hole_HW, None, replace(SAMPLING, cfg=cfg)).codes_BL, expected
        )
    of_class = inpaint(model, tokenizer, images, hole_HW, torch.tensor([0, 3, 1]), SAMPLING).codes_BL
    assert not torch.equal(of_class, expected)


@pytest.mark.parametrize("schedule", ["default", "one-token"])
def test_an_edit_depends_neither_on_its_batch_nor_on_other_holes(model, tokenizer, images, schedule):
    """Holes of four sizes, and so of other numbers of passes, in one batch."""
    sampling = replace(SAMPLING, schedule=schedule if isinstance(model, HMAR) else "none")
    images = torch.cat([images, images[:1].flip(3)])
    holes = torch.stack([hole_of(name) for name in ("corner", "most", "one pixel", "half")])
    class_B, seeds = torch.tensor([0, 1, 2, 3]), [5, 6, 7, 8]
    together = inpaint(model, tokenizer, images, holes, class_B, sampling, seeds_B=seeds)
    for order in ([0], [1], [2], [3], [3, 1, 0, 2]):
        alone = inpaint(
            model, tokenizer, images[order], holes[order], class_B[order], sampling, seeds_B=[seeds[i] for i in order]
        )
        assert torch.equal(alone.codes_BL, together.codes_BL[order])


def test_one_image_painted_several_times(hmar, tokenizer, images):
    hole_HW = hole_of("half")
    output = inpaint(hmar, tokenizer, images[:1].expand(4, -1, -1, -1), hole_HW, sampling=SAMPLING)
    assert len({tuple(codes) for codes in output.codes_BL.tolist()}) == 4
    known = KnownImage(tokenizer, images[:1], hole_HW)
    shared = generate_hmar(hmar, tokenizer, torch.full((4,), 4), replace(SAMPLING, cfg=0.0), known=known.codes)
    assert torch.equal(shared.codes_BL, output.codes_BL), "one row of known codes serves a whole batch"


# --- out-painting -----------------------------------------------------------------------------------------------------


def test_outpainting_paints_around_the_box(model, tokenizer, images):
    small = images[:, :, :12, :16]
    output = outpaint(model, tokenizer, small, (4, 8, 20, 20), sampling=SAMPLING, composite=True)
    assert torch.equal(output.images_BCHW[:, :, 8:20, 4:20], small)
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[8:20, 4:20] = True
    assert torch.equal(output.known.hole_BHW, ~inside.expand(3, -1, -1))
    assert output.known.codes.tokens_BL[0, PYRAMID.slice(3)].sum() == 3 * 4


def test_outpainting_moves_an_image_that_sticks_out(images):
    canvas, hole = place(images, (12, -6, 36, 18), SIZE)
    assert torch.equal(canvas[:, :, :18, 12:], images[:, :, 6:, :12])
    assert not hole[:18, 12:].any() and hole.sum() == SIZE * SIZE - 18 * 12
    canvas, hole = place(images, (4, 4, 12, 12), SIZE, fit="resize")
    assert torch.equal(canvas[:, :, 4:12, 4:12], fit_image(images, torch.zeros(SIZE, SIZE).bool(), (8, 8), "resize")[0])
    assert hole.sum() == SIZE * SIZE - 64


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_resized_holes_are_never_smaller():
    hole = torch.zeros(60, 50, dtype=torch.bool)
    hole[31, 17] = True
    images = torch.zeros(1, 3, 60, 50)
    _, resized_hole = fit_image(images, hole, (24, 24), "resize")
    y, x = int(31 * 24 / 60), int(17 * 24 / 50)
    assert resized_hole[y, x] and resized_hole.sum() <= 4
    larger = fit_image(images, hole, (120, 100), "resize")[1]
    assert larger.nonzero().tolist() == [[62, 34], [62, 35], [63, 34], [63, 35]]


def test_resizing_averages_known_pixels_only():
    """A flat image stays flat up to the border of a hole that holds something else."""
    images = torch.full((1, 3, 48, 36), 0.5)
    hole = box_hole(48, 36, (10, 10, 20, 20))
    resized, resized_hole = fit_image(images.masked_fill(hole, -1.0), hole, (24, 24), "resize")
    known = resized[:, :, ~resized_hole]
    torch.testing.assert_close(known, torch.full_like(known, 0.5))


def test_crop_keeps_the_middle():
    images = torch.arange(30.0).div(30).expand(1, 3, 20, 30)
    hole = box_hole(20, 30, (10, 5, 12, 7))
    cropped, cropped_hole = fit_image(images, hole, (20, 20), "crop")
    assert torch.equal(cropped, images[..., 5:25]) and torch.equal(cropped_hole, hole[:, 5:25])
    same, same_hole = fit_image(images, hole, (20, 30), "refuse")
    assert same is images and same_hole is hole


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hole, message",
    [
        (torch.zeros(SIZE, SIZE, dtype=torch.bool), "hole is empty"),
        (torch.ones(SIZE, SIZE, dtype=torch.bool), "covers a whole image"),
        (torch.eye(SIZE).bool() | torch.eye(SIZE).roll(4, 1).bool() | (torch.arange(SIZE) % 4 == 0), "every token"),
        (torch.ones(SIZE, SIZE - 1, dtype=torch.bool), r"expected torch.bool.*\(24, 24\)"),
        (torch.ones(SIZE, SIZE), "expected torch.bool"),
        (torch.ones(2, SIZE, SIZE, dtype=torch.bool), r"or \(3, 24, 24\)"),
    ],
)
def test_bad_holes_are_refused(hmar, tokenizer, images, hole, message):
    with pytest.raises(ValueError, match=message):
        inpaint(hmar, tokenizer, images, hole)


def test_other_bad_input_is_refused(hmar, tokenizer, images):
    hole = hole_of("middle")
    with pytest.raises(ValueError, match=r"fit_image"):
        inpaint(hmar, tokenizer, images[..., :-4], hole)
    for wrong in (images.mul(127).byte(), images.mul(127), torch.full_like(images, math.nan)):
        with pytest.raises(ValueError, match=r"\[-1, 1\]"):
            inpaint(hmar, tokenizer, wrong, hole)
    with pytest.raises(ValueError, match="known_share is 0"):
        inpaint(hmar, tokenizer, images, hole, known_share=0)
    with pytest.raises(ValueError, match="2 classes for 3 images"):
        inpaint(hmar, tokenizer, images, hole, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="MaskedTransformer cannot paint alone"):
        inpaint(MaskedTransformer(CONFIG), tokenizer, images, hole)
    with pytest.raises(ValueError, match="known are refuse, resize, crop"):
        fit_image(images, hole, (8, 8), "stretch")
    with pytest.raises(ValueError, match="24 x 24 pixels where 8 x 8 fit"):
        fit_image(images, hole, (8, 8))
    with pytest.raises(ValueError, match="mask has 20 x 24 pixels, but the image has 24 x 24"):
        fit_image(images, hole[:, :20], (24, 24))
    with pytest.raises(ValueError, match="leaves the image of 24 x 24"):
        box_hole(24, 24, (0, 0, 25, 24))
    for box in ((4, 4, 4, 8), (4, 4, 2, 8), (1, 2, 3), (0.5, 1, 2, 3)):
        with pytest.raises(ValueError, match="A box is four whole numbers"):
            box_hole(24, 24, box)
    with pytest.raises(ValueError, match="outside of the canvas"):
        place(images, (30, 0, 54, 24), SIZE)
    with pytest.raises(ValueError, match="hole is empty"):
        outpaint(hmar, tokenizer, images, (0, 0, 24, 24))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hmar, tokenizer, images):
    """Weights of three models, an image with its mask, and the same image with other content in the hole."""
    folder = tmp_path_factory.mktemp("edit")
    save_pretrained(folder / "tokenizer", tokenizer)
    save_pretrained(folder / "hmar", hmar, tokenizer_weights=str(folder / "tokenizer"))
    save_pretrained(folder / "var", MODELS["var"](), tokenizer_weights=str(folder / "tokenizer"))
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[8:16, 8:16] = 255
    Image.fromarray(pixels).save(folder / "image.png")
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.where(mask[..., None] > 0, 255 - pixels, pixels)).save(folder / "other.png")
    Image.fromarray(np.zeros_like(mask)).save(folder / "black.png")
    Image.fromarray(np.full_like(mask, 255)).save(folder / "white.png")
    Image.fromarray(pixels).resize((40, 32)).save(folder / "large.png")
    Image.fromarray(mask).resize((40, 32)).save(folder / "large-mask.png")
    return folder


def edit(folder, *arguments):
    """`hmar edit` in `folder`: exit code, standard output and standard error."""
    done = hmar_here("edit", *arguments, cwd=folder)
    return done.returncode, done.stdout, done.stderr


def pngs(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.parametrize("model", ["hmar", "var"])
def test_command_with_a_mask(folder, tmp_path, model):
    common = ("--model", model, "--count", "2", "--seed", "4", "--quiet")
    code, out, err = edit(folder, *common, "--image", "image.png", "--mask", "mask.png", "--output", tmp_path / "a")
    assert (code, err) == (0, "") and "2 images in" in out
    assert sorted(pngs(tmp_path / "a")) == ["000000-class-4.png", "000001-class-4.png", "grid.png", "input.png"]
    code, _, _ = edit(folder, *common, "--image", "other.png", "--box", "8,8,16,16", "--output", tmp_path / "b")
    assert code == 0 and pngs(tmp_path / "a") == pngs(tmp_path / "b"), "what the hole shows does not change a byte"
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert settings["classes"] == [4] and settings["cfg"] == 0 and settings["known_share"] == 0.5
    first = pngs(tmp_path / "a")
    (tmp_path / "a" / "000001-class-4.png").unlink()
    code, _, _ = edit(folder, *common, "--image", "other.png", "--mask", "mask.png", "--output", tmp_path / "a")
    assert code == 0 and pngs(tmp_path / "a") == first, "a command that was stopped goes on"
    code, _, err = edit(folder, *common, "--image", "image.png", "--box", "8,8,17,16", "--output", tmp_path / "a")
    assert code == 2 and "made with other settings (known_pixels" in err


def test_command_with_classes_and_composite(folder, tmp_path):
    common = ("--model", "hmar", "--image", "image.png", "--mask", "mask.png", "--quiet", "--composite")
    code, _, err = edit(folder, *common, "--classes", "0-1", "--seeds", "3,9", "--cfg", "2", "--output", tmp_path / "a")
    assert (code, err) == (0, "")
    names = [f"seed-{seed}-class-{target}.png" for seed in (3, 9) for target in (0, 1)]
    assert set(names) < set(pngs(tmp_path / "a"))
    original, mask = (np.asarray(Image.open(folder / name)) for name in ("image.png", "mask.png"))
    results = [np.asarray(Image.open(tmp_path / "a" / name)) for name in names]
    for result in results:
        assert np.array_equal(result[mask == 0], original[mask == 0])
    assert len({result.tobytes() for result in results}) == 4
    code, _, _ = edit(folder, *common, "--classes", "1", "--seeds", "9", "--cfg", "2", "--output", tmp_path / "b")
    assert code == 0 and (tmp_path / "b" / names[3]).read_bytes() == (tmp_path / "a" / names[3]).read_bytes()


def test_command_paints_around(folder, tmp_path):
    common = ("--model", "hmar", "--image", "image.png", "--quiet", "--composite")
    code, _, err = edit(folder, *common, "--around=-12,0,12,24", "--output", tmp_path / "a")
    assert (code, err) == (0, "")
    original = np.asarray(Image.open(folder / "image.png"))
    result = np.asarray(Image.open(tmp_path / "a" / "000000-class-4.png"))
    assert np.array_equal(result[:, :12], original[:, 12:])


def test_command_with_another_size(folder, tmp_path):
    common = ("--model", "hmar", "--image", "large.png", "--mask", "large-mask.png", "--quiet")
    code, _, err = edit(folder, *common, "--output", tmp_path / "none")
    assert code == 2 and "has 40 x 32 pixels where 24 x 24 fit" in err and not (tmp_path / "none").exists()
    for fit in ("resize", "crop"):
        assert edit(folder, *common, "--fit", fit, "--output", tmp_path / fit)[0] == 0
        with Image.open(tmp_path / fit / "000000-class-4.png") as result:
            assert result.size == (24, 24)
    assert (tmp_path / "resize" / "input.png").read_bytes() != (tmp_path / "crop" / "input.png").read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "got no hole: give one of mask, box and around"),
        (("--mask", "mask.png", "--box", "0,0,4,4"), "got mask and box: give one"),
        (("--mask", "large-mask.png"), "mask has 40 x 32 pixels, but the image has 24 x 24"),
        (("--mask", "black.png"), "hole is empty"),
        (("--mask", "white.png"), "covers a whole image"),
        (("--mask", "missing.png"), "Cannot read the image missing.png"),
        (("--mask", "hmar/config.json"), "Cannot read the image hmar/config.json"),
        (("--box", "0,0,4"), "expected x0,y0,x1,y1"),
        (("--box", "0,0,4,x"), "expected x0,y0,x1,y1"),
        (("--box", "0,0,40,4"), "leaves the image of 24 x 24"),
        (("--around", "0,0,8,8"), "24 x 24 pixels where 8 x 8 fit"),
        (("--box", "0,0,4,4", "--fit", "stretch"), "known are refuse, resize, crop"),
        (("--box", "0,0,4,4", "--known-share", "2"), "known_share is 2"),
        (("--box", "0,0,4,4", "--classes", "9"), "classes [9]: expected numbers from 0 to 3"),
        (("--box", "0,0,4,4", "--schedule", "fast"), 'No schedule is called "fast"'),
        (("--box", "0,0,4,4", "--count", "0"), "count is 0"),
    ],
)
def test_command_errors_are_one_sentence_and_write_nothing(folder, tmp_path, arguments, message):
    common = ("--model", "hmar", "--image", "image.png", "--output", tmp_path / "none")
    code, _, err = edit(folder, *common, *arguments)
    assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "none").exists()
