"""Pictures of plans show what the plans say: areas of blocks, pairs that attend, numbers of tiles."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.image import imread
from matplotlib.text import Annotation

from hmar.pyramid import Pyramid
from hmar_kernels import SpanMask
from hmar_kernels.attention.plan import key_plan, query_plan
from reports import plan_pictures as pictures

PYRAMIDS = {"small": pictures.SMALL, "256": Pyramid.for_resolution(256)}


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def painted(ax, colour, shape):
    """How often each (query, key) pair is covered by patches of a colour."""
    count = np.zeros(shape, int)
    for collection in ax.collections:
        if not isinstance(collection, PatchCollection) or len(collection.get_facecolor()) == 0:
            continue
        if tuple(collection.get_facecolor()[0]) == to_rgba(colour):
            for path in collection.get_paths():
                (x0, y0), (x1, y1) = path.vertices.min(0), path.vertices.max(0)
                count[round(y0) : round(y1), round(x0) : round(x1)] += 1
    return count


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("pattern", pictures.PATTERNS)
@pytest.mark.parametrize("name", PYRAMIDS)
def test_blocks_cover_what_attends_and_are_told_apart(ax, name, pattern, of_keys):
    pyramid = PYRAMIDS[name]
    mask = pictures.mask_of(pyramid, pattern)
    plan = (key_plan if of_keys else query_plan)(mask, 32, 16, "cpu")
    pictures.draw_plan(ax, mask, plan, pyramid, of_keys=of_keys)
    attends = mask.to_dense().numpy()
    full = painted(ax, pictures.FULL, attends.shape)
    attending = painted(ax, pictures.ATTENDING, attends.shape)
    masked = painted(ax, pictures.IN_VAIN, attends.shape)
    assert max(full.max(), attending.max(), masked.max()) == 1
    assert np.array_equal(full + attending, attends.astype(int))  # every pair that attends, once, and no other
    assert not (full & masked).any() and np.array_equal(masked & attends, attending)
    numbers = [text.get_text() for text in ax.texts if isinstance(text, Annotation)]
    assert numbers == [str(i) for i in range(plan.num_tiles)]


@pytest.mark.parametrize("pattern", pictures.PATTERNS)
def test_intervals_are_the_mask(ax, pattern):
    mask = pictures.mask_of(pictures.TINY, pattern)
    pictures.draw_intervals(ax, mask, pictures.TINY)
    shown = sum(painted(ax, colour, (30, 30)) for colour in pictures.SCALES)
    assert np.array_equal(shown, mask.to_dense().numpy().astype(int))
    bars = [c for c in ax.collections if isinstance(c, PatchCollection)]
    assert [len(bar.get_paths()) for bar in bars] == [1, 4, 9, 16]


def test_an_even_grid_is_a_plan_of_the_same_mask_and_wastes_more():
    for pyramid in PYRAMIDS.values():
        for pattern in pictures.PATTERNS:
            mask = pictures.mask_of(pyramid, pattern)
            even = pictures.even_grid(mask, 64, 64)
            visited = np.zeros((mask.num_queries, mask.num_keys), bool)
            tiles = even.tiles.tolist()
            assert [tile[0] for tile in tiles] == list(range(0, mask.num_queries, 64))
            assert all(a[1] == b[0] for a, b in pairwise(tiles)) and tiles[-1][1] == mask.num_queries
            for begin, end, first, last, inner, inner_end in tiles:
                visited[begin:end, first:last] = True
                assert mask.to_dense()[begin:end, inner:inner_end].all()
            assert not (mask.to_dense().numpy() & ~visited).any()
            assert pictures.useful_share(mask, even) <= pictures.useful_share(mask, query_plan(mask, 64, 64, "cpu"))


def test_share_of_use():
    mask = SpanMask.block_diagonal([3, 5])
    assert pictures.useful_share(mask, pictures.even_grid(mask, 8, 8)) == (9 + 25) / 64


def test_a_build_is_the_same_twice_and_pictures_are_legible(tmp_path):
    first, second = pictures.build(tmp_path / "a"), pictures.build(tmp_path / "b")
    names = ["kernels_intervals.png", "kernels_plan_small.png", "kernels_plan_256.png", "plans.md"]
    assert [path.name for path in first] == names
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name
    for path in first[:3]:
        assert min(imread(path).shape[:2]) > 1000
    rows = [line.split(" | ") for line in first[3].read_text().splitlines() if line.startswith("| 256 px")]
    mask = Pyramid.for_resolution(256).block_diagonal()
    plan = query_plan(mask, 64, 64, "cpu")
    counts = [plan.num_tiles, *plan.block_counts(), f"{100 * pictures.useful_share(mask, plan):.0f} %"]
    assert rows[0][1:-1] == ["block-diagonal", "64 x 64", *map(str, counts)]


@pytest.mark.parametrize(
    "make", [pictures.intervals_figure, pictures.small_plan_figure, pictures.published_plan_figure]
)
def test_no_text_leaves_the_picture_and_tile_numbers_do_not_overlap(make):
    figure = make()
    figure.draw_without_rendering()
    everything = figure.bbox
    for ax in figure.axes:
        labels = [text for text in ax.texts if isinstance(text, Annotation)]
        boxes = [label.get_window_extent() for label in labels]
        ticks = [tick.get_window_extent() for tick in (*ax.get_xticklabels(), *ax.get_yticklabels())]
        for box in (*boxes, *ticks, ax.title.get_window_extent()):
            assert everything.x0 <= box.x0 and box.x1 <= everything.x1 and everything.y0 <= box.y0
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in (*boxes[:i], *ticks, ax.title.get_window_extent()))
        assert not any(a.overlaps(b) for a, b in pairwise(ticks[: len(ax.get_xticklabels())]))
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert everything.x0 <= box.x0 and box.x1 <= everything.x1
        assert not any(box.overlaps(ax.title.get_window_extent()) for ax in figure.axes)
    plt.close(figure)
