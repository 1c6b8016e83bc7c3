"""Types of options for argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable


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
