"""Golden folders of other sizes: the form of the published code's files, computed by this package in float64.

They cannot show parity with the published code, but that the parity command reads all it needs from the files.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from hmar.config import ModelConfig, TokenizerConfig
from hmar.generate import SamplingConfig, generate_hmar, generate_var
from hmar.model import HMAR, MaskedTransformer, NextScaleTransformer
from hmar.published import load_published, to_published
from hmar.pyramid import Pyramid
from hmar.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sizes:
    pyramid: tuple[int, ...]
    depth: int
    width: int
    heads: int
    num_classes: int
    vocab: int
    code_dim: int
    tokenizer_channels: int
    mask_layers: int
    mask_schedule: tuple[tuple[int, ...], ...]
    cfg: float
    masked_pass_cfg_factor: float
    mlp_ratio: float = 4.0
    shared_modulation: bool = False
    batch: int = 2

    def tokenizer(self):
        config = TokenizerConfig(channels=self.tokenizer_channels, vocab_size=self.vocab, code_dim=self.code_dim)
        return Tokenizer(config, Pyramid(self.pyramid))

    def model_config(self):
        return ModelConfig(
            depth=self.depth,
            width=self.width,
            num_heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            num_classes=self.num_classes,
            vocab_size=self.vocab,
            code_dim=self.code_dim,
            sides=self.pyramid,
            mask_depth=self.mask_layers,
            shared_modulation=self.shared_modulation,
        )


OTHER_SIZES = Sizes(
    pyramid=(1, 2, 4, 5),
    depth=3,
    width=96,
    heads=4,
    num_classes=7,
    vocab=50,
    code_dim=16,
    tokenizer_channels=32,
    mask_layers=2,
    mask_schedule=((1,), (2, 2), (16,), (3, 10, 12)),
    cfg=2.5,
    masked_pass_cfg_factor=0.3,
    mlp_ratio=3.0,
)
WIDE_FIRST_SCALE = Sizes(
    pyramid=(2, 3),
    depth=2,
    width=64,
    heads=1,
    num_classes=3,
    vocab=24,
    code_dim=8,
    tokenizer_channels=64,
    mask_layers=2,
    mask_schedule=((4,), (1,) * 9),
    cfg=0.7,
    masked_pass_cfg_factor=1e-6,
    shared_modulation=True,
    batch=3,
)


def random_weights(module, generator):
    """Weights that float16 holds exactly, large enough for codes to differ from token to token."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("log_scale_H"):
            values = 1.4 + 0.2 * noise
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * noise
        elif parameter.ndim == 1:
            values = 0.1 * noise
        else:
            values = noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(values.half())
    return module


@torch.no_grad()
def write_golden(folder: Path, sizes: Sizes, seed: int = 0) -> Path:
    """The five golden files for these sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    shared = ("pyramid", "depth", "width", "heads", "num_classes", "vocab", "code_dim", "tokenizer_channels")
    config, pyramid = sizes.model_config(), Pyramid(sizes.pyramid)

    def write(name, module, tensors, *settings):
        weights = to_published(module)
        halved = {k: w.half() if w.is_floating_point() else w for k, w in weights.items()}
        content = {f"w.{k}": w.contiguous() for k, w in halved.items()}
        content |= {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}
        metadata = {key: json.dumps(getattr(sizes, key)) for key in (*shared, *settings)}
        metadata = {**metadata, "seed": str(seed), "what": "computed in float64"}
        save_file({k: t.contiguous() for k, t in content.items()}, folder / f"{name}.safetensors", metadata)
        # What goes on computing has the weights of the file.
        load_published(module, halved)
        return module

    tokenizer = random_weights(sizes.tokenizer(), generator).double().eval()
    side = tokenizer.image_size
    image = (torch.rand(sizes.batch, 3, side, side, generator=generator) * 2 - 1).double()
    codes = tokenizer.encode(image)
    inputs = tokenizer.quantizer.next_scale_inputs(codes)
    outputs = {f"f_hat.{k}": f_hat for k, f_hat in enumerate(tokenizer.quantizer.f_hats(codes))}
    outputs |= {"image": image, "latent": tokenizer.latent(image), "idx": codes, "teacher_forcing_input": inputs}
    write("tokenizer", tokenizer, {**outputs, "reconstruction": tokenizer.decode(codes)})

    label = torch.randint(sizes.num_classes, (sizes.batch,), generator=generator)
    given = {"label": label, "teacher_forcing_input": inputs}
    # The files hold inputs in float32.
    inputs = inputs.float().double()

    var = random_weights(NextScaleTransformer(config, "block_causal"), generator).double().eval()
    sampling = SamplingConfig(cfg=sizes.cfg, greedy=True)
    outputs = generated(generate_var(var, tokenizer, label, sampling))
    write("var", var, {**given, "logits": var(label, inputs), **outputs}, "cfg")

    stage1 = random_weights(NextScaleTransformer(config, "block_diagonal"), generator).double().eval()
    write("hmar_next_scale", stage1, {**given, "logits": stage1(label, inputs)})

    masked = random_weights(MaskedTransformer(config), generator).double().eval()
    residuals = tokenizer.quantizer.own_residuals(codes).float().double()
    first = pyramid.sizes[0]
    position = torch.randperm(pyramid.length - first, generator=generator)[: pyramid.length // 2]
    masked_L = torch.zeros(pyramid.length, dtype=torch.bool).scatter(0, position + first, True)
    outputs = {"visible_code_input": residuals, "masked_position": position}
    write("hmar_masked", masked, {**given, **outputs, "logits": masked(label, inputs, residuals, masked_L)})

    hmar = random_weights(HMAR(config), generator).double().eval()
    outputs = {"label": label}
    for suffix, schedule in (("", sizes.mask_schedule), ("_no_mask", "none")):
        factor = sizes.masked_pass_cfg_factor
        sampling = SamplingConfig(cfg=sizes.cfg, greedy=True, schedule=schedule, masked_cfg_factor=factor)
        outputs |= generated(generate_hmar(hmar, tokenizer, label, sampling), suffix)
    write("hmar", hmar, outputs, "cfg", "mask_schedule", "masked_pass_cfg_factor", "mask_layers")
    return folder


def generated(output, suffix=""):
    return {
        f"generated_idx{suffix}": output.codes_BL,
        f"generated_f_hat{suffix}": output.f_hat_BEhw,
        f"generated_image{suffix}": (output.images_BCHW + 1) / 2,
    }
