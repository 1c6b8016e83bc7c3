"""What ends a command in one line on stderr and exit status 2."""

from __future__ import annotations

from typing import NoReturn


class UserError(Exception):
    """Something the user asked for cannot be done; the message says what and why."""


class OneLineErrors:
    """For a parser of arguments: its errors are UserErrors, without argparse's screen of usage in front."""

    prog: str

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")
