"""Types of options for argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def _checked(kind: Callable[[str], T], fits: Callable[[T], bool], wanted: str) -> Callable[[str], T]:
    def parse(text: str) -> T:
        try:
            if fits(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r}, wanted {wanted}")

    return parse


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: least <= integer <= most."""
    wanted = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    return _checked(int, lambda value: value >= least and (most is None or value <= most), wanted)


def number(least: float, below: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: least <= number < below."""
    wanted = f"a number from {least:g}" + (f" to below {below:g}" if below < float("inf") else "")
    return _checked(float, lambda value: least <= value < below, wanted)


def memory_size(text: str) -> int | str:
    """An argparse type: a number of bytes for `kt_moe.Gpu`, or "auto"."""
    if text == "auto":
        return text
    from kt_moe.gpu import parse_bytes  # which takes torch along, unlike help and errors

    return _checked(lambda size: parse_bytes("", size), bool, "auto or a size such as 6GiB")(text)


def list_of(item: Callable[[str], object]) -> Callable[[str], list[object]]:
    """An argparse type: values separated by commas, each once."""
    return lambda text: list(dict.fromkeys(item(part.strip()) for part in text.split(",")))
