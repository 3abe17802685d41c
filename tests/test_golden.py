"""Parity with the published code, on files of random weights, inputs and outputs, and on its lists of tensors.

The files are not part of the repository. Their folder is given by HMAR_GOLDEN, or is ../shared/golden beside the
repository; next to it, ../shared/checkpoints may list names and shapes of the published weights. What is compared
stands in hmar/parity.py.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from hmar.config import PRESETS
from hmar.model import HMAR, NextScaleTransformer
from hmar.parity import KIND_OF_FILE, LIMIT, Golden, format_row, measure_file
from hmar.published import DERIVED, load_published, published_layout, read_config, to_published
from hmar.pyramid import Pyramid
from hmar.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
GOLDEN = Path(os.environ.get("HMAR_GOLDEN", SHARED / "golden"))
CHECKPOINTS = GOLDEN.parent / "checkpoints"

# What each file must at least have been compared in, lest a comparison gets lost.
NUM_QUANTITIES = {"tokenizer": 7, "var": 7, "hmar_next_scale": 1, "hmar_masked": 1, "hmar": 6}


def golden_file(name):
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"no golden file {path.name}: set HMAR_GOLDEN to the folder that holds it")
    return path


@pytest.mark.parametrize("name", KIND_OF_FILE)
def test_parity(name):
    rows = measure_file(golden_file(name))
    assert [format_row(row) for row in rows if not row.passed] == []
    assert len(rows) >= NUM_QUANTITIES[name]
    assert {row.limit for row in rows} <= {0, LIMIT}
    assert LIMIT == 2e-4


def test_wrong_weights_are_listed():
    golden = Golden.open(golden_file("var"))
    model = golden.module("var")
    weights = dict(golden.weights)
    del weights["head.bias"]
    weights["surplus"] = torch.zeros(2)
    weights["word_embed.weight"] = torch.zeros(3, 4)
    width = model.config.width
    weights["blocks.1.attn.zero_k_bias"] = torch.ones(width)
    weights["lvl_1L"] = weights["lvl_1L"].flip(1)
    with pytest.raises(ValueError) as error:
        load_published(model, weights)
    message = str(error.value)
    assert f"missing head.bias [{model.config.vocab_size}]" in message
    assert "unexpected surplus [2]" in message
    assert f"word_embed.weight has shape [3, 4], expected [{width}, {model.config.code_dim}]" in message
    assert "blocks.1.attn.zero_k_bias is not zero" in message
    assert "lvl_1L describes another pyramid" in message
    assert len(error.value.problems) == 5


PUBLISHED_FILES = {
    "vae_ch160v4096z32": ("tokenizer", "d16-256"),
    "var_d36": ("var", "d36-512"),
    **{f"var_d{d}": ("var", f"d{d}-256") for d in (16, 20, 24, 30)},
    **{f"hmar-d{d}": ("hmar", f"d{d}-256") for d in (16, 20, 24, 30)},
}


def listed_tensors(name):
    """The published file's tensors without their numbers, but with lvl_1L, which tells the pyramid."""
    path = CHECKPOINTS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no list of tensors {path.name} beside the golden files")
    listed = json.loads(path.read_text())
    dtypes = {"float32": torch.float32, "int64": torch.int64}
    return {key: torch.empty(shape, dtype=dtypes[dtype], device="meta") for key, (shape, dtype) in listed.items()}


@pytest.mark.parametrize("name", sorted(PUBLISHED_FILES))
def test_published_files_are_covered(name):
    """Every preset has exactly the tensors of its published file, derived ones aside."""
    kind, of_preset = PUBLISHED_FILES[name]
    tokenizer, model = PRESETS[of_preset]
    makers = {
        "tokenizer": lambda: Tokenizer(tokenizer, model.pyramid),
        "var": lambda: NextScaleTransformer(model, "block_causal"),
        "hmar": lambda: HMAR(model),
    }
    listed = listed_tensors(name)
    expected = {key: tuple(tensor.shape) for key, tensor in listed.items() if not re.search(DERIVED, key)}
    with torch.device("meta"):
        module = makers[kind]()
    layout = published_layout(module)
    assert len({published.name for published in layout.values()}) == len(layout)
    assert {published.name: published.shape for published in layout.values()} == expected
    # What is written has the derived tensors too, as a strict load of the published code wants them.
    written = to_published(module)
    assert written.keys() == listed.keys()
    assert all((written[key].shape, written[key].dtype) == (listed[key].shape, listed[key].dtype) for key in listed)


@pytest.mark.parametrize("name", sorted(PUBLISHED_FILES))
@pytest.mark.parametrize("with_levels", [True, False])
def test_sizes_are_read_off_published_files(name, with_levels):
    """Depth, width, heads, classes, vocabulary, channels and pyramid come out as the preset says them."""
    kind, of_preset = PUBLISHED_FILES[name]
    tokenizer, model = PRESETS[of_preset]
    weights = listed_tensors(name)
    levels = weights.pop("lvl_1L", None)
    if levels is not None and with_levels:
        scales = [k for k, size in enumerate(model.pyramid.sizes) for _ in range(size)]
        assert levels.shape == (1, len(scales))
        weights["lvl_1L"] = torch.tensor([scales])
    config, sides = read_config(kind, weights)
    assert config == (tokenizer if kind == "tokenizer" else model)
    assert sides == (Pyramid.for_resolution(256).sides if kind == "tokenizer" else model.sides)
