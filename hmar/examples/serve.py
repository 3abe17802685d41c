"""Requests answered in batches, with previews: python -m hmar.examples.serve runs/example (see hmar.examples.train)"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from hmar.checkpoint import from_pretrained
from hmar.engine import Engine
from hmar.generate import SamplingConfig
from hmar.sample import to_pixels
from hmar.serve import QueueFull, Request, Server

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="holds hmar and tokenizer: runs, folders of weights or published files")
parser.add_argument("--output", type=Path, default=Path("example-served.png"))
options = parser.parse_args()

gpu = torch.cuda.is_available()
model, tokenizer = (from_pretrained(options.folder / name) for name in ("hmar", "tokenizer"))
# On a GPU: bfloat16 weights, and every batch size captured in CUDA graphs when it first comes.
engine = Engine(model, tokenizer, device="cuda" if gpu else "cpu", dtype=torch.bfloat16 if gpu else None)
previews = []
with Server(engine, batch_sizes=(1, 2, 4), max_waiting=8) as server:
    sampling = SamplingConfig(cfg=1.5, top_k=25, top_p=0.95)
    futures = server.submit(*(Request(i % model.config.num_classes, seed=i, sampling=sampling) for i in range(7)))
    futures += server.submit(Request(0, seed=7, sampling=sampling, on_preview=lambda k, image: previews.append(image)))
    try:
        server.submit(*(Request(0) for _ in range(8)))
    except QueueFull as error:
        print(f"refused: {error}")
    images = [future.result().image_CHW for future in futures]
rows = [torch.cat(images, dim=2), torch.cat(previews + images[-1:] * (len(images) - len(previews)), dim=2)]
Image.fromarray(to_pixels(torch.cat(rows, dim=1)[None])[0]).save(options.output)
print(f"{server.num_generated} images, and {len(previews)} previews of the last one, in {options.output}")
