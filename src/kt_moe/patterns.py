"""Regular expressions of adapter configs, which strangers write: matched within a time limit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

_T = TypeVar("_T")
_SECONDS = 10.0
_PLAIN = re.compile(r"(?:\.\*\\?\.)?(?:[\w-]|\\?\.)+")  # cannot backtrack: names, perhaps after `.*\.`
# Python's engine cannot be interrupted from a thread, so another process matches first.
_CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    for form in "{}", r"(.*\\.)?({})$", r"(^|.*\\.){}($|\\..*)", r"(?:^|.*?\\.){}\\.[0-9]+\\.":
        try:
            compiled = re.compile(form.format(pattern))
        except re.error:  # of this form alone, as (?i) is in the middle
            continue
        for name in names:
            compiled.fullmatch(name) if form == "{}" else compiled.match(name)
"""


def check_patterns(patterns: Iterable[str], names: Sequence[str]) -> None:
    """Check that patterns are regular expressions, and fast ones on these names.

    Names and simple patterns pass at once, others are tried in a process of their own.

    Raises:
        ValueError: one that is no regular expression, or takes longer than the limit; names it.
    """
    tried = [pattern for pattern in dict.fromkeys(patterns) if not _PLAIN.fullmatch(pattern)]
    for pattern in tried:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from None
    if not tried:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([tried, list(names)]),
            stdout=subprocess.PIPE,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        number = len(printed.split()) - 1
        raise ValueError(
            f"the pattern {tried[max(number, 0)]!r} takes more than {_SECONDS:g} s on the names of this model"
        ) from None


def first_match(patterns: Mapping[str, _T], names: Sequence[str]) -> _T | None:
    """The value of the first pattern that, as PEFT matches rank_pattern, matches one of the names."""
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return None
