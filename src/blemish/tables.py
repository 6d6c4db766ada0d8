"""Plain-text tables for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,), gap: str = "  ") -> str:
    """Format rows of equal length as columns; those in `left` are left-aligned, the others right-aligned.

    >>> print(aligned([["row", "ms"], ["plain", "10.25"]]))
    row       ms
    plain  10.25
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        gap.join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
