"""Tables and paragraphs of plain text that fit a terminal of 100 columns."""

import textwrap
from collections.abc import Mapping, Sequence

WIDTH = 100


def table(rows: Sequence[Sequence[str]], *, left: int = 1, wrap: Mapping[int, int] | None = None) -> str:
    """Rows in columns, the first `left` of them flush left, the others flush right.

    wrap: by column, the width at which its cells go on in a further line; these are flush left.
    """
    wrap = wrap or {}
    folded = [
        [textwrap.wrap(cell, wrap[i]) or [""] if i in wrap else [cell] for i, cell in enumerate(row)] for row in rows
    ]
    widths = [max((len(line) for row in folded for line in row[i]), default=0) for i in range(len(rows[0]))]
    lines = []
    for row in folded:
        for n in range(max(map(len, row))):
            cells = [cell[n] if n < len(cell) else "" for cell in row]
            placed = (
                cell.ljust(width) if i < left or i in wrap else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            lines.append("  ".join(placed).rstrip())
    return "\n".join(lines)


def paragraph(text: str) -> str:
    """A text broken into lines."""
    return "\n".join(textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False))
