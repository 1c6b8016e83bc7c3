"""What the commands say and take: errors of one line, types of options, numbers and tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Container, Iterable, Sequence
from typing import NoReturn


class UserError(Exception):
    """Something the user asked for cannot be done; the message says what and why."""


class OneLineErrors:
    """For a parser of arguments: its errors are UserErrors, without argparse's screen of usage in front."""

    prog: str

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def integer(least: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `least`."""

    def integer(text: str) -> int:  # argparse says its name where there is none
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value}, wanted at least {least}")
        return value

    return integer


def list_of(item: Callable[[str], object]) -> Callable[[str], list[object]]:
    """An argparse type: values separated by commas, each once."""
    return lambda text: list(dict.fromkeys(item(part.strip()) for part in text.split(",")))


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
