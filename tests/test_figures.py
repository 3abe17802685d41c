"""Figures: images land where they belong, frames mark the right ones, curves are the numbers given."""

import numpy as np
import pytest
import torch
from PIL import Image

from hmar import figures
from hmar.pyramid import Pyramid


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def blobs(mask):
    """Number of separate runs of True along the row that has most of them."""
    edges = np.diff(np.pad(mask.astype(int), ((0, 0), (1, 1))), axis=1)
    return int((edges == 1).sum(axis=1).max())


@pytest.mark.parametrize("size", [8, 32, 200])
def test_image_grid_shows_every_image_once(tmp_path, size):
    images = torch.full((2, 3, 3, size, size), -1.0)
    images[1, 2, 0] = 1.0  # one red image, below and to the right
    path = figures.save(figures.image_grid(images, title="title"), tmp_path / "new" / "grid.png")
    picture = pixels(path)
    black = (picture < 40).all(axis=2)
    red = (picture[..., 0] > 215) & (picture[..., 1:] < 40).all(axis=2)
    rows, columns = np.nonzero(red)
    assert rows.mean() > picture.shape[0] / 2 and columns.mean() > picture.shape[1] / 2
    assert red.sum() == pytest.approx(black.sum() / 5, rel=0.15)  # the title is black, too


def test_frames_mark_the_chosen_images(tmp_path):
    images = torch.zeros(1, 4, 3, 16, 16)
    framed = torch.tensor([[True, False, True, False]])
    plain = pixels(figures.save(figures.image_grid(images, title="t"), tmp_path / "plain.png"))
    marked = pixels(figures.save(figures.image_grid(images, title="t", framed_RC=framed), tmp_path / "marked.png"))
    vermilion = np.array([int(figures.VERMILION[i : i + 2], 16) for i in (1, 3, 5)])

    def framed_pixels(picture):
        return np.abs(picture - vermilion).sum(axis=2) < 60

    assert not framed_pixels(plain).any()
    columns = np.nonzero(framed_pixels(marked).any(axis=0))[0]
    gaps = np.diff(columns) > 30  # the middle of the unframed second image
    assert gaps.sum() == 1 and framed_pixels(marked).sum() > 200


def test_loss_curves_are_the_numbers_given():
    steps, losses = list(range(100)), list(np.linspace(5, 1, 100))
    panels = {"one": {"a": (steps, losses)}, "two": {"b": (steps, losses), "c": (steps[:1], losses[:1])}}
    figure = figures.loss_curves(panels, title="losses")
    one, two = figure.axes
    assert one.get_title(loc="left") == "one" and len(one.lines) == 2 and len(two.lines) == 4
    assert list(one.lines[0].get_ydata()) == losses and list(one.lines[0].get_xdata()) == steps
    assert [text.get_text() for text in two.get_legend().get_texts()] == ["b", "c"]


def test_running_mean():
    values = np.random.default_rng(0).normal(size=200)
    expected = [values[max(0, i - 5) : i + 6].mean() for i in range(200)]
    np.testing.assert_allclose(figures.running_mean(values), expected)
    np.testing.assert_allclose(figures.running_mean([3.0]), [3.0])


def test_masks_draws_both_masks_of_every_pyramid():
    figure = figures.masks({"small": Pyramid((1, 2)), "large": Pyramid((1, 2, 3))}, title="masks")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(titles) == 4 and "5 tokens" in titles[0] and "14 tokens" in titles[3]
    assert "17 pairs, 68% of the matrix" in titles[0] and "21 pairs, 84% of the matrix" in titles[1]


@pytest.mark.parametrize("sides", [(1, 2), (1, 2, 3, 4, 5, 6)])
def test_pyramid_draws_the_grid_of_every_scale(sides):
    shape = Pyramid(sides)
    figure = figures.pyramid(torch.zeros(len(sides), 3, 16, 16), shape, title="pyramid")
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == len(sides)
    assert [len(axes.lines) for axes in shown] == [2 * (side + 1) for side in sides]
    assert f"{sides[-1] ** 2} tokens" in shown[-1].get_title()
