"""What the options of a LoraConfig have to be, whether a file has them or a user wrote them in Python."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

_NAMES = ("target_modules", "exclude_modules", "layers_pattern")  # or one string: a pattern, or a name
_LISTS = ("target_parameters", "modules_to_save")


def check_numbers(where: str, options: Mapping[str, Any]) -> None:
    """Check ranks, alphas, dropout and bias; those that are not there are PEFT's defaults.

    Args:
        where: the options are from, for messages.

    Raises:
        ValueError: one is of another type or out of range; names it.
    """
    for key, rank in numbers_by_pattern(where, options, "r", "rank_pattern").items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"{where} has rank {rank!r}{of_pattern(key)}, wanted an integer of at least 1")
    for key, alpha in numbers_by_pattern(where, options, "lora_alpha", "alpha_pattern").items():
        if not is_finite(alpha):
            raise ValueError(f"{where} has lora_alpha {alpha!r}{of_pattern(key)}, wanted a finite number")
    dropout = options.get("lora_dropout", 0.0)
    if not (is_finite(dropout) and 0.0 <= dropout < 1.0):
        raise ValueError(f"{where} has lora_dropout {dropout!r}, wanted a probability in [0, 1)")
    if (bias := options.get("bias", "none")) not in ("none", "all", "lora_only"):
        raise ValueError(f"{where} has bias {bias!r}, wanted none, all or lora_only")


def check_names(where: str, options: Mapping[str, Any]) -> None:
    """Check the options that name modules and layers, as `check_numbers` does the numbers."""
    for name in (*_NAMES, *_LISTS):
        value = options.get(name)
        if not (value is None or (name in _NAMES and isinstance(value, str)) or _all(value, str)):
            wanted = "names" if name in _NAMES else "a list of names"
            raise ValueError(f"{where} has {name} {value!r}, wanted {wanted}")
    layers = options.get("layers_to_transform")
    if not (layers is None or isinstance(layers, int) or _all(layers, int)):
        raise ValueError(f"{where} has layers_to_transform {layers!r}, wanted integers")


def numbers_by_pattern(where: str, options: Mapping[str, Any], name: str, pattern: str) -> dict[str, Any]:
    """The values of an option by the pattern that they are for, the general one by "".

    Raises:
        ValueError: the patterns are no mapping of strings; names the option.
    """
    own = {"": options[name]} if name in options else {}
    values = options.get(pattern) or {}
    if not isinstance(values, Mapping) or not _all(list(values), str):
        raise ValueError(f"{where} has {pattern} {values!r}, wanted an object: numbers by name or pattern")
    if "" in values:
        raise ValueError(f'{where} has {pattern} {values!r}, with "", which is no name')
    return {**own, **values}


def of_pattern(key: str) -> str:
    """For which pattern a value is, for messages; nothing for the general one."""
    return f" for {key!r}" if key else ""


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and neither NaN nor infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _all(value: Any, kind: type) -> bool:
    is_list = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    return is_list and all(isinstance(one, kind) for one in value)
