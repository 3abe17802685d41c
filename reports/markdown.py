"""Numbers and tables as Markdown."""

from __future__ import annotations

import math

DASH = "-"


def or_dash(value: str | None) -> str:
    return DASH if value is None else value


def number(value: float | None) -> str:
    """Three significant digits, never in powers of ten."""
    if value is None or math.isnan(value):
        return DASH
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def whole(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:.0f}"


def percent(value: float) -> str:
    return DASH if math.isnan(value) else f"{100 * value:.0f} %"


def ratio(value: float | None) -> str:
    return DASH if value is None or math.isnan(value) else f"{value:.2f}"


def table(head: list[str], lines: list[list[str]], left: tuple[int, ...]) -> str:
    rule = [":--" if i in left else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))
