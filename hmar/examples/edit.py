"""In-painting, out-painting and editing by class: python -m hmar.examples.edit runs/example"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from hmar.checkpoint import from_pretrained
from hmar.data import Digits
from hmar.edit import box_hole, inpaint, outpaint
from hmar.generate import SamplingConfig
from hmar.sample import to_pixels

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="holds hmar and tokenizer, see hmar.examples.train")
parser.add_argument("--output", type=Path, default=Path("example-edits.png"))
options = parser.parse_args()

model, tokenizer = from_pretrained(options.folder / "hmar"), from_pretrained(options.folder / "tokenizer")
size = tokenizer.image_size
image, _ = Digits(size, "test")[0]
images = image.expand(4, -1, -1, -1)  # four results of one image
hole = box_hole(size, size, (size // 2, 0, size, size))  # bool, True where to paint: the right half
sampling = SamplingConfig(seed=1, schedule="one-token")

painted = inpaint(model, tokenizer, images, hole, sampling=sampling)
by_class = inpaint(model, tokenizer, images, hole, torch.tensor([0, 1, 2, 3]), sampling, composite=True)
moved = outpaint(model, tokenizer, images, (-size // 2, 0, size // 2, size), sampling=sampling)
same = inpaint(model, tokenizer, images.masked_fill(hole, 1.0), hole, sampling=sampling)
print("what the hole showed changes nothing:", torch.equal(same.images_BCHW, painted.images_BCHW))
print(f"{painted.known.codes.tokens_BL[0].sum()} of {tokenizer.pyramid.length} codes were known")

rows = [painted.known.blanked_BCHW, painted.images_BCHW, by_class.images_BCHW, moved.images_BCHW]
table = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
Image.fromarray(to_pixels(table[None])[0]).save(options.output)
print(f"hole, painted, by class, moved: {options.output}")
