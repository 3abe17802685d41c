"""All stages of HMAR on handwritten digits, a few steps each: python -m hmar.examples.train runs/example"""

import argparse
from pathlib import Path

from hmar.recipe import make_config
from hmar.train import train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="for the runs tokenizer, next-scale and hmar")
parser.add_argument("--preset", default="tiny", help="digits-32 gives digits; see hmar info")
parser.add_argument("--steps", type=int, default=3, help="of each stage; digits-32 wants several hundred")
options = parser.parse_args()

# The keys are those of `hmar train` and of its YAML files; a wrong one is an error that lists the known ones.
common = {
    "preset": options.preset,
    "steps": options.steps,
    "batch_size": 16,
    "data": {"name": "digits"},  # or {"name": "folder", "path": ...} with images in ImageNet layout
    "model": {"num_classes": 10},
    "optimizer": {"lr": 2e-3},
}
tokenizer, next_scale, hmar = (str(options.folder / name) for name in ("tokenizer", "next-scale", "hmar"))
stages = [
    {"stage": "tokenizer", "output_dir": tokenizer},
    {"stage": "next-scale", "output_dir": next_scale, "tokenizer_weights": tokenizer},
    {"stage": "masked", "output_dir": hmar, "tokenizer_weights": tokenizer, "next_scale_weights": next_scale},
]
for stage in stages:
    result = train(make_config({**common, **stage}), progress=False)
    print(f"{stage['stage']}: {result.step} steps, weights in {result.weights}")
