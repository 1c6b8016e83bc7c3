"""The one exception a command turns into a line on stderr and exit status 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user asked for cannot be done; the message says what and why."""
