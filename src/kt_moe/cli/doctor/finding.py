"""What `kt-moe doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        name: for programs; the same in every version.
        slow: it costs speed; otherwise it is only good to know.
        what, cost, mend: sentences without a full stop; mend is empty where nothing does.
    """

    name: str
    slow: bool
    what: str
    cost: str
    mend: str = ""
