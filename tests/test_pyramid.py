"""The pyramid's arithmetic and masks, and the presets built on it."""

import dataclasses
import json

import pytest

from hmar.config import PRESETS, ModelConfig, TokenizerConfig
from hmar.pyramid import Pyramid

# Lengths and numbers of visible pairs from the specification's table of pyramids.
PUBLISHED = [
    (256, 680, 110_468, 286_434),
    (512, 2240, 1_522_100, 3_269_850),
    (1024, 9451, 24_587_383, 56_954_392),
]


@pytest.mark.parametrize("pixels, length, diagonal, causal", PUBLISHED)
def test_published_pyramids(pixels, length, diagonal, causal):
    pyramid = Pyramid.for_resolution(pixels)
    assert pyramid.length == length
    assert pyramid.offsets[-1] == length
    assert pyramid.side == pixels // 16
    assert pyramid.block_diagonal().num_pairs == diagonal
    assert pyramid.block_causal().num_pairs == causal


def test_slices_tile_the_sequence():
    pyramid = Pyramid((1, 2, 2, 5))
    tokens = [t for k in range(pyramid.num_scales) for t in range(*pyramid.slice(k).indices(pyramid.length))]
    assert tokens == list(range(pyramid.length))
    assert pyramid.sizes == (1, 4, 4, 25)


def test_masks_say_who_sees_whom():
    pyramid = Pyramid((1, 2, 3))
    scale_of = [0] * 1 + [1] * 4 + [2] * 9
    diagonal = pyramid.block_diagonal().to_dense()
    causal = pyramid.block_causal().to_dense()
    for q in range(pyramid.length):
        for k in range(pyramid.length):
            assert bool(diagonal[q, k]) == (scale_of[q] == scale_of[k])
            assert bool(causal[q, k]) == (scale_of[k] <= scale_of[q])


@pytest.mark.parametrize("sides", [(), (0, 1), (1, 2.0), (3, 2), (True,), (1, -2)])
def test_bad_sides_are_refused(sides):
    with pytest.raises(ValueError, match=r"pyramid"):
        Pyramid(sides)


def test_unknown_resolution_lists_known_ones():
    with pytest.raises(ValueError, match="256, 512, 1024"):
        Pyramid.for_resolution(300)
    with pytest.raises(ValueError, match="counted from 0"):
        Pyramid((1, 2)).slice(2)


def test_lists_become_tuples():
    """YAML and JSON hold lists; equality and hashing must not notice."""
    assert Pyramid([1, 2]) == Pyramid((1, 2))
    assert hash(ModelConfig(depth=2, sides=[1, 2])) == hash(ModelConfig(depth=2, sides=(1, 2)))
    assert TokenizerConfig(multipliers=[1, 2]).multipliers == (1, 2)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_agree_with_themselves_and_survive_json(name):
    tokenizer, model = PRESETS[name]
    assert tokenizer.vocab_size == model.vocab_size
    assert tokenizer.code_dim == model.code_dim
    assert 16 <= model.head_dim <= 128
    for config in (tokenizer, model):
        assert type(config)(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    pixels = name.split("-")[1] if "-" in name else None
    if pixels is not None:
        assert tokenizer.stride * model.pyramid.side == int(pixels)


def test_derived_values():
    config = ModelConfig(depth=24)
    assert (config.width, config.num_heads, config.head_dim, config.mask_depth) == (1536, 24, 64, 8)
    assert config.drop_path == pytest.approx(0.1)
    assert config.null_class == 1000
    assert TokenizerConfig().stride == 16
    assert TokenizerConfig(multipliers=(1, 2, 2)).stride == 4


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ModelConfig(depth=0), "depth is 0, expected at least 1 block"),
        (lambda: ModelConfig(depth=4, width=100, num_heads=3), "a divisor of width 100; 1 with width 64 would"),
        (lambda: ModelConfig(depth=4, mask_depth=5), "1 to 4"),
        (lambda: ModelConfig(depth=4, class_drop=1.5), "class_drop"),
        (lambda: ModelConfig(depth=4, vocab_size=0), "vocab_size"),
        (lambda: TokenizerConfig(channels=40), "norm_groups is 32, expected a divisor of the channels"),
        (lambda: TokenizerConfig(multipliers=()), "multipliers"),
        (lambda: TokenizerConfig(dropout=1.0), "dropout"),
    ],
)
def test_bad_configurations_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
