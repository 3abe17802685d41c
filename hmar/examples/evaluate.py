"""Metrics of generated images, with a feature extractor of one's own: python -m hmar.examples.evaluate runs/example"""

import argparse
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from hmar.evaluate import MetricsConfig, evaluate
from hmar.extractors import register_extractor
from hmar.generate import SamplingConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="holds hmar, see hmar.examples.train")
parser.add_argument("--output", type=Path, default=Path("example-evaluation"))
parser.add_argument("--count", type=int, default=40, help="images; 50,000 for numbers to publish")
options = parser.parse_args()


def thumbnails(images_B3HW: Tensor) -> Tensor:
    """Features [B, 16] of images uint8 [B, 3, H, W]: grey, 4 x 4 pixels."""
    return F.interpolate(images_B3HW.float().mean(1, keepdim=True) / 255, (4, 4), mode="area").flatten(1)


# The name "inception-v3-compat", the default, gives the published kind of numbers; its weights are downloaded once.
register_extractor("thumbnails", lambda: thumbnails)
config = MetricsConfig(metrics=("fid", "kid", "precision", "recall"), extractor="thumbnails", kid_subset_size=20)
report = evaluate(
    options.folder / "hmar",
    options.output,
    reference="digits:test",  # or a folder of images, or an .npz as ADM's reference batches
    count=options.count,
    sampling=SamplingConfig(cfg=1.5, top_p=0.95),
    config=config,
    overwrite=True,
    progress=False,
)
print({name: round(value, 3) for name, value in report["metrics"].items()})
print(f"settings and numbers in {options.output}/evaluation.json, images in samples.npz")
