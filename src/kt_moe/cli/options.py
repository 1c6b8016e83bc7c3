"""Types of options for argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: least <= integer <= most."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r}, wanted an integer {wanted}")
        return value

    return parse


def number(least: float, below: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: least <= number < below."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < below:
            wanted = f"a number from {least:g}" + (f" to below {below:g}" if below < float("inf") else "")
            raise argparse.ArgumentTypeError(f"{text!r}, wanted {wanted}")
        return value

    return parse


def memory_size(text: str) -> int | str:
    """An argparse type: a number of bytes for `kt_moe.Gpu`, or "auto"."""
    from kt_moe.gpu import parse_bytes  # which imports torch

    try:
        return text if text == "auto" else parse_bytes("", text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted auto or a size such as 6GiB") from None


def cpu_share(text: str) -> float | str:
    """An argparse type: a part of the rows for `kt_moe.Gpu`, or "auto"."""
    try:
        value = text if text == "auto" else float(text)
    except ValueError:
        value = -1.0
    if isinstance(value, float) and not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted auto or a number from 0 to 1")
    return value


def list_of(item: Callable[[str], object]) -> Callable[[str], list[object]]:
    """An argparse type: values separated by commas, each once."""

    def parse(text: str) -> list[object]:
        return list(dict.fromkeys(item(part.strip()) for part in text.split(",")))

    return parse
