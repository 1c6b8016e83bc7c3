"""What the command line says where it refuses its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def one_line_error(capsys: pytest.CaptureFixture[str], command: str, run: Callable[[], Any]) -> str:
    """The error of a run of `kt-moe COMMAND`, which must end with status 2 and have one line."""
    try:
        status = run()
    except SystemExit as stop:  # argparse's way
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith(f"kt-moe {command}: error: ")
    assert error.count("\n") == 1
    return error
