"""Sampling: classes to images, scale by scale, with HMAR (masked passes, no cache) and VAR (key-value cache).

    f_hat = 0;  for every scale:  inputs = resize(f_hat) -> logits -> guidance -> truncation -> codes
                                  HMAR: keep the surest codes, hide the others, predict them again, ...
                                  f_hat += contribution of the codes
    image = decode(f_hat)

Codes that are known beforehand (`hmar.edit`) take their places before f_hat grows, and HMAR's masked passes see them.

HMAR, arXiv 2506.04421, sections 4.3 and 4.4; VAR, arXiv 2404.02905, section 3.2. Free functions over `hmar.model` and
`hmar.tokenizer`, without gradients.

Shapes: B images, n tokens of one scale, L tokens of the pyramid, V codes, E code dimensions, h w latent sides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from hmar.config import ModelConfig
from hmar.model import HMAR, NextScaleTransformer
from hmar.pyramid import SIDES_BY_RESOLUTION, Pyramid
from hmar.tokenizer import Tokenizer
from hmar_kernels import SampledCodes, sample_codes
from hmar_kernels.least_confident.reference import least_confident_first

ScheduleLike = str | Mapping[int, Sequence[int]] | Sequence[Sequence[int]] | None
RampLike = str | Sequence[float]


@dataclass(frozen=True)
class SamplingConfig:
    """How codes are drawn.

    cfg: strength of classifier-free guidance; 0 turns it off.
    cfg_ramp: how guidance grows from scale to scale, see `resolve_ramp`; "linear" is the published one.
    top_k, top_p: truncation, see `hmar_kernels.sample_codes`; 0 turns either off.
    temperature: divides the guided logits.
    schedule: HMAR's masked passes, see `resolve_schedule`; None and "default" are the published ones, "none" is one
        pass a scale, "one-token" as many passes as codes.
    masked_cfg_factor: guidance in masked passes is cfg times this. The published 1e-6 is all but off; 0 is off, and
        saves half of every masked pass.
    seed: the random numbers of image i follow from (seed, i), so an image does not depend on its batch. Up to rounding,
        that is: batches of another size may multiply matrices in another order.
    greedy: take the most likely code instead of drawing.
    """

    cfg: float = 1.5
    cfg_ramp: RampLike = "linear"
    top_k: int = 0
    top_p: float = 0.0
    temperature: float = 1.0
    schedule: ScheduleLike = None
    masked_cfg_factor: float = 0.0
    seed: int = 0
    greedy: bool = False

    def __post_init__(self):
        for name, valid, expected in (
            ("cfg", math.isfinite(self.cfg) and self.cfg >= 0, "a number of at least 0"),
            ("top_k", self.top_k >= 0, "at least 0, which turns it off"),
            ("top_p", 0 <= self.top_p <= 1, "between 0, which turns it off, and 1"),
            ("temperature", math.isfinite(self.temperature) and self.temperature > 0, "positive; see also greedy"),
            ("masked_cfg_factor", self.masked_cfg_factor >= 0, "at least 0"),
            ("seed", self.seed >= 0, "a non-negative integer"),
        ):
            if not valid:
                raise ValueError(f"SamplingConfig.{name} is {getattr(self, name)}; it must be {expected}.")


# Side of a scale -> codes committed by each of its passes; a scale not named takes one pass.
SMALL_SCALES = {2: (1, 3), 3: (1, 1, 2, 5)}
DEFAULT_SCHEDULES = {
    SIDES_BY_RESOLUTION[256]: SMALL_SCALES,
    SIDES_BY_RESOLUTION[512]: {**SMALL_SCALES, 4: (5, 11)},
    SIDES_BY_RESOLUTION[1024]: {**SMALL_SCALES, 4: (3, 5, 8)},
}


NAMED_RAMPS: dict[str, Callable[[float], float]] = {
    "linear": lambda depth: depth,
    "constant": lambda depth: 1.0,
    "cosine": lambda depth: (1 - math.cos(math.pi * depth)) / 2,
}


class GenerationOutput(NamedTuple):
    images_BCHW: Tensor  # in [-1, 1]
    codes_BL: Tensor  # int64
    f_hat_BEhw: Tensor


class KnownCodes(NamedTuple):
    """Codes that are put back instead of drawn; one row does for a batch of equal images. `hmar.edit` makes them."""

    codes_BL: Tensor  # int64
    tokens_BL: Tensor  # bool: which of them are known


@torch.no_grad()
def generate_hmar(
    model: HMAR,
    tokenizer: Tokenizer,
    class_B: Tensor,
    sampling: SamplingConfig | None = None,
    *,
    on_scale: Callable[[int, Tensor], None] | None = None,
    first_image: int = 0,
    seeds_B: Sequence[int] | Tensor | None = None,
    known: KnownCodes | None = None,
) -> GenerationOutput:
    """Images of the given classes.

    Args:
        class_B: int64 classes; `model.config.null_class` for none in particular.
        on_scale: called with (k, f_hat) after each scale, for progress and for early looks through the decoder.
        first_image: index of the first image for its seed, when a large set is generated in several batches.
        seeds_B: instead, one seed for each image: the image that `sampling.seed` of this value gives as its first.
        known: codes to put back at every scale. Where some codes of a scale are known, a masked pass that sees them
            follows on the next-scale pass in its place, with its guidance; see `masked_passes`.
    """
    sampling = sampling or SamplingConfig()
    pyramid, quantizer = model.config.pyramid, tokenizer.quantizer
    schedule = resolve_schedule(pyramid, sampling.schedule)
    guidance_S = guidance_of_scales(sampling, pyramid)
    check_pair(model.config, tokenizer)
    class_B = checked_classes(model.config, class_B, quantizer.codebook.weight.device)
    batch = len(class_B)
    if known is not None:
        check_known(known, batch, pyramid.length, model.config.vocab_size)
    seeds_B = image_seeds(sampling, batch, first_image, seeds_B).to(class_B.device)
    positions_L = torch.arange(pyramid.length, device=class_B.device)
    f_hat_BEhw = quantizer.empty_f_hat(batch)
    all_codes, bad_draws = [], []
    with evaluating(model, tokenizer):
        for k in range(pyramid.num_scales):
            scale = (k, k + 1)
            inputs_BnE = scale_inputs(model, tokenizer, f_hat_BEhw, k)

            classes, (inputs,) = with_null(guidance_S[k] != 0, class_B, model.config, inputs_BnE)
            logits_BnV = model.next_scale(classes, inputs, scale)
            positions_n = positions_L[pyramid.slice(k)]
            codes_Bn, confidence_Bn, bad_Bn = draw(logits_BnV, sampling, guidance_S[k], seeds_B, positions_n)
            bad_draws.append((k, bad_Bn.any(1)))

            hidden_Bn = torch.ones_like(codes_Bn, dtype=torch.bool)
            num_unknown = [pyramid.sizes[k]] * batch
            if known is not None:
                hidden_Bn = ~known.tokens_BL[:, pyramid.slice(k)].expand(batch, -1)
                num_unknown = hidden_Bn.sum(1).tolist()
                codes_Bn = torch.where(hidden_Bn, codes_Bn, known.codes_BL[:, pyramid.slice(k)])

            for i, num_hidden in enumerate(masked_passes(schedule[k], num_unknown) if k > 0 else ()):
                active = [count > 0 for count in num_hidden]
                if not any(active):
                    continue
                guidance = guidance_S[k] if i == 0 else sampling.cfg * sampling.masked_cfg_factor
                active_B1 = torch.tensor(active, device=codes_Bn.device)[:, None]
                fewer_Bn = stay_hidden(confidence_Bn, hidden_Bn, torch.tensor(num_hidden, device=codes_Bn.device))
                hidden_Bn = torch.where(active_B1, fewer_Bn, hidden_Bn)
                # NOTE: the map holds the last draw for hidden codes too: resizing mixes it into the visible ones.
                residuals_BnE = quantizer.own_residual(codes_Bn, k).to(inputs_BnE.dtype)
                classes, (inputs, residuals, hidden) = with_null(
                    guidance != 0, class_B, model.config, inputs_BnE, residuals_BnE, hidden_Bn
                )
                logits_BnV = model.masked(classes, inputs, residuals, hidden, scale)
                drawn_Bn, drawn_confidence_Bn, bad_Bn = draw(
                    logits_BnV, sampling, guidance, seeds_B, positions_n, masked_step(i)
                )
                bad_draws.append((k, bad_Bn.any(1)))
                codes_Bn = torch.where(hidden_Bn & active_B1, drawn_Bn, codes_Bn)
                confidence_Bn = torch.where(active_B1, drawn_confidence_Bn, confidence_Bn)

            f_hat_BEhw = quantizer.accumulate(f_hat_BEhw, codes_Bn, k)
            all_codes.append(codes_Bn)
            if on_scale is not None:
                on_scale(k, f_hat_BEhw)
        refuse_nonfinite(*zip(*bad_draws, strict=True))
        return GenerationOutput(tokenizer.decode_f_hat(f_hat_BEhw), torch.cat(all_codes, dim=1), f_hat_BEhw)


@torch.no_grad()
def generate_var(
    model: NextScaleTransformer,
    tokenizer: Tokenizer,
    class_B: Tensor,
    sampling: SamplingConfig | None = None,
    *,
    use_cache: bool = True,
    on_scale: Callable[[int, Tensor], None] | None = None,
    first_image: int = 0,
    seeds_B: Sequence[int] | Tensor | None = None,
    known: KnownCodes | None = None,
) -> GenerationOutput:
    """Images of the given classes from next-scale prediction alone; arguments as in `generate_hmar`.

    With `use_cache` each scale's tokens pass the model once and later scales read their keys and values; without, every
    scale computes all scales before it again, which gives the same codes and is there to test that. A block-diagonal
    model reads no earlier scale and needs neither.
    """
    sampling = sampling or SamplingConfig()
    pyramid, quantizer = model.config.pyramid, tokenizer.quantizer
    guidance_S = guidance_of_scales(sampling, pyramid)
    check_pair(model.config, tokenizer)
    class_B = checked_classes(model.config, class_B, quantizer.codebook.weight.device)
    batch = len(class_B)
    if known is not None:
        check_known(known, batch, pyramid.length, model.config.vocab_size)
    seeds_B = image_seeds(sampling, batch, first_image, seeds_B).to(class_B.device)
    positions_L = torch.arange(pyramid.length, device=class_B.device)
    causal = model.pattern == "block_causal"
    caches = [LayerKeysValues(pyramid.length) for _ in model.blocks] if causal and use_cache else None
    f_hat_BEhw = quantizer.empty_f_hat(batch)
    all_codes, all_inputs, bad_draws = [], [], []
    with evaluating(model, tokenizer):
        for k in range(pyramid.num_scales):
            inputs_BLE = scale_inputs(model, tokenizer, f_hat_BEhw, k)
            scales = (k, k + 1)
            if causal and not use_cache:
                all_inputs.append(inputs_BLE)
                inputs_BLE = torch.cat(all_inputs, dim=1)
                scales = (0, k + 1)

            # NOTE: a scale may have no guidance, but the unconditional half must enter the cache all the same.
            classes, (inputs,) = with_null(any(guidance_S), class_B, model.config, inputs_BLE)
            logits_BnV = model(classes, inputs, scales, caches)[:, -pyramid.sizes[k] :]
            codes_Bn, _, bad_Bn = draw(logits_BnV, sampling, guidance_S[k], seeds_B, positions_L[pyramid.slice(k)])
            bad_draws.append((k, bad_Bn.any(1)))
            if known is not None:
                span = pyramid.slice(k)
                codes_Bn = torch.where(known.tokens_BL[:, span], known.codes_BL[:, span], codes_Bn)

            f_hat_BEhw = quantizer.accumulate(f_hat_BEhw, codes_Bn, k)
            all_codes.append(codes_Bn)
            if on_scale is not None:
                on_scale(k, f_hat_BEhw)
        refuse_nonfinite(*zip(*bad_draws, strict=True))
        return GenerationOutput(tokenizer.decode_f_hat(f_hat_BEhw), torch.cat(all_codes, dim=1), f_hat_BEhw)


class LayerKeysValues:
    """Keys and values that one block has computed for the scales so far, in one buffer for the whole pyramid."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.k_BHLD: Tensor | None = None
        self.v_BHLD: Tensor | None = None

    def append(self, k_BHLD: Tensor, v_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Add a scale's keys and values [B, H, n, D]; returns all so far, as views."""
        B, H, n, D = k_BHLD.shape
        all_k_BHLD, all_v_BHLD, start = self.reserve(k_BHLD, B, H, n, D)
        all_k_BHLD[:, :, start : self.length] = k_BHLD
        all_v_BHLD[:, :, start : self.length] = v_BHLD
        return all_k_BHLD[:, :, : self.length], all_v_BHLD[:, :, : self.length]

    def reserve(self, like: Tensor, B: int, H: int, n: int, D: int) -> tuple[Tensor, Tensor, int]:
        """For a caller that writes n more itself: the buffers [B, H, capacity, D], with dtype and device of `like`, and
        behind how many tokens."""
        assert self.length + n <= self.capacity, f"{self.length} + {n} tokens exceed the cache's {self.capacity}"
        if self.k_BHLD is None:
            self.k_BHLD, self.v_BHLD = (like.new_empty(B, H, self.capacity, D) for _ in range(2))
        start, self.length = self.length, self.length + n
        return self.k_BHLD, self.v_BHLD, start


def draw(
    logits_BnV: Tensor,
    sampling: SamplingConfig,
    guidance: float | Tensor,
    seeds_B: Tensor,
    positions: Tensor,
    step: int = 0,
    into: SampledCodes | None = None,
    at_Bn: Tensor | None = None,
    overlap: bool = False,
) -> SampledCodes:
    """Codes of the tokens at `positions` of the pyramid ([n] or [B, n]), for as many images as there are seeds.

    The logits are those of the images, or, twice as many, also those of the null class, as `with_null` puts them.
    into, at_Bn, overlap: where the draws are written, and when they may begin, see `hmar_kernels.sample_codes`.
    """
    conditional_BnV, unconditional_BnV = logits_BnV, None
    if logits_BnV.shape[0] > len(seeds_B):
        conditional_BnV, unconditional_BnV = logits_BnV.chunk(2)
    return sample_codes(
        conditional_BnV,
        unconditional_BnV,
        seeds=seeds_B,
        positions=positions,
        step=step,
        guidance=None if unconditional_BnV is None else guidance,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        greedy=sampling.greedy,
        into=into,
        at=at_Bn,
        overlap=overlap,
    )


def masked_step(row: int) -> int:
    """Which draw of a token one in the masked pass of this row of `masked_passes` is; its first one is number 0."""
    return row + 1


WHY_NONFINITE = "the weights are broken, or float16 overflows where bfloat16 would not"


class NonFiniteLogits(ValueError):
    """Logits were NaN or infinite. images: of which images of the batch, from 0. output: what came of all images, codes
    of these being meaningless; None where it was not kept."""

    def __init__(self, message: str, images: list[int]):
        super().__init__(message)
        self.images = images
        self.output: GenerationOutput | None = None


def refuse_nonfinite(scales: Sequence[int], bad_draws: Sequence[Tensor]) -> None:
    """NonFiniteLogits that names the first scale and its images for which logits were NaN or infinite.

    For each draw its scale, from 0, and which images had such logits, bool [B]. Waits for the device, once.
    """
    bad_SB = torch.stack(list(bad_draws)).cpu()
    for k, bad_B in zip(scales, bad_SB, strict=True):
        if bad_B.any():
            raise NonFiniteLogits(
                f"The logits of scale {k + 1} are NaN or infinite for images {bad_B.nonzero().flatten().tolist()} of "
                f"the batch: {WHY_NONFINITE}.",
                bad_SB.any(0).nonzero().flatten().tolist(),
            )


def check_known(known: KnownCodes, batch: int, length: int, vocab_size: int) -> None:
    """ValueError unless these are codes [batch or 1, length] that the codebook has, and which of them are known."""
    codes, tokens = known
    for name, tensor, dtype in (("codes_BL", codes, torch.int64), ("tokens_BL", tokens, torch.bool)):
        if tensor.ndim != 2 or tensor.shape[0] not in (1, batch) or tensor.shape[1] != length or tensor.dtype != dtype:
            expected = f"{dtype} [1, {length}]" + (f" or [{batch}, {length}]" if batch > 1 else "")
            raise ValueError(f"known.{name} is {tensor.dtype} {list(tensor.shape)}; expected {expected}.")
    if len(codes) != len(tokens):
        raise ValueError(f"known has {len(codes)} rows of codes and {len(tokens)} of tokens; expected as many of both.")
    outside = tokens & ((codes < 0) | (codes >= vocab_size))
    if outside.any():
        found = int(codes[outside][0])
        raise ValueError(f"known.codes_BL has the code {found}; expected 0 to {vocab_size - 1}.")


def stay_hidden(confidence_Bn: Tensor, hidden_Bn: Tensor, num_hidden_B: Tensor | int) -> Tensor:
    """The positions of lowest confidence among those still hidden, so many of each image, as a bool mask [B, n]."""
    order_Bn = least_confident_first(confidence_Bn, hidden_Bn)
    ranks_n = torch.arange(order_Bn.shape[1], device=order_Bn.device)
    stays_Bn = ranks_n < torch.as_tensor(num_hidden_B, device=order_Bn.device).view(-1, 1)
    return torch.zeros_like(hidden_Bn).scatter(1, order_Bn, stays_Bn.expand_as(order_Bn))


def masked_passes(passes: Sequence[int], num_unknown: Sequence[int]) -> list[list[int]]:
    """How many codes are hidden in each masked pass of one scale, by image; 0 where an image skips the pass.

    Args:
        passes: what the scale's schedule commits, first in the next-scale pass and then in masked ones.
        num_unknown: by image, the codes of the scale that are not put back.

    Row i stands for entry i of the schedule. An image of which every code is unknown follows the schedule, and skips
    row 0, for the next-scale pass has committed that entry. That pass does not see known codes, so for an image that
    has some it commits nothing, and the masked pass of row 0 does so in its place. Every row then begins with the share
    of the unknown codes that the schedule leaves, rounded up, and is skipped where it would hide as many as the last.
    """
    size = sum(passes)
    left = [size - sum(passes[:i]) for i in range(len(passes))]

    def of_image(unknown: int) -> list[int]:
        if unknown == size:
            return [0, *left[1:]]
        hidden = [-(-unknown * count // size) for count in left]
        return [now if now < before else 0 for before, now in pairwise([size, *hidden])]

    return [list(counts) for counts in zip(*map(of_image, num_unknown), strict=True)]


def image_seed(seed: int, image: int) -> int:
    """Key of one image's random numbers, which neighbouring images and seeds do not share; below 2^63."""
    return int(np.random.SeedSequence((seed, image)).generate_state(1, np.uint64)[0]) >> 1


def resolve_ramp(pyramid: Pyramid, ramp: RampLike = "linear") -> tuple[float, ...]:
    """The factor on `cfg` at each scale.

    Args:
        ramp: "linear": (k - 1) / (K - 1) for scale k of K, as published. "constant": 1. "cosine": the same from 0 to 1
            along half a cosine, slow at both ends. Or a number of at least 0 for each scale.
    """
    scales = range(pyramid.num_scales)
    if isinstance(ramp, str):
        if ramp not in NAMED_RAMPS:
            known = ", ".join(NAMED_RAMPS)
            raise ValueError(f'No guidance ramp is called "{ramp}"; known are {known}, or give one factor a scale.')
        return tuple(NAMED_RAMPS[ramp](k / max(1, pyramid.num_scales - 1)) for k in scales)
    if len(ramp) != pyramid.num_scales:
        raise ValueError(
            f"The guidance ramp has {len(ramp)} factors, but the pyramid {pyramid.sides} has {pyramid.num_scales} "
            "scales."
        )
    for factor in ramp:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise ValueError(f"The guidance ramp has the factor {factor!r}; each must be a number of at least 0.")
    return tuple(float(factor) for factor in ramp)


def resolve_schedule(pyramid: Pyramid, schedule: ScheduleLike = None) -> tuple[tuple[int, ...], ...]:
    """How many codes each pass of each scale commits; the first pass of a scale is next-scale prediction.

    Args:
        schedule: None or "default": the published schedule of the pyramid (for pyramids of one's own: 1, 3 at 2x2 and
            1, 1, 2, 5 at 3x3). "none": one pass a scale. "one-token": one code a pass. "even-N" and "cosine-N": N
            passes a scale, see `even_schedule` and `cosine_schedule`. A mapping side -> numbers, one pass for scales
            it does not name; or one list of numbers for each scale.
    Raises:
        ValueError: unless the numbers of every scale are positive integers with sum n_k^2, and one pass for scale 1.
    """
    if schedule is None or schedule == "default":
        by_side = DEFAULT_SCHEDULES.get(pyramid.sides, SMALL_SCALES)
        schedule = [(n * n,) if k == 0 else by_side.get(n, (n * n,)) for k, n in enumerate(pyramid.sides)]
    elif isinstance(schedule, str):
        schedule = _named_schedule(pyramid, schedule)
    elif isinstance(schedule, Mapping):
        unknown = sorted(set(schedule) - set(pyramid.sides))
        if unknown:
            raise ValueError(f"The schedule names sides {unknown}, but the pyramid has {pyramid.sides}.")
        schedule = [schedule.get(n, (n * n,)) for n in pyramid.sides]
    if len(schedule) != pyramid.num_scales:
        raise ValueError(
            f"The schedule has {len(schedule)} scales, but the pyramid {pyramid.sides} has {pyramid.num_scales}."
        )
    for k, (passes, size) in enumerate(zip(schedule, pyramid.sizes, strict=True)):
        valid = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in passes)
        if not valid or sum(passes) != size:
            raise ValueError(
                f"The schedule of scale {k + 1} is {list(passes)}; it must be positive integers that add up to {size}, "
                f"for example [{size}] for one pass."
            )
        if k == 0 and len(passes) > 1:
            raise ValueError(f"The schedule of scale 1 is {list(passes)}; it is never masked and takes [{size}].")
    return tuple(tuple(passes) for passes in schedule)


def even_schedule(pyramid: Pyramid, num_passes: int) -> tuple[tuple[int, ...], ...]:
    """A schedule that commits about equally many codes in each of `num_passes` passes, at least one in each."""
    if num_passes < 1:
        raise ValueError(f"A scale takes at least one pass, got {num_passes}.")
    schedule = []
    for k, size in enumerate(pyramid.sizes):
        passes = 1 if k == 0 else min(num_passes, size)
        schedule.append(tuple(size * (i + 1) // passes - size * i // passes for i in range(passes)))
    return tuple(schedule)


def cosine_schedule(pyramid: Pyramid, num_passes: int) -> tuple[tuple[int, ...], ...]:
    """A schedule that begins with few codes and ends with many: a cosine of the codes still hidden (MaskGIT).

    After pass i of N about cos(pi/2 i/N) of a scale's codes are hidden (arXiv 2202.04200, section 3.3); every pass
    commits at least one, and a scale of fewer codes than passes takes one pass for each code.
    """
    if num_passes < 1:
        raise ValueError(f"A scale takes at least one pass, got {num_passes}.")
    schedule = []
    for k, size in enumerate(pyramid.sizes):
        passes = 1 if k == 0 else min(num_passes, size)
        hidden = [size]
        for i in range(1, passes + 1):
            target = round(size * math.cos(math.pi / 2 * i / passes))
            hidden.append(max(passes - i, min(hidden[-1] - 1, target)))
        schedule.append(tuple(hidden[i] - hidden[i + 1] for i in range(passes)))
    return tuple(schedule)


def _named_schedule(pyramid: Pyramid, name: str) -> tuple[tuple[int, ...], ...]:
    if name == "none":
        return even_schedule(pyramid, 1)
    if name == "one-token":
        return even_schedule(pyramid, max(pyramid.sizes))
    shaped = re.fullmatch(r"(even|cosine)-([1-9][0-9]{0,5})", name)
    if shaped is None:
        raise ValueError(
            f'No schedule is called "{name}"; known are default, none, one-token, even-N and cosine-N (N passes a '
            "scale, as in even-4), or give the numbers."
        )
    make = even_schedule if shaped[1] == "even" else cosine_schedule
    return make(pyramid, int(shaped[2]))


def image_seeds(
    sampling: SamplingConfig, batch: int, first_image: int, seeds_B: Sequence[int] | Tensor | None
) -> Tensor:
    """`image_seed` of every image of a batch, int64 [B] on the CPU; arguments as in `generate_hmar`."""
    return torch.tensor(image_keys(sampling, batch, first_image, seeds_B))


def image_keys(
    sampling: SamplingConfig, batch: int, first_image: int, seeds_B: Sequence[int] | Tensor | None
) -> list[int]:
    """The same as numbers."""
    if seeds_B is None:
        return [image_seed(sampling.seed, first_image + i) for i in range(batch)]
    seeds = seeds_B.tolist() if isinstance(seeds_B, Tensor) else list(seeds_B)
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    if len(seeds) != batch or not whole or first_image != 0:
        raise ValueError(
            f"seeds_B is {seeds} with first_image {first_image}; expected a non-negative integer for each of {batch} "
            "images, and no first_image beside them."
        )
    return [image_seed(seed, 0) for seed in seeds]


def scale_inputs(model: HMAR | NextScaleTransformer, tokenizer: Tokenizer, f_hat_BEhw: Tensor, k: int) -> Tensor:
    """What scale k reads [B, n, E], in the model's dtype; nothing for the first scale."""
    if k == 0:
        inputs_BnE = f_hat_BEhw.new_empty(f_hat_BEhw.shape[0], 0, f_hat_BEhw.shape[1])
    else:
        inputs_BnE = tokenizer.quantizer.resize_input(f_hat_BEhw, k)
    return inputs_BnE.to(model.embedding.codes.weight.dtype)


def guidance_of_scales(sampling: SamplingConfig, pyramid: Pyramid) -> list[float]:
    return [sampling.cfg * factor for factor in resolve_ramp(pyramid, sampling.cfg_ramp)]


def with_null(guided: bool, class_B: Tensor, config: ModelConfig, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The batch as it is without guidance, else twice: with its classes, then with the null class."""
    if not guided:
        return class_B, list(tensors)
    null_B = torch.full_like(class_B, config.null_class)
    return torch.cat([class_B, null_B]), [torch.cat([tensor, tensor]) for tensor in tensors]


def check_pair(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """ValueError unless a model of these sizes goes with the tokenizer."""
    ours = (config.sides, config.vocab_size, config.code_dim)
    theirs = (tokenizer.pyramid.sides, tokenizer.config.vocab_size, tokenizer.config.code_dim)
    if ours != theirs:
        raise ValueError(
            f"The model was made for (sides, vocabulary, code dim) {ours}, but the tokenizer has {theirs}."
        )


def checked_classes(config: ModelConfig, class_B: Tensor, device: torch.device | str) -> Tensor:
    """The classes as int64 [B] on the device; ValueError unless they are classes of the model."""
    class_B = torch.as_tensor(class_B, device=device)
    if class_B.ndim != 1 or len(class_B) == 0 or class_B.is_floating_point():
        raise ValueError(f"Classes are a vector of integers, got {class_B.dtype} of shape {tuple(class_B.shape)}.")
    classes = class_B.tolist()
    if min(classes) < 0 or max(classes) > config.null_class:
        raise ValueError(
            f"Classes lie in 0..{config.num_classes - 1}, or are {config.null_class} for no class; got {classes}."
        )
    return class_B.long()


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Without dropout and drop-path, whatever mode the modules were in."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
