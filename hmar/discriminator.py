"""The adversary of the tokenizer's training: a convolutional net that judges overlapping patches of an image.

PatchGAN (arXiv 1611.07004, section 3.2), as VQGAN uses it. Trained by train.py on `hmar.loss.TokenizerLoss`.
"""

from __future__ import annotations

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Images [B, C, H, W] to logits [B, 1, h, w], larger where a patch looks real.

    Every level halves the sides and doubles the channels (up to 8 x); two convolutions of stride 1 follow. Group
    normalisation instead of batch normalisation: an image's logits do not depend on the others in its batch.
    """

    def __init__(self, image_channels: int = 3, channels: int = 64, levels: int = 3):
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(image_channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        width = channels
        for level in range(1, levels + 1):
            wider = min(2**level, 8) * channels
            stride = 2 if level < levels else 1
            layers += [
                nn.Conv2d(width, wider, 3 + (stride == 2), stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, wider), wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        layers.append(nn.Conv2d(width, 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.layers(images_BCHW)
