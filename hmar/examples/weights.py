"""Weights into the published names and shapes, and back: python -m hmar.examples.weights runs/example"""

import argparse
from pathlib import Path

import torch

from hmar.checkpoint import from_pretrained, save_pretrained
from hmar.convert import convert

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="holds hmar: a run or a folder of weights")
parser.add_argument("--output", type=Path, default=Path("example-weights"))
options = parser.parse_args()
options.output.mkdir(parents=True, exist_ok=True)

# One file under the names of the published checkpoints.
for sentence in convert(options.folder / "hmar", options.output / "hmar.pth", overwrite=True):
    print(sentence)

# Depth, pyramid and number of classes are read off the tensors. What they cannot tell is given: published models have
# heads of size 64 and 8 mask blocks.
ours = from_pretrained(options.folder / "hmar")
given = {"num_heads": ours.config.num_heads, "mask_depth": ours.config.mask_depth}
theirs = from_pretrained(options.output / "hmar.pth", given=given)
same = all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
print("the same weights:", same)

# The package's own form: model.safetensors and config.json, which needs nothing to be told.
folder = save_pretrained(options.output / "hmar", theirs, note="from a published file")
print(type(from_pretrained(folder)).__name__, "in", folder)
