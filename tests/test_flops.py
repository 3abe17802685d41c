"""Model FLOPs against torch's counter, and the peaks they are compared with."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.generation import parts
from engine_cases import CONFIG, build, build_tokenizer
from hmar.config import PRESETS
from hmar.engine import Engine
from hmar.flops import generation_flops, peak_flops, training_flops, utilization
from hmar.generate import SamplingConfig, resolve_schedule
from hmar.loss import token_weights
from hmar.model import MaskedTransformer, NextScaleTransformer
from hmar.stages import MaskedObjective, NextScaleObjective
from hmar_kernels import SpanMask

TINY = replace(PRESETS["tiny"][1], depth=4, sides=(1, 2, 3, 5), mask_depth=2)
BATCH = 3


def counted(model, objective, *arguments):
    with FlopCounterMode(display=False) as counter:
        objective(*arguments)[0].backward()
    return counter.get_total_flops() / BATCH


@pytest.fixture
def codes():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(TINY.vocab_size, (BATCH, TINY.pyramid.length), generator=generator)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("stage", ["next-scale", "masked"])
def test_the_formula_counts_what_torch_counts(stage, shared, codes):
    config = replace(TINY, shared_modulation=shared)
    model = (MaskedTransformer if stage == "masked" else NextScaleTransformer)(config, attention="reference")
    length = config.pyramid.length
    # The reference multiplies all pairs, so all are unmasked here.
    model.masks.masks[None] = SpanMask.full(length, length)
    classes = torch.zeros(BATCH, dtype=torch.long)
    inputs_BLE = torch.randn(BATCH, length - 1, config.code_dim)
    if stage == "masked":
        masked_L = torch.arange(length) % 2 == 1
        actual = counted(model, MaskedObjective(model), classes, inputs_BLE, inputs_BLE, masked_L, codes)
    else:
        objective = NextScaleObjective(model, token_weights(config.pyramid))
        actual = counted(model, objective, classes, inputs_BLE, codes)
    assert training_flops(model) == pytest.approx(actual, rel=1e-12)


def test_only_unmasked_pairs_count():
    _, config = PRESETS["d16-256"]
    with torch.device("meta"):
        diagonal, causal = (NextScaleTransformer(config, pattern=p) for p in ("block_diagonal", "block_causal"))
    pairs = 286_434 - 110_468
    assert training_flops(causal) - training_flops(diagonal) == 3 * 16 * 4 * pairs * 1024
    # 6 FLOPs a parameter and token, in the main
    weights = 16 * 12 * 1024**2 * 680
    assert training_flops(diagonal) == pytest.approx(6 * weights, rel=0.1)


@pytest.mark.parametrize("cfg", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["hmar", "var"])
def test_an_image_is_what_torch_counts(kind, cfg):
    """The calls of the engine's program that are the transformer's."""
    model = build(kind)
    engine = Engine(model, build_tokenizer())
    engine.generate(torch.tensor([1]), SamplingConfig(cfg=cfg, schedule="even-3"))
    (program,) = engine.programs.values()
    with torch.no_grad():
        calls = parts(engine, program)["transformer"]
        with FlopCounterMode(display=False) as counter:
            for call in calls:
                call()
    schedule = resolve_schedule(CONFIG.pyramid, "even-3" if engine.is_hmar else "none")
    expected = generation_flops(CONFIG, schedule, program.settings.guided_S, engine.is_cached)
    assert expected == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_counts_of_hmar_and_var_at_1024_px():
    _, config = PRESETS["d24-1024"]
    once, guided = resolve_schedule(config.pyramid, "none"), [True] * len(config.sides)
    hmar, var = (generation_flops(config, once, guided, cached) for cached in (False, True))
    pairs = sum(config.pyramid.offsets[k] * size for k, size in enumerate(config.pyramid.sizes))
    attention_of_earlier = 2 * config.depth * 4 * pairs * config.width
    assert var - hmar == pytest.approx(attention_of_earlier, rel=1e-3)
    with pytest.raises(ValueError, match="must be of"):
        generation_flops(config, once[1:], guided)


def test_peaks_are_found_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GB200") == 2500e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA RTX A4000") is None
    assert utilization(1e12, torch.device("cpu"), torch.bfloat16) is None
