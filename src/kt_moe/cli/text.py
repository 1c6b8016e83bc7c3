"""Numbers and lists as the commands print them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def size_text(nbytes: float) -> str:
    """A number of bytes in the unit that leaves one to four digits before the point: "1.50 GiB"."""
    value, unit = float(nbytes), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.{2 if unit else 0}f} {_UNITS[unit]}"


def count_text(number: int, noun: str) -> str:
    """ "1 layer", "61 layers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def ranges_text(numbers: Iterable[int]) -> str:
    """Ascending numbers with runs folded: "0, 3-60"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def table(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> str:
    """Rows of cells as aligned columns, two spaces apart; those of the columns `right` end together."""
    rightmost = set(right)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(widths[i]) if i in rightmost else cell.ljust(widths[i]) for i, cell in enumerate(row)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
