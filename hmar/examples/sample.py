"""Images from trained weights: python -m hmar.examples.sample runs/example (see hmar.examples.train)"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from hmar.checkpoint import from_pretrained
from hmar.generate import SamplingConfig, generate_hmar
from hmar.sample import to_pixels

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="holds hmar and tokenizer: runs, folders of weights or published files")
parser.add_argument("--output", type=Path, default=Path("example-samples.png"))
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = from_pretrained(options.folder / "hmar", device=device)
tokenizer = from_pretrained(options.folder / "tokenizer", device=device)

classes = torch.arange(model.config.num_classes)
rows = []
for schedule in ("none", "default", "cosine-4", "one-token"):  # more and more masked passes
    sampling = SamplingConfig(cfg=1.5, cfg_ramp="linear", top_k=25, top_p=0.95, temperature=1.0, schedule=schedule)
    # One seed for all classes. Without seeds_B, image i follows from sampling.seed and i.
    output = generate_hmar(model, tokenizer, classes, sampling, seeds_B=[7] * len(classes))
    rows.append(torch.cat(list(output.images_BCHW), dim=2))  # side by side
Image.fromarray(to_pixels(torch.cat(rows, dim=1)[None])[0]).save(options.output)
print(f"{len(classes)} classes with {len(rows)} schedules in {options.output}")
