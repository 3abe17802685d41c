"""Small models, edits and settings that the engine's tests on the CPU and on a GPU share."""

import torch

from hmar.config import ModelConfig, TokenizerConfig
from hmar.generate import KnownCodes, SamplingConfig, generate_hmar, generate_var
from hmar.model import HMAR, NextScaleTransformer
from hmar.tokenizer import Tokenizer

TOKENIZER_CONFIG = TokenizerConfig(
    channels=8, multipliers=(1, 2), num_res_blocks=1, code_dim=8, vocab_size=40, norm_groups=4
)
CONFIG = ModelConfig(
    depth=3, width=64, num_heads=2, num_classes=5, vocab_size=40, code_dim=8, sides=(1, 2, 3, 5), mask_depth=1
)
PYRAMID = CONFIG.pyramid
CLASSES = torch.tensor([0, 3, 1])
KINDS = ("hmar", "var", "next-scale")


def build(kind, config=CONFIG, seed=0):
    """A transformer whose codes differ from token to token, and from class to class."""
    torch.manual_seed(seed)
    model = HMAR(config) if kind == "hmar" else NextScaleTransformer(config, PATTERN_OF_KIND[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


PATTERN_OF_KIND = {"var": "block_causal", "next-scale": "block_diagonal"}


def build_tokenizer(seed=1, config=TOKENIZER_CONFIG, pyramid=PYRAMID):
    torch.manual_seed(seed)
    tokenizer = Tokenizer(config, pyramid)
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    return tokenizer.eval()


def plain(model, *arguments, **options):
    """What the engine must give."""
    return (generate_hmar if isinstance(model, HMAR) else generate_var)(model, *arguments, **options)


def holes(batch=3):
    """Known codes: a quarter of them, all but one, and none, which take different numbers of masked passes."""
    generator = torch.Generator().manual_seed(3)
    codes_BL = torch.randint(CONFIG.vocab_size, (batch, PYRAMID.length), generator=generator)
    tokens_BL = torch.rand(batch, PYRAMID.length, generator=generator) < 0.25
    tokens_BL[1] = True
    tokens_BL[1, -1] = False
    tokens_BL[2] = False
    return KnownCodes(codes_BL, tokens_BL)


SAMPLINGS = {
    "default": SamplingConfig(cfg=2.0, top_k=30, top_p=0.97, seed=4),
    "one-token": SamplingConfig(cfg=2.0, top_k=30, seed=5, schedule="one-token", temperature=0.9),
    "even-3": SamplingConfig(cfg=1.0, cfg_ramp=[0.5, 0.0, 0.0, 2.0], seed=6, schedule="even-3"),
    "guided masked passes": SamplingConfig(cfg=1.5, masked_cfg_factor=1.0, seed=7),
    "unguided": SamplingConfig(cfg=0.0, masked_cfg_factor=1.0, seed=8),
    "greedy": SamplingConfig(cfg=1.5, greedy=True, schedule="cosine-3"),
}


def sampling_for(model, name):
    sampling = SAMPLINGS[name]
    if isinstance(model, HMAR):
        return sampling
    return SamplingConfig(**{k: v for k, v in vars(sampling).items() if k != "schedule"})
