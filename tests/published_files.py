"""Small files in the published form under the published file names, which the README's commands and tests convert."""

from collections import OrderedDict
from pathlib import Path

import torch

from golden_folder import random_weights
from hmar.config import ModelConfig, TokenizerConfig
from hmar.model import HMAR, MaskedTransformer, NextScaleTransformer
from hmar.published import to_published
from hmar.pyramid import Pyramid
from hmar.tokenizer import Tokenizer

TOKENIZER = TokenizerConfig(channels=32, code_dim=8, vocab_size=16)
# As many blocks as heads, with 64 channels each: the published law.
MODEL = ModelConfig(depth=2, width=128, num_classes=4, vocab_size=16, code_dim=8)


def make(kind, seed=0, config=MODEL, tokenizer=TOKENIZER):
    """A module with random weights; stage 2 ("masked") stands on the stage 1 of the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "tokenizer":
        return random_weights(Tokenizer(tokenizer, Pyramid(config.sides)), generator).eval()
    if kind == "hmar":
        return random_weights(HMAR(config), generator).eval()
    pattern = "block_causal" if kind == "var" else "block_diagonal"
    module = random_weights(NextScaleTransformer(config, pattern), generator)
    if kind == "masked":
        module = MaskedTransformer.from_next_scale(module)
        random_weights(module.blocks, generator)
        random_weights(module.head, generator)
        module.mask_embedding_C.data.copy_(torch.randn(config.width, generator=generator))
    return module.eval()


def state_dict(kind, **options):
    return OrderedDict((name, tensor.clone()) for name, tensor in to_published(make(kind, **options)).items())


def training_checkpoint(**options):
    """What VAR's trainer saves: model and tokenizer among settings and the optimizer's state."""
    var, vae = state_dict("var", **options), state_dict("tokenizer", **options)
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]}
    trainer = {"config": {"fp16": 1}, "var_wo_ddp": var, "vae_local": vae, "var_optim": {"optimizer": optimizer}}
    return {"epoch": 3, "iter": 0, "args": {"depth": 2, "tlr": 1e-4}, "trainer": trainer}


def write_published_files(folder: Path) -> None:
    """vae_ch160v4096z32.pth, var_d16.pth, hmar-d16.pth, stage1.pth and stage2.pth (HMAR), ar-ckpt-last.pth (VAR)."""
    for name, kind in (
        ("vae_ch160v4096z32", "tokenizer"),
        ("var_d16", "var"),
        ("hmar-d16", "hmar"),
        ("stage1", "next-scale"),
        ("stage2", "masked"),
    ):
        torch.save(state_dict(kind), folder / f"{name}.pth")
    torch.save(training_checkpoint(), folder / "ar-ckpt-last.pth")
