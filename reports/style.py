"""How implementations look in every plot, and what the plots' axes have in common. Read next: attention_plots.py."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# Order, label, colour (told apart by colour-blind eyes; light and dark of one hue for two ways to call one library) and
# marker of each implementation. Ours are the two strong ones; what is not listed comes last.
LOOKS = {
    "hopper_bounded": ("ours: Hopper, bounded logits", "#8C1D40", "D"),
    "hopper": ("ours: Hopper", "#D55E00", "*"),
    "cuda": ("ours: CUDA for sm_80", "#F0A07A", "h"),
    "triton": ("ours: Triton", "#0072B2", "o"),
    "reference": ("ours: plain reference", "#000000", "P"),
    "flash4_varlen": ("FlashAttention-4, variable length", "#6A3D9A", "^"),
    "flash4_per_scale": ("FlashAttention-4, one call a scale", "#B9A3D6", "v"),
    "varlen_flash": ("FlashAttention-2, variable length", "#E69F00", "<"),
    "flash_per_scale": ("FlashAttention-2, one call a scale", "#F6D27E", ">"),
    "flex_max_autotune": ("FlexAttention, max-autotune", "#00694D", "D"),
    "flex": ("FlexAttention", "#7CCBAE", "s"),
    "sdpa_dense": ("SDPA, dense mask", "#999999", "X"),
}
OTHER_LOOKS = (("#CC79A7", "h"), ("#8C564B", "p"), ("#444444", "d"))
FLOOR_LINE = {"color": "black", "linewidth": 1.2, "linestyle": (0, (4, 2))}


def rank_of(name: str) -> tuple[int, str]:
    return (list(LOOKS).index(name) if name in LOOKS else len(LOOKS), name)


def look_of(name: str) -> tuple[str, str, str]:
    return LOOKS.get(name) or (name, *OTHER_LOOKS[sum(name.encode()) % len(OTHER_LOOKS)])


def label_of(name: str) -> str:
    return look_of(name)[0]


def colour_of(name: str) -> str:
    return look_of(name)[1]


def plain_log_axis(axis, low: float, high: float) -> None:
    """Ticks at 1, 2, 5 and their multiples of ten, written as plain numbers."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = high / low > 1e4
    ticks = [m * 10.0**e for e in exponents for m in ((1,) if few else (1, 2, 5)) if low <= m * 10.0**e <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.9f}".rstrip("0").rstrip(".")))


def save(figure: Figure, path: Path) -> Path:
    """Write and close a figure; returns the path. Equal figures give equal files."""
    figure.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(figure)
    return path
