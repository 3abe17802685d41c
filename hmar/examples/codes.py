"""Codes of an image set, made once, and a stage trained on them: python -m hmar.examples.codes runs/example"""

import argparse
from pathlib import Path

from hmar.codes import CodesFolder
from hmar.recipe import make_config
from hmar.tokenize import tokenize
from hmar.train import train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="where hmar.examples.train has put its runs")
options = parser.parse_args()
tokenizer, folder = options.folder / "tokenizer", options.folder / "codes"

# Instead of "digits": a folder in ImageNet layout, with crops=10 for ten random crops of each image. Called again, it
# goes on where it was stopped; files that are whole are kept.
index = tokenize(tokenizer, "digits", folder, shard_size=512, progress=False)
print(f"{index.num_images} images x {index.crops} crops in {len(index.shards())} shards")

dataset = CodesFolder(folder)
epoch, image = 0, 7
codes_L, target = dataset[epoch, image]
print(f"image {image}, class {dataset.class_names[target]}: {codes_L.tolist()}")

config = {"stage": "var", "preset": "tiny", "output_dir": str(options.folder / "var"), "steps": 3, "batch_size": 16}
config |= {"tokenizer_weights": str(tokenizer), "model": {"num_classes": 10}}
config |= {"data": {"name": "codes", "path": str(folder)}}
result = train(make_config(config), overwrite=True, progress=False)
print(f"VAR on codes: {result.step} steps, weights in {result.weights}")
