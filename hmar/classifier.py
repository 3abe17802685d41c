"""A support vector machine that names images by their coarse pixels: the judge of the demo and of the photographs.

It is trained on real images, and knows nothing of the models that it judges. Read next: demo.py, photographs.py.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional as F


class PixelClassifier:
    """Trained on images [N, 3, H, W] in [-1, 1] of any size and their classes [N]; sees them as `coarse_pixels`."""

    def __init__(self, images_N3HW: Tensor, classes_N: Tensor, side: int, *, grey: bool = False):
        self.side, self.grey = side, grey
        self.svm = SVC(C=10.0).fit(coarse_pixels(images_N3HW, side, grey=grey), classes_N.numpy())

    def __call__(self, images_N3HW: Tensor) -> Tensor:
        """The class that each image looks like, int64 [N]."""
        return torch.from_numpy(self.svm.predict(coarse_pixels(images_N3HW, self.side, grey=self.grey)))


def coarse_pixels(images_N3HW: Tensor, side: int, *, grey: bool = False) -> np.ndarray:
    """Images in [-1, 1] as numbers from 0 to 1, averaged over the cells of a grid: [N, 3 side^2], grey [N, side^2]."""
    images_NCHW = images_N3HW.float().cpu().add(1).div(2)
    if grey:
        images_NCHW = images_NCHW.mean(1, keepdim=True)
    return F.interpolate(images_NCHW, (side, side), mode="area").flatten(1).numpy()
