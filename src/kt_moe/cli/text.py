"""Numbers and lists as the commands print them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence


def size_text(nbytes: float) -> str:
    """A number of bytes in the unit that leaves one to four digits before the point: "1.50 GiB"."""
    power = min(max(abs(int(nbytes)).bit_length() - 1, 0) // 10, 4)
    unit = ("bytes", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{nbytes / 1024**power:.{2 if power else 0}f} {unit}"


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


def table(rows: Sequence[Sequence[str]], *, right: Container[int] = ()) -> str:
    """Rows of cells as aligned columns, two spaces apart; those of the columns `right` end together."""
    columns = []
    for number, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if number in right else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))
