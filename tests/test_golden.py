"""Parity with the published code, on files of random weights, inputs and outputs.

The files are not part of the repository. Their folder is given by HMAR_GOLDEN, or is ../shared/golden beside the
repository; next to it, ../shared/checkpoints may list names and shapes of the published weights.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hmar.config import ModelConfig, TokenizerConfig, preset
from hmar.generate import SamplingConfig, generate_hmar, generate_var
from hmar.model import HMAR, MaskedTransformer, NextScaleTransformer
from hmar.published import DERIVED, load_published, published_layout
from hmar.pyramid import Pyramid
from hmar.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
GOLDEN = Path(os.environ.get("HMAR_GOLDEN", SHARED / "golden"))
CHECKPOINTS = GOLDEN.parent / "checkpoints"
TOLERANCE = 2e-4


class Golden:
    """One file: `config` from its metadata, published `weights`, and the other tensors by name."""

    def __init__(self, name):
        path = GOLDEN / f"{name}.safetensors"
        if not path.exists():
            pytest.skip(f"no golden file {path.name}: set HMAR_GOLDEN to the folder that holds it")
        with safe_open(path, "pt") as file:
            self.config = {k: v if k == "what" else json.loads(v) for k, v in file.metadata().items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.weights = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("w.")}
        self.tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("w.")}

    def __getitem__(self, name):
        return self.tensors[name]

    def tokenizer(self):
        config = TokenizerConfig(
            channels=self.config["tokenizer_channels"],
            vocab_size=self.config["vocab"],
            code_dim=self.config["code_dim"],
        )
        return self.load(Tokenizer(config, Pyramid(self.config["pyramid"])))

    def model_config(self):
        return ModelConfig(
            depth=self.config["depth"],
            width=self.config["width"],
            num_heads=self.config["heads"],
            num_classes=self.config["num_classes"],
            vocab_size=self.config["vocab"],
            code_dim=self.config["code_dim"],
            sides=self.config["pyramid"],
            mask_depth=self.config.get("mask_layers", 1),
        )

    def load(self, module):
        load_published(module, self.weights)
        return module.eval()


def assert_near(actual, expected):
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert (actual - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_tokenizer():
    golden = Golden("tokenizer")
    tokenizer = golden.tokenizer()
    assert_near(tokenizer.latent(golden["image"]), golden["latent"])
    assert torch.equal(tokenizer.encode(golden["image"]), golden["idx"])
    f_hats = tokenizer.quantizer.f_hats(golden["idx"])
    for k, f_hat in enumerate(f_hats):
        assert_near(f_hat, golden[f"f_hat.{k}"])
    assert_near(tokenizer.quantizer.next_scale_inputs(golden["idx"]), golden["teacher_forcing_input"])
    assert_near(tokenizer.decode(golden["idx"]), golden["reconstruction"])
    # The training forward must reconstruct the same image, with the clamp aside.
    output = tokenizer(golden["image"])
    assert torch.equal(output.codes_BL, golden["idx"])
    assert_near(output.reconstruction.clamp(-1, 1), golden["reconstruction"])


@pytest.mark.parametrize("name, pattern", [("var", "block_causal"), ("hmar_next_scale", "block_diagonal")])
@torch.no_grad()
def test_next_scale_logits(name, pattern):
    golden = Golden(name)
    model = golden.load(NextScaleTransformer(golden.model_config(), pattern))
    assert_near(model(golden["label"], golden["teacher_forcing_input"]), golden["logits"])


@torch.no_grad()
def test_masked_logits():
    golden = Golden("hmar_masked")
    model = golden.load(MaskedTransformer(golden.model_config()))
    masked_L = torch.zeros(golden.model_config().pyramid.length, dtype=torch.bool)
    masked_L[golden["masked_position"] + 1] = True
    logits = model(golden["label"], golden["teacher_forcing_input"], golden["visible_code_input"], masked_L)
    assert_near(logits, golden["logits"])


@pytest.mark.parametrize("use_cache", [True, False])
def test_var_generation(use_cache):
    golden = Golden("var")
    model = golden.load(NextScaleTransformer(golden.model_config(), "block_causal"))
    sampling = SamplingConfig(cfg=golden.config["cfg"], greedy=True)
    output = generate_var(model, Golden("tokenizer").tokenizer(), golden["label"], sampling, use_cache=use_cache)
    assert torch.equal(output.codes_BL, golden["generated_idx"])
    assert_near(output.f_hat_BEhw, golden["generated_f_hat"])
    assert_near((output.images_BCHW + 1) / 2, golden["generated_image"])


@pytest.mark.parametrize("masked_passes", [True, False])
def test_hmar_generation(masked_passes):
    golden = Golden("hmar")
    model = golden.load(HMAR(golden.model_config()))
    sampling = SamplingConfig(
        cfg=golden.config["cfg"],
        schedule=golden.config["mask_schedule"] if masked_passes else "none",
        masked_cfg_factor=golden.config["masked_pass_cfg_factor"],
        greedy=True,
    )
    output = generate_hmar(model, Golden("tokenizer").tokenizer(), golden["label"], sampling)
    suffix = "" if masked_passes else "_no_mask"
    assert torch.equal(output.codes_BL, golden[f"generated_idx{suffix}"])
    assert_near(output.f_hat_BEhw, golden[f"generated_f_hat{suffix}"])
    assert_near((output.images_BCHW + 1) / 2, golden[f"generated_image{suffix}"])


def test_wrong_weights_are_listed():
    golden = Golden("var")
    weights = dict(golden.weights)
    del weights["head.bias"]
    weights["surplus"] = torch.zeros(2)
    weights["word_embed.weight"] = torch.zeros(3, 4)
    weights["blocks.1.attn.zero_k_bias"] = torch.ones(128)
    weights["lvl_1L"] = weights["lvl_1L"].flip(1)
    with pytest.raises(ValueError) as error:
        load_published(NextScaleTransformer(golden.model_config(), "block_causal"), weights)
    message = str(error.value)
    assert "missing head.bias [128]" in message
    assert "unexpected surplus [2]" in message
    assert "word_embed.weight has shape [3, 4], expected [128, 32]" in message
    assert "blocks.1.attn.zero_k_bias is not zero" in message
    assert "lvl_1L describes another pyramid" in message


PUBLISHED_FILES = {
    "vae_ch160v4096z32": lambda: Tokenizer(preset("d16-256")[0], Pyramid.for_resolution(256)),
    "var_d36": lambda: NextScaleTransformer(preset("d36-512")[1], "block_causal"),
    **{f"var_d{d}": lambda d=d: NextScaleTransformer(preset(f"d{d}-256")[1], "block_causal") for d in (16, 20, 24, 30)},
    **{f"hmar-d{d}": lambda d=d: HMAR(preset(f"d{d}-256")[1]) for d in (16, 20, 24, 30)},
}


@pytest.mark.parametrize("name", sorted(PUBLISHED_FILES))
def test_published_files_are_covered(name):
    """Every preset has exactly the tensors of its published file, derived ones aside."""
    path = CHECKPOINTS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no list of tensors {path.name} beside the golden files")
    expected = {key: tuple(shape) for key, (shape, _) in json.loads(path.read_text()).items()}
    expected = {key: shape for key, shape in expected.items() if not re.search(DERIVED, key)}
    with torch.device("meta"):
        layout = published_layout(PUBLISHED_FILES[name]())
    assert len({published.name for published in layout.values()}) == len(layout)
    assert {published.name: published.shape for published in layout.values()} == expected
